# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the benchmark of a roll makes of records."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import types
from typing import Any

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_upgrade_record import STEPS

PATH = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "upgrade.py"


@pytest.fixture(scope="module")
def bench() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("bench_upgrade", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def record(began: float, gap: float, **seconds: float) -> dict[str, Any]:
    """A turn that begins with its drain; ``seconds`` are those of its steps, by default one each."""
    steps, at = [{"step": "drained", "at": began, "seconds": 0.5}], began + 0.5 + gap
    for step in STEPS[STEPS.index("workloads_stopped") :]:
        took = seconds.get(step, 1.0)
        # A second of the controller's between any two.
        steps.append({"step": step, "at": at, "seconds": took})
        at += took + 1
    return {"steps": steps}


def requests(lost: int = 0) -> dict[str, Any]:
    return {
        "plain": {"asked": 300, "failed": lost, "truncated": 0},
        "streamed": {"asked": 60, "failed": 0, "truncated": 0},
        "longest": 2.0,
    }


def test_every_step_of_a_host_that_is_out_counts(bench: types.ModuleType) -> None:
    assert STEPS[STEPS.index("drained") + 1 : STEPS.index("returned")] == bench.WORK


def test_the_floor_is_the_slowest_host_of_each_batch(bench: types.ModuleType) -> None:
    records = {"a": record(1010, 5, ready=40), "b": record(1100, 1, ready=40), "c": record(1101, 5, ready=60)}
    roll = bench.measured("570 to 580", 1000.0, 1200.0, [["a"], ["b", "c"]], records, requests())
    # Requests take two seconds at most, so no drain has to take longer; seven steps of a second beside "ready".
    assert roll.floor == (2 + 7 + 40) + (2 + 7 + 60)
    assert (roll.before, roll.wall) == (10, 190)
    assert roll.ratio == pytest.approx(190 / 118) and not roll.passed
    assert "MISS" in roll.line() and "lost 0 of 360 requests" in roll.line()
    quick = bench.measured("570 to 580", 1000.0, 1140.0, [["a"], ["b", "c"]], records, requests())
    assert quick.passed and "pass" in quick.line() and quick.as_dict()["ratio"] == pytest.approx(130 / 118)


def test_a_drain_that_had_nothing_to_wait_for_costs_nothing(bench: types.ModuleType) -> None:
    assert bench.turn_of("a", record(1000, 0.25), 2.0).drain == 0.25


def test_a_lost_request_is_a_miss(bench: types.ModuleType) -> None:
    roll = bench.measured("570 to 580", 1000.0, 1011.0, [["a"]], {"a": record(1000, 5)}, requests(lost=1))
    assert roll.ratio <= bench.TARGET and not roll.passed


def test_a_turn_that_was_not_whole_is_no_floor(bench: types.ModuleType) -> None:
    found = record(1000, 5)
    found["steps"] = [entry for entry in found["steps"] if entry["step"] != "loaded"]
    with pytest.raises(ValueError, match="a has no loaded on record"):
        bench.turn_of("a", found, 2.0)
    with pytest.raises(ValueError, match="drained"):
        bench.turn_of("a", {}, 2.0)
