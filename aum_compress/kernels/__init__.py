"""Implementations of the selective scan, chosen behind `models.scan`."""
