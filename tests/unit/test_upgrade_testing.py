# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests of an upgrade know of their fleet, without a fleet."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile
import threading
import types
from typing import Any

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_settings import Server
from gateway_world import HAPROXY, Gateway

SANDBOX = pathlib.Path(__file__).resolve().parents[1] / "sandbox"
sys.path[:0] = [str(SANDBOX), str(SANDBOX / "world")]

import upgrade_testing  # noqa: E402  # after the path is set
from fleet_testing import Run  # noqa: E402  # as above
from upgrade_faults import FAULTS, HOSTS, Fault, Order  # noqa: E402  # as above
from upgrade_testing import UpgradeFleet, inventory, taken_out  # noqa: E402  # as above

#: As HAProxy 3.0 prints it, shortened at the end of the lines.
STATES = """\
1
# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight
3 llama 1 s-gpu01:llama 172.30.2.1 2 8 1 1
3 llama 2 s-gpu02:llama 172.30.2.2 0 0 1 1
4 large 1 s-gpu03:large 172.30.2.3 0 9 1 1
4 large 2 s-gpu04:large 172.30.2.4 0 32 1 1

"""


def test_who_was_taken_out_is_told_from_who_is_down() -> None:
    names = {"s-%s" % name: name for name in HOSTS}
    assert taken_out(STATES, names) == {"gpu01", "gpu03"}
    assert taken_out("", names) == set()


def test_every_gateway_that_can_be_reached_says_who_was_taken_out() -> None:
    class Answers(types.SimpleNamespace):
        def succeeds(self, _command: str) -> bool:
            return bool(self.text)

        def run(self, _command: str) -> str:
            return str(self.text)

    class Hosts(dict[str, Any]):
        scenario = "s"

        def host(self, name: str) -> Any:
            return self["s-" + name]

    fleet = Hosts({"s-%s" % name: types.SimpleNamespace(name="s-%s" % name) for name in HOSTS})
    fleet.update({"s-gw02": Answers(text=STATES), "s-gw01": Answers(text=STATES.replace("0 9 1 1", "0 0 1 1"))})
    fleet.hosts = fleet  # type: ignore[attr-defined]  # it is both
    made = UpgradeFleet(fleet)  # type: ignore[arg-type]  # so much of it as is asked
    assert made.gateway is fleet["s-gw01"] and made.gateways == [fleet["s-gw01"], fleet["s-gw02"]]
    assert made.out() == {"gpu01", "gpu03"}
    fleet["s-gw02"].text = ""
    assert made.out() == {"gpu01"}


def test_the_inventory_of_another_scenario_is_that_of_the_scenario() -> None:
    own, other = inventory("upgrade"), inventory("upgrade-faults", 2, nvidia_driver_branch="535")
    assert list(own["gpu_hosts"]["hosts"]) == ["upgrade-" + name for name in HOSTS]
    assert list(other["gpu_hosts"]["hosts"]) == ["upgrade-faults-" + name for name in HOSTS]
    assert list(other["nim_gateways"]["hosts"]) == ["upgrade-faults-gw01", "upgrade-faults-gw02"]
    assert other["gpu_hosts"]["vars"] == {**own["gpu_hosts"]["vars"], "nvidia_driver_branch": "535"}
    models = [hosts["nim_models"][0]["name"] for hosts in other["gpu_hosts"]["hosts"].values()]
    assert models == ["llama", "llama", "large", "large"]
    # The clients ask for them by their names.
    images = [hosts["nim_models"][0]["image"] for hosts in other["gpu_hosts"]["hosts"].values()]
    assert all(model in image for model, image in zip(upgrade_testing.MODELS, images[::2]))


class Double(UpgradeFleet):
    """A fleet that only writes down what is asked of it.

    Args:
        steps: What gpu01 has on record, one look after the other.
        over: Whether the run ends at once; otherwise it ends after the event.
    """

    def __init__(self, steps: list[str], over: bool = False) -> None:
        self.steps = steps
        self.asked: list[Any] = []
        self.end = threading.Event()
        if over:
            self.end.set()

    def record(self, name: str, playbook: str = "upgrade_drivers") -> Any:
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        return {"step": step} if step else {}

    def order(self, order: Order) -> None:
        self.asked.append(order)
        self.end.set()

    def roll(self, branch: str = "", *more: str, playbook: str = "upgrade_drivers", **how: Any) -> Run:
        self.asked.append((playbook, branch, how))
        if how.get("label"):
            self.end.set()
            return Run(2, "refused", 0, [])
        assert self.end.wait(30)
        return Run(0, "done", 0, [])


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.moment[0]], ids=lambda fault: fault.name)
def test_a_fault_comes_at_its_moment_and_while_the_run_goes_on(fault: Fault) -> None:
    fleet = Double(["", "planned", fault.moment[1]])
    run, second = fleet.play(fault, "580", {})
    assert run.output == "done" and [order for order in fleet.asked if isinstance(order, Order)] == list(fault.during)
    assert (second is not None) is bool(fault.second)
    (playbook, branch, how), *others = [one for one in fleet.asked if not isinstance(one, Order)]
    assert (playbook, branch, how["variables"]) == (fault.playbook, "580", fault.variables)
    assert [other[2]["label"] for other in others] == (["-second"] if fault.second else [])


def test_an_event_that_comes_too_late_proves_nothing() -> None:
    fleet = Double(["planned"], over=True)
    (fault,) = [fault for fault in FAULTS if fault.name == "disk_full"]
    with pytest.raises(AssertionError, match="nothing was proven"):
        fleet.play(fault, "580", {})


def test_steps_that_are_on_record() -> None:
    fleet = Double(["unloaded"])
    assert fleet.reached("gpu01", "drained") and fleet.reached("gpu01", "unloaded")
    assert not fleet.reached("gpu01", "loaded") and not Double([""]).reached("gpu01", "planned")


def test_options_of_both_playbooks() -> None:
    fleet = Double([""])
    assert "driver_upgrade_max_unavailable" in fleet.options("upgrade_drivers", "580")[1]
    given = fleet.options("deploy", nim_deploy_max_unavailable=1)[1]
    assert '"nim_deploy_max_unavailable": 1' in given and "nvidia_driver_branch" not in given


@pytest.mark.skipif(HAPROXY is None, reason="needs haproxy; `make unit` installs it")
def test_what_is_asked_of_a_gateway_is_understood_by_a_real_one() -> None:
    names = {"upgrade-faults-%s" % name: name for name in HOSTS}
    servers = [Server(host, "llama", "127.0.0.1", 9, ("meta/llama",)) for host in names]
    (fault,) = [fault for fault in FAULTS if fault.name == "operator_drained"]
    with tempfile.TemporaryDirectory(prefix="gw") as folder:
        gateway = Gateway(pathlib.Path(folder), servers)

        def run(command: str) -> str:
            command = command.replace("/run/haproxy/admin.sock", gateway.layout.socket)
            done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=30, check=True)
            return done.stdout

        try:
            (drain,), (enable,) = fault.prepare, fault.mend
            run(drain.what)
            # A drained server that is down too is told from one that is only down.
            gateway.wait_for("upgrade-faults-gpu04:llama", "DOWN")
            gateway.wait_for("upgrade-faults-gpu01:llama", "DOWN")
            states = 'python3 -c "%s"' % upgrade_testing._STATES
            assert taken_out(run(states), names) == {"gpu04"}
            run(enable.what)
            assert taken_out(run(states), names) == set()
        finally:
            gateway.close()
