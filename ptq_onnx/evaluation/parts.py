"""Images in parts that several processes run, whose outputs are folded as one run would fold them.

The edges follow from the images and the model alone, and are those of batches: each batch is the
one that a single process would run, and sums are made of the same numbers in the same order.
"""

from __future__ import annotations

from ptq_onnx.evaluation.network import Network
from ptq_onnx.evaluation.recorded import Record, Recorder
from ptq_onnx.images.source import ImageSource

SECONDS = 10.0
"""How long a part shall take, about."""
PER_BYTE = 1e-9
"""Seconds of a core for each image and byte of the float model (measured: 1.0e-9 for ViT-Ti)."""
FEWEST, MOST = 64, 2048
"""Images of a part."""

Part = tuple[int, int]
"""Number of its first image, and of the one behind its last."""


def parts_of(images: int, model_bytes: int, batch_size: int) -> list[Part]:
    """The parts of so many images, each of whole batches but for the last."""
    fitting = int(SECONDS / (PER_BYTE * max(model_bytes, 1)))
    size = max(FEWEST, min(fitting, MOST)) // batch_size * batch_size
    return [(first, min(first + size, images)) for first in range(0, images, max(size, batch_size))]


def keep_part(network: Network, images: ImageSource, record: Record, batch_size: int) -> bool:
    """Run a model on the images of a part and keep its outputs; whether all are there, which they
    are not where an image cannot be read or the disk is full. Raises ModelError, ImageError."""
    wanted, seen = images.names, 0
    if record.exists:
        return True
    with Recorder(record) as recorder:
        for names, batch in images.named_batches(batch_size):
            if names != wanted[seen : seen + batch_size]:
                break
            recorder.add(names, network(batch), network.whole)
            seen += len(names)
        if seen < len(wanted):
            recorder.drop()
    return record.exists
