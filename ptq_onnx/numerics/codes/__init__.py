"""How numbers are held in few bits: each code a value with its arithmetic and its ONNX nodes."""
