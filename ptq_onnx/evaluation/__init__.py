"""Models run in ONNX Runtime and measured: closeness per output, accuracy, parity."""
