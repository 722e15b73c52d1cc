# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shows how far gpu_fleet.nim.nvidia_driver_reload is while the driver is being loaded on the host."""

from __future__ import annotations

from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._progress import ProgressActionBase


class ActionModule(ProgressActionBase):
    """Calls the module in slices until the host is as wanted."""

    module = "gpu_fleet.nim.nvidia_driver_reload"
