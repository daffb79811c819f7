"""The target ``integer``: a Vision Transformer in standard ONNX without a float op inside.

Each file holds one family of ops: its constants, the formula on NumPy int64 arrays (which
the simulator runs) and the ONNX nodes that compute the very same integers. ``plan.py``
decides what each node of the fused graph becomes, ``lowering.py`` writes the file.

Sources: FQ-ViT (arXiv 2111.13824) for the residual stream and LayerNorm on PTF codes and
for Log-Int-Softmax, I-BERT (arXiv 2101.01321) for the exponential and for GELU by polynomial.
"""
