# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shows how far the pulls of gpu_fleet.nim.nim_image are while they run on the host."""

from __future__ import annotations

from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._progress import ProgressActionBase


class ActionModule(ProgressActionBase):
    """Calls the module in slices until all images are there."""

    module = "gpu_fleet.nim.nim_image"
