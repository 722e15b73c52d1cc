# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Waits for NIM services and shows how far they are; the work is done by the module of the same name."""

from __future__ import annotations

import typing as t

from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._models import without_secrets
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._progress import ProgressActionBase


class ActionModule(ProgressActionBase):
    module = "gpu_fleet.nim.nim_health"

    def _call(self, args: dict[str, t.Any], task_vars: dict[str, t.Any], wrap_async: bool = False) -> dict[str, t.Any]:
        """Secrets of the models are not needed to ask how they are: they stay on the controller."""
        if "models" in args:
            args["models"] = without_secrets(args["models"])
        return super()._call(args, task_vars, wrap_async)
