# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host in memory on which Docker Engine is installed: apt, and a dockerd that runs once there is one."""

from __future__ import annotations

import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._apt import Apt
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_engine import DockerEngine
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_engine_planner import EngineState
from ansible_collections.gpu_fleet.nim.plugins.module_utils._os_release import parse_os_release
from ansible_collections.gpu_fleet.nim.plugins.module_utils._package_versions import upstream_version
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Outcome, converge
from docker_fakes import FakeApt, FakeDockerd
from fake_host import FakeHost

CE = ("docker-ce", "docker-ce-cli", "containerd.io")
UBUNTU = 'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\nVERSION_CODENAME=noble\nPRETTY_NAME="Ubuntu 24.04"\n'


def ce(version: str) -> str:
    return "5:%s-1~ubuntu.24.04~noble" % version


class Machine:
    """A host with apt, and a dockerd that runs once an engine is installed."""

    def __init__(self, *, running: bool = False, version: str = "26.1.5") -> None:
        self.host = FakeHost({"/etc/os-release": UBUNTU})
        self.dockerd = FakeDockerd(self.host, version=version)
        self.dockerd.active = self.dockerd.enabled = running
        self.apt = FakeApt(self.host)
        self.apt.offers = {
            "docker-ce": [ce("29.5.1"), ce("29.4.3"), ce("28.3.3"), ce("22.0.1")],
            "docker-ce-cli": [ce("29.5.1"), ce("29.4.3"), ce("28.3.3"), ce("22.0.1")],
            "containerd.io": ["1.7.27-1"],
            "docker.io": ["26.1.5+dfsg1-9"],
            "docker-cli": ["26.1.5+dfsg1-9"],
        }
        self.apt.installed_hook = self._installed
        self.host.commands.update(
            {
                "systemctl enable docker.service": lambda *_: setattr(self.dockerd, "enabled", True) or "",
                "systemctl show *docker.socket": "LoadState=loaded\n",
            }
        )

    def _installed(self, name: str, version: str) -> None:
        if name in ("docker-ce", "docker.io"):
            if self.dockerd.active:
                self.dockerd._restart()
            self.dockerd.active = self.dockerd.enabled = True
            self.dockerd.engine = upstream_version(version)
        if name in ("docker-ce-cli", "docker-cli"):
            self.host.files["/usr/bin/docker"] = b""

    def have(self, *, held: bool = True, **packages: str) -> None:
        for name, version in packages.items():
            self.apt.put(
                name.replace("_", "-").replace("containerd-io", "containerd.io").replace("docker-io", "docker.io"),
                version,
                held,
            )
        self.host.files["/usr/bin/docker"] = b""

    def run(self, check: bool = False, **options: t.Any) -> Outcome[EngineState]:
        return converge(self.host, DockerEngine(api=self.dockerd, **options), check_mode=check)


def installed(machine: Machine, version: str = "28.3.3", **more: t.Any) -> Machine:
    machine.dockerd.active = machine.dockerd.enabled = True
    machine.dockerd.engine = version
    path, content = Apt(machine.host).repository_content(DockerEngine().repository(parse_os_release(UBUNTU)))
    machine.host.files[path] = content.encode()
    machine.host.files["/etc/apt/keyrings/docker.gpg"] = b"\x99" + bytes(40)
    machine.host.files["/var/lib/apt/lists/download.docker.com_linux_ubuntu_dists_noble_stable_Packages"] = b""
    machine.have(docker_ce=ce(version), docker_ce_cli=ce(version), containerd_io="1.7.27-1", **more)
    machine.have(python3_docker="7.1.0-2", held=False)
    return machine
