# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The user's own failure signatures are checked before they meet a log."""

from __future__ import annotations

import time
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._failure_signatures import SIGNATURES
from ansible_collections.gpu_fleet.nim.plugins.module_utils._own_signatures import parse_signatures

GOOD: dict[str, t.Any] = {"id": "site-1", "pattern": "quota exceeded", "cause": "the quota", "remedy": "ask storage"}


def test_a_row_of_the_collections_own_table_may_be_copied() -> None:
    row = {
        "id": "eng-23",
        "pattern": r"Free memory on device \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\)",
        "where": "container",
        "cause": "another process holds memory.",
        "remedy": "stop it or lower the share",
        "harmless": False,
        "sample": "Free memory on device (59.32/79.15 GiB) on startup",
        "source": "vLLM",
        "note": "x",
        "mark": "3p",
        "condition": "y",
        "exit_code": 1,
    }
    [signature] = parse_signatures([row])
    assert (signature.id, signature.where, signature.cause) == ("eng-23", "container", "another process holds memory")


def test_all_expressions_of_the_collection_pass() -> None:
    rows = [
        {"id": one.id, "pattern": one.pattern, "where": one.where, "cause": one.cause, "remedy": one.remedy}
        for one in SIGNATURES
    ]
    assert len(parse_signatures(rows)) == len(SIGNATURES)


def test_flags() -> None:
    [signature] = parse_signatures([dict(GOOD, umbrella="yes", passing=True, where="host")])
    assert (signature.umbrella, signature.passing, signature.harmless, signature.where) == (True, True, False, "host")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("quota", "nim_failure_signatures[0] = 'quota': is no mapping"),
        ({}, "nim_failure_signatures[0].id = None: is no text"),
        (dict(GOOD, id="a b"), "nim_failure_signatures[0].id = 'a b': is no identifier"),
        (dict(GOOD, pattern=""), "nim_failure_signatures[0].pattern = '': is no text"),
        (dict(GOOD, cause=7), "nim_failure_signatures[0].cause = 7: is no text"),
        (dict(GOOD, cause="a\nb"), "nim_failure_signatures[0].cause = 'a\\nb': has several lines"),
        (dict(GOOD, remedy="x" * 1001), "is too long; use at most 1000 characters"),
        (dict(GOOD, where="kernel"), "nim_failure_signatures[0].where = 'kernel': is unknown; use container, docker"),
        (dict(GOOD, harmless="perhaps"), "nim_failure_signatures[0].harmless = 'perhaps': is neither true nor false"),
        (dict(GOOD, regex="x"), "nim_failure_signatures[0].regex = 'x': is unknown; use id, pattern"),
        (dict(GOOD, sample="all well"), "nim_failure_signatures[0].sample = 'all well': is not matched by pattern"),
        (dict(GOOD, pattern="(open"), "nim_failure_signatures[0].pattern = '(open': is no regular expression"),
        (dict(GOOD, pattern="x*"), "matches every line; name a text that must be there"),
        (dict(GOOD, pattern="(a+)+b"), "a repetition inside a repetition"),
        (dict(GOOD, pattern="(?:(?:\\w+)\\s?){10}:"), "a repetition inside a repetition"),
        (dict(GOOD, pattern="(a|aa)*b"), "alternatives inside a repetition"),
        (dict(GOOD, pattern=".*.*.*.*x"), "takes too long on long lines; use fewer '.*'"),
    ],
)
def test_mistakes_name_variable_value_and_remedy(entry: t.Any, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(FleetError) as caught:
        parse_signatures([entry])
    assert caught.value.reason == "invalid_option"
    assert says in caught.value.message
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("value", ["text", {"id": "a"}, None, 7])
def test_no_list(value: t.Any) -> None:
    with pytest.raises(FleetError) as caught:
        parse_signatures(value)
    assert "nim_failure_signatures = " in caught.value.message


def test_one_id_twice_and_too_many() -> None:
    with pytest.raises(FleetError) as caught:
        parse_signatures([GOOD, GOOD])
    assert "nim_failure_signatures[1].id = 'site-1': is there twice" in caught.value.message
    with pytest.raises(FleetError) as caught:
        parse_signatures([GOOD] * 501)
    assert "has 501 entries" in caught.value.message


def test_the_slow_one_among_many_is_named() -> None:
    rows = [dict(GOOD), dict(GOOD, id="site-2", pattern="(?s).*.*foo"), dict(GOOD, id="site-3")]
    with pytest.raises(FleetError) as caught:
        parse_signatures(rows)
    assert caught.value.message.startswith("nim_failure_signatures[1].pattern = '(?s).*.*foo'")
