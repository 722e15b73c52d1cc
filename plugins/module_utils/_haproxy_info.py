# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What a gateway says of its servers, and what it has counted since its process began.

A reload is a new process, which counts from nothing; the one before goes on with the requests that it has, and is gone with its
counts when they have ended. So the counts go with the process that they are of.
"""

from __future__ import annotations

import csv
import typing as t

from ._gateway_settings import host_of
from ._haproxy_server import GatewayServers, HaproxyServer
from ._host import Host

#: Columns of "show stat" (management guide, 9.1) of a backend: a stream that the server breaks off is counted with its
#: status 200 and in srv_abrt; one whose client leaves is in cli_abrt alone.
_COUNTS = {"requests": "req_tot", "failed": "hrsp_5xx", "truncated": "srv_abrt", "left": "cli_abrt"}


def observe_gateway(host: Host, socket: str) -> dict[str, t.Any]:
    """Servers and counts of the HAProxy behind a stats socket.

    Raises:
        FleetError: ``gateway_unreachable``, ``state_unreadable``.
    """
    look = HaproxyServer("-", "enabled", socket=socket)
    state = look.observe(host)
    return {
        "servers": servers_of(state),
        "process": process_of(look.api.ask("show info")),
        "traffic": traffic_of(look.api.ask("show stat -1 2 -1")),
        "at": round(host.time(), 1),
    }


def servers_of(state: GatewayServers) -> list[dict[str, t.Any]]:
    return [
        {
            "backend": server.backend,
            "server": server.server,
            "host": host_of(server.server),
            "model": server.server.rpartition(":")[2],
            "port": server.port,
            "state": server.state,
            "status": server.status,
            "serving": server.serving,
            "foreign": state.is_foreign(server),
            "sessions": server.sessions,
        }
        for server in state.servers
    ]


def process_of(text: str) -> str:
    """Name of the process that answers: changes with every reload and restart."""
    found = {name.strip().lower(): value.strip() for name, _colon, value in map(_split, text.splitlines())}
    return "pid %s since %s" % (found.get("pid", "?"), found.get("start_time_sec", "?"))


def _split(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def traffic_of(text: str) -> list[dict[str, t.Any]]:
    """Counts of each backend since the process began."""
    rows = csv.DictReader(text.lstrip("# \n").splitlines())
    return [
        {"backend": row.get("pxname") or "", **{name: _number(row.get(column)) for name, column in _COUNTS.items()}}
        for row in rows
        if row.get("svname") == "BACKEND"
    ]


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
