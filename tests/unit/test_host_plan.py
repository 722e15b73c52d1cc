# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan of a whole host: bare, converged, broken in places."""

from __future__ import annotations

import importlib
import json
import typing as t

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpu_fleet.nim.plugins.module_utils import (
    _docker_daemon_planner,
    _health_drift,
    _host_plan,
    _packages,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_plan import ReadOnlyHost, plan_host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver import NvidiaDriver
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_reload import DriverReload
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import CHAIN, RESOURCE_OPTIONS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import converge
from ansible_collections.gpu_fleet.nim.plugins.modules import gpu_host_plan
from docker_fakes import CONFIG, FakeDockerd
from driver_world import DriverWorld
from fake_host import FakeHost
from nim_machine import KEY, LLAMA, NEMO, Machine, llama, nemo

SECRET = "hf_plan-secret \\ \" '"
MODULES = "ansible_collections.gpu_fleet.nim.plugins.modules."


class Down:
    """Docker that is not there."""

    def __getattr__(self, name: str) -> t.Callable[..., t.Any]:
        def ask(*_arguments: t.Any, **_options: t.Any) -> t.Any:
            if name == "available":
                return False
            raise FleetError("docker_unavailable", "Asking Docker failed: there is no such socket.")

        return ask


def plan(host: FakeHost, api: t.Any = None, **wanted: t.Any) -> dict[str, t.Any]:
    before = (dict(host.files), dict(host.modes), set(host.dirs), dict(host.links))
    answer = plan_host(host, wanted, api or Down()).result()
    assert (host.files, host.modes, host.dirs, host.links) == before
    # What a module returns must be JSON.
    return t.cast("dict[str, t.Any]", json.loads(json.dumps(answer)))


def found(answer: dict[str, t.Any], resource: str) -> list[tuple[str, str | None]]:
    return [(change["what"], change["after"]) for change in answer["changes"] if change["resource"] == resource]


def everything(*models: dict[str, t.Any], **options: t.Any) -> dict[str, t.Any]:
    wanted: dict[str, t.Any] = {
        "nvidia_driver": {},
        "nvidia_driver_reload": {"expected_version": "580"},
        "docker_engine": {},
        "docker_daemon": {"options": {}, "live_restore": True},
        "docker_group": {"users": ["ops"]},
        "nvidia_container_toolkit": {},
        "ngc_login": {"api_key": KEY},
        "nim_image": {"images": [{"image": model["image"]} for model in models]},
        "nim_service": {"models": list(models), "ngc_api_key": KEY},
        "nim_health": {"models": list(models)},
    }
    return {**wanted, **options}


@pytest.fixture
def bare() -> DriverWorld:
    """A GPU host as it comes: no driver, no Docker."""
    world = DriverWorld()
    no_unit = "LoadState=not-found\nActiveState=inactive\n"
    # Before the world's own pattern for all units.
    docker = {"systemctl show *docker.service": no_unit, "systemctl show *docker.socket": no_unit}
    world.commands = {**docker, "systemctl is-active *": "active\n", **world.commands}
    world.files["/etc/passwd"] = b"root:x:0:0::/root:/bin/sh\nops:x:1000:1000::/home/ops:/bin/sh\n"
    return world


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A host whose services can be set up."""
    machine = Machine(monkeypatch)
    base = "/sys/bus/pci/devices/0000:00:06.0/"
    machine.host.files.update(
        {base + "vendor": b"0x10de\n", base + "class": b"0x030200\n", base + "device": b"0x2335\n"}
    )
    return machine


def services(*models: dict[str, t.Any], **options: t.Any) -> dict[str, t.Any]:
    return {
        "nim_image": {"images": [{"image": model["image"]} for model in models]},
        "nim_service": {"models": list(models), **options},
    }


# -- hosts ----------------------------------------------------------------------------------------


def test_bare_host(bare: DriverWorld) -> None:
    answer = plan(bare, **everything(llama()))
    assert answer["errors"] == []
    assert answer["drift"] is True
    assert answer["worst"] == "none"
    resources = [change["resource"] for change in answer["changes"]]
    # A service that is not there yet is not asked.
    assert set(resources) == set(CHAIN) - {"nim_health"}
    assert sorted(resources, key=CHAIN.index) == resources
    assert ("driver packages", None) in found(answer, "nvidia_driver")
    assert found(answer, "nvidia_driver_reload") == [("kernel module nvidia", "nvidia_driver")]
    assert ("package docker-ce", None) in found(answer, "docker_engine")
    assert found(answer, "docker_daemon") == [(CONFIG, None)]
    assert found(answer, "docker_group") == [("member ops", None)]
    assert ("package nvidia-container-toolkit", None) in found(answer, "nvidia_container_toolkit")
    assert found(answer, "ngc_login") == [("login of root at nvcr.io", None)]
    assert found(answer, "nim_image") == [("image " + LLAMA, "docker_engine")]
    assert found(answer, "nim_service") == [("nim-llama.service", "docker_engine")]
    assert answer["changes"][-1]["why"] == "after docker_engine: it cannot be planned in detail before that"


def test_host_without_a_gpu_is_left_alone(host: FakeHost) -> None:
    answer = plan(host, **everything(llama()))
    assert (answer["gpu"], answer["drift"], answer["changes"], answer["errors"]) == (False, False, [], [])
    assert host.calls == []


def test_only_what_is_asked_for(bare: DriverWorld) -> None:
    assert {change["resource"] for change in plan(bare, docker_engine={})["changes"]} == {"docker_engine"}


def test_a_broken_file_hides_nothing_else(bare: DriverWorld) -> None:
    bare.files[CONFIG] = b'{"debug": tru'
    answer = plan(bare, **everything(llama()))
    assert [(error["resource"], error["reason"], error["after"]) for error in answer["errors"]] == [
        ("docker_daemon", "daemon_json_invalid", None),
        ("nvidia_container_toolkit", "daemon_json_invalid", "docker_daemon"),
    ]
    assert CONFIG in answer["errors"][0]["message"]
    planned = {change["resource"] for change in answer["changes"]}
    assert planned == set(CHAIN) - {"docker_daemon", "nvidia_container_toolkit", "nim_health"}


def test_wrong_options_are_findings_too(bare: DriverWorld) -> None:
    answer = plan(bare, nvidia_driver={"branch": "12"}, docker_group={"users": ["nobody-here"]}, docker_engine={})
    assert [(error["resource"], error["reason"]) for error in answer["errors"]] == [
        ("nvidia_driver", "invalid_option"),
        ("docker_group", "unknown_user"),
    ]
    assert found(answer, "docker_engine")


def test_driver_that_is_installed_but_not_loaded(bare: DriverWorld) -> None:
    bare.install_driver("580.95.05", loaded=False)
    wanted = {"nvidia_driver": {}, "nvidia_driver_reload": {"expected_version": "580"}}
    answer = plan(bare, **wanted)
    [change] = [change for change in answer["changes"] if change["resource"] == "nvidia_driver_reload"]
    assert (change["from"], change["to"], change["after"]) == (None, "580.95.05", None)
    bare.load("580.95.05")
    assert found(plan(bare, **wanted), "nvidia_driver_reload") == []


def test_another_branch_is_loaded_after_its_packages(bare: DriverWorld) -> None:
    bare.install_driver("580.95.05")
    wanted = {"nvidia_driver": {"branch": "595"}, "nvidia_driver_reload": {"expected_version": "595"}}
    answer = plan(bare, **wanted)
    assert answer["errors"] == []
    assert answer["worst"] == "unload_driver"
    assert [(change["resource"], change["what"], change["disruption"]) for change in answer["changes"][:2]] == [
        ("nvidia_driver", "driver packages", "unload_driver"),
        ("nvidia_driver_reload", "kernel module nvidia", "unload_driver"),
    ]
    bare.hold_gpu(812, "train.service")
    answer = plan(bare, **wanted)
    assert all("train.service" in change["blocked"] for change in answer["changes"])
    # Nobody is about to mend it: then it is wrong.
    [error] = plan(bare, nvidia_driver_reload={"expected_version": "595"})["errors"]
    assert error["reason"] == "driver_mismatch"


def test_without_reloading_only_a_reboot_helps(bare: DriverWorld) -> None:
    bare.install_driver("580.95.05", loaded=False)
    bare.load("580.65.06")
    answer = plan(bare, nvidia_driver={"unload": False})
    assert answer["worst"] == "reboot"
    assert (answer["changes"][0]["resource"], answer["changes"][0]["to"]) == ("nvidia_driver_reload", "580.95.05")
    assert "switched off" in answer["changes"][0]["blocked"]


#: The module in memory -> what the plan says of driver packages of another branch, and of the module after them.
MODULE_AFTER_PACKAGES = {
    # reload, loaded, can_unload
    (True, True, True): ("unload_driver", "unload_driver", None),
    (True, True, False): ("none", "reboot", "built without module unloading"),
    (True, False, True): ("none", "none", None),
    (False, True, True): ("none", "reboot", "reloading the driver is switched off"),
    (False, True, False): ("none", "reboot", "reloading the driver is switched off"),
    (False, False, True): ("none", "reboot", "reloading the driver is switched off"),
}


def driver_only(branch: str, *, reload: bool, **options: t.Any) -> dict[str, t.Any]:
    """What the role asks for: without reloading it leaves the reload out and unloads nothing."""
    wanted: dict[str, t.Any] = {"nvidia_driver": {"branch": branch, "unload": reload, **options}}
    reloads = {"nvidia_driver_reload": {"expected_version": options.get("version") or branch}}
    return {**wanted, **reloads} if reload else wanted


def of_the_module(answer: dict[str, t.Any]) -> list[tuple[t.Any, ...]]:
    parts = ("resource", "disruption", "from", "to", "after")
    found = [change for change in answer["changes"] if change["what"] in ("driver packages", "kernel module nvidia")]
    return [tuple(change[part] for part in parts) for change in sorted(found, key=lambda one: one["resource"])]


@pytest.mark.parametrize(("reload", "loaded", "can_unload"), list(MODULE_AFTER_PACKAGES))
@pytest.mark.parametrize("installed", [True, False])
def test_what_packages_that_are_due_do_to_the_module(
    bare: DriverWorld, installed: bool, reload: bool, loaded: bool, can_unload: bool
) -> None:
    packages, module, blocked = MODULE_AFTER_PACKAGES[(reload, loaded, can_unload)]
    bare.can_unload = can_unload
    if installed:
        bare.install_driver("580.95.05", loaded=loaded)
    elif loaded:
        # Somebody has removed the packages behind it.
        bare.load("580.95.05")
    answer = plan(bare, **driver_only("595", reload=reload))
    version, memory = "580.95.05" if installed else None, "580.95.05" if loaded else None
    assert answer["errors"] == []
    assert answer["worst"] == max(packages, module, key=["none", "unload_driver", "reboot"].index)
    if installed and reload and not loaded:
        # The present module could be loaded at once.
        assert of_the_module(answer)[1][:2] == ("nvidia_driver_reload", "none")
        return
    assert of_the_module(answer) == [
        ("nvidia_driver", packages, version, "branch 595 (open, nvidia)", None),
        ("nvidia_driver_reload", module, memory, "595", "nvidia_driver"),
    ]
    [change] = [change for change in answer["changes"] if change["resource"] == "nvidia_driver_reload"]
    assert blocked in change["blocked"] if blocked else change["blocked"] is None
    if loaded:
        bare.hold_gpu(812, "train.service")
        assert all(
            "train.service" in change["blocked"]
            for change in plan(bare, **driver_only("595", reload=reload))["changes"]
        )


@pytest.mark.parametrize("reload", [True, False])
@pytest.mark.parametrize("can_unload", [True, False])
def test_a_module_that_is_as_wanted_needs_no_reboot_for_packages_beside_it(
    bare: DriverWorld, reload: bool, can_unload: bool
) -> None:
    bare.can_unload = can_unload
    bare.install_driver("580.95.05")
    bare.configured()
    assert of_the_module(plan(bare, **driver_only("580", reload=reload))) == []
    # Libraries of another branch must go, and the module stays what it is.
    bare.packages["libnvidia-gl-570"] = ["570.172.08-0ubuntu1", "ii"]
    found = of_the_module(plan(bare, **driver_only("580", reload=reload)))
    gone = "unload_driver" if reload and can_unload else "none"
    assert found[0][:2] == ("nvidia_driver", gone)
    assert [one[:2] for one in found[1:]] == ([("nvidia_driver_reload", gone)] if reload and can_unload else [])
    # Nor for a module file that has to be built anew.
    del bare.packages["libnvidia-gl-570"]
    bare.module = ""
    found = of_the_module(plan(bare, **driver_only("580", reload=reload)))
    assert [one[:2] for one in found] == [("nvidia_driver", "none")]


def reboots(world: DriverWorld, wanted: dict[str, t.Any]) -> bool:
    """Whether the role comes to its reboot: what its two modules do, and its condition."""
    driver = NvidiaDriver(**wanted["nvidia_driver"])
    packages = driver.result(converge(world, driver, check_mode=False).state)
    if "nvidia_driver_reload" not in wanted:
        return bool(packages["reload_required"])
    reload = DriverReload(**wanted["nvidia_driver_reload"])
    return bool(reload.result(converge(world, reload, check_mode=False).state)["reboot_required"])


@pytest.mark.parametrize("reload", [True, False])
@pytest.mark.parametrize("can_unload", [True, False])
@pytest.mark.parametrize("version", ["", "580.65.06", "580.95.05"])
@pytest.mark.parametrize("memory", ["", "580.65.06", "580.95.05"])
@pytest.mark.parametrize("installed", ["", "580.65.06", "580.95.05", "535.183.06"])
def test_a_reboot_is_planned_where_the_role_comes_to_one(
    bare: DriverWorld,
    monkeypatch: pytest.MonkeyPatch,
    installed: str,
    memory: str,
    version: str,
    can_unload: bool,
    reload: bool,
) -> None:
    monkeypatch.setattr(_packages, "download", lambda _url: b"\x99\x01key")
    bare.can_unload = can_unload
    bare.dirs.add("/lib/modules/%s/build" % bare.release)
    if installed:
        bare.install_driver(installed, loaded=False)
    if memory:
        bare.load(memory)
    wanted = driver_only("580", reload=reload, version=version)
    planned = plan(bare, **wanted)["worst"] == "reboot"
    if memory and not version and not installed.startswith("580") and not (can_unload and reload):
        # The newest is installed, and which one that is only the package lists know.
        assert planned
        return
    assert planned == reboots(bare, wanted)
    assert plan(bare, **wanted)["worst"] == ("reboot" if planned else "none")


@pytest.mark.parametrize("reload", [True, False])
@pytest.mark.parametrize("can_unload", [True, False])
def test_the_other_flavour_of_the_same_version_is_another_module(
    bare: DriverWorld, monkeypatch: pytest.MonkeyPatch, can_unload: bool, reload: bool
) -> None:
    monkeypatch.setattr(_packages, "download", lambda _url: b"\x99\x01key")
    bare.can_unload = can_unload
    bare.install_driver("580.95.05")
    bare.configured()
    swaps = can_unload and reload
    wanted = driver_only("580", reload=reload, version="580.95.05", flavour="proprietary")
    answer = plan(bare, **wanted)
    assert of_the_module(answer) == [
        ("nvidia_driver", "unload_driver" if swaps else "none", "580.95.05", "580.95.05 (proprietary, nvidia)", None),
        ("nvidia_driver_reload", "unload_driver" if swaps else "reboot", "580.95.05", "580.95.05", "nvidia_driver"),
    ]
    assert reboots(bare, wanted) is not swaps
    if swaps:
        assert plan(bare, **wanted)["changes"] == []
        return
    # Nothing is due but the reboot.
    [change] = plan(bare, **wanted)["changes"]
    assert (change["resource"], change["disruption"]) == ("nvidia_driver_reload", "reboot")
    assert (change["from"], change["to"]) == ("580.95.05 (open)", "580.95.05 (proprietary)")
    bare.load("580.95.05")
    assert plan(bare, **wanted)["changes"] == []


def test_packages_that_bring_back_what_is_loaded_need_no_reboot(bare: DriverWorld) -> None:
    bare.can_unload = False
    bare.install_driver("580.65.06", loaded=False)
    bare.load("580.95.05")
    for reload in (True, False):
        answer = plan(bare, **driver_only("580", reload=reload, version="580.95.05"))
        assert [one[:2] for one in of_the_module(answer)] == [("nvidia_driver", "none")]


def test_a_kernel_without_module_unloading_reboots_for_what_is_installed(bare: DriverWorld) -> None:
    bare.can_unload = False
    bare.install_driver("580.95.05", loaded=False)
    bare.load("580.65.06")
    answer = plan(bare, **driver_only("580", reload=True))
    assert of_the_module(answer) == [("nvidia_driver_reload", "reboot", "580.65.06", "580.95.05", None)]
    assert "built without module unloading" in answer["changes"][0]["blocked"]


def test_a_cdi_specification_for_the_driver_that_comes_stays(bare: DriverWorld) -> None:
    bare.install_driver("580.95.05", loaded=False)
    bare.load("580.65.06")
    bare.packages["nvidia-container-toolkit"] = ["1.19.1-1", "hi"]
    for version, made in (("580.95.05", []), ("580.65.06", [("/var/run/cdi/nvidia.yaml", None)])):
        bare.files["/var/run/cdi/nvidia.yaml"] = b"hostPath: /usr/lib/libcuda.so.%s\n" % version.encode()
        answer = plan(bare, **driver_only("580", reload=True), nvidia_container_toolkit={"cdi": True})
        assert of_the_module(answer)[0][:4] == ("nvidia_driver_reload", "unload_driver", "580.65.06", "580.95.05")
        assert [one for one in found(answer, "nvidia_container_toolkit") if "cdi" in one[0]] == made


def test_converged_services_have_an_empty_plan(serving: Machine) -> None:
    wanted = services(llama(), nemo(), ngc_api_key=KEY)
    answer = plan(serving.host, serving.api, **wanted)
    assert [change["what"] for change in answer["changes"] if change["resource"] == "nim_image"] == [
        "image " + LLAMA,
        "image " + NEMO,
    ]
    assert ("nim-llama.service", None) in found(answer, "nim_service")
    serving.converge(llama(), nemo(), key=KEY)
    answer = plan(serving.host, serving.api, nim_service=wanted["nim_service"])
    assert answer == {"gpu": True, "drift": False, "worst": "none", "changes": [], "errors": [], "notes": []}


class Health:
    """Stands in for the look at running services: what it says of each by name."""

    asked: t.ClassVar[list[str]] = []
    says: t.ClassVar[dict[str, dict[str, t.Any]]] = {}

    def __init__(self, host: t.Any, api: t.Any, targets: t.Sequence[t.Any], signatures: t.Any) -> None:
        self.targets = targets

    def run(self, resume: None, *, interval: float, wait: bool, record: bool) -> t.Any:
        assert (resume, wait, record) == (None, False, False)
        self.asked[:] = [target.name for target in self.targets]
        ready = {"ready": True, "reason": None, "phase": "ready", "message": None}
        return type("Outcome", (), {"models": [{**ready, **self.says.get(name, {})} for name in self.asked]})


def test_a_service_that_is_not_ready_is_waited_for(serving: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_health_drift, "HealthCheck", Health)
    models = [llama(), nemo()]
    wanted = {"nim_service": {"models": models}, "nim_health": {"models": models}}
    serving.converge(*models)
    assert plan(serving.host, serving.api, **wanted)["drift"] is False
    monkeypatch.setitem(Health.says, "nemo", {"ready": False, "phase": "loading"})
    answer = plan(serving.host, serving.api, **wanted)
    assert Health.asked == ["llama", "nemo"]
    assert [(change["resource"], change["what"], change["from"], change["to"]) for change in answer["changes"]] == [
        ("nim_health", "nim-nemo.service", "loading the model", "ready")
    ]
    assert answer["worst"] == "none"
    doomed = {"ready": False, "phase": "failed", "reason": "wrong_server", "message": "NIM nemo is not it."}
    monkeypatch.setitem(Health.says, "nemo", doomed)
    [change] = plan(serving.host, serving.api, **wanted)["changes"]
    assert (change["from"], change["why"]) == ("port taken", "NIM nemo is not it")


def test_a_service_that_must_start_need_not_answer_yet(serving: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_health_drift, "HealthCheck", Health)
    monkeypatch.setitem(Health.says, "nemo", {"ready": False, "phase": "starting"})
    models = [llama(), nemo()]
    serving.converge(*models)
    serving.active["nim-nemo.service"] = "failed"
    serving.api.list["nim-nemo"]["State"] = "exited"
    wanted = {"nim_service": {"models": models}, "nim_health": {"models": models}}
    answer = plan(serving.host, serving.api, **wanted)
    assert Health.asked == ["llama"]
    assert {change["resource"] for change in answer["changes"]} == {"nim_service"}


def test_services_beside_the_list_are_a_warning(serving: Machine) -> None:
    serving.converge(llama(), nemo())
    found = plan_host(serving.host, {"nim_service": {"models": [llama()]}}, t.cast(t.Any, serving.api))
    assert found.result()["drift"] is False
    assert "not in the list and were left alone: nemo" in found.warnings[0]


def test_maintenance_is_said_once(serving: Machine) -> None:
    serving.converge(llama())
    serving.host.files["/var/lib/nim/maintenance"] = b""
    wanted = {"nim_service": {"models": [llama()]}}

    def said() -> list[str]:
        looked = plan_host(serving.host, wanted, t.cast(t.Any, serving.api))
        return [*looked.warnings, *(str(one.change.blocked) for one in looked.planned)]

    (warning,) = said()
    assert warning == "/var/lib/nim/maintenance exists, so no service is started."
    serving.stop(serving.host, ("systemctl", "stop", "nim-llama.service"))
    (blocked,) = said()
    assert "/var/lib/nim/maintenance exists: the host is under maintenance" in blocked


def test_exactly_what_was_broken(serving: Machine) -> None:
    serving.converge(llama(), nemo())
    serving.host.files["/etc/systemd/system/nim-llama.service"] += b"# by hand\n"
    serving.active["nim-nemo.service"] = "failed"
    serving.api.list["nim-nemo"]["State"] = "exited"
    answer = plan(serving.host, serving.api, nim_service={"models": [llama(), nemo()]})
    assert [change["what"] for change in answer["changes"]] == [
        "systemd",
        "/etc/systemd/system/nim-llama.service",
        "nim-nemo.service",
    ]
    assert answer["worst"] == "reload"


def test_a_missing_image_hides_no_other_model(serving: Machine) -> None:
    serving.converge(llama(), nemo())
    del serving.api.images[LLAMA]
    serving.host.files["/etc/systemd/system/nim-nemo.service"] += b"# by hand\n"
    answer = plan(serving.host, serving.api, **services(llama(), nemo()))
    assert answer["worst"] == "restart_nim"
    assert found(answer, "nim_service") == [
        ("nim-llama.service", "nim_image"),
        ("systemd", None),
        ("/etc/systemd/system/nim-nemo.service", None),
    ]
    # Without anybody who would pull it, it is an error.
    answer = plan(serving.host, serving.api, nim_service={"models": [llama(), nemo()]})
    assert [(error["resource"], error["reason"]) for error in answer["errors"]] == [("nim_service", "image_missing")]
    assert ("/etc/systemd/system/nim-nemo.service", None) in found(answer, "nim_service")


def test_docker_that_is_down_and_nobody_mends(serving: Machine) -> None:
    serving.api.up = False
    answer = plan(serving.host, serving.api, **services(llama()))
    assert [(error["resource"], error["reason"]) for error in answer["errors"]] == [
        ("nim_image", "docker_unavailable"),
        ("nim_service", "docker_unavailable"),
    ]


def test_a_stopped_docker_is_not_started_by_asking(serving: Machine) -> None:
    for unit, state in (("service", "inactive"), ("socket", "active")):
        serving.host.commands["systemctl show * -p ActiveState docker.%s" % unit] = "ActiveState=%s\n" % state
    serving.api.check = lambda: pytest.fail("Docker was asked")  # type: ignore[method-assign]
    serving.api.available = serving.api.check  # type: ignore[assignment]
    answer = plan(serving.host, serving.api, **services(llama()))
    assert [error["reason"] for error in answer["errors"]] == ["docker_unavailable"] * 2
    assert "docker.socket would start it" in answer["errors"][1]["message"]


@pytest.mark.parametrize(("validate", "notes"), [("always", 1), ("on_change", 0)])
def test_a_key_that_is_always_checked_is_left_open(bare: DriverWorld, validate: str, notes: int) -> None:
    assert len(plan(bare, ngc_login={"api_key": KEY, "validate": validate})["notes"]) == notes
    assert plan(bare, ngc_login={"api_key": None, "validate": validate})["notes"] == []


def test_pull_newer_asks_no_registry(serving: Machine) -> None:
    answer = plan(serving.host, serving.api, nim_image={"images": [{"image": LLAMA}], "pull": "newer"})
    assert answer["notes"]
    assert found(answer, "nim_image") == [("image " + LLAMA, None)]


def test_cdi_may_restart_docker_because_live_restore_comes_first(
    bare: DriverWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    dockerd = FakeDockerd(bare)
    bare.files["/etc/docker/daemon.json"] = b"{}"
    dockerd.add_container("nim-llama")
    wanted = {"docker_daemon": {"options": {}, "live_restore": True}, "nvidia_container_toolkit": {"cdi": True}}
    blocked = [change for change in plan(bare, dockerd, **wanted)["changes"] if change["blocked"]]
    assert blocked == []
    del wanted["docker_daemon"]
    assert [change["what"] for change in plan(bare, dockerd, **wanted)["changes"] if change["blocked"]]


def test_host_for_looking_only(host: FakeHost) -> None:
    host.commands["date"] = "now"
    looking = ReadOnlyHost(host)
    assert [looking.run(["date"]).stdout for _time in range(2)] == ["now", "now"]
    assert host.calls == [("date",)]
    for write in (
        lambda: looking.write_file("/x", "", mode=0o600),
        lambda: looking.make_dir("/x", mode=0o700),
        lambda: looking.remove("/x"),
    ):
        with pytest.raises(AssertionError):
            write()


# -- the module -----------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [False, True])
def test_module_prints_no_secret(
    bare: DriverWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], check: bool
) -> None:
    monkeypatch.setattr(gpu_host_plan, "Host", lambda: bare)
    monkeypatch.setattr(_docker_daemon_planner, "DockerApi", Down)
    monkeypatch.setattr("ansible_collections.gpu_fleet.nim.plugins.module_utils._host_plan.DockerApi", Down)
    wanted = everything(llama(secret_environment={"HF_TOKEN": SECRET}))
    wanted["nim_image"]["api_key"] = KEY
    logged: list[str] = []
    monkeypatch.setattr(
        "ansible.module_utils.basic.AnsibleModule.log",
        lambda self, *given, **named: logged.append(repr((given, named))),
    )
    # As every task passes it, whatever the module says of itself.
    wanted["_ansible_no_log"] = False
    with patch_module_args({**wanted, "_ansible_check_mode": check}), pytest.raises(SystemExit):
        gpu_host_plan.main()
    assert "nim_service" in logged[0]
    assert KEY not in "".join(logged)
    text = capsys.readouterr().out
    answer = json.loads(text)
    assert answer["changed"] is False
    assert answer["drift"] is True
    assert found(answer, "nim_service") == [("nim-llama.service", "docker_engine")]
    assert KEY not in text
    assert json.dumps(SECRET)[1:-1] not in text


def test_services_with_secrets_print_fingerprints(serving: Machine) -> None:
    model = llama(secret_environment={"HF_TOKEN": SECRET})
    serving.converge(llama(), key=KEY)
    answer = json.dumps(plan(serving.host, serving.api, nim_service={"models": [model], "ngc_api_key": KEY + "-new"}))
    assert "/etc/nim/llama.env" in answer
    assert "/etc/nim/ngc.env" in answer
    assert SECRET not in json.loads(answer)["changes"].__repr__()
    assert KEY not in answer


def documented_options(name: str) -> dict[str, t.Any]:
    """Options of a module, those of its documentation fragments included."""
    documentation = yaml.safe_load(importlib.import_module(MODULES + name).DOCUMENTATION)
    found = {}
    for fragment in documentation["extends_documentation_fragment"]:
        name, _dot, part = fragment[len("gpu_fleet.nim.") :].partition(".")
        texts = importlib.import_module(MODULES.replace(".modules.", ".doc_fragments.") + name).ModuleDocFragment
        found.update(yaml.safe_load(getattr(texts, part.upper() or "DOCUMENTATION")).get("options") or {})
    return {**found, **documentation["options"]}


@pytest.mark.parametrize("name", CHAIN)
def test_options_are_those_of_the_modules(name: str) -> None:
    """Names, types, defaults and choices; those that have no part in a plan are left out."""
    left_out = {"progress_interval", "resume", "prepare_reboot", "reboot_reason", "host_name", "wait"}
    documented = documented_options(name)

    def compare(options: dict[str, t.Any], specification: dict[str, t.Any]) -> None:
        assert set(options) - left_out == set(specification)
        for option, spec in specification.items():
            for key, default in (
                ("type", "str"),
                ("elements", None),
                ("choices", None),
                ("default", None),
                ("required", False),
            ):
                assert spec.get(key, default) == options[option].get(key, default), (option, key)
            if "options" in spec:
                compare(options[option]["suboptions"], spec["options"])

    compare(documented, RESOURCE_OPTIONS[name])
    assert RESOURCE_OPTIONS["ngc_login"]["api_key"]["no_log"]
    assert RESOURCE_OPTIONS["nim_image"]["api_key"]["no_log"]
    assert RESOURCE_OPTIONS["nim_service"]["ngc_api_key"]["no_log"]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"nvidia_driver": {"brnch": "580"}}, "nvidia_driver.brnch: there is no such option"),
        ({"nvidia_driver": {"flavour": "x"}}, "nvidia_driver: value of flavour must be one of"),
        ({"docker_group": {}}, "docker_group: missing required arguments: users"),
        ({"nim_service": {"models": [{"nme": "x"}]}}, "nim_service.models.nme: there is no such option"),
        ({"nim_service": {"models": [llama(port="much")]}}, "nim_service: "),
        (
            {"nim_service": {"models": [json.dumps(llama(secret_environment={"HF_TOKEN": SECRET}))], "x": 1}},
            "nim_service.x",
        ),
        ({"nim_service": {"models": [llama(secret_environment={"HF_TOKEN": SECRET})], "x": 1}}, "nim_service.x"),
        ({"nim_service": {"models": [llama(secret_environment=SECRET)]}}, "nim_service: "),
        ({"nim_service": {"models": SECRET}}, "nim_service: "),
        ({"nim_service": SECRET}, "nim_service"),
        ({"nim_health": {"models": [{"secret_environment": {"x": SECRET}}], "x": 1}}, "nim_health.x"),
        ({"nim_servce": {}}, "Unsupported parameters"),
    ],
)
def test_wrong_options_of_the_module(
    given: dict[str, t.Any],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_host_plan, "plan_host", lambda *dummy: pytest.fail("the host was looked at"))
    hidden: dict[str, t.Any] = {"ngc_login": {"api_key": KEY}}
    if "nim_service" not in given:
        hidden["nim_service"] = {"models": [json.dumps(llama(secret_environment={"HF_TOKEN": SECRET}))]}
    with patch_module_args({**hidden, **given}), pytest.raises(SystemExit):
        gpu_host_plan.main()
    text = capsys.readouterr().out
    answer = json.loads(text)
    assert answer["failed"] is True
    assert part in answer["msg"]
    assert len(answer["msg"].splitlines()) == 1
    assert KEY not in text
    assert SECRET not in repr(answer)
    assert json.dumps(SECRET)[1:-1] not in text


def test_the_module_gives_defaults_as_the_modules_do(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, t.Any] = {}

    def plan(host: t.Any, wanted: dict[str, t.Any], api: t.Any) -> t.NoReturn:
        given.update(wanted)
        raise FleetError("enough", "Enough.")

    monkeypatch.setattr(_host_plan, "plan_host", plan)
    with patch_module_args({"nvidia_driver": {"hold": "no"}, "docker_daemon": {}}), pytest.raises(SystemExit):
        gpu_host_plan.main()
    assert set(given) == {"nvidia_driver", "docker_daemon"}
    assert given["nvidia_driver"]["branch"] == "580"
    assert given["nvidia_driver"]["hold"] is False
    assert given["docker_daemon"] == {"options": {}, "absent": [], "live_restore": None, "config_file": None}
