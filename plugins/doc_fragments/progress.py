# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Options of modules that show how far they are while they work."""

from __future__ import annotations


class ModuleDocFragment:
    """Options that the action plugin of the same name and the module share."""

    DOCUMENTATION = r"""
options:
  progress_interval:
    description:
      - Seconds between two lines of progress on the controller.
      - The work runs as a job on the host. It goes on when the connection breaks, and the next run waits for it.
      - V(0) shows nothing, runs no job and returns at the end.
    type: int
    default: 5
  resume:
    description: Internal; what one call of the module hands to the next one through the action plugin.
    type: dict
"""
