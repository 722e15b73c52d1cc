#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation only: the action plugin of the same name does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_rollout
short_description: Decide in which batches hosts are taken out of service, while the fleet serves
version_added: "1.0.0"
description:
  - Makes batches out of what M(gpu_fleet.nim.driver_upgrade) or M(gpu_fleet.nim.nim_deploy) found on every host, such that a number of
    hosts and, of every model, a number of ready replicas stay in service at every moment. Hosts that are down, that no model is ready
    on, or that others have taken out, use up the limit.
  - Before each batch it looks again who may go, with what came of the hosts before and with what the gateways see, and stops the run
    when too many have failed. Ansible's own C(max_fail_percentage) does not count hosts that cannot be reached.
  - Runs once for the whole play, on the controller, and connects to no host. Playbooks C(gpu_fleet.nim.upgrade_drivers) and
    C(gpu_fleet.nim.deploy) use it.
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
      - V(plan) shows the plan, and fails when a host cannot be updated.
      - V(pause) waits where the operator wants to be asked after the canaries, and says on which hosts the run's word is to be renewed.
      - V(batch) decides about the hosts of the play's current batch.
      - V(end) shows what came of it so far.
    type: str
    choices: [plan, pause, batch, end]
    default: plan
  kind:
    description: What is rolled out; the operator's variables begin with it.
    type: str
    choices: [driver_upgrade, nim_deploy]
    default: driver_upgrade
  variable:
    description: Name under which the module with C(state=prestaged) was registered on the hosts.
    type: str
    required: true
  results:
    description: Names under which its later calls were registered, the last call of a host first, the one with C(state=drained) last.
    type: list
    elements: str
    default: []
  failure:
    description: Name under which the role registers why it has failed.
    type: str
  gateways:
    description: Name under which M(gpu_fleet.nim.haproxy_info) was registered, in a loop over the gateways.
    type: str
  decision:
    description: Name under which O(phase=batch) was registered.
    type: str
  claims:
    description: Name under which M(gpu_fleet.nim.rollout_claim) was registered, in a loop over RV(renew).
    type: str
  fail:
    description: Whether it fails where nothing can be begun; otherwise RV(refused) says why.
    type: bool
    default: true
  before:
    description: RV(roll) of the plan has it, what the gateways said before anything began.
    type: dict
    default: {}
  begun:
    description:
      - RV(roll) of the plan has it, when it was made, in seconds since the epoch.
      - What is registered of an earlier run of the same command counts for nothing; O(decision) says of which run it is.
    type: float
    default: 0.0
  hosts:
    description: All hosts of the fleet; by default those of the play.
    type: list
    elements: str
  order:
    description: Hosts or groups in the order in which they go; the others follow as the inventory has them.
    type: list
    elements: str
    default: []
  canary:
    description: Hosts or groups that go first; by default the first host that can.
    type: list
    elements: str
    default: []
  pause_after_canary:
    description:
      - V(true) waits for a key after the canaries, a number waits that many seconds.
    type: raw
    default: false
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
    description: Hosts that may fail or get lost before the run stops, as a number or a percentage of those that are to be updated.
    type: str
    default: "0"
  output:
    description: File on the controller that gets the plan as JSON.
    type: path
  report:
    description: File on the controller that gets one HTML page with every host's time line; it loads nothing.
    type: path
seealso:
  - module: gpu_fleet.nim.driver_upgrade
  - module: gpu_fleet.nim.nim_deploy
  - module: gpu_fleet.nim.haproxy_info
"""

EXAMPLES = r"""
- name: Look at the hosts, and download while they serve
  gpu_fleet.nim.driver_upgrade:
    state: prestaged
  become: true
  register: look
  ignore_errors: true
  ignore_unreachable: true

- name: Show which hosts would go when
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
roll:
  description: What the later calls are given.
  returned: with O(phase=plan)
  type: dict
  contains:
    serial:
      description: Number of hosts of each batch.
      type: list
      elements: int
    group:
      description: Name for a group of the hosts of all batches, which no other plan has.
      type: str
    begun:
      description: When the plan was made, in seconds since the epoch.
      type: float
    fleet:
      description: All hosts that were looked at.
      type: list
      elements: str
    gateways:
      description: The gateways that were asked.
      type: list
      elements: str
    before:
      description: What they said.
      type: dict
waits:
  description: Hosts that are not as wanted and that no batch has, because they cannot be reached or the limits do not let them go.
  returned: with O(phase=plan)
  type: list
  elements: str
left:
  description: Hosts that are not updated, and why; with O(phase=batch) of this batch.
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
after:
  description: Model and ready replicas when all has gone well.
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
begun:
  description: O(begun), by which the decision of an earlier run of the same command is known.
  returned: with O(phase=batch)
  type: float
renewed:
  description: When the word of this run was last renewed on the hosts that wait, in seconds since the epoch; V(0.0) when it was not.
  returned: with O(phase=batch)
  type: float
renew:
  description: Hosts that wait for their turn and on which the word of this run is so old that it has to be renewed.
  returned: with O(phase=pause)
  type: list
  elements: str
refused:
  description: Why nothing can be begun; empty when something can.
  returned: with O(phase=plan)
  type: str
claimed:
  description: Hosts on which this run has left word and that it does not work on, or not any more.
  returned: with O(phase=plan) and O(phase=end)
  type: list
  elements: str
stop:
  description: Why neither this batch nor a later one may begin; empty when they may.
  returned: with O(phase=pause) and O(phase=batch)
  type: str
missing:
  description: Hosts that may be expected to be as wanted and are not, with what came of each and why.
  returned: with O(phase=end)
  type: dict
requests:
  description:
    - With O(phase=batch), what each gateway had counted before this batch.
    - With O(phase=end), requests at the gateways since before the first batch, C(requests), C(failed) and C(truncated), together and
      by backend; empty without gateways.
    - C(complete) is false where a gateway was reloaded meanwhile (C(gaps)), whose earlier counts cannot be asked for any more, or could
      not be asked in the end (C(unknown)).
  returned: with O(phase=batch) and O(phase=end)
  type: raw
outcomes:
  description: "Host and what came of it: V(updated), V(restored), V(rolled back), V(out of service) or V(not begun)."
  returned: with O(phase=end)
  type: dict
"""
