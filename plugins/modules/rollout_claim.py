#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The word of a run on a host that waits for its turn."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rollout_claim
short_description: Tell others that a host waits for its turn in a rollout, or that it does not any more
version_added: "1.0.0"
description:
  - Playbooks C(gpu_fleet.nim.upgrade_drivers) and C(gpu_fleet.nim.deploy) leave word on every host that they are going to take out, so
    that a second operator is told who runs. This module renews that word while a host waits for its turn, and takes it back when
    its run has ended.
  - It touches nothing but that word, and only where M(gpu_fleet.nim.driver_upgrade) or M(gpu_fleet.nim.nim_deploy) has left a record.
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
options:
  kind:
    description: The rollout, which is the name of its module.
    type: str
    choices: [driver_upgrade, nim_deploy]
    required: true
  state:
    description:
      - V(present), the word of this run is younger than half of O(lease). It fails where another run has taken the host over or is
        at it with a rollout of the other kind.
      - V(absent), this run has no word on the host. That of another one is left.
    type: str
    choices: [present, absent]
    default: present
  run:
    description: Who it is, in words. The action plugin fills it in.
    type: str
    required: true
  lease:
    description: Seconds that O(run) is honoured by others without another sign of life.
    type: int
    default: 3600
  take_over:
    description: Whether the claim of another run is void.
    type: bool
    default: false
seealso:
  - module: gpu_fleet.nim.driver_upgrade
  - module: gpu_fleet.nim.nim_deploy
  - module: gpu_fleet.nim.fleet_rollout
"""

EXAMPLES = r"""
- name: The host still waits for its turn
  gpu_fleet.nim.rollout_claim:
    kind: driver_upgrade
  become: true

- name: It does not any more
  gpu_fleet.nim.rollout_claim:
    kind: driver_upgrade
    state: absent
  become: true
"""

RETURN = r"""
claim:
  description: Who is at the host, C(run), C(seen) (seconds since the epoch) and C(lease); empty when nobody is.
  returned: always
  type: dict
changes:
  description: What was changed (in check mode, what would be).
  returned: always
  type: list
  elements: dict
blocked:
  description: Always empty; nothing here disturbs a service.
  returned: success
  type: list
  elements: dict
reason:
  description: Stable identifier of the failure.
  returned: failure
  type: str
  sample: upgrade_running
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import run_resource
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout_claim import (
    PATHS,
    STATES,
    ClaimState,
    RolloutClaim,
)


def main() -> None:
    """Shell around the resource."""
    module = AnsibleModule(
        argument_spec={
            "kind": {"type": "str", "choices": list(PATHS), "required": True},
            "state": {"type": "str", "choices": list(STATES), "default": "present"},
            "run": {"type": "str", "required": True},
            "lease": {"type": "int", "default": 3600},
            "take_over": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    built: list[RolloutClaim] = []

    def build() -> RolloutClaim:
        built.append(RolloutClaim(**module.params))
        return built[0]

    def result(state: ClaimState) -> dict[str, t.Any]:
        return built[0].result(state)

    run_resource(module, build, result)


if __name__ == "__main__":
    main()
