"""Graphs in onnx_ir: formulas, branches, symbolic shapes, ops of other domains and opsets."""
