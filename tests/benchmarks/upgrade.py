# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How much longer does a roll take than it must: four hosts that serve get another driver, batch by batch, under load.

The floor of a roll is the sum over its batches of what the slowest host of each has to go through: requests that end, services that
stop, the driver that is swapped and loaded, services that start until they are ready. It is taken from what the hosts have on record
of the same roll, so it is what cannot be saved by a quicker controller. Exit status 1 when a request was lost or the target is missed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
OUTPUT = CHECKOUT / ".build" / "bench"
SCENARIO = "bench-upgrade"
#: Wall time of a roll by its floor, at most.
TARGET = 1.2
#: Steps on record that are the host's own work while it is out.
WORK = (
    "workloads_stopped",
    "clients_stopped",
    "unloaded",
    "packages_changed",
    "loaded",
    "validated",
    "workloads_started",
    "ready",
)

sys.path[:0] = [str(CHECKOUT / "tests/sandbox"), str(CHECKOUT / "tests/sandbox/world")]

Json = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What one host had to go through, in seconds.

    Attributes:
        drain: Until its requests had ended.
        work: From the stop of its services until they were ready again.
    """

    host: str
    began: float
    drain: float
    work: float

    @property
    def floor(self) -> float:
        return self.drain + self.work


def turn_of(host: str, record: Mapping[str, Any], longest: float) -> Turn:
    """The turn of a host by its record.

    Args:
        longest: Seconds of the longest request of the clients: no drain has to take longer than that.

    Raises:
        ValueError: The record is not that of a whole turn.
    """
    steps = {entry["step"]: entry for entry in record.get("steps") or []}
    missing = [step for step in ("drained", *WORK) if step not in steps]
    if missing:
        raise ValueError("%s has no %s on record" % (host, ", ".join(missing)))
    drained, stopped = steps["drained"], steps["workloads_stopped"]
    gap = max(0.0, stopped["at"] - drained["at"] - drained["seconds"])
    return Turn(host, drained["at"], min(gap, longest), sum(steps[step]["seconds"] for step in WORK))


@dataclass(frozen=True)
class Roll:
    """One roll, in seconds.

    Attributes:
        before: From the start of the playbook to the first drain: looks, checks, downloads.
        wall: From there to the end of the playbook.
        floor: What ``wall`` cannot be less than.
    """

    name: str
    before: float
    wall: float
    floor: float
    batches: tuple[tuple[str, ...], ...]
    requests: Json

    @property
    def ratio(self) -> float:
        return self.wall / self.floor if self.floor else float("inf")

    @property
    def lost(self) -> int:
        return sum(self.requests[kind][how] for kind in ("plain", "streamed") for how in ("failed", "truncated"))

    @property
    def passed(self) -> bool:
        return self.ratio <= TARGET and not self.lost

    def line(self) -> str:
        asked = self.requests["plain"]["asked"] + self.requests["streamed"]["asked"]
        return (
            "%-12s %d batches  wall %7.1f s  floor %7.1f s  %5.2f <= %.1f  lost %d of %d requests  (before: %.1f s)  %s"
            % (
                self.name,
                len(self.batches),
                self.wall,
                self.floor,
                self.ratio,
                TARGET,
                self.lost,
                asked,
                self.before,
                "pass" if self.passed else "MISS",
            )
        )

    def as_dict(self) -> Json:
        return dict(asdict(self), ratio=self.ratio, lost=self.lost, passed=self.passed)


def measured(
    name: str,
    began: float,
    ended: float,
    batches: Sequence[Sequence[str]],
    records: Mapping[str, Mapping[str, Any]],
    requests: Json,
) -> Roll:
    """A roll by what is known of it.

    Args:
        began: Start of the playbook, in seconds since the epoch.
        batches: Its hosts, as the plan has them.
        records: Host -> what it has on record.
        requests: Of the clients, as they count them.
    """
    turns = {host: turn_of(host, records[host], requests["longest"]) for batch in batches for host in batch}
    first = min(turn.began for turn in turns.values())
    floor = sum(max(turns[host].floor for host in batch) for batch in batches)
    return Roll(name, first - began, ended - first, floor, tuple(tuple(batch) for batch in batches), requests)


def roll(fleet: Any, branch: str) -> Roll:
    """Roll a driver out and measure it."""
    names = {host.name: name for name, host in fleet.hosts.items()}
    plan = OUTPUT / "plan.json"
    old = next(iter(fleet.branches().values()))
    with fleet.load() as load:
        began = time.time()
        run = fleet.roll(branch, variables={"driver_upgrade_output": str(plan)})
        ended = began + run.seconds
    batches = [[names[host] for host in batch["hosts"]] for batch in json.loads(plan.read_text())["batches"]]
    records = {name: fleet.record(name) for name in fleet.hosts}
    return measured("%s to %s" % (old, branch), began, ended, batches, records, load.as_dict())


def main() -> int:
    # Nobody else needs a sandbox to know what a floor is.
    from fleet_testing import sandbox
    from upgrade_testing import make

    parser = argparse.ArgumentParser(description="Wall time of a roll against its floor.")
    parser.add_argument("--rounds", type=int, default=2, help="rolls, there and back in turn (default: 2)")
    parser.add_argument(
        "--load-seconds",
        type=float,
        default=40,
        help="seconds that a model takes to load (default: 40; a real one: minutes)",
    )
    parser.add_argument("--keep", action="store_true", help="leave the hosts for another run by hand")
    options = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    sandbox("up", "-n", "0")
    fleet = make(
        SCENARIO, model_environment={"STANDIN_LOAD_SECONDS": str(options.load_seconds)}, nvidia_driver_branch="570"
    )
    rolls = []
    try:
        for number in range(options.rounds):
            fleet.forget()
            rolls.append(roll(fleet, "580" if number % 2 == 0 else "570"))
            print("   " + rolls[-1].line(), flush=True)
    finally:
        if not options.keep:
            sandbox("remove", "--scenario", SCENARIO)
    (OUTPUT / "upgrade.json").write_text(json.dumps([one.as_dict() for one in rolls], indent=2) + "\n")
    return 0 if all(one.passed for one in rolls) else 1


if __name__ == "__main__":
    sys.exit(main())
