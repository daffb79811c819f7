"""What names of timm's transformers look like, for hints: neither timm nor torch is imported."""

_FAMILIES = (
    "beit", "cait", "coat", "convit", "crossvit", "davit", "deit", "dinov2", "dinov3", "eva",
    "flexivit", "gcvit", "hiera", "levit", "maxvit", "mixer_", "mvitv2", "nest_", "pit_", "pvt_v2",
    "samvit", "sequencer2d", "swin", "tiny_vit", "tnt_", "twins_", "visformer", "vit_", "vitamin",
    "volo_", "xcit",
)  # fmt: skip
"""Beginnings of names."""


def looks_like_timm(name: str) -> bool:
    """Whether a name reads like a timm transformer (``vit_tiny_patch16_224``) and not like a path.

    timm is not imported: this serves hints such as "did you mean to export it first?".
    """
    stem = name.removeprefix("timm/").removeprefix("hf-hub:timm/").lower()
    return "/" not in stem and not stem.endswith(".onnx") and stem.startswith(_FAMILIES)
