"""Checks whether a quantized ONNX file is what a target takes."""
