# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Makes a gateway of a host, as :mod:`_nim_gateway_planner` plans it."""

from __future__ import annotations

import dataclasses
import os
import re
import typing as t

from ._errors import FleetError
from ._gateway_binds import PACKAGE
from ._gateway_notes import RECORD, carried, locked, read_notes, write_notes
from ._haproxy_config import MARKER
from ._haproxy_server import STATE_PROGRAM
from ._host import Host
from ._nim_gateway_planner import (
    DROP_IN,
    SELINUX,
    SERVICE,
    FileState,
    GatewayPlanner,
    GatewayState,
    check_version,
)
from ._resource import Change, Resource

#: Seconds within which a started or reloaded HAProxy must answer as the new one.
RELOAD_SECONDS = 15
POLL_SECONDS = 0.25


class NimGateway(GatewayPlanner, Resource[GatewayState]):
    """HAProxy as the one endpoint of a fleet. The arguments are the options of the module."""

    def __init__(self, **options: t.Any) -> None:
        super().__init__(**options)
        #: What was there before this run, for the way back when a reload fails.
        self._before: t.Dict[str, t.Optional[t.Tuple[bytes, int]]] = {}
        self.locked: t.Callable[[], t.ContextManager[None]] = locked
        #: What is worth knowing although nothing needed it.
        self.warnings: t.List[str] = []

    def observe(self, host: Host) -> GatewayState:
        try:
            read_notes(host)
        except FleetError as error:
            # They say only whose a server is that is out. Who enables one needs that; a configuration goes without.
            if error.message not in self.warnings:
                self.warnings.append(error.message)
        return super().observe(host)

    def apply(self, host: Host, change: Change) -> None:
        if change.action == "package":
            self._install(host)
        elif change.action == "selinux":
            host.check(
                ["setsebool", "-P", SELINUX, "on"],
                reason="selinux_failed",
                doing="Allowing HAProxy to connect to the servers (setsebool %s)" % SELINUX,
                timeout=300,
            )
        elif change.action == "program":
            host.make_dir(os.path.dirname(STATE_PROGRAM), mode=0o755)
            file = change.data["file"]
            host.write_file(file.path, file.content, mode=file.mode)
        elif change.action == "unit":
            file = self.drop_in(self.observe(host))
            host.make_dir(os.path.dirname(DROP_IN), mode=0o755)
            host.write_file(file.path, file.content, mode=file.mode)
            host.check(["systemctl", "daemon-reload"], reason="systemd_failed", doing="Reading units anew", timeout=120)
        elif change.action == "configuration":
            self._write_configuration(host)
        elif change.action == "restore":
            former, found = host.read_bytes(self.layout.former), host.stat(self.layout.former)
            if former is not None and found is not None:
                host.write_file(self.layout.configuration, former, mode=found.mode, uid=found.uid, gid=found.gid)
                host.remove(self.layout.former)
        elif change.action == "remove":
            host.remove(change.what)
            if change.what == DROP_IN:
                host.check(
                    ["systemctl", "daemon-reload"], reason="systemd_failed", doing="Reading units anew", timeout=120
                )
            if self.wanted == "absent":
                host.remove(RECORD)
                host.remove(self.layout.state_file)
                for directory in (self.layout.directory, os.path.dirname(DROP_IN), os.path.dirname(STATE_PROGRAM)):
                    if not host.list_dir(directory):
                        host.remove(directory)
        elif change.action == "stop":
            host.check(
                ["systemctl", "disable", "--now", SERVICE],
                reason="service_failed",
                doing="Stopping HAProxy",
                remedy="See 'journalctl -u haproxy'.",
                timeout=120,
            )
        else:
            self._bring_up(host)

    def _install(self, host: Host) -> None:
        manager = self.manager(host)
        manager.repair()
        if not manager.available(PACKAGE):
            manager.refresh()
        for offer in manager.available(PACKAGE).get(PACKAGE, [])[:1]:
            check_version(offer.version)
        manager.install({PACKAGE: None})

    def _write_configuration(self, host: Host) -> None:
        """All files of the configuration, after HAProxy itself has accepted them at another place."""
        if self._before:
            return
        state = self.observe(host)
        directory = self.layout.directory + ".candidate"
        candidate = dataclasses.replace(self.layout, directory=directory, configuration=directory + "/haproxy.cfg")
        host.remove(directory)
        try:
            # The key of the certificate is in it.
            host.make_dir(directory, mode=0o700)
            for file in self.rendered(state, candidate)[1]:
                host.write_file(file.path, file.content, mode=file.mode)
            checked = host.run(["haproxy", "-c", "-f", candidate.configuration], timeout=60)
        finally:
            host.remove(directory)
        if not checked.ok:
            alerts = [line for line in checked.stderr.splitlines() if "[ALERT]" in line] or [checked.last_line()]
            said = re.sub(r"^\[ALERT\]\s*\S*\s*:?\s*", "", alerts[0]).replace(directory, self.layout.directory)
            raise FleetError(
                "configuration_refused",
                "HAProxy refuses the new configuration, and goes on with the one it has: %s. Correct the variable that it "
                "comes from and run again." % said.strip().rstrip("."),
                stderr=checked.stderr[-4000:].replace(directory, self.layout.directory),
            )
        host.make_dir(self.layout.directory, mode=0o755)
        self._keep_former(host)
        self._carry_notes(host, state)
        for file in self.rendered(state)[1]:
            content, found = host.read_bytes(file.path), host.stat(file.path)
            self._before[file.path] = None if content is None or found is None else (content, found.mode)
            if state.files.get(file.path) != FileState(file.content, file.mode):
                host.write_file(file.path, file.content, mode=file.mode)

    def _carry_notes(self, host: Host, state: GatewayState) -> None:
        """A server that was taken out by us is out in further backends too (gateway-state), and is ours there."""
        try:
            if not read_notes(host):
                return
        except FleetError:
            # The look has said it.
            return
        servers = state.files.get(self.layout.servers)
        before = {"/".join(line.split()[:2]) for line in (servers.content if servers else "").splitlines()}
        after = [
            "%s/%s" % (backend.name, server.name) for backend in self.settings.backends for server in backend.servers
        ]
        with self.locked():
            notes = read_notes(host)
            found = carried(notes, before, after)
            if found != notes:
                write_notes(host, found)

    def _keep_former(self, host: Host) -> None:
        """A configuration that is not ours is not lost: what has taken its place can be taken back."""
        content, found = host.read_bytes(self.layout.configuration), host.stat(self.layout.configuration)
        if content is not None and found is not None and not content.startswith(MARKER.encode()):
            host.write_file(self.layout.former, content, mode=found.mode, uid=found.uid, gid=found.gid)

    def _bring_up(self, host: Host) -> None:
        state = self.observe(host)
        version = self.rendered(state)[0]
        if not state.enabled:
            host.check(
                ["systemctl", "enable", SERVICE],
                reason="service_failed",
                doing="Having HAProxy started at boot",
                timeout=120,
            )
        if state.active and state.live == version:
            return
        verb = "reload" if state.active else "start"
        began = host.time()
        done = host.run(["systemctl", verb, SERVICE], timeout=120)
        if done.ok and self._answers(host, version):
            return
        said = self._last_words(host, began) or done.last_line()
        back = self._go_back(host, verb)
        raise FleetError(
            "reload_failed" if verb == "reload" else "start_failed",
            "HAProxy did not %s with the new configuration: %s. %s" % (verb, said.rstrip("."), back),
        )

    def _answers(self, host: Host, version: str) -> bool:
        deadline = host.monotonic() + RELOAD_SECONDS
        while self.api.version() != version:
            if host.monotonic() >= deadline:
                return False
            host.sleep(POLL_SECONDS)
        return True

    @staticmethod
    def _last_words(host: Host, since: float) -> str:
        """Why HAProxy failed, in its own words; ``since`` is in seconds since the epoch."""
        journal = host.run(
            ["journalctl", "--unit", SERVICE, "--since", "@%d" % since, "--output", "cat", "--no-pager"], timeout=30
        )
        # The first alert says what is wrong, the others that it was; that an old process has ended is one too.
        for line in journal.stdout.splitlines():
            if "[ALERT]" in line and " exited with code " not in line:
                return re.sub(r"^.*?\[ALERT\]\s*\S*\s*:?\s*", "", line).strip()
        return ""

    def _go_back(self, host: Host, verb: str) -> str:
        """Put the files back that a running HAProxy was started with, so that it also starts after a reboot."""
        if verb != "reload" or not self._before or self._before.get(self.layout.configuration) is None:
            return "Free what it needs, for example its port, and run again; see 'journalctl -u haproxy'."
        for path, found in self._before.items():
            if found is None:
                host.remove(path)
            else:
                host.write_file(path, found[0], mode=found[1])
        host.run(["systemctl", "reload", SERVICE], timeout=120)
        return (
            "The configuration that it had is back, and it goes on with that; free what it needs, for example its port, and "
            "run again."
        )


def answer(resource: NimGateway, state: GatewayState) -> t.Dict[str, t.Any]:
    """What the module returns of the last look."""
    return {
        "gateway": {
            "haproxy": state.version or "",
            "running": state.active,
            "configuration": state.live or "",
            "models": [
                {"name": name, "backend": backend.name, "servers": [server.name for server in backend.servers]}
                for backend in resource.settings.backends
                for name in backend.served
            ],
        }
    }
