# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host that serves two NIMs on an old driver, in memory: it can be killed after any step, and rebooted."""

from __future__ import annotations

import json
import pathlib
import re
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils import _driver_upgrade, _driver_upgrade_planner
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_api import DockerApi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_upgrade import DriverUpgrade
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_upgrade_record import Record, read_record
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import CommandResult
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_paths import MAINTENANCE_FILE
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_state import on_disk_version
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import RESOURCE_OPTIONS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Outcome, converge
from driver_world import KERNEL, DriverWorld

SMI = pathlib.Path(__file__).parent / "fixtures" / "nvidia-smi" / "h200-x1.xml"
_QUESTION = re.compile(
    r"dpkg-query|apt-cache|apt-get -s|modinfo|journalctl|nvidia-smi|dkms status|systemctl (show|is-active|is-enabled)"
)
GOALS = ("prestaged", "drained", "ready", "returned")
IMAGE = "nvcr.io/nim/meta/llama@sha256:" + "1" * 64
SERVICES = ("llama", "qwen")


class KilledError(BaseException):
    """The process is gone; no handler of the product may catch it."""


class Docker(DockerApi):
    """Containers run while the unit does."""

    def __init__(self, world: UpgradeWorld) -> None:
        super().__init__()
        self.world = world
        self.environment = ["NVIDIA_REQUIRE_CUDA=cuda>=12.0"]
        self.ids: dict[str, str] = {}
        self.strangers: dict[str, dict[str, t.Any]] = {}
        self.up = True

    def available(self) -> bool:
        return self.up

    def containers(self, all: bool = True, labels: t.Sequence[str] = ()) -> list[dict[str, t.Any]]:
        if not self.up:
            raise FleetError("docker_unavailable", "Docker does not answer.")
        names = ["nim-" + name for name in SERVICES if self.world.is_active("nim-%s.service" % name)]
        return [{"Id": self.ids.get(name, name), "Names": ["/" + name]} for name in (*names, *self.strangers)]

    def container(self, name: str) -> dict[str, t.Any] | None:
        name = next((known for known, number in self.ids.items() if number == name), name)
        if name in self.strangers:
            return self.strangers[name]
        running = self.world.is_active("%s.service" % name)
        return {"State": {"Running": running}} if name[4:] in SERVICES else None

    def image(self, reference: str) -> dict[str, t.Any] | None:
        return {"Config": {"Env": self.environment}} if reference == IMAGE else None


class UpgradeWorld(DriverWorld):
    """Attributes:
    kill_after: Number of commands and writes after which the process is gone; None for never.
    nim_fails_on: Driver version on which no NIM becomes ready.
    sick: Services that never become ready.
    broken: Driver version whose packages cannot be installed.
    runs: Numbers of the runs where each has a name of its own.
    """

    def __init__(self, old: str = "555.42.06") -> None:
        super().__init__()
        self.steps = 0
        self.kill_after: int | None = None
        self.nim_fails_on = ""
        self.sick: set[str] = set()
        self.broken = ""
        self.runs: t.Iterator[int] | None = None
        self.gpus_of: dict[str, int] = {}
        self.install_driver(old)
        self.configured()
        # As the role leaves it for that branch.
        if old.startswith("595"):
            self.packages["nvidia-driver-pinning-595"] = ["595-1", "ii"]
        self.unit_state.update(
            {
                "nvidia-persistenced.service": ["active", "enabled"],
                "nvidia-cdi-refresh.path": ["active", "enabled"],
                "nvidia-dcgm.service": ["active", "disabled"],
            }
        )
        self.dirs |= {"/etc/nim", "/var/lib/nim", "/var/lib/dkms", "/usr"}
        for number, name in enumerate(SERVICES):
            self.unit_state["nim-%s.service" % name] = ["active", "enabled"]
            self.files["/etc/nim/%s.json" % name] = json.dumps(
                {
                    "name": name,
                    "image": "nvcr.io/nim/meta/llama:1.8.4",
                    "create": ["--runtime=nvidia", IMAGE],
                    "ready_url": "http://127.0.0.1:%d/v1/health/ready" % (8000 + number),
                    "stop_timeout": 60,
                }
            ).encode()
        self.commands = {
            "nvidia-smi -q -x": self._smi,
            "nvidia-smi -L": "GPU 0: NVIDIA H200 (UUID: GPU-1)\n",
            "systemctl show --property=*": self._show_units,
            "docker stop *": "",
            **{key: value for key, value in self.commands.items() if key != "nvidia-smi *"},
        }
        self.docker = Docker(self)
        self.requests: list[str] = []

    def without(self, text: str) -> None:
        """Take offers away from the repository."""
        madison = self.commands["apt-cache madison *"]
        assert callable(madison)
        self.commands["apt-cache madison *"] = lambda *arguments: "\n".join(
            line for line in madison(*arguments).splitlines() if text not in line
        )

    # -- what tests ask

    def is_active(self, unit: str) -> bool:
        return self.unit_state.get(unit, [""])[0] == "active"

    @property
    def loaded(self) -> str:
        return (self.read_text("/sys/module/nvidia/version") or "").strip()

    @property
    def loaded_flavour(self) -> str:
        return (
            "open" if "Open Kernel Module" in (self.read_text("/proc/driver/nvidia/version") or "") else "proprietary"
        )

    def serves(self) -> bool:
        """Whether both services run on a driver that is loaded and is the installed one."""
        return (
            all(self.is_active("nim-%s.service" % name) for name in SERVICES)
            and bool(self.loaded)
            and self.loaded == self.module
            and not self.exists(MAINTENANCE_FILE)
        )

    def end(self) -> dict[str, t.Any]:
        """What must be the same however often the upgrade was interrupted."""
        return {
            "loaded": self.loaded,
            "on_disk": self.module,
            "packages": {name: tuple(value) for name, value in sorted(self.packages.items())},
            "units": {name: value[0] for name, value in sorted(self.unit_state.items())},
            "maintenance": self.exists(MAINTENANCE_FILE),
            "reboot marker": self.exists("/var/lib/gpu_fleet/driver-reboot.json"),
        }

    def reboot(self) -> None:
        boot = int(self.files["/proc/sys/kernel/random/boot_id"].split(b"-")[1]) + 1
        self.files["/proc/sys/kernel/random/boot_id"] = b"boot-%d\n" % boot
        for path in [path for path in self.files if path.startswith("/run/")]:
            del self.files[path]
        self.remove("/proc/driver/nvidia")
        self.remove("/sys/module")
        if self.module:
            self.load(self.module)
        for unit, state in self.unit_state.items():
            starts = state[1] == "enabled" and not (unit.startswith("nim-") and self.exists(MAINTENANCE_FILE))
            state[0] = "active" if starts else "inactive"

    # -- a process that dies

    def _step(self) -> None:
        self.steps += 1
        if self.kill_after is not None and self.steps >= self.kill_after:
            raise KilledError

    def run(self, argv: t.Sequence[str], **more: t.Any) -> CommandResult:
        result = super().run(argv, **more)
        # To be killed after a question is to be killed after the change before it.
        if not _QUESTION.match(" ".join(argv)):
            self._step()
        return result

    def write_file(self, path: str, content: str | bytes, *, mode: int, uid: int = 0, gid: int = 0) -> None:
        super().write_file(path, content, mode=mode, uid=uid, gid=gid)
        self._step()

    def remove(self, path: str) -> None:
        super().remove(path)
        if path.startswith(("/run/", "/var/")):
            self._step()

    # -- what the commands do

    def _smi(self, *_: t.Any) -> t.Any:
        if not self.loaded or self.loaded != self.module:
            return (18, "Failed to initialize NVML: Driver/library version mismatch\n", "")
        text = SMI.read_text()
        if self.gpus_of.get(self.loaded) == 0:
            text = re.sub(r"(?s)<gpu id=.*?</gpu>", "", text)
        return re.sub(r"<driver_version>.*?<", "<driver_version>%s<" % self.loaded, text)

    def _show_units(self, _host: t.Any, argv: tuple[str, ...], _stdin: t.Any, _env: t.Any) -> str:
        blocks = []
        for unit in argv[3:]:
            state = self.unit_state.get(unit, ["inactive", ""])
            blocks.append("Id=%s\nLoadState=loaded\nActiveState=%s\nSubState=running\n" % (unit, state[0]))
        return "\n".join(blocks)

    def _apt_get(self, host: t.Any, argv: tuple[str, ...], stdin: t.Any, env: t.Any) -> t.Any:
        if self.broken and any("=%s" % self.broken in word for word in argv) and "--download-only" not in argv:
            # Unpacked as far as it went.
            return (100, "", "E: Sub-process /usr/bin/dpkg returned an error code (1)\n")
        if "install" in argv and "--download-only" not in argv:
            assert not self.loaded or not self.can_unload, "packages changed under a loaded driver"
        if "purge" in argv and "-s" not in argv and any("dkms" in word for word in argv):
            self.module = ""
        return super()._apt_get(host, argv, stdin, env)

    def _systemctl(self, host: t.Any, argv: tuple[str, ...], stdin: t.Any, env: t.Any) -> t.Any:
        units = [word for word in argv[2:] if word.startswith("nim-")]
        if argv[1] == "start" and units:
            assert not self.exists(MAINTENANCE_FILE), "started under maintenance"
            assert self.loaded and self.loaded == self.module, "started without its driver"
        return super()._systemctl(host, argv, stdin, env)


def options(branch: str = "580", **more: t.Any) -> dict[str, t.Any]:
    """Options of module nvidia_driver with their defaults."""
    return {
        **{name: option.get("default") for name, option in RESOURCE_OPTIONS["nvidia_driver"].items()},
        "branch": branch,
        **more,
    }


def upgrade(world: UpgradeWorld, branch: str = "580", flavour: str = "auto", **more: t.Any) -> DriverUpgrade:
    return DriverUpgrade(driver=options(branch, flavour=flavour), api=world.docker, **more)


def install_fakes(monkeypatch: t.Any, world: UpgradeWorld) -> None:
    """What needs a network: requests to the services, and a container with GPUs."""

    def wait_ready(host: t.Any, _api: t.Any, services: t.Any, names: t.Any, _models: t.Any, tell: t.Any) -> None:
        for service in services:
            if service.name in names:
                assert world.is_active(service.unit), "%s was never started" % service.unit
                assert world.loaded == on_disk_version(world, KERNEL)
                if world.loaded == world.nim_fails_on or service.name in world.sick:
                    raise FleetError("start_timeout", "Model %s is not ready after 1800 seconds." % service.name)
                world.requests.append(service.name)
        tell("all ready")

    def run_gpu_container(host: t.Any, injection: str, smi: str) -> tuple[str, ...]:
        assert world.loaded == world.module
        return ("GPU-1",)

    def serving(host: t.Any, _api: t.Any, services: t.Any) -> tuple[str, ...]:
        return tuple(service.name for service in services if service.active and service.name not in world.sick)

    monkeypatch.setattr(_driver_upgrade, "wait_ready", wait_ready)
    monkeypatch.setattr(_driver_upgrade, "run_gpu_container", run_gpu_container)
    for module in (_driver_upgrade, _driver_upgrade_planner):
        monkeypatch.setattr(module, "serving", serving)


# -- what the role does ---------------------------------------------------------------------------


def call(world: UpgradeWorld, goal: str, branch: str = "580", **more: t.Any) -> tuple[Outcome[t.Any], dict[str, t.Any]]:
    """One call of the module."""
    check_mode = more.pop("check_mode", False)
    resource = upgrade(world, branch, goal=goal, **more)
    outcome = converge(world, resource, check_mode=check_mode)
    return outcome, resource.result(outcome.state)


def roll(world: UpgradeWorld, branch: str = "580", **more: t.Any) -> dict[str, t.Any]:
    """What the role does with a host."""
    answer: dict[str, t.Any] = {}
    for goal in GOALS:
        answer = call(world, goal, branch, **more)[1]
        if answer["reboot_required"]:
            world.reboot()
            answer = call(world, goal, branch, **more)[1]
            assert not answer["reboot_required"]
    return answer


def record_of(world: UpgradeWorld) -> Record:
    found = read_record(world)
    assert found is not None
    return found
