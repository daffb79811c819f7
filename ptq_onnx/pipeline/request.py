"""What a run is asked for: the arguments of ``quantize``, as they were given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError
from ptq_onnx.files.output_paths import Output
from ptq_onnx.images.opening import Images
from ptq_onnx.pipeline.preprocess_input import Given
from ptq_onnx.preparation.model_input import typed_name
from ptq_onnx.report.reproduce import Invocation, named


@dataclass(frozen=True)
class Shared:
    """Folders of what several runs need: ``floats``: the float model's outputs on the images
    ``val``, by their :class:`Record`; ``prepared``: models as they are before any rewriting."""

    floats: Path | None = None
    prepared: Path | None = None


@dataclass(frozen=True)
class Request:
    """The model, the options, the images and the place of the results.

    ``keep_models`` False: only the reports are kept. ``given``: a preprocessing that no option
    can name.
    """

    model: str | Path
    config: QuantizeConfig
    place: Output
    calib: Images | None = None
    val: Images | None = None
    labels: str | Path | None = None
    targets: str | Path | None = None
    scales: str | Path | None = None
    given: Given = field(default_factory=Given)
    keep_models: bool = True
    calibrated: bool = True
    """Whether images say what is quantized; else they are only measured on."""
    shared: Shared = field(default_factory=Shared)

    def check_place(self) -> None:
        """Refuse results that would replace what is read, or a model that is not written anew.
        Raises ConfigError."""
        self.place.keep(
            model=self.model, calib=self.calib, val=self.val, labels=self.labels,
            targets=self.targets, scales=self.scales,
        )  # fmt: skip
        if not self.keep_models and self.place.model.exists():
            raise ConfigError(
                f"--output {self.place.folder} holds a quantized model, which the analysis would"
                " replace; name another folder."
            )

    @property
    def images_given(self) -> bool:
        """Whether there is anything to calibrate with, besides what a model may bring itself."""
        return self.calib is not None or self.scales is not None or bool(self.config.input)

    @property
    def invocation(self) -> Invocation:
        """The paths, as they can be typed again."""
        folder, keep = self.place.folder, self.keep_models
        return Invocation(
            command="quantize" if keep else "analyse",
            model=named(typed_name(self.model)) or str(self.model),
            calib=named(self.calib),
            val=named(self.val),
            labels=named(self.labels),
            targets=named(self.targets),
            scales=named(self.scales),
            folder=named(folder) or str(folder),
            written=named(self.place.model) if keep else None,
        )
