# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _rollout_looks as looks
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout import (
    Rollout,
    Limits,
    Share,
    plan_fleet,
)
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._rollout_page import bars_of, render_page, seconds_text


def look(*models: str, **more: t.Any) -> dict[str, t.Any]:
    return {
        "gpu": True,
        "due": True,
        "loaded": "555.42.06",
        "target": "branch 580",
        "models": list(models),
        "serving": list(models),
        "maintenance": "",
        "open": False,
        "steps": [{"what": "kernel module nvidia", "from": "555.42.06", "to": None, "disruption": "unload_driver"}],
        **more,
    }


def made(found: dict[str, t.Any], **more: t.Any) -> Rollout:
    hosts = [looks.fleet_host(name, answer, **more) for name, answer in found.items()]
    return plan_fleet(hosts, Limits(max_unavailable=Share(2)))


# -- from a look to a host ------------------------------------------------------------------------


def test_a_host_that_serves() -> None:
    host = looks.fleet_host("a", look("llama"), canary=True)
    assert host.wanted and host.serving == {"llama"} and host.canary


@pytest.mark.parametrize(
    "found, reason",
    [
        (None, "it cannot be reached"),
        ({"unreachable": True, "msg": "timed out"}, "it cannot be reached"),
        ({"failed": True, "msg": "no room"}, "its look failed"),
        (look("llama", maintenance="foreign"), "somebody else has put it under maintenance"),
    ],
)
def test_a_host_that_is_out_serves_nothing_and_is_left(found: t.Any, reason: str) -> None:
    host = looks.fleet_host("a", found)
    assert not host.available and not host.wanted and host.serving == frozenset() and host.skip == reason


def test_a_host_that_somebody_has_drained_at_a_gateway_is_left() -> None:
    host = looks.fleet_host("a", look("llama"), gateways=[{"reason": ""}, {"reason": "foreign_drain"}])
    assert not host.available and host.skip == "somebody else has drained it at a gateway"


def test_a_host_that_an_earlier_run_has_left_out_is_gone_on_with() -> None:
    host = looks.fleet_host("a", look("llama", open=True, serving=[]))
    assert host.wanted and host.resumable and not host.available


def test_a_host_that_is_skipped_still_serves() -> None:
    host = looks.fleet_host("a", look("llama"), skip=True)
    assert host.available and not host.wanted and host.serving == {"llama"}


# -- the plan -------------------------------------------------------------------------------------


def test_the_plan_tells_batches_capacity_and_what_is_left() -> None:
    found = {
        "gpu01": look("llama"),
        "gpu02": look("llama"),
        "gpu03": look("qwen"),
        "gpu04": look("llama", due=False, loaded="580.95.05", steps=[]),
        "gpu05": None,
    }
    plan = made(found)
    rows = [row for name, answer in found.items() for row in looks.rows_of(name, answer, plan)]
    text = looks.render_plan(rows, plan, steps=True)
    assert "gpu01  1      555.42.06  branch 580  llama   unload driver  planned" in text
    assert "gpu04  -      580.95.05  branch 580  llama   -              as wanted" in text
    assert (
        "Batch 1 (canary): gpu01. Out of service meanwhile: 2 of at most 2 hosts; ready: llama 2 of 3, qwen 1 of 1."
        in text
    )
    assert "gpu03: model qwen would have 0 ready replicas and keeps at least 1." in text
    assert "gpu05: it cannot be reached." in text
    assert "Steps on gpu01, gpu02:" in text and "  1. kernel module nvidia: 555.42.06 -> -" in text
    assert text.endswith("2 of 5 hosts are to be upgraded in 2 batches; 1 is as wanted.")
    assert looks.refused(rows) == []


def test_a_refused_host_is_named_with_the_reason_unless_it_is_skipped() -> None:
    found = {"a": look("llama"), "b": {"failed": True, "msg": "There is no room.", "reason": "disk_full"}}
    plan = made(found)
    rows = [row for name, answer in found.items() for row in looks.rows_of(name, answer, plan)]
    assert looks.refused(rows) == ["b"] and "b: There is no room." in looks.render_plan(rows, plan)
    rows = [row for name, answer in found.items() for row in looks.rows_of(name, answer, plan, skip=name == "b")]
    assert looks.refused(rows) == []
    rows = looks.rows_of("a", found["a"], plan, gateway_error="gateway gw1: it does not answer")
    assert looks.refused(rows) == ["a"]


def test_a_host_without_a_way_back_is_upgraded_and_told() -> None:
    found = {
        "a": look("llama", way_back="The driver that is there now could not be put back: it is gone."),
        "b": look("llama"),
    }
    plan = made(found)
    rows = [row for name, answer in found.items() for row in looks.rows_of(name, answer, plan)]
    assert looks.refused(rows) == [] and plan.order == ("a", "b")
    assert "a: The driver that is there now could not be put back: it is gone." in looks.render_plan(rows, plan)


# -- what came of it ------------------------------------------------------------------------------

BEGUN = {"outcome": "", "due": True, "open": True}
READY = {"outcome": "", "due": True, "step": "ready"}


@pytest.mark.parametrize(
    "results, outcome",
    [
        # returned, restored, ready, begun
        ([None, None, None, None], looks.NOT_BEGUN),
        ([{"outcome": "upgraded"}, None, READY, BEGUN], looks.UPGRADED),
        ([{"outcome": "upgraded"}, {"skipped": True}, READY, BEGUN], looks.UPGRADED),
        ([None, None, None, {"outcome": "", "due": False}], looks.UPGRADED),
        ([None, None, None, {"outcome": "", "due": True, "maintenance": "foreign"}], looks.NOT_BEGUN),
        ([None, None, None, {"failed": True, "msg": "x"}], looks.RESTORED),
        ([None, {"outcome": "restored"}, None, BEGUN], looks.RESTORED),
        ([None, {"skipped": True}, {"failed": True, "outcome": "rolled_back"}, BEGUN], looks.ROLLED_BACK),
        ([None, {"skipped": True}, {"failed": True, "outcome": "stranded"}, BEGUN], looks.OUT),
        # The gateway did not take it back; it never came back from a reboot; it was lost after the drain.
        ([None, {"skipped": True}, READY, BEGUN], looks.OUT),
        ([None, None, {"outcome": "", "reboot_required": True}, BEGUN], looks.OUT),
        ([None, None, {"unreachable": True}, BEGUN], looks.OUT),
        ([None, None, None, BEGUN], looks.OUT),
    ],
)
def test_what_came_of_a_host(results: list[t.Any], outcome: str) -> None:
    assert looks.outcome_of(results) == outcome


def test_a_host_that_was_out_before_is_out_when_it_cannot_be_begun() -> None:
    assert looks.outcome_of([None, {"failed": True}], resumable=True) == looks.OUT


def test_a_host_after_its_turn() -> None:
    host = looks.fleet_host("a", look("llama", open=True, serving=[]))
    assert looks.after(host, looks.NOT_BEGUN) is host
    for outcome in (looks.UPGRADED, looks.RESTORED, looks.ROLLED_BACK):
        found = looks.after(host, outcome)
        assert found.available and found.serving == {"llama"} and not found.wanted
    assert not looks.after(host, looks.OUT).available and looks.after(host, looks.OUT).serving == frozenset()


def test_the_end_for_people() -> None:
    text = looks.render_end({"a": "upgraded", "b": "rolled back"}, {"a": "", "b": "Model llama is not ready."})
    assert "b: Model llama is not ready." in text and text.endswith("1 upgraded, 1 rolled back.")
    assert looks.render_end({}, {}) == "No host was upgraded."
    assert looks.message_of([None, {"failed": True, "msg": "x"}]) == "x"
    assert looks.message_of([{"unreachable": True}]) == "it cannot be reached"
    assert looks.record_of([None, {"record": {}}, {"record": {"step": "ready"}}]) == {"step": "ready"}


# -- the page -------------------------------------------------------------------------------------

STEPS = [
    {"step": "prestaged", "at": 100.0, "seconds": 30.0},
    {"step": "drained", "at": 1000.0, "seconds": 0.1},
    {"step": "workloads_stopped", "at": 1020.0, "seconds": 5.0},
    {"step": "loaded", "at": 1030.0, "seconds": 10.0},
    {"step": "ready", "at": 1040.0, "seconds": 60.0},
]


def test_bars_fill_the_time_between_the_steps() -> None:
    bars = bars_of(STEPS[1:], 1000.0, 1100.0)
    assert [round(bar.left) for bar in bars] == [0, 20, 30, 40]
    assert [round(bar.width) for bar in bars] == [20, 10, 10, 60]
    assert bars[0].title == "drain: 20 s" and bars[3].tone == "good"
    assert bars_of([{"step": "what", "at": 1}, {"step": "ready", "at": "soon"}], 0, 1) == []


def test_seconds_as_people_read_them() -> None:
    assert [seconds_text(value) for value in (0.4, 59.4, 61, 3600)] == ["0 s", "59 s", "1 min 1 s", "1 h 0 min"]


def test_the_page_shows_every_host_and_escapes_what_hosts_say() -> None:
    plan = made({"gpu01": look("llama"), "gpu02": look("llama")})
    record = {"steps": STEPS, "before": {"version": "555.42.06"}, "target": "branch 580"}
    hosts = [
        {"name": "gpu01", "outcome": "upgraded", "message": "", "record": record, "models": ["llama"]},
        {"name": "gpu02", "outcome": "out of service", "message": "<script>x</script>", "record": {}, "models": []},
    ]
    page = render_page(hosts, plan.as_dict(), "today")
    assert "555.42.06 → branch 580" in page and "until ready: 1 min 0 s" in page
    assert "&lt;script&gt;" in page and "<script>" not in page
    assert "1 upgraded" in page and "1 out of service" in page and "1 min 40 s" in page
    # The downloads were an hour before and are not drawn.
    assert "downloads" not in page and "1 (canary)" in page


def test_the_page_of_a_run_that_has_not_begun() -> None:
    page = render_page([], made({}).as_dict(), "today")
    assert "Nothing was to be upgraded." in page
