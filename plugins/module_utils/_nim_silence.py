# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Whether a NIM that was ready and does not say so now serves no more, or is only busy.

A loaded NIM may leave questions about its health unanswered for as long as it computes, and a restart would cost it all
requests and minutes of loading. So a restart is called for only where one of these holds for :data:`SILENCE` seconds:

* nobody listens: every question was refused or hung up on;
* it says itself that it cannot serve (HTTP 500, 502 or 503: its engine is gone);
* it stands still: no answer, and the container used next to no processor time.

Any other answer is one of a server that is there, and what cannot be told is no cause.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import typing as t
import urllib.parse

from ._host import Host
from ._nim_endpoints import connect

#: Seconds for which one of them must hold, and for one answer.
SILENCE = 15.0
PROBE_SECONDS = 2.0
#: Share of one processor below which a container stands still.
STILL = 0.01

#: What vLLM, NIM and the proxy in NIM 2.x say when the engine is gone; a proxy that waits for a busy one says 504.
_GONE = (500, 502, 503)
_MUTE, _CLOSED = -1, 0


def why_silent(host: Host, address: str, pid: int) -> str:
    """Why a service that was ready has to be restarted; empty where it says that it is ready, or may be busy.

    Args:
        address: Where it tells its readiness.
        pid: A process of its container.
    """
    try:
        url = urllib.parse.urlsplit(address)
        port = url.port
    except ValueError:
        return ""
    if not url.hostname:
        return ""
    began, used = host.monotonic(), processor_seconds(host, pid)
    heard: list[int] = []
    while True:
        heard.append(_ask(url.scheme, url.hostname, port or 80, url.path or "/"))
        if heard[-1] not in (*_GONE, _MUTE, _CLOSED):
            return ""
        if _MUTE in heard:
            now = processor_seconds(host, pid)
            if used is None or now is None or now - used >= STILL * SILENCE:
                return ""
        if host.monotonic() - began >= SILENCE:
            return "it was ready, " + _words(heard)
        host.sleep(1.0)


def _words(heard: t.Sequence[int]) -> str:
    if _MUTE in heard:
        return "has not answered for %d seconds and has used no processor time" % SILENCE
    if heard[-1] == _CLOSED:
        return "and nobody has listened on its port for %d seconds" % SILENCE
    return "and has said for %d seconds that it cannot serve (HTTP %d)" % (SILENCE, heard[-1])


def _ask(scheme: str, address: str, port: int, path: str) -> int:
    """Status of the answer; ``_CLOSED`` or ``_MUTE`` where there is none."""
    try:
        with contextlib.closing(connect(scheme, address, port, PROBE_SECONDS)) as connection:
            connection.request("GET", path)
            return connection.getresponse().status
    except (socket.timeout, TimeoutError):
        return _MUTE
    except OSError:
        return _CLOSED
    except (http.client.HTTPException, UnicodeError):
        # Somebody talks, in whatever language; or our own file has a broken address, which is no sign of silence.
        return 200


def processor_seconds(host: Host, pid: int) -> float | None:
    """Processor time that the control group of a process has used, in seconds; None where it cannot be told."""
    for line in (host.read_text("/proc/%d/cgroup" % pid) or "").splitlines() if pid > 0 else ():
        _number, controllers, path = (line + "::").split(":", 3)[:3]
        if not controllers:
            for entry in (host.read_text("/sys/fs/cgroup%s/cpu.stat" % path) or "").splitlines():
                key, _space, value = entry.partition(" ")
                if key == "usage_usec" and value.isdigit():
                    return int(value) / 1e6
        elif "cpuacct" in controllers.split(","):
            text = (host.read_text("/sys/fs/cgroup/cpuacct%s/cpuacct.usage" % path) or "").strip()
            if text.isdigit():
                return int(text) / 1e9
    return None
