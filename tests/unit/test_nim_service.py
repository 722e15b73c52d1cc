# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plans of the services of a host for every kind of change, and what is written for them."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import typing as t

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _module, _nim_service
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import GpuInventory, PciGpu, parse_smi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._ngc_login import fingerprint
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import NIM_MODEL_OPTIONS, parse_models
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_service import (
    KEY_FILE,
    MAINTENANCE_FILE,
    UNIT_DIRECTORY,
    WRAPPER,
    NimService,
    Secrets,
    listening_sockets,
    own_addresses,
    unit_text,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_unit import SPEC_LABEL
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption, converge
from ansible_collections.gpu_fleet.nim.plugins.modules import nim_service
from fake_host import FakeHost

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMI = pathlib.Path(__file__).parent / "fixtures/nvidia-smi/h200-x2.xml"
GPUS = parse_smi(SMI.read_text())[2]
ZERO, ONE = (gpu.uuid for gpu in GPUS)
KEY = "nvapi-unit-test-key-0123456789"
LLAMA = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4"
NEMO = "nvcr.io/nim/nvidia/nemotron-3-nano:2.0.13"
DIGEST = "sha256:" + "ab" * 32


class FakeApi:
    """Docker as the resource sees it."""

    def __init__(self) -> None:
        self.up = True
        self.engine = "26.1.5"
        self.driver = "systemd"
        self.runtimes = {"runc": {}, "nvidia": {}}
        self.list: dict[str, dict[str, t.Any]] = {}
        self.host_config: dict[str, dict[str, t.Any]] = {}
        self.images = {
            reference: {
                "Id": "sha256:" + letter * 64,
                "RepoDigests": ["%s@%s" % (reference.rsplit(":", 1)[0], DIGEST)],
                "Config": {"Labels": {"com.nvidia.nim.version": version}, "Env": [], "Cmd": ["/opt/nim/start.sh"]},
            }
            for reference, letter, version in ((LLAMA, "1", "1.8.4"), (NEMO, "2", "2.0.13"))
        }

    def check(self) -> None:
        if not self.up:
            raise FleetError("docker_unavailable", "Asking Docker failed: there is no such socket.")

    def available(self) -> bool:
        return self.up

    def version(self) -> dict[str, t.Any]:
        self.check()
        return {"Version": self.engine}

    def info(self) -> dict[str, t.Any]:
        self.check()
        return {"CgroupDriver": self.driver, "Runtimes": self.runtimes}

    def containers(self, all: bool = True, labels: t.Sequence[str] = ()) -> list[dict[str, t.Any]]:
        self.check()
        return list(self.list.values())

    def container(self, name: str) -> dict[str, t.Any] | None:
        self.check()
        for entry in self.list.values():
            if name in (entry["Id"], entry["Names"][0].lstrip("/")):
                return {
                    "Name": entry["Names"][0],
                    "State": {"Running": entry["State"] == "running"},
                    "HostConfig": self.host_config.get(entry["Names"][0].lstrip("/"), {}),
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
                "systemctl show --property Id,*": self.show,
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
                "journalctl *": "Cannot start nim-llama: docker create: unknown flag\n",
            }
        )
        self.host.dirs |= {UNIT_DIRECTORY, "/run/nim"}
        self.active: dict[str, str] = {}
        self.enabled: set[str] = set()
        self.stale: set[str] = set()
        self.reloads = 0
        self.fails: set[str] = set()
        self.inventory = GpuInventory(pci=(PciGpu("0000:00:06.0", "2335", "Hopper", "nvidia"),), gpus=GPUS)
        monkeypatch.setattr(_nim_service, "observe_gpus", lambda host: self.inventory)

    def show(self, host: FakeHost, argv: tuple[str, ...], *_rest: t.Any) -> str:
        blocks = []
        for unit in argv[argv.index("--") + 1 :]:
            state = "enabled" if unit in self.enabled else "disabled"
            blocks.append(
                "Id=%s\nActiveState=%s\nUnitFileState=%s\nNeedDaemonReload=%s\n"
                % (unit, self.active.get(unit, "inactive"), state, "yes" if unit in self.stale else "no")
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


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


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


# -- the first run and the second -----------------------------------------------------------------


def test_first_run_then_nothing(machine: Machine) -> None:
    outcome = machine.converge(llama(), nemo(), key=KEY)
    assert machine.reloads == 1
    assert calls(machine, "restart") == ["systemctl restart nim-llama.service nim-nemo.service"]
    assert machine.enabled == {"nim.target", "nim-llama.service", "nim-nemo.service"}
    assert machine.host.modes["/var/lib/nim/cache/llama"] == (0o750, 1000, 1000)
    assert machine.host.modes[KEY_FILE] == (0o600, 0, 0)
    assert machine.host.modes["/etc/nim/llama.json"] == (0o644, 0, 0)
    assert machine.host.modes[WRAPPER] == (0o755, 0, 0)
    assert max(change.disruption for change in outcome.changes) == Disruption.RELOAD
    assert [service["gpus"] for service in machine.answer["services"]] == [[ZERO], [ONE]]
    assert machine.answer["services"][1] | {"spec": ""} == {
        "name": "nemo",
        "unit": "nim-nemo.service",
        "container": "nim-nemo",
        "image": NEMO,
        "digest": DIGEST,
        "gpus": [ONE],
        "port": 8001,
        "spec": "",
        "state": "started",
        "url": "http://127.0.0.1:8001",
    }
    assert machine.converge(llama(), nemo(), key=KEY).changes == []
    # The order of the list moves nobody.
    assert machine.converge(nemo(), llama(), key=KEY).changes == []


def test_the_key_is_nowhere_but_in_its_file(machine: Machine) -> None:
    outcome = machine.converge(llama(), nemo(), key=KEY)
    for path, content in machine.host.files.items():
        assert (KEY.encode() in content) == (path == KEY_FILE), path
    assert KEY not in repr(machine.host.calls)
    assert KEY not in json.dumps([change.as_dict() for change in outcome.changes])
    assert KEY not in repr([change.diff for change in outcome.changes])
    assert fingerprint(KEY) in json.dumps([change.as_dict() for change in outcome.changes])


def test_what_a_1x_container_is_given(machine: Machine) -> None:
    machine.converge(llama(gpus=[1], profile="vllm-bf16-tp1-pp1", bind_address="127.0.0.1", environment={"B": "x y"}))
    found = json.loads(machine.host.files["/etc/nim/llama.json"])
    assert found["create"] == [
        "--log-driver=journald",
        "--log-opt=tag=nim-llama",
        "--label=io.gpu-fleet.nim.name=llama",
        "--label=io.gpu-fleet.nim.image=" + LLAMA,
        "--label=io.gpu-fleet.nim.digest=" + DIGEST,
        "--cgroup-parent=nim.slice",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--user=1000:1000",
        "--pids-limit=-1",
        "--shm-size=17179869184",
        "--ulimit=memlock=-1",
        "--ulimit=nofile=65536",
        "--ulimit=stack=67108864",
        "--runtime=nvidia",
        "--mount=type=bind,source=/var/lib/nim/cache/llama,target=/opt/nim/.cache",
        "--publish=127.0.0.1:8000:8000",
        "--env=B=x y",
        "--env=NIM_CACHE_PATH=/opt/nim/.cache",
        "--env=NIM_HTTP_API_PORT=8000",
        "--env=NIM_MODEL_PROFILE=vllm-bf16-tp1-pp1",
        "--env=NIM_SERVER_PORT=8000",
        "--env=NVIDIA_VISIBLE_DEVICES=" + ONE,
        "nvcr.io/nim/meta/llama-3.1-8b-instruct@" + DIGEST,
    ]
    assert found["download"]["create"][-3:] == ["download-to-cache", "--profile", "vllm-bf16-tp1-pp1"]
    assert not any(word.startswith("--publish") for word in found["download"]["create"])
    assert found["key_in_service"] is False


def test_other_ways_to_give_gpus_and_network(machine: Machine) -> None:
    machine.converge(llama(gpus="all", network_mode="host", port=9000), injection="gpus")
    words = json.loads(machine.host.files["/etc/nim/llama.json"])["create"]
    assert '--gpus="device=%s,%s"' % (ZERO, ONE) in words
    assert "--network=host" in words
    assert "--env=NIM_SERVER_PORT=9000" in words
    assert not any(word.startswith(("--publish", "--runtime")) for word in words)
    machine.converge(llama(network_mode="models"), injection="cdi")
    words = json.loads(machine.host.files["/etc/nim/llama.json"])["create"]
    assert "--device=nvidia.com/gpu=" + ZERO in words
    assert "--network=models" in words
    assert b"nvidia-cdi-refresh" in machine.host.files[UNIT_DIRECTORY + "/nim-llama.service"]


def test_local_weights_and_loras_are_mounted_read_only_and_nothing_is_fetched(machine: Machine) -> None:
    machine.host.dirs |= {"/srv/weights", "/srv/loras"}
    machine.converge(llama(weights_directory="/srv/weights", lora_directory="/srv/loras"), key=KEY)
    found = json.loads(machine.host.files["/etc/nim/llama.json"])
    assert "--mount=type=bind,source=/srv/weights,target=/opt/nim/weights,readonly" in found["create"]
    assert "--mount=type=bind,source=/srv/loras,target=/opt/nim/loras,readonly" in found["create"]
    assert found["download"] is None
    assert found["key_in_service"] is False


def test_an_image_of_no_known_family_fetches_by_itself(machine: Machine) -> None:
    machine.api.images[LLAMA]["Config"] = {}
    machine.converge(llama())
    found = json.loads(machine.host.files["/etc/nim/llama.json"])
    assert (found["family"], found["download"], found["key_in_service"]) == ("unknown", None, True)


def test_tls_is_asked_with_tls(machine: Machine) -> None:
    machine.converge(llama(environment={"NIM_SSL_MODE": "TLS"}))
    assert json.loads(machine.host.files["/etc/nim/llama.json"])["ready_url"].startswith("https://127.0.0.1:8000/")


def test_a_cgroupfs_daemon_has_no_slices(machine: Machine) -> None:
    machine.api.driver = "cgroupfs"
    machine.converge(llama())
    assert b"cgroup-parent" not in machine.host.files["/etc/nim/llama.json"]


def test_the_pin_of_nim_image_decides_not_the_tag(machine: Machine) -> None:
    machine.converge(llama())
    pinned = {"source": "mirror.example/ngc/llama", "digest": "sha256:" + "cd" * 32, "image_id": "sha256:" + "9" * 64}
    machine.host.dirs.add("/var/lib/gpu_fleet")
    machine.host.files["/var/lib/gpu_fleet/images.json"] = json.dumps({"schema": 1, "images": {LLAMA: pinned}}).encode()
    machine.api.images["pinned"] = dict(machine.api.images[LLAMA], Id=pinned["image_id"], RepoDigests=[])
    (change,) = [change for change in machine.plan(llama()) if change.action == "restart"]
    assert (change.after, change.disruption) == ("restarted", Disruption.RESTART_NIM)
    machine.converge(llama())
    found = json.loads(machine.host.files["/etc/nim/llama.json"])
    assert found["digest"] == pinned["digest"]
    # Docker does not know the digest under that name, so the id is given.
    assert found["create"][-1] == pinned["image_id"]


# -- changes --------------------------------------------------------------------------------------


def test_a_change_of_one_model_restarts_that_one_only(machine: Machine) -> None:
    machine.converge(llama(), nemo())
    machine.host.calls.clear()
    outcome = machine.converge(llama(environment={"NIM_LOG_LEVEL": "DEBUG"}), nemo())
    assert summary(outcome.changes) == [("/etc/nim/llama.json", "as wanted"), ("nim-llama.service", "restarted")]
    assert calls(machine, "restart") == ["systemctl restart nim-llama.service"]
    assert calls(machine, "daemon-reload") == []


def test_secret_variables_are_nowhere_but_in_their_file(machine: Machine) -> None:
    secret = {"HF_TOKEN": "hf_unit_secret", "PIN": 4711}
    outcome = machine.converge(llama(secret_environment=secret), nemo(), key=KEY)
    path = "/etc/nim/llama.env"
    assert machine.host.files[path].decode().splitlines()[2:] == ["HF_TOKEN=hf_unit_secret", "PIN=4711"]
    assert machine.host.modes[path] == (0o600, 0, 0)
    for name, content in machine.host.files.items():
        assert (b"hf_unit_secret" in content) == (name == path), name
    assert "/etc/nim/nemo.env" not in machine.host.files
    printed = json.dumps([change.as_dict() for change in outcome.changes]) + repr([c.diff for c in outcome.changes])
    printed += repr(machine.host.calls) + repr(machine.resource(llama(secret_environment=secret)).observe(machine.host))
    assert "hf_unit_secret" not in printed and "4711" not in printed
    assert "HF_TOKEN hmac:" in printed and "PIN hmac:" in printed
    assert json.loads(machine.host.files["/etc/nim/llama.json"])["secret_environment"] == ["HF_TOKEN", "PIN"]
    assert machine.converge(llama(secret_environment=secret), nemo(), key=KEY).changes == []


def test_another_secret_restarts_its_model_only_and_without_any_the_file_goes(machine: Machine) -> None:
    machine.converge(llama(secret_environment={"T": "one"}), nemo())
    spec = json.loads(machine.host.files["/etc/nim/llama.json"])["spec"]
    machine.host.calls.clear()
    outcome = machine.converge(llama(secret_environment={"T": "two"}), nemo())
    assert calls(machine, "restart") == ["systemctl restart nim-llama.service"]
    (change,) = [change for change in outcome.changes if change.what == "/etc/nim/llama.env"]
    assert change.before != change.after and str(change.before).startswith("T hmac:")
    machine.host.calls.clear()
    machine.converge(llama(secret_environment={"T": "one"}), nemo())
    assert json.loads(machine.host.files["/etc/nim/llama.json"])["spec"] == spec
    machine.host.calls.clear()
    machine.converge(llama(), nemo())
    assert "/etc/nim/llama.env" not in machine.host.files
    assert calls(machine, "restart") == ["systemctl restart nim-llama.service"]
    assert machine.converge(llama(), nemo()).changes == []


def test_a_secret_file_that_somebody_changed_is_put_right(machine: Machine) -> None:
    path = "/etc/nim/llama.env"
    wanted = llama(secret_environment={"T": "one"})
    machine.converge(wanted)
    text = machine.host.files[path]
    machine.host.calls.clear()
    machine.host.files[path] = text.replace(b"T=one", b"T=other")
    assert summary(machine.converge(wanted).changes)[0][0] == path
    machine.host.modes[path] = (0o644, 0, 0)
    (change,) = machine.converge(wanted).changes
    assert "others than root" in change.why
    assert machine.host.files[path] == text and machine.host.modes[path] == (0o600, 0, 0)
    # What runs was created with the right values.
    assert calls(machine, "restart") == []
    # Without its key nothing proves what the container was given.
    machine.host.files[path] = b"T=one\n"
    machine.converge(wanted)
    assert calls(machine, "restart") == ["systemctl restart nim-llama.service"]


def test_a_short_secret_cannot_be_guessed_from_what_everybody_reads(machine: Machine) -> None:
    """The same secret under another key has another name everywhere."""
    one, other = (Secrets(key * 64, {"PIN": "0"}) for key in "ab")
    assert str(one) != str(other) and one.spec() != other.spec()
    assert Secrets.parse(one.render()) == one
    assert str(Secrets(one.key, {"PIN": "1"})) != str(one)
    machine.converge(llama(secret_environment={"PIN": "0"}))
    there = Secrets.parse(machine.host.files["/etc/nim/llama.env"].decode())
    assert there and there.key not in machine.host.files["/etc/nim/llama.json"].decode()


def test_absent_removes_secrets(machine: Machine) -> None:
    machine.converge(llama(secret_environment={"T": "one"}))
    machine.converge(llama(secret_environment={"T": "one"}, state="absent"))
    assert [path for path in machine.host.files if "llama" in path] == []


def test_a_secret_replaces_a_default_of_ours(machine: Machine) -> None:
    machine.converge(nemo(secret_environment={"NIM_LOG_LEVEL": "DEBUG"}))
    assert "NIM_LOG_LEVEL=" not in machine.host.files["/etc/nim/nemo.json"].decode()


# -- the second port of 2.x -------------------------------------------------------------------------


def test_the_engine_port_of_2x_on_the_network_of_the_host(machine: Machine) -> None:
    wanted = nemo(port=8000, network_mode="host")
    machine.listen(8001, 977, "nginx")
    error = failure(machine, wanted)
    assert error.reason == "port_in_use" and error.facts["port"] == 8001
    assert "nginx (pid 977)" in error.message and "NIM_BACKEND_PORT" in error.message
    assert "/etc/nim/nemo.json" not in machine.host.files
    machine.converge(dict(wanted, environment={"NIM_BACKEND_PORT": 8101}))
    # Nobody else's network is shared: inside of the container the port is free.
    machine.converge(nemo(port=8000))


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


def test_addresses_of_the_host() -> None:
    assert own_addresses(FIB_TRIE, IF_INET6) == ("127.0.0.1", "172.30.2.2", "fe80::1", "::1")
    assert own_addresses("", "") == ()


@pytest.mark.parametrize(
    ("bind_address", "ipv6", "words"),
    [
        ("0.0.0.0", "", ""),
        ("127.0.0.5", "", ""),
        ("172.30.2.2", "", ""),
        ("::", IF_INET6, ""),
        ("::", "", "IPv6 switched off"),
        ("172.30.2.9", IF_INET6, "one of its addresses (127.0.0.1, 172.30.2.2, ::1)"),
    ],
)
def test_an_address_that_the_host_has_not(machine: Machine, bind_address: str, ipv6: str, words: str) -> None:
    machine.host.files["/proc/net/fib_trie"] = FIB_TRIE.encode()
    machine.host.files["/proc/net/if_inet6"] = ipv6.encode()
    if not words:
        machine.plan(llama(bind_address=bind_address))
        return
    with pytest.raises(FleetError, match="bind_address = %s" % re.escape(bind_address)) as caught:
        machine.plan(llama(bind_address=bind_address))
    assert caught.value.reason == "no_such_address"
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([nemo(network_mode="host")], "the same model"),
        ([nemo(port=8000, network_mode="host"), llama(port=8001)], "model nemo"),
        ([llama(port=8001), nemo(port=8000, network_mode="host")], "the port of model llama"),
        (
            [nemo(port=8000, network_mode="host"), nemo(name="two", port=8002, network_mode="host")],
            "the engine's port of model nemo",
        ),
    ],
)
def test_engine_ports_of_2x_between_models(machine: Machine, models: list[dict[str, t.Any]], words: str) -> None:
    error = failure(machine, *models)
    assert error.reason == "invalid_option"
    assert words in error.message and "8001" in error.message and "NIM_BACKEND_PORT" in error.message
    assert not calls(machine, "restart")


def test_an_engine_port_that_is_none(machine: Machine) -> None:
    environment = {"NIM_BACKEND_PORT": "http"}
    assert "is no port" in failure(machine, nemo(network_mode="host", environment=environment)).message


def test_timeouts_change_files_and_restart_nothing(machine: Machine) -> None:
    machine.converge(llama())
    outcome = machine.converge(llama(start_timeout=60, stop_timeout=90))
    assert [change.action for change in outcome.changes] == ["file", "file", "daemon_reload"]


def test_a_new_key_restarts_nothing_that_runs(machine: Machine) -> None:
    machine.converge(llama(), key=KEY)
    outcome = machine.converge(llama(), key=KEY + "2")
    assert [(change.what, change.before, change.after) for change in outcome.changes] == [
        (KEY_FILE, fingerprint(KEY), fingerprint(KEY + "2"))
    ]
    assert machine.host.files[KEY_FILE] == b"NGC_API_KEY=%s2\n" % KEY.encode()
    assert machine.converge(llama()).changes == []


def test_a_new_key_lets_a_failing_start_try_again_at_once(machine: Machine) -> None:
    machine.converge(llama(), key=KEY)
    spec = json.loads(machine.host.files["/etc/nim/llama.json"])["spec"]
    machine.api.list["nim-llama"]["State"] = "exited"
    machine.host.files["/run/nim/llama.json"] = json.dumps({"spec": spec, "failures": 2}).encode()
    assert machine.plan(llama(), key=KEY) == []
    assert [change.action for change in machine.plan(llama(), key=KEY + "2")] == ["key", "restart"]


def test_a_key_that_others_could_read_is_put_right_and_an_unwanted_one_removed(machine: Machine) -> None:
    machine.converge(llama(), key=KEY)
    machine.host.modes[KEY_FILE] = (0o644, 0, 0)
    outcome = machine.converge(llama(), key=KEY)
    assert outcome.changes[0].why == "the file could be read by others than root"
    assert machine.host.modes[KEY_FILE] == (0o600, 0, 0)
    machine.converge(llama(), key_state="absent")
    assert KEY_FILE not in machine.host.files


@pytest.mark.parametrize("key", ["nvapi-a b c d", "nvapi-0123456\n", "nvapi-käse-und-brot"])
def test_a_key_that_cannot_be_one(machine: Machine, key: str) -> None:
    with pytest.raises(FleetError, match=r"ngc_api_key = .not shown.") as caught:
        machine.resource(llama(), key=key)
    assert key not in caught.value.message


@pytest.mark.parametrize("active", ["failed", "inactive"])
def test_a_dead_unit_is_started_and_its_failures_forgotten(machine: Machine, active: str) -> None:
    machine.converge(llama())
    machine.active["nim-llama.service"] = active
    machine.api.list["nim-llama"]["State"] = "exited"
    machine.host.calls.clear()
    outcome = machine.converge(llama())
    assert [(change.what, change.after, change.disruption) for change in outcome.changes] == [
        ("nim-llama.service", "started", Disruption.NONE)
    ]
    verbs = [argv[1] for argv in machine.host.calls if argv[0] == "systemctl"]
    assert verbs.index("reset-failed") < verbs.index("restart")


def test_a_container_that_goes_on_without_its_unit_is_adopted(machine: Machine) -> None:
    machine.converge(llama())
    machine.active["nim-llama.service"] = "inactive"
    (change,) = machine.plan(llama())
    assert (change.after, change.disruption) == ("started", Disruption.NONE)


def test_a_unit_that_is_on_its_way_is_left_alone(machine: Machine) -> None:
    machine.converge(llama())
    del machine.api.list["nim-llama"]
    assert machine.plan(llama()) == []
    machine.host.files["/run/nim/llama.json"] = b'{"spec": "another"}'
    assert [change.after for change in machine.plan(llama())] == ["restarted"]


def test_stopped(machine: Machine) -> None:
    machine.converge(llama(), nemo())
    outcome = machine.converge(llama(state="stopped"), nemo())
    assert ("nim-llama.service", "stopped") in summary(outcome.changes)
    assert ("nim-llama.service", "disabled") in summary(outcome.changes)
    assert outcome.changes[0].disruption == Disruption.RESTART_NIM
    assert machine.api.list["nim-llama"]["State"] == "exited"
    assert machine.answer["services"][0]["state"] == "stopped"
    assert machine.converge(llama(state="stopped"), nemo()).changes == []


def test_stop_looks_at_docker_too(machine: Machine) -> None:
    machine.converge(llama())
    machine.active["nim-llama.service"] = "inactive"
    machine.converge(llama(state="stopped"))
    assert ("docker", "stop", "-t", "60", "nim-llama") in machine.host.calls
    machine.api.put("nim-llama-download", "x")
    assert [change.after for change in machine.plan(llama(state="stopped"))] == ["stopped"]


def test_absent_removes_everything_but_the_cache(machine: Machine) -> None:
    machine.converge(llama(), nemo())
    machine.converge(llama(state="absent"), nemo())
    assert not [path for path in machine.host.files if "llama" in path]
    assert "nim-llama" not in machine.api.list
    assert "/var/lib/nim/cache/llama" in machine.host.dirs
    assert machine.converge(llama(state="absent"), nemo()).changes == []
    machine.api.up = False
    assert machine.plan(llama(state="absent")) == []


def test_remove_all_leaves_nothing_but_caches(machine: Machine) -> None:
    before = set(machine.host.files)
    machine.converge(llama(), nemo(), key=KEY)
    outcome = machine.converge(remove_all=True)
    assert [change.what for change in outcome.changes if change.action == "stop"] == [
        "nim-llama.service",
        "nim-nemo.service",
    ]
    assert set(machine.host.files) == before
    assert machine.api.list == {}
    assert "/var/lib/nim/cache/llama" in machine.host.dirs
    assert machine.enabled == set()
    assert machine.converge(remove_all=True).changes == []
    assert machine.answer["services"] == machine.answer["orphans"] == []


def test_services_outside_the_list_are_reported_and_keep_their_gpus(machine: Machine) -> None:
    machine.converge(llama(), nemo())
    assert machine.converge(nemo()).changes == []
    (orphan,) = machine.answer["orphans"]
    assert orphan == {"name": "llama", "unit": "nim-llama.service", "gpus": [ZERO], "state": "started"}
    assert "left alone: llama" in machine.answer["warnings"][0]
    error = failure(machine, nemo(gpus=2))
    assert error.reason == "gpus_unavailable"
    assert "llama (not in the list)" in error.message


def test_a_hand_edited_unit_is_written_again(machine: Machine) -> None:
    machine.converge(llama())
    machine.host.files[UNIT_DIRECTORY + "/nim-llama.service"] += b"User=nobody\n"
    assert [change.action for change in machine.plan(llama())] == ["file", "daemon_reload"]
    machine.host.files[UNIT_DIRECTORY + "/nim-llama.service"] = machine.host.files[UNIT_DIRECTORY + "/nim.target"]
    machine.enabled.clear()
    assert [change.action for change in machine.plan(llama())] == ["file", "enable", "enable", "daemon_reload"]


def test_a_masked_unit_is_respected(machine: Machine) -> None:
    machine.converge(llama())
    path = UNIT_DIRECTORY + "/nim-llama.service"
    del machine.host.files[path]
    machine.host.links[path] = "/dev/null"
    error = failure(machine, llama())
    assert error.reason == "unit_masked"
    assert "systemctl unmask nim-llama.service" in error.message
    assert path not in machine.host.files
    assert [change.action for change in machine.plan(llama(state="stopped"))] == ["stop", "disable", "daemon_reload"]


def test_maintenance_blocks_starts_and_nothing_else(machine: Machine) -> None:
    machine.host.files[MAINTENANCE_FILE] = b""
    outcome = machine.converge(llama())
    assert [change.what for change in outcome.blocked] == ["nim-llama.service"]
    assert "under maintenance" in outcome.blocked[0].blocked
    assert calls(machine, "restart") == []
    assert machine.answer["services"][0]["state"] == "maintenance"


def test_a_start_that_systemd_gives_up_is_an_error_with_the_reason(machine: Machine) -> None:
    machine.fails.add("nim-llama.service")
    error = failure(machine, llama())
    assert error.reason == "start_failed"
    assert "Cannot start nim-llama: docker create: unknown flag" in error.message


# -- what is missing or in the way ----------------------------------------------------------------


def test_a_host_that_was_never_set_up_can_be_planned_but_not_changed(machine: Machine) -> None:
    machine.api.up = False
    machine.inventory = GpuInventory()
    (change,) = machine.plan(llama())
    assert (change.what, change.after) == ("nim-llama.service", "started")
    assert "not possible yet" in change.why
    error = failure(machine, llama())
    assert error.reason == "docker_unavailable"
    assert error.facts["changes"] == []
    assert (
        machine.resource(llama()).result(machine.resource(llama()).observe(machine.host))["services"][0]["gpus"] == []
    )


@pytest.mark.parametrize(
    ("inventory", "words"),
    [
        (GpuInventory(), "has no NVIDIA GPU"),
        (GpuInventory(pci=(PciGpu("x", "2335", "Hopper", ""),)), "driver is not loaded"),
    ],
)
def test_no_gpu(machine: Machine, inventory: GpuInventory, words: str) -> None:
    machine.inventory = inventory
    error = failure(machine, llama())
    assert error.reason == "no_gpu"
    assert words in error.message


def test_image_and_runtime_missing(machine: Machine) -> None:
    machine.api.runtimes = {"runc": {}}
    assert failure(machine, llama()).reason == "runtime_missing"
    assert machine.plan(llama(), injection="gpus")[0].action == "directory"
    machine.api.runtimes = {"nvidia": {}}
    machine.api.images.clear()
    error = failure(machine, llama())
    assert error.reason == "image_missing"
    assert "nim_image first" in error.message


def test_weights_must_be_there_and_readable(machine: Machine) -> None:
    error = failure(machine, llama(weights_directory="/srv/w"))
    assert error.reason == "directory_missing"
    assert "weights_directory = /srv/w does not exist" in error.message
    machine.host.dirs.add("/srv/w")
    machine.host.modes["/srv/w"] = (0o700, 0, 0)
    assert (
        "cannot be read by the container's user 1000:1000"
        in failure(machine, llama(weights_directory="/srv/w")).message
    )
    machine.host.modes["/srv/w"] = (0o750, 0, 1000)
    machine.converge(llama(weights_directory="/srv/w"))


def test_a_port_held_by_a_process_is_named_before_anything_is_done(machine: Machine) -> None:
    machine.listen(8000, 977, "nginx")
    error = failure(machine, llama())
    assert error.reason == "port_in_use"
    assert "port 8000 on 0.0.0.0: it is held by nginx (pid 977) of unit nginx.service;" in error.message
    assert machine.host.dirs == {UNIT_DIRECTORY, "/run/nim"}


def test_a_leftover_docker_proxy_is_named_with_its_container(machine: Machine) -> None:
    machine.listen(8000, 1212, "docker-proxy")
    machine.api.put("old-nim", port=8000)
    error = failure(machine, llama())
    assert "held by docker-proxy (pid 1212) of container old-nim" in error.message
    assert error.facts["container"] == "old-nim"
    machine.api.list.clear()
    machine.api.put("web")
    machine.host.links.clear()
    machine.listen(8000, 1213, "nginx", machine.api.list["web"]["Id"])
    assert "held by nginx (pid 1213) of container web" in failure(machine, llama()).message
    machine.api.list.clear()
    machine.api.put("old-nim", port=8000)
    del machine.host.files["/proc/net/tcp"]
    assert "held by container old-nim" in failure(machine, llama()).message


def test_a_proxy_whose_container_is_just_being_started(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.converge(llama())
    ports = machine.api.list["nim-llama"]["Ports"]
    machine.api.list["nim-llama"]["Ports"] = []
    machine.listen(8000, 1212, "docker-proxy")
    before = machine.host.clock
    assert "held by docker-proxy (pid 1212)" in failure(machine, llama(environment={"A": "1"})).message
    assert machine.host.clock - before == _nim_service.PROXY_LOOKS

    def started(seconds: float) -> None:
        machine.api.list["nim-llama"]["Ports"] = ports or [
            {"IP": "0.0.0.0", "PublicPort": 8000, "PrivatePort": 8000, "Type": "tcp"}
        ]

    monkeypatch.setattr(machine.host, "sleep", started)
    assert machine.plan(llama(environment={"A": "1"}))


def test_an_own_port_is_no_conflict_nor_is_one_that_is_given_up(machine: Machine) -> None:
    machine.converge(llama(), nemo())
    machine.api.list["nim-llama"]["Ports"] = [{"IP": "0.0.0.0", "PublicPort": 8000, "PrivatePort": 8000, "Type": "tcp"}]
    machine.plan(llama(environment={"A": "1"}), nemo())
    machine.plan(llama(port=8002), nemo(port=8000))
    machine.plan(llama(state="absent"), nemo(port=8000))
    with pytest.raises(FleetError, match="container nim-llama"):
        machine.plan(nemo(port=8000))


def test_a_port_of_a_service_that_is_not_started_now_is_not_looked_at(machine: Machine) -> None:
    machine.converge(llama())
    machine.listen(8000, 977, "nginx")
    assert machine.plan(llama()) == []


def test_broken_record_of_images_is_reported_and_left(machine: Machine) -> None:
    machine.host.files["/var/lib/gpu_fleet/images.json"] = b"{"
    assert failure(machine, llama()).reason == "state_unreadable"
    assert machine.host.files["/var/lib/gpu_fleet/images.json"] == b"{"


def test_a_file_in_the_place_of_a_directory(machine: Machine) -> None:
    machine.host.files["/srv/cache"] = b""
    machine.host.modes["/srv/cache"] = (0o644, 1000, 1000)
    assert failure(machine, llama(cache_directory="/srv/cache")).reason == "not_a_directory"


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ((0o777, 1000, 1000), (0o755, 1000, 1000)),
        ((0o750, 0, 0), (0o750, 1000, 1000)),
        ((0o700, 1000, 50), None),
        ((0o775, 1000, 1000), None),
    ],
)
def test_the_cache_belongs_to_the_container(
    machine: Machine, found: tuple[int, int, int], wanted: tuple[int, int, int] | None
) -> None:
    machine.host.dirs.add("/srv/cache")
    machine.host.modes["/srv/cache"] = found
    machine.converge(llama(cache_directory="/srv/cache"))
    assert machine.host.modes["/srv/cache"] == (wanted or found)


# -- the GPU loss of daemon-reload ------------------------------------------------------------------


def test_containers_that_a_daemon_reload_endangers_are_named_and_looked_at(machine: Machine) -> None:
    machine.api.put("trainer")
    machine.api.host_config["trainer"] = {"DeviceRequests": [{"Driver": "", "Capabilities": [["gpu"]]}]}
    machine.host.commands["docker exec *"] = (1, "", "Failed to initialize NVML: Unknown Error")
    outcome = machine.converge(llama())
    (change,) = [change for change in outcome.changes if change.action == "daemon_reload"]
    assert "may lose their GPUs by it: trainer" in change.why
    assert "Container trainer has lost its GPUs" in machine.answer["warnings"][0]


@pytest.mark.parametrize(
    ("engine", "driver", "host_config", "settings", "endangered"),
    [
        ("26.1.5", "systemd", {"DeviceRequests": [{"Driver": "", "Capabilities": [["gpu"]]}]}, "", True),
        ("26.1.5", "cgroupfs", {"DeviceRequests": [{"Driver": "", "Capabilities": [["gpu"]]}]}, "", False),
        ("29.0.0", "systemd", {"DeviceRequests": [{"Driver": "", "Capabilities": [["gpu"]]}]}, "", False),
        ("26.1.5", "systemd", {"DeviceRequests": [{"Driver": "cdi", "Capabilities": [["gpu"]]}]}, "", False),
        ("26.1.5", "systemd", {"Runtime": "nvidia"}, 'mode = "jit-cdi"', False),
        ("26.1.5", "systemd", {"Runtime": "nvidia"}, '[nvidia-container-runtime]\nmode = "legacy"', True),
        ("26.1.5", "systemd", {"Runtime": "runc", "DeviceRequests": None}, 'mode = "legacy"', False),
    ],
)
def test_who_is_endangered(
    machine: Machine, engine: str, driver: str, host_config: dict[str, t.Any], settings: str, endangered: bool
) -> None:
    machine.api.engine, machine.api.driver = engine, driver
    machine.api.put("trainer")
    machine.api.host_config["trainer"] = host_config
    machine.host.files["/etc/nvidia-container-runtime/config.toml"] = settings.encode()
    state = machine.resource(llama()).observe(machine.host)
    assert state.endangered == (("trainer",) if endangered else ())


# -- texts ----------------------------------------------------------------------------------------


def test_unit_text_follows_the_timeouts() -> None:
    (model,) = parse_models([llama(start_timeout=600, stop_timeout=45)])
    text = unit_text(model, "runtime")
    for line in (
        "StartLimitIntervalSec=2880",
        "StartLimitBurst=4",
        "TimeoutStopSec=75",
        "RestartSec=200ms",
        "Restart=always",
        "RestartPreventExitStatus=77 78",
        "SuccessExitStatus=77 143",
        "ConditionPathExists=!/var/lib/nim/maintenance",
        "ExecStart=/usr/local/libexec/nim/nim-unit run llama",
        "WantedBy=nim.target multi-user.target",
    ):
        assert line in text.splitlines()
    assert "Requires=" not in [line for line in text.splitlines() if not line.startswith("#")]
    assert "@sha256" not in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("injection", ["runtime", "cdi"])
def test_systemd_accepts_the_units(tmp_path: pathlib.Path, injection: str) -> None:
    (model,) = parse_models([llama()])
    wrapper = tmp_path / "nim-unit"
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    # Verified where it has no strangers around it, with the program it names in reach.
    texts = {
        "nim-llama.service": unit_text(model, injection).replace(WRAPPER, str(wrapper)),
        "nim.target": _nim_service.TARGET_TEXT,
        "nim.slice": _nim_service.SLICE_TEXT,
    }
    for name in ("docker.service", "nvidia-cdi-refresh.service"):
        texts[name] = "[Service]\nExecStart=/bin/true\n"
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in texts)],
        capture_output=True,
        encoding="utf-8",
        env=dict(os.environ, SYSTEMD_UNIT_PATH="%s:" % tmp_path),
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "nim" in line]
    assert (done.returncode, complaints) == (0, [])


def test_listening_sockets() -> None:
    header = "  sl  local_address ...\n"
    four = (
        header
        + "   0: 0100007F:1F40 00000000:0000 0A 0:0 00:0 0 0 0 77 1\n   1: 0100007F:1F41 00000000:0000 01 0:0 00:0 0 0 0 78 1\n"
    )
    assert listening_sockets(four, False) == [("127.0.0.1", 8000, "77")]
    six = header + "   0: %s:1F40 %s:0000 0A 0:0 00:0 0 0 0 79 1\n"
    assert listening_sockets(six % ("0" * 32, "0" * 32), True) == [("::", 8000, "79")]
    mapped = "0000000000000000FFFF00000100007F"
    assert listening_sockets(six % (mapped, "0" * 32), True) == [("127.0.0.1", 8000, "79")]
    assert listening_sockets(header + "garbage\n", False) == []


def test_module_role_and_models_say_the_same() -> None:
    """One source: the argument specification; module documentation and role follow it."""
    wanted = {name: dict(option) for name, option in NIM_MODEL_OPTIONS.items()}
    tree = ast.parse((ROOT / "plugins/modules/nim_service.py").read_text())
    (text,) = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "DOCUMENTATION"
    ]
    documented = yaml.safe_load(text)["options"]["models"]["suboptions"]
    role = yaml.safe_load((ROOT / "roles/nim/meta/argument_specs.yml").read_text())
    role_options = role["argument_specs"]["main"]["options"]["nim_models"]["options"]
    for given in (documented, role_options):
        assert list(given) == list(wanted)
        for name, option in given.items():
            assert option.pop("description")
            expected = dict(wanted[name])
            # No key of the documentation, and in a role it breaks values encrypted with Vault (ansible-core 2.18).
            expected.pop("no_log", None)
            assert option == expected, name


def test_role_defaults_are_all_documented() -> None:
    defaults = yaml.safe_load((ROOT / "roles/nim/defaults/main.yml").read_text())
    role = yaml.safe_load((ROOT / "roles/nim/meta/argument_specs.yml").read_text())
    options = role["argument_specs"]["main"]["options"]
    assert set(defaults) == set(options)
    for name, option in options.items():
        if "default" in option:
            assert option["default"] == defaults[name], name


def module_run(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], check: bool, **options: t.Any
) -> dict[str, t.Any]:
    """Run the module as Ansible does, on the machine in memory."""
    monkeypatch.setattr(_nim_service, "DockerApi", lambda: machine.api)
    monkeypatch.setattr(_module, "Host", lambda: machine.host)
    arguments = {"_ansible_check_mode": check, "_ansible_diff": True, **options}
    with patch_module_args(arguments), pytest.raises(SystemExit):
        nim_service.main()
    printed = capsys.readouterr().out
    assert KEY not in printed
    return t.cast("dict[str, t.Any]", json.loads(printed))


def test_module_check_real_check_real(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = functools.partial(module_run, machine, monkeypatch, capsys, models=[llama(), nemo()], ngc_api_key=KEY)
    check_1 = run(check=True)
    assert "/etc/nim/llama.json" not in machine.host.files
    real_1, check_2, real_2 = run(check=False), run(check=True), run(check=False)
    machine.listen(8002, 977, "nginx")
    moved = [llama(port=8002), nemo()]
    held = module_run(machine, monkeypatch, capsys, True, models=moved)
    bad = module_run(machine, monkeypatch, capsys, False, models=[llama(), llama(port=1)])
    assert [answer["changed"] for answer in (check_1, real_1, check_2, real_2)] == [True, True, False, False]
    assert check_1["diff"] == real_1["diff"]
    assert check_1["changes"] == real_1["changes"]
    assert check_2["diff"] == real_2["diff"] == []
    assert real_1["diff"][-1]["after"].splitlines()[-2:] == ["nim-nemo.service: started", "nim.target: active"]
    assert KEY_FILE + ": " + fingerprint(KEY) in real_1["diff"][-1]["after"]
    assert [service["state"] for service in check_1["services"]] == ["absent", "absent"]
    assert [service["state"] for service in real_2["services"]] == ["started", "started"]
    assert (held["failed"], held["reason"], held["changed"]) == (True, "port_in_use", False)
    assert "nginx (pid 977)" in held["msg"]
    assert (bad["reason"], bad["changed"]) == ("invalid_option", False)
    assert "models[1].name = 'llama'" in bad["msg"]


@pytest.mark.parametrize("given", [{"T": 'hunter "secret\\'}, "T=hunter-text"])
def test_module_never_prints_secret_variables(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: t.Any
) -> None:
    models = [llama(secret_environment=given), nemo()]
    logged: list[str] = []
    monkeypatch.setattr(
        "ansible.module_utils.basic.AnsibleModule.log",
        lambda self, *given, **named: logged.append(repr((given, named))),
    )
    for check in (True, False):
        answer = module_run(machine, monkeypatch, capsys, check, models=models)
        assert answer["changed"], answer
        assert "hunter" not in json.dumps(answer), answer
    assert b"hunter" in machine.host.files["/etc/nim/llama.env"]
    assert "hunter" not in "".join(logged)


def test_plan_is_pure(machine: Machine) -> None:
    resource = machine.resource(llama(), nemo(), key=KEY)
    state = resource.observe(machine.host)
    before = dict(machine.host.files), list(machine.host.calls)
    first = resource.plan(state)
    assert first == resource.plan(dataclasses.replace(state))
    assert (dict(machine.host.files), list(machine.host.calls)) == before
