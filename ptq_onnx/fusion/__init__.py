"""Fusion: the ops of a Vision Transformer from what an exporter made of them."""
