"""Losses, the Lightning module, fitting, metrics, distillation."""
