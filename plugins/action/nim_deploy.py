# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gives the module the variables of role nim and the name of this run, and shows how far the host is."""

from __future__ import annotations

import typing as t

from ansible_collections.gpu_fleet.nim.plugins.action.gpu_host_plan import role_options
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._rollout_action import RolloutActionBase


class ActionModule(RolloutActionBase):
    module = "gpu_fleet.nim.nim_deploy"

    def defaults(self, args: t.Mapping[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        if "nim_service" in args:
            return {}
        # A host without models has nothing to be done to it.
        return {
            "nim_service": role_options(self._templar, task_vars, ["nim_service"]).get("nim_service", {"models": []})
        }
