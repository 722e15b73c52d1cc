# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Waits for NIM services and shows how far they are; the work is done by the module of the same name."""

from __future__ import annotations

from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._progress import ProgressActionBase


class ActionModule(ProgressActionBase):
    module = "gpu_fleet.nim.nim_health"
