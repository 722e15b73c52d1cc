# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Models get the GPUs that they or their profiles ask for, and what cannot run is refused before anything is touched."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import parse_smi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_bus import PciGpu
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_inventory import GpuInventory
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_wishes import gpu_kinds
from nim_machine import DIGEST, LLAMA, NEMO, Machine, failure, llama, nemo

EIGHT = parse_smi((pathlib.Path(__file__).parent / "fixtures/nvidia-smi/h200-x8.xml").read_text())[2]
TP4, TP2, H100 = ("%064x" % number for number in (1, 2, 3))
MANIFEST = """\
%s:
  tags: {llm_engine: vllm, precision: bf16, tp: '4', pp: '1'}
%s:
  tags: {llm_engine: vllm, precision: bf16, tp: '2', pp: '1', feat_lora: 'true'}
%s:
  tags: {llm_engine: tensorrt_llm, precision: fp8, tp: '1', pp: '1', gpu: H100, gpu_device: '2330:10de'}
""" % (TP4, TP2, H100)
LAYER = "/var/lib/docker/overlay2/abc/diff"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(monkeypatch)
    pci = tuple(PciGpu(gpu.bdf, "2335", "Hopper", "nvidia") for gpu in EIGHT)
    found.inventory = GpuInventory(pci=pci, gpus=EIGHT)
    found.api.images[LLAMA]["GraphDriver"] = {"Data": {"UpperDir": LAYER}}
    found.host.files[LAYER + "/opt/nim/etc/default/model_manifest.yaml"] = MANIFEST.encode()
    return found


def indices(machine: Machine, name: str) -> list[int]:
    gpus = json.loads(machine.host.files["/etc/nim/%s.json" % name])["gpus"]
    return [gpu.index for gpu in EIGHT if gpu.uuid in gpus]


def topology_calls(machine: Machine) -> int:
    return machine.host.calls.count(("nvidia-smi", "topo", "-m"))


def test_a_profile_brings_its_number_of_gpus(machine: Machine) -> None:
    machine.converge(llama(profile=TP4), nemo(profile="vllm-bf16-tp2-pp1"))
    assert (indices(machine, "llama"), indices(machine, "nemo")) == ([0, 1, 2, 3], [4, 5])
    # What is said beats what is derived.
    machine.converge(llama(profile=TP4, gpus=5), nemo(gpus=1))
    assert (indices(machine, "llama"), indices(machine, "nemo")) == ([0, 1, 2, 3, 5], [4])
    machine.converge(llama(profile="default"), nemo())
    assert (indices(machine, "llama"), indices(machine, "nemo")) == ([0], [4])


def test_the_plan_shows_which_gpus(machine: Machine) -> None:
    def why(*models: dict[str, t.Any]) -> list[str]:
        return [change.why for change in machine.plan(*models) if change.action == "restart"]

    assert why(llama(profile=TP4)) == ["the service does not run; on GPU 0, 1, 2, 3"]
    machine.converge(llama(profile=TP4))
    assert why(llama(profile=TP2)) == ["the container runs something else; on GPU 0, 1"]
    assert why(llama(profile=TP4, max_model_length=4096)) == ["the container runs something else"]


def test_connected_gpus_and_no_question_once_placed(machine: Machine) -> None:
    header = "\t" + "\t".join("GPU%d" % one for one in range(8)) + "\tCPU Affinity"
    rows = [
        "GPU%d\t" % row
        + "\t".join(" X " if row == column else "NV18" if row % 2 == column % 2 else "SYS" for column in range(8))
        for row in range(8)
    ]
    machine.host.commands["nvidia-smi topo -m"] = "\n".join([header, *rows])
    models = (llama(profile=TP4), nemo(gpus=2))
    machine.converge(*models)
    assert (indices(machine, "llama"), indices(machine, "nemo")) == ([0, 2, 4, 6], [1, 3])
    assert topology_calls(machine) >= 1
    before = list(machine.host.calls)
    assert machine.converge(*reversed(models)).changes == []
    assert topology_calls(machine) == before.count(("nvidia-smi", "topo", "-m"))
    # Not one command more than a fleet without profiles needs.
    assert {words[0] for words in machine.host.calls[len(before) :]} == {"systemctl", "find"}


def test_too_many_gpus_are_refused_before_the_image_is_there(machine: Machine) -> None:
    image = machine.api.images.pop(NEMO)
    assert image["RepoDigests"] == ["nvcr.io/nim/nvidia/nemotron-3-nano@" + DIGEST]
    error = failure(machine, llama(gpus=6), nemo(profile="vllm-bf16-tp4-pp1"))
    assert error.reason == "gpus_unavailable"
    assert "Model nemo asks for profile vllm-bf16-tp4-pp1 with 4 GPUs, but 4 more would be needed and 2 are free" in (
        error.message
    )
    assert error.message.count("NVIDIA H200 140.4 GiB: llama") == 6
    assert machine.host.files.keys() == {LAYER + "/opt/nim/etc/default/model_manifest.yaml"}
    # One that fits is only not possible yet.
    assert [change.action for change in machine.plan(nemo(profile="vllm-bf16-tp4-pp1"))] == ["prerequisite"]


@pytest.mark.parametrize(
    ("options", "reason", "words"),
    [
        ({"profile": "f" * 64}, "no_such_profile", ["none of the 3 profiles", TP4 + " (vllm bf16 tp4 pp1)"]),
        ({"profile": "vllm-fp8-tp4-pp1"}, "no_such_profile", ["Model llama: profile = vllm-fp8-tp4-pp1"]),
        ({"profile": H100}, "profile_unsuitable", ["built for H100", "NVIDIA H200"]),
        ({"profile": TP4, "gpus": 2}, "profile_unsuitable", ["needs 4 GPUs", "2"]),
        ({"profile": TP4, "gpus": [0, 1, 2]}, "profile_unsuitable", ["needs 4 GPUs"]),
        ({"profile": TP4, "lora_directory": "/srv/lora"}, "profile_unsuitable", ["LoRA"]),
        ({"profile": TP4, "gpus": 16}, "gpus_unavailable", ["gpus = 16", "8 are free"]),
    ],
)
def test_what_cannot_run_is_refused(machine: Machine, options: dict[str, t.Any], reason: str, words: list[str]) -> None:
    machine.host.dirs.add("/srv/lora")
    before = dict(machine.host.files)
    error = failure(machine, llama(**options))
    assert error.reason == reason
    assert all(word in error.message for word in words), error.message
    assert machine.host.files == before


def test_the_memory_that_a_description_names_is_looked_for(machine: Machine) -> None:
    small = dataclasses.replace(EIGHT[0], memory_total_mib=46068)
    machine.inventory = dataclasses.replace(machine.inventory, gpus=(small, EIGHT[1]))
    error = failure(machine, nemo(profile="vllm-bf16-tp2-pp1-63.0"))
    assert error.reason == "gpus_unavailable"
    assert "profile vllm-bf16-tp2-pp1-63.0 with 2 GPUs" in error.message
    assert "name another profile or max_model_length" in error.message
    # More GPUs than it needs, by name: one of them may be small.
    machine.converge(nemo(profile="vllm-bf16-tp1-pp1-63.0", gpus="all"))
    assert indices(machine, "nemo") == [0, 1]
    machine.converge(nemo(state="absent"))
    machine.converge(nemo(profile="vllm-bf16-tp1-pp1-63.0"))
    assert indices(machine, "nemo") == [1]
    # What serves is left alone, whatever its description says.
    smaller = dataclasses.replace(EIGHT[1], memory_total_mib=46068)
    machine.inventory = dataclasses.replace(machine.inventory, gpus=(small, smaller))
    assert machine.converge(nemo(profile="vllm-bf16-tp1-pp1-63.0")).changes == []
    machine.inventory = dataclasses.replace(machine.inventory, gpus=(small, EIGHT[1]))
    # Several GPUs share it.
    environment = {"NIM_TENSOR_PARALLEL_SIZE": "2"}
    machine.converge(nemo(profile="vllm-bf16-tp1-pp1-63.0", gpus=2, environment=environment))
    assert failure(machine, nemo(profile="vllm-bf16-tp2-pp1-63.0")).reason == "profile_unsuitable"
    # With a shorter context it takes less, and nobody knows how much.
    machine.converge(nemo(profile="vllm-bf16-tp2-pp1-63.0", max_model_length=4096))
    assert indices(machine, "nemo") == [0, 1]


def test_what_runs_is_left_alone(machine: Machine) -> None:
    machine.converge(llama(profile=TP4))
    machine.host.files[LAYER + "/opt/nim/etc/default/model_manifest.yaml"] = MANIFEST.replace(TP4, "e" * 64).encode()
    assert machine.converge(llama(profile=TP4, gpus=4)).changes == []


def test_unknown_manifests_refuse_nothing(machine: Machine) -> None:
    machine.api.images[LLAMA]["GraphDriver"] = {}
    machine.converge(llama(profile="f" * 64))
    assert indices(machine, "llama") == [0]


def test_a_model_that_serves_tells_its_profiles_whatever_the_image_store(machine: Machine) -> None:
    machine.api.images[LLAMA]["GraphDriver"] = {}
    machine.converge(llama(profile=TP4))
    container = {"Image": machine.api.images[LLAMA]["Id"], "State": {"Running": True, "Pid": 4242}}
    machine.api.inspected["nim-llama"] = {**(machine.api.container("nim-llama") or {}), **container}
    machine.host.files["/proc/4242/root/opt/nim/etc/default/model_manifest.yaml"] = MANIFEST.encode()
    assert failure(machine, llama(profile="f" * 64)).reason == "no_such_profile"
    assert machine.active["nim-llama.service"] == "active"


def test_a_model_from_elsewhere_may_bring_its_profiles(machine: Machine) -> None:
    assert failure(machine, llama(profile="f" * 64)).reason == "no_such_profile"
    machine.converge(llama(profile="f" * 64, environment={"NIM_MODEL_NAME": "hf://meta/llama"}))
    assert indices(machine, "llama") == [0]


def test_unified_memory_and_mig(machine: Machine) -> None:
    silent = dataclasses.replace(EIGHT[0], memory_total_mib=None, memory_used_mib=None, memory_free_mib=None)
    machine.inventory = dataclasses.replace(machine.inventory, gpus=(silent,))
    machine.converge(nemo(profile="vllm-bf16-tp1-pp1"))
    assert indices(machine, "nemo") == [0]
    device = "MIG-11111111-2222-3333-4444-555555555555"
    sliced = dataclasses.replace(
        EIGHT[0], mig="Enabled", mig_devices=({"uuid": device, "index": 0, "memory_total_mib": 18000},)
    )
    machine.inventory = dataclasses.replace(machine.inventory, gpus=(sliced,))
    machine.converge(nemo(gpus=[device], profile="vllm-bf16-tp1-pp1"))
    assert json.loads(machine.host.files["/etc/nim/nemo.json"])["gpus"] == [device]
    assert "MIG devices" in failure(machine, nemo(gpus=1)).message


def test_kinds_of_gpus() -> None:
    device = "MIG-11111111-2222-3333-4444-555555555555"
    sliced = dataclasses.replace(
        EIGHT[0], mig="Enabled", mig_devices=({"uuid": device, "index": 0, "memory_total_mib": 18000},)
    )
    gpus = [sliced, *EIGHT[1:]]
    assert gpu_kinds([EIGHT[2].uuid, device, "GPU-gone"], gpus) == sorted(
        [EIGHT[2].name, EIGHT[0].name + " MIG 18 GiB", "GPU-gone"]
    )
