# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Restarting Docker without losing a container, and refusing to where that cannot be."""

from __future__ import annotations

import re
import typing as t

from ._daemon_json import redact
from ._docker_api import DockerApi
from ._dockerd import SOCKET_UNIT, UNIT, DaemonState, RunningContainer, version_tuple
from ._errors import FleetError
from ._host import CommandResult, Host

#: Seconds for a restarted daemon to answer.
RESTART_TIMEOUT = 90.0

#: Keys that live-restore does not carry over: after a restart the running containers would be lost to the daemon or to the
#: network.
LOSES_CONTAINERS = frozenset(
    {
        "bip",
        "bip6",
        "bridge",
        "containerd-namespace",
        "data-root",
        "default-address-pools",
        "exec-root",
        "features.containerd-snapshotter",
        "fixed-cidr",
        "fixed-cidr-v6",
        "iptables",
        "ip6tables",
        "ipv6",
        "storage-driver",
        "userns-remap",
    }
)


def observe_running(api: DockerApi, version: t.Tuple[int, ...]) -> t.Tuple[RunningContainer, ...]:
    """Running containers; ``--rm`` is looked up only for engines that remove such containers when they restart."""
    found = []
    for entry in api.containers(all=False):
        names = entry.get("Names") or [entry["Id"][:12]]
        auto_remove = False
        if version < (24, 0, 8):
            details = api.container(entry["Id"]) or {}
            auto_remove = bool((details.get("HostConfig") or {}).get("AutoRemove"))
        found.append(RunningContainer(entry["Id"], names[0].lstrip("/"), auto_remove=auto_remove))
    return tuple(found)


def restart_blocked(state: DaemonState, *, live_restore: bool, keys: t.Sequence[str]) -> t.Optional[str]:
    """Why a restart of the daemon would hurt running containers; None when it would not.

    Args:
        live_restore: Whether live-restore is on, or will be by a reload, before the restart.
        keys: Keys of daemon.json that the restart brings into effect.
    """
    if not state.running:
        return None
    names = ", ".join(sorted(container.name for container in state.running))
    swarm = str((state.info.get("Swarm") or {}).get("LocalNodeState", "inactive"))
    if not live_restore:
        return (
            "it would stop the running containers (%s) because live-restore is off; allow live_restore, or stop them first"
            % names
        )
    if swarm not in ("inactive", ""):
        return (
            "it would stop the running containers (%s): this host is a swarm node, where live-restore does not work; "
            "drain it first" % names
        )
    lost = sorted(LOSES_CONTAINERS.intersection(keys))
    if lost:
        return "live-restore does not carry running containers (%s) over a change of %s; stop them first" % (
            names,
            " and ".join(lost),
        )
    removed = sorted(container.name for container in state.running if container.auto_remove)
    if removed and version_tuple(state.version) < (24, 0, 8):
        return (
            "Docker Engine %s removes containers that were started with --rm (%s) when it restarts; stop them first, "
            "or upgrade to 24.0.8 or newer" % (state.version, ", ".join(removed))
        )
    if state.dependents:
        return (
            "systemd would restart %s with it (Requires= or BindsTo= docker.service); stop them first, or weaken that to "
            "Wants=" % ", ".join(state.dependents)
        )
    return None


def restart_docker(host: Host, api: DockerApi, state: DaemonState) -> None:
    """Restart the daemon once and prove that every container that ran still runs, never having been stopped.

    Raises:
        FleetError: ``daemon_restart_failed`` when it does not come back, ``containers_restarted`` when one was hit.
    """
    before = {one.id: _started_at(api, one.id) for one in state.running}
    result = host.run(["systemctl", "restart", UNIT], timeout=RESTART_TIMEOUT + 60)
    if not result.ok:
        result = start_docker(host)
    deadline = host.monotonic() + RESTART_TIMEOUT
    while result.ok and not api.available():
        if host.monotonic() >= deadline:
            break
        host.sleep(0.2)
    if not result.ok or not api.available():
        raise FleetError(
            "daemon_restart_failed",
            "Restarting Docker failed: %s." % daemon_log(host),
            rc=result.rc,
            stderr=result.stderr[-2000:],
        )
    hit = sorted(one.name for one in state.running if _started_at(api, one.id) != before[one.id])
    if hit:
        raise FleetError(
            "containers_restarted",
            "Restarting Docker hit running containers although live-restore was on: %s; see 'docker ps -a' and "
            "'journalctl -u docker'." % ", ".join(hit),
            containers=hit,
        )


def start_docker(host: Host) -> CommandResult:
    """Start the daemon, whatever a start limit says, and with a new socket where systemd has lost the old one.

    It loses it when docker.socket is changed or masked while Docker runs; nothing shows before the next start.
    """
    result = CommandResult((), 1, "", "")
    for command in ("start", "restart"):
        if command == "restart":
            if "no sockets found via socket activation" not in _journal(host):
                break
            host.run(["systemctl", "stop", SOCKET_UNIT, UNIT], timeout=RESTART_TIMEOUT)
        # A start limit that earlier failures have used up would refuse this start too.
        host.run(["systemctl", "reset-failed", UNIT, SOCKET_UNIT])
        result = host.run(["systemctl", "start", UNIT], timeout=RESTART_TIMEOUT + 60)
        if result.ok:
            break
    return result


def _started_at(api: DockerApi, container: str) -> t.Optional[t.Tuple[str, int]]:
    """Start time and process of a running container; None when it is gone or stopped."""
    details = (api.container(container) or {}).get("State") or {}
    return (str(details.get("StartedAt")), int(details.get("Pid") or 0)) if details.get("Running") else None


def _journal(host: Host) -> str:
    return host.run(["journalctl", "-u", UNIT, "-n", "40", "-o", "cat", "--no-pager"]).stdout


def daemon_log(host: Host) -> str:
    """The last error the daemon logged."""
    lines = [line.strip() for line in _journal(host).splitlines() if line.strip()]
    for line in reversed(lines):
        if "level=error" in line or "level=fatal" in line or line.startswith(("failed to", "unable to")):
            found = re.search(r'msg="((?:[^"\\]|\\.)*)"', line)
            return redact(found.group(1).replace('\\"', '"') if found else line).rstrip(".")
    return "its log says nothing; see 'journalctl -u docker'"
