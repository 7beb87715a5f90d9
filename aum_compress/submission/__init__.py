"""The DCASE 2025 Task 1 inference package: what it runs (copied into it), and what writes it."""
