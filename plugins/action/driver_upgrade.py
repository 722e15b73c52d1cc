# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gives the module the variables of the roles and the name of this run, and shows how far the host is."""

from __future__ import annotations

import typing as t

from ansible_collections.gpu_fleet.nim.plugins.action.gpu_host_plan import role_options
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._rollout_action import RolloutActionBase

#: What the role nim says of its services is of use here, too.
_OF_SERVICES = ("gpu_injection", "gpu_health")


class ActionModule(RolloutActionBase):
    module = "gpu_fleet.nim.driver_upgrade"

    def defaults(self, args: t.Mapping[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        found: dict[str, t.Any] = {}
        if "nvidia_driver" not in args:
            found["nvidia_driver"] = role_options(self._templar, task_vars, ["nvidia_driver"])["nvidia_driver"]
        services = role_options(self._templar, task_vars, ["nim_service"]).get("nim_service", {})
        found.update({name: services[name] for name in _OF_SERVICES if name in services})
        found["models"] = services.get("models") or []
        return found
