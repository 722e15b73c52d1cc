# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every module as Ansible calls it: check, real, check, real. Check mode promises what happens and does nothing; what was
done once is found done; what is refused is refused in check mode too. Modules that only look change nothing either way."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import pathlib
import typing as t

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpu_fleet.nim.plugins.module_utils import (
    _docker_daemon_planner,
    _driver_upgrade_planner,
    _haproxy_server,
    _host_cleanup,
    _module,
    _module_progress,
    _nim_deploy_planner,
    _nim_gateway_planner,
    _nim_service,
    _packages,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._haproxy_runtime import LiveServer
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_lookup import look_up
from ansible_collections.gpu_fleet.nim.plugins.module_utils._ngc_key import fingerprint
from ansible_collections.gpu_fleet.nim.plugins.module_utils._ngc_login import NgcLogin
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_image import NimImages
from deploy_world import NEW, OLD, DeployWorld
from docker_fakes import CONFIG, FakeDockerd
from driver_world import DriverWorld
from engine_machine import Machine as EngineMachine
from engine_machine import ce
from fake_host import FakeHost
from gateway_fakes import Api, GatewayHost, Packages, Runtime
from gateway_fakes import options as gateway_options
from image_world import DIGEST, KEY, LLAMA, FakeClient, image_world
from nim_machine import Machine as NimMachine
from nim_machine import llama
from toolkit_machine import Machine as ToolkitMachine
from upgrade_world import UpgradeWorld, install_fakes

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODULES = "ansible_collections.gpu_fleet.nim.plugins.modules."
SIGNING_KEY = b"\x99\x01" + bytes(40)

Options = t.Dict[str, t.Any]


class Case(t.NamedTuple):
    """One module and the host it is called on.

    Attributes:
        promises: What the changes name, in this order.
        shows: Texts that the diff must show as new, or as gone where things are removed.
        says: Part of the answer -> its value once all is done.
        refused: Options that are refused, with the reason and a part of the sentence.
        prepare: Makes the host such that they are.
    """

    host: FakeHost
    options: Options
    promises: list[str]
    shows: list[str]
    says: Options
    refused: tuple[Options, str, str]
    prepare: t.Callable[[], None] = lambda: None


class Bench:
    """Where a row of the table puts its fakes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
        self.patch = monkeypatch
        self.tmp_path = tmp_path

    def host(self, host: FakeHost, *modules: str) -> None:
        """The host of the shells, and of modules that make theirs themselves."""
        for shell in (_module, _module_progress):
            self.patch.setattr(shell, "Host", lambda: host)
        for name in modules:
            self.patch.setattr(importlib.import_module(MODULES + name), "Host", lambda: host)

    def docker(self, api: t.Any) -> None:
        for util in (_docker_daemon_planner, _nim_service, _host_cleanup, _driver_upgrade_planner, _nim_deploy_planner):
            self.patch.setattr(util, "DockerApi", lambda: api)


class NoDocker:
    """A host on which no Docker answers."""

    def available(self) -> bool:
        return False

    def __getattr__(self, name: str) -> t.Any:
        def ask(*given: t.Any, **named: t.Any) -> t.NoReturn:
            raise FleetError("docker_unavailable", "There is no Docker.")

        return ask


def nvidia_driver(bench: Bench) -> Case:
    world = DriverWorld()
    bench.host(world)

    def somebody() -> None:
        world.load("580.95.05")
        world.hold_gpu(812, "train.service")

    return Case(
        world,
        {"progress_interval": 0},
        [
            "package linux-headers-6.8.0-45-generic",
            "repository nvidia-cuda",
            "/etc/apt/preferences.d/gpu-fleet-nvidia-driver",
            "/etc/modprobe.d/gpu-fleet-nouveau.conf",
            "driver packages",
            "package holds",
            "/etc/apt/apt.conf.d/52gpu-fleet-nvidia",
        ],
        [
            "blacklist nouveau",
            "driver packages: branch 580 (open, nvidia)",
            "Pin: version 580.*",
            "package holds: held",
        ],
        {"message": "Driver 580.95.05 is installed; its module is not loaded yet.", "reload_required": True},
        ({"branch": "570"}, "gpu_in_use", "pid 812 (python3) of unit train.service"),
        somebody,
    )


def nvidia_driver_reload(bench: Bench) -> Case:
    world = DriverWorld()
    world.install_driver("580.95.05", loaded=False)
    world.load("580.65.06")
    bench.host(world)

    def somebody() -> None:
        world.load("580.65.06")
        world.hold_gpu(812, "train.service")

    return Case(
        world,
        {"progress_interval": 0},
        ["kernel module nvidia"],
        ["kernel module nvidia: 580.95.05"],
        {"message": "Driver 580.95.05: loaded = on disk = user space.", "reboot_required": False},
        ({}, "gpu_in_use", "pid 812 (python3) of unit train.service"),
        somebody,
    )


def driver_upgrade(bench: Bench) -> Case:
    world = UpgradeWorld()
    install_fakes(bench.patch, world)
    bench.host(world)
    bench.docker(world.docker)
    return Case(
        world,
        {"progress_interval": 0, "nvidia_driver": {}},
        [
            "record of the upgrade",
            "packages of the driver",
            "the host",
            "NIM services llama, qwen",
            "nvidia-cdi-refresh.path, nvidia-dcgm.service, nvidia-persistenced.service",
            "kernel module nvidia",
            "driver packages",
            "kernel module nvidia",
            "driver",
            "NIM services llama, qwen",
            "NIM services llama, qwen",
        ],
        ["driver packages: branch 580", "NIM services llama, qwen: ready"],
        {"step": "ready", "loaded": "580.95.05", "reboot_required": False, "open": True},
        (
            {"state": "prestaged", "nvidia_driver": {"branch": "595"}},
            "gpu_in_use",
            "pid 812 (python3) of unit train.service",
        ),
        lambda: world.hold_gpu(812, "train.service"),
    )


def nim_deploy(bench: Bench) -> Case:
    world = DeployWorld(bench.patch)
    bench.host(world.host)
    bench.docker(world.api)
    models = "NIM services llama, nemo"
    return Case(
        world.host,
        {"progress_interval": 0, "nim_service": {"models": list(NEW)}},
        ["record of the deployment", "images", "the host", models, models],
        [models + ": llama 1.8.5, nemo 2.0.13", models + ": ready"],
        {"step": "ready", "runs": "llama 1.8.5 (cdcdcdcdcdcd), nemo 2.0.13 (abababababab)", "open": True},
        (
            {"state": "prestaged", "nim_service": {"models": [dict(OLD[0], gpus=3)]}},
            "gpus_unavailable",
            "llama",
        ),
    )


def docker_engine(bench: Bench) -> Case:
    machine = EngineMachine()
    bench.host(machine.host)
    bench.docker(machine.dockerd)
    return Case(
        machine.host,
        {"progress_interval": 0},
        [
            "repository docker",
            "package docker-ce",
            "hold of docker-ce, docker-ce-cli, containerd.io",
            "docker.service at boot",
            "docker.service",
        ],
        ["URIs: https://download.docker.com/linux/ubuntu", "package docker-ce: newest", "docker.service: active"],
        {"version": ce("29.4.3")},
        (
            {"package_source": "distribution"},
            "source_switch_refused",
            "swapping one for the other stops all containers",
        ),
    )


def docker_daemon(bench: Bench) -> Case:
    host = FakeHost({CONFIG: '{\n  "debug": false\n}\n'})
    bench.host(host)
    bench.docker(FakeDockerd(host))
    return Case(
        host,
        {"live_restore": True, "options": {"labels": ["fleet=gpu"]}},
        [CONFIG],
        ['{\n  "debug": false,\n  "labels": [\n    "fleet=gpu"\n  ],\n  "live-restore": true\n}\n'],
        {"config_file": CONFIG},
        ({}, "daemon_json_invalid", CONFIG),
        lambda: host.files.update({CONFIG: b"{"}),
    )


def docker_group(bench: Bench) -> Case:
    host = FakeHost({"/etc/passwd": "alice:x:1000:1000::/h:/bin/sh\n", "/etc/group": "docker:x:999:eve\n"})

    def gpasswd(fake: FakeHost, argv: tuple[str, ...], *_: t.Any) -> str:
        fake.files["/etc/group"] = b"docker:x:999:alice,eve\n" if argv[1] == "-a" else b"docker:x:999:alice\n"
        return ""

    host.commands = {"gpasswd *": gpasswd, "getent *": (2, "", "")}
    bench.host(host)
    return Case(
        host,
        {"users": ["alice"]},
        ["member alice", "member eve"],
        ["member alice: docker\n"],
        {"members": ["alice"]},
        ({"users": ["bob"]}, "unknown_user", "bob"),
    )


def nvidia_container_toolkit(bench: Bench) -> Case:
    machine = ToolkitMachine()
    bench.host(machine.host)
    bench.docker(machine.dockerd)
    return Case(
        machine.host,
        {"progress_interval": 0},
        [
            "repository nvidia-container-toolkit",
            "package nvidia-container-toolkit",
            "package nvidia-container-toolkit-base",
            "package libnvidia-container-tools",
            "package libnvidia-container1",
            "hold of nvidia-container-toolkit, nvidia-container-toolkit-base, libnvidia-container-tools, libnvidia-container1",
            "/etc/nvidia-container-runtime/config.toml: mode",
            CONFIG,
            "GPU container",
        ],
        ['"path": "nvidia-container-runtime"', "config.toml: mode: auto", "GPU container: sees the host's GPUs"],
        {"version": "1.20.0-1", "mode": "auto", "registered": True, "smoke_test": "passed"},
        ({"mode": "jit-cdi", "version": "1.17.8"}, "invalid_option", "toolkit 1.17.8 does not know it"),
    )


def ngc_login(bench: Bench) -> Case:
    host = FakeHost({"/etc/passwd": "root:x:0:0:root:/root:/bin/bash\n"})
    host.dirs.add("/root")

    class Registry:
        def __init__(self, registry: str, username: str, password: str, **options: t.Any) -> None:
            self.key = password

        def check_credentials(self, reference: t.Any = None) -> None:
            if self.key != KEY:
                raise FleetError("bad_key", "nvcr.io refuses the key: it is wrong, expired or revoked.")

    bench.host(host, "ngc_login")
    module = importlib.import_module(MODULES + "ngc_login")
    bench.patch.setattr(module, "NgcLogin", functools.partial(NgcLogin, client=t.cast(t.Any, Registry)))
    return Case(
        host,
        {"api_key": KEY},
        ["login of root at nvcr.io"],
        ["nvcr.io: $oauthtoken %s\n" % fingerprint(KEY)],
        {"key_given": True, "message": ""},
        ({"api_key": KEY + "-expired"}, "bad_key", "it is wrong, expired or revoked"),
    )


def nim_image(bench: Bench) -> Case:
    world = image_world(FakeHost(), bench.tmp_path, bench.patch)
    bench.host(world.host, "nim_image")

    def build(images: t.Any, **given: t.Any) -> NimImages:
        del given["host_name"]
        return world.images(images, **given)

    bench.patch.setattr(importlib.import_module(MODULES + "nim_image"), "NimImages", build)
    other = "nvcr.io/nim/meta/other:1"
    FakeClient.tags[other] = FleetError("no_entitlement", "nvcr.io knows the API key but does not let it pull.")
    return Case(
        world.host,
        {"images": [{"image": LLAMA}], "api_key": KEY},
        ["image " + LLAMA],
        ["image %s: %s\n" % (LLAMA, DIGEST)],
        {"finished": True},
        ({"images": [{"image": other}], "api_key": KEY}, "no_entitlement", "does not let it pull"),
    )


def nim_service(bench: Bench) -> Case:
    machine = NimMachine(bench.patch)
    bench.host(machine.host)
    bench.docker(machine.api)
    moved = {"models": [llama(port=8002)], "ngc_api_key": KEY}
    return Case(
        machine.host,
        {"models": [llama()], "ngc_api_key": KEY},
        [
            "directory /var/lib/nim",
            "directory /var/lib/nim/state",
            "directory /etc/nim",
            "directory /usr/local/libexec/nim",
            "directory /var/lib/nim/cache/llama",
            "/usr/local/libexec/nim/nim-unit",
            "/etc/systemd/system/nim.target",
            "/etc/systemd/system/nim.slice",
            "/etc/nim/ngc.env",
            "/etc/nim/llama.json",
            "/etc/systemd/system/nim-llama.service",
            "nim.target",
            "nim-llama.service",
            "systemd",
            "nim-llama.service",
            "nim.target",
        ],
        ["nim-llama.service: started", "/etc/nim/ngc.env: " + fingerprint(KEY), "Description=NIM llama"],
        {},
        (moved, "port_in_use", "nginx (pid 977)"),
        lambda: machine.listen(8002, 977, "nginx"),
    )


def gpu_host_cleanup(bench: Bench) -> Case:
    ours = ["/etc/nim/ngc.env", "/usr/local/libexec/nim/nim-unit", "/var/lib/gpu_fleet/images.json"]
    host = FakeHost(dict.fromkeys([*ours, "/etc/systemd/system/nim.target", "/etc/hosts"], "x"), {"systemctl *": ""})
    bench.host(host)
    bench.docker(NoDocker())
    return Case(
        host,
        {},
        [
            "nim.target",
            "/usr/local/libexec/nim/nim-unit",
            "/etc/nim/ngc.env",
            "/var/lib/gpu_fleet",
            "/etc/nim",
            "/usr/local/libexec/nim",
        ],
        ["nim.target: present\n", "/etc/nim/ngc.env: present\n"],
        {"reboot_required": False},
        ({"caches": ["/etc"]}, "invalid_option", "/etc"),
    )


def rollout_claim(bench: Bench) -> Case:
    path = "/var/lib/gpu_fleet/driver-upgrade.json"
    host = FakeHost({path: json.dumps({"claim": {"run": "bob", "seen": 1.0}})})
    bench.host(host)

    def overtaken() -> None:
        host.files[path] = json.dumps({"claim": {"run": "bob", "seen": host.time(), "lease": 60}}).encode()

    return Case(
        host,
        {"kind": "driver_upgrade", "run": "alice"},
        ["claim"],
        ["claim: alice"],
        {"claim": {"run": "alice", "seen": host.time(), "lease": 3600}},
        ({}, "upgrade_running", "bob is at the upgrade of its driver"),
        overtaken,
    )


def nim_gateway(bench: Bench) -> Case:
    host = GatewayHost()
    bench.host(host)
    bench.patch.setattr(_nim_gateway_planner, "RuntimeApi", lambda _path: Api(host))
    bench.patch.setattr(_nim_gateway_planner, "package_manager", Packages)
    return Case(
        host,
        {**gateway_options(), "api_keys": {"team": KEY}},
        [
            "package haproxy",
            "/usr/local/libexec/nim/gateway-state",
            "/etc/systemd/system/haproxy.service.d/nim-gateway.conf",
            "/etc/haproxy/nim/models.map",
            "/etc/haproxy/nim/models.json",
            "/etc/haproxy/nim/servers",
            "/etc/haproxy/nim/keys.map",
            "/etc/haproxy/haproxy.cfg",
            "haproxy.service",
        ],
        ["balance leastconn", "haproxy.service: running", fingerprint(KEY) + " team\n"],
        {},
        ({}, "foreign_configuration", "replace_configuration: true"),
        lambda: host.files.update({"/etc/haproxy/haproxy.cfg": b"frontend mine"}),
    )


def haproxy_server(bench: Bench) -> Case:
    host = FakeHost()
    runtime = Runtime(
        *(
            LiveServer("llama", name + ":m", "10.0.0.1", 8000, "enabled", "UP", 0, True, True)
            for name in ("gpu01", "gpu02")
        )
    )
    bench.host(host)
    bench.patch.setattr(_haproxy_server, "RuntimeApi", lambda _path, _master: runtime)
    bench.patch.setattr(_haproxy_server, "probe", lambda _address, _port: None)
    bench.patch.setattr(_haproxy_server, "locked", contextlib.nullcontext)
    return Case(
        host,
        {"host": "gpu01", "state": "maintenance"},
        ["server llama/gpu01:m", "requests on gpu01", "server llama/gpu01:m"],
        ["server llama/gpu01:m: drained\n", "server llama/gpu01:m: maintenance\n"],
        {
            "servers": [
                {"backend": "llama", "server": "gpu01:m", "state": "maintenance", "status": "MAINT", "sessions": 0}
            ],
            "drained": True,
            "reason": "",
        },
        ({"host": "gpu02"}, "last_server", "gpu02:m is the last one"),
    )


#: Every module that changes something.
CHANGING: dict[str, t.Callable[[Bench], Case]] = {
    build.__name__: build
    for build in (
        nvidia_driver,
        nvidia_driver_reload,
        driver_upgrade,
        nim_deploy,
        docker_engine,
        docker_daemon,
        docker_group,
        nvidia_container_toolkit,
        ngc_login,
        nim_image,
        nim_service,
        gpu_host_cleanup,
        nim_gateway,
        haproxy_server,
        rollout_claim,
    )
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Bench:
    monkeypatch.setattr(_packages, "download", lambda _url: SIGNING_KEY)
    return Bench(monkeypatch, tmp_path)


def call(capsys: pytest.CaptureFixture[str], module: str, check: bool, **options: t.Any) -> Options:
    """The module in this process, where the host in memory is; as Ansible calls it with --diff."""
    arguments = {**options, "_ansible_check_mode": check, "_ansible_diff": True}
    with patch_module_args(arguments), pytest.raises(SystemExit):
        importlib.import_module(MODULES + module).main()
    printed = capsys.readouterr().out
    assert KEY not in printed
    return t.cast(Options, json.loads(printed))


@pytest.mark.parametrize("name", CHANGING)
def test_check_real_check_real(name: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    case = CHANGING[name](bench)
    untouched = (dict(case.host.files), dict(case.host.links), set(case.host.dirs))
    check_1 = call(capsys, name, True, **case.options)
    after_check = (dict(case.host.files), dict(case.host.links), set(case.host.dirs))
    real_1 = call(capsys, name, False, **case.options)
    done = dict(case.host.files)
    check_2, real_2 = (call(capsys, name, check, **case.options) for check in (True, False))
    after_all = dict(case.host.files)
    case.prepare()
    options, reason, words = case.refused
    refused = [call(capsys, name, check, **{**case.options, **options}) for check in (True, False)]
    side = "before" if name == "gpu_host_cleanup" else "after"
    shown = "".join(entry[side] for entry in check_1["diff"])

    assert [answer["changed"] for answer in (check_1, real_1, check_2, real_2)] == [True, True, False, False]
    assert after_check == untouched
    assert after_all == done
    assert [change["what"] for change in check_1["changes"]] == case.promises
    assert check_1["changes"] == real_1["changes"]
    assert all(change["why"] for change in check_1["changes"])
    assert check_1["diff"] == real_1["diff"]
    assert [text for text in case.shows if text not in shown] == []
    assert check_2["changes"] == real_2["changes"] == check_2["diff"] == real_2["diff"] == []
    assert {key: real_2[key] for key in case.says} == case.says
    for answer in refused:
        assert (answer["failed"], answer["changed"], answer["reason"]) == (True, False, reason)
        assert words in answer["msg"], answer["msg"]


#: Modules that only look -> options.
LOOKING: dict[str, Options] = {
    "gpu_host_info": {},
    "gpu_host_plan": {"nvidia_driver": {}, "docker_engine": {}, "nim_service": {"models": [llama()]}},
    "gpu_host_preflight": {"nvidia_driver": {}, "nim_service": {"models": [llama()]}},
    "gpu_host_diagnosis": {"nvidia_driver": {}, "nim_service": {"models": [llama()]}},
    "nim_image_info": {"image": LLAMA, "api_key": KEY},
    "nim_health": {"models": [{"name": "llama", "port": 9}], "wait": False},
}


@pytest.mark.parametrize("name", LOOKING)
def test_looking_changes_nothing(name: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    world = DriverWorld()
    no_unit = "LoadState=not-found\nActiveState=inactive\n"
    # Before the world's own pattern for all units.
    world.commands = {
        "systemctl show *docker.service": no_unit,
        "systemctl show *docker.socket": no_unit,
        **world.commands,
    }
    world.files["/etc/passwd"] = b"root:x:0:0::/root:/bin/sh\n"
    image_world(world, bench.tmp_path, bench.patch)
    bench.host(world, name)
    module = importlib.import_module(MODULES + name)
    for place in ("DockerApi", "look_up"):
        if hasattr(module, place):
            fake = NoDocker if place == "DockerApi" else functools.partial(look_up, client=t.cast(t.Any, FakeClient))
            bench.patch.setattr(module, place, fake)
    for util in ("_host_plan", "_host_preflight", "_diagnosis", "_gpu_host_info"):
        bench.patch.setattr(
            importlib.import_module(MODULES.replace("modules.", "module_utils.") + util), "DockerApi", NoDocker
        )
    bench.docker(NoDocker())
    before = dict(world.files)
    answers = [call(capsys, name, check, **LOOKING[name]) for check in (True, False, True, False)]
    assert [answer["changed"] for answer in answers] == [False] * 4
    assert "failed" not in answers[0], answers[0]["msg"]
    assert answers[0] == answers[1] == answers[2] == answers[3]
    # A health check keeps what it has found of a container; there is none here.
    assert world.files == before
    assert not world.ran(
        r"^(apt-get|apt-mark|modprobe|rmmod|dkms build|update-initramfs|systemctl (start|stop|enable))"
    )


def test_every_module_is_here() -> None:
    modules = {path.stem for path in (ROOT / "plugins/modules").glob("*.py")}
    on_controller = {name for name in modules if not hasattr(importlib.import_module(MODULES + name), "main")}
    assert on_controller == {
        "validate_inventory",
        "fleet_status",
        "fleet_plan",
        "fleet_preflight",
        "fleet_diagnosis",
        "fleet_rollout",
    }
    # The container of the one and the HAProxy of the other make worlds of their own.
    assert modules - on_controller == {*CHANGING, *LOOKING, "nim_profile_info", "haproxy_info"}
