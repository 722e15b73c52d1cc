# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Who uses the NVIDIA driver: its own services, which may be stopped for a while, and everybody else."""

from __future__ import annotations

import re
import typing as t

from ._errors import FleetError
from ._gpu_holders import Holder, driver_holders
from ._host import Host
from ._systemd import unit_properties
from ._untrusted import json_object, strings

T = t.TypeVar("T")

#: The driver's own clients in the order in which they are stopped; they start again in the reverse order.
CLIENT_UNITS = (
    # First: it watches modules.dep and would load the new module in the middle of everything.
    "nvidia-cdi-refresh.path",
    "nvidia-cdi-refresh.service",
    "nvidia-dcgm-exporter.service",
    "dcgm-exporter.service",
    "nvsm.service",
    "nvidia-dcgm.service",
    "dcgm.service",
    "nvidia-imex.service",
    "nvidia-fabricmanager.service",
    "nvidia-gridd.service",
    "nvidia-topologyd.service",
    "nvidia-persistenced.service",
)
#: Those that run all the time once the module is loaded; the others run when their owner wants.
DAEMONS = ("nvidia-persistenced.service", "nvidia-fabricmanager.service")
#: Kernel modules in the order in which they can be unloaded.
UNLOAD_ORDER = (
    "nvidia_drm",
    "nvidia_modeset",
    "nvidia_uvm",
    "nvidia_peermem",
    # Its predecessor, from Mellanox.
    "nv_peer_mem",
    "nvidia_fs",
    "nvidia_vgpu_vfio",
    "gdrdrv",
    "nvidia",
)
#: Units that were stopped and must be started again. In /run: after a reboot enabled units start by themselves.
RECORD = "/run/gpu_fleet/driver-clients.json"


def is_client(holder: Holder) -> bool:
    """Whether a holder is one of the driver's own services, which may be stopped for a while."""
    return holder.unit in CLIENT_UNITS and not holder.container_id


def foreign_holders(holders: t.Iterable[Holder]) -> tuple[Holder, ...]:
    """Processes that use a GPU and that nothing here may stop."""
    return tuple(holder for holder in holders if not is_client(holder))


#: Seconds between two looks at who uses a GPU, and how many looks there are.
_LOOKS, _PAUSE = 3, 2.0


def lasting(host: Host, look: t.Callable[[], t.Dict[str, T]]) -> dict[str, T]:
    """Of those whom a look finds, by name, those that stay: monitoring runs nvidia-smi for a moment now and then."""
    found = look()
    for _again in range(_LOOKS - 1):
        if not found:
            break
        host.sleep(_PAUSE)
        still = look()
        found = {name: still[name] for name in found if name in still}
    return found


def lasting_foreign_holders(host: Host) -> tuple[Holder, ...]:
    """Those of :func:`foreign_holders` that stay."""
    return tuple(
        lasting(host, lambda: {str(holder.pid): holder for holder in foreign_holders(driver_holders(host))}).values()
    )


def in_use_message(holders: t.Sequence[Holder], doing: str) -> str:
    """One sentence that names everybody who uses the GPUs."""
    shown = ["%s" % holder.describe() for holder in holders[:8]]
    if len(holders) > 8:
        shown.append("%d more" % (len(holders) - 8))
    # A docker stop of a container that a unit keeps up would be undone.
    own = {re.sub(r"-download\Z", "", holder.container) for holder in holders if holder.container.startswith("nim-")}
    # Only they can be taken out of the load balancer and started again.
    roll = all(holder.container.startswith("nim-") for holder in holders)
    return "%s would take the GPU away from %s. Nothing was changed; stop %s%s and run again%s." % (
        doing,
        "; ".join(shown),
        "it" if len(holders) == 1 else "them",
        " (systemctl stop %s)" % " ".join(sorted(own)) if own else "",
        ", or use playbook gpu_fleet.nim.upgrade_drivers, which does so host by host" if roll else "",
    )


def in_use_error(holders: t.Sequence[Holder], doing: str) -> FleetError:
    return FleetError("gpu_in_use", in_use_message(holders, doing), holders=[holder.as_dict() for holder in holders])


def read_record(host: Host) -> tuple[str, ...]:
    """Units that a reload stopped and has not started again."""
    return tuple(unit for unit in strings(json_object(host.read_text(RECORD)).get("units")) if unit in CLIENT_UNITS)


def idle_daemons(host: Host) -> list[str]:
    """Daemons that are enabled and do not run, in the order in which they start."""
    idle = []
    for unit in DAEMONS:
        values = unit_properties(host, unit, "ActiveState", "UnitFileState")
        if values.get("UnitFileState") == "enabled" and values.get("ActiveState") not in ("active", "activating"):
            idle.append(unit)
    return idle
