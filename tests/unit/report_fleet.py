# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A fleet in every state that the report can show."""

from __future__ import annotations

import typing as t

Json = t.Dict[str, t.Any]
DIGEST = "sha256:" + "0123456789abcdef" * 4


def gpus(count: int, name: str, total: int, used: t.Sequence[int]) -> list[Json]:
    return [
        {
            "index": index,
            "uuid": "GPU-%d" % index,
            "name": name,
            "memory_total_mib": total,
            "memory_used_mib": used[index % len(used)],
        }
        for index in range(count)
    ]


def nim(name: str, image: str, on: t.Sequence[int], port: int, state: str = "ready", **more: t.Any) -> Json:
    return {
        "name": name,
        "image": "nvcr.io/nim/" + image,
        "digest": DIGEST,
        "gpus": ["GPU-%d" % index for index in on],
        "port": port,
        "state": state,
        "ready": state == "ready",
        "seconds_to_ready": 94.2 if state == "ready" else None,
        "url": "http://127.0.0.1:%d" % port,
        "message": None,
        **more,
    }


def facts(cards: list[Json], services: list[Json], **more: t.Any) -> Json:
    return {
        "os": {"name": "Ubuntu 24.04.3 LTS"},
        "kernel": "6.8.0-87-generic",
        "driver": {"loaded": "580.95.05", "flavour": "open", "on_disk": "580.95.05"},
        "cuda_version": "13.0",
        "docker": {"installed": True, "version": "29.4.3"},
        "container_toolkit": {"version": "1.20.0"},
        "gpus": cards,
        "nim": services,
        **more,
    }


def plan(*changes: Json, **more: t.Any) -> Json:
    return {"gpu": True, "changes": list(changes), "errors": [], "notes": [], **more}


def change(resource: str, what: str, before: t.Any, to: t.Any, why: str, disruption: str, **more: t.Any) -> Json:
    return {
        "resource": resource,
        "what": what,
        "from": before,
        "to": to,
        "why": why,
        "disruption": disruption,
        "blocked": None,
        "after": None,
        **more,
    }


H200, L40S = "NVIDIA H200", "NVIDIA L40S"
FLEET: list[tuple[str, str, Json | None, Json | None]] = [
    (
        "gpu07",
        "10.20.0.17",
        {"unreachable": True, "msg": "Failed to connect to the host via ssh: connect to host 10.20.0.17: No route"},
        None,
    ),
    (
        "gpu03",
        "10.20.0.13",
        plan(
            change(
                "nvidia_driver",
                "driver packages",
                "570.172.08",
                "580.95.05",
                "branch 580 is wanted",
                "unload_driver",
                blocked="GPU 0 is held by pid 812 (python3 train.py) of unit train.service: stop it first",
            ),
            change(
                "nim_service",
                "nim-mixtral.service",
                "started",
                "restarted",
                "the container runs something else",
                "restart_nim",
            ),
            change(
                "docker_daemon",
                "live-restore of the running daemon",
                False,
                True,
                "the daemon does not run with it",
                "reload",
                blocked="1 container would stop",
            ),
            errors=[
                {
                    "resource": "docker_daemon",
                    "reason": "daemon_json_invalid",
                    "message": "Reading /etc/docker/daemon.json failed: it is no JSON (line 4); repair it.",
                    "after": None,
                }
            ],
        ),
        facts(
            gpus(2, H200, 143771, [64, 131072]),
            [
                nim("mixtral", "mistralai/mixtral-8x7b-instruct-v0.1:1.8.4", [1], 8000, "failing (2 failed starts)"),
                nim(
                    "embed",
                    "nvidia/nv-embedqa-e5-v5:1.10.0",
                    [0],
                    8001,
                    "failed",
                    message="NIM embed did not start: its container ended with exit code 137; give it more memory.",
                ),
            ],
            driver={"loaded": "570.172.08", "flavour": "proprietary", "on_disk": "570.172.08"},
            cuda_version="12.8",
        ),
    ),
    (
        "gpu05",
        "10.20.0.15",
        plan(
            change("nim_health", "nim-llama-70b.service", "loading the model", "ready", "the run waits for it", "none")
        ),
        facts(
            gpus(8, H200, 143771, [98304, 98304, 98304, 98304, 0, 0, 0, 0]),
            [nim("llama-70b", "meta/llama-3.1-70b-instruct:1.8.4", [0, 1, 2, 3], 8000, "loading the model")],
        ),
    ),
    (
        "gpu01",
        "10.20.0.11",
        plan(),
        facts(
            gpus(2, H200, 143771, [121856, 117760]),
            [
                nim("llama", "meta/llama-3.1-8b-instruct:1.8.4", [0], 8000),
                nim("mistral", "mistralai/mistral-7b-instruct-v0.3:1.12.2", [1], 8001),
            ],
        ),
    ),
    (
        "gpu02",
        "10.20.0.12",
        plan(notes=["nim_image: pull is newer, but a plan asks no registry."]),
        facts(
            gpus(4, L40S, 46068, [40960, 38912, 0, 41984]),
            [
                nim("nemotron", "nvidia/nemotron-3-nano:2.0.12", [0, 1], 8000, seconds_to_ready=212),
                nim("rerank", "nvidia/nv-rerankqa-mistral-4b-v3:1.3.1", [3], 8002, seconds_to_ready=41),
            ],
            os={"name": "Debian GNU/Linux 13 (trixie)"},
            kernel="6.12.48+deb13-amd64",
        ),
    ),
    (
        "gpu08",
        "fd00::8",
        plan(),
        facts(gpus(1, L40S, 46068, [20480]), [nim("vision", "x/y:1", [0], 8000, url="https://x")]),
    ),
    (
        "gpu06",
        "gpu06",
        plan(),
        facts([], [], driver={"loaded": "", "on_disk": ""}, cuda_version="", pci_gpus=[{"architecture": "Hopper"}]),
    ),
    (
        "login01",
        "10.20.0.5",
        {"gpu": False, "changes": [], "errors": [], "notes": []},
        facts([], [], driver={}, docker={}, container_toolkit={}, cuda_version="", pci_gpus=[]),
    ),
]
