# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The GPUs that the container was given."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess

from environment import env_number

PCI_IDS = {
    "H200": "2335",
    "H100 80GB HBM3": "2330",
    "L40S": "26b9",
    "L40": "26b5",
    "L4": "27b8",
    "A10": "2236",
    "4090": "2684",
}


class Gpu:
    def __init__(self, index: int, name: str, total: int, used: int) -> None:
        self.index, self.name, self.total, self.used = index, name, total, used

    @property
    def pci_id(self) -> str:
        return next((device for name, device in PCI_IDS.items() if self.name.endswith(name)), "26b9")

    @property
    def free_gb(self) -> float:
        return (self.total - self.used) / 1024

    @property
    def total_gb(self) -> float:
        return self.total / 1024


class Gpus:
    """The devices this container was given.  They stay open until the process ends: that is what "in use" means."""

    def __init__(self) -> None:
        self.directory = os.environ.get("STANDIN_DEVICE_DIRECTORY", "/dev")
        self.handles = []  # type: list[int]
        self.refused = None  # type: OSError | None
        nodes = sorted(glob.glob(os.path.join(self.directory, "nvidia[0-9]*")), key=lambda path: (len(path), path))
        for name in ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"]:
            path = os.path.join(self.directory, name)
            if os.path.exists(path):
                nodes.append(path)
        numbered = [node for node in nodes if os.path.basename(node)[6:].isdigit()]
        # Asked before the devices are opened: our own use is no use by others.
        described = self._describe(len(numbered))
        refused = set()
        for node in nodes:
            try:
                self.handles.append(os.open(node, os.O_RDWR | os.O_CLOEXEC))
            except OSError as exc:
                self.refused = exc
                refused.add(node)
        self.gpus = [gpu for node, gpu in zip(numbered, described) if node not in refused]

    def _describe(self, count: int) -> list[Gpu]:
        name = os.environ.get("STANDIN_GPU_NAME", "")
        memory = int(env_number("STANDIN_GPU_TOTAL_MIB", 46068))
        described = []  # type: list[Gpu]
        program = shutil.which("nvidia-smi")
        if count and program and not name:
            try:
                answer = subprocess.run(
                    [program, "--query-gpu=index,name,memory.total,memory.used", "--format=csv,noheader,nounits"],
                    capture_output=True,
                    text=True,
                    timeout=10,
                    check=True,
                ).stdout
                for line in answer.splitlines():
                    parts = [part.strip() for part in line.split(",")]
                    total = int(parts[2]) if parts[2].isdigit() else memory
                    used = int(parts[3]) if parts[3].isdigit() else 0
                    described.append(Gpu(len(described), parts[1], total, used))
            except (OSError, ValueError, IndexError, subprocess.SubprocessError):
                described = []
        # Which of the machine's GPUs are ours is known from the device nodes alone.
        if len(described) > count:
            described = described[:count]
        while len(described) < count:
            described.append(
                Gpu(len(described), name or "NVIDIA L40S", memory, int(env_number("STANDIN_GPU_USED_MIB", 0)))
            )
        return described
