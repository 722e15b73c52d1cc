# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Reading what other programs wrote: JSON and numbers that may be anything, without a crash and without a guess."""

from __future__ import annotations

import json
import re
import typing as t
from dataclasses import dataclass

Json = t.Dict[str, t.Any]

#: What Go's strconv.ParseBool takes for true.
GO_TRUE = frozenset(("1", "t", "T", "TRUE", "true", "True"))


def parse_json(text: str | bytes, **options: t.Any) -> t.Any:
    """As ``json.loads``, with one kind of error.

    Raises:
        ValueError: When it is no JSON, no text, or nested so deeply that Python gives up.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_object(text: str | bytes | None) -> Json:
    """The mapping in a text; empty for anything that is none."""
    try:
        found = parse_json(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def strings(value: t.Any) -> list[str]:
    """The strings of a list; empty for anything else."""
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def is_digits(text: str) -> bool:
    """Whether a text is made of the digits 0 to 9 alone, which ``str.isdigit`` does not tell, and few enough of them."""
    return bool(re.match(r"[0-9]{1,18}\Z", text))


def whole_number(text: str | None, otherwise: int = 0) -> int:
    """A number in the digits 0 to 9, or something else for any other text."""
    return int(text) if text and is_digits(text) else otherwise


def real_number(value: t.Any, otherwise: float = 0.0) -> float:
    """A finite number as it can stand for seconds or bytes, or something else for any other value."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e18 < value < 1e18
    return float(value) if good else otherwise


@dataclass(frozen=True)
class MapOf:
    """Shape of a mapping whose keys are not known beforehand."""

    shape: t.Any


@dataclass(frozen=True)
class OneOf:
    """Shape of a word that must be there, and be one of these."""

    words: t.Tuple[str, ...]


def misfit(value: t.Any, shape: t.Any, where: str = "") -> str:
    """What does not have the shape that was promised, in words; empty when all does.

    Args:
        shape: A type (``float`` for any finite number), ``[shape]`` for a list, ``{key: shape}`` for a mapping that may have
            more keys, :class:`MapOf` or :class:`OneOf`. Null and what is missing fit every shape but :class:`OneOf`, and not
            as an entry of a list.
    """
    return "" if value is None and not isinstance(shape, OneOf) else _misfit(value, shape, where)


def _misfit(value: t.Any, shape: t.Any, where: str) -> str:
    if isinstance(shape, OneOf):
        fits = isinstance(value, str) and value in shape.words
        return "" if fits else _instead(value, "one of %s" % ", ".join(shape.words), where)
    if isinstance(shape, MapOf):
        if not isinstance(value, dict):
            return _instead(value, "an object", where)
        return next(filter(None, (misfit(one, shape.shape, _below(where, key)) for key, one in value.items())), "")
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return _instead(value, "an object", where)
        pairs = ((value.get(key), inner, _below(where, key)) for key, inner in shape.items())
        return next(filter(None, (misfit(one, inner, path) for one, inner, path in pairs)), "")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _instead(value, "a list", where)
        return next(filter(None, (_misfit(one, shape[0], where + "[]") for one in value)), "")
    if shape is float and real_number(value, -2e18) > -1e18:
        return ""
    # True is a number in Python.
    if shape is not float and isinstance(value, shape) and (shape is bool or not isinstance(value, bool)):
        return ""
    return _instead(value, {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[shape], where)


def _below(where: str, key: t.Any) -> str:
    return ("%s.%s" % (where, key)).lstrip(".")[:100]


def _instead(value: t.Any, wanted: str, where: str) -> str:
    kinds = ((bool, "true or false"), (str, "text"), ((int, float), "a number"), (list, "a list"), (dict, "an object"))
    found = next((word for kind, word in kinds if isinstance(value, kind)), "null")
    return "%s is %s where %s belongs" % (where or "it", found, wanted)
