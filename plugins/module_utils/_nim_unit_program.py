# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The program that the units run, as one file out of its parts: a host needs nothing beside it."""

from __future__ import annotations

import importlib.util
import re
import typing as t

from . import _nim_unit, _nim_unit_docker, _nim_unit_key

#: Each uses those before it. The last one is the program; the others are what it imports.
PARTS = (_nim_unit_docker, _nim_unit_key, _nim_unit)
#: Where a part's head (licence, documentation) ends; it must come first in a file.
_FUTURE = "from __future__ import annotations\n"
_OWN_IMPORT = re.compile(r"^from \._nim_unit\w* import (?:\([^)]*\)|[^\n(]*)\n", re.MULTILINE)


def _source(name: str) -> str:
    """The text of a module, also where it is imported from an archive."""
    spec = importlib.util.find_spec(name)
    loader: t.Any = spec.loader if spec else None
    text = loader.get_source(name) if loader else None
    if not text:
        raise RuntimeError("The source of %s is not available." % name)
    return str(text)


#: Read at once: work that goes on when the module has ended has no archive to read them from.
_TEXTS = tuple(_source(part.__name__) for part in PARTS)


def program() -> str:
    """The text of the program, without its first line."""
    head = _TEXTS[-1].partition(_FUTURE)[0]
    bodies = [_OWN_IMPORT.sub("", text.partition(_FUTURE)[2]).strip("\n") for text in _TEXTS]
    return head + _FUTURE + "\n" + "\n\n\n".join(bodies) + "\n"
