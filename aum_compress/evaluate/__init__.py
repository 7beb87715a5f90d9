"""Measuring a model on labelled audio: figures with intervals, predictions, comparison of two models."""
