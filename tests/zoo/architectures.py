"""Vision Transformers of every kind, so small that each is exported and quantized in seconds.

``ARCHITECTURES`` maps a name to a function that builds the module, in two sizes: tiny ones, and
the smallest published ones (``full``). Weights are random, seeded, and nowhere trivial: scales
that start at zero or one, and statistics of BatchNorm, are drawn as well, so that no part of a
graph is without effect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

CLASSES = 10


@dataclass(frozen=True)
class Architecture:
    """How to build a network, and the pixels of its square input."""

    build: Callable[[], nn.Module]
    full: Callable[[], nn.Module] | None = None
    size: int = 32
    full_size: int = 224
    tags: frozenset[str] = field(default=frozenset())


@contextlib.contextmanager
def torchvision_schemas() -> Iterator[None]:
    """Two operators that torchvision wants and that a torch without CUDA may lack."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(AttributeError, RuntimeError):
            getattr(torch.ops.torchvision, name)
            continue
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)
    yield


_KEPT: list[Any] = []
"""Libraries whose schemas vanish with them."""


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torchvision_schemas():
            import timm

        model: nn.Module = timm.create_model(name, pretrained=False, exportable=True, **options)
        return model

    return build


def _vit(
    name: str = "vit_tiny_patch16_224", size: int = 32, full_size: int = 224, **options: Any
) -> Architecture:
    """``full_size`` 0: the smallest published one is too large to be tried."""
    tiny = {
        "img_size": size,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": CLASSES,
    }
    full = _timm(name) if full_size else None
    return Architecture(_timm(name, **{**tiny, **options}), full, size, full_size)


class _HuggingFace(nn.Module):
    """A model of transformers that takes images and gives one tensor."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        result = self.model(pixel_values=pixel_values, return_dict=True)
        found: torch.Tensor = getattr(result, self.output)
        return found


def _hugging_face(
    config: str, model: str, output: str = "logits", attention: str = "eager", **options: Any
) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torchvision_schemas():
            import transformers

        settings = getattr(transformers, config)(num_labels=CLASSES, **options)
        settings._attn_implementation = attention
        return _HuggingFace(getattr(transformers, model)(settings), output)

    return build


HF = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


class _Detector(nn.Module):
    """DETR's shape: a convolution, an encoder, and a decoder of queries with cross attention."""

    def __init__(self, width: int = 32, heads: int = 2, depth: int = 1, queries: int = 6) -> None:
        super().__init__()
        torch.backends.mha.set_fastpath_enabled(False)  # a fused layer that no exporter knows
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.position = nn.Parameter(torch.zeros(1, 16, width))
        self.queries = nn.Parameter(torch.zeros(1, queries, width))
        settings = {"dim_feedforward": 2 * width, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, activation="gelu", norm_first=True, **settings)
            for _ in range(depth)
        )
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, activation="relu", **settings)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, CLASSES)
        self.boxes = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        memory = self.stem(images).flatten(2).transpose(1, 2) + self.position
        for layer in self.encoder:
            memory = layer(memory)
        found = self.queries.expand(images.shape[0], -1, -1)
        for layer in self.decoder:
            found = layer(found, memory)
        found = self.norm(found)
        return torch.cat([self.classes(found), self.boxes(found).sigmoid()], -1)


class _ClipImageEncoder(nn.Module):
    """CLIP's image half: patches, quick-GELU, the class token projected."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        with torchvision_schemas():
            import transformers

        settings = getattr(transformers, f"{kind}VisionConfig")(
            **{**HF, "projection_dim": 16, "hidden_act": "quick_gelu"}
        )
        settings._attn_implementation = "eager"
        self.model = getattr(transformers, f"{kind}VisionModelWithProjection")(settings)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(pixel_values=pixel_values).image_embeds
        return found


def _siglip() -> nn.Module:
    with torchvision_schemas():
        import transformers

    settings = transformers.SiglipVisionConfig(**HF)
    settings._attn_implementation = "eager"
    return _HuggingFace(transformers.SiglipVisionModel(settings), "pooler_output")


def _mixer() -> nn.Module:
    with torchvision_schemas():
        from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(img_size=32, patch_size=8, embed_dim=32, num_blocks=2, num_classes=CLASSES)  # type: ignore[no-any-return]


SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_classes": CLASSES,
}
STAGES = {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2), "num_classes": CLASSES}

ARCHITECTURES: dict[str, Architecture] = {
    # --- isotropic ------------------------------------------------------------------------
    "vit": _vit(),
    "vit_registers": _vit("vit_small_patch16_224", reg_tokens=4, pos_embed="learn"),
    "vit_avg_pool": _vit(class_token=False, global_pool="avg"),
    "vit_attention_pool": _vit(class_token=False, global_pool="map"),
    "vit_rope": _vit("vit_pe_core_tiny_patch16_384", size=32, full_size=384),
    "deit": _vit("deit_tiny_patch16_224"),
    "deit_distilled": _vit("deit_tiny_distilled_patch16_224"),
    "deit3": _vit("deit3_small_patch16_224"),
    "dinov2": _vit("vit_small_patch14_dinov2", full_size=518, init_values=0.5),
    "dinov2_swiglu": _vit("vit_giant_patch14_dinov2", full_size=0, init_values=0.5),
    "eva02": _vit("eva02_tiny_patch14_224"),
    "eva02_sub_norm": _vit("eva02_base_patch14_224"),
    "aimv2": _vit("aimv2_large_patch14_224"),
    "beit": _vit("beit_base_patch16_224"),
    "clip": Architecture(lambda: _ClipImageEncoder("CLIP")),
    "siglip": Architecture(_siglip),
    "clip_timm": _vit("vit_base_patch32_clip_quickgelu_224"),
    "siglip_timm": _vit("vit_base_patch16_siglip_224"),
    "cait": _vit("cait_xxs24_224", num_heads=2),
    "xcit": Architecture(
        _timm(
            "xcit_nano_12_p8_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2,
            num_classes=CLASSES, cls_attn_layers=1,
        ),
        _timm("xcit_nano_12_p16_224"),
    ),
    "mixer": Architecture(_mixer, _timm("mixer_s32_224")),
    # --- windows --------------------------------------------------------------------------
    "swin": Architecture(
        _timm("swin_tiny_patch4_window7_224", **SWIN), _timm("swin_tiny_patch4_window7_224")
    ),
    "swinv2": Architecture(
        _timm("swinv2_tiny_window8_256", **SWIN), _timm("swinv2_tiny_window8_256"), full_size=256
    ),
    "twins": Architecture(
        _timm(
            "twins_svt_small", img_size=32, embed_dims=(16, 32), depths=(2, 2),
            num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1), wss=(2, 2),
            num_classes=CLASSES,
        ),
        _timm("twins_svt_small"),
    ),
    "maxvit": Architecture(
        _timm(
            "maxvit_rmlp_nano_rw_256", img_size=32, embed_dim=(32, 64), depths=(1, 1),
            stem_width=16, num_classes=CLASSES,
        ),
        _timm("maxvit_rmlp_nano_rw_256"),
        full_size=256,
    ),
    "coatnet": Architecture(
        _timm(
            "coatnet_0_rw_224", img_size=32, embed_dim=(32, 64), depths=(1, 1),
            stem_width=16, block_type=("C", "T"), num_classes=CLASSES,
        ),
        _timm("coatnet_0_rw_224"),
    ),
    # --- pyramids and hybrids -------------------------------------------------------------
    "levit": Architecture(
        _timm(
            "levit_128s", img_size=64, embed_dim=(16, 32), key_dim=8, depth=(1, 1),
            num_heads=(2, 2), num_classes=CLASSES,
        ),
        _timm("levit_128s"),
        size=64,
    ),
    "pit": Architecture(
        _timm(
            "pit_ti_224", img_size=32, patch_size=8, stride=4, base_dims=(8, 8), depth=(1, 1),
            heads=(2, 4), mlp_ratio=2, num_classes=CLASSES,
        ),
        _timm("pit_ti_224"),
    ),
    "pvt_v2": Architecture(
        _timm(
            "pvt_v2_b0", embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), sr_ratios=(2, 1),
            mlp_ratios=(2, 2), num_classes=CLASSES,
        ),
        _timm("pvt_v2_b0"),
    ),
    "mobilevit": Architecture(
        _timm("mobilevit_xxs", num_classes=CLASSES), _timm("mobilevit_xxs"), full_size=256, size=64
    ),
    "efficientformer_v2": Architecture(
        _timm(
            "efficientformerv2_s0", img_size=64, embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1),
            num_vit=1, mlp_ratios=2, num_classes=CLASSES,
        ),
        _timm("efficientformerv2_s0"),
        size=64,
    ),
    "convnext": Architecture(
        _timm("convnext_atto", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_classes=CLASSES),
        _timm("convnext_atto"),
    ),
    # --- transformers ---------------------------------------------------------------------
    "hf_vit": Architecture(_hugging_face("ViTConfig", "ViTForImageClassification", **HF)),
    "hf_vit_sdpa": Architecture(
        _hugging_face("ViTConfig", "ViTForImageClassification", attention="sdpa", **HF)
    ),
    "hf_deit": Architecture(
        _hugging_face("DeiTConfig", "DeiTForImageClassificationWithTeacher", **HF)
    ),
    "hf_swin": Architecture(
        _hugging_face(
            "SwinConfig", "SwinForImageClassification", image_size=32, patch_size=2, embed_dim=16,
            depths=[2, 2], num_heads=[2, 4], window_size=4, hidden_size=32,
        )
    ),
    "hf_dinov2": Architecture(
        _hugging_face(
            "Dinov2Config", "Dinov2ForImageClassification", **{**HF, "layerscale_value": 0.5}
        )
    ),
    "hf_segformer": Architecture(
        _hugging_face(
            "SegformerConfig", "SegformerForSemanticSegmentation", num_encoder_blocks=2,
            depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
            strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
        )
    ),
    "detr": Architecture(_Detector),
}  # fmt: skip


def make(name: str, full: bool = False) -> tuple[nn.Module, tuple[int, int, int]]:
    """The module, seeded, in evaluation mode, and the shape of one image."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    build = architecture.full if full and architecture.full is not None else architecture.build
    size = architecture.full_size if full and architecture.full is not None else architecture.size
    module = build().eval().float()
    _randomize(module)
    return module, (3, size, size)


def _randomize(module: nn.Module) -> None:
    """Draw what initialisation left trivial: biases, norms, scales, tables, running statistics."""
    generator = torch.Generator().manual_seed(1)

    def normal(like: torch.Tensor, deviation: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator) * deviation

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim < 2 or float(parameter.std()) < 0.03:
                parameter += normal(parameter, 0.1)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer += normal(buffer, 0.1)
            elif name.endswith("running_var"):
                buffer *= 1 + normal(buffer, 0.2).abs()
