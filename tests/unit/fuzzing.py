# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Input that nobody expects: JSON of any shape, documents with something changed in them, damaged text."""

from __future__ import annotations

import contextlib
import copy
import json
import time
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from hypothesis import strategies as st

Json = t.Any

#: Numbers and words that have broken parsers before.
NASTY = (
    "",
    " ",
    "\0",
    "²",
    "٣",
    "-1",
    "0",
    "00",
    "1e999",
    "NaN",
    "9" * 30,
    "9" * 5000,
    "None",
    "null",
    "N/A",
    "[N/A]",
    "=",
    ":",
    "%s",
    "{}",
    "\ufeff",
    "\ud800",
    "\n",
    "\x1b[31m",
    "é" * 200,
    "../../etc/passwd",
    "GPU-",
    "<x",
)
texts = st.one_of(st.sampled_from(NASTY), st.text(max_size=30))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    texts,
)
values: st.SearchStrategy[Json] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)


def _paths(document: Json, here: tuple[t.Any, ...] = ()) -> list[tuple[t.Any, ...]]:
    found = [here]
    if isinstance(document, dict):
        for key, value in document.items():
            found += _paths(value, (*here, key))
    elif isinstance(document, list):
        for index, value in enumerate(document):
            found += _paths(value, (*here, index))
    return found


@st.composite
def mutated(draw: st.DrawFn, document: Json, changes: int = 2) -> Json:
    """A document with up to so many places changed: another value, nothing there, an entry more, twice the same."""
    document = copy.deepcopy(document)
    for _change in range(draw(st.integers(0, changes))):
        path = draw(st.sampled_from(_paths(document)))
        if not path:
            document = draw(values)
            continue
        holder = document
        for step in path[:-1]:
            holder = holder[step]
        last = path[-1]
        how = draw(st.sampled_from(("replace", "replace", "remove", "wrap", "add")))
        if how == "replace":
            holder[last] = draw(values)
        elif how == "remove":
            del holder[last]
        elif how == "wrap":
            holder[last] = [holder[last]]
        elif isinstance(holder, dict):
            holder[draw(texts)] = draw(values)
        else:
            holder.append(draw(values))
    return document


def json_text(document: Json) -> str:
    """As JSON; a lone surrogate stays an escape."""
    return json.dumps(document)


@st.composite
def damaged(draw: st.DrawFn, text: str, changes: int = 3) -> str:
    """A text with up to so many pieces cut out, doubled, moved or replaced."""
    for _change in range(draw(st.integers(0, changes))):
        first = draw(st.integers(0, len(text)))
        last = min(len(text), first + draw(st.integers(0, 60)))
        how = draw(st.sampled_from(("cut", "replace", "double", "end", "words")))
        if how == "cut":
            text = text[:first] + text[last:]
        elif how == "replace":
            text = text[:first] + draw(texts) + text[last:]
        elif how == "double":
            text = text[:last] + text[first:last] + text[last:]
        elif how == "end":
            text = text[:first]
        else:
            words = text.split(" ")
            at = draw(st.integers(0, len(words) - 1))
            words[at] = draw(texts)
            text = " ".join(words)
    return text


#: The last one is read by Python's parser, but by nothing that calls itself for each level.
DEEP = ("[" * 100_000, '{"x": %s%s}' % ("[" * 900, "]" * 900))


def broken_json(document: Json) -> st.SearchStrategy[str]:
    """A file of JSON: of the right shape, of another one, cut off, or something else."""
    text = json_text(document)
    return st.one_of(mutated(document).map(json_text), damaged(text), st.sampled_from(DEEP), texts)


def encodable(text: str) -> bytes:
    """As it would come out of a file."""
    return text.encode("utf-8", "surrogatepass")


@contextlib.contextmanager
def only_told() -> t.Iterator[None]:
    """Errors are sentences with a reason, and come within a second of computing."""
    began = time.process_time()
    try:
        yield
    except FleetError as error:
        assert error.reason
        assert error.message.strip()
        assert "Traceback (most recent" not in error.message
    spent = time.process_time() - began
    assert spent < 1, "took %.1f s" % spent
