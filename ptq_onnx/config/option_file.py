"""A YAML file of options: plain values, read with the safe loader and without aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ptq_onnx.config.option_types import shown
from ptq_onnx.errors import ConfigError
from ptq_onnx.files.text_file import read_text

LARGEST_CONFIG = 1 << 18
"""Bytes; all options together have two thousand."""


DEEPEST = 32
"""Levels; options have two or three. A file of brackets alone takes seconds to read to its end."""


class _Plain(yaml.SafeLoader):
    """Without aliases, by which a short file can hold endless values."""

    level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node; raises ComposerError for an alias, which could grow without bound, and
        RecursionError below ``DEEPEST`` levels."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "options have no aliases (*name)", None)
        if self.level == DEEPEST:
            raise RecursionError
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file. Raises ConfigError."""
    path = Path(path)
    try:
        values = yaml.load(read_text(path, LARGEST_CONFIG), Loader=_Plain)
    except OSError as error:
        raise ConfigError(f"Config {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"Config {path} cannot be read: {error}.") from error
    except RecursionError as error:
        raise ConfigError(f"Config {path} is nested too deeply for options.") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"Config {path} is not YAML: {reason[:300]}.") from error
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # values that their tag or their form promises and that are none: !!int x, 2001-13-45
        reason = " ".join(str(error).split())
        raise ConfigError(f"Config {path} has an invalid value: {reason[:200]}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"Config {path} must hold options (name: value), not {shown(values)}.")
    odd = [key for key in values if not isinstance(key, str)]
    if odd:
        raise ConfigError(f"Config {path}: {shown(odd[0])} is not the name of an option.")
    return values
