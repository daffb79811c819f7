"""Errors that a user can act on.

Everything a user can get wrong (a file, a folder, an option) raises a
:class:`PtqError`. Its message is one line that says what is wrong, where, and
what to do; the command line prints it and exits with code 2.
"""


class PtqError(Exception):
    """Bad input, reported in one line."""


class ModelError(PtqError):
    """The ONNX file cannot be read, is not valid, or is not supported."""


class ImageError(PtqError):
    """An image, a folder of images, an array file or a labels file is unusable."""


class ConfigError(PtqError):
    """An option has a value that makes no sense, alone or with another."""


def one_line(error: Exception) -> str:
    """The error's text on one line, without its full stop, cut to a readable length."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
