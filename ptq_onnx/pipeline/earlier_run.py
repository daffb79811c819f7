"""With ``--scales``: what that run did to the float model is done again, as its report says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.hidden_pieces import Pieces, fit
from ptq_onnx.equalization.rotation_choice import FLATTENED, SPREAD, Turned, Turns, turn_as
from ptq_onnx.equalization.token_factors import TokenFactors
from ptq_onnx.equalization.token_factors import fit as fits_tokens
from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.scales_file import Strict, read_part
from ptq_onnx.numerics.spec import Rule
from ptq_onnx.quantizers.base import Plan


class _Rotation(Strict):
    turned: tuple[Turned, ...]


class _Parts(Strict):
    rotation: _Rotation | None = None
    tokens: tuple[TokenFactors, ...] = ()
    pieces: tuple[Pieces, ...] = ()


class Rewrites:
    """What an earlier run did to its float model, by its report.json. Raises ConfigError."""

    def __init__(self, path: str | Path) -> None:
        self._where = f"--scales {path}"
        self._parts = read_part(path, _Parts)

    def check(self, config: QuantizeConfig) -> None:
        """Raises ConfigError where that run changed its model and this one is not to."""
        rotation = self._parts.rotation
        turned = rotation is not None and any(t.by in (SPREAD, FLATTENED) for t in rotation.turned)
        for done, wanted, option in (
            (turned, config.rotates, "--rotate"),
            (bool(self._parts.tokens), config.rotates, "--rotate"),
            (bool(self._parts.pieces), config.splits_hidden, "--split-hidden"),
        ):
            if done and not wanted:
                raise ConfigError(
                    f"{self._where} is of a run with {option}: use it here too, or calibrate anew."
                )

    def tokens_in(self, model: ir.Model) -> tuple[TokenFactors, ...]:
        """Its factors of tokens, if they are of the model's streams. Raises ConfigError."""
        if not fits_tokens(model, self._parts.tokens):
            raise self._other("massive tokens")
        return self._parts.tokens

    def turned_in(self, model: ir.Model) -> Turns:
        """Its streams turned in place, as that run turned them. Raises ConfigError."""
        if self._parts.rotation is None:
            return Turns((), (), {}, ())
        turns = turn_as(model, self._parts.rotation.turned)
        if turns is None:
            raise self._other("residual streams")
        return turns

    def pieces_in(self, plan: Plan, rules: Mapping[str, Rule]) -> tuple[Pieces, ...]:
        """Its pieces, if they are of the plan's activations. Raises ConfigError."""
        if not fit(plan, rules, self._parts.pieces):
            raise self._other("hidden channels")
        return self._parts.pieces

    def _other(self, what: str) -> ConfigError:
        return ConfigError(
            f"{self._where}: its {what} are not those of this model; it belongs to another model,"
            " or was changed by hand: calibrate anew."
        )
