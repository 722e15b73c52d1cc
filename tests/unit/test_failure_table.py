# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of failures that the sandbox brings about is complete, and so is what the collection knows."""

from __future__ import annotations

import json
import pathlib
import re
import sys

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._failure_signatures import (
    EXIT_CODES,
    OUT_OF_MEMORY,
    SIGNATURES,
)

SANDBOX = pathlib.Path(__file__).resolve().parents[1] / "sandbox"
sys.path[:0] = [str(SANDBOX), str(SANDBOX / "world" / "standin")]

import failures  # noqa: E402  # after the path is set
from failure_table import (  # noqa: E402  # as above
    REFUSALS,
    SITUATIONS,
    WITHOUT_SIGNATURE,
    Situation,
)

KNOWN = {signature.id: signature for signature in (*SIGNATURES, *EXIT_CODES.values(), OUT_OF_MEMORY)}


def exercised() -> set[str]:
    """Identifiers that some situation is about; harmless ones are what does not end a wait."""
    found = {situation.failure for situation in SITUATIONS} | {refusal.failure for refusal in REFUSALS}
    return found | {situation.name for situation in SITUATIONS if situation.ready}


def test_the_collection_knows_every_failure_of_the_reference(fixtures: pathlib.Path) -> None:
    reference = json.loads((fixtures / "failure-ids.json").read_text())
    assert set(KNOWN) == set(reference) - WITHOUT_SIGNATURE
    for name, signature in KNOWN.items():
        assert signature.where == reference[name]["where"], name
        assert signature.harmless is reference[name]["harmless"], name
    codes = {entry["exit_code"]: name for name, entry in reference.items() if "exit_code" in entry}
    assert {code: signature.id for code, signature in EXIT_CODES.items()} == codes


def test_every_failure_is_brought_about_or_quoted() -> None:
    assert set(KNOWN) - exercised() == set(), "no situation for them in failure_table"
    assert exercised() - set(KNOWN) - {situation.name for situation in SITUATIONS} - WITHOUT_SIGNATURE - {""} == set()


def test_names_are_the_names_of_one_model_each() -> None:
    names = [situation.name for situation in SITUATIONS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_what_is_quoted_is_what_is_meant(situation: Situation) -> None:
    quoted = situation.environment.get("STANDIN_FAIL")
    if not quoted or not situation.failure or not KNOWN[situation.failure].pattern:
        return
    said = situation.environment.get("STANDIN_FAIL_TEXT", "").replace("\\n", "\n") or failures.FAILURES[quoted][2]
    assert re.search(KNOWN[situation.failure].pattern, said), said
