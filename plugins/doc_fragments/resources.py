# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Options of modules that look at a whole host: what is wanted of each resource."""

from __future__ import annotations


class ModuleDocFragment:
    """The resources in the order of the chain; that of health on its own, because not everybody judges it."""

    DOCUMENTATION = r"""
options:
  nvidia_driver:
    description: What is wanted, with the options of M(gpu_fleet.nim.nvidia_driver); not looked at when left out, like all others.
    type: dict
  nvidia_driver_reload:
    description: What is wanted, with the options of M(gpu_fleet.nim.nvidia_driver_reload).
    type: dict
  docker_engine:
    description: What is wanted, with the options of M(gpu_fleet.nim.docker_engine).
    type: dict
  docker_daemon:
    description: What is wanted, with the options of M(gpu_fleet.nim.docker_daemon).
    type: dict
  docker_group:
    description: What is wanted, with the options of M(gpu_fleet.nim.docker_group).
    type: dict
  nvidia_container_toolkit:
    description: What is wanted, with the options of M(gpu_fleet.nim.nvidia_container_toolkit).
    type: dict
  ngc_login:
    description: What is wanted, with the options of M(gpu_fleet.nim.ngc_login).
    type: dict
  nim_image:
    description: What is wanted, with the options of M(gpu_fleet.nim.nim_image).
    type: dict
  nim_service:
    description: What is wanted, with the options of M(gpu_fleet.nim.nim_service).
    type: dict
"""

    HEALTH = r"""
options:
  nim_health:
    description: Services that must be ready, with the options C(models) and C(failure_signatures) of M(gpu_fleet.nim.nim_health).
    type: dict
"""
