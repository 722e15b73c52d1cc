# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gives the module the variables of the collection's roles, as the roles give them to their modules."""

from __future__ import annotations

import typing as t

from ansible_collections.gpu_fleet.nim.plugins.action.gpu_host_plan import ActionModule as PlanAction
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_preflight import JUDGED


class ActionModule(PlanAction):
    module = "gpu_fleet.nim.gpu_host_preflight"
    payload = None

    def options(self, task_vars: t.Mapping[str, t.Any]) -> dict[str, dict[str, t.Any]]:
        return {name: options for name, options in super().options(task_vars).items() if name in JUDGED}
