"""Parameter bytes, MACs, the verdict."""
