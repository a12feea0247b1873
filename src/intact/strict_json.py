"""Frozen dataclasses <-> JSON text, strictly and exactly: what `results.json` and
`certificate.json` are written with.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from intact.errors import StorageError

__all__ = ["parse_document", "plain", "read_value", "write_document"]


def write_document(document: Mapping[str, Any]) -> str:
    """Plain values as JSON text: UTF-8 safe, keys in their order, a list of numbers on one line.

    Floats are written with the digits that read back to the same bits.
    """
    return _write(document, "") + "\n"


def parse_document(text: str, name: str, version: int, again: str) -> dict[str, Any]:
    """The object in a file of this name, without its `format`, which must be `version`.

    again  what makes such a file anew, for messages: "Run the experiment again"

    Raises `StorageError` for what is no JSON, no object, or of another format.
    """
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"this is not JSON that intact wrote: {error}. {again}, or take {name} from its "
            "output folder."
        ) from error
    if not isinstance(document, dict):
        raise StorageError(f"{name} must be one JSON object, as intact writes it.")
    found = document.pop("format", None)
    if found != version or isinstance(found, bool):
        raise StorageError(
            f"{name} has format {found!r}; this version of intact reads format {version}. "
            f"{again}, or use the version of intact that wrote it."
        )
    return document


# -- writing -------------------------------------------------------------------------------------


def plain(value: object, where: str) -> Any:
    """Dataclasses and mappings to dicts, tuples to lists; refuses what JSON has no word for."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise StorageError(f"{where} has a key that is not a string.")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise StorageError(f"{where} is {value}, which a report cannot hold: give a finite number.")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise StorageError(f"{where} is a {type(value).__name__}: a report holds plain values only.")


def _write(value: Any, indent: str) -> str:
    """JSON with an indent of 2, but a list of numbers on one line, so that people can read it."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(k)}: {_write(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(inner + _write(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


# -- reading -------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that a report may hold")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def read_value(value: Any, kind: Any, where: str) -> Any:
    """`value`, checked against the type `kind`, lists as tuples and objects as dataclasses."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return _finite(value, where)
    if is_dataclass(kind):
        return _read_dataclass(value, cast("type", kind), where)
    if origin in (Union, types.UnionType):
        return _read_union(value, args, where)
    if origin is tuple:
        return _read_tuple(value, args, where)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _wrong(value, "an object", where)
        return {key: read_value(item, args[1], f"{where}.{key}") for key, item in value.items()}
    if origin is Literal:
        if value not in args or not isinstance(value, str):
            raise _wrong(value, f"one of {', '.join(map(repr, args))}", where)
        return value
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(value, "a number", where)
        return _finite(value, where)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong(value, f"of type {kind.__name__}", where)
    return value


def _read_union(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    """A value of one of several types: of two dataclasses, that whose fields it has."""
    if value is None and type(None) in kinds:
        return None
    alike = (k for k in kinds if is_dataclass(k) and isinstance(value, dict) and _fits(value, k))
    return read_value(value, next(alike, kinds[0]), where)


def _fits(value: dict[str, Any], kind: Any) -> bool:
    return value.keys() == _hints(kind).keys()


def _read_dataclass(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(value, "an object", where)
    hints = _hints(kind)
    missing, extra = [n for n in hints if n not in value], [n for n in value if n not in hints]
    if missing or extra:
        problem = f"lacks {missing[0]!r}" if missing else f"has an unknown key, {extra[0]!r}"
        raise StorageError(f"{where} {problem}. Is this a file that intact wrote?")
    return kind(**{n: read_value(value[n], hint, f"{where}.{n}") for n, hint in hints.items()})


def _read_tuple(value: Any, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(value, "a list", where)
    if args[-1] is not Ellipsis and len(value) != len(args):
        raise _wrong(value, f"a list of {len(args)}", where)
    return tuple(read_value(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))


def _finite(value: Any, where: str) -> Any:
    """The value itself; a number in it that float64 cannot hold is an error."""
    if isinstance(value, dict):
        for key, item in value.items():
            _finite(item, f"{where}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _finite(item, f"{where}[{i}]")
    elif isinstance(value, int | float):
        try:
            finite = math.isfinite(value)
        except OverflowError:
            finite = False
        if not finite:
            raise _wrong(value, "a finite number", where)
    return value


def _wrong(value: Any, expected: str, where: str) -> StorageError:
    # Never the whole value: a mangled file may have megabytes here.
    shown = type(value).__name__ if isinstance(value, dict | list | int | float) else repr(value)
    return StorageError(f"{where} must be {expected}, but is {shown[:80]}.")
