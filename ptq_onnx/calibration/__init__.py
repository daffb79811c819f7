"""Calibration: from statistics of float tensors, of a fixed size, to clip ranges."""
