"""ONNX Runtime as a library: sessions whose errors are ours, and what to do where it is missing."""
