#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation only: the action plugin of the same name does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_diagnosis
short_description: Show what is wrong with all hosts of the play as one table
version_added: "1.0.0"
description:
  - Makes a table (host, model, severity, reason, cause) out of what M(gpu_fleet.nim.gpu_host_diagnosis) returned on every
    host, the worst first, with remedy and the most telling line of each finding below it, and prints it on standard output.
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
extends_documentation_fragment:
  - gpu_fleet.nim.fleet_table
  - gpu_fleet.nim.attributes.info
options:
  fail_on:
    description:
      - Fail when something does not work on a host, or it could not be looked at (V(failed)), or also when something is not
        as wanted (V(warning)).
    type: str
    choices: [never, failed, warning]
    default: never
seealso:
  - module: gpu_fleet.nim.gpu_host_diagnosis
"""

EXAMPLES = r"""
- name: Look at the hosts
  gpu_fleet.nim.gpu_host_diagnosis:
  become: true
  register: diagnosis

- name: Show the findings
  gpu_fleet.nim.fleet_diagnosis:
    variable: diagnosis
    output: findings.json
"""

RETURN = r"""
hosts:
  description: Hosts with a failure or a warning.
  returned: always
  type: list
  elements: str
rows:
  description: One entry a finding, or a host without one; the worst host first.
  returned: always
  type: list
  elements: dict
  contains:
    host:
      description: Name in the inventory.
      type: str
    severity:
      description: V(failed), V(warning), V(note), or V(ok) for a host without findings.
      type: str
    model:
      description: Name of the model, or null.
      type: str
    layer:
      description: Part of the host it belongs to.
      type: str
    gpu:
      description: UUID of the GPU, or null.
      type: str
    reason:
      description: Stable identifier.
      type: str
    cause:
      description: What is wrong, and why.
      type: str
    remedy:
      description: What to do, or null.
      type: str
    evidence:
      description: Lines that show it.
      type: list
      elements: str
    signature:
      description: Identifier of the known failure that was recognised, or null.
      type: str
"""
