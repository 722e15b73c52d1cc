# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Take a GPU host's servers out of a gateway and bring them back: drain, maintenance, enable.

What this does is noted on the gateway, server by server. A server that is drained or in maintenance without such a note is
somebody else's, and is never enabled here.
"""

from __future__ import annotations

import sys
import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._gateway_notes import Notes, locked, read_notes, server_part, write_notes
from ._gateway_settings import Layout, host_of, safe_host
from ._haproxy_runtime import DRAINED, ENABLED, MAINTENANCE, LiveServer, RuntimeApi, probe
from ._host import Host
from ._resource import Change, Resource

STATE_PROGRAM = "/usr/local/libexec/nim/gateway-state"

#: Seconds between two looks while requests end or checks pass.
POLL_SECONDS = 0.5
#: What HAProxy calls each state when it is told to take it.
WORDS = {ENABLED: "ready", DRAINED: "drain", MAINTENANCE: "maint"}


SERVER_OPTIONS: t.Dict[str, t.Dict[str, t.Any]] = {
    "host": {"type": "str", "required": True},
    "state": {"type": "str", "choices": [DRAINED, MAINTENANCE, ENABLED], "required": True},
    "timeout": {"type": "int", "default": 300},
    "socket": {"type": "path", "default": Layout.socket},
    "master_socket": {"type": "path", "default": Layout.master_socket},
    "allow_last": {"type": "bool", "default": False},
    "ignore_unknown": {"type": "bool", "default": False},
    "models": {"type": "list", "elements": "str"},
}


@dataclass(frozen=True)
class GatewayServers:
    """Servers of all hosts, and which of them were taken out by us: name -> state that was given."""

    servers: t.Tuple[LiveServer, ...]
    ours: t.Mapping[str, str]

    def of(self, host: str) -> t.List[LiveServer]:
        return [server for server in self.servers if host_of(server.server) == safe_host(host)]

    def current_notes(self) -> Notes:
        """The notes without those of servers that somebody else has enabled since, or that are gone.

        Whoever takes such a server out the next time is not us.
        """
        enabled = {server.name for server in self.servers if server.state == ENABLED}
        there = {server.server for server in self.servers}
        return {name: state for name, state in self.ours.items() if name not in enabled and server_part(name) in there}

    def is_foreign(self, server: LiveServer) -> bool:
        """Whether somebody else took it out, or put what we had drained into maintenance."""
        given = self.ours.get(server.name)
        # On its way into maintenance a server of ours is drained.
        return server.state != ENABLED and given != server.state and (given, server.state) != (MAINTENANCE, DRAINED)


class HaproxyServer(Resource[GatewayServers]):
    """All servers of one GPU host in one gateway.

    Args:
        host: The GPU host as the inventory names it.
        state: ``drained`` (nothing new, running requests end), ``maintenance`` (the same, and not checked) or ``enabled``.
        timeout: Seconds that running requests, or checks, may take.
        socket: HAProxy's stats socket.
        master_socket: That of its master process.
        allow_last: Whether the last server of a model that serves may be taken out.
        ignore_unknown: Whether a host that the gateway does not know is fine.
        models: Those that are waited for and enabled, by their names in ``nim_models``; None for all. Of the others, servers whose
            checks fail are enabled too: they get nothing until they are ready, and would be forgotten otherwise.
    """

    name = "haproxy_server"
    layout = Layout()

    def __init__(
        self,
        host: str,
        state: str,
        timeout: int = 300,
        socket: str = Layout.socket,
        master_socket: str = Layout.master_socket,
        allow_last: bool = False,
        ignore_unknown: bool = False,
        models: t.Optional[t.Sequence[str]] = None,
    ) -> None:
        if not host:
            raise FleetError("invalid_option", "host = '': empty; name the GPU host as the inventory does.")
        if timeout < 0:
            raise FleetError("invalid_option", "timeout = %d: negative; give seconds, 0 for no wait." % timeout)
        self.host = host
        self.wanted = state
        self.timeout = timeout
        self.socket = socket
        self.allow_last = allow_last
        self.ignore_unknown = ignore_unknown
        self.models = models
        self.api = RuntimeApi(socket, master_socket)
        self.probe = probe
        self.locked: t.Callable[[], t.ContextManager[None]] = locked

    # -- look -------------------------------------------------------------------------------------

    def observe(self, host: Host) -> GatewayServers:
        return GatewayServers(tuple(self.api.servers()), read_notes(host))

    # -- plan -------------------------------------------------------------------------------------

    def plan(self, state: GatewayServers) -> t.List[Change]:
        own = state.of(self.host)
        if not own and not self.ignore_unknown:
            raise FleetError(
                "unknown_host",
                "No server of %s is in the gateway at %s; name the host as the inventory does, and run role nim_gateway "
                "after its models have changed." % (self.host, self.socket),
                host=self.host,
                servers=[],
            )
        return self._plan_enable(state, own) if self.wanted == ENABLED else self._plan_out(state, own)

    def _change(self, server: LiveServer, to: str, why: str, blocked: t.Optional[str] = None) -> Change:
        return Change(
            self.name,
            "server " + server.name,
            server.state,
            to,
            why,
            action=to,
            data={"server": server},
            blocked=blocked,
        )

    def _plan_enable(self, state: GatewayServers, own: t.Sequence[LiveServer]) -> t.List[Change]:
        changes: t.List[Change] = []
        for server in own:
            if not self._waited_for(server) and not (server.state == DRAINED and server.down):
                continue
            if state.is_foreign(server):
                changes.append(
                    self._change(
                        server,
                        ENABLED,
                        "its host is to serve again",
                        "somebody else put it in %s; whoever did may enable it (set server %s state ready)"
                        % ("maintenance" if server.state == MAINTENANCE else "drain", server.name),
                    )
                )
            elif server.state != ENABLED:
                changes.append(self._change(server, ENABLED, "its host is to serve again"))
            elif server.name in state.ours:
                what = "note on server " + server.name
                why = "somebody else has enabled it"
                changes.append(Change(self.name, what, state.ours[server.name], None, why, action="forget", proof=True))
        mine = [change.data["server"] for change in changes if change.action == ENABLED and not change.blocked]
        mine = [server for server in mine if self._waited_for(server)]
        if mine:
            proof = Change(
                self.name,
                "readiness of " + ", ".join(server.name for server in mine),
                None,
                "ready",
                "HAProxy gives requests to a server as soon as it is enabled",
                action="prove",
                data={"servers": mine},
                proof=True,
            )
            changes.insert(0, proof)
        return changes

    def _waited_for(self, server: LiveServer) -> bool:
        return self.models is None or server.server.rpartition(":")[2] in self.models

    def _plan_out(self, state: GatewayServers, own: t.Sequence[LiveServer]) -> t.List[Change]:
        drains = [server for server in own if server.state == ENABLED]
        self._check_last(state, drains)
        changes = [self._change(server, DRAINED, "nothing new is to begin on it") for server in drains]
        if self.wanted == DRAINED:
            # Checks go on in a drained server, so its readiness is known again before it is enabled.
            changes += [
                self._change(server, DRAINED, "it is to be checked again")
                for server in own
                if server.state == MAINTENANCE and not state.is_foreign(server)
            ]
        running = sum(server.sessions for server in own)
        if running or drains:
            changes.append(
                Change(
                    self.name,
                    "requests on %s" % self.host,
                    running,
                    0,
                    "running requests end by themselves",
                    action="wait",
                    proof=True,
                )
            )
        if self.wanted == MAINTENANCE:
            for server in own:
                foreign = server.state == DRAINED and state.is_foreign(server)
                if server.state != MAINTENANCE:
                    changes.append(
                        self._change(
                            server,
                            MAINTENANCE,
                            "it is not to be checked while it is worked on",
                            "somebody else drained it, and it stays as it is" if foreign else None,
                        )
                    )
        return changes

    def _check_last(
        self,
        state: GatewayServers,
        drains: t.Sequence[LiveServer],
        refuses: t.Callable[[LiveServer], t.Optional[str]] = lambda server: None,
    ) -> None:
        """Refuse to take away the last server that serves a model.

        Args:
            refuses: Why a server that HAProxy gives requests may not count all the same.
        """
        if self.allow_last:
            return
        for server in drains:
            others = [
                other
                for other in state.servers
                if other.backend == server.backend and other.serving and host_of(other.server) != host_of(server.server)
            ]
            said = []
            for other in others:
                why = refuses(other)
                if why is None:
                    break
                said.append("%s does not say that it is ready: %s" % (other.name, why))
            else:
                if server.serving:
                    raise FleetError(
                        "last_server",
                        "Server %s is the last one that serves %s%s, so draining it would refuse every request for that model; "
                        "bring another replica up first, or allow it (allow_last: true)."
                        % (server.name, server.backend, " (%s)" % "; ".join(said) if said else ""),
                        backend=server.backend,
                        server=server.server,
                    )

    # -- apply ------------------------------------------------------------------------------------

    def apply(self, host: Host, change: Change) -> None:
        if change.action == "wait":
            self._wait(host)
        elif change.action == "forget":
            self._forget(host)
        elif change.action == "prove":
            self._prove(host, [server.name for server in change.data["servers"]])
        else:
            self._set(host, change.data["server"].name, change.action)

    def _set(self, host: Host, name: str, to: str) -> None:
        with self.locked():
            state = self.observe(host)
            server = next((server for server in state.servers if server.name == name), None)
            if server is None or server.state == to:
                return
            if state.is_foreign(server):
                # Since the first look: from now on it is another's.
                return
            if server.state == ENABLED:
                # HAProxy's checks of the others are seconds old. All servers of the host at once, so that it is all or nothing.
                drains = [own for own in state.of(self.host) if own.state == ENABLED]
                self._check_last(state, drains, self._asked)
            # Further out is noted before it is done, and back afterwards: a run that breaks off in between leaves no server
            # that would be taken for somebody else's.
            further = server.state == ENABLED or to == MAINTENANCE
            ours = {other: given for other, given in state.current_notes().items() if other != name}
            if to != ENABLED:
                ours[name] = to
            if further:
                write_notes(host, ours)
            self.api.set_state(server, WORDS[to])
            if not further:
                write_notes(host, ours)
            self._keep(host)

    def _forget(self, host: Host) -> None:
        with self.locked():
            state = self.observe(host)
            write_notes(host, state.current_notes())

    def _keep(self, host: Host) -> None:
        """Also a HAProxy that is killed must come back with this server out. Reloads and stops keep the state themselves."""
        if host.exists(STATE_PROGRAM):
            host.run(
                [sys.executable, STATE_PROGRAM, self.socket, self.layout.servers, self.layout.state_file], timeout=30
            )

    def _wait(self, host: Host) -> None:
        deadline = host.monotonic() + self.timeout
        idle = 0
        while True:
            own = self.observe(host).of(self.host)
            running = sum(server.sessions for server in own)
            idle = idle + 1 if running == 0 else 0
            # Twice: a request may just have been given to the server and not been counted yet.
            if idle == 2:
                return
            if running and host.monotonic() >= deadline:
                raise FleetError(
                    "drain_timeout",
                    "%d requests still run on %s after %d seconds of draining; it stays drained: wait longer (timeout), or "
                    "end them by stopping its models." % (running, self.host, self.timeout),
                    drained=False,
                    servers=describe(own),
                )
            host.sleep(POLL_SECONDS)

    def _prove(self, host: Host, names: t.Sequence[str]) -> None:
        for server in self.observe(host).servers:
            if server.name in names and server.state == MAINTENANCE:
                # Nothing is checked in maintenance, and enabling it would be believing it.
                self._set(host, server.name, DRAINED)
        deadline = host.monotonic() + self.timeout
        while True:
            servers = [server for server in self.observe(host).servers if server.name in names]
            doubts = [(server, self._doubt(server)) for server in servers]
            if not any(doubt for _server, doubt in doubts):
                return
            if host.monotonic() >= deadline:
                said = "; ".join("%s: %s" % (server.name, doubt) for server, doubt in doubts if doubt)
                raise FleetError(
                    "not_ready",
                    "%s is not enabled, because not all of its servers were ready after %d seconds: %s. It stays drained; "
                    "look at its models and run again." % (self.host, self.timeout, said),
                    drained=True,
                    servers=describe(servers),
                )
            host.sleep(POLL_SECONDS)

    def _doubt(self, server: LiveServer) -> t.Optional[str]:
        """Why a server may not serve yet. HAProxy's checks are seconds old, so it is asked itself too."""
        if server.checked and not server.proven:
            return "the gateway's checks have not passed"
        return self._asked(server)

    def _asked(self, server: LiveServer) -> t.Optional[str]:
        """What a server says that is not ready; one that cannot be asked is as its checks say."""
        if server.tls or server.address == "-":
            return None if server.checked else "it cannot be asked"
        return self.probe(server.address, server.port)


def describe(servers: t.Iterable[LiveServer]) -> t.List[t.Dict[str, t.Any]]:
    """Servers as the module returns them."""
    return [
        {
            "backend": server.backend,
            "server": server.server,
            "state": server.state,
            "status": server.status,
            "sessions": server.sessions,
        }
        for server in servers
    ]


def answer(state: GatewayServers, host: str) -> t.Dict[str, t.Any]:
    """What the module returns of the last look."""
    own = state.of(host)
    return {
        "servers": describe(own),
        "drained": all(server.state != ENABLED and server.sessions == 0 for server in own),
        "reason": "foreign_drain" if any(state.is_foreign(server) for server in own) else "",
    }
