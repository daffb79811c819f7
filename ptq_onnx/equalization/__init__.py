"""Forms of the float graph that quantize better: factors moved from channels into weights."""
