# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""daemon.json by merge of our own keys, applied to the running daemon with the smallest action and read back from it.

A reload that dockerd rejects is visible in its log only.
"""

from __future__ import annotations

import json
import os.path
import typing as t

from ._daemon_json import parse
from ._docker_daemon_planner import PENDING, DaemonPlanner
from ._docker_restart import RESTART_TIMEOUT, daemon_log, restart_docker
from ._docker_restart_risk import restart_blocked
from ._dockerd import UNIT, DaemonState
from ._errors import FleetError
from ._host import Host
from ._redaction import scrub
from ._resource import Change, Resource

#: The file as it was before the last change.
BACKUP = "/var/lib/gpu_fleet/daemon.json.before"

#: Seconds for a reload to show in the daemon.
RELOAD_TIMEOUT = 10.0


class DockerDaemon(DaemonPlanner, Resource[DaemonState]):
    """Own keys of daemon.json and the live daemon that obeys them."""

    def apply(self, host: Host, change: Change) -> None:
        state = self.observe(host)
        if change.action == "daemon_file":
            self._write(host, state, change)
        elif change.action == "daemon_reload":
            self._reload(host, state, list(state.pending))
            host.remove(PENDING)
        elif change.action == "daemon_restart":
            self._restart(host, state)

    def _write(self, host: Host, state: DaemonState, change: Change) -> None:
        before, after = change.data["before"], change.data["after"]
        if state.text == after:
            return
        if state.text != before:
            raise FleetError(
                "changed_meanwhile",
                "Writing %s failed: somebody else changed it between the look and the change; run again." % state.path,
                file=state.path,
            )
        for path in {runtime.get("path") for runtime in self.wanted.get("runtimes", {}).values()} - {None}:
            if not state.programs.get(path):
                raise FleetError(
                    "missing_runtime",
                    "Registering the runtime %s in %s failed: there is no such program on this host; install it first."
                    % (path, state.path),
                    file=path,
                )
        self._validate(host, state, after)
        host.make_dir(os.path.dirname(BACKUP), mode=0o755)
        if before is not None:
            # daemon.json may hold a proxy's password: the copy is for root only.
            host.write_file(BACKUP, before, mode=0o600)
        if change.data["reload"] or change.data["restart"]:
            _write_pending(host, state, change.data["keys"], "restart" if change.data["restart"] else "reload")
        if not host.exists(os.path.dirname(state.path)):
            host.make_dir(os.path.dirname(state.path), mode=0o755)
        replace_file(host, state.path, after)
        if change.data["reload"]:
            try:
                self._reload(host, state, change.data["keys"])
            except FleetError as error:
                self._put_back(host, state, before)
                error.message += " The file is back as it was."
                raise FleetError(error.reason, error.message, **error.facts) from error
            # Not within the above: the daemon has taken the file, whatever becomes of the note.
            if not change.data["restart"]:
                host.remove(PENDING)

    def _put_back(self, host: Host, state: DaemonState, before: t.Optional[str]) -> None:
        if before is None:
            host.remove(state.path)
        else:
            replace_file(host, state.path, before)
        host.remove(PENDING)

    def _validate(self, host: Host, state: DaemonState, text: str) -> None:
        """``dockerd --validate`` (Engine 23.0 and newer) over a copy, with the flags the daemon really has."""
        if not state.installed:
            return
        copy = os.path.dirname(PENDING) + "/daemon.json.new"
        host.make_dir(os.path.dirname(copy), mode=0o755)
        host.write_file(copy, text, mode=0o600)
        flags = _without_config_file(state.argv[1:])
        try:
            result = host.run(["dockerd", "--validate", "--config-file", copy, *flags], timeout=30)
        finally:
            host.remove(copy)
        if result.ok or "unknown flag: --validate" in result.stderr + result.stdout or result.rc == 127:
            return
        cause = result.last_line().replace(copy, state.path)
        raise FleetError(
            "daemon_config_rejected",
            "Changing %s failed: dockerd would refuse it: %s. The file was left as it is; correct the wanted options."
            % (state.path, scrub(cause).rstrip(".")),
            file=state.path,
        )

    def _reload(self, host: Host, state: DaemonState, keys: t.Sequence[str]) -> None:
        """SIGHUP, and proof that the daemon took it: its reload event, and the keys that it tells about."""
        since = host.time()
        host.check(
            ["systemctl", "reload", UNIT],
            reason="daemon_reload_failed",
            doing="Reloading Docker",
            remedy="See 'systemctl status docker'.",
            timeout=60,
        )
        deadline = host.monotonic() + RELOAD_TIMEOUT
        while True:
            if self.api.reloaded_since(since, host.time()):
                break
            if host.monotonic() >= deadline:
                raise FleetError(
                    "daemon_reload_rejected",
                    "Reloading Docker had no effect: the daemon did not take %s over (%s)."
                    % (", ".join(keys) or state.path, daemon_log(host)),
                    file=state.path,
                )
            host.sleep(0.1)

    def _restart(self, host: Host, state: DaemonState) -> None:
        document = parse(state.text, state.path)
        if state.running and not state.info.get("LiveRestoreEnabled") and document.get("live-restore") is True:
            self._reload(host, state, ["live-restore"])
            state = self.observe(host)
        blocked = restart_blocked(state, live_restore=bool(state.info.get("LiveRestoreEnabled")), keys=())
        if blocked:
            raise FleetError("restart_refused", "Restarting Docker was refused: %s." % blocked)
        try:
            restart_docker(host, self.api, state)
        except FleetError as error:
            previous = host.read_text(BACKUP)
            if error.reason == "daemon_restart_failed" and state.pending_action == "restart" and previous is not None:
                replace_file(host, state.path, previous)
                host.run(["systemctl", "reset-failed", UNIT, "docker.socket"])
                back = host.run(["systemctl", "start", UNIT], timeout=RESTART_TIMEOUT)
                host.remove(PENDING)
                error.message += " %s is back as it was%s." % (
                    state.path,
                    ", and Docker runs with it" if back.ok else ", but Docker does not start with it either",
                )
                raise FleetError(error.reason, error.message, **error.facts) from error
            raise
        host.remove(PENDING)


def _without_config_file(flags: t.Sequence[str]) -> t.List[str]:
    result: t.List[str] = []
    skip = False
    for word in flags:
        if skip:
            skip = False
        elif word == "--config-file":
            skip = True
        elif not word.startswith("--config-file="):
            result.append(word)
    return result


def replace_file(host: Host, path: str, text: str) -> None:
    """Write a file with the owner and mode it has, or 0644 root."""
    found = host.stat(path)
    if found is None:
        host.write_file(path, text, mode=0o644)
    else:
        host.write_file(path, text, mode=found.mode, uid=found.uid, gid=found.gid)


def _write_pending(host: Host, state: DaemonState, keys: t.Sequence[str], action: str) -> None:
    if state.pending_action == "restart":
        action = "restart"
    host.make_dir(os.path.dirname(PENDING), mode=0o755)
    content = {"main_pid": state.main_pid, "keys": sorted({*state.pending, *keys}), "action": action}
    host.write_file(PENDING, json.dumps(content) + "\n", mode=0o644)
