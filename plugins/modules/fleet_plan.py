#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation only: the action plugin of the same name does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_plan
short_description: Show what would change on all hosts of the play as one table
version_added: "1.0.0"
description:
  - Makes a table (host, disruption, resource, what, from and to, why) out of what M(gpu_fleet.nim.gpu_host_plan) returned on
    every host, the worst first, and prints it on standard output.
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
extends_documentation_fragment:
  - gpu_fleet.nim.fleet_table
  - gpu_fleet.nim.attributes.info
options:
  report:
    description:
      - File on the controller that gets the fleet as one HTML page that loads nothing, to read, print or send.
    type: path
  facts:
    description:
      - Name of the variable under which M(gpu_fleet.nim.gpu_host_info) was registered on the hosts; O(report) shows GPUs,
        driver and models from it.
    type: str
  fail_on_drift:
    description: Fail when a host is not as wanted, or is not known to be, because it could not be looked at.
    type: bool
    default: false
seealso:
  - module: gpu_fleet.nim.gpu_host_plan
"""

EXAMPLES = r"""
- name: Plan the hosts
  gpu_fleet.nim.gpu_host_plan:
  become: true
  register: plan

- name: Show the plans
  gpu_fleet.nim.fleet_plan:
    variable: plan
    output: plan.json
"""

RETURN = r"""
drift:
  description: Whether a host is not as wanted, or not known to be.
  returned: always
  type: bool
hosts:
  description: Names of those hosts.
  returned: always
  type: list
  elements: str
rows:
  description: One entry a change or a resource that cannot be planned, or a host without one; the worst first.
  returned: always
  type: list
  elements: dict
  contains:
    host:
      description: Name in the inventory.
      type: str
    state:
      description:
        - V(change), V(cannot be planned), V(as wanted), V(no GPU), V(unreachable), V(look failed) or V(not looked at).
      type: str
    resource:
      description: Module that manages it.
      type: str
    what:
      description: What differs.
      type: str
    from:
      description: How it is.
      type: raw
    to:
      description: How it is wanted.
      type: raw
    why:
      description: Why it must change.
      type: str
    disruption:
      description: What changing it does to the services of the host.
      type: str
    blocked:
      description: Why a run would leave it out.
      type: str
    after:
      description: Resource that must be as wanted before.
      type: str
    reason:
      description: Stable identifier of what is wrong.
      type: str
    message:
      description: What is wrong, as a sentence.
      type: str
"""
