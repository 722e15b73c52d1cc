# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host in memory whose systemd and Docker run NIM services."""

from __future__ import annotations

import json
import pathlib
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nim_service_state
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import parse_smi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_bus import PciGpu
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_inventory import GpuInventory
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import parse_models
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_paths import (
    UNIT_DIRECTORY,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_service import NimService
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_unit_docker import SPEC_LABEL
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import converge
from fake_host import FakeHost

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMI = pathlib.Path(__file__).parent / "fixtures/nvidia-smi/h200-x2.xml"
GPUS = parse_smi(SMI.read_text())[2]
ZERO, ONE = (gpu.uuid for gpu in GPUS)
KEY = "nvapi-unit-test-key-0123456789"
LLAMA = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4"
NEMO = "nvcr.io/nim/nvidia/nemotron-3-nano:2.0.13"
DIGEST = "sha256:" + "ab" * 32
ENTRYPOINT = "/opt/nvidia/nvidia_entrypoint.sh"

FIB_TRIE = """\
Main:
  +-- 0.0.0.0/0 3 0 5
        |-- 127.0.0.0
           /8 host LOCAL
        |-- 127.0.0.1
           /32 host LOCAL
     |-- 172.30.2.2
        /32 host LOCAL
     |-- 172.30.2.255
        /32 link BROADCAST
"""
IF_INET6 = (
    "fe800000000000000000000000000001 02 40 20 80     eth0\n00000000000000000000000000000001 01 80 10 80       lo\n"
)


class FakeApi:
    """Docker as the resource sees it."""

    def __init__(self) -> None:
        self.up = True
        self.engine = "26.1.5"
        self.driver = "systemd"
        self.runtimes = {"runc": {}, "nvidia": {}}
        self.cdi = ["/etc/cdi", "/var/run/cdi"]
        self.list: dict[str, dict[str, t.Any]] = {}
        self.host_config: dict[str, dict[str, t.Any]] = {}
        self.inspected: dict[str, dict[str, t.Any]] = {}
        self.images = {
            reference: {
                "Id": "sha256:" + letter * 64,
                "RepoDigests": ["%s@%s" % (reference.rsplit(":", 1)[0], DIGEST)],
                "Config": {
                    "Labels": {"com.nvidia.nim.version": version},
                    "Env": [],
                    "Entrypoint": [ENTRYPOINT],
                    "Cmd": ["/opt/nim/start.sh"],
                },
            }
            for reference, letter, version in ((LLAMA, "1", "1.8.4"), (NEMO, "2", "2.0.13"))
        }

    def check(self) -> None:
        if not self.up:
            raise FleetError("docker_unavailable", "Asking Docker failed: there is no such socket.")

    def available(self) -> bool:
        return self.up

    def forget(self) -> None:
        pass

    def version(self) -> dict[str, t.Any]:
        self.check()
        return {"Version": self.engine}

    def info(self) -> dict[str, t.Any]:
        self.check()
        return {"CgroupDriver": self.driver, "Runtimes": self.runtimes, "CDISpecDirs": self.cdi}

    def containers(self, all: bool = True, labels: t.Sequence[str] = ()) -> list[dict[str, t.Any]]:
        self.check()
        return list(self.list.values())

    def container(self, name: str) -> dict[str, t.Any] | None:
        self.check()
        for entry in self.list.values():
            if name in (entry["Id"], entry["Names"][0].lstrip("/")):
                return {
                    "Id": entry["Id"],
                    "Name": entry["Names"][0],
                    "State": {"Running": entry["State"] == "running", "Pid": 812},
                    "HostConfig": self.host_config.get(entry["Names"][0].lstrip("/"), {}),
                    **self.inspected.get(entry["Names"][0].lstrip("/"), {}),
                }
        return None

    def image(self, reference: str) -> dict[str, t.Any] | None:
        self.check()
        for name, image in self.images.items():
            if reference in (name, image["Id"], *image["RepoDigests"]):
                return image
        return None

    def put(self, name: str, spec: str = "", state: str = "running", port: int | None = None) -> None:
        self.list[name] = {
            "Id": name.encode().hex().ljust(64, "0"),
            "Names": ["/" + name],
            "Labels": {SPEC_LABEL: spec} if spec else {},
            "State": state,
            "Ports": [{"IP": "0.0.0.0", "PublicPort": port, "PrivatePort": 8000, "Type": "tcp"}] if port else [],
        }


class Machine:
    """A host whose systemd and Docker do what they are told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.api = FakeApi()
        self.host = FakeHost(
            commands={
                "systemctl show --property ActiveState,*": self.show,
                "systemctl show --property ActiveState *": lambda host, argv, *_rest: self.active.get(argv[-1], ""),
                "systemctl show --property UnitFileState *": self.unit_file_state,
                "systemctl daemon-reload": self.daemon_reload,
                "systemctl enable *": self.enable,
                "systemctl disable *": self.enable,
                "systemctl reset-failed *": "",
                "systemctl restart *": self.restart,
                "systemctl start *": self.restart,
                "systemctl stop *": self.stop,
                "docker stop *": self.docker_stop,
                "docker rm *": self.docker_rm,
                "docker exec *": "GPU 0: NVIDIA H200",
                "docker unpause *": self.docker_unpause,
                "docker update --restart=no *": self.docker_update,
                "find *": self.find,
                "journalctl *": "Cannot start nim-llama: docker create: unknown flag\n",
            }
        )
        self.host.dirs |= {UNIT_DIRECTORY, "/run/nim"}
        self.active: dict[str, str] = {}
        self.enabled: set[str] = set()
        self.masked: set[str] = set()
        self.stale: set[str] = set()
        self.reloads = 0
        self.foreign: set[str] = set()
        self.silence = ""
        self.fails: set[str] = set()
        self.inventory = GpuInventory(pci=(PciGpu("0000:00:06.0", "2335", "Hopper", "nvidia"),), gpus=GPUS)
        monkeypatch.setattr(_nim_service_state, "observe_gpus", lambda host: self.inventory)
        monkeypatch.setattr(_nim_service_state, "why_silent", lambda host, address, pid: self.silence)

    def show(self, host: FakeHost, argv: tuple[str, ...], *_rest: t.Any) -> str:
        blocks = []
        for unit in argv[argv.index("--") + 1 :]:
            state = "enabled" if unit in self.enabled else "disabled"
            state = "masked" if unit in self.masked else state
            blocks.append(
                "ActiveState=%s\nUnitFileState=%s\nNeedDaemonReload=%s\n"
                % (self.active.get(unit, "inactive"), state, "yes" if unit in self.stale else "no")
            )
        return "\n".join(blocks)

    def unit_file_state(self, host: FakeHost, argv: tuple[str, ...], *_rest: t.Any) -> str:
        return "enabled" if argv[-1] in self.enabled else "disabled"

    def daemon_reload(self, *_rest: t.Any) -> str:
        self.reloads += 1
        self.stale.clear()
        return ""

    def enable(self, host: FakeHost, argv: tuple[str, ...], *_rest: t.Any) -> str:
        assert "--no-reload" in argv
        units = {word for word in argv[2:] if not word.startswith("--")}
        self.enabled = self.enabled | units if argv[1] == "enable" else self.enabled - units
        self.stale |= units
        return ""

    def restart(self, host: FakeHost, argv: tuple[str, ...], *_rest: t.Any) -> str:
        for unit in argv[2:]:
            self.active[unit] = "active"
            if unit in self.fails:
                self.active[unit] = "failed"
            elif unit.endswith(".service"):
                name = unit[len("nim-") : -len(".service")]
                spec = json.loads(host.files["/etc/nim/%s.json" % name])["spec"]
                host.files["/run/nim/%s.json" % name] = json.dumps({"spec": spec, "failures": 0}).encode()
                self.api.put("nim-" + name, spec)
        return ""

    def stop(self, host: FakeHost, argv: tuple[str, ...], *_rest: t.Any) -> str:
        for unit in argv[2:]:
            if self.active.get(unit) == "active":
                self.api.list["nim-" + unit[len("nim-") : -len(".service")]]["State"] = "exited"
            self.active[unit] = "inactive"
        return ""

    def docker_stop(self, host: FakeHost, argv: tuple[str, ...], *_rest: t.Any) -> str:
        self.api.list[argv[-1]]["State"] = "exited"
        return ""

    def docker_unpause(self, host: FakeHost, argv: tuple[str, ...], *_rest: t.Any) -> str:
        self.api.list[argv[-1]]["State"] = "running"
        return ""

    def docker_update(self, host: FakeHost, argv: tuple[str, ...], *_rest: t.Any) -> str:
        self.api.host_config[argv[-1]]["RestartPolicy"] = {"Name": "no"}
        return ""

    def find(self, host: FakeHost, argv: tuple[str, ...], *_rest: t.Any) -> str:
        if "chown" in argv:
            self.foreign.discard(argv[1])
        return argv[1] + "/file\n" if argv[1] in self.foreign else ""

    def docker_rm(self, host: FakeHost, argv: tuple[str, ...], *_rest: t.Any) -> str:
        del self.api.list[argv[-1]]
        return ""

    def resource(self, *models: dict[str, t.Any], **options: t.Any) -> NimService:
        return NimService(parse_models(list(models)), api=t.cast(t.Any, self.api), **options)

    def plan(self, *models: dict[str, t.Any], **options: t.Any) -> list[t.Any]:
        resource = self.resource(*models, **options)
        return resource.plan(resource.observe(self.host))

    def converge(self, *models: dict[str, t.Any], **options: t.Any) -> t.Any:
        resource = self.resource(*models, **options)
        outcome = converge(self.host, resource, check_mode=False)
        self.answer = resource.result(outcome.state)
        return outcome

    def listen(self, port: int, pid: int, command: str, container_id: str = "") -> None:
        self.host.files["/proc/net/tcp"] = (
            "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
            "   0: 00000000:%04X 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1\n" % port
        ).encode()
        self.host.links["/proc/%d/fd/3" % pid] = "socket:[4242]"
        self.host.files["/proc/%d/comm" % pid] = command.encode() + b"\n"
        scope = "docker-%s.scope" % container_id if container_id else command + ".service"
        self.host.files["/proc/%d/cgroup" % pid] = b"0::/system.slice/" + scope.encode()


def llama(**options: t.Any) -> dict[str, t.Any]:
    return dict({"name": "llama", "image": LLAMA}, **options)


def nemo(**options: t.Any) -> dict[str, t.Any]:
    return dict({"name": "nemo", "image": NEMO, "port": 8001}, **options)


def summary(changes: t.Sequence[t.Any]) -> list[tuple[str, str]]:
    return [(change.what, str(change.after)) for change in changes]


def calls(machine: Machine, verb: str) -> list[str]:
    return [" ".join(argv) for argv in machine.host.calls if argv[:2] == ("systemctl", verb)]


def failure(machine: Machine, *models: dict[str, t.Any], **options: t.Any) -> FleetError:
    with pytest.raises(FleetError) as caught:
        machine.converge(*models, **options)
    return caught.value
