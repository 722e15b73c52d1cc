# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Who listens on the TCP ports of a host, and on which addresses it can be reached."""

from __future__ import annotations

import ipaddress
import re
import typing as t
from dataclasses import dataclass

from ._gpu_holders import parse_cgroup
from ._host import Host
from ._nim_models import addresses_overlap
from ._untrusted import is_digits

Json = t.Dict[str, t.Any]

#: Docker's process that listens on a published port. It is there a moment before its container, and outlives dockerd.
PROXY = "docker-proxy"


@dataclass(frozen=True)
class Listener:
    """Somebody who holds a TCP port.

    Attributes:
        leftover: Whether it is a docker-proxy that has outlived its container.
    """

    address: str
    port: int
    pid: int | None
    command: str
    container: str
    unit: str = ""
    leftover: bool = False

    @property
    def stray(self) -> bool:
        """Whether it is a docker-proxy of no container that runs."""
        return self.command == PROXY and not self.container

    def describe(self) -> str:
        """``docker-proxy (pid 812) of container old-nim``, ``nginx (pid 977) of unit nginx.service``."""
        if self.container and self.pid is None:
            return "container %s" % self.container
        process = "a process that cannot be seen" if self.pid is None else "%s (pid %d)" % (self.command, self.pid)
        if self.container:
            return "%s of container %s" % (process, self.container)
        return "%s of unit %s" % (process, self.unit) if self.unit else process


def listening_sockets(text: str, ipv6: bool) -> list[tuple[str, int, str]]:
    """Address, port and inode of every listener in ``/proc/net/tcp`` or ``tcp6`` (proc(5))."""
    found = []
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) < 10 or words[3] != "0A":
            continue
        address, _colon, port = words[1].partition(":")
        try:
            raw = bytes.fromhex(address)
            # Each group of four bytes is in the byte order of the machine, and all supported ones are little-endian.
            raw = b"".join(raw[start : start + 4][::-1] for start in range(0, len(raw), 4))
            ip = ipaddress.IPv6Address(raw) if ipv6 else ipaddress.IPv4Address(raw)
            mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
            number = int(port, 16)
        except ValueError:
            continue
        if 0 <= number <= 65535:
            found.append((str(mapped or ip), number, words[9]))
    return found


def own_addresses(fib_trie: str, if_inet6: str) -> tuple[str, ...]:
    """The addresses of the host, loopback included, out of ``/proc/net/fib_trie`` and ``/proc/net/if_inet6``."""
    found = re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", fib_trie)
    for line in if_inet6.splitlines():
        digits = line.split(" ", 1)[0]
        if re.match(r"[0-9a-f]{32}\Z", digits):
            found.append(str(ipaddress.IPv6Address(int(digits, 16))))
    return tuple(dict.fromkeys(found))


def find_listeners(
    host: Host, ports: t.Collection[int], containers: t.Sequence[Json], own: t.Collection[str] = ()
) -> tuple[Listener, ...]:
    """Who holds any of the ports.

    Args:
        containers: As Docker lists them.
        own: Names of containers whose ports need no process to explain them.
    """
    published = [
        (str(port.get("IP") or "0.0.0.0"), int(port["PublicPort"]), str(entry["Names"][0]).lstrip("/"))  # noqa: S104 - compared, not bound
        for entry in containers
        if entry.get("State") in ("running", "paused") and entry.get("Names")
        for port in entry.get("Ports") or []
        if port.get("PublicPort") in ports and port.get("Type") == "tcp"
    ]
    sockets = [
        found
        for path, ipv6 in (("/proc/net/tcp", False), ("/proc/net/tcp6", True))
        for found in listening_sockets(host.read_text(path) or "", ipv6)
        if found[1] in ports
    ]
    # Looking through all processes is slow, and the ports of our own containers need no explanation.
    explained = {port for _ip, port, name in published if name in own}
    unexplained = {inode for _address, port, inode in sockets if port not in explained}
    owners = _socket_owners(host, unexplained) if unexplained else {}
    names = {str(entry.get("Id", "")): str((entry.get("Names") or [""])[0]).lstrip("/") for entry in containers}
    found = []
    for address, port, inode in sockets:
        pid, command, unit, container_id = owners.get(inode, (None, "", "", ""))
        container = names.get(container_id, "")
        if not container:
            # docker-proxy listens outside of the container that it serves.
            container = next(
                (name for ip, public, name in published if public == port and addresses_overlap(ip, address)), ""
            )
        found.append(Listener(address, port, pid, command, container, unit))
    for address, port, name in published:
        # Without docker-proxy a published port is a rule of the packet filter only.
        if not any(known.port == port and known.container == name for known in found):
            found.append(Listener(address, port, None, "", name))
    return tuple(found)


def _socket_owners(host: Host, inodes: set[str]) -> dict[str, tuple[int, str, str, str]]:
    """Process id, command, unit and container id by socket inode."""
    wanted = {"socket:[%s]" % inode: inode for inode in inodes}
    found: dict[str, tuple[int, str, str, str]] = {}
    for entry in host.list_dir("/proc"):
        if not is_digits(entry):
            continue
        for descriptor in host.list_dir("/proc/%s/fd" % entry):
            inode = wanted.get(host.read_link("/proc/%s/fd/%s" % (entry, descriptor)) or "")
            if inode is not None and inode not in found:
                command = (host.read_text("/proc/%s/comm" % entry) or "?").strip()
                unit, container_id = parse_cgroup(host.read_text("/proc/%s/cgroup" % entry) or "")
                found[inode] = (int(entry), command, unit, container_id)
        if len(found) == len(wanted):
            break
    return found
