# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The controller's side of the driver upgrade, with everything of Ansible around it replaced."""

from __future__ import annotations

import os
import pathlib
import platform
import types
import typing as t

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.gpu_fleet.nim.plugins.action import driver_upgrade, fleet_rollout
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._progress import ProgressActionBase
from test_rollout_looks import BEGUN, look

RESULTS = ["returned", "restored", "ready", "begun"]
UPGRADED = {"returned": {"outcome": "upgraded"}, "ready": {"outcome": "", "due": True}, "begun": BEGUN}


class Fleet:
    """A play with hosts, what was registered on them, and a task of fleet_rollout."""

    def __init__(self, looks: dict[str, t.Any]) -> None:
        self.hostvars: dict[str, dict[str, t.Any]] = {name: {"look": answer} for name, answer in looks.items()}
        self.shown = ""
        self.groups: dict[str, list[str]] = {}

    def call(
        self, phase: str, batch: t.Sequence[str] = (), alive: t.Sequence[str] | None = None, **args: t.Any
    ) -> dict[str, t.Any]:
        lines: list[str] = []
        check_mode = args.pop("check_mode", False)
        action = fleet_rollout.ActionModule.__new__(fleet_rollout.ActionModule)
        action._display = types.SimpleNamespace(display=lines.append)
        action._supports_async = False
        args = {"phase": phase, "variable": "look", "results": RESULTS, "max_unavailable": 2, **args}
        action._task = types.SimpleNamespace(args=args, check_mode=check_mode, async_val=0, diff=False)
        action._templar = None
        action._connection = types.SimpleNamespace(_shell=types.SimpleNamespace(tmpdir="unused"))
        variables = {
            "hostvars": self.hostvars,
            "groups": self.groups,
            "ansible_play_hosts_all": list(self.hostvars),
            "ansible_play_hosts": list(self.hostvars) if alive is None else list(alive),
            "ansible_play_batch": list(batch),
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
    assert plan["order"] == ["a", "b", "c", "d"] and plan["serial"] == [1, 2, 1] and plan["fleet"] == list("abcd")
    assert "Batch 1 (canary): a." in fleet.shown and "Steps on" not in fleet.shown
    assert "Driver upgrade" in report.read_text() and '"serial"' not in output.read_text()
    assert '"batches"' in output.read_text()


def test_check_mode_tells_the_steps_and_writes_no_file(fleet: Fleet, tmp_path: pathlib.Path) -> None:
    fleet.call("plan", check_mode=True, report=str(tmp_path / "x"), output=str(tmp_path / "y"))
    assert "Steps on a, b, c, d:" in fleet.shown and list(tmp_path.iterdir()) == []


def test_a_refused_host_ends_the_run_before_it_begins(fleet: Fleet) -> None:
    fleet.hostvars["c"]["look"] = {"failed": True, "msg": "No room.", "reason": "disk_full"}
    with pytest.raises(AnsibleActionFail, match="c cannot be upgraded, so nothing was begun"):
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
    assert plan["serial"] == [1, 1]


def test_canaries_by_group_and_by_name(fleet: Fleet) -> None:
    fleet.groups = {"canaries": ["d"]}
    assert fleet.call("plan", canary=["canaries"])["batches"][0]["hosts"] == ["d"]
    assert fleet.call("plan", canary=["b"])["batches"][0]["hosts"] == ["b"]


def test_gateways_say_who_was_drained_by_others_and_who_cannot_be_asked(fleet: Fleet) -> None:
    fleet.hostvars["a"]["gateways"] = {"results": [{"item": "gw1", "reason": "foreign_drain"}]}
    plan = fleet.call("plan", gateways="gateways")
    assert plan["left"]["a"] == "somebody else has drained it at a gateway" and "a" not in plan["order"]
    fleet.hostvars["b"]["gateways"] = {"results": [{"item": "gw1", "failed": True, "msg": "No socket."}]}
    with pytest.raises(AnsibleActionFail, match="b cannot be upgraded"):
        fleet.call("plan", gateways="gateways")
    assert "gateway gw1: No socket." in fleet.shown


@pytest.mark.parametrize(
    "args, words",
    [
        ({"max_unavailable": "lots"}, "driver_upgrade_max_unavailable = 'lots'"),
        ({"failure_budget": "-1"}, "driver_upgrade_failure_budget = '-1'"),
        ({"min_ready_of": {"llama": "two"}}, "driver_upgrade_min_ready_of = "),
    ],
)
def test_bad_limits_are_named_as_the_operator_gave_them(fleet: Fleet, args: dict[str, t.Any], words: str) -> None:
    with pytest.raises(AnsibleActionFail) as caught:
        fleet.call("plan", **args)
    assert words in str(caught.value)


# -- the gate -------------------------------------------------------------------------------------


def test_a_batch_goes_when_those_before_went_well(fleet: Fleet) -> None:
    first = fleet.call("batch", ["a"])
    assert first["admitted"] == ["a"] and first["number"] == 1 and not first["first_after_canary"]
    fleet.hostvars["a"].update(UPGRADED)
    second = fleet.call("batch", ["b", "c"])
    assert second["admitted"] == ["b", "c"] and second["first_after_canary"] and second["left"] == {}
    for name in ("b", "c"):
        fleet.hostvars[name].update(UPGRADED)
    assert not fleet.call("batch", ["d"])["first_after_canary"]


def test_the_run_stops_when_the_budget_is_used_up(fleet: Fleet, tmp_path: pathlib.Path) -> None:
    fleet.hostvars["a"].update(begun=BEGUN, ready={"failed": True, "outcome": "rolled_back", "msg": "Not ready."})
    report = tmp_path / "page.html"
    with pytest.raises(AnsibleActionFail, match="stops here, 1 of 4 hosts had their turn: 1 host failed"):
        fleet.call("batch", ["b", "c"], report=str(report))
    assert "rolled back" in report.read_text() and "Not ready." in report.read_text()
    # It serves again, so with a budget the others can go.
    assert fleet.call("batch", ["b", "c"], failure_budget=1)["admitted"] == ["b", "c"]


def test_a_host_that_is_lost_counts_and_its_models_are_kept_elsewhere(fleet: Fleet) -> None:
    fleet.hostvars["a"].update(begun=BEGUN, ready={"unreachable": True})
    with pytest.raises(AnsibleActionFail, match="the budget is 0"):
        fleet.call("batch", ["b", "c"], alive=["b", "c", "d"])
    found = fleet.call("batch", ["b", "c"], alive=["b", "c", "d"], failure_budget=1)
    assert found["admitted"] == ["c"]
    assert found["left"] == {"b": "model llama would have 0 ready replicas and keeps at least 1"}
    assert "b is left for another run: model llama" in fleet.shown


def test_a_host_that_failed_without_a_word_counts(fleet: Fleet) -> None:
    with pytest.raises(AnsibleActionFail, match="1 host failed or cannot be reached \\(a\\)"):
        fleet.call("batch", ["b", "c"], alive=["b", "c", "d"])


def test_the_end_tells_what_came_of_every_host(fleet: Fleet) -> None:
    fleet.hostvars["a"].update(UPGRADED)
    fleet.hostvars["b"].update(begun={"failed": True, "msg": "Somebody computes."})
    assert fleet.call("end")["outcomes"] == {
        "a": "upgraded",
        "b": "restored",
        "c": "not begun",
        "d": "not begun",
    }
    assert "b: Somebody computes." in fleet.shown
    with pytest.raises(AnsibleActionFail, match="Not upgraded: b, c, d"):
        fleet.call("end", fail_on_failure=True)


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
            "run": driver_upgrade.this_run(),
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
