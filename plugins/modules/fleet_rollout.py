#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation only: the action plugin of the same name does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_rollout
short_description: Decide in which batches the drivers of a fleet are upgraded, while it serves
version_added: "1.0.0"
description:
  - Makes batches out of what M(gpu_fleet.nim.driver_upgrade) found on every host, such that a number of hosts and, of every model, a
    number of ready replicas stay in service at every moment. Hosts that are down, or that others have taken out, use up the limit.
  - Before each batch it looks again who may go, with what came of the hosts before, and stops the run when too many have failed.
    Ansible's own C(max_fail_percentage) does not count hosts that cannot be reached.
  - Runs once for the whole play, on the controller, and connects to no host. Playbook C(gpu_fleet.nim.upgrade_drivers) uses it.
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
extends_documentation_fragment:
  - gpu_fleet.nim.attributes.info
attributes:
  check_mode:
    details: In check mode the steps of every host are shown too, and O(output) and O(report) are not written.
  platform:
    platforms: all
options:
  phase:
    description:
      - V(plan) shows the plan, and fails when a host cannot be upgraded.
      - V(batch) decides about the hosts of the play's current batch.
      - V(end) shows what came of it so far.
    type: str
    choices: [plan, batch, end]
    default: plan
  variable:
    description: Name under which M(gpu_fleet.nim.driver_upgrade) with C(state=prestaged) was registered on the hosts.
    type: str
    required: true
  results:
    description: Names under which its later calls were registered, the last call of a host first, the one with C(state=drained) last.
    type: list
    elements: str
    default: []
  gateways:
    description: Name under which M(gpu_fleet.nim.haproxy_server) was registered, in a loop over the gateways in check mode.
    type: str
  hosts:
    description: All hosts of the fleet; by default those of the play.
    type: list
    elements: str
  canary:
    description: Hosts or groups that go first; by default the first host that can.
    type: list
    elements: str
    default: []
  max_parallel:
    description: Hosts in one batch, as a number or a percentage; V(0) for no limit.
    type: str
    default: "0"
  max_unavailable:
    description: Hosts out of service at a time, whoever took them out, as a number or a percentage (rounded up).
    type: str
    default: 25%
  min_ready:
    description: Ready replicas that every model keeps.
    type: int
    default: 1
  min_ready_of:
    description: The same for single models, as a mapping.
    type: dict
    default: {}
  failure_budget:
    description: Hosts that may fail or get lost before the run stops, as a number or a percentage of those to be upgraded.
    type: str
    default: "0"
  fail_on_failure:
    description: With O(phase=end), fail when a host of the plan was not upgraded.
    type: bool
    default: false
  output:
    description: File on the controller that gets the plan as JSON.
    type: path
  report:
    description: File on the controller that gets one HTML page with every host's time line; it loads nothing.
    type: path
seealso:
  - module: gpu_fleet.nim.driver_upgrade
"""

EXAMPLES = r"""
- name: Look at the hosts, and download while they serve
  gpu_fleet.nim.driver_upgrade:
    state: prestaged
  become: true
  register: look
  ignore_errors: true
  ignore_unreachable: true

- name: Show which hosts would be upgraded when
  gpu_fleet.nim.fleet_rollout:
    variable: look
    max_unavailable: 2
  run_once: true
  register: plan
"""

RETURN = r"""
batches:
  description: The plan, one entry a batch.
  returned: with O(phase=plan)
  type: list
  elements: dict
  contains:
    number:
      description: From 1.
      type: int
    kind:
      description: V(resume) for hosts that an earlier run has left out of service, V(canary), or V(roll).
      type: str
    hosts:
      description: Its hosts.
      type: list
      elements: str
    unavailable:
      description: Hosts out of service while it runs.
      type: int
    capacity:
      description: Model and ready replicas while it runs.
      type: dict
order:
  description: All hosts of all batches.
  returned: with O(phase=plan)
  type: list
  elements: str
serial:
  description: Number of hosts of each batch.
  returned: with O(phase=plan)
  type: list
  elements: int
fleet:
  description: All hosts that were looked at.
  returned: with O(phase=plan)
  type: list
  elements: str
left:
  description: Hosts that are not upgraded, and why; with O(phase=batch) of this batch.
  returned: with O(phase=plan) and O(phase=batch)
  type: dict
done:
  description: Hosts that are as wanted.
  returned: with O(phase=plan)
  type: list
  elements: str
capacity:
  description: Model and ready replicas before anything begins.
  returned: with O(phase=plan)
  type: dict
max_unavailable:
  description: The limit as a number of hosts.
  returned: with O(phase=plan)
  type: int
max_parallel:
  description: The limit as a number of hosts; 0 for none.
  returned: with O(phase=plan)
  type: int
rows:
  description: One entry a host, with its steps.
  returned: with O(phase=plan)
  type: list
  elements: dict
admitted:
  description: Hosts of this batch that may go now.
  returned: with O(phase=batch)
  type: list
  elements: str
number:
  description: Number of this batch.
  returned: with O(phase=batch)
  type: int
first_after_canary:
  description: Whether the batch before was the last one of canaries.
  returned: with O(phase=batch)
  type: bool
outcomes:
  description: "Host and what came of it: V(upgraded), V(restored), V(rolled back), V(out of service) or V(not begun)."
  returned: with O(phase=end)
  type: dict
"""
