# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A dockerd in memory that reloads and restarts as the real one was measured to do, behind a FakeHost."""

from __future__ import annotations

import fnmatch
import json
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_api import DockerApi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._packages import Package
from fake_host import FakeHost

CONFIG = "/etc/docker/daemon.json"
PID = 4242


class FakeDockerd(DockerApi):
    """The live daemon: its configuration is what it read last, by reload or restart, with the rules of each."""

    def __init__(self, host: FakeHost, version: str = "26.1.5+dfsg1", argv: t.Sequence[str] = ()) -> None:
        super().__init__()
        self.host = host
        self.engine = version
        self.pid = PID
        self.active = True
        self.masked = False
        self.enabled = True
        self.argv = ["/usr/bin/dockerd", "-H", "fd://", *argv]
        self.live: dict[str, t.Any] = {}
        self.running: dict[str, dict[str, t.Any]] = {}
        self.reload_times: list[float] = []
        self.reloads = 0
        self.restarts = 0
        self.reject_reload = False
        self.refuse_start: t.Callable[[dict[str, t.Any]], bool] = lambda document: False
        self.swarm = "inactive"
        self.required_by = ""
        self.log = ""
        self.validate: t.Callable[[str], tuple[int, str, str]] = lambda text: (0, "configuration OK", "")
        host.dirs |= {"/etc/docker", "/run", "/var/lib", "/etc"}
        host.files["/usr/bin/dockerd"] = b""
        host.files["/proc/%d/cmdline" % PID] = "\0".join(self.argv).encode() + b"\0"
        host.commands.update(
            {
                "systemctl show *docker.service": lambda *_: self._show(),
                "systemctl reload docker.service": lambda *_: self._reload(),
                "systemctl restart docker.service": lambda *_: self._restart(),
                "systemctl start docker.service": lambda *_: self._start(),
                "systemctl reset-failed *": "",
                "systemctl is-active *": "active\n",
                "journalctl *": lambda *_: self.log,
                "dockerd --validate --config-file *": lambda host, argv, *_: self.validate(host.read_text(argv[3])),
            }
        )

    # -- how the host sees it

    def _show(self) -> str:
        return (
            "LoadState=%s\nUnitFileState=%s\nActiveState=%s\nMainPID=%d\nFragmentPath=/lib/systemd/system/docker.service\n"
            "DropInPaths=\nRequiredBy=%s\nBoundBy=\nExecStart={ path=/usr/bin/dockerd ; argv[]=%s ; ignore_errors=no ; }\n"
            % (
                "masked" if self.masked else "loaded",
                "enabled" if self.enabled else "disabled",
                "active" if self.active else "inactive",
                self.pid if self.active else 0,
                self.required_by,
                " ".join(self.argv),
            )
        )

    def _document(self) -> dict[str, t.Any]:
        return t.cast("dict[str, t.Any]", json.loads(self.host.read_text(CONFIG) or "{}"))

    def _reload(self) -> tuple[int, str, str]:
        self.reloads += 1
        document = self._document()
        default = document.get("default-runtime", self.live.get("default-runtime", "runc"))
        runtimes = document.get("runtimes", self.live.get("runtimes", {}))
        if self.reject_reload or (default != "runc" and default not in runtimes):
            self.log = "time=x level=error msg=\"specified default runtime '%s' does not exist\"" % default
            return 0, "", ""
        for key in ("runtimes", "default-runtime", "live-restore", "debug", "labels"):
            if key in document:
                self.live[key] = document[key]
        features = dict(document.get("features", {}))
        old = self.live.get("features", {})
        for name in ("cdi", "containerd-snapshotter"):
            features.pop(name, None)
            if name in old:
                features[name] = old[name]
        self.live["features"] = features
        self.reload_times.append(self.host.clock)
        return 0, "", ""

    def _restart(self) -> tuple[int, str, str]:
        self.restarts += 1
        keep = bool(self.live.get("live-restore"))
        self.pid += 1
        self.host.files["/proc/%d/cmdline" % self.pid] = "\0".join(self.argv).encode() + b"\0"
        if not keep:
            for container in self.running.values():
                container["State"] = {"Running": True, "StartedAt": "later", "Pid": 1}
        return self._start()

    def _start(self) -> tuple[int, str, str]:
        document = self._document()
        if self.refuse_start(document):
            self.active = False
            self.log = "failed to start daemon: unknown log driver"
            return 1, "", "Job for docker.service failed."
        self.active = True
        self.live = document
        return 0, "", ""

    def add_container(self, name: str, *, auto_remove: bool = False) -> None:
        self.running["id-" + name] = {
            "Id": "id-" + name,
            "Names": ["/" + name],
            "State": {"Running": True, "StartedAt": "early", "Pid": 100 + len(self.running)},
            "HostConfig": {"AutoRemove": auto_remove},
        }

    # -- the API

    def get(self, path: str, parameters: t.Mapping[str, str] | None = None) -> t.Any:
        if not self.active:
            raise FleetError("docker_unavailable", "Docker is away.")
        if path == "/_ping":
            return "OK"
        if path == "/info":
            runtimes = {"runc": {"path": "runc"}, "io.containerd.runc.v2": {"path": "runc"}}
            runtimes.update(self.live.get("runtimes", {}))
            return {
                "ServerVersion": self.engine,
                "Runtimes": runtimes,
                "DefaultRuntime": self.live.get("default-runtime", "runc"),
                "LiveRestoreEnabled": self.live.get("live-restore", False),
                "LoggingDriver": self.live.get("log-driver", "json-file"),
                "CgroupDriver": "systemd",
                "Plugins": {"Log": ["json-file", "journald", "local", "rejected"]},
                "Debug": self.live.get("debug", False),
                "Labels": self.live.get("labels", []),
                "CDISpecDirs": ["/etc/cdi"] if self.live.get("features", {}).get("cdi") else [],
                "DriverStatus": [["Backing Filesystem", "extfs"]],
                "Swarm": {"LocalNodeState": self.swarm},
            }
        if path == "/events":
            assert parameters is not None
            since = float(parameters["since"])
            return "\n".join("{}" for moment in self.reload_times if moment >= since) or ""
        if path == "/containers/json":
            # The list has the state in a word, the container itself in detail.
            return [dict(container, State="running") for container in self.running.values()]
        if path.startswith("/containers/"):
            return self.running.get(path.split("/")[2])
        return None


class FakeApt:
    """dpkg and apt in memory: what is installed, what is on offer, and the lists that an update brings."""

    def __init__(self, host: FakeHost) -> None:
        self.host = host
        self.packages: dict[str, Package] = {}
        self.offers: dict[str, list[str]] = {}
        self.update: tuple[int, str, str] = (0, "", "")
        self.install_answer: tuple[int, str, str] | None = None
        self.installed_hook: t.Callable[[str, str], None] = lambda name, version: None
        host.dirs |= {"/etc/apt", "/etc/apt/sources.list.d", "/var/lib/apt/lists"}
        # Looks into files under patterns of their own first: the order of patterns decides.
        host.commands.update(
            {
                "dpkg-query -W *": lambda _, argv, *__: self._query(argv),
                "dpkg *--configure -a": lambda *_: self._configure(),
                "apt-cache madison *": lambda _, argv, *__: self._madison(argv[2:]),
                "apt-get * update *": lambda *_: self.update,
                "apt-get * install *": lambda _, argv, *__: self._install(argv),
                "apt-mark hold *": lambda _, argv, *__: self._mark(argv[2:], True),
                "apt-mark unhold *": lambda _, argv, *__: self._mark(argv[2:], False),
            }
        )

    def put(self, name: str, version: str, held: bool = False, complete: bool = True) -> None:
        self.packages[name] = Package(name, version, "amd64", complete, held)

    def _query(self, argv: tuple[str, ...]) -> str:
        form, wanted = argv[2], argv[3:]
        lines = []
        for package in self.packages.values():
            if wanted and not any(fnmatch.fnmatchcase(package.name, pattern) for pattern in wanted):
                continue
            status = "%s%s " % ("h" if package.held else "i", "i" if package.complete else "U")
            fields = [package.name, package.version, package.architecture, status]
            lines.append("\t".join(fields if "Version" in form else [fields[0], fields[3]]) + "\n")
        return "".join(lines)

    def _configure(self) -> str:
        for name, package in list(self.packages.items()):
            self.put(name, package.version, package.held)
        return ""

    def _madison(self, names: tuple[str, ...]) -> str:
        return "".join(
            " %s | %s | https://somewhere noble/stable amd64 Packages\n" % (name, version)
            for name in names
            for version in self.offers.get(name, [])
        )

    def _install(self, argv: tuple[str, ...]) -> tuple[int, str, str]:
        if self.install_answer:
            return self.install_answer
        for word in argv[argv.index("install") + 1 :]:
            if word.startswith("-") or "::" in word:
                continue
            name, dummy, version = word.partition("=")
            if name not in self.offers:
                return 100, "", "E: Unable to locate package %s" % name
            # Like apt: whoever is told to change a held package loses its hold.
            self.put(name, version or self.offers[name][0])
            self.installed_hook(name, version or self.offers[name][0])
        return 0, "", ""

    def _mark(self, names: tuple[str, ...], held: bool) -> str:
        for name in names:
            package = self.packages[name]
            self.put(name, package.version, held, package.complete)
        return ""
