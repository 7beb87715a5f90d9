"""ONNX writing, verification, the torch-free runtime."""
