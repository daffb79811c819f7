"""What kind of value an option takes, and how large it may be: YAML and Python give anything."""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ptq_onnx.config.flags import flag_of
from ptq_onnx.errors import ConfigError

WORDS = {
    bool: "true or false, without quotes",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list",
    type(None): "nothing",
}
MOST_ITEMS = 10_000
GUARD = 256
"""An upper bound from here on keeps nonsense out; messages name the lower one alone."""
SHORT = 60
"""Characters of a value that a message shows."""


def check_options(config: Any) -> None:
    """Check the types of a dataclass's fields, and their bounds. Raises ConfigError, one line."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        option = "--" + field.name.replace("_", "-")
        text = value if isinstance(value, str) and len(value) < SHORT else shown(value)
        flag = flag_of(field)
        low, high = flag.bounds or (None, None)
        fits = _fits(value, hint)
        whole = hint is int or (hint == int | None and isinstance(value, int))
        guarded = whole and low is not None and high is not None and high >= GUARD
        if guarded and not (fits and value >= low):
            raise ConfigError(f"{option} must be at least {low:g}, got {shown(value)}.")
        if not fits:
            words = " or ".join(dict.fromkeys(_words(hint)))
            raise ConfigError(f"{option} {text}: must be {words}.")
        if low is None or high is None or value is None:
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if not low <= number <= high:
                more = f" {flag.unit}" * bool(flag.unit) + f"; {flag.hint}" * bool(flag.hint)
                raise ConfigError(
                    f"{option} {shown(number)}: must be from {low:g} to {high:g}{more}."
                )


def check_choices(config: Any) -> None:
    """Check the names that a dataclass's fields hold. Raises ConfigError, one line."""
    for field in fields(config):
        value, known = getattr(config, field.name), flag_of(field).choices
        if known and value != field.default and value not in known:
            raise no_such(field.name, value, known)


def no_such(name: str, value: str, known: Sequence[str]) -> ConfigError:
    """The error of a name that an option does not know."""
    return ConfigError(f"There is no {name} {shown(value)}; choose one of {', '.join(known)}.")


def shown(value: object) -> str:
    """The value in a message: short, whatever it is. A list is not looked into, as lists of lists
    may be larger in print than in memory."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**18:
        return f"a number of {int(math.log10(abs(value))) + 1} digits"
    if not isinstance(value, str | int | float | None):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= SHORT else f"{text[: SHORT - 3]}..."


def _fits(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return isinstance(value, str)  # which one is checked where the names are
    if origin is tuple:
        if not isinstance(value, tuple) or len(value) > MOST_ITEMS:
            return False
        parts = get_args(hint)
        if parts[-1] is Ellipsis:
            return all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is float:
        return _is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _words(hint: Any) -> list[str]:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return [word for part in get_args(hint) if part is not type(None) for word in _words(part)]
    if origin is tuple:
        parts = get_args(hint)
        what = WORDS[parts[0]]
        return [f"a list, each {what}" if parts[-1] is ... else f"{len(parts)} times {what}"]
    return [WORDS[str if origin is Literal else hint]]
