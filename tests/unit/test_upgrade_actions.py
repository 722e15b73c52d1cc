# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The controller's side of the driver upgrade, with everything of Ansible around it replaced."""

from __future__ import annotations

import os
import pathlib
import platform
import time
import types
import typing as t

import pytest
from ansible.errors import (
    AnsibleActionFail,
    AnsibleConnectionFailure,
    AnsiblePromptInterrupt,
    AnsiblePromptNoninteractive,
)
from ansible_collections.gpu_fleet.nim.plugins.action import driver_upgrade, fleet_rollout, nim_deploy
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._progress import ProgressActionBase
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._rollout_action import this_run
from test_rollout_looks import BEGUN, look

RESULTS = ["returned", "restored", "ready", "begun"]
UPDATED = {"returned": {"outcome": "updated"}, "ready": {"outcome": "", "due": True}, "begun": BEGUN}


def gateway(
    name: str = "gw1", at: float = 0.0, process: str = "p1", requests: int = 0, **of: t.Any
) -> dict[str, t.Any]:
    """What haproxy_info says; ``of`` is host -> what differs from a server that serves."""
    servers = [
        {"host": host, "model": model, "serving": True, "foreign": False, **of.get(host, {})}
        for host, model in zip(("a", "b", "c", "d"), ("llama", "llama", "qwen", "qwen"))
    ]
    traffic = [{"backend": "meta_llama", "requests": requests, "failed": requests // 100, "truncated": 0}]
    return {"results": [{"item": name, "servers": servers, "process": process, "traffic": traffic, "at": at}]}


class Fleet:
    """A play with hosts, what was registered on them, and a task of fleet_rollout."""

    def __init__(self, looks: dict[str, t.Any]) -> None:
        self.hostvars: dict[str, dict[str, t.Any]] = {name: {"look": answer} for name, answer in looks.items()}
        self.shown = ""
        self.groups: dict[str, list[str]] = {}
        self.forks = 5
        self.gateways: dict[str, t.Any] = {}
        self.claims: dict[str, t.Any] = {}
        self.prompted = 0
        self.answer: type[Exception] | None = None

    def prompt(self, text: str) -> None:
        self.prompted += 1
        if self.answer is not None:
            raise self.answer

    def call(
        self, phase: str, batch: t.Sequence[str] = (), alive: t.Sequence[str] | None = None, **args: t.Any
    ) -> dict[str, t.Any]:
        lines: list[str] = []
        check_mode = args.pop("check_mode", False)
        action = fleet_rollout.ActionModule.__new__(fleet_rollout.ActionModule)
        action._display = types.SimpleNamespace(display=lines.append, prompt_until=self.prompt)
        action._supports_async = False
        args = {"phase": phase, "variable": "look", "results": RESULTS, "max_unavailable": 2, **args}
        action._task = types.SimpleNamespace(args=args, check_mode=check_mode, async_val=0, diff=False)
        action._templar = None
        action._connection = types.SimpleNamespace(_shell=types.SimpleNamespace(tmpdir="unused"))
        variables = {
            "hostvars": self.hostvars,
            "groups": self.groups,
            "ansible_forks": self.forks,
            "ansible_play_hosts_all": list(self.hostvars),
            "ansible_play_hosts": list(self.hostvars) if alive is None else list(alive),
            "ansible_play_batch": list(batch),
            "gateways": self.gateways,
            "claims": self.claims,
        }
        try:
            return action.run(task_vars=variables)
        finally:
            self.shown = "\n".join(lines)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet({name: look(model) for name, model in zip(("a", "b", "c", "d"), ("llama", "llama", "qwen", "qwen"))})


# -- the plan -------------------------------------------------------------------------------------


def test_the_plan_gives_order_and_batches(fleet: Fleet, tmp_path: pathlib.Path) -> None:
    report, output = tmp_path / "page.html", tmp_path / "plan.json"
    plan = fleet.call("plan", report=str(report), output=str(output))
    assert plan["order"] == ["a", "b", "c", "d"]
    roll = plan["roll"]
    assert roll["serial"] == [1, 2, 1] and roll["fleet"] == list("abcd") and roll["before"] == {"results": []}
    assert roll["begun"] == pytest.approx(time.time(), abs=60) and roll["group"].startswith("rollout_")
    assert "Batch 1 (canary): a." in fleet.shown and "Steps on" not in fleet.shown
    assert "Driver upgrade" in report.read_text() and '"serial"' not in output.read_text()
    assert '"batches"' in output.read_text()


def test_check_mode_tells_the_steps_and_writes_no_file(fleet: Fleet, tmp_path: pathlib.Path) -> None:
    fleet.call("plan", check_mode=True, report=str(tmp_path / "x"), output=str(tmp_path / "y"))
    assert "Steps on a, b, c, d:" in fleet.shown and list(tmp_path.iterdir()) == []


def test_a_refused_host_ends_the_run_before_it_begins(fleet: Fleet) -> None:
    fleet.hostvars["c"]["look"] = {"failed": True, "msg": "No room.", "reason": "disk_full"}
    with pytest.raises(AnsibleActionFail, match="c cannot be updated, so nothing was begun"):
        fleet.call("plan")
    assert "c: No room." in fleet.shown
    fleet.hostvars["c"]["driver_upgrade_skip"] = "yes"
    # It says nothing of its models, so they cannot be counted on.
    assert fleet.call("plan")["order"] == ["a", "b"]


def test_a_host_that_is_down_uses_up_a_slot(fleet: Fleet) -> None:
    fleet.hostvars["d"]["look"] = {"unreachable": True}
    plan = fleet.call("plan")
    assert plan["left"]["d"] == "it cannot be reached"
    assert plan["left"]["c"] == "model qwen would have 0 ready replicas and keeps at least 1"
    assert plan["roll"]["serial"] == [1, 1]


def test_canaries_by_group_and_by_name(fleet: Fleet) -> None:
    fleet.groups = {"canaries": ["d"]}
    assert fleet.call("plan", canary=["canaries"])["batches"][0]["hosts"] == ["d"]
    assert fleet.call("plan", canary=["b"])["batches"][0]["hosts"] == ["b"]


def test_the_operators_order_and_groups_in_it(fleet: Fleet) -> None:
    fleet.groups = {"rack2": ["d", "c"]}
    assert fleet.call("plan", order=["rack2", "b"])["order"] == ["d", "c", "b", "a"]


def test_gateways_say_who_was_drained_by_others_and_who_does_not_serve(fleet: Fleet) -> None:
    fleet.gateways = gateway(a={"serving": False, "foreign": True}, c={"serving": False})
    plan = fleet.call("plan", gateways="gateways")
    assert plan["left"]["a"] == "somebody else has drained it at a gateway" and "a" not in plan["order"]
    # Nobody loses anything by c; d is the only one of its model now.
    assert plan["order"] == ["c", "d"] and "b" in plan["left"]
    assert plan["capacity"] == {"llama": 1, "qwen": 1} and plan["after"] == {"llama": 1, "qwen": 2}
    assert plan["roll"]["gateways"] == ["gw1"] and plan["roll"]["before"]["results"][0]["item"] == "gw1"


def test_a_host_of_an_earlier_run_that_still_serves_is_taken_out_within_the_limits(fleet: Fleet) -> None:
    # Its controller was lost between the record and the drain, or a hook of the operator's drained nothing.
    for name in "abc":
        fleet.hostvars[name]["look"]["open"] = True
    fleet.gateways = gateway(c={"serving": False})
    plan = fleet.call("plan", gateways="gateways")
    # c is out already, and costs nothing more; a and b are the two that serve llama.
    assert [batch["kind"] for batch in plan["batches"]] == ["resume", "canary", "roll"]
    assert [batch["hosts"] for batch in plan["batches"]] == [["c"], ["a"], ["b", "d"]]
    assert plan["capacity"] == {"llama": 2, "qwen": 1} and plan["batches"][1]["capacity"]["llama"] == 1
    assert [batch["unavailable"] for batch in plan["batches"]] == [1, 1, 2]
    # Before each batch, too: one that somebody has enabled meanwhile is the last one of its model.
    before, fleet.gateways = fleet.gateways, gateway(d={"serving": False})
    found = fleet.call("batch", ["c"], gateways="gateways", before=before)
    assert found["left"] == {"c": "model qwen would have 0 ready replicas and keeps at least 1"}
    # At one of two gateways it still is asked.
    fleet.gateways = {"results": [*gateway(b={"serving": False})["results"], *gateway("gw2")["results"]]}
    plan = fleet.call("plan", gateways="gateways")
    assert "resume" not in [batch["kind"] for batch in plan["batches"]]
    # Without gateways nobody knows better than the record.
    assert fleet.call("plan")["batches"][0]["hosts"] == ["a", "b", "c"]


def test_a_host_that_serves_and_is_refused_again_is_not_told_to_be_out(fleet: Fleet) -> None:
    fleet.hostvars["a"]["look"]["open"] = True
    fleet.hostvars["a"]["begun"] = {"failed": True, "msg": "Somebody computes."}
    assert fleet.call("end")["outcomes"]["a"] == "out of service"
    fleet.gateways = gateway()
    assert fleet.call("end", gateways="gateways")["outcomes"]["a"] == "restored"


def test_nothing_begins_when_a_gateway_cannot_be_asked_or_does_not_know_a_host(fleet: Fleet) -> None:
    fleet.gateways = {"results": [{"item": "gw1", "failed": True, "msg": "No socket."}]}
    with pytest.raises(AnsibleActionFail, match=r"nothing was begun: gateway gw1: No socket\."):
        fleet.call("plan", gateways="gateways")
    fleet.gateways = {"results": [{"item": "gw1", "unreachable": True, "msg": "timed out"}]}
    with pytest.raises(AnsibleActionFail, match="gateway gw1: timed out"):
        fleet.call("plan", gateways="gateways")
    fleet.gateways = gateway()
    del fleet.gateways["results"][0]["servers"][1]
    with pytest.raises(AnsibleActionFail, match="b cannot be updated"):
        fleet.call("plan", gateways="gateways")
    assert "b: gateway gw1 has no server of this host; run playbook gateway first." in fleet.shown


def test_a_host_that_is_drained_in_another_way_need_not_be_known_to_a_gateway(fleet: Fleet) -> None:
    fleet.gateways = gateway()
    del fleet.gateways["results"][0]["servers"][1]
    fleet.hostvars["b"]["drain_hook"] = "none"
    assert "b" in fleet.call("plan", gateways="gateways")["order"]
    fleet.hostvars["b"] = {**fleet.hostvars["b"], "drain_hook": "haproxy", "drain_gateways": ["gw2"]}
    assert "b" in fleet.call("plan", gateways="gateways")["order"]


def test_the_plan_says_when_a_batch_is_more_than_ansible_works_on(fleet: Fleet) -> None:
    fleet.call("plan", max_unavailable="100%", min_ready=0)
    assert "forks" not in fleet.shown
    fleet.forks = 1
    fleet.call("plan", max_unavailable="100%", min_ready=0)
    assert "up to 3 hosts, and Ansible works on 1 at a time" in fleet.shown and "--forks 3" in fleet.shown


def test_the_plan_says_who_is_not_drained(fleet: Fleet) -> None:
    fleet.call("plan")
    assert "drain_hook is none for a, b, c, d: nobody in front is told" in fleet.shown
    fleet.groups = {"nim_gateways": ["gw1"]}
    fleet.hostvars["b"]["drain_hook"] = "none"
    fleet.hostvars["c"]["drain_hook"] = "command"
    fleet.call("plan")
    assert "drain_hook is none for b: nobody" in fleet.shown


def test_a_run_that_could_do_nothing_says_so_and_fails(fleet: Fleet) -> None:
    for name in "bcd":
        fleet.hostvars[name]["look"] = look("llama" if name == "b" else "qwen", due=False)
    fleet.hostvars["b"]["look"] = look(due=False)
    with pytest.raises(AnsibleActionFail, match="No host can be updated: a: model llama would have 0 ready replicas"):
        fleet.call("plan")
    assert fleet.call("plan", check_mode=True)["waits"] == ["a"]
    assert fleet.call("plan", min_ready=0)["order"] == ["a"]


@pytest.mark.parametrize(
    "args, words",
    [
        ({"max_unavailable": "lots"}, "driver_upgrade_max_unavailable = 'lots'"),
        ({"failure_budget": "-1"}, "driver_upgrade_failure_budget = '-1'"),
        ({"min_ready_of": {"llama": "two"}}, "driver_upgrade_min_ready_of = "),
        ({"min_ready_of": {"llama": "two"}, "kind": "nim_deploy"}, "nim_deploy_min_ready_of = "),
        ({"pause_after_canary": "sometimes"}, "driver_upgrade_pause_after_canary = 'sometimes'"),
        # What would be another wish than the operator believes.
        ({"max_unavailable": "0%"}, "driver_upgrade_max_unavailable = 0%: no host could ever go"),
        ({"min_ready": -1}, "driver_upgrade_min_ready = -1"),
        ({"min_ready_of": {"llama": -2}}, "driver_upgrade_min_ready_of = -2"),
        ({"min_ready_of": {"lama": 2}}, "driver_upgrade_min_ready_of = lama: no host has a model of that name"),
        ({"canary": ["a", "e"]}, "driver_upgrade_canary = e: the inventory has neither"),
        ({"order": ["rack1"]}, "driver_upgrade_order = rack1: the inventory has neither"),
    ],
)
def test_bad_limits_are_named_as_the_operator_gave_them(fleet: Fleet, args: dict[str, t.Any], words: str) -> None:
    with pytest.raises(AnsibleActionFail) as caught:
        fleet.call("plan", **args)
    assert words in str(caught.value)


def test_a_model_of_a_host_that_is_not_in_this_run_may_be_named(fleet: Fleet) -> None:
    fleet.groups = {"all": ["a", "z"]}
    fleet.hostvars["z"] = {"nim_models": [{"name": "mistral"}]}
    assert fleet.call("plan", min_ready_of={"mistral": 2}, hosts=list("abcd"))["order"] == list("abcd")


def test_hosts_that_are_not_in_this_run_count_as_the_gateways_see_them(fleet: Fleet) -> None:
    fleet.gateways = gateway()
    args = {"gateways": "gateways", "hosts": ["a", "c"], "before": fleet.gateways, "max_unavailable": "50%"}
    plan = fleet.call("plan", **args)
    # Of each model there is another replica; and half of four hosts are two.
    assert plan["order"] == ["a", "c"] and plan["capacity"] == {"llama": 2, "qwen": 2} and plan["max_unavailable"] == 2
    assert plan["left"] == {} and plan["done"] == [] and plan["waits"] == []
    # One of them goes down before the second batch.
    fleet.hostvars["a"].update(UPDATED)
    fleet.gateways = gateway(d={"serving": False})
    found = fleet.call("batch", ["c"], **args)
    assert found["left"] == {"c": "model qwen would have 0 ready replicas and keeps at least 1"}
    args["before"] = fleet.gateways = gateway(b={"serving": False}, d={"serving": False, "foreign": True})
    assert fleet.call("plan", **args, check_mode=True)["left"]["a"].startswith("2 of at most 2 hosts are out")


def test_ports_and_models_that_a_gateway_does_not_know_are_told_before_a_deployment(fleet: Fleet) -> None:
    def models(*ports: int) -> list[dict[str, t.Any]]:
        image = "nvcr.io/nim/meta/llama:1.8.5"
        return [
            {"name": name, "image": image, "gpus": 1, "port": port} for name, port in zip(("llama", "third"), ports)
        ]

    args = {"kind": "nim_deploy", "gateways": "gateways", "check_mode": True}
    fleet.gateways = gateway(a={"port": 8000}, b={"port": 8001})
    for name in "ab":
        fleet.hostvars[name]["nim_models"] = models(8000)
    with pytest.raises(AnsibleActionFail, match="b cannot be updated"):
        fleet.call("plan", **args)
    assert "b: gateway gw1 asks model llama at port 8001 of this host, and nim_models has 8000." in fleet.shown
    assert "deploy with -e target=b." in fleet.shown
    # The driver has nothing to do with it.
    assert fleet.call("plan", gateways="gateways")["order"]
    fleet.hostvars["b"]["nim_models"] = models(8001, 8002)
    assert fleet.call("plan", **args)["order"]
    assert "b: gateway gw1 has no server of third here; run playbook gateway, or no client" in fleet.shown
    assert "\na: " not in fleet.shown


def test_a_host_that_went_back_and_was_never_given_back_is_told(fleet: Fleet) -> None:
    # Since then the operator wants again what runs on it.
    for name, outcome in zip("abcd", ("rolled_back", "rolled_back", "updated", "restored")):
        fleet.hostvars[name]["look"].update(due=False, outcome=outcome)
    ours = {"serving": False, "state": "drained"}
    fleet.gateways = gateway(a=ours, b={"state": "enabled"}, c=ours, d=dict(ours, foreign=True))
    with pytest.raises(AnsibleActionFail, match="a: an earlier run has left it drained at gateway gw1; enable it"):
        fleet.call("plan", gateways="gateways")
    plan = fleet.call("plan", gateways="gateways", check_mode=True)
    assert plan["waits"] == ["a"] and plan["done"] == ["b", "c"]


# -- the gate -------------------------------------------------------------------------------------


def test_a_batch_goes_when_those_before_went_well(fleet: Fleet) -> None:
    first = fleet.call("batch", ["a"])
    assert first["admitted"] == ["a"] and first["number"] == 1 and first["stop"] == ""
    fleet.hostvars["a"].update(UPDATED)
    second = fleet.call("batch", ["b", "c"])
    assert second["admitted"] == ["b", "c"] and second["left"] == {}


def test_a_canary_that_could_not_go_is_followed_by_one_host_alone(fleet: Fleet) -> None:
    # Since the plan somebody has put it under maintenance.
    fleet.hostvars["a"].update(begun={"due": True, "held": "bad fan", "outcome": ""})
    found = fleet.call("batch", ["b", "c"], max_unavailable=3)
    assert found["admitted"] == ["b"] and found["left"] == {"c": "no host has tried it yet, and b goes first"}
    fleet.hostvars["b"].update(UPDATED)
    assert fleet.call("batch", ["d"], max_unavailable=3)["admitted"] == ["d"]


def test_the_operator_is_asked_once_after_the_canaries(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.call("pause", ["a"], pause_after_canary=True)
    fleet.hostvars["a"].update(UPDATED)
    assert fleet.prompted == 0
    fleet.call("pause", ["b", "c"], pause_after_canary="yes")
    fleet.call("pause", ["d"], pause_after_canary=True)
    fleet.call("pause", ["b", "c"])
    assert fleet.prompted == 1
    for answer, words in ((AnsiblePromptInterrupt, "Stopped after"), (AnsiblePromptNoninteractive, "nobody is at a")):
        fleet.answer = answer
        assert words in fleet.call("pause", ["b", "c"], pause_after_canary=True)["stop"] and words in fleet.shown
    waited: list[int] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    fleet.call("pause", ["b", "c"], pause_after_canary="900")
    assert waited == [900] and "900 seconds until the next batch" in fleet.shown
    # A canary that failed is no question.
    fleet.hostvars["a"].update(ready={"failed": True, "outcome": "rolled_back"}, returned=None)
    fleet.call("pause", ["b", "c"], pause_after_canary=True)
    assert fleet.prompted == 3


def test_the_word_on_hosts_that_wait_is_renewed_when_half_of_its_time_is_over(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 10_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    for name in "abc":
        fleet.hostvars[name]["look"]["record"] = {"claim": {"run": "me", "seen": now, "lease": 3600}}
    # Its clock is ahead.
    fleet.hostvars["c"]["look"]["record"]["claim"]["seen"] = now + 9999
    args: dict[str, t.Any] = {"begun": now, "decision": "decision", "claims": "claims"}
    now += 1799
    assert fleet.call("pause", ["a"], **args)["renew"] == []
    now += 1
    assert fleet.call("pause", ["a"], **args)["renew"] == ["a", "b", "c"]
    fleet.claims = {"results": [{"item": name, "changed": True} for name in "abc"]}
    decision = fleet.call("batch", ["a"], **args)
    assert decision["renewed"] == now and decision["admitted"] == ["a"]
    fleet.hostvars["a"].update(UPDATED, decision=decision)
    now += 1799
    assert fleet.call("pause", ["b", "c"], **args)["renew"] == []
    fleet.claims = {"results": [], "skipped": True}
    assert fleet.call("batch", ["b", "c"], **args)["renewed"] == now - 1799
    # A pause of hours: whoever came meanwhile goes on, and this run does not.
    now += 9999
    assert fleet.call("pause", ["b", "c"], **args)["renew"] == ["b", "c"]
    fleet.claims = {"results": [{"item": "b"}, {"item": "c", "reason": "upgrade_running", "msg": "Bob is at it."}]}
    found = fleet.call("batch", ["b", "c"], **args)
    assert found["admitted"] == [] and found["stop"] == "after 1 of 4 hosts, because c: Bob is at it"
    assert fleet.call("end", **args)["claimed"] == ["b", "c"]


def test_hosts_that_the_plan_leaves_are_named_so_that_others_can_have_them(fleet: Fleet) -> None:
    for name in "ab":
        fleet.hostvars[name]["look"]["record"] = {"claim": {"run": "me", "seen": 1.0, "lease": 3600}}
    fleet.gateways = gateway(b={"serving": False, "foreign": True})
    fleet.hostvars["c"]["look"]["record"] = {"claim": {}}
    assert fleet.call("plan", gateways="gateways", min_ready=0)["claimed"] == ["b"]


def test_the_run_stops_when_the_budget_is_used_up(fleet: Fleet, tmp_path: pathlib.Path) -> None:
    fleet.hostvars["a"].update(begun=BEGUN, ready={"failed": True, "outcome": "rolled_back", "msg": "Not ready."})
    report = tmp_path / "page.html"
    found = fleet.call("batch", ["b", "c"], report=str(report))
    assert found["admitted"] == [] and found["stop"].startswith("after 1 of 4 hosts, because 1 host failed")
    assert "rolled back" in report.read_text() and "Not ready." in report.read_text()
    # It serves again, so with a budget the others can go.
    assert fleet.call("batch", ["b", "c"], failure_budget=1)["admitted"] == ["b", "c"]


def test_a_host_that_is_lost_counts_and_its_models_are_kept_elsewhere(fleet: Fleet) -> None:
    fleet.hostvars["a"].update(begun=BEGUN, ready={"unreachable": True})
    assert "the budget is 0" in fleet.call("batch", ["b", "c"], alive=["b", "c", "d"])["stop"]
    found = fleet.call("batch", ["b", "c"], alive=["b", "c", "d"], failure_budget=1)
    assert found["admitted"] == ["c"]
    assert found["left"] == {"b": "model llama would have 0 ready replicas and keeps at least 1"}
    assert "b is left for another run: model llama" in fleet.shown


def test_a_host_that_failed_without_a_word_counts(fleet: Fleet) -> None:
    stop = fleet.call("batch", ["b", "c"], alive=["b", "c", "d"])["stop"]
    assert "1 host failed or cannot be reached (a)" in stop


def test_what_happens_beside_the_run_counts_before_each_batch(fleet: Fleet) -> None:
    before = gateway()
    fleet.gateways = gateway(d={"serving": False})
    found = fleet.call("batch", ["a"], gateways="gateways", before=before)
    assert found["admitted"] == ["a"]
    fleet.hostvars["a"].update(UPDATED)
    found = fleet.call("batch", ["b", "c"], gateways="gateways", before=before)
    # d went down by itself, so c is the only one of its model.
    assert found["admitted"] == ["b"]
    assert found["left"] == {"c": "2 of at most 2 hosts are out of service (b, d)"}
    fleet.gateways = gateway(a={"serving": False}, d={"serving": False})
    found = fleet.call("batch", ["b", "c"], gateways="gateways", before=before)
    assert found["admitted"] == []
    fleet.gateways = {"results": [{"item": "gw1", "failed": True, "msg": "No socket."}]}
    found = fleet.call("batch", ["b", "c"], gateways="gateways", before=before)
    assert found["admitted"] == [] and "gateway gw1: No socket." in found["stop"]


def test_requests_meanwhile_are_counted_over_a_reload(fleet: Fleet, tmp_path: pathlib.Path) -> None:
    args = {"gateways": "gateways", "before": gateway(at=100.0, requests=1000), "decision": "decision"}
    for batch, now in (
        ("a", gateway(at=200.0, requests=1300)),
        ("bc", gateway(at=300.0, process="p2", requests=50)),
    ):
        fleet.gateways = now
        decision = fleet.call("batch", list(batch), **args)
        for name in batch:
            fleet.hostvars[name].update(UPDATED, decision=decision)
    fleet.gateways = gateway(at=400.0, process="p2", requests=250)
    page = tmp_path / "page.html"
    found = fleet.call("end", report=str(page), **args)["requests"]
    assert (found["requests"], found["failed"], found["complete"]) == (300 + 50 + 200, 3 + 0 + 2, False)
    assert found["gaps"] == [{"gateway": "gw1", "after": 200.0, "before": 300.0}]
    assert "at least 550, of them 5 failed and 0 broken off" in fleet.shown
    assert "Gateway gw1 was reloaded or restarted between 00:03:20 and 00:05:00 UTC" in fleet.shown
    assert "<td>meta_llama</td><td>550</td><td>5</td>" in page.read_text()
    fleet.gateways = {"results": [{"item": "gw1", "failed": True, "msg": "No socket."}]}
    found = fleet.call("end", **args)["requests"]
    assert found["unknown"] == ["gw1"] and "could not be asked in the end" in fleet.shown
    # Without gateways nobody counts, and nothing is claimed.
    fleet.gateways = {}
    for name in "abc":
        del fleet.hostvars[name]["decision"]
    assert fleet.call("end")["requests"] == {} and "Requests" not in fleet.shown


def test_the_end_tells_what_came_of_every_host(fleet: Fleet) -> None:
    fleet.hostvars["a"].update(UPDATED)
    fleet.hostvars["b"].update(begun={"failed": True, "msg": "Somebody computes."})
    assert fleet.call("end")["outcomes"] == {
        "a": "updated",
        "b": "restored",
        "c": "not begun",
        "d": "not begun",
    }
    assert "b: Somebody computes." in fleet.shown
    fleet.hostvars["b"]["failed"] = {"failed": True, "msg": "It is the last one of llama."}
    missing = fleet.call("end", failure="failed")["missing"]
    assert missing["b"] == "restored: It is the last one of llama. Run again to go on with it."
    assert set(missing) == {"b", "c", "d"} and missing["c"].startswith("not begun: ")
    assert "b: It is the last one of llama." in fleet.shown


def test_a_host_that_went_back_and_is_still_drained_is_out_of_service(fleet: Fleet) -> None:
    fleet.hostvars["a"].update(begun=BEGUN, ready={"failed": True, "outcome": "rolled_back", "msg": "Not ready."})
    fleet.gateways = gateway(a={"state": "enabled"})
    args = {"gateways": "gateways", "before": gateway()}
    assert fleet.call("end", **args)["outcomes"]["a"] == "rolled back"
    fleet.gateways = gateway(a={"serving": False, "state": "drained"})
    found = fleet.call("end", **args)
    assert found["outcomes"]["a"] == "out of service"
    assert "Not ready. It is still drained at gateway gw1. Run again" in found["missing"]["a"]


def test_a_host_that_did_not_get_its_turn_is_told_why(fleet: Fleet) -> None:
    fleet.hostvars["a"].update(UPDATED)
    fleet.hostvars["b"].update(begun={"due": True, "held": "somebody has put this host under maintenance"})
    fleet.hostvars["c"].update(decision={"left": {"c": "2 of at most 2 hosts are out of service"}})
    missing = fleet.call("end", decision="decision")["missing"]
    assert missing == {
        "b": "not begun: somebody has put this host under maintenance. Run again to go on with it.",
        "c": "not begun: 2 of at most 2 hosts are out of service. Run again to go on with it.",
        "d": "not begun: the run ended before its turn. Run again to go on with it.",
    }


def test_what_is_registered_of_an_earlier_run_of_the_same_command_counts_for_nothing(fleet: Fleet) -> None:
    earlier = fleet.call("batch", ["a"], begun=100.0)
    assert earlier["begun"] == 100.0
    for name in "ab":
        fleet.hostvars[name].update(UPDATED, decision=earlier, failed={"failed": True, "msg": "Of old."})
    args = {"begun": 200.0, "decision": "decision", "failure": "failed"}
    fleet.hostvars["a"].update(decision=fleet.call("batch", ["a"], **args))
    found = fleet.call("end", **args)
    assert found["outcomes"] == {"a": "updated", "b": "not begun", "c": "not begun", "d": "not begun"}
    assert found["missing"]["b"].startswith("not begun: the run ended before its turn")


def test_a_host_that_could_not_be_reached_at_all_is_not_passed_over_in_silence(fleet: Fleet) -> None:
    fleet.hostvars["d"]["look"] = {"unreachable": True}
    fleet.hostvars["c"]["driver_upgrade_skip"] = True
    for name in "ab":
        fleet.hostvars[name].update(UPDATED)
    assert fleet.call("end")["missing"] == {"d": "left: it cannot be reached. Run again to go on with it."}
    assert "c was left: driver_upgrade_skip is true." in fleet.shown
    assert "d was left: it cannot be reached." in fleet.shown


# -- the module's own plugin ----------------------------------------------------------------------


class Calls:
    """Calls of the module, scripted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: dict[str, t.Any]) -> None:
        self.made: list[dict[str, t.Any]] = []
        queue = list(answers)

        def call(_self: t.Any, args: dict[str, t.Any], _vars: t.Any, _wrap: bool = False) -> dict[str, t.Any]:
            self.made.append(args)
            return queue.pop(0)

        options = {
            "nvidia_driver": {"branch": "580"},
            "nim_service": {"models": [{"name": "llama", "secret_environment": {"T": "x"}}], "gpu_injection": "cdi"},
        }
        monkeypatch.setattr(ProgressActionBase, "_call", call)
        monkeypatch.setattr(
            driver_upgrade,
            "role_options",
            lambda _templar, _vars, names: {name: options[name] for name in names},
        )
        self.action = driver_upgrade.ActionModule.__new__(driver_upgrade.ActionModule)
        self.action._templar = None


def test_the_module_gets_the_roles_variables_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, {"changed": True})
    assert calls.action._call({"state": "ready"}, {}) == {"changed": True}
    assert calls.made == [
        {
            "state": "ready",
            "run": this_run(),
            "nvidia_driver": {"branch": "580"},
            "gpu_injection": "cdi",
            "models": [{"name": "llama"}],
        }
    ]


def test_what_the_task_says_goes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, {})
    calls.action._call({"nvidia_driver": {"branch": "595"}, "run": "me", "gpu_injection": "gpus"}, {})
    assert (calls.made[0]["nvidia_driver"], calls.made[0]["run"]) == ({"branch": "595"}, "me")
    assert calls.made[0]["gpu_injection"] == "gpus"


def test_a_run_of_this_controller_that_is_gone_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = "alice on %s (process %d)" % (platform.node(), 2**22 + 1)
    refused = {"failed": True, "reason": "upgrade_running", "claim": {"run": gone}}
    calls = Calls(monkeypatch, refused, {"changed": True})
    assert calls.action._call({"state": "ready"}, {}) == {"changed": True}
    assert [made.get("take_over") for made in calls.made] == [None, True]


def test_a_run_that_may_be_alive_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for run in ("alice on %s (process %d)" % (platform.node(), os.getpid()), "alice on elsewhere (process 1)", ""):
        refused = {"failed": True, "reason": "upgrade_running", "claim": {"run": run}}
        calls = Calls(monkeypatch, refused)
        assert calls.action._call({"state": "ready"}, {}) == refused


def test_a_host_that_gets_lost_fails_so_that_it_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_args: t.Any) -> t.Any:
        raise AnsibleConnectionFailure("Connection timed out.")

    monkeypatch.setattr(ProgressActionBase, "run", lose)
    action = driver_upgrade.ActionModule.__new__(driver_upgrade.ActionModule)
    action._task = types.SimpleNamespace(args={"state": "ready"})
    found = action.run()
    assert found["failed"] and found["lost"] and "Connection timed out" in found["msg"] and "unreachable" not in found
    # A look tells it as Ansible does.
    action._task.args["state"] = "prestaged"
    with pytest.raises(AnsibleConnectionFailure):
        action.run()


def test_a_deployment_gets_all_that_the_services_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    service = {"models": [{"name": "llama", "secret_environment": {"HF_TOKEN": "hf_x"}}], "ngc_api_key": "nvapi-x"}
    options: dict[str, t.Any] = {"nim_service": service}
    made: list[dict[str, t.Any]] = []
    monkeypatch.setattr(
        ProgressActionBase,
        "_call",
        lambda _self, args, _vars, wrap_async=False: made.append(args) or {"changed": False},
    )
    monkeypatch.setattr(nim_deploy, "role_options", lambda _templar, _vars, names: options)
    action = nim_deploy.ActionModule.__new__(nim_deploy.ActionModule)
    action._templar = None
    action._call({"state": "ready"}, {})
    # What the task says goes before, and a host without models has none.
    action._call({"state": "ready", "nim_service": {"models": []}}, {})
    options.clear()
    action._call({"state": "prestaged"}, {})
    assert made == [
        {"state": "ready", "run": this_run(), "nim_service": service},
        {"state": "ready", "run": this_run(), "nim_service": {"models": []}},
        {"state": "prestaged", "run": this_run(), "nim_service": {"models": []}},
    ]
