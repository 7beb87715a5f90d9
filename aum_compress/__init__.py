"""Audio Mamba within 128 kB and 30 MMAC/s: compression recipes, budget checks, verified ONNX exports."""

__version__ = "0.1.0"
