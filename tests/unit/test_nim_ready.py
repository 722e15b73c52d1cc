# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The short look finds ready what the full look finds ready, and never anything else."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._health_drift import unready
from ansible_collections.gpu_fleet.nim.plugins.module_utils._health_target import parse_targets
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_health import HealthCheck
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_ready import RECORD_DIRECTORY, certainly_ready
from health_world import Nim, World, check, word

SPEC = "io.gpu-fleet.nim.spec"


def entry(nim: Nim, **more: t.Any) -> dict[str, t.Any]:
    return {"name": "a", "port": nim.port, "served_model_name": "meta/llama", **more}


def served(nim: Nim) -> World:
    """A service that has become ready, and was looked at properly then."""
    world = World()
    world.unit("a")
    world.box("a")
    world.boxes["nim-a"]["Config"] = {"Labels": {SPEC: "s1"}}
    world.files["/etc/nim/a.json"] = json.dumps({"spec": "s1"}).encode()
    word(world, "ready")
    check(world, [entry(nim)])
    nim.requests.clear()
    return world


def looks(world: World, nim: Nim, **more: t.Any) -> tuple[bool, bool]:
    """What the short look says, and what the full one says."""
    [target] = parse_targets([entry(nim, **more)])
    short = certainly_ready(world, world, target)
    full = HealthCheck(world, world, [target]).run(None, interval=0, wait=False, record=False)
    return short, bool(full.models[0]["ready"])


def test_what_serves_is_asked_two_things_and_no_command_is_run(nim: Nim) -> None:
    world = served(nim)
    del world.calls[:]
    [target] = parse_targets([entry(nim)])
    assert certainly_ready(world, world, target)
    assert nim.requests == ["/v1/health/ready", "/v1/models"]
    assert world.calls == []


def other_container(world: World) -> None:
    world.boxes["nim-a"]["Id"] = "c2"


def other_specification(world: World) -> None:
    world.files["/etc/nim/a.json"] = json.dumps({"spec": "s2"}).encode()


def failed_completion(world: World) -> None:
    path = RECORD_DIRECTORY + "/a.json"
    record = json.loads(world.files[path])
    record["completion"] = {"kind": "chat", "ok": False, "note": "no chat template"}
    world.files[path] = json.dumps(record).encode()


BROKEN: dict[str, t.Callable[[World], object]] = {
    "ended": lambda world: world.end("a"),
    "gone": lambda world: world.boxes.clear(),
    "of an earlier configuration": other_specification,
    "ready in between only": lambda world: word(world, "ready", unsteady=2),
    "no Docker": lambda world: setattr(world, "docker_down", True),
    "does not complete": failed_completion,
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_the_full_look_refuses_is_refused(nim: Nim, what: str) -> None:
    world = served(nim)
    assert looks(world, nim) == (True, True)
    BROKEN[what](world)
    assert looks(world, nim) == (False, False)


@pytest.mark.parametrize("status", [503, 404])
def test_what_does_not_say_ready_is_refused(nim: Nim, status: int) -> None:
    world = served(nim)
    nim.ready = status
    assert looks(world, nim) == (False, False)


def test_another_model_than_the_wanted_one_is_refused(nim: Nim) -> None:
    assert looks(served(nim), nim, served_model_name="other") == (False, False)


@pytest.mark.parametrize(
    "change",
    [other_container, lambda world: world.files.pop(RECORD_DIRECTORY + "/a.json")],
    ids=["container", "record"],
)
def test_what_nobody_has_looked_at_properly_is_left_to_the_full_look(
    nim: Nim, change: t.Callable[[World], object]
) -> None:
    world = served(nim)
    change(world)
    assert looks(world, nim) == (False, True)


def test_another_kind_of_completion_is_for_the_run_that_may_send_one(nim: Nim) -> None:
    world = served(nim)
    assert looks(world, nim, completion="chat") == (False, True)
    [target] = parse_targets([entry(nim, completion="chat")])
    assert [change.after for change in unready(world, world, [target], [])] == ["completion: chat"]
    check(world, [entry(nim, completion="chat")])
    assert looks(world, nim, completion="chat") == (True, True)
    assert unready(world, world, [target], []) == []


def test_no_completion_is_wanted_any_more(nim: Nim) -> None:
    world = served(nim)
    assert looks(world, nim, completion="none") == (True, True)
    assert unready(world, world, parse_targets([entry(nim, completion="none")]), []) == []
