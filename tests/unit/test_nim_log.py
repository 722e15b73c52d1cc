# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What lines of a log say about a start."""

from __future__ import annotations

import json

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_log import message_of, percent_of, phase_of


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        ("Detected 3 compatible profile(s).", "profile"),
        ("Valid profile: 0bc4… (tensorrt_llm-h100-fp8-tp1)", "profile"),
        ("Matched profile 1234 (vllm-bf16-tp1)", "profile"),
        ("Preparing model workspace. This step might download additional files to run the model.", "download"),
        ("Model workspace is now ready. It took 46.012 seconds", "engine"),
        ("Initializing an LLM engine (v0.6.3) with config: model='/x'", "engine"),
        ("Building TRT-LLM engine for the local weights", "build"),
        ("[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0", "build"),
        ("[TRT-LLM] [I] Building engine: layer 8/32", "build"),
        ("[TRT-LLM] [I] Total time of building all engines: 00:01:24", "build"),
        ("Loading model weights took 14.9888 GB", "loading"),
        ("Loading safetensors checkpoint shards:  25% Completed | 1/4 [00:01<00:04]", "loading"),
        ("Graph capturing finished in 30 secs, took 0.2 GiB", "graphs"),
        ("Capturing CUDA graph shapes: 100%", "graphs"),
        ("Serving endpoints:", "serving"),
        ("INFO:     Application startup complete.", "serving"),
        ("Uvicorn running on http://0.0.0.0:8000", "serving"),
        ("supports LoRA, but LoRA is disabled. Skipping profile.", None),
        ("Model: meta/llama-3.1-8b-instruct", None),
        ("Compilable to TRT-LLM using just-in-time compilation of HF models to TRTLLM engines:", None),
    ],
)
def test_phases(line: str, phase: str | None) -> None:
    assert phase_of(line) == phase
    assert phase_of(message_of(json.dumps({"level": "INFO", "message": line}))) == phase


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"level": "INFO", "message": "a", "exc_info": "None"}', "a"),
        ('{"level": "None", "message": "", "exc_info": "Traceback\\nBoom"}', "Traceback\nBoom"),
        ('{"broken', '{"broken'),
        ("{not json}", "{not json}"),
        ('{"other": 1}', '{"other": 1}'),
        ("  plain ", "plain"),
    ],
)
def test_json_lines(line: str, message: str) -> None:
    assert message_of(line) == message


@pytest.mark.parametrize(
    ("line", "percent"),
    [
        ("50% done", 50),
        ("10% … 12.5 %", 12),
        ("250%", None),
        ("v1.5", None),
        ("100%|###|", 100),
        ("Building engine: layer 8/32", 25),
        ("on 11/20/2026", None),
        ("a 3/4", None),
    ],
)
def test_percent(line: str, percent: int | None) -> None:
    assert percent_of(line) == percent
