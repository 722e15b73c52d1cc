# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host in memory with a driver and a Docker, to which the container toolkit comes."""

from __future__ import annotations

import json
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nvidia_container_toolkit as tk
from ansible_collections.gpu_fleet.nim.plugins.module_utils._apt import Apt
from ansible_collections.gpu_fleet.nim.plugins.module_utils._cdi_spec import CDI_SPEC
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_container_toolkit_planner import HOOK
from ansible_collections.gpu_fleet.nim.plugins.module_utils._os_release import parse_os_release
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Outcome, converge
from docker_fakes import CONFIG, FakeApt, FakeDockerd
from fake_host import FakeHost

DRIVER = "580.95.05"
UUIDS = ("GPU-11111111-aaaa-bbbb-cccc-000000000001", "GPU-22222222-aaaa-bbbb-cccc-000000000002")
LISTED = "".join("GPU %d: NVIDIA H200 (UUID: %s)\n" % (number, uuid) for number, uuid in enumerate(UUIDS))
SPEC = "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ncontainerPath: /usr/lib/libcuda.so.%s\n"
CONFIG_TOML = '[nvidia-container-cli]\nload-kmods = true\n[nvidia-container-runtime]\n#debug = "x"\nmode = "%s"\nruntimes = ["runc"]\n'
OS = "ID=debian\nVERSION_ID=13\nVERSION_CODENAME=trixie\n"


class Machine:
    """A host with a driver and a Docker; the toolkit comes from the fake apt."""

    def __init__(self) -> None:
        self.host = FakeHost({"/etc/os-release": OS, "/bin/sh": b"\x7fELF sh", "/lib/libc.so.6": b"\x7fELF c"})
        self.host.files["/usr/bin/nvidia-smi"] = b"\x7fELF smi"
        self.host.files["/sys/module/nvidia/version"] = (DRIVER + "\n").encode()
        self.dockerd = FakeDockerd(self.host)
        self.dockerd.add_container("other")
        self.dockerd.live = {"live-restore": True}
        self.host.files[CONFIG] = b'{"live-restore": true}'
        self.apt = FakeApt(self.host)
        self.apt.offers = {name: ["1.20.0-1", "1.17.8-1"] for name in tk.PACKAGES}
        self.apt.installed_hook = self._installed
        self.units = False
        self.container: t.Callable[[tuple[str, ...]], tuple[int, str, str]] = lambda argv: (0, LISTED, "")
        self.containers = 0
        self.refresh = "inactive"
        self.refreshes = 0
        self.host.commands.update(
            {
                "/usr/bin/nvidia-smi -L": LISTED,
                "ldd *": "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/libc.so.6 (0x2)\n\tlibnvidia-ml.so.1 => /lib/libnvidia-ml.so.1 (0x3)\n",
                "nvidia-ctk config --in-place --set nvidia-container-runtime.mode=*": self._set_mode,
                "docker import *": "sha256:1\n",
                "docker rm *": "",
                "docker rmi *": "",
                "docker run *": self._run_container,
                "systemctl show *nvidia-cdi-refresh*": self._show,
                "systemctl restart nvidia-cdi-refresh.service": self._refresh,
                "systemctl enable --now nvidia-cdi-refresh.path": self._refresh,
                "stat -c %Z *": "0\n",
            }
        )

    def _installed(self, name: str, version: str) -> None:
        if name == "nvidia-container-toolkit-base":
            self.host.files["/usr/bin/nvidia-container-runtime"] = b""
            self.host.files[HOOK] = b""
            self.units = version >= "1.18"
            self.host.files.setdefault(tk.CONFIG, (CONFIG_TOML % "auto").encode())
            self._refresh()

    def _set_mode(self, host: FakeHost, argv: tuple[str, ...], *_: t.Any) -> str:
        host.files[tk.CONFIG] = (CONFIG_TOML % argv[-1].partition("=")[2]).encode()
        return ""

    def _show(self, *_: t.Any) -> str:
        if not self.units:
            return "LoadState=not-found\nUnitFileState=\nActiveState=inactive\n"
        return "LoadState=loaded\nUnitFileState=enabled\nActiveState=%s\n" % (
            self.refresh if _[1][-1].endswith(".service") else "active"
        )

    def _refresh(self, *_: t.Any) -> str:
        self.refreshes += 1
        self.refresh = "inactive"
        if self.units:
            self.host.files[CDI_SPEC] = (SPEC % DRIVER).encode()
        return ""

    def _run_container(self, host: FakeHost, argv: tuple[str, ...], *_: t.Any) -> tuple[int, str, str]:
        self.containers += 1
        return self.container(argv)

    def ready(self, version: str = "1.20.0-1", mode: str = "auto") -> Machine:
        """Everything in place and proved."""
        release = parse_os_release(OS)
        resource = tk.NvidiaContainerToolkit(api=self.dockerd)
        path, content = Apt(self.host).repository_content(resource.repository(release, "x86_64"))
        self.host.files[path] = content.encode()
        self.host.files["/etc/apt/keyrings/nvidia-container-toolkit.gpg"] = b"\x99" + bytes(40)
        for name in tk.PACKAGES:
            self.apt.put(name, version, True)
            self._installed(name, version)
        self.host.files[tk.CONFIG] = (CONFIG_TOML % mode).encode()
        document = {"live-restore": True, "runtimes": {"nvidia": {"path": "nvidia-container-runtime"}}}
        self.host.files[CONFIG] = json.dumps(document).encode()
        self.dockerd.live = document
        self.host.make_dir("/run/gpu_fleet/validations", mode=0o755)
        key = resource._key(resource.observe(self.host))
        self.host.files[tk.VALIDATION] = json.dumps({"key": key, "gpus": list(UUIDS)}).encode()
        self.refreshes = 0
        return self

    def run(self, check: bool = False, **options: t.Any) -> Outcome[tk.ToolkitState]:
        return converge(self.host, tk.NvidiaContainerToolkit(api=self.dockerd, **options), check_mode=check)

    def whats(self, check: bool = False, **options: t.Any) -> list[str]:
        return [change.what for change in self.run(check, **options).changes]
