# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The NVLink fabric of hosts with NVSwitches: CUDA fails with error 802 before a GPU has joined it."""

from __future__ import annotations

from ._gpu import parse_smi
from ._gpu_inventory import GpuInventory
from ._host import Host
from ._systemd import unit_properties
from ._untrusted import whole_number

#: Seconds within which Fabric Manager trains all links, and those between two looks.
FABRIC_TIMEOUT = 120.0
_POLL = 2.0
_UNIT = "nvidia-fabricmanager.service"


def fabric_states(host: Host) -> tuple[str, ...] | None:
    """What the GPUs say of the fabric, each answer once.

    Returns:
        Empty where they have no such state, as before Hopper, with NVSwitches or without; None where nvidia-smi tells of
        no GPU.
    """
    try:
        gpus = parse_smi(host.run(["nvidia-smi", "-q", "-x"], timeout=90).stdout)[2]
    except ValueError:
        return None
    return tuple(sorted({gpu.fabric_state for gpu in gpus if gpu.fabric_state})) if gpus else None


def joining(host: Host, inventory: GpuInventory) -> str:
    """What GPUs say that are just joining the fabric, as after a boot; empty where nothing is worth waiting for.

    A fabric that is not there although Fabric Manager has run for a while is a matter of the GPUs' condition.
    """
    if inventory.driver is None or not inventory.needs_fabric_manager:
        return ""
    manager = unit_properties(host, _UNIT, "ActiveState", "ActiveEnterTimestampMonotonic")
    state = manager.get("ActiveState")
    # Without one of its own the host has been at it since it was booted.
    since = whole_number(manager.get("ActiveEnterTimestampMonotonic")) / 1e6 if state == "active" else 0.0
    if state != "activating" and host.monotonic() - since >= FABRIC_TIMEOUT:
        return ""
    return ", ".join(state for state in fabric_states(host) or () if state in ("Not Started", "In Progress"))


def wait_for_fabric(host: Host) -> str:
    """Wait until every GPU has joined; what they say at the end where they have not, empty where they have."""
    deadline = host.monotonic() + FABRIC_TIMEOUT
    while True:
        states = fabric_states(host)
        if states in ((), ("Completed",)):
            return ""
        if host.monotonic() >= deadline:
            return ", ".join(state for state in states or () if state != "Completed") or "not told"
        host.sleep(_POLL)
