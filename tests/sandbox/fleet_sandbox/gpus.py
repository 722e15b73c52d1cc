# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hardware description of a host: which GPUs it has and how its firmware behaves."""

from __future__ import annotations

import uuid
from typing import Any

from .common import SandboxError

# Product name -> brand and architecture as `nvidia-smi -q -x` prints them, PCI device id (pci-ids.ucw.cz, vendor 10de).
PRODUCTS = {
    "NVIDIA GB200": ("NVIDIA", "Blackwell", "0x2941"),
    "NVIDIA B200": ("NVIDIA", "Blackwell", "0x2901"),
    "NVIDIA H200": ("NVIDIA", "Hopper", "0x2335"),
    "NVIDIA H100 80GB HBM3": ("NVIDIA", "Hopper", "0x2330"),
    "NVIDIA H100 PCIe": ("NVIDIA", "Hopper", "0x2331"),
    "NVIDIA L40S": ("NVIDIA", "Ada Lovelace", "0x26b9"),
    "NVIDIA L4": ("NVIDIA", "Ada Lovelace", "0x27b8"),
    "NVIDIA A100-SXM4-80GB": ("NVIDIA", "Ampere", "0x20b2"),
    "NVIDIA A10": ("NVIDIA", "Ampere", "0x2236"),
    "Tesla T4": ("Tesla", "Turing", "0x1eb8"),
    "Tesla V100-SXM2-16GB": ("Tesla", "Volta", "0x1db1"),
    "NVIDIA GeForce RTX 5090": ("GeForce", "Blackwell", "0x2b85"),
    "NVIDIA GeForce RTX 4090": ("GeForce", "Ada Lovelace", "0x2684"),
    "NVIDIA GeForce RTX 3090": ("GeForce", "Ampere", "0x2204"),
    "NVIDIA GeForce GTX 1080 Ti": ("GeForce", "Pascal", "0x1b06"),
}
SWITCHES = {"secure_boot": False, "module_unload": True, "fabric": False}


def parse_gpus(host: str, specification: str) -> list[dict[str, Any]]:
    """GPUs of "NAME:MEMORY_MIB:COUNT[,NAME:MEMORY_MIB:COUNT...]"; "none" is a host without a GPU."""
    gpus: list[dict[str, Any]] = []
    if specification == "none":
        return gpus
    for part in specification.split(","):
        fields = part.strip().split(":")
        if len(fields) != 3 or not fields[1].isdigit() or not fields[2].isdigit():
            raise SandboxError("--gpus %r: expected NAME:MEMORY_MIB:COUNT, for example 'NVIDIA H200:143771:2'" % part)
        name, memory, count = fields[0], int(fields[1]), int(fields[2])
        if name not in PRODUCTS:
            raise SandboxError("--gpus %r: unknown product; known are: %s" % (part, ", ".join(sorted(PRODUCTS))))
        brand, architecture, device = PRODUCTS[name]
        for dummy in range(count):
            # The same host has the same UUIDs each time it is made.
            number = uuid.uuid5(uuid.NAMESPACE_DNS, "%s.gpu%d.fleet.example" % (host, len(gpus)))
            gpus.append(
                {
                    "name": name,
                    "brand": brand,
                    "architecture": architecture,
                    "device_id": device,
                    "memory_mib": memory,
                    "uuid": "GPU-%s" % number,
                }
            )
    return gpus


def parse_value(text: str) -> Any:
    """true/false, a whole number, or the text itself."""
    if text.lower() in ("true", "yes", "false", "no"):
        return text.lower() in ("true", "yes")
    return int(text) if text.isdigit() else text


def describe(host: str, specification: str, settings: list[str]) -> dict[str, Any]:
    """Content of /etc/sandbox/hardware.json for a host."""
    hardware: dict[str, Any] = {"gpus": parse_gpus(host, specification), **SWITCHES}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise SandboxError("--hardware %r: expected KEY=VALUE, for example secure_boot=true" % setting)
        hardware[key] = parse_value(value)
    return hardware
