# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What counts as a change of the host."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Change, Resource, converge


class Thing(Resource[t.Dict[str, bool]]):
    """Two parts: one that is written, one that is only proved."""

    name = "thing"

    def __init__(self, *missing: str) -> None:
        self.state = {"file": "file" not in missing, "proof": "proof" not in missing}

    def observe(self, host: Host) -> dict[str, bool]:
        return dict(self.state)

    def plan(self, state: dict[str, bool]) -> list[Change]:
        return [
            Change("thing", part, None, "there", "it is missing", action=part, proof=part == "proof")
            for part, there in state.items()
            if not there
        ]

    def apply(self, host: Host, change: Change) -> None:
        self.state[change.action] = True


@pytest.mark.parametrize("check_mode", [True, False])
@pytest.mark.parametrize(
    ("missing", "changed"), [((), False), (("proof",), False), (("file",), True), (("file", "proof"), True)]
)
def test_a_proof_alone_is_no_change(missing: tuple[str, ...], changed: bool, check_mode: bool) -> None:
    thing = Thing(*missing)
    outcome = converge(Host(), thing, check_mode=check_mode)
    assert outcome.changed is changed
    # It is made all the same, and told.
    assert [change.what for change in outcome.changes] == list(missing)
    assert all(thing.state.values()) is (not check_mode or not missing)
