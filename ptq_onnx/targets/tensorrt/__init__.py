"""TensorRT: symmetric int8 or FP8 Q/DQ."""
