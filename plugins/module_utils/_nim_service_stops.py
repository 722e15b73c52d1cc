# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""NIM services that shall not run any more, or not be on the host at all."""

from __future__ import annotations

import os

from ._nim_models import NimModel
from ._nim_paths import CONFIGURATION_DIRECTORY, STATE_DIRECTORY, UNIT_DIRECTORY, WRAPPER, unit_name
from ._nim_service_files import reload_changes
from ._nim_service_state import RESOURCE, HostState, ServiceState
from ._resource import Change, Disruption


def stop_changes(model: NimModel, state: HostState) -> list[Change]:
    """A model that shall not run, or not be there, as changes."""
    service = state.service(model.name)
    return _stop(service, "state is %s" % model.state, model.stop_timeout, model.state == "absent")


def _stop(service: ServiceState, why: str, stop_timeout: int, remove: bool) -> list[Change]:
    unit = unit_name(service.name)
    changes = []
    if service.alive or service.running or service.downloading:
        data = {"name": service.name, "stop_timeout": stop_timeout}
        changes.append(Change(RESOURCE, unit, "started", "stopped", why, Disruption.RESTART_NIM, "stop", data))
    if remove and service.exists:
        why += "; its model cache is kept"
        changes.append(Change(RESOURCE, unit, "present", None, why, Disruption.NONE, "remove", {"name": service.name}))
    return changes


def removal_changes(state: HostState) -> list[Change]:
    """Everything that was put on the host for services, as changes; model caches stay."""
    why = "everything is to be removed"
    changes = []
    for service in state.services.values():
        timeout = service.configuration.get("stop_timeout")
        changes += _stop(service, why, timeout if isinstance(timeout, int) else 60, True)
    target = UNIT_DIRECTORY + "/nim.target"
    if state.files.get(target) is not None:
        changes.append(Change(RESOURCE, "nim.target", "present", None, why, Disruption.NONE, "remove_target", {}))
    for path in (UNIT_DIRECTORY + "/nim.slice", os.path.dirname(WRAPPER), STATE_DIRECTORY, CONFIGURATION_DIRECTORY):
        if state.files.get(path) is not None or state.paths.get(path) is not None:
            changes.append(Change(RESOURCE, path, "present", None, why, Disruption.NONE, "remove_path", {"path": path}))
    return changes + reload_changes((), changes, state, removing=True)
