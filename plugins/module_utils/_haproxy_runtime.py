# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The runtime API of a HAProxy on this host, and what it says of servers.

Formats: HAProxy management guide, "show stat" (CSV) and "show servers state" (format 1).
"""

from __future__ import annotations

import csv
import http.client
import time
import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._gateway_state import ask, rows
from ._untrusted import is_digits, whole_number

ENABLED, DRAINED, MAINTENANCE = "enabled", "drained", "maintenance"

#: Bits of srv_admin_state: forced, inherited or configured maintenance, or for want of an address; forced or inherited drain.
_MAINTENANCE_BITS = 0x01 | 0x02 | 0x04 | 0x20
_DRAIN_BITS = 0x08 | 0x10

#: Seconds that the master process may say nothing.
MASTER_SECONDS = 10.0

PROBE_PATH = "/v1/health/ready"
PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class LiveServer:
    """A server as HAProxy sees it now.

    Attributes:
        state: What an operator made of it: ``enabled``, ``drained`` or ``maintenance``.
        status: HAProxy's own word: ``UP``, ``UP 1/2``, ``DOWN``, ``DRAIN``, ``MAINT``, ``no check``, …
        sessions: Requests that run on it or wait for it, those included that processes of before a reload still have.
        checked: Whether it has an active check.
        proven: Whether every check of late has passed; always false in maintenance, when nothing is checked.
        tls: Whether HAProxy speaks TLS to it.
        down: Whether its checks have failed; false in maintenance, when nothing is checked.
    """

    backend: str
    server: str
    address: str
    port: int
    state: str
    status: str
    sessions: int
    checked: bool
    proven: bool
    tls: bool = False
    down: bool = False

    @property
    def name(self) -> str:
        return "%s/%s" % (self.backend, self.server)

    @property
    def serving(self) -> bool:
        """Whether it gets new requests."""
        return self.state == ENABLED and _gets_requests(self.status)


class RuntimeApi:
    """HAProxy's runtime API over its UNIX socket.

    Args:
        path: The stats socket.
        master: The socket of the master process, through which the processes of before a reload can still be asked.
    """

    def __init__(self, path: str, master: str = "") -> None:
        self.path = path
        self.master = master

    def ask(self, command: str) -> str:
        """Answer to one command.

        Raises:
            FleetError: ``gateway_unreachable``.
        """
        try:
            return ask(self.path, command)
        except OSError as error:
            raise FleetError(
                "gateway_unreachable",
                "Asking HAProxy at %s failed: %s. Look whether it runs (systemctl status haproxy), and that its "
                "configuration has a stats socket of level admin there." % (self.path, error.strerror or error),
                socket=self.path,
            ) from error

    def set_state(self, server: LiveServer, word: str) -> None:
        """``ready``, ``drain`` or ``maint``.

        Raises:
            FleetError: ``gateway_unreachable``, or ``gateway_refused`` when HAProxy does not do it.
        """
        answer = self.ask("set server %s state %s" % (server.name, word)).strip()
        if answer:
            raise FleetError(
                "gateway_refused",
                "Setting server %s to %s failed: HAProxy says %s. The stats socket must be of level admin."
                % (server.name, word, answer.splitlines()[0]),
            )

    def servers(self) -> t.List[LiveServer]:
        """All servers of all backends."""
        _columns, states = rows(self.ask("show servers state"))
        stats = {(row.get("pxname"), row.get("svname")): row for row in _table(self.ask("show stat -1 4 -1"))}
        earlier = self._earlier_requests({row["srv_name"] for row in states})
        found = []
        for row in states:
            stat = stats.get((row["be_name"], row["srv_name"]))
            if stat is not None:
                found.append(_live(row, stat, earlier.pop(row["srv_name"], 0)))
        return found

    def _earlier_requests(self, names: t.Collection[str]) -> t.Dict[str, int]:
        """Name of a server -> requests that processes of before a reload have on it, or may still give to it.

        Such a process ends what it has begun. It cannot be told to drain a server any more ("Proxy is disabled"), so a request
        that it has taken in and not given to a server yet counts on every server that gets requests there.

        Raises:
            FleetError: ``gateway_unreachable`` when the master process does not say so for a while.
        """
        until = time.monotonic() + MASTER_SECONDS
        while True:
            try:
                return self._ask_earlier(names)
            except FileNotFoundError:
                # No master has a socket.
                return {}
            except OSError as error:
                # It starts anew for every reload. To believe it silent would end a drain while requests run.
                if time.monotonic() >= until:
                    raise FleetError(
                        "gateway_unreachable",
                        "Asking HAProxy's master process at %s for requests of before a reload failed: %s. Look at "
                        "'journalctl -u haproxy', and run again." % (self.master, error.strerror or error),
                        socket=self.master,
                    ) from error
                time.sleep(0.2)

    def _ask_earlier(self, names: t.Collection[str]) -> t.Dict[str, int]:
        found: t.Dict[str, int] = {}
        for process in self._earlier():
            table = _table(ask(self.master, "@!%s show stat -1 5 -1" % process))
            if not any(row.get("type") for row in table):
                # HAProxy 2.4 lists nothing of a process that is leaving but how many connections it has.
                info = ask(self.master, "@!%s show info" % process)
                connections = _info(info, "CurrConns")
                if not connections and process in self._earlier():
                    raise OSError("process %s says nothing" % process)
                for name in names:
                    found[name] = found.get(name, 0) + whole_number(connections)
                continue
            servers = [row for row in table if row.get("type") == "2"]
            taken = sum(whole_number(row.get("scur")) for row in table if row.get("type") == "0")
            undecided = max(0, taken - sum(_requests(row) for row in servers))
            for row in servers:
                name = row.get("svname") or ""
                count = _requests(row) + (undecided if _gets_requests(row.get("status") or "") else 0)
                found[name] = found.get(name, 0) + count
        return found

    def _earlier(self) -> t.List[str]:
        """Numbers of the processes of before a reload; none where there is no master to ask."""
        if not self.master:
            return []
        text = ask(self.master, "show proc")
        if "master" not in text:
            raise OSError("it lists no processes")
        lines = [line.split() for line in text.partition("# old workers")[2].partition("\n#")[0].splitlines()]
        return [words[0] for words in lines if words[1:2] == ["worker"] and is_digits(words[0])]

    def version(self) -> t.Optional[str]:
        """The description that the running process was configured with; None where no HAProxy answers."""
        try:
            answer = self.ask("show info")
        except FleetError:
            return None
        return _info(answer, "Description")


def _info(text: str, name: str) -> str:
    """One line of ``show info``; empty where it is not there."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip().lower() == name.lower():
            return value.strip()
    return ""


def _table(text: str) -> t.List[t.Dict[str, str]]:
    return list(csv.DictReader(text.lstrip("# \n").splitlines()))


def _gets_requests(status: str) -> bool:
    return status.startswith("UP") or status == "no check"


def _requests(stat: t.Mapping[str, str]) -> int:
    return whole_number(stat.get("scur")) + whole_number(stat.get("qcur"))


def _live(row: t.Mapping[str, str], stat: t.Mapping[str, str], earlier: int) -> LiveServer:
    bits = whole_number(row.get("srv_admin_state"))
    rise, fall, health = (whole_number(stat.get(name)) for name in ("check_rise", "check_fall", "check_health"))
    state = MAINTENANCE if bits & _MAINTENANCE_BITS else DRAINED if bits & _DRAIN_BITS else ENABLED
    checked = bool(stat.get("check_status"))
    # When checks begin again after maintenance, health begins one below the most: it takes a new success to get there.
    passed = (stat.get("check_status") or "").lstrip("* ").endswith("OK") and health >= rise + fall - 1 > 0
    stopped = whole_number(row.get("srv_op_state")) == 0
    return LiveServer(
        row["be_name"],
        row["srv_name"],
        row.get("srv_addr", "-"),
        whole_number(row.get("srv_port")),
        state,
        stat.get("status") or "",
        _requests(stat) + earlier,
        checked,
        state != MAINTENANCE and not stopped and (passed or not checked),
        row.get("srv_use_ssl") == "1",
        state != MAINTENANCE and stopped and checked,
    )


def probe(address: str, port: int) -> t.Optional[str]:
    """None when a NIM there says that it is ready; otherwise what it said, in a few words."""
    connection = http.client.HTTPConnection(address, port, timeout=PROBE_SECONDS)
    try:
        connection.request("GET", PROBE_PATH)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
    finally:
        connection.close()
    return None if status == 200 else "status %d" % status
