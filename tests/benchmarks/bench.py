# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast is site: against roles that do the same work task by task, and against a play that only pings.

Two equal hosts of the sandbox, one for site and one for the roles. Runs that are compared take turns. Everything is run by
the same ansible-core with the same forks, pipelining and open connections. Exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
BUILD = CHECKOUT / ".build"
OUTPUT = BUILD / "bench"
VENV = BUILD / "bench-venv" / "bin"
SCENARIO = "bench"
GPUS = "NVIDIA H200:143771:2"
FLEETS = (1, 10, 200)
#: From this number of hosts on, they are played: this machine is too small for their side of the work.
PLAYED = 50

sys.path.insert(0, str(CHECKOUT / "tests/sandbox/world"))
import control  # noqa: E402  (the sandbox's keys)

VARIABLES: dict[str, Any] = {
    "ngc_api_key": control.KEY_VALID,
    "nvidia_driver_branch": "580",
    "docker_users": ["ops"],
    "nim_models": [
        {
            "name": "llama",
            "image": "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4",
            "gpus": 1,
            "port": 8000,
            "environment": {"STANDIN_DOWNLOAD_SECONDS": "2"},
        },
        {
            "name": "mistral",
            "image": "nvcr.io/nim/mistralai/mistral-7b-instruct-v0.3:1.12.2",
            "gpus": 1,
            "port": 8001,
            "environment": {"STANDIN_DOWNLOAD_SECONDS": "2"},
        },
    ],
}
#: The roles pin GPUs by hand.
DEVICES = {"llama": 0, "mistral": 1}


@dataclass(frozen=True)
class Play:
    """What is run, and on which host."""

    name: str
    playbook: str
    host: str


SITE = Play("site", "gpu_fleet.nim.site", "site")
ROLES = Play("roles", str(HERE / "baseline/site.yml"), "roles")
PING = Play("ping", str(HERE / "ping.yml"), "site")


@dataclass(frozen=True)
class Run:
    """One run: seconds of wall clock, and of CPU (user and system, controller side with all its processes)."""

    wall: float
    cpu: float


class RunError(Exception):
    """A run did not do what is to be measured."""


def sandbox(*arguments: str) -> str:
    command = [sys.executable, str(CHECKOUT / "tests/sandbox/sandbox.py"), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def fresh(*names: str) -> None:
    """Bare hosts in the place of whatever there was."""
    sandbox("remove", *names, "--scenario", SCENARIO)
    sandbox("add", *names, "--scenario", SCENARIO, "--image", "debian13", "--gpus", GPUS)
    for name in names:
        # Their image was made just now and holds no package lists, which looks like fresh ones to a cache's age.
        sandbox("exec", "%s-%s" % (SCENARIO, name), "--", "touch", "--date=yesterday", "/var/lib/apt/lists")


def inventory(play: Play, count: int) -> pathlib.Path:
    """An inventory of ``count`` names that lead to the host of a play, or are played."""
    (group,) = json.loads(sandbox("inventory", play.host, "--scenario", SCENARIO, "--json")).values()
    (host,) = group["hosts"].values()
    variables = dict(group["vars"], **VARIABLES)
    if count >= PLAYED:
        variables["ansible_connection"] = "replay"
    if play is ROLES:
        models = [dict(model, device=DEVICES[model["name"]]) for model in variables["nim_models"]]
        variables["nim_models"] = models
    names = ["%s%03d" % (play.host, number) for number in range(count)]
    path = OUTPUT / ("inventory-%s-%d.json" % (play.host, count))
    path.write_text(json.dumps({"gpu_hosts": {"hosts": dict.fromkeys(names, host), "vars": variables}}))
    path.chmod(0o600)
    return path


def answer_of(play: Play) -> pathlib.Path:
    """What a real host has answered to the one module of a play."""
    return OUTPUT / ("answer-%s.json" % play.name)


def record(play: Play) -> None:
    text = run(play, options=["-v"])[1]
    answer = re.findall(r"^ok: \[%s000\] => (\{.*\})$" % play.host, text, re.MULTILINE)[-1]
    answer_of(play).write_text(json.dumps(json.loads(answer)) + "\n")


def environment(play: Play) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    return dict(
        kept,
        ANSIBLE_CONFIG=str(OUTPUT / "ansible.cfg"),
        ANSIBLE_HOME=str(OUTPUT / "ansible"),
        ANSIBLE_COLLECTIONS_PATH=str(BUILD / "collections"),
        ANSIBLE_FORKS="20",
        ANSIBLE_PIPELINING="1",
        ANSIBLE_SSH_ARGS="-C -o ControlMaster=auto -o ControlPersist=600s",
        ANSIBLE_SSH_CONTROL_PATH_DIR=str(OUTPUT / "cp"),
        ANSIBLE_NOCOLOR="1",
        ANSIBLE_CONNECTION_PLUGINS=str(HERE / "connection"),
        BENCH_ANSWER=str(answer_of(play)),
    )


def run(play: Play, count: int = 1, *, noop: bool = True, options: Sequence[str] = ()) -> tuple[Run, str]:
    """Run a play to its end and give what it cost and what it printed.

    Raises:
        RunError: When a host failed, or changed although there was nothing to do.
    """
    command = [str(VENV / "ansible-playbook"), "-i", str(inventory(play, count)), play.playbook, *options]
    log = OUTPUT / ("%s-%d.log" % (play.name, count))
    with log.open("wb") as stream:
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment(play), stdout=stream, stderr=subprocess.STDOUT)
        _pid, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text(errors="replace")
    recap = re.findall(r"^\S+ +: ok=\d+ +changed=(\d+) +unreachable=(\d+) +failed=(\d+)", text, re.MULTILINE)
    if process.returncode or len(recap) != count or any(int(one[1]) or int(one[2]) for one in recap):
        raise RunError("%s failed: see %s" % (play.name, log))
    if noop and any(int(one[0]) for one in recap):
        raise RunError("%s changed something on a converged host: see %s" % (play.name, log))
    return Run(wall, usage.ru_utime + usage.ru_stime), text


def turns(plays: Sequence[Play], rounds: int, count: int = 1) -> dict[str, list[Run]]:
    """Runs in turn, the order turned around every time, after one run of each that opens connections and fills caches."""
    found: dict[str, list[Run]] = {play.name: [] for play in plays}
    for play in plays:
        run(play, count)
    for number in range(rounds):
        for play in plays if number % 2 == 0 else tuple(reversed(plays)):
            found[play.name].append(run(play, count)[0])
            say(
                "%-6s %3d host%s %7.2f s, %6.2f s of CPU"
                % (play.name, count, "s"[: count > 1], *_pair(found[play.name][-1]))
            )
    return found


def _pair(one: Run) -> tuple[float, float]:
    return one.wall, one.cpu


def say(text: str) -> None:
    print("   " + text, flush=True)


def ssh_executions(play: Play) -> int:
    return len(re.findall(r"SSH: EXEC ", run(play, options=["-vvv"])[1]))


# -- figures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """Two series of one quantity, and what their ratio is to be.

    Attributes:
        ratio: Median of the first by the median of the second.
        lowest: Lowest and highest ratio of runs of the same round.
    """

    name: str
    unit: str
    first: str
    second: str
    first_values: tuple[float, ...]
    second_values: tuple[float, ...]
    target: float
    at_least: bool

    @property
    def ratio(self) -> float:
        return statistics.median(self.first_values) / statistics.median(self.second_values)

    @property
    def spread(self) -> tuple[float, float]:
        ratios = [one / two for one, two in zip(self.first_values, self.second_values)]
        return min(ratios), max(ratios)

    @property
    def passed(self) -> bool:
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target

    def line(self) -> str:
        def series(name: str, values: Sequence[float]) -> str:
            return "%s %.2f (%.2f-%.2f)" % (name, statistics.median(values), min(values), max(values))

        return "%-48s %-30s %-30s %6.2f  %-13s %s %-5g %s" % (
            self.name + ", " + self.unit,
            series(self.first, self.first_values),
            series(self.second, self.second_values),
            self.ratio,
            "(%.2f-%.2f)" % self.spread,
            ">=" if self.at_least else "<=",
            self.target,
            "pass" if self.passed else "MISS",
        )

    def as_dict(self) -> dict[str, Any]:
        return dict(asdict(self), ratio=self.ratio, spread=self.spread, passed=self.passed)


def walls(runs: Sequence[Run]) -> tuple[float, ...]:
    return tuple(one.wall for one in runs)


def first_convergence(rounds: int) -> Figure:
    """From bare hosts to answering models."""
    found: dict[str, list[Run]] = {SITE.name: [], ROLES.name: []}
    for number in range(rounds):
        fresh(SITE.host, ROLES.host)
        for play in (SITE, ROLES) if number % 2 == 0 else (ROLES, SITE):
            found[play.name].append(run(play, noop=False)[0])
            say("%-6s first convergence %7.2f s, %6.2f s of CPU" % (play.name, *_pair(found[play.name][-1])))
    sites, roles = walls(found[SITE.name]), walls(found[ROLES.name])
    return Figure("first convergence", "s", "site", "roles", sites, roles, 1.0, False)


def noop(rounds: int) -> list[Figure]:
    found = turns((SITE, ROLES, PING), rounds)
    sites, roles, pings = (walls(found[play.name]) for play in (SITE, ROLES, PING))
    return [
        Figure("nothing to do", "s", "roles", "site", roles, sites, 10.0, True),
        Figure("nothing to do", "s", "site", "ping", sites, pings, 1.5, False),
    ]


def processor(rounds: int, fleets: Sequence[int]) -> list[Figure]:
    figures = []
    for play in (SITE, PING):
        record(play)
    for count in fleets:
        found = turns((SITE, PING), max(3, rounds if count < 100 else 3), count)
        sites, pings = (tuple(1000 * one.cpu / count for one in found[play.name]) for play in (SITE, PING))
        name = "controller, a host of %d%s" % (count, " (played)" if count >= PLAYED else "")
        figures.append(Figure(name, "ms of CPU", "site", "ping", sites, pings, 1.5, False))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each with nothing to do (default: 5)")
    parser.add_argument(
        "--first", type=int, default=2, help="first convergences of each (default: 2; 0: hosts as they are)"
    )
    parser.add_argument("--fleets", default=",".join(map(str, FLEETS)), help="hosts for the controller's CPU")
    options = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    # Nobody's own configuration.
    (OUTPUT / "ansible.cfg").write_text("")
    load = os.getloadavg()[0]
    if load > 1:
        say("this machine is busy (load %.1f): times will be too long, ratios too close to each other" % load)
    sandbox("up", "-n", "0")
    figures: list[Figure] = []
    try:
        if options.first:
            figures.append(first_convergence(options.first))
        figures[:0] = noop(options.rounds)
        executions = {play.name: ssh_executions(play) for play in (PING, SITE, ROLES)}
        figures += processor(options.rounds, [int(count) for count in options.fleets.split(",") if count])
    except RunError as error:
        print("ERROR: %s" % error)
        return 1
    version = subprocess.run([str(VENV / "ansible"), "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
    about = "%s, %d cores, load %.1f at the start" % (version.split("]")[0] + "]", os.cpu_count() or 0, load)
    print("\n%s" % about)
    print("medians (lowest-highest); the ratio is that of the medians, its spread that of single rounds\n")
    print("\n".join(figure.line() for figure in figures))
    print("\nSSH executions with nothing to do: %s" % ", ".join("%s %d" % pair for pair in executions.items()))
    result = {"about": about, "ssh_executions": executions, "figures": [figure.as_dict() for figure in figures]}
    (OUTPUT / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(figure.passed for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
