# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A gateway in memory: its package, systemd and HAProxy's runtime API."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._haproxy_runtime import LiveServer
from ansible_collections.gpu_fleet.nim.plugins.module_utils._packages import Available, Package
from fake_host import FakeHost

CONFIGURATION = "/etc/haproxy/haproxy.cfg"
DEFAULT = "global\n    daemon\n"
#: As Debian and Ubuntu have it.
FRAGMENT = """[Service]
Environment="CONFIG=/etc/haproxy/haproxy.cfg" "PIDFILE=/run/haproxy.pid" "EXTRAOPTS=-S /run/haproxy-master.sock"
ExecStart=/usr/sbin/haproxy -Ws -f $CONFIG -p $PIDFILE $EXTRAOPTS
ExecReload=/usr/sbin/haproxy -Ws -f $CONFIG -c -q
ExecReload=/bin/kill -USR2 $MAINPID
"""


class Packages:
    def __init__(self, gateway: GatewayHost) -> None:
        self.gateway = gateway

    def installed(self, *names: str) -> dict[str, Package]:
        version = self.gateway.version
        return {"haproxy": Package("haproxy", version)} if version else {}

    def available(self, *names: str) -> dict[str, list[Available]]:
        return {"haproxy": [Available("haproxy", self.gateway.offer)]} if self.gateway.indexed else {}

    def refresh(self) -> None:
        self.gateway.indexed = True

    def repair(self) -> None:
        pass

    def install(self, wanted: t.Mapping[str, t.Optional[str]]) -> None:
        gateway = self.gateway
        gateway.version = gateway.offer
        gateway.files[CONFIGURATION] = DEFAULT.encode()
        gateway.files["/lib/systemd/system/haproxy.service"] = FRAGMENT.encode()
        # As on Debian: the package starts it.
        gateway.active, gateway.enabled, gateway.live = True, True, ""


class GatewayHost(FakeHost):
    """A host whose systemd and HAProxy do what they are told; ``busy`` is a port that somebody else holds."""

    def __init__(self, version: str = "") -> None:
        super().__init__()
        self.version = ""
        self.offer = "3.0.11-1"
        self.indexed = False
        self.active = self.enabled = False
        self.masked = False
        self.live: str | None = None
        self.busy = ""
        self.refused = ""
        self.reloads = 0
        self.dirs |= {"/etc/haproxy", "/etc/systemd/system", "/var/lib/haproxy"}
        self.commands = {
            "systemctl show *": self.show,
            "systemctl daemon-reload": "",
            "systemctl enable haproxy.service": self.enable,
            "systemctl disable --now haproxy.service": self.stop,
            "systemctl reload haproxy.service": self.reload,
            "systemctl start haproxy.service": self.reload,
            "dpkg-query --show *": lambda *args: (
                " %s %s\n" % (CONFIGURATION, hashlib.md5(DEFAULT.encode()).hexdigest())  # noqa: S324 - dpkg's own
            ),
            "md5sum *": lambda *args: (
                "%s  %s\n"
                % (
                    hashlib.md5(self.files[CONFIGURATION]).hexdigest(),  # noqa: S324 - as above
                    CONFIGURATION,
                )
            ),
            "haproxy -c -f *": self.check_configuration,
            "journalctl --unit haproxy.service --since @1000000 *": (
                "[ALERT]    (1) : Current worker (1422) exited with code 143 (Terminated)\n"
                "[ALERT]    (1) : Binding [/etc/haproxy/haproxy.cfg:40]: cannot bind socket [0.0.0.0:8080]\n"
                "[ALERT]    (1) : Some protocols failed to start their listeners! Exiting.\n"
            ),
        }
        if version:
            self.offer = version
            Packages(self).install({})

    def listen(self, address: str, port: int, unit: str, command: str) -> None:
        """A process, with the port's number, that listens; ``address`` as in /proc/net/tcp, no unit where none is known."""
        head = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        line = "0: %s:%04X 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 %d 1\n" % (
            address,
            port,
            1000 + port,
        )
        self.files["/proc/net/tcp"] = self.files.get("/proc/net/tcp", head) + line.encode()
        self.links["/proc/%d/fd/3" % port] = "socket:[%d]" % (1000 + port)
        self.files["/proc/%d/comm" % port] = command.encode()
        self.files["/proc/%d/cgroup" % port] = ("0::/system.slice/%s\n" % unit if unit else "0::/\n").encode()

    def show(self, *args: t.Any) -> str:
        if not self.version:
            return "LoadState=not-found\nActiveState=inactive\nUnitFileState=\n"
        return "LoadState=%s\nActiveState=%s\nUnitFileState=%s\nNeedDaemonReload=no\nFragmentPath=%s\n" % (
            "masked" if self.masked else "loaded",
            "active" if self.active else "inactive",
            "enabled" if self.enabled else "disabled",
            "/lib/systemd/system/haproxy.service",
        )

    def enable(self, *args: t.Any) -> str:
        self.enabled = True
        return ""

    def stop(self, *args: t.Any) -> str:
        self.active = self.enabled = False
        self.live = None
        return ""

    def check_configuration(self, host: FakeHost, argv: t.Sequence[str], *rest: t.Any) -> tuple[int, str, str]:
        assert argv[-1] == "/etc/haproxy/nim.candidate/haproxy.cfg"
        assert self.modes["/etc/haproxy/nim.candidate"][0] == 0o700
        text = self.files[argv[-1]].decode()
        for path in re.findall(r"/etc/haproxy/nim[^ )]*", text):
            assert path in self.files, path
        return (1, "", "[NOTICE] x\n[ALERT]    (9) : config : %s\n" % self.refused) if self.refused else (0, "", "")

    def reload(self, *args: t.Any) -> str:
        self.reloads += 1
        text = self.files[CONFIGURATION].decode()
        if self.busy and ":%s" % self.busy in text:
            return ""
        self.active = True
        self.live = re.findall(r"description (\S+)", text)[0]
        return ""


class Api:
    def __init__(self, host: GatewayHost) -> None:
        self.host = host

    def version(self) -> str | None:
        return self.host.live


def options(**more: t.Any) -> dict[str, t.Any]:
    hosts = [
        {"name": name, "address": address, "models": [{"name": "llama", "port": 8000, "served": ["meta/llama"]}]}
        for name, address in (("gpu01", "10.0.0.1"), ("gpu02", "gpu02.example.org"))
    ]
    return {"hosts": hosts, **more}


class Runtime:
    """Runtime API of a HAProxy with these servers; whatever is drained is idle at once."""

    STATES: t.ClassVar[dict[str, tuple[str, str]]] = {
        "ready": ("enabled", "UP"),
        "drain": ("drained", "DRAIN"),
        "maint": ("maintenance", "MAINT"),
    }

    def __init__(self, *servers: LiveServer) -> None:
        self.live = list(servers)

    def servers(self) -> list[LiveServer]:
        return list(self.live)

    def set_state(self, server: LiveServer, word: str) -> None:
        state, status = self.STATES[word]
        self.live = [
            dataclasses.replace(entry, state=state, status=status) if entry.name == server.name else entry
            for entry in self.live
        ]
