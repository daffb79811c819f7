"""Measures of a quantized model, as dataclasses; nothing is drawn here and nothing is changed."""
