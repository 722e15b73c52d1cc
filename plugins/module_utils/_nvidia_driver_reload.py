# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Swap the loaded NVIDIA kernel module for the one on disk without a reboot, or say exactly why that cannot be done."""

from __future__ import annotations

import json

from ._driver_clients import UNLOAD_ORDER, foreign_holders, in_use_error
from ._driver_swap import (
    LOAD_TIMEOUT,
    load_failure,
    start_clients,
    start_clients_that_can,
    stop_clients,
    unload_modules,
)
from ._errors import FleetError
from ._gpu_holders import driver_holders
from ._gpu_inventory import observe_gpus
from ._host import Host
from ._loaded_driver import observe_loaded_driver
from ._nvidia_driver_reload_planner import REBOOT_MARKER, ReloadPlanner, ReloadState, observe_reload
from ._nvlink_fabric import FABRIC_TIMEOUT, wait_for_fabric
from ._resource import Change, Resource


class DriverReload(ReloadPlanner, Resource[ReloadState]):
    """Loaded module = module on disk, with the services of the driver running as before."""

    def apply(self, host: Host, change: Change) -> None:
        if change.action == "write_marker":
            record = dict(change.data, reason=self.given_reason, time=int(host.time()))
            host.make_dir("/var/lib/gpu_fleet", mode=0o755)
            host.write_file(REBOOT_MARKER, json.dumps(record, sort_keys=True) + "\n", mode=0o644)
        elif change.action == "clear_marker":
            host.remove(REBOOT_MARKER)
        elif change.action == "start_clients":
            start_clients(host)
            self._need_fabric(host)
        elif change.action == "fabric":
            # What does not come about is judged with the GPUs' condition, by whoever starts something on them.
            self.fabric_left = wait_for_fabric(host)
        elif change.action == "reload":
            self._reload(host)

    def _reload(self, host: Host) -> None:
        state = observe_reload(host)
        if state.current:
            return
        if state.gpu_processes:
            raise in_use_error(state.gpu_processes, "Reloading the driver")
        if state.loaded is not None:
            stop_clients(host)
            late = foreign_holders(driver_holders(host))
            if late:
                start_clients_that_can(host)
                raise in_use_error(late, "Reloading the driver")
            self.tried = unload_modules(host)
            if self.tried:
                start_clients_that_can(host)
                return
        if state.nouveau_loaded:
            result = host.run(["rmmod", "nouveau"], timeout=LOAD_TIMEOUT)
            if not result.ok:
                self.tried = "nouveau drives the GPU and cannot be unloaded (%s)" % result.last_line().rstrip(".")
                return
        result = host.run(["modprobe", "nvidia"], timeout=LOAD_TIMEOUT)
        if not result.ok or observe_loaded_driver(host) is None:
            cause, reboot_helps = load_failure(host, state.kernel, result.last_line())
            if not reboot_helps:
                raise FleetError(
                    "module_not_loaded", "The driver module %s does not load: %s." % (state.on_disk, cause)
                )
            self.tried = "the module %s does not load: %s" % (state.on_disk, cause)
            return
        # CUDA needs nvidia_uvm; the others come back only where they were.
        for name in ("nvidia_uvm", *reversed([entry for entry in UNLOAD_ORDER if entry in state.modules])):
            if name not in ("nvidia",):
                host.run(["modprobe", name], timeout=LOAD_TIMEOUT)
        # What an earlier boot was for has been reached; a later one may be allowed its reboot again.
        host.remove(REBOOT_MARKER)
        start_clients(host)
        self._need_fabric(host)

    @staticmethod
    def _need_fabric(host: Host) -> None:
        """After a start of Fabric Manager that was ours."""
        left = wait_for_fabric(host) if observe_gpus(host, with_smi=False).needs_fabric_manager else ""
        if left:
            raise FleetError(
                "fabric_not_ready",
                "The driver is loaded, but after %d seconds the NVLink fabric is %s instead of Completed; look at "
                "`journalctl -u nvidia-fabricmanager`, whose version must equal the driver's." % (FABRIC_TIMEOUT, left),
            )
