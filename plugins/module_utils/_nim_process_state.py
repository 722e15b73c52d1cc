# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What runs of a NIM service: its systemd unit, its container, and the word that the unit's main process leaves."""

from __future__ import annotations

import datetime
import re
import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._gpu_holders import parse_cgroup
from ._host import Host
from ._nim_paths import RUNTIME_DIRECTORY, configuration_path
from ._nim_unit_docker import SPEC_LABEL
from ._untrusted import json_object, real_number, whole_number

Json = t.Dict[str, t.Any]

#: Ends in a row after which "ready" has to last before it is believed; the wrapper counts, and forgets after 30 s of service.
UNSTEADY_ENDS = 2


@dataclass(frozen=True)
class UnitState:
    """A unit as ``systemctl show`` tells it; ``main_started`` is in seconds of the host's monotonic clock."""

    load: str = "not-found"
    active: str = "inactive"
    sub: str = "dead"
    restarts: int = 0
    invocation: str = ""
    result: str = "success"
    main_status: int = 0
    condition_met: bool = True
    main_started: float = 0.0


def observe_units(host: Host, units: t.Sequence[str]) -> dict[str, UnitState]:
    """All units with one call of systemctl."""
    if not units:
        return {}
    keys = "Id,LoadState,ActiveState,SubState,NRestarts,InvocationID,Result,ExecMainStatus,ConditionResult"
    shown = host.run(
        ["systemctl", "show", "--property=%s,ExecMainStartTimestampMonotonic" % keys, *units], timeout=30
    ).stdout
    found: dict[str, UnitState] = {}
    for block in re.split(r"\n\s*\n", shown):
        value = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if not value.get("Id"):
            continue
        found[value["Id"]] = UnitState(
            load=value.get("LoadState", ""),
            active=value.get("ActiveState", ""),
            sub=value.get("SubState", ""),
            restarts=whole_number(value.get("NRestarts")),
            invocation=value.get("InvocationID", ""),
            result=value.get("Result", ""),
            main_status=whole_number(value.get("ExecMainStatus")),
            condition_met=value.get("ConditionResult", "yes") != "no",
            main_started=whole_number(value.get("ExecMainStartTimestampMonotonic")) / 1e6,
        )
    return {unit: found.get(unit, UnitState()) for unit in units}


#: Docker notes that a container has started when its program may have said its first words already.
EARLY_SECONDS = 2.0


@dataclass(frozen=True)
class ContainerState:
    """A container as the engine tells it; times are seconds since the epoch."""

    id: str
    status: str
    started: float | None
    finished: float | None
    exit_code: int
    oom_killed: bool
    error: str
    spec: str = ""

    @property
    def running(self) -> bool:
        return self.status == "running"

    @property
    def speaks_since(self) -> float | None:
        """From when on its log is that of its present run; what an earlier run said ends with that run's end."""
        if self.started is None:
            return None
        earlier = self.finished if self.finished is not None and self.finished < self.started else 0.0
        return max(self.started - EARLY_SECONDS, earlier)

    @property
    def instance(self) -> str:
        """Changes with every start, also when the same container is started again."""
        return "%s@%s" % (self.id, self.started)


def parse_container(inspected: t.Mapping[str, t.Any] | None) -> ContainerState | None:
    """The few facts of ``docker inspect`` that the wait needs."""
    if not inspected:
        return None
    state = inspected.get("State") or {}
    return ContainerState(
        id=str(inspected.get("Id", "")),
        status=str(state.get("Status", "")),
        started=parse_time(str(state.get("StartedAt", ""))),
        finished=parse_time(str(state.get("FinishedAt", ""))),
        exit_code=int(state.get("ExitCode") or 0),
        oom_killed=bool(state.get("OOMKilled")),
        error=str(state.get("Error") or ""),
        spec=str(((inspected.get("Config") or {}).get("Labels") or {}).get(SPEC_LABEL) or ""),
    )


def parse_time(text: str) -> float | None:
    """Docker's RFC 3339 time in UTC as seconds since the epoch; its zero time (year 1) and what is no time are None."""
    found = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?Z", text)
    if not found or text.startswith("0001-"):
        return None
    try:
        whole = datetime.datetime.fromisoformat(found.group(1)).replace(tzinfo=datetime.timezone.utc).timestamp()
    except ValueError:
        return None
    return whole + float(found.group(2) or 0)


@dataclass(frozen=True)
class Word:
    """What the unit's main process left word of: its phase, since when, failed starts and ends soon after ready in a row.

    Attributes:
        failing_since: When the first of the failed starts failed.
        container: Id of the container that it made last; empty where there is none, or an older program left word.
    """

    phase: str = ""
    since: float = 0.0
    failures: int = 0
    detail: str = ""
    unsteady: int = 0
    failing_since: float = 0.0
    container: str = ""

    @property
    def ended(self) -> tuple[int | None, bool]:
        """Exit code of the container whose end it tells (None where it tells none), and whether the kernel killed it."""
        found = re.match(r"(?:\S+ )?ended with code (\d{1,3})\b( \(out of memory\))?", self.detail)
        return (int(found.group(1)), bool(found.group(2))) if found else (None, False)


def read_word(host: Host, name: str) -> Word:
    """The word of a unit's main process; empty when there is none or it is broken."""
    found = _read_object(host, "%s/%s.json" % (RUNTIME_DIRECTORY, name))
    failures, unsteady, since = found.get("failures"), found.get("unsteady"), found.get("since")
    return Word(
        phase=str(found.get("phase") or ""),
        since=real_number(since),
        failures=failures if isinstance(failures, int) else 0,
        detail=str(found.get("detail") or ""),
        unsteady=unsteady if isinstance(unsteady, int) else 0,
        failing_since=real_number(found.get("failing_since")),
        container=str(found.get("container") or ""),
    )


def wanted_spec(host: Host, name: str) -> str:
    """Name of what the service's container is meant to run; empty when that cannot be told."""
    return str(_read_object(host, configuration_path(name)).get("spec") or "")


def wanted_gpus(host: Host, name: str) -> tuple[str, ...]:
    """UUIDs of the GPUs that the service was given; empty when that cannot be told."""
    found = _read_object(host, configuration_path(name)).get("gpus")
    return tuple(str(uuid) for uuid in found) if isinstance(found, list) else ()


def _read_object(host: Host, path: str) -> Json:
    try:
        return json_object(host.read_text(path))
    except FleetError:
        # A file that is being replaced or was broken by hand; whoever owns it reports that.
        return {}


class ContainerReader(t.Protocol):
    """The part of the Docker client that is used here."""

    def container(self, name: str) -> Json | None: ...

    def containers(self, all: bool = True) -> list[Json]: ...


def port_holder(host: Host, port: int) -> str:
    """Who listens on a TCP port, as "docker-proxy (pid 812)"; empty when it cannot be told."""
    return ", ".join("%s (pid %s)" % pair for pair in _holders(host, port))


def _holders(host: Host, port: int) -> list[tuple[str, str]]:
    """Command and process id of all that listen on a TCP port."""
    listed = host.run(["ss", "-Hltnp", "sport", "=", ":%d" % port], timeout=10).stdout
    return sorted(set(re.findall(r'\("([^"]+)",pid=(\d+)', listed)))


def stranger_on_port(host: Host, port: int, container: str) -> str:
    """Who listens on a port without being a container's process or Docker's proxy; empty when nobody is seen to.

    The proxy is the container's own, because a container whose port is taken cannot start; one in the host's network can.

    Args:
        container: Its id.
    """
    holders = _holders(host, port)
    for command, pid in holders:
        if command == "docker-proxy" or parse_cgroup(host.read_text("/proc/%s/cgroup" % pid) or "")[1] == container:
            return ""
    return ", ".join("%s (pid %s)" % pair for pair in holders)
