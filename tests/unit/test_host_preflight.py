# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What cannot work on a host: bare, without a GPU, serving, broken in places."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import typing as t

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args
from ansible.plugins.filter.core import to_bool
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _host_preflight, _nim_image
from ansible_collections.gpu_fleet.nim.plugins.module_utils._background import JobStatus
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_config import encode_basic
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_registries import (
    insecure_registry,
    with_daemon_options,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import parse_smi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_bus import PciGpu
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_inventory import GpuInventory
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_plan import HostPlan, Planned
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_preflight import (
    JUDGED,
    preflight,
    stands_in_the_way,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_record import RECORD
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_reference import ImageReference
from ansible_collections.gpu_fleet.nim.plugins.module_utils._loaded_driver import LoadedDriver
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_image import pull_job_id
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_manifest import Manifest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_profiles import parse_manifest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._registry_refusals import Refusals
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Change
from ansible_collections.gpu_fleet.nim.plugins.module_utils._verdict import (
    OK,
    REFUSED,
    UNKNOWN,
    WARNING,
    Verdict,
    worst,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._wanted_images import wanted_images
from ansible_collections.gpu_fleet.nim.plugins.modules import gpu_host_preflight
from driver_world import DriverWorld
from fake_host import FakeHost
from image_world import FakeClient, FakeJobs
from jinja2.nativetypes import NativeEnvironment
from nim_machine import KEY, LLAMA, NEMO, SMI, ZERO, Machine, llama, nemo
from test_host_plan import Down
from test_host_plan import everything as everything_planned


def everything(*models: dict[str, t.Any], **options: t.Any) -> dict[str, t.Any]:
    """What can be judged before it is there."""
    wanted = everything_planned(*models, **options)
    return {name: value for name, value in wanted.items() if name in JUDGED}


@pytest.fixture(autouse=True)
def registry() -> t.Iterator[dict[str, t.Any]]:
    """Answers of the registry by image; an error is raised, a dictionary is the image."""
    FakeClient.tags = {}
    FakeClient.asked = []
    yield FakeClient.tags
    FakeClient.tags = {}


class Client(FakeClient):
    """A registry that takes every key but one."""

    def check_credentials(self, reference: t.Any) -> None:
        if self.login[1].endswith("bad"):
            raise Refusals("nvcr.io", self.login[0], True, "", lambda: None).bad_key("nvcr.io")


def judge(host: FakeHost, wanted: dict[str, t.Any], api: t.Any = None) -> list[Verdict]:
    before = (dict(host.files), dict(host.modes), set(host.dirs), dict(host.links))
    found = preflight(host, wanted, api or Down(), t.cast(t.Any, Client))
    assert (host.files, host.modes, host.dirs, host.links) == before
    for verdict in found:
        # Nobody is left alone with a refusal, and nothing that is fine has a reason.
        assert bool(verdict.reason) == (verdict.verdict != OK), verdict
        assert verdict.remedy or verdict.verdict != REFUSED, verdict
    assert KEY not in repr(found)
    return found


def bad(found: list[Verdict]) -> list[tuple[str, str, str]]:
    return [(verdict.check, verdict.subject, verdict.reason) for verdict in found if verdict.verdict == REFUSED]


def one(found: list[Verdict], check: str, subject: str = "") -> Verdict:
    (verdict,) = [verdict for verdict in found if (verdict.check, verdict.subject) == (check, subject)]
    return verdict


@pytest.fixture
def bare() -> DriverWorld:
    """A GPU host as it comes: no driver, no Docker."""
    world = DriverWorld(gpus=2)
    no_unit = "LoadState=not-found\nActiveState=inactive\n"
    docker = {"systemctl show *docker.service": no_unit, "systemctl show *docker.socket": no_unit}
    world.commands = {
        **docker,
        "systemctl is-active *": "active\n",
        "systemctl show --property ActiveState,*": "",
        **world.commands,
    }
    world.files["/etc/passwd"] = b"root:x:0:0::/root:/bin/sh\nops:x:1000:1000::/home/ops:/bin/sh\n"
    return world


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(monkeypatch)
    monkeypatch.setattr(_host_preflight, "observe_gpus", lambda host: machine.inventory)
    _cuda, version, gpus = parse_smi(SMI.read_text())
    machine.inventory = GpuInventory(
        pci=tuple(PciGpu(gpu.bdf, "2335", "Hopper", "nvidia") for gpu in gpus),
        driver=LoadedDriver(version, "open", True),
        gpus=gpus,
        smi_driver_version=version,
        cuda_version="13.0",
    )
    machine.host.commands["systemctl show -p*"] = "LoadState=loaded\nActiveState=active\n"
    machine.host.commands["dmesg"] = ""
    return machine


def models(*wanted: dict[str, t.Any], **options: t.Any) -> dict[str, t.Any]:
    return {
        "nim_image": {"images": [{"image": model["image"]} for model in wanted], "api_key": KEY},
        "nim_service": {"models": list(wanted), "ngc_api_key": KEY, **options},
    }


# -- bare hosts -----------------------------------------------------------------------------------


def test_a_bare_host_that_can_be_set_up(bare: DriverWorld) -> None:
    found = judge(bare, everything(llama()))
    assert bad(found) == []
    assert one(found, "nvml").verdict == UNKNOWN
    assert one(found, "image", LLAMA).message == "The registry hands out %s: 2.8 GB to download." % LLAMA
    assert one(found, "requirement", LLAMA).verdict == OK
    assert one(found, "port", "llama").message == "Model llama: port 8000 on 0.0.0.0 is free."
    assert "about 9.2 GB will be taken, without the model files of %s" % LLAMA in one(found, "disk").message
    assert one(found, "key").message == "nvcr.io accepts the key."
    assert {verdict.check for verdict in found} >= set(JUDGED) - {"nim_image", "nim_service"}
    assert FakeClient.asked == [(LLAMA, "$oauthtoken", KEY)]
    wanted = everything(llama())
    wanted["nim_image"]["images"][0]["disk_space"] = "20GB"
    assert "nobody tells" not in one(judge(bare, wanted), "disk").message


def test_an_image_is_judged_by_the_driver_that_is_wanted(bare: DriverWorld, registry: dict[str, t.Any]) -> None:
    registry[LLAMA] = {"environment": {"NVIDIA_REQUIRE_CUDA": "cuda>=12.8"}}
    found = judge(bare, everything(llama(), nvidia_driver={"branch": "535"}))
    refused = one(found, "requirement", LLAMA)
    assert (refused.verdict, refused.reason) == (REFUSED, "requirement")
    assert "this host is to get driver branch 535" in refused.sentence
    assert "needs a driver of branch 570 or newer" in refused.sentence
    assert "set nvidia_driver_branch to '570'" in refused.remedy
    assert one(judge(bare, everything(llama(), nvidia_driver={"branch": "570"})), "requirement", LLAMA).verdict == OK
    # Nobody says which driver it is to be.
    found = judge(bare, {name: value for name, value in everything(llama()).items() if "driver" not in name})
    assert one(found, "requirement", LLAMA).verdict == UNKNOWN


def test_a_driver_that_is_installed_and_not_loaded_counts(bare: DriverWorld, registry: dict[str, t.Any]) -> None:
    registry[LLAMA] = {"environment": {"NVIDIA_REQUIRE_CUDA": "cuda>=13.1"}}
    bare.install_driver("580.95.05", loaded=False)
    assert "driver 580.95.05 installed" in one(judge(bare, everything(llama())), "requirement", LLAMA).sentence


def test_a_driver_older_than_the_image_allows(bare: DriverWorld, registry: dict[str, t.Any]) -> None:
    registry[LLAMA] = {"environment": {"NVIDIA_REQUIRE_CUDA": "cuda>=13.1"}}
    bare.install_driver("580.95.05")
    found = judge(bare, everything(llama()))
    assert "this host runs 580.95.05 (CUDA 13.0)" in one(found, "requirement", LLAMA).sentence
    bare.files["/proc/sys/kernel/hostname"] = b"gpu03\n"
    found = judge(bare, everything(llama()))
    assert "gpu03 runs 580.95.05 (CUDA 13.0)" in one(found, "requirement", LLAMA).sentence
    # It may be switched off for an image.
    wanted = everything(llama())
    wanted["nim_image"]["images"][0]["check_requirement"] = False
    assert all(verdict.check != "requirement" for verdict in judge(bare, wanted))


@pytest.mark.parametrize("reason", ["bad_key", "no_entitlement", "no_such_tag", "architecture"])
def test_what_the_registry_refuses(bare: DriverWorld, registry: dict[str, t.Any], reason: str) -> None:
    registry[LLAMA] = FleetError(reason, "The registry says no; do something about it.")
    found = judge(bare, everything(llama(), nemo()))
    assert bad(found) == [("image", LLAMA, reason)]
    assert (found[0].message, found[0].remedy) == ("The registry says no.", "do something about it")
    # One image hides no other.
    assert one(found, "image", NEMO).verdict == OK


# -- before Docker is set up ----------------------------------------------------------------------


def pin(host: FakeHost, *images: str) -> None:
    entry = {"source": "nvcr.io/nim/x", "digest": "sha256:" + "1" * 64, "image_id": "sha256:" + "9" * 64}
    host.files[RECORD] = json.dumps({"schema": 1, "images": dict.fromkeys(images, entry)}).encode()


@pytest.mark.parametrize("pull", ["missing", "never", "newer"])
def test_images_of_a_stopped_docker_are_not_judged(bare: DriverWorld, registry: dict[str, t.Any], pull: str) -> None:
    registry[LLAMA] = FleetError("registry_unreachable", "The registry does not answer; look at the network.")
    bare.free = 10**6
    pin(bare, LLAMA)
    wanted = everything(llama())
    wanted["nim_image"]["pull"] = pull
    found = judge(bare, wanted)
    assert bad(found) == []
    assert one(found, "image", LLAMA).verdict == UNKNOWN
    if pull != "newer":
        assert one(found, "image", LLAMA).reason == "docker_unavailable"
        assert FakeClient.asked == []
    assert not [verdict for verdict in found if verdict.check == "disk"]


def test_a_tag_that_has_moved_is_pulled_into_a_stopped_docker(bare: DriverWorld, registry: dict[str, t.Any]) -> None:
    registry[LLAMA] = "sha256:" + "2" * 64
    pin(bare, LLAMA)
    wanted = everything(llama())
    wanted["nim_image"]["pull"] = "newer"
    assert one(judge(bare, wanted), "image", LLAMA).verdict == OK
    registry[LLAMA] = "sha256:" + "1" * 64
    assert one(judge(bare, wanted), "image", LLAMA).reason == "docker_unavailable"


def test_an_image_without_pin_may_be_in_a_stopped_docker(bare: DriverWorld) -> None:
    wanted = everything(llama())
    wanted["nim_image"]["pull"] = "never"
    found = judge(bare, wanted)
    assert bad(found) == []
    assert (one(found, "image", LLAMA).verdict, one(found, "image", LLAMA).reason) == (UNKNOWN, "image_missing")


@pytest.mark.parametrize("reason", ["registry_unreachable", "tls_error", "engine_cannot_pull", "engine_too_old"])
def test_what_docker_may_mend(
    bare: DriverWorld, serving: Machine, registry: dict[str, t.Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry[LLAMA] = FleetError(reason, "That did not work; do something about it.")
    unknown = one(judge(bare, {"nim_image": {"images": [{"image": LLAMA}]}}), "image", LLAMA)
    assert (unknown.verdict, unknown.reason) == (UNKNOWN, reason)
    assert unknown.message == "That did not work. This is asked again after Docker is set up."
    # Docker answers: what ails the registry counts, unless Docker is to be changed.
    del serving.api.images[LLAMA]
    wanted = models(llama())
    assert bad(judge(serving.host, wanted, serving.api)) == [("image", LLAMA, reason)]
    planned = HostPlan(planned=[Planned(Change("docker_daemon", "daemon.json", None, "", "it differs"))])
    monkeypatch.setattr(_host_preflight, "plan_host", lambda *arguments: planned)
    assert one(judge(serving.host, wanted, serving.api), "image", LLAMA).verdict == UNKNOWN
    registry[LLAMA] = FleetError("no_entitlement", "The key may not; ask for access.")
    assert bad(judge(serving.host, wanted, serving.api)) == [("image", LLAMA, "no_entitlement")]


def test_the_registry_is_asked_with_the_login_that_will_be_stored(bare: DriverWorld) -> None:
    old = encode_basic("$oauthtoken", "nvapi-an-old-key")
    auths = {"nvcr.io": {"auth": old}, "mirror.example": {"auth": encode_basic("reader", "old")}}
    bare.files["/root/.docker/config.json"] = json.dumps({"auths": auths}).encode()
    wanted: dict[str, t.Any] = {"nim_image": {"images": [{"image": LLAMA}]}, "ngc_login": {"api_key": KEY}}
    judge(bare, wanted)
    wanted["nim_image"]["registry_mirrors"] = {"nvcr.io": "mirror.example"}
    judge(bare, wanted)
    wanted["ngc_login"] = {"registry": "mirror.example", "username": "writer", "api_key": "new password"}
    judge(bare, wanted)
    # The login of another user is none of the one who pulls.
    wanted["ngc_login"]["docker_user"] = "ops"
    judge(bare, wanted)
    wanted["ngc_login"] = {"registry": "mirror.example", "api_key": "nvapi-unused", "state": "absent"}
    judge(bare, wanted)
    assert [asked[1:] for asked in FakeClient.asked] == [
        ("$oauthtoken", KEY),
        ("reader", "old"),
        ("writer", "new password"),
        ("reader", "old"),
        ("reader", "old"),
    ]


def test_the_registry_is_asked_as_the_wanted_daemon_would(bare: DriverWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    image = LLAMA.replace("nvcr.io", "mirror.example:5000")
    wanted: dict[str, t.Any] = {"nim_image": {"images": [{"image": image}]}, "docker_daemon": {"options": {}}}
    judge(bare, wanted)
    assert (FakeClient.options["insecure"], FakeClient.options["proxies"]) == (None, None)
    wanted["docker_daemon"]["options"] = {
        "insecure-registries": ["http://mirror.example:5000", "10.0.0.0/8"],
        "proxies": {"https-proxy": "http://user:word@proxy:3128"},
    }
    judge(bare, wanted)
    assert FakeClient.options["insecure"] is True
    assert FakeClient.options["proxies"] == {"https": "http://user:word@proxy:3128"}


def test_wanted_options_go_before_what_the_daemon_says() -> None:
    config = {"IndexConfigs": {"old:5000": {"Secure": False}}, "InsecureRegistryCIDRs": ["192.168.0.0/16"]}
    info = {
        "RegistryConfig": config,
        "HttpsProxy": "http://old:1",
        "NoProxy": "local",
        "DockerRootDir": "/var/lib/docker",
    }
    assert with_daemon_options(info, {"debug": True}) == info
    found = with_daemon_options(
        info,
        {"insecure-registries": ["10.0.0.0/8"], "proxies": {"https-proxy": "http://new:1"}, "data-root": "/data"},
    )
    asked = ("old:5000", "192.168.0.1:5000", "10.0.0.1:5000", "127.0.0.1:5000")
    assert [insecure_registry(found, name) for name in asked] == [None, None, True, True]
    assert (found["HttpsProxy"], found["NoProxy"], found["DockerRootDir"]) == ("http://new:1", "local", "/data")


def test_an_image_that_is_being_pulled_needs_no_space_again(bare: DriverWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    bare.free = 10**6
    assert {entry[0] for entry in bad(judge(bare, everything(llama())))} == {"disk"}
    jobs = FakeJobs()
    job_id = pull_job_id(ImageReference.parse(LLAMA))
    monkeypatch.setattr(_nim_image, "Jobs", lambda: jobs)
    jobs.found[job_id] = JobStatus(job_id, "running", {})
    found = judge(bare, everything(llama()))
    assert bad(found) == []
    assert one(found, "image", LLAMA).message == "%s is being pulled already." % LLAMA
    jobs.found[job_id] = JobStatus(job_id, "failed", {})
    assert {entry[0] for entry in bad(judge(bare, everything(llama())))} == {"disk"}


def test_a_key_that_is_not_taken(bare: DriverWorld) -> None:
    found = judge(bare, {"ngc_login": {"api_key": "nvapi-0123456789-bad"}})
    assert bad(found) == [("key", "", "bad_key")]
    assert judge(bare, {"ngc_login": {"api_key": ""}})[0].check != "key"


def test_a_disk_that_is_too_small(bare: DriverWorld) -> None:
    bare.free = 5 * 10**9
    wanted = everything(llama(disk_space="20GB"))
    wanted["nim_image"]["images"][0].update(disk_space="20GB", cache_directory="/var/lib/nim/cache/llama")
    found = judge(bare, wanted)
    assert {entry[0] for entry in bad(found)} == {"disk"}
    assert any("needs about 30.7 GB" in verdict.message for verdict in found)


def test_what_a_resource_refuses(bare: DriverWorld) -> None:
    bare.files["/usr/bin/nvidia-uninstall"] = b""
    bare.files["/etc/docker/daemon.json"] = b"{"
    found = judge(bare, everything(llama()))
    assert bad(found) == [
        ("nvidia_driver", "", "runfile_driver"),
        ("docker_daemon", "", "daemon_json_invalid"),
    ]
    assert one(found, "docker_engine").message == "docker_engine can be set up."


def test_more_gpus_than_are_on_the_bus(bare: DriverWorld) -> None:
    found = judge(bare, models(llama(gpus=2), nemo(gpus=1)))
    assert bad(found) == [("gpus", "nemo", "gpus_unavailable")]
    assert "memory not told" in one(found, "gpus", "nemo").sentence
    # UUIDs are known to the driver alone.
    assert bad(judge(bare, models(llama(gpus=[ZERO]), nemo(gpus=[1])))) == []
    assert bad(judge(bare, models(llama(gpus=[2])))) == [("gpus", "llama", "gpus_unavailable")]


def test_a_port_that_is_held(bare: DriverWorld) -> None:
    Machine.listen(t.cast(t.Any, type("M", (), {"host": bare})), 8000, 977, "nginx")
    refused = one(judge(bare, models(llama())), "port", "llama")
    assert (refused.verdict, refused.reason) == (REFUSED, "port_in_use")
    assert "nginx (pid 977) of unit nginx.service" in refused.message
    assert refused.remedy == "stop that first, or give the model another port"


def test_a_host_without_a_gpu(host: FakeHost) -> None:
    (found,) = judge(host, everything(llama(), nemo()))
    assert (found.check, found.verdict, found.reason) == ("gpu", WARNING, "no_gpu")
    assert "does not serve llama, nemo" in found.message
    assert host.calls == [] and FakeClient.asked == []
    assert [verdict.verdict for verdict in preflight(host, everything(), t.cast(t.Any, Down()))] == [OK]


# -- serving hosts ----------------------------------------------------------------------------------


def unfit(machine: Machine, element: str, value: str) -> None:
    head, end, rest = SMI.read_text().partition("</gpu>")
    xml = re.sub(r"<%s>[^<]*<" % element, "<%s>%s<" % (element, value), head) + end + rest
    machine.inventory = GpuInventory(
        pci=machine.inventory.pci,
        driver=machine.inventory.driver,
        gpus=parse_smi(xml)[2],
        smi_driver_version="580.159.04",
        cuda_version="13.0",
    )


def test_a_host_that_can_serve(serving: Machine) -> None:
    found = judge(serving.host, models(llama(), nemo()), serving.api)
    assert worst(found) == OK
    assert one(found, "image", LLAMA).message == "%s is on the host." % LLAMA
    assert FakeClient.asked == []
    assert one(found, "gpu_health", "llama").message == "Model llama: its GPUs are fit for service."
    serving.converge(llama(), nemo(), key=KEY)
    found = judge(serving.host, models(llama(), nemo()), serving.api)
    assert worst(found) == OK
    assert one(found, "service", "llama").message == "Model llama runs, or is being started."


def test_a_key_that_expired_before_other_files_are_fetched(serving: Machine) -> None:
    """What serves is not stopped for a download that cannot work."""
    bad_key = "nvapi-0123456789-bad"
    serving.converge(llama(), nemo(), key=bad_key)
    assert bad(judge(serving.host, models(llama(), nemo(), ngc_api_key=bad_key), serving.api)) == []
    other = models(llama(profile="vllm-bf16-tp1"), nemo(), ngc_api_key=bad_key)
    # Files that came by other means are tried without a key.
    brought = "/var/lib/nim/cache/llama/ngc/hub/model.safetensors"
    serving.host.files[brought] = b"weights"
    assert bad(judge(serving.host, other, serving.api)) == []
    del serving.host.files[brought]
    assert one(judge(serving.host, other, serving.api), "key", "llama").verdict == REFUSED
    serving.host.files[brought] = b"weights"
    serving.host.files["/var/lib/nim/state/llama.download.json"] = b'{"status": "complete", "key": "00"}'
    refused = one(judge(serving.host, other, serving.api), "key", "llama")
    assert (refused.verdict, refused.reason) == (REFUSED, "bad_key")
    assert refused.message == (
        "llama fetches files with the NGC key when it starts, but nvcr.io refuses the API key (asked for nvcr.io): it is wrong, "
        "expired or revoked."
    )
    assert refused.remedy == "create a new one that includes the NGC Catalog service and set ngc_api_key"
    # The one that the host has, where none is given.
    stored = {"nim_service": {**other["nim_service"], "ngc_api_key": None}}
    assert one(judge(serving.host, stored, serving.api), "key", "llama").reason == "bad_key"
    # Nobody to ask, or not to be asked.
    for more in (
        {"nim_service": {**stored["nim_service"], "ngc_key_state": "absent"}},
        {"ngc_login": {"api_key": bad_key, "validate": "never"}},
    ):
        found = judge(serving.host, {**other, **more}, serving.api)
        assert [verdict for verdict in found if verdict.check == "key" and verdict.subject] == []
    # A new one.
    assert bad(judge(serving.host, models(llama(profile="vllm-bf16-tp1"), nemo()), serving.api)) == []


def test_an_image_that_fetches_by_itself_is_not_stopped_for_a_key_that_expired(serving: Machine) -> None:
    bad_key = "nvapi-0123456789-bad"
    serving.api.images[LLAMA]["Config"] = {"Entrypoint": ["/start"], "Cmd": ["serve"]}
    wanted = models(llama(environment={"A": "b"}), ngc_api_key=bad_key)
    # Nothing serves yet, so nothing can be lost by a try.
    assert [
        verdict for verdict in judge(serving.host, wanted, serving.api) if verdict.check == "key" and verdict.subject
    ] == []
    serving.converge(llama(), key=bad_key)
    assert one(judge(serving.host, wanted, serving.api), "key", "llama").reason == "bad_key"
    # Nor where nothing comes from NGC.
    for more in (
        {"weights_directory": "/srv/w"},
        {"environment": {"NIM_MODEL_NAME": "hf://a/b"}},
        {"environment": {"NIM_DISABLE_MODEL_DOWNLOAD": "1"}},
    ):
        found = judge(serving.host, models(llama(**more), ngc_api_key=bad_key), serving.api)
        assert [verdict for verdict in found if verdict.check == "key" and verdict.subject] == []
    same = models(llama(), ngc_api_key=bad_key)
    assert [
        verdict for verdict in judge(serving.host, same, serving.api) if verdict.check == "key" and verdict.subject
    ] == []


def test_a_key_that_nobody_can_judge_now_is_no_refusal(serving: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(self: Client, reference: t.Any) -> None:
        raise FleetError("registry_unreachable", "nvcr.io cannot be reached; look at the network.")

    monkeypatch.setattr(Client, "check_credentials", away)
    serving.converge(llama(), key=KEY)
    serving.host.files["/var/lib/nim/state/llama.download.json"] = b'{"status": "complete", "key": "00"}'
    found = judge(serving.host, models(llama(profile="vllm-bf16-tp1")), serving.api)
    assert one(found, "key", "llama").verdict == UNKNOWN
    assert bad(found) == []


def test_cdi_that_nobody_switches_on(serving: Machine) -> None:
    wanted = models(llama(), gpu_injection="cdi")
    assert worst(judge(serving.host, wanted, serving.api)) == OK
    serving.api.cdi = []
    found = judge(serving.host, wanted, serving.api)
    assert bad(found) == [("cdi", "", "cdi_off")]
    assert "nvidia_container_toolkit_cdi: true" in found[0].sentence
    assert stands_in_the_way(found) == found[:1]
    for more in (
        {"nvidia_container_toolkit": {"injection": "cdi"}},
        {"docker_daemon": {"options": {"features": {"cdi": True}}}},
    ):
        assert ("cdi", "", "cdi_off") not in bad(judge(serving.host, {**wanted, **more}, serving.api))
    # Where nothing is to run, nothing asks for GPUs.
    for none in (models(gpu_injection="cdi"), models(llama(state="absent"), gpu_injection="cdi")):
        assert bad(judge(serving.host, none, serving.api)) == []
    removed = {"nim_service": {**wanted["nim_service"], "state": "absent"}}
    assert bad(judge(serving.host, removed, serving.api)) == []


def test_a_gpu_that_is_not_fit(serving: Machine) -> None:
    unfit(serving, "remapped_row_pending", "Yes")
    found = judge(serving.host, models(llama(gpus=[0]), nemo(gpus=[1])), serving.api)
    assert bad(found) == [("memory_repair", "", "row_remap_pending"), ("gpu_health", "llama", "row_remap_pending")]
    assert found[0].gpu == ZERO
    assert [verdict.check for verdict in stands_in_the_way(found)] == ["gpu_health"]
    # Nobody is to be started on it, or somebody knowingly: the GPU is bad all the same, and no run is stopped by it.
    for wanted in ({}, models(nemo(gpus=[1])), models(llama(gpus=[0]), gpu_health="warn")):
        found = judge(serving.host, wanted, serving.api)
        assert bad(found) == [] and warned(found) == [("memory_repair", "row_remap_pending")]
    # Nobody knows who is to be started on it.
    found = judge(serving.host, models(llama(gpus=[0]), llama(gpus=[0])), serving.api)
    assert ("memory_repair", "", "row_remap_pending") in bad(found)


def test_a_count_is_served_by_the_gpus_that_are_fit(serving: Machine) -> None:
    unfit(serving, "remapped_row_pending", "Yes")
    found = judge(serving.host, models(llama(gpus=1)), serving.api)
    assert bad(found) == [] and warned(found) == [("memory_repair", "row_remap_pending")]
    found = judge(serving.host, models(llama(gpus=2)), serving.api)
    assert ("gpu_health", "llama", "row_remap_pending") in bad(found)
    refused = one(judge(serving.host, models(llama(gpus=3)), serving.api), "gpus", "llama")
    assert "not fit for service (has bad memory that is only taken out of use by a reset" in refused.remedy


def warned(found: list[Verdict]) -> list[tuple[str, str]]:
    return [(verdict.check, verdict.reason) for verdict in found if verdict.verdict == WARNING]


def test_a_gpu_that_is_held_by_its_own_model(serving: Machine) -> None:
    serving.converge(llama(gpus=[0]), key=KEY)
    unfit(serving, "compute_mode", "Exclusive_Process")
    process = {"pid": 977, "type": "C", "name": "nim"}
    gpus = (dataclasses.replace(serving.inventory.gpus[0], processes=(process,)), *serving.inventory.gpus[1:])
    serving.inventory = dataclasses.replace(serving.inventory, gpus=gpus)
    found = judge(serving.host, models(llama(gpus=[0])), serving.api)
    assert bad(found) == [] and warned(found) == [("compute_mode", "compute_mode_busy")]


def test_memory_that_others_hold_where_nobody_says_what_the_model_needs(serving: Machine) -> None:
    process = {"pid": 977, "type": "C", "name": "/usr/bin/train", "used_memory_mib": 60000}
    gpus = (dataclasses.replace(serving.inventory.gpus[0], processes=(process,)), *serving.inventory.gpus[1:])
    serving.inventory = dataclasses.replace(serving.inventory, gpus=gpus)
    found = judge(serving.host, models(llama(gpus=[0]), nemo(gpus=[1])), serving.api)
    assert bad(found) == [] and warned(found) == [("gpu_memory", "gpu_shared")]
    assert "on which memory is held by train (pid 977): 60000 MiB" in one(found, "gpu_memory", "llama").message
    assert warned(judge(serving.host, models(llama(gpus=[0], gpu_memory="1GB")), serving.api)) == []
    # One that runs is left alone.
    serving.converge(llama(gpus=[0]), key=KEY)
    assert warned(judge(serving.host, models(llama(gpus=[0])), serving.api)) == []


def test_a_driver_that_is_to_be_loaded_anew(serving: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    serving.inventory = dataclasses.replace(
        serving.inventory, gpus=(), smi_driver_version="", smi_error="Driver/library version mismatch"
    )
    assert ("nvml", "", "driver_mismatch") in bad(judge(serving.host, models(), serving.api))
    planned = HostPlan(planned=[Planned(Change("nvidia_driver_reload", "driver", "1", "2", "another is installed"))])
    monkeypatch.setattr(_host_preflight, "plan_host", lambda *arguments: planned)
    found = judge(serving.host, models(), serving.api)
    assert bad(found) == [] and warned(found) == [("nvml", "driver_mismatch")]


def test_a_service_that_runs_on_an_unfit_gpu_does_not_stop_a_run(serving: Machine) -> None:
    serving.converge(llama(gpus=[0]), key=KEY)
    unfit(serving, "gpu_recovery_action", "Node Reboot")
    found = judge(serving.host, models(llama(gpus=[0])), serving.api)
    assert bad(found) == [] and warned(found) == [("recovery_action", "recovery_action")]


def test_everything_about_models_is_said_at_once(serving: Machine) -> None:
    serving.listen(8000, 977, "nginx")
    wanted = models(
        llama(gpus=[0], gpu_memory="143500MiB", weights_directory="/srv/none"),
        nemo(gpus=[1], disk_space="9TB", bind_address="10.9.9.9"),
    )
    serving.host.files["/proc/net/fib_trie"] = b"  |-- 127.0.0.1\n     /32 host LOCAL\n"
    found = judge(serving.host, wanted, serving.api)
    assert sorted(bad(found)) == [
        ("address", "nemo", "no_such_address"),
        ("directories", "llama", "directory_missing"),
        ("disk", "", "disk_full"),
        ("gpu_memory", "llama", "gpu_memory"),
        ("port", "llama", "port_in_use"),
    ]


def test_profiles_of_an_image_that_is_not_there_yet(serving: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "schema_version: 2.0.0\nprofiles:\n- id: %064x\n  tags: {llm_engine: vllm, tp: '1', feat_lora: 'false'}\n" % 7
    )
    manifest = Manifest(parse_manifest(text) or ())
    monkeypatch.setattr(_nim_image, "manifest_at_registry", lambda client, reference, image: manifest)
    del serving.api.images[NEMO]
    serving.host.dirs.add("/srv/lora")
    serving.host.files["/etc/passwd"] = b"root:x:0:0:root:/root:/bin/bash\n"

    def profile(**options: t.Any) -> Verdict:
        model = nemo(**options)
        wanted = dict(models(model), nim_image={"images": wanted_images([model])})
        return one(judge(serving.host, wanted, serving.api), "profile", NEMO)

    by_id = profile(profile="%064x" % 7)
    assert by_id.verdict == OK
    # A manifest does not say it, and an id neither.
    assert "The memory that the profile needs is not known." in by_id.message
    named = profile(profile="vllm-bf16-tp1-pp1-30.0")
    assert (named.verdict, "not known" in named.message) == (OK, False)
    large = profile(profile="vllm-bf16-tp1-pp1-300.0")
    assert large.reason == "profile_unsuitable"
    assert "It needs 300 GB on each of 1 GPU, and the largest here has 151 GB" in large.message
    assert "set max_model_length to a shorter context" in large.remedy
    shorter = profile(profile="vllm-bf16-tp1-pp1-300.0", max_model_length=4096)
    assert (shorter.verdict, "memory that the profile needs is not known" in shorter.message) == (OK, True)
    assert profile(profile="%064x" % 8).reason == "no_such_profile"
    refused = profile(profile="%064x" % 7, lora_directory="/srv/lora")
    assert refused.reason == "profile_unsuitable" and "LoRA" in refused.message


def test_no_layer_is_fetched_where_no_model_names_a_profile(serving: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*dummy: t.Any) -> None:
        raise AssertionError("layers of the image are read")

    monkeypatch.setattr(_nim_image, "manifest_at_registry", never)
    del serving.api.images[NEMO]
    serving.host.files["/etc/passwd"] = b"root:x:0:0:root:/root:/bin/bash\n"
    model = nemo()
    found = judge(serving.host, dict(models(model), nim_image={"images": wanted_images([model])}), serving.api)
    assert one(found, "image", NEMO).verdict == OK
    assert not [verdict for verdict in found if verdict.check == "profile"]


def test_xids_are_looked_for(serving: Machine) -> None:
    serving.host.commands = {
        "journalctl --dmesg *": json.dumps(
            {"MESSAGE": "NVRM: Xid (PCI:0000:00:06): 74, pid=1", "__REALTIME_TIMESTAMP": "1"}
        ),
        **serving.host.commands,
    }
    found = judge(serving.host, models(llama()), serving.api)
    (warned,) = [verdict for verdict in found if verdict.verdict == WARNING]
    assert (warned.check, warned.gpu) == ("xid", ZERO)


def test_wrong_options_are_verdicts(serving: Machine) -> None:
    found = judge(serving.host, models(llama(), llama(port=8001)), serving.api)
    assert ("service", "", "invalid_option") in bad(found)


# -- the module -------------------------------------------------------------------------------------


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: FakeHost, **options: t.Any
) -> dict[str, t.Any]:
    monkeypatch.setattr(gpu_host_preflight, "Host", lambda: host)
    monkeypatch.setattr(
        gpu_host_preflight,
        "preflight",
        lambda host, wanted: preflight(host, wanted, t.cast(t.Any, Down()), t.cast(t.Any, Client)),
    )
    with patch_module_args({"_ansible_check_mode": True, **options}), pytest.raises(SystemExit):
        gpu_host_preflight.main()
    printed = capsys.readouterr().out
    assert KEY not in printed
    return t.cast("dict[str, t.Any]", json.loads(printed))


def test_module(bare: DriverWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(monkeypatch, capsys, bare, **everything(llama()))
    assert (answer["changed"], answer["verdict"]) == (False, UNKNOWN)
    assert set(answer["checks"][0]) == {"check", "verdict", "message", "remedy", "reason", "gpu", "subject"}
    Machine.listen(t.cast(t.Any, type("M", (), {"host": bare})), 8000, 977, "nginx")
    answer = run(monkeypatch, capsys, bare, **everything(llama()))
    assert ("failed" in answer, answer["verdict"], answer["checks"][0]["reason"]) == (False, REFUSED, "port_in_use")
    answer = run(monkeypatch, capsys, bare, fail_on_refusal=True, **everything(llama()))
    assert (answer["failed"], answer["changed"], answer["reason"]) == (True, False, "port_in_use")
    assert answer["msg"].startswith("Model llama cannot have port 8000 on 0.0.0.0: it is held by nginx (pid 977)")
    # Whoever is called at night finds the way past a refusal in its own words.
    assert "-e site_preflight=false" in answer["msg"] and "-e nim_preflight=false" in answer["msg"]
    assert answer["checks"]
    answer = run(monkeypatch, capsys, bare, nim_service={"models": [llama()], "no_such": 1})
    assert (answer["failed"], answer["reason"]) == (True, "invalid_option")


def test_the_playbook_can_leave_it_out() -> None:
    playbooks = pathlib.Path(__file__).parents[2] / "playbooks"
    plays = yaml.safe_load((playbooks / "site.yml").read_text())
    chain = next(play["tasks"] for play in plays if "From bare" in play["name"])
    tasks = chain + yaml.safe_load((playbooks / "tasks" / "site_roles.yml").read_text())
    (condition,) = [task["when"] for task in tasks if "gpu_fleet.nim.gpu_host_preflight" in task]
    (nim,) = [task["vars"]["nim_preflight"] for task in tasks if "vars" in task]
    environment = NativeEnvironment()
    environment.filters["bool"] = to_bool

    def asked(**variables: t.Any) -> bool:
        return t.cast(bool, environment.from_string("{{ %s }}" % condition).render(variables))

    assert asked() and asked(site_preflight="true")
    assert not asked(site_preflight="false") and not asked(ansible_skip_tags=["ngc"])
    # The role looks for itself where the playbook has not.
    assert environment.from_string(nim).render(__site_preflight={"skipped": True}) is True
    assert environment.from_string(nim).render(__site_preflight={"checks": []}) is False
    tasks = yaml.safe_load((pathlib.Path(__file__).parents[2] / "roles" / "nim" / "tasks" / "images.yml").read_text())
    (condition,) = [task["when"] for task in tasks if "gpu_fleet.nim.gpu_host_preflight" in task]
    given = {"nim_state": "present", "__nim_images": [1]}
    assert asked(nim_preflight="true", **given)
    # On the command line everything is a text.
    assert not asked(nim_preflight="false", **given)
