# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Units of a host that is looked at: one question for all, and the same answers as one by one."""

from __future__ import annotations

import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_paths import configured_services
from ansible_collections.gpu_fleet.nim.plugins.module_utils._read_only_host import ReadOnlyHost
from ansible_collections.gpu_fleet.nim.plugins.module_utils._systemd import (
    UNITS,
    properties_of_units,
    unit_properties,
)
from fake_host import FakeHost


def systemctl(_host: FakeHost, argv: tuple[str, ...], _stdin: t.Any, _env: t.Any) -> str:
    names = [word for before, word in zip(argv, argv[1:]) if before == "-p"]
    units = argv[3 + 2 * len(names) :]
    states = {"ActiveState": "active", "SocketMode": "0660", "ExecStart": "{ path=/x ; argv[]=/x a=b }"}
    blocks = []
    for unit in units:
        known = {name: value for name, value in states.items() if name != "SocketMode" or unit.endswith(".socket")}
        known["LoadState"] = "not-found" if "fabric" in unit else "loaded"
        blocks.append("".join("%s=%s\n" % (name, known[name]) for name in names if name in known))
    return "\n".join(blocks)


QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("docker.service", ("LoadState", "ExecStart")),
    ("docker.socket", ("ActiveState", "SocketMode")),
    ("nvidia-fabricmanager.service", ("LoadState",)),
    ("docker.service", ("ActiveState",)),
)


def test_one_question_and_the_same_answers() -> None:
    alone = FakeHost(commands={"systemctl show *": systemctl})
    together = FakeHost(commands={"systemctl show *": systemctl})
    looked_at = ReadOnlyHost(together)
    for unit, names in QUESTIONS:
        assert unit_properties(looked_at, unit, *names) == unit_properties(alone, unit, *names) != {}
    assert len(together.calls) == 1
    assert len(alone.calls) == len(QUESTIONS)


def test_what_is_not_asked_by_everybody_is_asked_alone() -> None:
    host = FakeHost(commands={"systemctl show *": systemctl})
    looked_at = ReadOnlyHost(host)
    assert unit_properties(looked_at, "ssh.service", "ActiveState") == {"ActiveState": "active"}
    assert unit_properties(looked_at, "docker.service", "ActiveState", "NRestarts") == {"ActiveState": "active"}
    assert not any(set(UNITS) <= set(call) for call in host.calls)


def test_a_systemd_that_answers_otherwise_is_asked_for_each() -> None:
    host = FakeHost(commands={"systemctl show *": "ActiveState=active\n"})
    assert unit_properties(ReadOnlyHost(host), "docker.service", "ActiveState") == {"ActiveState": "active"}
    assert len(host.calls) == 2
    assert unit_properties(ReadOnlyHost(FakeHost()), "docker.service", "ActiveState") == {}


def test_services_are_in_the_one_question() -> None:
    host = FakeHost({"/etc/nim/a.json": "{}"}, {"systemctl show *": systemctl})
    looked_at = ReadOnlyHost(host)
    assert unit_properties(looked_at, "docker.service", "ActiveState") == {"ActiveState": "active"}
    units = ["nim.target", "nim-a.service"]
    assert properties_of_units(looked_at, units, "ActiveState") == {unit: {"ActiveState": "active"} for unit in units}
    assert len(host.calls) == 1


def test_a_file_that_no_service_can_have_is_none_of_ours() -> None:
    host = FakeHost({"/etc/nim/a.json": "{}", "/etc/nim/*.json": "{}", "/etc/nim/b c.json": "{}"})
    assert configured_services(host) == ["a"]


def test_units_that_are_not_in_it_are_asked_for_together() -> None:
    # The second is an alias, of which systemd tells another name.
    answer = "Names=nim.target\nActiveState=active\n\nNames=other.service\nActiveState=inactive\n"
    host = FakeHost(commands={"systemctl show --property *": answer})
    for looked_at in (host, ReadOnlyHost(host)):
        found = properties_of_units(looked_at, ["nim.target", "nim-b.service"], "ActiveState")
        assert {unit: values["ActiveState"] for unit, values in found.items()} == {
            "nim.target": "active",
            "nim-b.service": "inactive",
        }
    assert host.calls == [("systemctl", "show", "--property", "ActiveState", "--", "nim.target", "nim-b.service")] * 2


def test_units_that_are_told_otherwise_are_asked_for_each() -> None:
    commands = {"systemctl show --property *": "", "systemctl show --no-pager *": "ActiveState=active\n"}
    host = FakeHost(commands=commands)
    found = properties_of_units(host, ["nim.target", "nim-b.service"], "ActiveState")
    assert found == {unit: {"ActiveState": "active"} for unit in ("nim.target", "nim-b.service")}
    assert len(host.calls) == 3
