# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""An Ubuntu host with a GPU in memory: packages, kernel modules, services, and what the commands do to them."""

from __future__ import annotations

import re
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._nouveau import BLACKLIST, BLACKLIST_CONTENT
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_packages import apt_preferences
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_planner import UNATTENDED_CONTENT
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_state import PREFERENCES, UNATTENDED
from fake_host import FakeHost

KERNEL = "6.8.0-45-generic"
URL = "https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2404/x86_64"
VERSIONS = {
    "535": ["535.183.06"],
    "555": ["555.42.06"],
    "580": ["580.65.06", "580.82.07", "580.95.05"],
    "595": ["595.45.04"],
}


def modinfo(version: str, licence: str) -> str:
    """What modinfo says of the driver's module: the fields in the order of the file, as the kernel's build wrote them."""
    fields = ["filename:       /lib/modules/%s/updates/dkms/nvidia.ko" % KERNEL, "alias:          char-major-195-*"]
    fields += ["version:        %s" % version, "supported:      external"]
    fields += ["license:        %s" % licence] if licence else []
    fields += ["srcversion:     0A1B2C3D4E5F60718293A4B", "depends:        ", "name:           nvidia"]
    return "\n".join([*fields, "parm:           NVreg_Version:license: version: (charp)"]) + "\n"


class DriverWorld(FakeHost):
    """Holds the state that the commands act on.

    Attributes:
        packages: name -> [version, status letters as dpkg writes them].
        unit_state: unit -> [active state, enabled state].
        refuses: Module name -> what rmmod says when it must not go.
        load_error: What modprobe nvidia says; empty when it works.
        build_fails: Driver version that dkms cannot build.
        fail_install: Number of apt transactions to fail.
        loads_itself: Whatever is installed asks for the driver, which loads it.
        module: Version of the module on disk; empty for none.
        flavour: Its flavour.
    """

    def __init__(self, gpus: int = 1, device: str = "0x2335") -> None:
        super().__init__()
        self.release = KERNEL
        self.packages: dict[str, list[str]] = {}
        self.unit_state: dict[str, list[str]] = {}
        self.refuses: dict[str, str] = {}
        self.load_error = ""
        self.build_fails = ""
        self.fail_install = 0
        self.can_unload = True
        self.loads_itself = False
        self.module = ""
        self.flavour = "open"
        self.kernel_log = ""
        self.files["/etc/os-release"] = (
            b'ID=ubuntu\nVERSION_ID="24.04"\nVERSION_CODENAME=noble\nID_LIKE=debian\nPRETTY_NAME="Ubuntu 24.04"\n'
        )
        self.files["/proc/sys/kernel/random/boot_id"] = b"boot-1\n"
        for number in range(gpus):
            base = "/sys/bus/pci/devices/0000:0%d:00.0/" % number
            self.files[base + "vendor"] = b"0x10de\n"
            self.files[base + "class"] = b"0x030200\n"
            self.files[base + "device"] = device.encode() + b"\n"
        self.dirs |= {
            "/etc/apt/sources.list.d",
            "/etc/apt/preferences.d",
            "/etc/apt/apt.conf.d",
            "/etc/modprobe.d",
            "/etc/apt/keyrings",
            "/run",
        }
        self.commands = {
            "dpkg-query *": self._dpkg_query,
            "apt-cache madison *": self._madison,
            "apt-get *": self._apt_get,
            "apt-mark *": self._apt_mark,
            "dpkg --force-confdef *": self._configure,
            "modinfo *": self._modinfo,
            "dkms *": self._dkms,
            "rmmod *": self._rmmod,
            "modprobe *": self._modprobe,
            "systemctl *": self._systemctl,
            "journalctl *": lambda _host, argv, _stdin, _env: self.kernel_log,
            "update-initramfs *": "",
            "nvidia-smi *": (9, "NVIDIA-SMI has failed", ""),
        }

    # -- shortcuts for tests

    def install_driver(self, version: str, *, loaded: bool = True, held: bool = True, flavour: str = "-open") -> None:
        """The state after a finished installation of this collection."""
        self._unpack("nvidia-open-%s" % version[:3] if flavour else "cuda-drivers-%s" % version[:3], version, held)
        self.module, self.flavour = version, "open" if flavour else "proprietary"
        self.dirs.add("/lib/modules/%s/build" % KERNEL)
        if loaded:
            self.load(version)

    def load(self, version: str, flavour: str = "") -> None:
        is_open = (flavour or self.flavour) == "open"
        name = "Open Kernel Module for x86_64" if is_open else "x86_64 Kernel Module"
        self.files["/proc/driver/nvidia/version"] = (
            "NVRM version: NVIDIA UNIX %s  %s  Release Build  (b@)\n" % (name, version)
        ).encode()
        for name in ("nvidia", "nvidia_uvm", "nvidia_modeset"):
            self.files["/sys/module/%s/initstate" % name] = b"live\n"
            if self.can_unload:
                self.files["/sys/module/%s/refcnt" % name] = b"0\n"
        self.files["/sys/module/nvidia/version"] = version.encode() + b"\n"

    def hold_gpu(self, pid: int, unit: str, command: str = "python3") -> None:
        self.links["/proc/%d/fd/3" % pid] = "/dev/nvidia0"
        self.files["/proc/%d/cmdline" % pid] = command.encode() + b"\0"
        self.files["/proc/%d/cgroup" % pid] = ("0::/system.slice/%s\n" % unit).encode()

    def release_gpu(self, pid: int) -> None:
        del self.links["/proc/%d/fd/3" % pid]

    def configured(self) -> None:
        """Everything of the role that is not a package, as an earlier run left it."""
        self.files["/etc/apt/sources.list.d/nvidia-cuda.sources"] = (
            "# Managed by gpu_fleet.nim.\nTypes: deb\nURIs: %s\nSuites: /\nSigned-By: /etc/apt/keyrings/nvidia-cuda.gpg\n"
            % URL
        ).encode()
        self.files["/etc/apt/keyrings/nvidia-cuda.gpg"] = b"\x99\x01key"
        self.files[PREFERENCES] = apt_preferences("580", "").encode()
        self.files[BLACKLIST] = BLACKLIST_CONTENT.encode()
        self.files[UNATTENDED] = UNATTENDED_CONTENT.encode()

    def ran(self, pattern: str) -> list[str]:
        """Commands that match a regular expression, in order."""
        return [line for line in (" ".join(call) for call in self.calls) if re.search(pattern, line)]

    # -- what the commands do

    def _unpack(self, name: str, version: str, held: bool = False) -> None:
        revision = version + ("-0ubuntu1" if int(version[:3]) < 590 else "-1ubuntu1")
        suffix = "-" + version[:3] if int(version[:3]) < 590 else ""
        flavour = "-open" if "open" in name else ""
        parts = [name, "nvidia-driver%s%s" % (suffix, flavour), "nvidia-dkms%s%s" % (suffix, flavour)]
        parts += ["libnvidia-compute" + suffix, "nvidia-utils" + suffix]
        for part in parts:
            self.packages[part] = [revision, "hi" if held else "ii"]

    def _dpkg_query(self, _host: t.Any, argv: tuple[str, ...], _stdin: t.Any, _env: t.Any) -> str:
        if "${Version}" in argv[2]:
            return "".join("%s\t%s\tamd64\t%s \n" % (name, *values) for name, values in sorted(self.packages.items()))
        return "".join("%s\t%s \n" % (name, values[1]) for name, values in sorted(self.packages.items()))

    def _madison(self, _host: t.Any, argv: tuple[str, ...], _stdin: t.Any, _env: t.Any) -> str:
        lines = []
        for name in argv[2:]:
            branch = re.search(r"-(\d{3})(-open)?$", name)
            for number, versions in VERSIONS.items():
                if name == "nvidia-driver-pinning-" + number and number == "595":
                    lines.append("%s | %s-1 | %s Packages" % (name, number, URL))
                if "pinning" in name or (branch.group(1) if branch else "595") != number:
                    continue
                if branch is None and name not in (
                    "nvidia-open",
                    "cuda-drivers",
                    "nvidia-fabricmanager",
                    "libnvidia-nscq",
                ):
                    continue
                for version in versions:
                    revision = "-0ubuntu1" if number < "590" else "-1ubuntu1"
                    lines.append("%s | %s%s | %s Packages" % (name, version, revision, URL))
        if "nvidia-fabricmanager" in argv:
            lines += [
                "%s | 580.95.05-1 | %s Packages" % (name, URL) for name in ("nvidia-fabricmanager", "libnvidia-nscq")
            ]
        return "\n".join(lines) + "\n"

    def _apt_get(self, _host: t.Any, argv: tuple[str, ...], _stdin: t.Any, _env: t.Any) -> t.Any:
        if "--download-only" in argv or "update" in argv:
            return ""
        if "-s" in argv:
            return "".join("Purg %s [1]\n" % name for name in argv[5:])
        if "purge" in argv:
            for name in argv[argv.index("purge") + 1 :]:
                self.packages.pop(name, None)
            return ""
        wanted = [
            word
            for word in argv[argv.index("install") + 1 :]
            if not word.startswith("-") and "::" not in word and word != "-o"
        ]
        if self.fail_install:
            self.fail_install -= 1
            return (100, "", "E: Sub-process /usr/bin/dpkg returned an error code (1)\n")
        for word in wanted:
            name, dummy, version = word.partition("=")
            self.packages[name] = [version or "1", "ii"]
            if name.startswith("linux-headers"):
                self.dirs.add("/lib/modules/%s/build" % KERNEL)
            if re.match(r"nvidia-open|cuda-drivers", name):
                plain = version.split("-")[0]
                self._unpack(name, plain)
                if plain == self.build_fails:
                    self.module = ""
                    for part in (name, "nvidia-dkms-%s-open" % plain[:3]):
                        self.packages[part][1] = "iF"
                    log = "/var/lib/dkms/nvidia/%s/build/make.log" % plain
                    self.files[log] = b"CC nv.o\nnv.c:12:3: error: implicit declaration of function 'follow_pfn'\n"
                    return (
                        100,
                        "Error! Bad return status\nConsult %s for more information.\n" % log,
                        "E: dkms failed\n",
                    )
                self.module, self.flavour = plain, "open" if "open" in name else "proprietary"
                if self.loads_itself and not self.exists("/sys/module/nvidia/version"):
                    self.load(plain)
        return ""

    def _apt_mark(self, _host: t.Any, argv: tuple[str, ...], _stdin: t.Any, _env: t.Any) -> str:
        for name in argv[2:]:
            self.packages[name][1] = ("h" if argv[1] == "hold" else "i") + self.packages[name][1][1]
        return ""

    def _configure(self, _host: t.Any, _argv: tuple[str, ...], _stdin: t.Any, _env: t.Any) -> t.Any:
        for values in self.packages.values():
            if values[1][1] in "UF":
                if values[0].startswith(self.build_fails or "none"):
                    return (1, "", "dpkg: error processing package nvidia-dkms-580-open (--configure):\n")
                values[1] = values[1][0] + "i"
                self.module = values[0].split("-")[0]
        return ""

    def _modinfo(self, _host: t.Any, argv: tuple[str, ...], _stdin: t.Any, _env: t.Any) -> t.Any:
        if self.module and argv[-1] == "nvidia":
            return modinfo(self.module, {"open": "Dual MIT/GPL", "proprietary": "NVIDIA"}.get(self.flavour, ""))
        return (1, "", "modinfo: ERROR: Module %s not found.\n" % argv[-1])

    def _dkms(self, _host: t.Any, argv: tuple[str, ...], _stdin: t.Any, _env: t.Any) -> t.Any:
        built = [values[0].split("-")[0] for name, values in self.packages.items() if name.startswith("nvidia-dkms")]
        if argv[1] == "status":
            return "".join("nvidia/%s: added\n" % version for version in built)
        if not self.exists("/lib/modules/%s/build" % KERNEL):
            return (21, "", "Error! Your kernel headers for kernel %s cannot be found at /lib/modules\n" % KERNEL)
        if built and built[0] != self.build_fails:
            self.module = built[0]
            return ""
        return (11, "", "Error! One or more modules failed to install during autoinstall.\n")

    def _rmmod(self, _host: t.Any, argv: tuple[str, ...], _stdin: t.Any, _env: t.Any) -> t.Any:
        name = argv[1]
        if name in self.refuses:
            return (1, "", "rmmod: ERROR: " + self.refuses[name])
        self.remove("/sys/module/" + name)
        if name == "nvidia":
            self.remove("/proc/driver/nvidia")
        return ""

    def _modprobe(self, _host: t.Any, argv: tuple[str, ...], _stdin: t.Any, _env: t.Any) -> t.Any:
        if argv[1] == "nvidia":
            if self.load_error:
                return (1, "", "modprobe: ERROR: could not insert 'nvidia': " + self.load_error)
            self.load(self.module)
        return ""

    def _systemctl(self, _host: t.Any, argv: tuple[str, ...], _stdin: t.Any, _env: t.Any) -> t.Any:
        verb, units = argv[1], [word for word in argv[2:] if word.endswith((".service", ".path", ".target"))]
        if verb == "is-active":
            return (3, "\n".join(self.unit_state.get(unit, ["inactive", ""])[0] for unit in units) + "\n", "")
        if verb == "is-enabled":
            return "\n".join(self.unit_state.get(unit, ["", "not-found"])[1] for unit in units) + "\n"
        if verb == "show":
            states = [self.unit_state.get(unit, ["inactive", ""]) for unit in units]
            return "\n".join("ActiveState=%s\nUnitFileState=%s\n" % (state[0], state[1]) for state in states)
        for unit in units:
            if unit in self.refuses and verb in ("stop", "start"):
                return (1, "", self.refuses[unit])
            state = self.unit_state.setdefault(unit, ["inactive", "enabled"])
            if verb in ("start", "stop"):
                state[0] = "active" if verb == "start" else "inactive"
            if verb == "enable":
                state[1] = "enabled"
        return ""
