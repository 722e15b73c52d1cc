# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What really goes wrong while an engine starts, with the words of the real one."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import threading

from environment import FatalError, env_flag, env_number
from gpus import Gpu


def meet(gpus: list[Gpu], weights: str, stop: threading.Event) -> None:
    """FatalError with the first thing that is wrong."""
    if _fabric_waits(gpus):
        raise FatalError(
            1, "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"
        )
    share = env_number("NIM_KVCACHE_PERCENT", 0.9)
    for gpu in gpus:
        if gpu.free_gb < share * gpu.total_gb and not env_flag("NIM_RELAX_MEM_CONSTRAINTS"):
            raise FatalError(
                1,
                "ValueError: Free memory on device (%.2f/%.2f GiB) on startup is less than desired GPU memory"
                " utilization (%s, %.2f GiB)" % (gpu.free_gb, gpu.total_gb, share, share * gpu.total_gb),
            )
    _check_rope_scaling(weights)
    try:
        kept = [open(os.devnull) for _number in range(int(env_number("STANDIN_OPEN_FILES", 0)))]  # noqa: SIM115
        del kept
    except OSError as exc:
        raise FatalError(1, "OSError: [Errno %d] %s: '%s'" % (exc.errno or 0, exc.strerror, exc.filename)) from exc
    _fill_shared_memory(int(env_number("STANDIN_SHM_MIB", 0)))
    _allocate(int(env_number("STANDIN_ALLOCATE_MIB", 0)), stop)


def _fabric_waits(gpus: list[Gpu]) -> bool:
    program = shutil.which("nvidia-smi")
    if not gpus or not program:
        return False
    try:
        shown = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    return "In Progress" in shown


def _check_rope_scaling(weights: str) -> None:
    try:
        with open(os.path.join(weights, "config.json")) as handle:
            scaling = json.load(handle).get("rope_scaling")
    except (OSError, ValueError, AttributeError):
        return
    if scaling is None:
        return
    if not isinstance(scaling, dict) or (len(scaling) != 2 and "rope_type" not in scaling):
        raise FatalError(
            1,
            "ValueError: `rope_scaling` must be a dictionary with two fields, `type` and `factor`, got %s" % scaling,
        )
    kind = str(scaling.get("rope_type", scaling.get("type")))
    if kind not in ("default", "linear", "dynamic", "yarn", "su", "longrope", "llama3"):
        raise FatalError(1, "ValueError: Unknown RoPE scaling type %s" % kind)


def _fill_shared_memory(mebibytes: int) -> None:
    """As NCCL does; STANDIN_SHM_MAP: through a mapping, where the kernel answers with SIGBUS."""
    if not mebibytes:
        return
    path = "/dev/shm/nccl-%d" % os.getpid()
    if env_flag("STANDIN_SHM_MAP"):
        with open(path, "w+b") as handle:
            handle.truncate(mebibytes << 20)
            with mmap.mmap(handle.fileno(), 0) as area:
                for position in range(0, mebibytes << 20, 4096):
                    area[position] = 1
    try:
        with open(path, "wb") as handle:
            for _number in range(mebibytes):
                handle.write(bytes(1 << 20))
    except OSError as exc:
        raise FatalError(1, "OSError: [Errno %d] %s: '%s'" % (exc.errno or 0, exc.strerror, path)) from exc
    finally:
        os.unlink(path)


def _allocate(mebibytes: int, stop: threading.Event) -> None:
    """Take main memory piece by piece, as weights that are read; who has less kills it."""
    held = []
    for _number in range(mebibytes):
        held.append(bytearray(os.urandom(4096)) * 256)
        if stop.wait(0.01):
            return
