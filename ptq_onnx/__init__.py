"""Post-training quantization of Vision Transformers, from ONNX to ONNX."""

__version__ = "0.1.0"
