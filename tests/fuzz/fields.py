"""Damage at the level of protobuf fields: any message, any field, an odd value."""

from __future__ import annotations

import math
import random
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor

INTEGERS = (0, 1, -1, 2, 3, 7, 8, 9, 16, 127, 255, 1 << 16, (1 << 31) - 1, 1 << 31, -(1 << 31))
LARGE = (1 << 40, (1 << 62), (1 << 63) - 1, -(1 << 63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-7, 1e30, 3.4e38, math.inf, -math.inf, math.nan)
TEXTS = ("", "x", "no", "a" * 300, "é×\u202e", "\x1b[31m", "../..", "/dev/zero", "com.microsoft")
WHOLE = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)


def change_fields(model: onnx.ModelProto, rng: random.Random, most: int = 3) -> None:
    """Change one to ``most`` fields anywhere in the model."""
    for _ in range(rng.randint(1, most)):
        messages = list(_messages(model))
        message = rng.choice(messages)
        field = rng.choice(list(message.DESCRIPTOR.fields))
        try:
            _change(message, field, rng, messages)
        except (ValueError, TypeError):  # protobuf refuses it: another time
            continue


def _messages(message: Any) -> Any:
    yield message
    for field, value in message.ListFields():
        if field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE:
            continue
        for part in value if field.is_repeated else (value,):
            yield from _messages(part)


def _change(message: Any, field: Any, rng: random.Random, messages: list[Any]) -> None:
    name = field.name
    if field.is_repeated:
        _change_list(getattr(message, name), field, rng, messages)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        if rng.random() < 0.4:
            message.ClearField(name)
        else:
            alike = [m for m in messages if field.message_type == m.DESCRIPTOR]
            if alike:
                getattr(message, name).CopyFrom(_copy(rng.choice(alike)))
    elif rng.random() < 0.2:
        message.ClearField(name)
    else:
        setattr(message, name, _value(field, rng, messages, getattr(message, name)))


def _change_list(values: Any, field: Any, rng: random.Random, messages: list[Any]) -> None:
    what = rng.choice(("drop", "twice", "swap", "clear", "new", "new", "new"))
    if values and what == "drop":
        del values[rng.randrange(len(values))]
    elif what == "clear":
        del values[:]
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        alike = [m for m in messages if field.message_type == m.DESCRIPTOR]
        if alike:
            values.add().CopyFrom(_copy(rng.choice(alike)))
    elif len(values) > 1 and what == "swap":
        a, b = rng.randrange(len(values)), rng.randrange(len(values))
        values[a], values[b] = values[b], values[a]
    elif values and what == "new":
        at = rng.randrange(len(values))
        values[at] = _value(field, rng, messages, values[at])
    else:
        values.append(_value(field, rng, messages, None))


def _copy(message: Any) -> Any:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def _value(field: Any, rng: random.Random, messages: list[Any], old: Any) -> Any:
    kind = field.cpp_type
    if kind in WHOLE or kind == FieldDescriptor.CPPTYPE_ENUM:
        if isinstance(old, int) and rng.random() < 0.4:
            return old + rng.choice((-1, 1))
        large = LARGE if kind == FieldDescriptor.CPPTYPE_INT64 else ()
        return rng.choice((*INTEGERS, *large))
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice(FLOATS)
    if kind == FieldDescriptor.CPPTYPE_STRING and field.type == FieldDescriptor.TYPE_BYTES:
        return _bytes(old, rng)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        names = [m.output[0] for m in messages if isinstance(m, onnx.NodeProto) and m.output]
        ops = [m.op_type for m in messages if isinstance(m, onnx.NodeProto)]
        return rng.choice((*TEXTS, *names, *ops, "If", "Loop", "Attention", "Cast"))
    return rng.random() < 0.5 if kind == FieldDescriptor.CPPTYPE_BOOL else rng.choice((0, 1, 1000))


def _bytes(old: Any, rng: random.Random) -> bytes:
    old = old if isinstance(old, bytes) else b""
    return rng.choice((old[:-1], old + b"\x00", b"", old[: len(old) // 2], b"\xff" * len(old)))
