# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Which servers of a gateway were taken out by us: a note on the gateway, ``BACKEND/SERVER`` -> state that was given.

A server that is out without such a note is somebody else's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import typing as t

from ._host import Host
from ._own_state import read_own_state
from ._untrusted import MapOf

RECORD = "/var/lib/gpu_fleet/gateway-servers.json"
LOCK = "/run/gpu_fleet/gateway-servers.lock"

Notes = t.Dict[str, str]


@contextlib.contextmanager
def locked(path: str = LOCK) -> t.Iterator[None]:
    """Two runs at once must not drain the last two servers of a model, each counting on the other."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    with open(path, "w", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def read_notes(host: Host) -> Notes:
    """The notes; empty where there are none.

    Raises:
        FleetError: ``state_unreadable`` when the file is broken; it is left as it is.
    """
    remedy = "without it every server that is out counts as somebody else's, who enables it in HAProxy (set server NAME state ready)"
    found = read_own_state(host, RECORD, {"servers": MapOf(str)}, remedy) or {"servers": {}}
    return {name: str(state) for name, state in found["servers"].items()}


def write_notes(host: Host, notes: t.Mapping[str, str]) -> None:
    host.make_dir(os.path.dirname(RECORD), mode=0o755)
    text = json.dumps({"version": 1, "servers": notes}, indent=1, sort_keys=True) + "\n"
    host.write_file(RECORD, text, mode=0o644)


def server_part(name: str) -> str:
    """``HOST:MODEL`` of ``BACKEND/HOST:MODEL``."""
    return name.rpartition("/")[2]


def carried(notes: t.Mapping[str, str], before: t.Collection[str], after: t.Iterable[str]) -> Notes:
    """The notes when servers get further backends, in which they begin as they are in the ones that they have.

    Args:
        before: ``BACKEND/SERVER`` of all servers until now.
        after: The same from now on.
    """
    found = dict(notes)
    # In ascending order, so that maintenance wins over drain, as it does for the server itself.
    of_server = {server_part(name): state for name, state in sorted(notes.items(), key=lambda item: item[1])}
    for name in after:
        if name not in before and name not in found and server_part(name) in of_server:
            found[name] = of_server[server_part(name)]
    return found
