"""The quantizers, each a PPQ ``BaseQuantizer`` in a file of its own."""
