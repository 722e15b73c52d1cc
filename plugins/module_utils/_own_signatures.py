# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The user's own failure signatures (``nim_failure_signatures``), checked before they are used.

They are matched against logs while a host is waited for, so an expression that can take exponential time would hang the
run: repetitions inside repetitions are refused, and what is left is tried on lines made to be slow for it.
"""

from __future__ import annotations

import importlib
import json
import re
import signal
import subprocess
import sys
import typing as t

from ._booleans import parse_boolean
from ._errors import FleetError
from ._failure_signatures import Signature

# The parser of regular expressions was renamed in Python 3.11.
sre_parser: t.Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

OPTION = "nim_failure_signatures"
WHERE = ("container", "docker", "host", "registry")
#: Rows of the collection's own table may be copied as they are: these say where a text was seen, and nothing to a program.
_REMARKS = ("source", "note", "mark", "condition")
_TEXTS = ("id", "pattern", "where", "cause", "remedy")
_FLAGS = ("harmless", "umbrella", "passing")
KEYS = (*_TEXTS, *_FLAGS, "sample", "exit_code", *_REMARKS)
MOST = 500
LONGEST = 1000
#: A repetition counts as one without bounds from here on.
_MANY = 10
#: Processor seconds that one expression may take for the lines that a start prints between two looks.
SLOWEST = 0.5

_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")


def parse_signatures(entries: t.Any, option: str = OPTION, *, trial: bool = True) -> tuple[Signature, ...]:
    """The user's signatures in their order.

    Args:
        trial: Whether the expressions are tried on lines that are long and made to be slow.

    Raises:
        FleetError: ``invalid_option``, naming the entry, its value and the remedy.
    """
    if not isinstance(entries, (list, tuple)):
        raise _invalid(option, entries, "is no list", "give a list of mappings with id, pattern, cause and remedy")
    if len(entries) > MOST:
        raise FleetError("invalid_option", "%s has %d entries; give at most %d." % (option, len(entries), MOST))
    found: list[Signature] = []
    for index, entry in enumerate(entries):
        signature = _signature(entry, "%s[%d]" % (option, index))
        if any(known.id == signature.id for known in found):
            raise _invalid("%s[%d].id" % (option, index), signature.id, "is there twice", "give each its own")
        found.append(signature)
    slow = _slow(found) if trial else None
    if slow is not None:
        raise _invalid(
            "%s[%d].pattern" % (option, found.index(slow)),
            slow.pattern,
            "takes too long on long lines",
            "use fewer '.*', or begin with a literal text",
        )
    return tuple(found)


def _invalid(where: str, value: t.Any, wrong: str, remedy: str) -> FleetError:
    shown = repr(value)
    if len(shown) > 120:
        shown = shown[:117] + "..."
    return FleetError("invalid_option", "%s = %s: %s; %s." % (where, shown, wrong, remedy))


def _signature(entry: t.Any, where: str) -> Signature:
    if not isinstance(entry, dict):
        raise _invalid(where, entry, "is no mapping", "give id, pattern, where, cause and remedy")
    for key in entry:
        if key not in KEYS:
            raise _invalid("%s.%s" % (where, key), entry[key], "is unknown", "use %s" % ", ".join(KEYS))
    given = dict({"where": "container"}, **{key: value for key, value in entry.items() if value is not None})
    for key in _TEXTS:
        value = given.get(key)
        if not isinstance(value, str) or not value.strip():
            raise _invalid("%s.%s" % (where, key), value, "is no text", "write it as a text that is not empty")
        if len(value) > LONGEST:
            raise _invalid("%s.%s" % (where, key), value, "is too long", "use at most %d characters" % LONGEST)
        if key != "pattern" and "\n" in value.strip():
            raise _invalid("%s.%s" % (where, key), value, "has several lines", "write it in one line")
    if not _IDENTIFIER.match(given["id"]):
        raise _invalid("%s.id" % where, given["id"], "is no identifier", "use letters, digits, '.', '_' and '-'")
    if given["where"] not in WHERE:
        raise _invalid("%s.where" % where, given["where"], "is unknown", "use %s" % ", ".join(WHERE))
    flags: dict[str, bool] = {}
    for key in _FLAGS:
        flag = parse_boolean(given.get(key, False))
        if flag is None:
            raise _invalid("%s.%s" % (where, key), given[key], "is neither true nor false", "use true or false")
        flags[key] = flag
    pattern = given["pattern"]
    _check_pattern(pattern, "%s.pattern" % where)
    sample = given.get("sample")
    if sample is not None and not (isinstance(sample, str) and re.search(pattern, sample[:LONGEST])):
        raise _invalid("%s.sample" % where, sample, "is not matched by pattern", "correct pattern or sample")
    return Signature(
        given["id"],
        pattern,
        given["where"],
        given["cause"].strip().rstrip("."),
        given["remedy"].strip().rstrip("."),
        **flags,
    )


# -- expressions ----------------------------------------------------------------------------------


def _check_pattern(pattern: str, where: str) -> None:
    try:
        compiled = re.compile(pattern)
        tree = sre_parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise _invalid(where, pattern, "is no regular expression (%s)" % error, "correct it") from error
    if compiled.search("") is not None:
        raise _invalid(where, pattern, "matches every line", "name a text that must be there")
    problem = _problem(tree, False)
    if problem:
        raise _invalid(where, pattern, *problem)


def _problem(tree: t.Any, repeated: bool) -> tuple[str, str] | None:
    """What is wrong with a parsed expression, and the remedy; ``repeated`` when it stands in an unbounded repetition."""
    for operation, argument in tree:
        name = str(operation)
        if name in ("POSSESSIVE_REPEAT", "ATOMIC_GROUP"):
            return "uses what Python before 3.11 does not know", "leave out possessive quantifiers and atomic groups"
        inner: list[tuple[t.Any, bool]] = []
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, body = argument
            if repeated and least != most:
                return (
                    "may take for ever on some lines (a repetition inside a repetition)",
                    "write the inner part without *, + or ?, or the outer one with a small fixed number",
                )
            inner.append((body, repeated or (most == sre_parser.MAXREPEAT or int(most) >= _MANY)))
        elif name == "BRANCH":
            if repeated:
                return (
                    "may take for ever on some lines (alternatives inside a repetition)",
                    "use a character class, or leave out the repetition",
                )
            inner += [(body, repeated) for body in argument[1]]
        elif name == "SUBPATTERN":
            inner.append((argument[-1], repeated))
        elif name in ("ASSERT", "ASSERT_NOT"):
            inner.append((argument[1], repeated))
        elif name == "GROUPREF_EXISTS":
            inner += [(body, repeated) for body in argument[1:] if body is not None]
        for body, within in inner:
            problem = _problem(body, within)
            if problem is not None:
                return problem
    return None


#: Runs in a process of its own, because a search cannot be interrupted from the same one; the kernel ends it (SIGXCPU).
_TRIAL = r"""
import json, math, re, resource, sys, time
patterns, limit = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    sys.stdout.write("%d\n" % number)
    sys.stdout.flush()
    expression = re.compile(pattern)
    literals = "".join(dict.fromkeys(re.sub(r"\\.|[^\w ]", "", pattern)))
    words = re.findall(r"\w+", pattern)
    fillers = [*dict.fromkeys(literals[:12] + "a 0"), "".join(words[:-1]) or "a", " ".join(words) + " ", *words[:4]]
    for filler in fillers:
        began = time.process_time()
        most = math.ceil(began + limit)
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        expression.search("\n".join([(filler * 500)[:500]] * 16))
        if time.process_time() - began > limit:
            sys.exit(3)
"""


def _slow(signatures: t.Sequence[Signature]) -> Signature | None:
    """The first signature whose expression is slow on long lines; None when none is, or when it cannot be tried."""
    if not signatures:
        return None
    argument = json.dumps([[signature.pattern for signature in signatures], SLOWEST])
    command = [sys.executable or "python3", "-S", "-c", _TRIAL]
    try:
        done = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )
    except OSError:
        return None
    try:
        shown, _nothing = done.communicate(argument, timeout=30 + SLOWEST * len(signatures))
    except subprocess.TimeoutExpired:
        done.kill()
        shown, _nothing = done.communicate()
    if done.returncode == 0:
        return None
    tried = shown.split()
    return signatures[int(tried[-1])] if tried and done.returncode in (3, -signal.SIGXCPU) else None
