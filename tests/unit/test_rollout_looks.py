# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _rollout_looks as looks
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout import (
    Limits,
    Rollout,
    Share,
    plan_fleet,
)
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._rollout_page import bars_of, render_page


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
        (
            look("llama", held="somebody else has put it under maintenance"),
            "somebody else has put it under maintenance",
        ),
    ],
)
def test_a_host_that_is_out_serves_nothing_and_is_left(found: t.Any, reason: str) -> None:
    host = looks.fleet_host("a", found)
    assert not host.available and not host.wanted and host.serving == frozenset() and host.skip == reason


def test_a_host_that_an_earlier_run_has_left_out_is_gone_on_with() -> None:
    host = looks.fleet_host("a", look("llama", open=True, serving=[]))
    assert host.wanted and host.resumable and not host.available


def test_a_host_that_is_skipped_still_serves() -> None:
    host = looks.fleet_host("a", look("llama"), skip="driver_upgrade_skip")
    assert host.available and not host.wanted and host.serving == {"llama"}
    assert host.skip == "driver_upgrade_skip is true"


def test_a_host_that_is_skipped_because_it_was_refused_still_serves() -> None:
    refusal = {"failed": True, "msg": "no room", "models": ["llama", "qwen"], "serving": ["llama"]}
    host = looks.fleet_host("a", refusal, skip="driver_upgrade_skip")
    assert host.available and host.serving == {"llama"} and not host.wanted
    assert not looks.fleet_host("a", refusal).available
    # One that says nothing may be down.
    assert not looks.fleet_host("a", {"failed": True, "msg": "x"}, skip="driver_upgrade_skip").available


def test_a_host_on_which_nothing_is_ready_is_down_and_can_go() -> None:
    host = looks.fleet_host("a", look("llama", serving=[]))
    assert host.down and not host.available and host.wanted and not host.resumable
    # Without models there is nothing that could be down.
    assert looks.fleet_host("a", look()).available
    # One that is held is left, whatever runs on it.
    held = looks.fleet_host("a", look("llama", serving=[], held="x", open=True))
    assert not held.wanted and not held.down and not held.resumable


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
    rows = [looks.row_of(name, answer, plan) for name, answer in found.items()]
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
    assert text.endswith("2 of 5 hosts are to be updated in 2 batches; 1 is as wanted.")
    assert looks.refused(rows) == [] and plan.waits == ("gpu03", "gpu05")
    moments = text[text.index("Ready replicas of every model at each moment:") :].splitlines()
    assert moments[1:6] == [
        "         llama  qwen",
        "before   3      1",
        "batch 1  2      1",
        "batch 2  2      1",
        "after    3      1",
    ]


def test_a_refused_host_is_named_with_the_reason_unless_it_is_skipped() -> None:
    found = {"a": look("llama"), "b": {"failed": True, "msg": "There is no room.", "reason": "disk_full"}}
    plan = made(found)
    rows = [looks.row_of(name, answer, plan) for name, answer in found.items()]
    assert looks.refused(rows) == ["b"] and "b: There is no room." in looks.render_plan(rows, plan)
    rows = [looks.row_of(name, answer, plan, skip="x_skip" * (name == "b")) for name, answer in found.items()]
    assert looks.refused(rows) == []
    row = looks.row_of("a", found["a"], plan, gateway_error="gateway gw1 has no server of this host")
    assert looks.refused([row]) == ["a"]


def test_a_host_without_a_way_back_is_upgraded_and_told() -> None:
    found = {
        "a": look("llama", way_back="The driver that is there now could not be put back: it is gone."),
        "b": look("llama"),
    }
    plan = made(found)
    rows = [looks.row_of(name, answer, plan) for name, answer in found.items()]
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
        ([{"outcome": "updated"}, None, READY, BEGUN], looks.UPDATED),
        ([{"outcome": "updated"}, {"skipped": True}, READY, BEGUN], looks.UPDATED),
        ([None, None, None, {"outcome": "", "due": False}], looks.UPDATED),
        ([None, None, None, {"outcome": "", "due": True, "held": "somebody"}], looks.NOT_BEGUN),
        ([None, None, None, {"failed": True, "msg": "x"}], looks.RESTORED),
        ([None, {"outcome": "restored"}, None, BEGUN], looks.RESTORED),
        ([None, {"skipped": True}, {"failed": True, "outcome": "rolled_back"}, BEGUN], looks.ROLLED_BACK),
        ([None, {"skipped": True}, {"failed": True, "outcome": "stranded"}, BEGUN], looks.OUT),
        # The gateway did not take it back; it never came back from a reboot; it was lost after the drain.
        ([None, {"skipped": True}, READY, BEGUN], looks.OUT),
        ([None, None, {"outcome": "", "reboot_required": True}, BEGUN], looks.OUT),
        ([None, None, {"unreachable": True}, BEGUN], looks.OUT),
        ([None, {"skipped": True}, {"failed": True, "lost": True}, BEGUN], looks.OUT),
        ([None, None, None, {"failed": True, "lost": True}], looks.OUT),
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
    for outcome in (looks.UPDATED, looks.RESTORED, looks.ROLLED_BACK):
        found = looks.after(host, outcome)
        assert found.available and found.serving == {"llama"} and not found.wanted
    assert not looks.after(host, looks.OUT).available and looks.after(host, looks.OUT).serving == frozenset()


def test_the_end_for_people() -> None:
    records = {"a": {"steps": STEPS}, "b": {"steps": STEPS}, "c": {"steps": STEPS}}
    text = looks.render_end(
        {"a": "updated", "b": "rolled back", "c": looks.NOT_BEGUN},
        {"a": "", "b": "Model llama is not ready."},
        records,
        {"d": "driver_upgrade_skip is true"},
        ["Requests at the gateways during the run: 3."],
    )
    assert "b: Model llama is not ready." in text and text.endswith("1 updated, 1 rolled back, 1 not begun.")
    assert "a     updated      1 min 40 s" in text and "c     not begun    -" in text
    assert "d was left: driver_upgrade_skip is true." in text and "Requests at the gateways during the run: 3." in text
    assert looks.render_end({}, {}, {}, {"d": "x"}) == "d was left: x.\nNo host was updated."
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
    bars = bars_of(looks.steps_of({"steps": STEPS[1:]}), 1000.0, 1100.0)
    assert [round(one.left) for one in bars] == [0, 20, 30, 40]
    assert [round(one.width) for one in bars] == [20, 10, 10, 60]
    assert bars[0].title == "drain: 20 s" and bars[3].tone == "good"
    strange = looks.steps_of({"steps": [{"step": "what", "at": 1}, {"step": "ready", "at": "soon"}]})
    assert bars_of(strange, 0, 1) == []


def test_a_host_that_went_back_was_out_until_then() -> None:
    failure = {"step": "ready", "began": 1040.0, "at": 1640.0, "until": 1700.0}
    record = {"steps": STEPS[:4], "failure": failure}
    assert looks.out_of_service(record) == 700.0
    bars = bars_of(looks.steps_of(record), 1000.0, 1700.0)
    assert [one.title for one in bars[-2:]] == ["until ready: 10 min 0 s", "way back: 1 min 0 s"]
    assert bars[-1].tone == "bad" and round(bars[-1].left + bars[-1].width) == 100
    # Killed on the way, and written by an earlier release.
    assert looks.out_of_service({"steps": STEPS[:4], "failure": {"step": "ready", "at": 1640.0}}) == 640.0
    # It was never taken out.
    assert looks.out_of_service({"steps": STEPS[:1], "failure": failure}) == 0.0


def test_what_an_earlier_run_has_left_out_does_not_squeeze_the_chart() -> None:
    yesterday = {"steps": [{"step": "drained", "at": 1000.0, "seconds": 0.1}, dict(STEPS[4], at=90000.0)]}
    today = {"steps": [dict(STEPS[1], at=90100.0), dict(STEPS[4], at=90140.0)]}
    hosts = [
        {"name": name, "outcome": "updated", "message": "", "record": record, "models": []}
        for name, record in (("a", yesterday), ("b", today))
    ]
    page = render_page("driver_upgrade", hosts, made({}).as_dict(), "today", begun=89990.0)
    # From 89990 to 90200: the wait of b for its drain, 40 of 210 seconds.
    assert 'x="52.381" width="19.048"' in page and 'x="0.000" width="4.762"' in page


def test_seconds_as_people_read_them() -> None:
    assert [looks.seconds_text(value) for value in (0.4, 59.4, 61, 3600)] == ["0 s", "59 s", "1 min 1 s", "1 h 0 min"]


def test_the_page_shows_every_host_and_escapes_what_hosts_say() -> None:
    plan = made({"gpu01": look("llama"), "gpu02": look("llama")})
    record = {"steps": STEPS, "before": {"version": "555.42.06"}, "target": "branch 580"}
    hosts = [
        {"name": "gpu01", "outcome": "updated", "message": "", "record": record, "models": ["llama"]},
        {"name": "gpu02", "outcome": "out of service", "message": "<script>x</script>", "record": {}, "models": []},
    ]
    traffic = {"backends": [{"backend": "meta_llama", "requests": 7, "failed": 1, "truncated": 0}]}
    page = render_page("driver_upgrade", hosts, plan.as_dict(), "today", traffic=traffic, said=["At least 7."])
    assert "<td>meta_llama</td><td>7</td><td>1</td><td>0</td>" in page and "At least 7." in page
    assert "drain: 20 s · services stop: 10 s" in page
    assert "555.42.06 → branch 580" in page and "until ready: 1 min 0 s" in page
    assert "&lt;script&gt;" in page and "<script>" not in page
    assert "1 updated" in page and "1 out of service" in page and "1 min 40 s" in page
    # The downloads were an hour before and are not drawn.
    assert "downloads" not in page and "1 (canary)" in page


def test_the_page_of_a_run_that_has_not_begun() -> None:
    page = render_page("nim_deploy", [], made({}).as_dict(), "today")
    assert "Nothing was to be done." in page and "Requests" not in page and "driver changes" not in page
