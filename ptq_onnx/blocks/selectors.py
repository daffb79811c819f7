"""What ``--keep-float`` and its kind name: roles and blocks that a model has."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping

from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.selector import ALL, AUTO, MoreBits, Selector
from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.spec import Site

PACKED = {"qkv": ("q", "k", "v"), "kv": ("k", "v")}
"""Packed projections, and what they become in a form where each is a linear of its own."""
WEIGHT = ".weight"
"""Behind a role: its weights alone."""


def known_roles(blocks: Blocks, sites: Mapping[str, Site]) -> frozenset[str]:
    """The roles of a model."""
    of_ops = {role.name for role in blocks.roles.values()} - {"layout", "other"}
    return frozenset(of_ops | {site.role.removesuffix(WEIGHT) for site in sites.values()})


def selectable(blocks: Blocks, sites: Mapping[str, Site]) -> frozenset[str]:
    """What a selector may name: the roles, and the weights of those that have some."""
    return known_roles(blocks, sites) | {site.role for site in sites.values()}


def check_selectors(config: QuantizeConfig, blocks: Blocks, sites: Mapping[str, Site]) -> None:
    """Every selector of a config names something that the model has. Raises ConfigError."""
    known = selectable(blocks, sites)
    wider = [MoreBits.parse(text).selector for text in config.more_bits]
    check_roles(wider, "--more-bits", known, blocks.count)
    for option, texts in (
        ("--keep-float", config.keep_float),
        ("--per-channel", config.per_channel),
    ):
        selectors = [Selector.parse(text) for text in texts if text != AUTO]
        check_roles(selectors, option, known, blocks.count)


def check_roles(
    selectors: Iterable[Selector], option: str, known: Collection[str], blocks: int
) -> None:
    """A selector must select something. Raises ConfigError, which names the roles."""
    for selector in selectors:
        if selector.role != ALL and selector.role not in known:
            close = difflib.get_close_matches(selector.role, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            whole = sorted(role for role in known if not role.endswith(WEIGHT))
            raise ConfigError(
                f"{option} {selector}: the model has no role '{selector.role}'{hint};"
                f" it has {', '.join(whole)}."
            )
        beyond = [b for b in selector.blocks or () if b >= blocks]
        if beyond:
            raise ConfigError(
                f"{option} {selector}: there is no block {beyond[0]};"
                f" the model has {blocks} (0 to {blocks - 1})."
            )


def in_form(selectors: Iterable[Selector], known: Collection[str]) -> list[Selector]:
    """The selectors, with what a form has taken apart named by its parts."""
    found: list[Selector] = []
    for selector in selectors:
        role = selector.role.removesuffix(WEIGHT)
        suffix = selector.role[len(role) :]
        parts = () if selector.role in known else PACKED.get(role, ())
        found += [Selector(part + suffix, selector.blocks) for part in parts] or [selector]
    return found
