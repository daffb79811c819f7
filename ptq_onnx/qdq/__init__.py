"""Quantized numbers as ONNX nodes: where factors go is planned, then nodes are written."""
