# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tries the lines of the table of drifts on a host, one after the other, and shows them as a table in the end."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from drifts import DAEMON_JSON, DRIFTS, FABRIC, Drift
from fleet_testing import Fleet, Host, Json, Run, difference, wait_until

#: The order of disruptions, least first.
DISRUPTIONS = ("none", "reload", "restart_docker", "restart_nim", "unload_driver", "reboot")

#: Not compared before and after, wherever they come from: notes of the system and of programs to themselves.
VOLATILE = (
    # What was there before the last change of the tables of users, of packages' states, of certificates.
    "/etc/group-",
    "/etc/gshadow-",
    "/etc/passwd-",
    "/etc/shadow-",
    "/etc/ld.so.cache",
    "/var/backups",
    # Packages, their versions, states and holds are asked of dpkg.
    "/var/lib/dpkg",
    "/var/lib/apt",
    "/var/cache",
    # Images and containers are asked of Docker.
    "/var/lib/docker",
    "/var/lib/containerd",
    "/var/lib/systemd",
    "/root/.cache",
    # What daemon.json was before it was last changed, for an operator to look at.
    "/var/lib/gpu_fleet/daemon.json.before",
    # The test's own.
    "/var/lib/gpu_fleet/daemon.json.good",
)
#: Large, and nobody's repair may write there but a package's.
BY_SIZE = ("/usr", "/boot", "/opt", "/var/lib/nim/cache", "/var/lib/dkms")
#: Beginnings of units that come and go by themselves.
RESTLESS = (
    "apt-",
    "dpkg-db-backup",
    "e2scrub",
    "fstrim",
    "logrotate",
    "man-db",
    "session-",
    "systemd-",
    "user@",
    "user-",
    "run-",
    "var-lib-docker",
    "ssh",
)

_IDENTITY = r"""
import json, os, subprocess
def out(*words):
    return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8").stdout.strip()
units = {"docker": "docker", "persistenced": "nvidia-persistenced"}
found = {name: out("systemctl", "show", "-P", "MainPID", unit) for name, unit in units.items()}
found["driver"] = str(os.stat("/sys/module/nvidia").st_ino) if os.path.exists("/sys/module/nvidia") else ""
found["boot"] = open("/proc/sys/kernel/random/boot_id").read().strip()
for model in MODELS:
    found[model] = out("docker", "inspect", "--format", "{{.Id}} {{.State.Pid}} {{.State.StartedAt}}", "nim-" + model)
    found[model + ".unit"] = out("systemctl", "show", "-P", "MainPID", "nim-" + model)
print(json.dumps(found))
"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a host's plan says.

    Attributes:
        later: Changes that wait for another resource and so cannot be planned in detail.
    """

    changes: list[Json]
    later: list[Json]
    errors: list[Json]
    notes: list[str]

    def lines(self) -> list[tuple[str, str, str]]:
        """Resource, what, disruption; as the table has them."""
        # The test of a GPU container leaves the host as it is.
        changes = [entry for entry in self.changes if entry["what"] != "GPU container"]
        return (
            [(entry["resource"], entry["what"], entry["disruption"]) for entry in changes]
            + [(entry["resource"], entry["what"], "later " + entry["disruption"]) for entry in self.later]
            + [(entry["resource"], entry["reason"], "error") for entry in self.errors]
        )

    def sentences(self) -> list[str]:
        """Why a run would refuse."""
        blocked = [entry["blocked"] for entry in self.changes + self.later if entry["blocked"]]
        return [entry["message"] for entry in self.errors] + blocked


def key(change: Mapping[str, Any]) -> str:
    """What two lists of changes must agree in."""
    return json.dumps([change[name] for name in ("resource", "what", "from", "to", "disruption")], sort_keys=True)


def fits(line: tuple[str, str, str], wanted: str) -> bool:
    resource, what, disruption = (
        wanted.split(", ", 2)[0],
        wanted.split(", ", 1)[1].rpartition(", ")[0],
        wanted.rpartition(", ")[2],
    )
    return line[0] == resource and what in line[1] and line[2] == disruption


class Patient:
    """A converged host that is broken and repaired again and again."""

    def __init__(self, fleet: Fleet, host: Host, models: Mapping[str, int]) -> None:
        """``models`` of the host, with their ports."""
        self.fleet = fleet
        self.host = host
        self.models = models
        self.healthy = False
        #: The host as it was when the last line was over.
        self.known: dict[str, str] = {}

    def converge(self) -> None:
        """As wanted, everything serving; the state from which every line begins."""
        if self.healthy:
            return
        if self.plan().lines():
            self.fleet.site()
            assert self.plan().lines() == [], "not as wanted to begin with"
        self.serves()
        self.host.run("cp -p %s /var/lib/gpu_fleet/daemon.json.good" % DAEMON_JSON)
        self.known = self.snapshot()
        self.healthy = True

    def serves(self) -> None:
        self.host.wait_ready(*self.models.values())
        for model in self.models:
            word = "/run/nim/%s.json" % model
            wait_until(lambda word=word: '"ready"' in self.host.run("cat " + word, check=False), "%s is ready" % model)

    def plan(self) -> Plan:
        run = self.fleet.play("plan", "-e", "plan_format=json")
        (look,) = [
            entry for entry in run.of(self.host.name) if "changes" in entry["result"] or "errors" in entry["result"]
        ]
        result = look["result"]
        changes = result["changes"]
        return Plan(
            [entry for entry in changes if not entry["after"]],
            [entry for entry in changes if entry["after"]],
            result["errors"],
            [*result["notes"], *map(str, result.get("warnings") or [])],
        )

    def identity(self) -> dict[str, str]:
        program = "MODELS = %r\n%s" % (list(self.models), _IDENTITY)
        found: dict[str, str] = json.loads(self.host.run("python3 -", stdin=program))
        return found

    def snapshot(self) -> dict[str, str]:
        """Everything that a repair could have changed beside what it was for."""
        found = self.host.snapshot(VOLATILE, by_size=BY_SIZE, live=True)
        return {
            what: state
            for what, state in found.items()
            if not what.startswith(tuple("running " + name for name in RESTLESS)) and "/__pycache__" not in what
        }

    def suffer(self, drift: Drift) -> dict[str, float]:
        """Break, plan, repair, plan, repair.

        Returns:
            Seconds of each part.
        """
        self.converge()
        self.healthy = False
        before = self.identity()
        try:
            times = self._break_and_repair(drift)
        except AssertionError:
            # The next line shall find a host that can be repaired.
            self.host.run(drift.undo, check=False)
            raise
        after = self.identity()
        changed = {name for name in before if before[name] != after[name]}
        allowed = {*drift.restarts, *("%s.unit" % name for name in drift.restarts)}
        assert changed <= allowed, "other processes than before: %s" % sorted(changed - allowed)
        assert drift.restarts <= {*changed}, "not restarted: %s" % sorted(drift.restarts - changed)
        began = time.monotonic()
        known, self.known = self.known, self.snapshot()
        other = {what: how for what, how in difference(known, self.known).items() if not what.startswith(drift.leaves)}
        assert other == {}, "other than before: %s" % json.dumps(
            {what: (how, known.get(what), self.known.get(what)) for what, how in other.items()}, indent=1
        )
        times["snapshot"] = time.monotonic() - began
        self.healthy = True
        return times

    def _break_and_repair(self, drift: Drift) -> dict[str, float]:
        times: dict[str, float] = {}
        began = time.monotonic()

        def lap(name: str) -> None:
            nonlocal began
            times[name], began = time.monotonic() - began, time.monotonic()

        self.host.run("set -e\n" + drift.breaks)
        lap("break")
        plan = self.plan()
        self._is_as_expected(plan, drift)
        lap("plan")
        if drift.refused:
            self._is_refused(drift, plan)
        elif plan.lines():
            self._does_what_it_planned(self.fleet.site(), plan)
        lap("repair")
        if drift.undo:
            self.host.run("set -e\n" + drift.undo)
        if drift.refused and self.plan().lines():
            # What the refusal kept from being repaired.
            self.fleet.site()
        left = self.plan()
        assert left.lines() == [], "a second look: %s" % left
        again = self.fleet.site()
        assert again.changed() == [], "a second run: %s" % again.changed()
        self.serves()
        lap("look again")
        return times

    def _is_as_expected(self, plan: Plan, drift: Drift) -> None:
        lines = plan.lines()
        said = "the plan says: %s" % json.dumps(lines, indent=1)
        left = list(lines)
        for wanted in drift.plan:
            found = next((line for line in left if fits(line, wanted)), None)
            assert found is not None, "not in the plan: %s\n%s" % (wanted, said)
            left.remove(found)
        assert left == [], "in the plan without a reason: %s\n%s" % (left, said)
        assert not drift.notes or any(drift.notes in note for note in plan.notes), plan.notes

    def _does_what_it_planned(self, run: Run, plan: Plan) -> None:
        promised = {key(change) for change in plan.changes if not change["blocked"]}
        done = {key(change): change for change in run.changes(self.host.name)}
        vague = {entry["resource"]: DISRUPTIONS.index(entry["disruption"]) for entry in plan.later}
        for missing in promised - done.keys():
            # A test that leaves the host as it is is no change.
            assert '"GPU container"' in missing, "planned and not done: %s" % missing
        for text, change in done.items():
            if text in promised:
                continue
            resource = change["resource"]
            assert resource in vague, "done and not planned: %s" % text
            assert DISRUPTIONS.index(change["disruption"]) <= vague[resource], "worse than planned: %s" % text

    def _is_refused(self, drift: Drift, plan: Plan) -> None:
        run = self.fleet.site(succeeds=False)
        said = run.failure(self.host.name)
        # What a refusal leaves undone is more than what a plan does.
        causes = [sentence.partition(" Nothing was changed")[0].rstrip(".") for sentence in plan.sentences()]
        assert any(cause in said for cause in causes), (said, causes)
        promised = {key(change) for change in plan.changes}
        strange = [change for change in run.changes(self.host.name) if key(change) not in promised]
        assert strange == [], strange


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of what was tried, wherever lines of it were."""
    known = {drift.name: drift for drift in (*DRIFTS, *FABRIC)}
    rows = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            said = dict(report.user_properties)
            if report.when == "call" and said.get("drift") in known:
                rows.append((known[said["drift"]], report.passed, report.duration))
    if rows:
        rows.sort(key=lambda row: list(known).index(row[0].name))
        terminalreporter.section("drifts")
        terminalreporter.write_line(render(rows))


def render(rows: Sequence[tuple[Drift, bool, float]]) -> str:
    """A line for each drift: how it went, how long it took, what was done, what the plan said."""
    lines = []
    for drift, passed, seconds in rows:
        said = "; ".join(drift.plan) or ("left alone, and said" if drift.notes else "left alone")
        said += " (refused)" if drift.refused else ""
        lines.append("%-6s %5.1f s  %-52s %s" % ("ok" if passed else "FAILED", seconds, drift.name, said))
    good = sum(passed for _drift, passed, _seconds in rows)
    lines.append(
        "%d of %d drifts were planned as they are and repaired; %.1f s each"
        % (good, len(rows), sum(seconds for _drift, _passed, seconds in rows) / len(rows))
    )
    return "\n".join(lines)
