"""Clips and their index: TAU mobile, class folders, synthetic soundscapes; checks, feature cache, data module."""
