# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Restarting and starting Docker, with proof that no container was lost."""

from __future__ import annotations

import re
import typing as t

from ._docker_api import DockerApi
from ._dockerd import SOCKET_UNIT, UNIT, DaemonState
from ._errors import FleetError
from ._host import CommandResult, Host
from ._redaction import scrub

#: Seconds for a restarted daemon to answer.
RESTART_TIMEOUT = 90.0


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
            return scrub(found.group(1).replace('\\"', '"') if found else line).rstrip(".")
    return "its log says nothing; see 'journalctl -u docker'"
