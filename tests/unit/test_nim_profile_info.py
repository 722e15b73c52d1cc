# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Profiles of an image for a host, from a container, from the image, and from the registry; and what a pull is spared."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import json
import pathlib
import tarfile
import typing as t

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nim_image, _nim_profile_info
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import parse_smi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_bus import PciGpu
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_inventory import GpuInventory
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_reference import ImageReference
from ansible_collections.gpu_fleet.nim.plugins.module_utils._loaded_driver import LoadedDriver
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_profile_info import ProfileInfo
from ansible_collections.gpu_fleet.nim.plugins.module_utils._wanted_images import wanted_images
from ansible_collections.gpu_fleet.nim.plugins.modules import nim_profile_info
from fake_host import FakeHost
from image_world import IMAGE_ID, LLAMA, FakeClient, ImageWorld, found_image, image_world

EIGHT = parse_smi((pathlib.Path(__file__).parent / "fixtures/nvidia-smi/h200-x8.xml").read_text())[2]
A, B, C = ("%064x" % number for number in (1, 2, 3))
LISTING = """\
INFO 2025-10-21 a line of log
SYSTEM INFO
- Free GPUs:
  -  [2335:10de] (0) NVIDIA H200 [current utilization: 0%%]
MODEL PROFILES
- Compatible with system and runnable:
  - %s (vllm-bf16-tp2-pp1) [requires >=18 GB/gpu]
- Compatible with system but low memory:
    - %s (vllm-bf16-tp1-pp1) [requires >=33 GB/gpu, try --max-model-len=84992 to reduce to >=28 GB/gpu]
- Something new: <None>
- Incompatible with system:
    - %s (tensorrt_llm-h100-fp8-tp1-pp1-latency)
""" % (A, B, C)
MANIFEST = """\
schema_version: 2.0.0
profiles:
- id: %s
  tags: {llm_engine: vllm, precision: bf16, tp: '16'}
- id: %s
  tags: {llm_engine: vllm, precision: bf16, tp: '1', feat_lora: 'true'}
- id: %s
  tags: {llm_engine: tensorrt_llm, precision: fp8, tp: '1', gpu: H100}
""" % (A, B, C)
ONDISK = "/docker/diff/opt/nim/etc/default/model_manifest.yaml"


def layer(path: str, text: str) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        info = tarfile.TarInfo(path)
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text.encode()))
    return gzip.compress(raw.getvalue())


class Client(FakeClient):
    """A registry whose only layer holds the manifest."""

    packed = layer("opt/nim/etc/default/model_manifest.yaml", MANIFEST)

    def resolve(self, reference: ImageReference, architecture: str) -> t.Any:
        labels = {"com.nvidia.nim.version": "2.0.1"}
        return found_image(reference, layers=(("sha256:l", len(self.packed)),), labels=labels)

    def blob(self, reference: ImageReference, digest: str) -> bytes:
        return self.packed


class Api:
    def __init__(self) -> None:
        self.images: dict[str, t.Any] = {}
        self.there: set[str] = set()

    def image(self, name: str) -> t.Any:
        return self.images.get(name)

    def container(self, name: str) -> t.Any:
        return {"Name": name} if self.there else None

    def info(self) -> dict[str, t.Any]:
        return {}


class World:
    """A host with eight GPUs, and the image on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = FakeHost({"/etc/passwd": "root:x:0:0:root:/root:/bin/bash\n"})
        self.api = Api()
        self.api.images[LLAMA] = {
            "Id": IMAGE_ID,
            "Config": {"Labels": {"com.nvidia.nim.version": "1.8.4"}},
            "GraphDriver": {"Data": {"UpperDir": "/docker/diff"}},
        }
        self.host.commands["docker run * list-model-profiles"] = LISTING
        self.host.files[ONDISK] = MANIFEST.encode()
        pci = tuple(PciGpu(gpu.bdf, "2335", "Hopper", "nvidia") for gpu in EIGHT)
        self.inventory = GpuInventory(pci=pci, gpus=EIGHT, driver=LoadedDriver("580.95.05", "open", True))
        monkeypatch.setattr(_nim_profile_info, "observe_gpus", lambda host: self.inventory)

    def question(self, **options: t.Any) -> ProfileInfo:
        return ProfileInfo(LLAMA, api=t.cast(t.Any, self.api), client=t.cast(t.Any, Client), **options)

    def ask(self, **options: t.Any) -> dict[str, t.Any]:
        return self.question(**options).ask(self.host)

    def refused(self, **options: t.Any) -> FleetError:
        with pytest.raises(FleetError) as caught:
            self.ask(**options)
        return caught.value


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def fits(answer: dict[str, t.Any]) -> list[bool | None]:
    return [profile["fits"] for profile in answer["profiles"]]


def test_container(world: World) -> None:
    question = world.question(profile="vllm-bf16-tp2-pp1")
    answer = question.ask(world.host)
    assert (answer["source"], answer["family"], len(answer["gpus"])) == ("container", "1.x", 8)
    assert [profile["verdict"] for profile in answer["profiles"]] == ["compatible", "low_memory", "incompatible"]
    assert fits(answer) == [True, False, False]
    assert (answer["profiles"][0]["gpus"], answer["profiles"][0]["memory_gb"]) == (2, 18)
    assert "set max_model_length: 84992" in json.dumps(answer["profiles"][1]["checks"])
    assert answer["match"] == {"found": True, "certain": True, "candidates": [A], "fits": True, "message": ""}
    assert question.warnings == ["Headings of the listing that are not understood: Something new."]
    (words,) = world.host.calls
    assert words[:3] == ("docker", "run", "--rm") and words[-2:] == (IMAGE_ID, "list-model-profiles")
    assert {"--pull=never", "--log-driver=none", "--runtime=nvidia", "--cap-drop=ALL"} <= set(words)
    assert "--env=NVIDIA_VISIBLE_DEVICES=" + ",".join(gpu.uuid for gpu in EIGHT) in words
    assert not any("KEY" in word for word in words)


def test_some_gpus_and_cdi(world: World) -> None:
    answer = world.ask(gpus=[3], injection="cdi", environment={"NIM_MODEL_NAME": "hf://a/b"})
    assert [gpu["index"] for gpu in answer["gpus"]] == [3]
    assert answer["profiles"][0]["fits"] is False
    words = world.host.calls[0]
    assert "--device=nvidia.com/gpu=" + EIGHT[3].uuid in words and "--env=NIM_MODEL_NAME=hf://a/b" in words


def test_low_memory_says_nothing_while_somebody_uses_the_gpus(world: World) -> None:
    busy = dataclasses.replace(EIGHT[0], processes=({"pid": 1, "type": "C", "name": "vllm"},))
    world.inventory = dataclasses.replace(world.inventory, gpus=(busy, *EIGHT[1:]))
    assert fits(world.ask()) == [True, None, False]


def test_a_container_that_hangs_is_removed(world: World) -> None:
    world.host.commands["docker run * list-model-profiles"] = (124, "", "docker: no end")
    world.host.commands["docker rm *"] = ""
    world.api.there.add("x")
    error = world.refused(method="container", timeout=5)
    assert error.reason == "listing_failed" and "no end after 5 s; raise timeout" in error.message
    assert world.host.calls[-1][:3] == ("docker", "rm", "--force")
    name = next(word for word in world.host.calls[0] if word.startswith("--name=nim-profiles-"))
    assert world.host.calls[-1][3] == name[len("--name=") :]


def test_speech_images_have_another_name_for_it(world: World) -> None:
    world.host.commands = {
        "docker run * list-model-profiles": (127, "", "exec: list-model-profiles: not found"),
        "docker run * --entrypoint=nim_list_model_profiles " + IMAGE_ID: LISTING,
    }
    assert len(world.ask()["profiles"]) == 3


def test_without_a_listing_auto_reads_the_manifest(world: World) -> None:
    world.host.commands = {"docker run * list-model-profiles": (125, "", "unknown or invalid runtime name: nvidia")}
    question = world.question()
    answer = question.ask(world.host)
    assert answer["source"] == "image"
    assert "unknown or invalid runtime name: nvidia" in question.warnings[0]
    assert "The manifest was read in its place." in question.warnings[0]


def test_manifest_on_the_host(world: World) -> None:
    answer = world.ask(method="manifest", lora=True, profile=B)
    assert world.host.calls == []
    assert answer["source"] == "image" and fits(answer) == [False, None, False]
    checks = {check["check"]: check["passed"] for check in answer["profiles"][0]["checks"]}
    assert checks == {"gpu_kind": True, "gpu_count": False, "gpu_memory": None, "lora": False}
    assert answer["match"]["found"] is True and answer["match"]["fits"] is None
    assert world.ask(method="manifest", profile="f" * 64)["match"]["found"] is False
    world.inventory = GpuInventory()
    assert fits(world.ask()) == [None, None, None]


def test_manifest_of_another_image_store(world: World) -> None:
    del world.api.images[LLAMA]["GraphDriver"]
    world.host.commands = {"docker run * --entrypoint=cat %s /opt/*" % IMAGE_ID: MANIFEST}
    assert world.ask(method="manifest")["source"] == "image"
    world.host.commands.clear()
    assert world.refused(method="manifest").reason == "no_manifest"


def test_manifest_at_the_registry(world: World) -> None:
    world.api.images.clear()
    answer = world.ask(profile="vllm-bf16-tp1-pp1-lora")
    assert (answer["source"], answer["family"]) == ("registry", "2.x")
    assert answer["match"]["candidates"] == [B]
    assert world.host.calls == []


def test_refusals(world: World) -> None:
    world.inventory = GpuInventory()
    assert world.refused(method="container").reason == "no_gpu"
    world.api.images[LLAMA]["Config"]["Labels"] = {"com.nvidia.nim.model_download_protocol": "native-v1"}
    assert world.refused().reason == "no_profiles"
    world.api.images.clear()
    assert world.refused(method="container").reason == "image_missing"
    with pytest.raises(FleetError) as caught:
        world.question(gpus="many")
    assert caught.value.message.startswith("gpus = 'many':")


def test_module(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(nim_profile_info, "Host", lambda: world.host)
    build = functools.partial(ProfileInfo, api=t.cast(t.Any, world.api), client=t.cast(t.Any, Client))
    monkeypatch.setattr(nim_profile_info, "ProfileInfo", build)
    before = dict(world.host.files)
    answers = []
    for check in (True, False):
        with patch_module_args({"name": LLAMA, "_ansible_check_mode": check}), pytest.raises(SystemExit):
            nim_profile_info.main()
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert answers[0]["changed"] is False and len(answers[0]["profiles"]) == 3
    assert world.host.files == before
    with patch_module_args({"name": LLAMA, "gpus": 9}), pytest.raises(SystemExit):
        nim_profile_info.main()
    assert json.loads(capsys.readouterr().out)["reason"] == "gpus_unavailable"


# -- before a pull --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "takes"),
    [
        ({}, True),
        ({"environment": {"NIM_KVCACHE_PERCENT": "0.8"}}, True),
        ({"max_model_length": 4096}, False),
        ({"engine_arguments": ["--kv-cache-dtype=fp8"]}, False),
        ({"environment": {"NIM_RELAX_MEM_CONSTRAINTS": "1"}}, False),
    ],
)
def test_when_a_model_takes_the_memory_that_its_profile_names(options: dict[str, t.Any], takes: bool) -> None:
    [entry] = wanted_images([{"image": LLAMA, "name": "a", "profile": B, **options}])
    assert entry["profile_memory"] is takes


def test_what_models_want_of_their_images() -> None:
    base = {"image": LLAMA}
    models = [
        dict(base, name="a", profile=B, lora_directory="/srv/lora"),
        dict(base, name="b", port=1, profile=B, gpus=[0, 1]),
        dict(base, name="c", port=2, profile="default"),
        dict(base, name="d", port=3, profile=B, weights_directory="/srv/w"),
        dict(base, name="e", port=4),
    ]
    found = [{key: one[key] for key in ("profile", "gpus", "lora") if key in one} for one in wanted_images(models)]
    assert found == [
        {"profile": B, "lora": True},
        {"profile": B, "lora": False, "gpus": 2},
        {},
        {},
        {},
    ]


@pytest.fixture
def images(host: FakeHost, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> ImageWorld:
    found = image_world(host, tmp_path, monkeypatch)
    driver = LoadedDriver("580.95.05", "open", True)
    inventory = GpuInventory(driver=driver, cuda_version="13.0", gpus=EIGHT)
    monkeypatch.setattr(_nim_image, "observe_gpus", lambda host: inventory)
    monkeypatch.setattr(FakeClient, "resolve", Client.resolve)
    monkeypatch.setattr(FakeClient, "blob", Client.blob, raising=False)
    monkeypatch.setattr(FakeClient, "packed", Client.packed, raising=False)
    return found


@pytest.mark.parametrize(
    ("profile", "options", "reason", "words"),
    [
        (A, {}, "profile_unsuitable", "It needs 16 GPUs, and there are 8"),
        (C, {}, "profile_unsuitable", "It was built for H100"),
        (B, {"gpus": 0}, "profile_unsuitable", "gpus gives the model 0"),
        ("vllm-bf16-tp1-pp1-lora-200.0", {}, "profile_unsuitable", "It needs 200 GB on each of 1 GPU"),
        ("f" * 64, {}, "no_such_profile", "Model llama: profile = ffff"),
    ],
)
def test_refused_before_the_pull(
    images: ImageWorld, profile: str, options: dict[str, t.Any], reason: str, words: str
) -> None:
    with pytest.raises(FleetError) as caught:
        images.run([dict(image=LLAMA, model="llama", profile=profile, **options)])
    assert caught.value.reason == reason and words in caught.value.message
    assert images.jobs.started == [] and images.docker.pulled == []


def test_pulled_when_it_can_run_or_nobody_knows(images: ImageWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: t.Any, reference: ImageReference, digest: str) -> bytes:
        raise FleetError("registry_unreachable", "Because.")

    entry = {"image": LLAMA, "model": "llama", "profile": B, "lora": True}
    images.run([entry])
    assert images.jobs.started
    images.jobs.started.clear()
    images.docker.images.clear()
    images.run([dict(entry, profile="vllm-bf16-tp1-pp1-lora-200.0", profile_memory=False)])
    assert images.jobs.started
    images.jobs.started.clear()
    images.docker.images.clear()
    monkeypatch.setattr(FakeClient, "blob", broken)
    images.run([dict(entry, profile="f" * 64)])
    assert images.jobs.started
