# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A fleet behind a gateway that is changed while clients keep asking: what the scenario, the table of faults and the benchmark share."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from control import World
from fleet_sandbox.inventory import full_name
from fleet_testing import CHECKOUT, SANDBOX, Fleet, Host, Json, Run, read_inventory, sandbox, wait_until
from load import Load
from upgrade_faults import HOSTS, STEPS, Fault, Order

MODELS = ("meta/llama-3.1-8b-instruct", "meta/llama-3.1-70b-instruct")
PORT = 8080
#: In the sandbox every host is among the GPU hosts.
TARGET = "gpu_hosts:!nim_gateways"
RECORDS = {
    "upgrade_drivers": "/var/lib/gpu_fleet/driver-upgrade.json",
    "deploy": "/var/lib/gpu_fleet/nim-deploy.json",
}
#: Bits of HAProxy's administrative state of a server: somebody has put it under maintenance, or drains it.
_TAKEN_OUT = 0x01 | 0x08
_STATES = (
    "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/haproxy/admin.sock'); "
    "s.sendall(b'show servers state\\n'); print(s.makefile().read())"
)


def inventory(scenario: str, gateways: int = 1, **variables: Any) -> Json:
    """The inventory of scenario ``upgrade`` for hosts of another one.

    Args:
        variables: Of the GPU hosts.
    """
    found = read_inventory(CHECKOUT / "molecule/upgrade/inventory.yml")

    def renamed(hosts: Json) -> Json:
        return {full_name(scenario, name.removeprefix("upgrade-")): values for name, values in hosts.items()}

    group = found["gpu_hosts"]
    names = ["gw%02d" % number for number in range(1, gateways + 1)]
    return {
        "gpu_hosts": {"hosts": renamed(group["hosts"]), "vars": {**group["vars"], **variables}},
        "nim_gateways": {"hosts": {full_name(scenario, name): {"sandbox_gpus": "none"} for name in names}},
    }


def make(
    scenario: str, gateways: int = 1, *, model_environment: Mapping[str, str] | None = None, **variables: Any
) -> UpgradeFleet:
    """Bare hosts, set up and serving behind the gateways.

    Args:
        model_environment: For every model.
    """
    found = inventory(scenario, gateways, **variables)
    for host in found["gpu_hosts"]["hosts"].values():
        for model in host["nim_models"]:
            model["environment"] = dict(model_environment or {})
    own = found["gpu_hosts"]["vars"]
    sandbox("remove", "--scenario", scenario)
    kind = ["--scenario", scenario, "--image", own["sandbox_image"]]
    sandbox("add", *HOSTS, *kind, "--gpus", own["sandbox_gpus"])
    sandbox("add", *["gw%02d" % number for number in range(1, gateways + 1)], *kind, "--gpus", "none")
    fleet = Fleet(scenario, found)
    fleet.site()
    made = UpgradeFleet(fleet)
    for gateway in made.gateways:
        made.wait_answering(gateway)
    return made


def taken_out(text: str, names: Mapping[str, str]) -> set[str]:
    """Who gets no requests because somebody wants it so, by HAProxy's own list of its servers.

    Args:
        text: Answer to ``show servers state``.
        names: Host as the gateway has it -> name that is returned.
    """
    found = set()
    for row in (line.split() for line in text.splitlines()):
        # be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state ...
        host = row[3].partition(":")[0] if len(row) > 6 else ""
        if host in names and row[6].isdigit() and int(row[6]) & _TAKEN_OUT:
            found.add(names[host])
    return found


class UpgradeFleet:
    """Four GPU hosts and one or two gateways; clients ask the first one where nothing else is said."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.hosts = {name: fleet.host(name) for name in HOSTS}
        beginning = full_name(fleet.scenario, "gw")
        self.gateways = [host for name, host in sorted(fleet.hosts.items()) if name.startswith(beginning)]
        self.gateway = self.gateways[0]
        self.world = World(SANDBOX)

    # -- what is

    def driver(self, name: str) -> str:
        """Version of the module in a host's memory; empty for none."""
        return self.hosts[name].run("cat /sys/module/nvidia/version 2>/dev/null", check=False).strip()

    def branches(self) -> dict[str, str]:
        return {name: self.driver(name).partition(".")[0] for name in HOSTS}

    def record(self, name: str, playbook: str = "upgrade_drivers") -> Json:
        """What a host has on record; empty for nothing, and for a host that cannot be asked."""
        text = self.hosts[name].run("cat %s 2>/dev/null" % RECORDS[playbook], check=False)
        found: Json = json.loads(text) if text.strip() else {}
        return found

    def forget(self) -> None:
        """No host has anything on record; for hosts that serve."""
        for host in self.hosts.values():
            host.run("rm -f %s" % " ".join(RECORDS.values()))

    def reached(self, name: str, step: str, target: str = "") -> bool:
        """Whether a host is in the middle of an upgrade and has this step, or a later one, on record."""
        record = self.record(name)
        if target and target not in record.get("target", ""):
            return False
        at = record.get("step", "")
        return at in STEPS and STEPS.index(at) >= STEPS.index(step)

    def out(self) -> set[str]:
        """Hosts that get no requests from a gateway because somebody has taken them out; a gateway that is gone does not count."""
        names = {host.name: name for name, host in self.hosts.items()}
        asked = [gateway for gateway in self.gateways if gateway is self.gateway or gateway.succeeds("true")]
        return set().union(*(taken_out(gateway.run('python3 -c "%s"' % _STATES), names) for gateway in asked))

    def identities(self) -> Json:
        return {name: host.identity() for name, host in self.hosts.items()}

    # -- what is done

    def options(self, playbook: str, branch: str = "", **variables: Any) -> list[str]:
        prefix = {"upgrade_drivers": "driver_upgrade", "deploy": "nim_deploy"}[playbook]
        given: Json = {
            "target": TARGET,
            prefix + "_max_unavailable": 2,
            prefix + "_progress_interval": 1,
            "drain_timeout": 120,
            **({"nvidia_driver_branch": branch} if branch else {}),
            **variables,
        }
        return ["-e", json.dumps(given)]

    def roll(self, branch: str = "", *more: str, playbook: str = "upgrade_drivers", **how: Any) -> Run:
        """Run a playbook to its end.

        Args:
            branch: Of the driver that is wanted; the inventory's when empty.
            how: ``variables``, and what :meth:`Fleet.play` takes; ``succeeds=None`` for any end.
        """
        options = self.options(playbook, branch, **how.pop("variables", {}))
        if how.get("succeeds", True) is None:
            del how["succeeds"]
            return self.fleet.attempt(playbook, *options, *more, **how)
        return self.fleet.play(playbook, *options, *more, **how)

    def load(self, gateway: Host | None = None, **how: Any) -> Load:
        """Clients of both models, at the first gateway or another one; streams take two seconds."""
        return Load("http://%s:%d" % ((gateway or self.gateway).address, PORT), MODELS, **how)

    def wait_answering(self, gateway: Host) -> None:
        """A gateway gives nothing to a server that it has not checked yet."""
        wait_until(
            lambda: all(gateway.complete(PORT, model)[0] == 200 for model in MODELS), "%s answers" % gateway.name
        )

    def order(self, order: Order) -> None:
        if order.where == "world":
            positional = [option for option in order.options if not isinstance(option, dict)]
            named = next((option for option in order.options if isinstance(option, dict)), {})
            getattr(self.world, order.what)(*positional, **named)
        elif order.where == "sandbox":
            name, *rest = order.options
            sandbox(order.what, full_name(self.fleet.scenario, name), *rest)
        else:
            self.fleet.host(order.where).run(order.what)

    def wait_reachable(self, seconds: float = 120) -> None:
        """Every host and gateway can be reached."""
        hosts = self.fleet.hosts.values()
        wait_until(lambda: all(host.succeeds("true") for host in hosts), "all hosts can be reached", seconds)

    def wait_serving(self, seconds: float = 120) -> None:
        """Every host can be reached, and its model is ready."""
        self.wait_reachable(seconds)
        wait_until(lambda: all(host.ready(8000) for host in self.hosts.values()), "all models are ready", seconds)

    @contextlib.contextmanager
    def background(self, run: Callable[[], Run]) -> Iterator[concurrent.futures.Future[Run]]:
        """A run in a thread of its own; it is waited for."""
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
            yield pool.submit(run)

    # -- a line of the table

    def play(self, fault: Fault, branch: str, changed: Json) -> tuple[Run, Run | None]:
        """Run with a fault that was prepared: what the run said, and the second one where there is one.

        Args:
            branch: That is wanted.
            changed: Inventory with the models that ``deploy`` wants.
        """
        how: Json = {"playbook": fault.playbook, "succeeds": None, "variables": fault.variables}
        if fault.playbook == "deploy":
            how["inventory"] = changed
        target = "" if fault.playbook == "deploy" else branch
        second = None
        with self.background(lambda: self.roll(target, **how)) as running:
            if fault.moment[0]:
                name, step = fault.moment
                wait_until(
                    lambda: running.done() or self.reached(name, step), "%s has reached %s" % (name, step), 300, 0.1
                )
                assert not running.done(), (
                    "the run was over before the event: nothing was proven\n" + running.result().output
                )
                self.give(fault.during)
                if fault.second:
                    second = self.roll(target, **how, label="-second")
            run = running.result()
        return run, second

    def give(self, orders: Iterable[Order]) -> None:
        for order in orders:
            self.order(order)
