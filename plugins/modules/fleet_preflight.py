#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation only: the action plugin of the same name does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_preflight
short_description: Show what cannot work on all hosts of the play as one table
version_added: "1.0.0"
description:
  - Makes a table (host, verdict, check, what was found and what to do) out of what M(gpu_fleet.nim.gpu_host_preflight) returned
    on every host, the worst first, and prints it on standard output. Checks that passed are counted; the JSON has them all.
  - A host that could not be judged counts as refused.
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
extends_documentation_fragment:
  - gpu_fleet.nim.fleet_table
  - gpu_fleet.nim.attributes.info
options:
  fail_on_refusal:
    description: Fail when something cannot work on a host, or a host could not be judged.
    type: bool
    default: true
seealso:
  - module: gpu_fleet.nim.gpu_host_preflight
"""

EXAMPLES = r"""
- name: Judge the hosts
  gpu_fleet.nim.gpu_host_preflight:
  become: true
  register: preflight

- name: Show what cannot work
  gpu_fleet.nim.fleet_preflight:
    variable: preflight
    output: preflight.json
"""

RETURN = r"""
verdict:
  description: The worst verdict of all hosts.
  returned: always
  type: str
hosts:
  description: Names of the hosts where something cannot work, or that could not be judged.
  returned: always
  type: list
  elements: str
rows:
  description: One entry a check of a host, or a host that could not be judged; the worst first.
  returned: always
  type: list
  elements: dict
  contains:
    host:
      description: Name in the inventory.
      type: str
    check:
      description: Name of the check; see M(gpu_fleet.nim.gpu_host_preflight).
      type: str
    verdict:
      description: V(ok), V(unknown), V(warning), V(refused), V(unreachable), V(look failed) or V(not looked at).
      type: str
    message:
      description: What was found, as a sentence.
      type: str
    remedy:
      description: What to do about it.
      type: str
    reason:
      description: Stable identifier of what is wrong.
      type: str
    gpu:
      description: UUID of the GPU that it is about.
      type: str
    subject:
      description: Model or image that it is about.
      type: str
"""
