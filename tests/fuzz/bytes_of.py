"""Damage at the level of bytes."""

from __future__ import annotations

import random

INTERESTING = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\n")


def damaged(content: bytes, rng: random.Random, most: int = 6) -> bytes:
    """The content with one to ``most`` pieces of damage."""
    data = bytearray(content)
    for _ in range(rng.randint(1, most)):
        rng.choice(DAMAGE)(data, rng)
    return bytes(data)


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(data: bytearray, rng: random.Random) -> None:
    at, piece = rng.randrange(len(data) + 1), rng.choice(INTERESTING)
    data[at : at + len(piece)] = piece


def _random(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at : at + rng.randint(0, 4)] = rng.randbytes(rng.randint(1, 8))


def _cut(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    del data[at : at + rng.choice((1, 2, 8, 64, 1024))]


def _end(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _twice(data: bytearray, rng: random.Random) -> None:
    at, to = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    data[to:to] = data[at : at + rng.choice((1, 4, 16, 256))]


DAMAGE = (_flip, _flip, _flip, _set, _set, _random, _cut, _end, _twice)
