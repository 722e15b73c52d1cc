# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shows how far the pulls of gpu_fleet.nim.nim_image are while they run on the host."""

from __future__ import annotations

import typing as t

from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._progress import ProgressActionBase


class ActionModule(ProgressActionBase):
    """Calls the module in slices until all images are there."""

    module = "gpu_fleet.nim.nim_image"

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        # A refusal names the host as the inventory does.
        self._task.args.setdefault("host_name", (task_vars or {}).get("inventory_hostname"))
        return super().run(tmp, task_vars)
