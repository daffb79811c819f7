"""The schema of report.json, made from the dataclasses that it holds.

    python -m ptq_onnx.report.schema > ptq_onnx/report/report.schema.json

The file beside this module is that text. The descriptions are the dataclasses' own.
"""

from __future__ import annotations

import inspect
import json
import sys
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ptq_onnx.analysis.attention_results import AttentionAnalysis
from ptq_onnx.analysis.comparison_results import Automatic
from ptq_onnx.analysis.coverage import Coverage
from ptq_onnx.analysis.decibels import Decibels
from ptq_onnx.analysis.mixed_results import Mixed
from ptq_onnx.analysis.results import Graphwise, Sensitivity
from ptq_onnx.analysis.variation_results import Variation
from ptq_onnx.config.targets import Stored
from ptq_onnx.equalization.hidden_pieces import Pieces
from ptq_onnx.equalization.rotation_choice import Turned
from ptq_onnx.equalization.streams import Refused
from ptq_onnx.equalization.token_factors import TokenFactors
from ptq_onnx.evaluation.metrics.metric import Score
from ptq_onnx.evaluation.outputs import OutputFigures
from ptq_onnx.evaluation.parity import Parity
from ptq_onnx.files.result_names import FLOAT, FORMED
from ptq_onnx.numerics.codes.by_name import CODES, CodeName
from ptq_onnx.numerics.grain import GRAINS
from ptq_onnx.numerics.spec import RUN_TIME
from ptq_onnx.quantizers.base import Move
from ptq_onnx.quantizers.learning import Trained
from ptq_onnx.report.reproduce import Invocation

Schema = dict[str, Any]

NUMBER: Schema = {"type": "number"}
STRING: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer"}
PLAIN: dict[Any, Schema] = {
    float: NUMBER,
    int: COUNT,
    str: STRING,
    bool: {"type": "boolean"},
    CodeName: {"enum": [code.name for code in CODES]},
    type(None): {"type": "null"},
}


def schema_of(kind: Any) -> Schema:
    """The JSON Schema of a type: dataclasses, tuples, dicts, unions, literals, plain values."""
    if kind in PLAIN:
        return dict(PLAIN[kind])
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        names = [f.name for f in fields(kind)]
        return {
            "type": "object",
            "description": " ".join((inspect.getdoc(kind) or "").split()),
            "properties": {name: schema_of(hints[name]) for name in names},
            "required": names,
            "additionalProperties": False,
        }
    if origin is Annotated:  # decibels, which are infinite where there is no error
        return {"type": ["number", "null"], "description": arguments[1]}
    if origin in (Union, types.UnionType):
        return {"anyOf": [schema_of(a) for a in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(arguments[1])}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": schema_of(arguments[0])}
    if origin is tuple:
        # All our tuples of a fixed length hold values of one type.
        size = len(arguments)
        return {
            "type": "array",
            "items": schema_of(arguments[0]),
            "minItems": size,
            "maxItems": size,
        }
    raise TypeError(f"There is no schema for {kind}.")


def _object(properties: Mapping[str, Schema], closed: bool = False) -> Schema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        **({"additionalProperties": False} if closed else {}),
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(one: Schema) -> Schema:
    return {"anyOf": [one, {"type": "null"}]}


def _closeness() -> Schema:
    """One output of ``fidelity``: its figures but for the accuracy, which stands by itself."""
    found = schema_of(OutputFigures)
    for name in ("top1", "top5"):
        del found["properties"][name]
        found["required"].remove(name)
    return found


def _tensor(place: dict[str, Schema]) -> Schema:
    """The numbers of one quantized tensor, and what its code adds to them."""
    granularities = [*(grain.name for grain in GRAINS), *(around.name for around in RUN_TIME)]
    spec = {
        **place, "parameter": {"type": "boolean"}, "bits": COUNT, "signed": {"type": "boolean"},
        "symmetric": {"type": "boolean"}, "granularity": {"enum": granularities},
        "code": schema_of(CodeName), "method": STRING,
        "renormalize": {"type": "boolean"}, "stored": {"enum": [*get_args(Stored)]},
        "centred": {"type": "boolean"},
        "block_size": COUNT,
        "limits": {**_list(COUNT), "minItems": 2, "maxItems": 2},
        "scale": {"type": ["number", "array"]},
        "zero_point": {"type": ["integer", "array"]}, "axis": _or_null(COUNT),
        "clip": {**_list(NUMBER), "minItems": 2, "maxItems": 2},
    }  # fmt: skip
    own = {name: COUNT for code in CODES for name in code.details}
    tensor = _object(spec)
    tensor["properties"] |= own | {"order": _list(COUNT)}
    return tensor


def _of_some_runs() -> dict[str, Schema]:
    """Keys that a report need not have."""
    return {
        "equalization": _object(
            {"forms": {"type": "object", "additionalProperties": COUNT},
             "moves": _list(schema_of(Move))}
        ),
        "rotation": _or_null(
            _object({"turned": _list(schema_of(Turned)), "refused": _list(schema_of(Refused))})
        ),
        "tokens": _list(schema_of(TokenFactors)),
        "pieces": _list(schema_of(Pieces)),
        "trained": _list(schema_of(Trained)),
        "mixed": _or_null(schema_of(Mixed)),
        "parity": _or_null(schema_of(Parity)),
        "optimised": {"type": "object", "additionalProperties": COUNT,
                      "description": "Ops of the graph that ONNX Runtime runs."},
        "integer": _object(
            {"ops": {"type": "object", "additionalProperties": COUNT},
             "widest": {"type": "object", "additionalProperties": _object(
                 {"tensor": STRING, "bits": COUNT, "of": COUNT, "seen_bits": _or_null(COUNT)})},
             "operations": {"type": "object", "additionalProperties": COUNT},
             "traffic": {"type": "object", "additionalProperties": NUMBER},
             "ranges": _object({"columns": _list(STRING), "rows": _list(_list({}))})}
        ),
        "validation": _or_null(_object({"source": STRING, "labels": _or_null(STRING)})),
        "invocation": _or_null(schema_of(Invocation)),
        "auto": _or_null(schema_of(Automatic)),
        "metric": _or_null(schema_of(Score)),
        "coverage": _coverage(),
    }  # fmt: skip


def report_schema() -> Schema:
    """The schema of the whole report. Keys that it does not name may be added later."""
    place = {"tensor": STRING, "role": STRING, "block": _or_null(COUNT)}
    whole = _object(
        {
            "ptq_onnx": STRING,
            "model": _model(),
            "config": {"type": "object"},
            "preprocess": {"type": "object"},
            "cleaned": {"type": "object"},
            "fusions": {"type": "object", "additionalProperties": COUNT},
            "blocks": COUNT,
            "roles": {
                "type": "object",
                "additionalProperties": _object({"role": STRING, "block": _or_null(COUNT)}),
            },
            "unrecognised": _list(STRING),
            "calibration": _object(
                {"source": STRING, "images": COUNT, "skipped": _list(STRING), "method": STRING}
            ),
            "arithmetic": {"enum": ["float", "integer"]},
            "tensors": _list(_tensor(place)),
            "formed": {
                "enum": [FORMED, FLOAT],
                "description": "The file of the float model that was quantized, whose tensors the"
                " report names: equalised, in the target's form, weights rounded, biases"
                " corrected.",
            },
            "floats": _list(_object({**place, "reason": STRING})),
            "sizes": _object({"float": COUNT, "quantized": COUNT}),
            "analysis": _or_null(_analysis()),
            **_measured(),
            "notes": _list(STRING),
        }
    )
    whole["properties"] |= _of_some_runs()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "report.json of ptq_onnx",
        **whole,
    }


def _model() -> Schema:
    """The file that was read."""
    ends = _list(_object({"name": STRING, "shape": _list({})}))
    return _object(
        {"path": STRING, "bytes": COUNT, "opset": COUNT, "producer": _or_null(STRING),
         "inputs": ends, "outputs": ends}
    )  # fmt: skip


def _analysis() -> Schema:
    """Graphwise errors, with the other analyses beside them."""
    found = schema_of(Graphwise)
    found["properties"] |= {
        "sensitivity": _or_null(schema_of(Sensitivity)),
        "variation": _or_null(schema_of(Variation)),
        "attention": _or_null(schema_of(AttentionAnalysis)),
        "advice": _list(STRING),
    }
    found["required"] = list(found["properties"])
    return found


def _measured() -> dict[str, Schema]:
    """What the files do in their runtime: accuracy with labels, closeness without."""
    accuracy = {"top1": _or_null(NUMBER), "top5": _or_null(NUMBER)}
    closeness = {"sqnr_db": schema_of(Decibels), "agreement": _or_null(NUMBER)}
    return {
        "accuracy": _or_null(
            _object(
                {"count": COUNT, "output": STRING, "float": _object(accuracy),
                 "quantized": _object({**accuracy, **closeness}),
                 "outputs": _list(_object(
                     {"name": STRING, "float": _object(accuracy),
                      "quantized": _object(accuracy)}))}
            )
        ),
        "fidelity": _or_null(
            _object(
                {"images": COUNT, "source": {"enum": ["val", "held apart", "calibration", "noise"]},
                 **closeness, "outputs": _list(_closeness())}
            )
        ),
    }  # fmt: skip


def _coverage() -> Schema:
    found = schema_of(Coverage)
    texts = {"line": STRING, "reasons": _list(STRING), "warning": _or_null(STRING)}
    found["properties"] |= texts
    found["required"] += list(texts)
    return found


def violations(value: Any, schema: Schema, where: str = "report") -> list[str]:
    """Where a value breaks a schema, one line each; of JSON Schema what :func:`report_schema`
    uses."""
    if "anyOf" in schema:
        tried = [violations(value, one, where) for one in schema["anyOf"]]
        return [] if [] in tried else min(tried, key=len)
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where}: {value!r} is none of {schema['enum']}"]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return [f"{where}: expected {' or '.join(kinds)}, got {type(value).__name__}"]
    found: list[str] = []
    if isinstance(value, dict):
        known = schema.get("properties", {})
        found += [f"{where}: no {key!r}" for key in schema.get("required", []) if key not in value]
        other = schema.get("additionalProperties", {})
        for key, item in value.items():
            if key in known:
                found += violations(item, known[key], f"{where}.{key}")
            elif other is False:
                found.append(f"{where}: unknown key {key!r}")
            elif other:
                found += violations(item, other, f"{where}.{key}")
    elif isinstance(value, list):
        least, most = schema.get("minItems", 0), schema.get("maxItems", len(value))
        if not least <= len(value) <= most:
            found.append(f"{where}: {len(value)} items, expected {least} to {most}")
        for index, item in enumerate(value):
            found += violations(item, schema.get("items", {}), f"{where}[{index}]")
    return found


def _is(value: Any, kind: str) -> bool:
    kinds: dict[str, tuple[type, ...]] = {
        "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,),
        "null": (type(None),), "integer": (int,), "number": (int, float),
    }  # fmt: skip
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, kinds[kind])


def text() -> str:
    """The schema as the file holds it."""
    return json.dumps(report_schema(), indent=1) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
