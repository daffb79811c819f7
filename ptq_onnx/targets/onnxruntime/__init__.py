"""ONNX Runtime on CPU and GPU: Q/DQ that its optimizer turns into integer kernels."""
