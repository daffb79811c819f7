"""All options of a quantization run, as frozen dataclasses that YAML can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ptq_onnx.config.bits import BYTE, HALF
from ptq_onnx.config.checks import check_together, check_values
from ptq_onnx.config.fields import SEVERAL, Fields
from ptq_onnx.config.metric_options import is_own, refuse_own
from ptq_onnx.config.names import INTEGER
from ptq_onnx.config.option_file import read_yaml
from ptq_onnx.config.option_types import check_choices, check_options, shown
from ptq_onnx.errors import ConfigError


@dataclass(frozen=True)
class QuantizeConfig(Fields):
    """The options of a run, checked; a new option is a field of :class:`Fields`."""

    def __post_init__(self) -> None:
        """Raises ConfigError, one line, for values that make no sense alone or together."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, list):
                object.__setattr__(self, one.name, tuple(value))
            elif isinstance(value, str) and one.name in SEVERAL:  # one, not one per letter
                object.__setattr__(self, one.name, (value,))
        check_options(self)
        check_choices(self)
        if not self.quantizer:
            own = "deploy" if self.weight_only else self.runtime.quantizer
            object.__setattr__(self, "quantizer", own)
        if self.opset == 0:
            object.__setattr__(self, "opset", self.runtime.opset)
        check_values(self)
        if self.target == INTEGER:
            object.__setattr__(self, "arithmetic", INTEGER)
        check_together(self)

    @property
    def analysed(self) -> int:
        """Images of the analysis: fewer by default where nothing but the file's closeness to the
        float model is measured on them."""
        if self.analysis_images is not None:
            return self.analysis_images
        return 32 if self.report or self.sensitivity or self.auto else 8

    @property
    def effective_method(self) -> str:
        """The calibration method in force."""
        return self.method or ("percentile" if self.quantizer == "vanilla" else "robust")

    @property
    def learns_turns(self) -> bool:
        """True where the matrices that turn residual streams are learned."""
        return self.few_bits and self.rotates

    @property
    def rounds_by_output(self) -> bool:
        """True where weights are rounded by what their errors cost the model's output: beside
        activations of fewer bits, which lose more, it gains nothing."""
        few = self.widths.weights <= HALF and self.widths.activations >= BYTE
        return self.quantizer == "lowbit" and few

    def to_yaml(self) -> str:
        """YAML that :meth:`load` reads back to an equal config, but for a metric of one's own."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if is_own(self.metric):  # it is code, which no file names
            plain |= {"metric": None, "metric_option": []}
        return yaml.safe_dump(plain, sort_keys=False)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> QuantizeConfig:
        """Raises ConfigError for unknown keys; ``where`` names the source in messages."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"{where}: unknown option {shown(unknown[0])};"
                f" known are {', '.join(sorted(known))}."
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{where}: {error}.") from error

    @classmethod
    def load(cls, path: str | Path) -> QuantizeConfig:
        """Read YAML. Raises ConfigError where the file is missing or no mapping of options."""
        values = read_yaml(path)
        refuse_own(values, f"Config {path}")
        return cls.from_mapping(values, str(path))

    def merged(self, **changes: Any) -> QuantizeConfig:
        """A copy with those options that are not None replaced."""
        return replace(self, **{k: v for k, v in changes.items() if v is not None})
