# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gives the module the name of this run."""

from __future__ import annotations

import typing as t

from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._rollout_action import RolloutActionBase


class ActionModule(RolloutActionBase):
    module = "gpu_fleet.nim.rollout_claim"

    def defaults(self, args: t.Mapping[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        return {}
