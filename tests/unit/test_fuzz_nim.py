# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Logs of any content, lists of profiles, files of our own that somebody broke, options that nobody meant."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import time
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nim_unit, _nim_unit_docker
from ansible_collections.gpu_fleet.nim.plugins.module_utils._background import Jobs
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_clients import RECORD, read_record
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._failure_causes import DOCKER, KERNEL, SignatureBook
from ansible_collections.gpu_fleet.nim.plugins.module_utils._failure_signatures import SIGNATURES
from ansible_collections.gpu_fleet.nim.plugins.module_utils._health_target import HealthTarget, parse_targets
from ansible_collections.gpu_fleet.nim.plugins.module_utils._kernel_log import kernel_events, read_kernel_log
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_configuration import Secrets
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_endpoints import HttpAnswer, error_text
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_gpus import gpus_of_services
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_log import (
    journal_lines,
    message_of,
    percent_of,
    phase_of,
    read_log,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import parse_models
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_process_state import read_word, wanted_spec
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_profile_listing import parse_listing, plain
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_profiles import (
    COMPATIBLE,
    Profile,
    match_profile,
    parse_manifest,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_watch import Watch
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_reload_planner import (
    REBOOT_MARKER,
    read_marker,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import Redactor, scrub
from fake_host import FakeHost
from fuzzing import broken_json, damaged, encodable, json_text, mutated, only_told, texts, values
from hypothesis import example, given
from hypothesis import strategies as st

LINES = [
    '{"level": "ERROR", "time": "2026", "message": "CUDA out of memory", "exc_info": "Traceback\\n  File"}',
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    "Loading safetensors checkpoint shards:  50% Completed | 2/4",
    "INFO 2026-01-01 Building TensorRT-LLM engine, engine build 35% done",
    "Downloading file: model-1.safetensors 3/8",
    "2026-01-01T00:00:00.000000000Z INFO: Uvicorn running on http://0.0.0.0:8000",
    "\x1b[31merror\x1b[0m: No space left on device",
]
#: What the signatures look for, piece by piece: what makes a pattern begin, and never end.
PIECES = sorted({piece for known in SIGNATURES for piece in re.findall(r"[A-Za-z][A-Za-z_ ]{3,}", known.pattern)})
BOOK = SignatureBook()
A, B = "a" * 64, "b" * 64
LISTING = """\
SYSTEM INFO
- Free GPUs:
  -  [2335:10de] (0) NVIDIA H200 [current utilization: 0%%]
MODEL PROFILES
- Compatible with system and runnable:
  - %s (tensorrt_llm-h200-fp8-tp1-pp1-throughput) [requires >=18 GB/gpu]
  - With LoRA support:
    - %s (vllm-bf16-tp2-lora)
- Incompatible with system:
  - %s (vllm-bf16-tp8)
""" % (A, B, "c" * 64)
MANIFEST = {
    "schema_version": "2.0.0",
    "profiles": [
        {"id": A, "tags": {"tp": "2", "pp": "1", "gpu": "H200", "precision": "fp8", "feat_lora": "false"}},
        {"id": B, "tags": {"tp": "1", "llm_engine": "vllm"}},
    ],
}

lines = st.one_of(
    st.sampled_from(LINES).flatmap(damaged),
    texts,
    st.sampled_from(LINES[:1]).map(json.loads).flatmap(mutated).map(json_text),
)


@given(st.lists(lines, max_size=12))
def test_log_lines(given_lines: list[str]) -> None:
    with only_told():
        messages = [message_of(line) for line in given_lines]
        for message in messages:
            phase_of(message)
            percent = percent_of(message)
            assert percent is None or 0 <= percent <= 100
            named = {int(number) for number in re.findall(r"([0-9]{1,9})\s*%", message)}
            shares = {(int(a), int(b)) for a, b in re.findall(r"(?=\b([0-9]{1,9}) ?/ ?([0-9]{1,9}))", message)}
            assert percent in {None, *named, *(100 * done // total for done, total in shares if total)}, message
        text = "\n".join(messages)
        for deciding in (False, True):
            for source in (DOCKER, KERNEL, "container"):
                found = BOOK.find(text, source=source, deciding=deciding)
                if found is not None:
                    # The text is there, and the line is one of the log.
                    assert re.search(found.signature.pattern, text)
                    assert found.line in (line.strip() for line in text.split("\n"))
                    assert not found.signature.harmless
        watch = Watch.load(HealthTarget("a"), None, 0.0)
        watch.take_lines(given_lines, 1.0, Redactor(["secret-secret"]))
        assert sum(map(len, watch.window)) <= 1_000_000
        watch.line(2.0)


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3), st.sampled_from(("", " ", "\n", ".", "x", ": ")))
def test_no_pattern_takes_for_ever(pieces: list[str], between: str) -> None:
    """A log made of the beginnings of what is looked for: 200 lines of the length that is kept."""
    line = (between.join(pieces) + between) * (500 // len(between.join(pieces) + between) + 1)
    text = "\n".join([line[:500]] * 200)
    began = time.process_time()
    BOOK.find(text)
    BOOK.find(text, deciding=True)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "unit",
    [
        "build ",
        "Loading ",
        "capture cuda graph",
        "1/2 ",
        "99% ",
        "[TRT] ",
        "{",
        '{"message": "',
        "\\",
        "\x00",
        "é",
        "a=",
        "nvapi-",
    ],
)
def test_very_long_lines(unit: str) -> None:
    line = unit * (2_000_000 // len(unit))
    began = time.process_time()
    message = message_of(line)
    assert len(message) <= 10_010
    phase_of(message)
    percent_of(message)
    scrub(message, ["secret-secret"])
    BOOK.find(message)
    message_of('{"message": "%s"}' % line.replace("\\", "").replace('"', ""))
    assert time.process_time() - began < 3


@given(
    st.lists(lines, max_size=6), broken_json({"MESSAGE": "x", "__REALTIME_TIMESTAMP": "1", "CONTAINER_ID_FULL": "y"})
)
def test_logs_as_programs_print_them(given_lines: list[str], journal: str) -> None:
    stamped = "\n".join("2026-01-01T00:00:0%dZ %s" % (number % 10, line) for number, line in enumerate(given_lines))
    host = FakeHost(commands={"docker logs *": stamped, "journalctl *": journal, "dmesg": stamped})
    with only_told():
        found, cursor = read_log(host, "nim-a", "")
        assert isinstance(cursor, str)
        assert len(found) <= len(stamped.splitlines())
        journal_lines(host, "CONTAINER_NAME", "nim-a", of_last=("CONTAINER_ID_FULL", 1))
        for event in kernel_events(read_kernel_log(host) or ()):
            assert event.kind


@given(st.integers(100, 599), values | texts)
def test_answers_of_a_service(status: int, body: t.Any) -> None:
    text = body if isinstance(body, str) else json_text(body)
    answer = HttpAnswer(status, text)
    assert isinstance(answer.json(), dict)
    assert "\n" not in error_text(answer)


# -- profiles ---------------------------------------------------------------------------------------------


def _is_told(profile: Profile, text: str) -> None:
    """Everything that is said of a profile stands in the text that it was read from."""
    lowered = text.lower()
    assert profile.id in text
    assert profile.gpus is None or profile.gpus > 0
    for degree in (profile.tp, profile.pp):
        assert degree is None or str(degree) in {number.lstrip("0") for number in re.findall(r"[0-9]+", text)}
    for word in (profile.backend, profile.precision, profile.gpu, profile.gpu_device, profile.description):
        assert not word or word.lower() in lowered
    for memory in (profile.memory_gb, profile.reduced_memory_gb):
        units = {"m": 1e-3, "g": 1.0, "t": 1e3}
        sizes = re.findall(r"(?=(?<![0-9])([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*([gmt])i?b)", lowered)
        sizes += [(number, "g") for number in re.findall(r"-([0-9]{1,4}\.[0-9]{1,2})", text)]
        assert memory in {None, *(float(number) * units[unit] for number, unit in sizes)}
    length = profile.reduced_model_length
    assert length is None or ("--max-model-len" in text and str(length) in text)
    assert not profile.lora or "lora" in lowered


@given(damaged(LISTING, 6))
def test_listings(text: str) -> None:
    """What a damaged listing is taken to say stands in it; what no longer stands there is unknown."""
    with only_told():
        listing = parse_listing(text)
    for wanted in (A, "vllm-bf16-tp2"):
        with only_told():
            match_profile(wanted, listing.profiles)
    text = plain(text)
    for profile in listing.profiles:
        _is_told(profile, text)
        assert profile.verdict is None or "ompatible" in text or "ompilable" in text
        assert str(profile)
    for gpu in listing.gpus:
        assert gpu.name in text
        assert gpu.device in text.lower()
        assert gpu.utilization is None or str(gpu.utilization) in text


@given(
    st.sampled_from(("vllm", "sglang")),
    st.sampled_from(("bf16", "fp8", "nvfp4")),
    st.integers(1, 999),
    st.integers(1, 999),
    st.booleans(),
    st.none() | st.integers(1, 9999),
    texts,
)
def test_values_of_a_listing(
    backend: str, precision: str, tp: int, pp: int, lora: bool, memory: int | None, words: str
) -> None:
    """Exactly what stands there; and of a line with other words in the place of the memory, the memory is unknown."""
    description = "%s-%s-tp%d-pp%d%s" % (backend, precision, tp, pp, "-feat_lora" if lora else "")
    entry = "MODEL PROFILES\n- Compatible with system and runnable:\n  - %s (%s%s)%s\n"
    expected = (backend, precision, tp, pp, lora, COMPATIBLE)

    def read(at_end: str, behind: str) -> tuple[t.Any, ...]:
        [one] = parse_listing(entry % (A, description, at_end, behind)).profiles
        return (one.backend, one.precision, one.tp, one.pp, one.lora, one.verdict), one.memory_gb

    with only_told():
        if memory is not None:
            assert read("", " [requires >=%d GB/gpu]" % memory) == (expected, memory)
            assert read("-%d.0" % memory, "") == (expected, memory)
        # In one line and inside its brackets, whatever it is.
        other = re.sub(r"[^\w .,%-]", "", words)
        if not re.match(r"\s*[0-9]", other):
            assert read("", " [requires >=%s GB/gpu]" % other) == (expected, None)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "tp": st.integers(-5, 2000).map(str) | texts,
            "pp": st.integers(-5, 2000).map(str) | texts,
            "llm_engine": st.just("vllm") | texts,
            "precision": st.just("fp8") | texts,
            "gpu": st.just("H200") | texts,
            "feat_lora": st.sampled_from(("true", "false")) | texts,
        },
    )
)
def test_values_of_a_manifest(tags: dict[str, str]) -> None:
    """A tag is exactly what stands there; a number that is none, or that nothing can have, is unknown."""
    with only_told():
        [profile] = parse_manifest(json_text({"schema_version": "2.0.0", "profiles": [{"id": A, "tags": tags}]})) or ()
    for name in ("tp", "pp"):
        said = tags.get(name, "").strip()
        assert getattr(profile, name) == (
            int(said) if re.fullmatch("0*[1-9][0-9]{0,2}", said) and len(said) < 4 else None
        )
    assert profile.gpu == (tags.get("gpu", "").strip() or None)
    assert profile.backend == (tags.get("llm_engine", "").strip().lower() or None)
    assert profile.precision == (tags.get("precision", "").strip().lower() or None)
    if tags.get("feat_lora") in ("true", "false"):
        assert profile.lora is (tags["feat_lora"] == "true")
    assert profile.memory_gb is None


@given(
    broken_json(MANIFEST)
    | damaged("schema_version: 2.0.0\nprofiles:\n- id: %s\n  tags: {tp: '2'}\n- id: %s\n" % (A, B), 5)
)
def test_manifests(text: str) -> None:
    with only_told():
        profiles = parse_manifest(text)
    with contextlib.suppress(ValueError, RecursionError):
        text += json.dumps(json.loads(text), ensure_ascii=False)
    for profile in profiles or ():
        _is_told(profile, text)
    with only_told():
        match_profile(A[:60], profiles)


def test_a_deep_manifest() -> None:
    assert parse_manifest("[" * 100_000) is None
    assert parse_manifest("a:\n" + "".join(" " * depth + "b:\n" for depth in range(1, 3000))) is None


# -- files of our own ------------------------------------------------------------------------------------

WORD = {"phase": "starting", "since": 5, "failures": 1, "spec": "x", "detail": "d", "unsteady": 0}
CONFIGURATION: dict[str, t.Any] = {
    "name": "a",
    "spec": "x",
    "create": ["--label=a", "image"],
    "gpus": ["GPU-1"],
    "stop_timeout": 60,
    "docker_timeout": 100,
    "download": {"create": ["x"], "key": "k"},
    "ready_url": "http://127.0.0.1:8000/v1/health/ready",
    "secret_environment": ["A"],
}


@given(broken_json(WORD), broken_json(CONFIGURATION))
def test_words_and_configurations(word: str, configuration: str) -> None:
    host = FakeHost({"/run/nim/a.json": encodable(word), "/etc/nim/a.json": encodable(configuration)})
    with only_told():
        found = read_word(host, "a")
        assert isinstance(found.failures, int)
        assert isinstance(found.since, float)
        assert isinstance(wanted_spec(host, "a"), str)
        assert set(gpus_of_services(host, ["a"])) == {"a"}


@given(broken_json(CONFIGURATION), broken_json(WORD))
@example(json.dumps(CONFIGURATION), json.dumps({**WORD, "failures": -1}))
def test_the_wrapper_of_the_units(configuration: str, word: str) -> None:
    """What is broken ends the wrapper with a sentence, and never starts something else."""
    (_FOLDER / "a.json").write_bytes(encodable(configuration))
    unit = _nim_unit.Unit("a")
    unit.configuration = str(_FOLDER / "a.json")
    unit.runtime_file = str(_FOLDER / "run.json")
    (_FOLDER / "run.json").write_bytes(encodable(word))
    try:
        unit.load()
    except _nim_unit_docker.BadConfigurationError as error:
        assert str(error)
        return
    assert isinstance(unit.create_arguments, list)
    assert unit.failures() >= 0
    unit.note("starting", 1)
    assert json.loads((_FOLDER / "run.json").read_text())["phase"] == "starting"


_FOLDER = pathlib.Path()


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _FOLDER  # noqa: PLW0603  # hypothesis makes hundreds of examples of one test
    _FOLDER = tmp_path_factory.mktemp("fuzz")


@given(
    broken_json(
        {"state": "done", "progress": {}, "result": {}, "error": {"reason": "x", "message": "y."}, "started": 1}
    )
)
def test_jobs(text: str) -> None:
    (_FOLDER / "job.json").write_bytes(encodable(text))
    with only_told():
        status = Jobs(str(_FOLDER)).read("job")
        if status is None:
            return
        assert isinstance(status.progress, dict)
        assert isinstance(status.result, dict)
        assert status.failure("Pulling x").message


@given(
    broken_json(
        {"units": ["nvidia-persistenced.service"], "target": "580.95.05", "boot_id": "x", "reason": "x", "time": 5}
    )
)
def test_records_of_the_driver(text: str) -> None:
    host = FakeHost({RECORD: encodable(text), REBOOT_MARKER: encodable(text)})
    with only_told():
        assert all(isinstance(unit, str) for unit in read_record(host))
    with only_told():
        assert isinstance(read_marker(host), dict)


@given(damaged(Secrets("0" * 64, {"A": "b", "C": "d=e"}).render(), 4))
def test_files_of_secrets(text: str) -> None:
    found = Secrets.parse(text)
    if found is not None:
        assert Secrets.parse(found.render()) == found
        assert isinstance(str(found), str)


@given(values)
def test_what_a_watch_was_handed(kept: t.Any) -> None:
    """From the last call of the module, through the controller."""
    watch = Watch.load(HealthTarget("a"), None, 5.0, BOOK)
    assert Watch.load(HealthTarget("a"), json.loads(json.dumps(watch.dump())), 5.0, BOOK) == watch
    if isinstance(kept, dict):
        # Names of options that no watch has are somebody else's.
        assert Watch.load(HealthTarget("a"), {"x" + key: value for key, value in kept.items()}, 5.0, BOOK) == watch


# -- options ----------------------------------------------------------------------------------------------

MODEL = {
    "name": "llama",
    "image": "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4",
    "gpus": [0, 1],
    "port": 8000,
    "bind_address": "0.0.0.0",
    "shm_size": "16GB",
    "ulimits": {"nofile": 65536, "memlock": -1},
    "environment": {"NIM_LOG_LEVEL": "INFO"},
    "secret_environment": {"HF_TOKEN": "hf_x"},
    "profile": A,
    "served_model_name": "a,b",
    "weights_directory": "/srv/w",
    "max_model_length": 4096,
    "network_mode": "bridge",
    "user": "1000:1000",
    "read_only": True,
    "tmpfs": ["/tmp"],
    "engine_arguments": ["--enable-prefix-caching"],
    "start_timeout": 1800,
    "stop_timeout": 60,
    "completion": "auto",
    "state": "started",
}


@given(mutated([MODEL], 3))
def test_models(models: t.Any) -> None:
    with only_told():
        try:
            parsed = parse_models(models)
        except FleetError as error:
            assert error.reason == "invalid_option"
            assert "hf_x" not in error.message
            raise
        assert all(1 <= model.port <= 65535 for model in parsed)


@given(mutated([{"name": "a", "port": 8000, "start_timeout": 5, "completion": "auto", "environment": {}}], 3))
def test_targets(models: t.Any) -> None:
    if isinstance(models, list):
        with only_told():
            parse_targets(models)
