"""The version, alone: what builds the package reads it and runs nothing."""

__version__ = "0.1.0"
