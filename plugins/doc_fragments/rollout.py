# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Options of modules for which a host is taken out of service."""

from __future__ import annotations


class ModuleDocFragment:
    """Who is at a host, and how long that counts."""

    DOCUMENTATION = r"""
options:
  run:
    description:
      - Who is at it, in words. While a run is seen at the host, or was within O(lease) of that run, one with another name is refused.
      - The action plugin fills it in.
    type: str
    default: ""
  take_over:
    description: Whether the claim of another run is void.
    type: bool
    default: false
  lease:
    description: Seconds that O(run) is honoured by others without a sign of life, for example while the host is drained or reboots.
    type: int
    default: 600
"""
