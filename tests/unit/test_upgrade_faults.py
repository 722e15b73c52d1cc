# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of what goes wrong in an upgrade has everything that was asked for, and says of each what must come of it."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _driver_upgrade_record
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout_record import RECORDS

SANDBOX = pathlib.Path(__file__).resolve().parents[1] / "sandbox"
sys.path[:0] = [str(SANDBOX), str(SANDBOX / "world")]

import control  # noqa: E402  # after the path is set
import upgrade_faults  # noqa: E402  # as above
from upgrade_faults import FAULTS, GONE, HOSTS, NOTHING_BEGUN, STRANDED, Fault, Order, directed  # noqa: E402  # as above

#: What was asked for, beside a controller that dies at every step.
DEMANDS = {
    "package broken in the repository",
    "download interrupted",
    "DKMS build fails",
    "module in use by a foreign process",
    "module will not load",
    "version mismatch after load",
    "NIM not ready on the new driver",
    "host unreachable after drain",
    "host never returns from reboot",
    "gateway reloaded mid-run",
    "gateway unreachable when undraining",
    "registry down",
    "last replica",
    "operator-drained host",
    "two runs at once",
    "disk full while unpacking",
}
OUTCOMES = {"", "updated", "restored", "rolled_back", "stranded", "gone"}


def orders(fault: Fault) -> list[Order]:
    return [*fault.prepare, *fault.during, *fault.mend]


def test_every_fault_that_was_asked_for_is_in_the_table_and_no_other() -> None:
    assert {fault.demand for fault in FAULTS} == DEMANDS
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)


def test_the_controller_dies_at_every_step_of_the_state_machine() -> None:
    assert upgrade_faults.KILLED_AT == _driver_upgrade_record.STEPS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
class TestFault:
    """Each line for itself."""

    def test_it_says_what_must_come_of_it(self, fault: Fault) -> None:
        assert fault.expected.endswith(".") and fault.says
        for pattern in (*fault.says, fault.second):
            re.compile(pattern)
        assert set(fault.ends) <= set(HOSTS) and len(fault.ends) >= 3
        assert {outcome for _branch, outcome in fault.ends.values()} <= OUTCOMES
        # Whoever is stranded or gone gets no requests, and whoever gets none is one of them or was drained by somebody else.
        outside = {host for host, end in fault.ends.items() if end in (STRANDED, GONE)}
        assert outside <= set(fault.out) and (set(fault.out) == outside or fault.name == "operator_drained")
        # A run that ends well leaves nothing to a second one, and one that has not begun has nothing to go on with.
        assert fault.again is not (fault.succeeds or NOTHING_BEGUN in fault.says)

    def test_it_happens_and_is_mended(self, fault: Fault) -> None:
        assert fault.prepare or fault.during or fault.variables or fault.second
        assert bool(fault.moment[0]) is bool(fault.during or fault.second)
        assert fault.moment[0] in ("", *HOSTS) and fault.moment[1] in ("", *upgrade_faults.STEPS)
        # What is done to a host or the world is undone, in the same place. What is only an event needs nothing.
        events = {"apt-get clean", "systemctl reload haproxy"}
        done = {_place(order) for order in (*fault.prepare, *fault.during) if order.what not in events}
        assert done <= {_place(order) for order in fault.mend}

    def test_its_orders_can_be_given(self, fault: Fault) -> None:
        for order in orders(fault):
            if order.where == "world":
                assert callable(getattr(control.World, order.what))
            elif order.where == "sandbox":
                assert order.what in ("pause", "start", "stop", "exec")
                assert order.options[0] in (*HOSTS, "gw01", "gw02")
            else:
                assert order.where in (*HOSTS, "gw01", "gw02") and not order.options
                done = subprocess.run(["/bin/sh", "-n", "-c", order.what], capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
                for program in re.findall(r"python3 -c (?:'([^']*)'|\"([^\"]*)\")", order.what):
                    ast.parse(program[0] or program[1])


def _place(order: Order) -> str:
    return order.options[0] if order.where == "sandbox" else order.where


def test_faults_of_the_world_are_what_its_controls_take(tmp_path: pathlib.Path) -> None:
    world = control.World(tmp_path)
    for fault in FAULTS:
        for order in orders(fault):
            if order.where == "world":
                positional = [option for option in order.options if not isinstance(option, dict)]
                named = [option for option in order.options if isinstance(option, dict)]
                getattr(world, order.what)(*positional, **(named[0] if named else {}))


def test_a_line_is_the_same_in_both_directions() -> None:
    there, back = ([directed(fault, *pair) for fault in FAULTS] for pair in (("570", "580"), ("580", "570")))
    for forth, home, plain in zip(there, back, FAULTS):
        assert "OLD" not in repr(forth) and "NEW" not in repr(forth)
        assert directed(plain, "OLD", "NEW") == plain
        swapped = repr(forth).replace("580", "5x0").replace("570", "580").replace("5x0", "570")
        assert plain.towards or swapped == repr(home)


def test_the_broken_package_is_one_that_the_upgrade_fetches() -> None:
    (fault,) = [fault for fault in FAULTS if fault.name == "broken_package"]
    fault = directed(fault, "570", "580")
    (pattern,) = [order.options[1]["path"] for order in fault.prepare if order.where == "world"]
    base = "/compute/cuda/repos/ubuntu2404/x86_64/./"
    assert re.search(pattern, base + "nvidia-dkms-580-open_580.95.05-0ubuntu1_amd64.deb")
    assert re.search(pattern, base + "nvidia-kernel-open-dkms_580.95.05-1_amd64.deb")
    assert not re.search(pattern, base + "nvidia-dkms-570-open_570.124.06-0ubuntu1_amd64.deb")


def test_what_the_second_run_reads_is_what_the_product_says() -> None:
    (fault,) = [fault for fault in FAULTS if fault.second]
    work = next(work for path, work in RECORDS.items() if "driver" in path)
    said = "ann on c1 (process 7) is at %s on this host, last seen 3 seconds ago" % work
    assert re.search(fault.second, said)
