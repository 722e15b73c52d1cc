# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Containers that have lost their GPUs while the driver is alive on the host.

Where systemd manages the cgroups and the devices were given behind the low-level runtime's back, ``systemctl
daemon-reload`` takes the permission away. What has the devices open goes on; every new CUDA context, also of the same
program, fails with "Unknown Error" (NVIDIA's troubleshooting page of the Container Toolkit). Only a new container has them
again.
"""

from __future__ import annotations

from ._host import Host

LOST_TEXT = "Failed to initialize NVML: Unknown Error"
REMEDY = (
    "start it anew (site does, or 'systemctl restart'), and use nim_gpu_injection: runtime with the toolkit's mode auto or "
    "jit-cdi, which does not lose them"
)


def last_daemon_reload(host: Host) -> float | None:
    """When systemd last loaded its units, in seconds since the epoch; None where it does not say (before version 250)."""
    shown = host.run(["systemctl", "show", "--property=UnitsLoadTimestampMonotonic", "--value"], timeout=20)
    value = shown.stdout.strip()
    if not value.isdigit() or value == "0":
        return None
    return host.time() - host.monotonic() + int(value) / 1e6


def lost_gpus(host: Host, container: str) -> str:
    """What NVML says inside a running container that has lost its GPUs; empty when it has them or cannot be asked."""
    seen = host.run(["docker", "exec", container, "nvidia-smi", "-L"], timeout=30)
    return LOST_TEXT if LOST_TEXT in seen.stdout + seen.stderr else ""
