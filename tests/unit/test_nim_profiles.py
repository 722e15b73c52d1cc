# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Profiles are read from every layout of listing and manifest, and what is not said stays unknown."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_profile_listing import parse_listing
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_profiles import (
    COMPATIBLE,
    INCOMPATIBLE,
    LOW_MEMORY,
    Profile,
    match_profile,
    parse_description,
    parse_manifest,
)
from hypothesis import given
from hypothesis import strategies as st


def an_id(number: int) -> str:
    return "%064x" % (number * 0x1234567 + 1)


A, B, C, D, E = (an_id(number) for number in range(5))


def by_id(text: str) -> dict[str, Profile]:
    listing = parse_listing(text)
    assert listing.understood
    return {profile.id: profile for profile in listing.profiles}


# -- listings -------------------------------------------------------------------------------------

FIRST = """\
SYSTEM INFO
- Free GPUs: <None>
- Non-free GPUs:
  -  [2236:10de] (0) NVIDIA A10 [current utilization: 85%%]
MODEL PROFILES
- Compatible with system and runnable: <None>
- Compatible with system but not runnable due to low GPU free memory
  - %s (vllm-fp16-tp1)
  - With LoRA support:
    - %s (vllm-fp16-tp1-lora)
- Incompatible with system:
  - %s (tensorrt_llm-h100-fp8-tp2-latency)
""" % (A, B, C)


def test_layout_of_1_0() -> None:
    listing = parse_listing(FIRST)
    assert [(gpu.index, gpu.name, gpu.device, gpu.free, gpu.utilization) for gpu in listing.gpus] == [
        (0, "NVIDIA A10", "2236", False, 85)
    ]
    found = by_id(FIRST)
    assert [found[one].verdict for one in (A, B, C)] == [LOW_MEMORY, LOW_MEMORY, INCOMPATIBLE]
    assert [found[one].lora for one in (A, B, C)] == [False, True, False]
    engine = found[C]
    assert (engine.backend, engine.gpu, engine.precision, engine.tp, engine.pp, engine.gpus) == (
        "tensorrt_llm",
        "h100",
        "fp8",
        2,
        None,
        2,
    )
    assert engine.tags == {"profile": "latency"} and engine.memory_gb is None
    assert engine.section == "Incompatible with system" and listing.unknown == ()


NOISE = (
    """\
===========================================
== NVIDIA Inference Microservice LLM NIM ==
===========================================
WARNING 2025-10-21 15:06:40.531 profile_utils.py:879] Profile %s does not support LoRA, but LoRA is enabled. Skipping profile.
INFO 2025-10-21 15:06:40.532 manifest.rs:160] first-level manifest validation skipped for version 1 schema
{"level": "INFO", "message": "compatible with system and so on", "time": "None"}
"""
    % E
)

FOURTEENTH = (
    NOISE
    + """\
MODEL PROFILES
- Compatible with system and runnable:
  - %s (vllm-bf16-tp2-pp1-b84343a5f0204e11c83c4e0dce9626d4795db4b7f251375b3d321dc0d8c19d46)
  - %s (tensorrt_llm-h100_nvl-fp8-tp2-pp1-throughput-2321:10de-5e20634213cb4c32e86f048dbc274eb8bff74720af81fe400d8924e766f3e723-4)
  - With LoRA support:
    - %s (vllm-bf16-tp2-pp1-lora-32-b84343a5f0204e11c83c4e0dce9626d4795db4b7f251375b3d321dc0d8c19d46)
INFO 2025-10-21 15:06:41.000 nim_hub_ngc.rs:1] something in between
- Compilable to TRT-LLM using just-in-time compilation of HF models to TRTLLM engines:
  - %s (tensorrt_llm-trtllm_buildable-bf16-tp1-pp1)
  - With LoRA support:
    - %s (tensorrt_llm-trtllm_buildable-bf16-tp1-pp1-lora)
- Incompatible with system: <None>
"""
    % (A, B, C, D, E)
)


def test_layout_of_1_3_to_1_14_between_log_lines() -> None:
    found = by_id(FOURTEENTH)
    assert [found[one].verdict for one in (A, B, C, D, E)] == [COMPATIBLE] * 5
    assert [found[one].lora for one in (A, B, C, D, E)] == [False, False, True, False, True]
    assert [found[one].buildable for one in (A, B, C, D, E)] == [None, None, None, True, True]
    assert (found[A].precision, found[A].tp, found[A].pp, found[A].gpu) == ("bf16", 2, 1, None)
    assert (found[B].gpu, found[B].gpu_device, found[B].gpus) == ("h100_nvl", "2321", 2)
    assert found[D].backend == "tensorrt_llm" and found[D].gpu is None


SECOND = """\
SYSTEM INFO
- Free GPUs:
  -  [26b5:10de] (0) NVIDIA L40 [current utilization: 1%%]
  -  [20b2:10de] (1) NVIDIA A100-SXM4-80GB (A100 80GB) [current utilization: N/A%%]
MODEL PROFILES
- Compatible with system and runnable:
  - %s (vllm-fp8-tp1-pp1-34.0) [requires >=34 GB/gpu]
  - With LoRA support:
    - %s (vllm-fp8-tp1-pp1-feat_lora-34.0) [requires >=34 GB/gpu]
- Compatible with system but low memory:
    - %s (vllm-bf16-tp1-pp1) [requires >=33 GB/gpu, try --max-model-len=84992 to reduce to >=28 GB/gpu]
- Compilable to TRT-LLM using just-in-time compilation of HF models to TRTLLM engines: <None>
- Incompatible with system:
    - %s (vllm-tp2-pp1-abc) [requires >=18 GB/gpu per 2 GPUs]
""" % (A, B, C, D)


@pytest.mark.parametrize(
    ("description", "memory"),
    [
        # With "[requires >=34 GB/gpu]", 12 and 65 behind them in listings of NIM 2.x.
        ("vllm-fp8-tp1-pp1-34.0", 34),
        ("vllm-fp8-tp1-pp1-feat_lora-34.0", 34),
        ("vllm-fp8-tp4-pp1-12.0", 12),
        ("vllm-fp8-tp2-pp1-65.0", 65),
        ("sglang-bf16-tp1-pp1-16.5", 16.5),
        # Without it, of an older form, or with more than anybody has explained.
        ("vllm-bf16-tp1-pp1", None),
        ("vllm-bf16-tp1-pp1-lora", None),
        ("vllm-bf16-tp1-34.0", None),
        ("tensorrt_llm-h100-fp8-tp1-pp1-34.0", None),
        ("vllm-bf16-tp1-pp1-34", None),
        ("vllm-bf16-tp1-pp1-0.0", None),
        ("vllm-bf16-tp1-pp1-34.0-x", None),
        ("vllm-bf16-tp1-pp1-latency-34.0", None),
        ("vllm-bf16-tp1-pp1-b84343a5f020", None),
        ("vllm-34.0", None),
    ],
)
def test_memory_at_the_end_of_a_description(description: str, memory: float | None) -> None:
    assert parse_description(description).memory_gb == memory
    # What the listing says itself counts.
    text = "MODEL PROFILES\n- Compatible with system and runnable:\n  - %s (%s) [requires >=7 GB/gpu]\n" % (
        A,
        description,
    )
    assert by_id(text)[A].memory_gb == 7


def test_a_manifest_has_the_memory_of_the_description_that_names_its_profile() -> None:
    text = (
        "schema_version: 2.0.0\nprofiles:\n- id: %s\n  tags: {llm_engine: vllm, precision: fp8, tp: '1', pp: '1'}\n" % A
    )
    profiles = parse_manifest(text)
    assert profiles is not None
    named = match_profile("vllm-fp8-tp1-pp1-34.0", profiles)
    assert named.profile is not None
    assert (named.profile.id, named.profile.memory_gb) == (A, 34)
    by_its_id = match_profile(A, profiles)
    assert by_its_id.profile is not None
    assert by_its_id.profile.memory_gb is None


def test_what_is_no_text_is_no_id_and_no_tag() -> None:
    entries = [{"id": [A], "tags": {"tp": "1"}}, {"id": 5}, {"id": B, "tags": {"llm_engine": ["vllm"], "tp": 2}}]
    found = parse_manifest(json.dumps({"schema_version": "2.0.0", "profiles": entries}))
    assert found is not None
    assert [(one.id, one.backend, one.tp) for one in found] == [(B, None, 2)]


def test_layout_of_2() -> None:
    found = by_id(SECOND)
    assert [found[one].verdict for one in (A, B, C, D)] == [COMPATIBLE, COMPATIBLE, LOW_MEMORY, INCOMPATIBLE]
    assert [found[one].memory_gb for one in (A, B, C, D)] == [34, 34, 33, 18]
    assert (found[C].reduced_model_length, found[C].reduced_memory_gb) == (84992, 28)
    assert found[A].reduced_memory_gb is None
    assert [found[one].lora for one in (A, B, C, D)] == [False, True, False, False]
    assert (found[D].precision, found[D].gpus) == (None, 2)
    gpus = parse_listing(SECOND).gpus
    assert [(gpu.name, gpu.utilization, gpu.free) for gpu in gpus] == [
        ("NVIDIA L40", 1, True),
        ("NVIDIA A100-SXM4-80GB (A100 80GB)", None, True),
    ]


def test_indentation_lost_on_the_way() -> None:
    flat = "\n".join(line.strip() for line in SECOND.splitlines())
    assert {one: (p.verdict, p.lora) for one, p in by_id(flat).items()} == {
        one: (p.verdict, p.lora) for one, p in by_id(SECOND).items()
    }


def test_back_in_the_section_above_behind_lora() -> None:
    text = "MODEL PROFILES\n- Compatible with system:\n  - With LoRA support:\n    - %s (vllm-tp1-lora)\n  - %s (vllm-tp1)\n"
    found = by_id(text % (A, B))
    assert (found[A].lora, found[B].lora) == (True, False)


def test_layout_of_speech_with_tags() -> None:
    text = """\
SYSTEM INFO
- Free GPUs:
-  [2331:10de] (0) NVIDIA H100 PCIe [current utilization: 0%%]
MODEL PROFILES                                                                       08:34:09 [5/16757]
- Compatible with system:
    - %s - {'ampereplus': 'enabled', 'gpu_device': '20b2', 'model_type': 'prebuilt', 'name': 'parakeet-0-6b'}
    - %s - ampereplus:enabled|gpu:a100|gpu_device:20b2|mode:all|name:parakeet-0-6b-ctc-en-us|vad:silero
    - %s
      - model_type:onnx | precision:fp16
- Incompatible with system:
    - %s - {'model_type': 'rmir', 'name': 'parakeet'}
""" % (A, B, C, D)
    found = by_id(text)
    assert [found[one].verdict for one in (A, B, C, D)] == [COMPATIBLE] * 3 + [INCOMPATIBLE]
    assert (found[A].gpu_device, found[A].tags["name"], found[A].tp, found[A].gpus) == (
        "20b2",
        "parakeet-0-6b",
        None,
        None,
    )
    assert (found[B].gpu, found[B].tags["vad"]) == ("a100", "silero")
    assert (found[C].precision, found[C].tags["model_type"]) == ("fp16", "onnx")
    assert [found[one].lora for one in (A, B, C, D)] == [None] * 4


def test_layout_of_bionemo_and_headings_nobody_knows() -> None:
    text = """\
MODEL PROFILES
- All profiles:
  - %s (pytorch-fp16-tp1)
- Compatible with system if the moon is full:
  - %s (vllm-fp16-tp1)
- Something new in 4.0 <None>
- Something else:
  - %s (vllm-bf16-tp1)
""" % (A, B, C)
    listing = parse_listing(text)
    assert [profile.verdict for profile in listing.profiles] == [None, None, None]
    assert listing.unknown == (
        "Compatible with system if the moon is full",
        "Something new in 4.0",
        "Something else",
    )
    assert listing.profiles[2].section == "Something else"


def test_terminal_control_and_line_ends() -> None:
    text = SECOND.replace("- Compatible", "\x1b[1m\x1b[32m- Compatible").replace("\n", "\x1b[0m\r\n")
    assert by_id(text) == by_id(SECOND)


def test_descriptions_without_an_engine_and_old_ids() -> None:
    uuid = "420b5bb2-cd51-4dac-be21-759f3df4e441"
    text = (
        "MODEL PROFILES\n- Compatible with the system and runnable:\n  - %s (h100-fp16-tp1-throughput)\n  - %s (vllm)\n"
    )
    found = by_id(text % (uuid, A))
    assert (found[uuid].gpu, found[uuid].precision, found[uuid].tp, found[uuid].backend) == ("h100", "fp16", 1, None)
    assert (found[A].backend, found[A].tp, found[A].lora) == ("vllm", None, None)


def test_a_profile_that_stands_in_two_sections_has_no_verdict() -> None:
    text = "MODEL PROFILES\n- Compatible with system and runnable:\n  - %s (vllm-tp1)\n- Incompatible with system:\n  - %s (vllm-tp1)\n"
    assert by_id(text % (A, A))[A].verdict is None


def test_json_listing() -> None:
    document = {
        "compatible": [{"profile_id": A, "tags": {"llm_engine": "vllm", "tp": 2, "feat_lora": False}}],
        "incompatible": [{"profile_id": B, "tags": {"tp": "1"}, "description": "vllm-tp1"}],
        "new": [{"profile_id": C}, "x", {"profile_id": "no id"}],
        "version": 1,
    }
    listing = parse_listing("INFO a line\n" + json.dumps(document))
    assert [(one.id, one.verdict, one.gpus) for one in listing.profiles] == [
        (A, COMPATIBLE, 2),
        (B, INCOMPATIBLE, 1),
        (C, None, None),
    ]
    assert listing.profiles[0].lora is False and listing.profiles[1].description == "vllm-tp1"
    assert listing.unknown == ("new",)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "exec: list-model-profiles: not found\n",
        "The profile %s is compatible with system software.\n" % A,
        "Traceback (most recent call last):\n  File x\nRuntimeError: no GPU",
        '{"level": "INFO"}',
        "{" * 5000,
    ],
)
def test_what_is_no_listing_is_not_understood(text: str) -> None:
    listing = parse_listing(text)
    assert not listing.understood and listing.profiles == ()


# -- descriptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("tensorrt_llm-A100-fp16-tp2-latency", ("tensorrt_llm", "A100", "fp16", 2, None, False)),
        ("tensorrt_llm-h100-fp8-tp2-pp2-throughput-lora", ("tensorrt_llm", "h100", "fp8", 2, 2, True)),
        (
            "tensorrt_llm-rtx6000_blackwell_sv-nvfp4-tp1-pp1-latency",
            ("tensorrt_llm", "rtx6000_blackwell_sv", "nvfp4", 1, 1, False),
        ),
        ("sglang-h100-bf16-tp8-pp2", ("sglang", "h100", "bf16", 8, 2, False)),
        ("vllm-mxfp4-tp4-pp1", ("vllm", None, "mxfp4", 4, 1, False)),
        ("onnx-fp16-tp1-pp1", ("onnx", None, "fp16", 1, 1, None)),
        ("vllm", ("vllm", None, None, None, None, None)),
        ("something-else-entirely", (None, None, None, None, None, None)),
        ("vllm-int4_awq-tp0-pp1", ("vllm", None, "int4_awq", None, 1, None)),
        ("", (None, None, None, None, None, None)),
    ],
)
def test_descriptions(text: str, values: tuple[t.Any, ...]) -> None:
    found = parse_description(text)
    assert (found.backend, found.gpu, found.precision, found.tp, found.pp, found.lora) == values


# -- manifests ------------------------------------------------------------------------------------

V1 = """\
%s:
  model: meta/llama3-70b-instruct
  release: '1.0.0'
  tags:
    feat_lora: 'true'
    feat_lora_max_rank: '32'
    gpu: L40S
    gpu_device: 26b5:10de
    llm_engine: tensorrt_llm
    pp: '1'
    precision: fp16
    profile: throughput
    tp: '8'
  container_url: nvcr.io/nim/meta/llama3-70b-instruct:1.0.0
  workspace: !workspace
    components:
    - dst: trtllm_engine
      src:
        files:
          - !name 'LICENSE.txt'
        tags:
          tp: '99'
%s:
  model: meta/llama3-70b-instruct
  tags: {llm_engine: vllm, tp: "2", 'precision': 'fp16'}   # written on one line
""" % (A, B)

V2 = """\
# a comment
schema_version: 2.0.0
profile_selection_criteria: default
profiles:
  - id: %s
    tags:
      llm_engine: tensorrt_llm
      tp: "8"
      feat_lora: "false"
      note: |
        tp: 3
    workspace:
      files:
        engine: {uri: "ngc://org/team/model/engine.bin"}
  - id: "%s"
    tags:
      tp: '1'
""" % (A, B)


def test_manifest_of_1x() -> None:
    profiles = parse_manifest(V1)
    assert profiles is not None
    first, second = profiles
    assert (first.id, first.backend, first.gpu, first.gpu_device, first.gpus, first.lora) == (
        A,
        "tensorrt_llm",
        "L40S",
        "26b5",
        8,
        True,
    )
    assert first.tags["profile"] == "throughput" and first.verdict is None and first.description == ""
    # The one that is not marked, where others are.
    assert (second.backend, second.precision, second.gpus, second.lora) == ("vllm", "fp16", 2, False)


@pytest.mark.parametrize("text", [V2, V2.replace("\n  ", "\n"), V2.replace("\n", "\r\n")])
def test_manifest_of_2x_with_lists_at_any_column(text: str) -> None:
    profiles = parse_manifest(text)
    assert profiles is not None
    assert [(one.id, one.tp, one.lora) for one in profiles] == [(A, 8, False), (B, 1, None)]


def test_other_manifests() -> None:
    legacy = (
        "model_profile: MolMIM\nmanifest:\n  # Comment\n  - id: MolMIM\n    tags:\n      backend: pytorch\n"
        "    workspace: \n      components:\n      - dst: 'models/'\n"
    )
    assert [(one.id, one.backend) for one in parse_manifest(legacy) or ()] == [("MolMIM", "pytorch")]
    as_json = {"schema_version": "2.0.0", "profiles": [{"id": A, "tags": {"tp": 4, "feat_lora": True}}, 3]}
    assert [(one.id, one.tp, one.lora) for one in parse_manifest(json.dumps(as_json)) or ()] == [(A, 4, True)]
    assert parse_manifest("schema_version: 2.0.0\nprofiles: []\n") == ()
    assert parse_manifest("hello: world\n") is None
    assert parse_manifest("{") is None
    regular = "%s:\n  tags:\n    key: NVIDIA-L4_10.0.1_12\n    product_name_regex: ^NVIDIA-L4(?!0S).*\n" % A
    assert (parse_manifest(regular) or ())[0].tags["product_name_regex"] == "^NVIDIA-L4(?!0S).*"


@given(st.text(max_size=400), st.integers(0, 400))
def test_nothing_is_an_error(noise: str, position: int) -> None:
    for text in (
        noise,
        V1[:position] + noise + V1[position:],
        V2[:position] + noise,
        SECOND[:position] + noise + FIRST,
    ):
        parse_manifest(text)
        parse_listing(text)
        parse_description(text)


WORD = st.sampled_from(["vllm", "sglang", "tensorrt_llm"])
HEADINGS = {
    COMPATIBLE: "Compatible with system and runnable",
    LOW_MEMORY: "Compatible with system but low memory",
    INCOMPATIBLE: "Incompatible with system",
}


@st.composite
def listings(draw: t.Any) -> tuple[str, dict[str, tuple[t.Any, ...]]]:
    """A listing in a layout of its own, and what must be found in it."""
    ids = iter(range(1000))
    indent = " " * draw(st.sampled_from([0, 2, 4]))
    lines, expected = ["MODEL PROFILES"], {}
    for verdict, heading in HEADINGS.items():
        count = draw(st.integers(0, 3))
        lines.append(
            "- "
            + heading
            + draw(st.sampled_from([":", ""] if "low" in heading else [":"]))
            + ("" if count else " <None>")
        )
        with_lora = draw(st.booleans()) and count
        for number in range(count + (1 if with_lora else 0)):
            if number == count:
                lines.append(indent + "- With LoRA support:")
            identifier = an_id(next(ids))
            backend, tp, memory = draw(WORD), draw(st.integers(1, 8)), draw(st.none() | st.integers(1, 200))
            lora = number == count
            lines.append(
                "%s- %s (%s-bf16-tp%d-pp1%s)%s"
                % (
                    indent + ("  " if lora else ""),
                    identifier,
                    backend,
                    tp,
                    "-lora" if lora else "",
                    " [requires >=%d GB/gpu]" % memory if memory else "",
                )
            )
            expected[identifier] = (verdict, backend, tp, memory, lora)
            if draw(st.booleans()):
                lines.append("INFO 2026-01-01 00:00:00.000 x.py:1] " + identifier)
    return "\n".join(lines), expected


@given(listings())
def test_every_profile_of_a_listing_is_found(made: tuple[str, dict[str, tuple[t.Any, ...]]]) -> None:
    text, expected = made
    found = {
        one.id: (one.verdict, one.backend, one.tp, one.memory_gb, one.lora) for one in parse_listing(text).profiles
    }
    assert found == expected


# -- which one is meant ---------------------------------------------------------------------------


def refused(wanted: str, profiles: t.Any) -> FleetError:
    with pytest.raises(FleetError) as caught:
        match_profile(wanted, profiles)
    assert caught.value.reason == "no_such_profile"
    return caught.value


def test_match_in_a_listing() -> None:
    profiles = parse_listing(SECOND).profiles
    assert match_profile(A, profiles).profile == profiles[0]
    found = match_profile("vllm-fp8-tp1-pp1-34.0", profiles)
    assert found.certain and found.candidates == (profiles[0],)
    # Neither a part of an id nor a part of a description is a name for NIM.
    for wanted in (A[:20], "vllm-fp8-tp1-pp1", "vllm"):
        error = refused(wanted, profiles)
        assert "none of the 4 profiles" in error.message and "vllm-fp8-tp1-pp1-34.0 (%s…)" % A[:12] in error.message
        assert error.facts["candidates"] == [A, B, C, D]


def test_match_in_a_manifest_goes_by_tags() -> None:
    profiles = parse_manifest(V1)
    assert profiles is not None
    found = match_profile("tensorrt_llm-l40s-fp16-tp8-pp1-throughput-lora", profiles)
    assert found.certain and found.profile is not None
    assert (found.profile.id, found.profile.gpus, found.profile.lora) == (A, 8, True)
    assert (match_profile("vllm-fp16-tp2", profiles).profile or Profile("")).id == B
    refused("vllm-fp16-tp4", profiles)
    refused("tensorrt_llm-h100-fp16-tp8-pp1-throughput-lora", profiles)
    refused(C, profiles)
    # What is not understood contradicts nothing, and says nothing.
    free = match_profile("new-words", profiles)
    assert not free.certain and len(free.candidates) == 2
    assert free.profile is not None and (free.profile.tp, free.profile.precision) == (None, "fp16")


def test_without_profiles_the_name_alone_speaks() -> None:
    assert match_profile(A, None).profile is None
    found = match_profile("vllm-bf16-tp2-pp2-lora", None)
    assert not found.certain and found.profile is not None and (found.profile.gpus, found.profile.lora) == (4, True)
    assert match_profile("vllm-bf16-tp2-pp2", ()).candidates == ()
