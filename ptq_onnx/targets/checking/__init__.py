"""What the rules of all targets are made of: a quantized file as products and codes."""
