# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A profile is refused only where it is certain that it cannot run, and the refusal says what to do."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import Gpu
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_profile_checks import (
    check_profile,
    memory_mib,
    require_profile,
    verdict,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_profiles import (
    COMPATIBLE,
    INCOMPATIBLE,
    LOW_MEMORY,
    Profile,
    parse_description,
)


def gpu(name: str = "NVIDIA H200", memory: int | None = 143771, architecture: str = "Hopper", index: int = 0) -> Gpu:
    return Gpu(
        index=index,
        uuid="GPU-%d" % index,
        name=name,
        brand="NVIDIA",
        architecture=architecture,
        memory_total_mib=memory,
        memory_used_mib=0,
        memory_free_mib=memory,
        mig="Disabled",
        compute_mode="Default",
        minor=index,
        bdf="0000:0%d:00.0" % index,
    )


def results(profile: Profile, *gpus: Gpu, **options: t.Any) -> dict[str, bool | None]:
    return {check.name: check.passed for check in check_profile(profile, gpus, **options)}


@pytest.mark.parametrize(
    ("kind", "name", "passed"),
    [
        ("h200", "NVIDIA H200", True),
        ("H100", "NVIDIA H200", False),
        ("h100", "NVIDIA H100 80GB HBM3", True),
        ("h100_nvl", "NVIDIA H100 NVL", True),
        ("h100_nvl", "NVIDIA H100 PCIe", None),
        ("l40s", "NVIDIA L40", False),
        ("L4", "NVIDIA L40S", False),
        ("a10g", "NVIDIA A10", False),
        ("a100", "NVIDIA A100-SXM4-80GB", True),
        ("gh200_480gb", "NVIDIA GH200 480GB", True),
        ("gb200", "NVIDIA B200", False),
        ("rtx6000_blackwell_sv", "NVIDIA RTX PRO 6000 Blackwell Server Edition", None),
        ("h100", "NVIDIA GeForce RTX 4090", None),
        ("gb10", "NVIDIA GB10", True),
    ],
)
def test_kind_of_gpu(kind: str, name: str, passed: bool | None) -> None:
    assert results(Profile("x", gpu=kind, tp=1), gpu(name))["gpu_kind"] is passed


def test_kind_by_device_pattern_and_capability() -> None:
    at = {"0000:00:00.0": "2335"}
    assert results(Profile("x", gpu="odd", gpu_device="2335"), gpu(), devices=at)["gpu_kind"] is True
    # The name fits and the device is another: a variant, which may do.
    assert results(Profile("x", gpu="H200", gpu_device="233b"), gpu(), devices=at)["gpu_kind"] is None
    assert results(Profile("x", gpu_device="233b"), gpu())["gpu_kind"] is None
    assert results(Profile("x"), gpu())["gpu_kind"] is True

    def pattern(text: str, name: str) -> bool | None:
        return results(Profile("x", tags={"product_name_regex": text}), gpu(name))["gpu_kind"]

    assert pattern("^NVIDIA-L4(?!0S).*", "NVIDIA L4") is True
    assert pattern("^NVIDIA-L4(?!0S).*", "NVIDIA L40S") is False
    # No pattern out of an image keeps the host busy.
    assert pattern("^(a+)+$", "a" * 60 + "!") is None

    def capability(value: str, architecture: str) -> bool | None:
        return results(Profile("x", tags={"compute_capability": value}), gpu("x", 1, architecture))["gpu_kind"]

    assert capability("9.0", "Hopper") is True
    assert capability("9.0", "Ada Lovelace") is False
    assert capability("8.6", "Ampere") is None
    assert capability("9.0", "Rubin") is None


def test_number_of_gpus() -> None:
    four = [gpu(index=index) for index in range(4)]
    assert results(parse_description("vllm-bf16-tp2-pp2"), *four)["gpu_count"] is True
    assert results(parse_description("vllm-bf16-tp8-pp1"), *four)["gpu_count"] is False
    assert results(parse_description("vllm-bf16-tp2-pp1"), *four, count=1)["gpu_count"] is False
    assert results(parse_description("vllm-bf16-tp2-pp1"), *four, count=4)["gpu_count"] is True
    assert results(Profile("x"), *four)["gpu_count"] is None


def test_memory() -> None:
    def of(needed: float | None, *sizes: int | None) -> bool | None:
        profile = Profile("x", tp=2, memory_gb=needed)
        return results(profile, *[gpu(memory=size) for size in sizes])["gpu_memory"]

    # A GPU of 24 GB.
    assert of(24, 23034, 23034) is True
    assert of(25, 23034, 23034) is False
    assert of(25, 23034, 81559, 81559) is True
    assert of(25, 23034, 81559) is False
    # Unified memory, which nvidia-smi does not tell.
    assert of(25, None, None) is None
    assert of(25, None, 23034) is False
    assert of(None, 1, 1) is None
    assert memory_mib(34) == 32424


def test_lora() -> None:
    assert "lora" not in results(parse_description("vllm-bf16-tp1-pp1"), gpu())
    assert results(parse_description("vllm-bf16-tp1-pp1"), gpu(), lora=True)["lora"] is False
    assert results(parse_description("vllm-bf16-tp1-pp1-lora"), gpu(), lora=True)["lora"] is True
    assert results(Profile("x"), gpu(), lora=True)["lora"] is None


def test_verdict_needs_certainty() -> None:
    def of(profile: Profile, *gpus: Gpu) -> bool | None:
        return verdict(check_profile(profile, gpus or [gpu()]))

    assert of(Profile("x", tp=1, memory_gb=20)) is True
    assert of(Profile("x", tp=1)) is None
    assert of(Profile("x", tp=1, verdict=COMPATIBLE)) is True
    assert of(Profile("x", tp=1, memory_gb=20, verdict=INCOMPATIBLE)) is False
    assert of(Profile("x", tp=2, verdict=COMPATIBLE)) is False
    low = Profile("x", tp=1, memory_gb=33, reduced_memory_gb=20, reduced_model_length=4096, verdict=LOW_MEMORY)
    checks = check_profile(low, [gpu(memory=23034)])
    assert verdict(checks) is False
    assert "set max_model_length: 4096 (then 20 GB do)" in " ".join(check.message for check in checks)


def test_refusal() -> None:
    with pytest.raises(FleetError) as caught:
        require_profile("llama", parse_description("tensorrt_llm-h100-fp8-tp4-pp1-latency"), [gpu()], lora=True)
    error = caught.value
    assert error.reason == "profile_unsuitable"
    assert error.message == (
        "Model llama cannot run profile tensorrt_llm-h100-fp8-tp4-pp1-latency (): It was built for h100, and the GPUs "
        "here are NVIDIA H200; name a profile for them, or one without a kind of GPU. It needs 4 GPUs, and there is 1; "
        "name a profile with a smaller tp. It cannot load LoRA adapters; name a profile with LoRA support, or leave "
        "lora_directory out."
    ).replace(" ():", ":")
    assert [check["check"] for check in error.facts["checks"]] == ["gpu_kind", "gpu_count", "lora"]
    # What is not known refuses nothing.
    require_profile("llama", Profile("x"), [gpu()], lora=True)
    require_profile("llama", Profile("x", tp=1, memory_gb=500), [gpu(memory=None)])
