#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: driver_upgrade
short_description: Change the driver of a host that serves, step by step, with a way back
version_added: "1.0.0"
description:
  - "Takes a host from NIM services on one NVIDIA driver to services that are ready on another one: packages downloaded, services
    stopped, the driver's own daemons stopped, module unloaded, packages changed, module loaded (or a reboot asked for), versions,
    GPUs and a GPU container checked, services started and asked."
  - Every step is looked for on the host before it is taken and written down after it, in C(/var/lib/gpu_fleet/driver-upgrade.json).
    An interrupted upgrade goes on where it was, from any controller. A host that has the driver is not touched.
  - When a step fails while the old driver is in place, its services are started on it again. When one fails later, the old packages
    are installed and loaded again, if they can still be had. Where that fails too, the host stays out with its record.
  - Whoever calls it takes the host out of the load balancer between O(state=drained) and O(state=ready). The role
    P(gpu_fleet.nim.driver_upgrade#role) does that.
  - The change runs as a job on the host, which a lost connection does not stop.
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
  - gpu_fleet.nim.progress
  - gpu_fleet.nim.rollout
options:
  state:
    description:
      - V(prestaged), everything is checked and downloaded that can be while the host serves. What cannot work is refused here.
      - V(drained), that, and the host is on record as about to be taken out of service.
      - V(ready), all steps until the services are ready on the new driver. Where a reboot is needed it stops before it, see
        RV(reboot_required), and goes on when it is called again.
      - V(returned), the host has been given back and the record is closed.
      - V(restored), the upgrade is given up, which is possible as long as the old driver is in place and nobody else has put the
        host under maintenance.
    type: str
    choices: [prestaged, drained, ready, returned, restored]
    default: ready
  nvidia_driver:
    description:
      - The driver that is wanted, as the options of M(gpu_fleet.nim.nvidia_driver).
      - When it is not given, they come from the variables of the role P(gpu_fleet.nim.nvidia_driver#role).
    type: dict
  reboot:
    description:
      - V(auto) reboots where nothing else loads the new driver, at most once for a driver version.
      - V(never) goes back to the old driver instead.
      - V(always) loads it by a reboot.
    type: str
    choices: [auto, never, always]
    default: auto
  gpu_injection:
    description: How the services get their GPUs, for the container that proves that they do.
    type: str
    choices: [runtime, cdi, gpus]
    default: runtime
  gpu_health:
    description: V(enforce) goes back to the old driver when a GPU is not fit for service on the new one; V(warn) does not ask.
    type: str
    choices: [enforce, warn]
    default: enforce
  smoke_test:
    description: Whether a container must see the GPUs before services are started.
    type: bool
    default: true
  models:
    description:
      - Entries of C(nim_models), which say how long to wait for a service and what to ask it. Services without one are asked too.
    type: list
    elements: dict
    default: []
seealso:
  - module: gpu_fleet.nim.nvidia_driver
  - module: gpu_fleet.nim.nvidia_driver_reload
  - module: gpu_fleet.nim.fleet_rollout
"""

EXAMPLES = r"""
- name: Everything that can be done while the host serves
  gpu_fleet.nim.driver_upgrade:
    state: prestaged
    nvidia_driver:
      branch: "580"
  become: true

- name: The new driver, when the host is out of the load balancer
  gpu_fleet.nim.driver_upgrade:
    state: ready
    nvidia_driver:
      branch: "580"
    reboot: never
  become: true
"""

RETURN = r"""
message:
  description: One sentence about the host.
  returned: success
  type: str
gpu:
  description: Whether there is an NVIDIA GPU on the PCI bus; a host without one is left alone.
  returned: success
  type: bool
due:
  description: Whether the host has not got the driver that is wanted, or was not given back yet.
  returned: success
  type: bool
target:
  description: The driver that is wanted, in words.
  returned: success
  type: str
digest:
  description: Name of the target; a host that has reached it is not touched.
  returned: success
  type: str
step:
  description: The last step that was finished; empty when there was none.
  returned: success
  type: str
outcome:
  description:
    - How the upgrade on record has ended, V(updated), V(restored) (the old driver was never out), V(rolled_back) (it was put back)
      or V(stranded) (the host stays out); empty while it is under way.
    - After a failure it says where the host is. It is missing when nothing had been stopped.
  returned: always
  type: str
open:
  description: Whether the host was taken out of service by an upgrade and not given back.
  returned: success
  type: bool
loaded:
  description: Version of the module in memory; empty when none is loaded.
  returned: success
  type: str
maintenance:
  description: Who keeps services from starting, V(ours) for this upgrade, V(foreign) for somebody else; empty for nobody.
  returned: success
  type: str
held:
  description: Why the host is left alone, for example because somebody else has it under maintenance; empty when it is not.
  returned: success
  type: str
reboot_required:
  description: Whether the host must be rebooted before it goes on.
  returned: success
  type: bool
reboot_reason:
  description: Why.
  returned: success
  type: str
models:
  description: Services that run on the host, or ran before the upgrade.
  returned: success
  type: list
  elements: str
serving:
  description: Those that are ready now; looked for with O(state=prestaged) only, and told where that is refused, too.
  returned: success and refusal
  type: list
  elements: str
checks:
  description: Verdicts on the upgrade of this host, as M(gpu_fleet.nim.gpu_host_preflight) returns them; with O(state=prestaged) only.
  returned: success
  type: list
  elements: dict
way_back:
  description: Why the driver that was there could not be put back; empty when it can, or as long as nothing was downloaded.
  returned: success
  type: str
steps:
  description: The steps that are left until the host is given back, as changes.
  returned: success
  type: list
  elements: dict
record:
  description: What is on record on the host; empty when it never was upgraded.
  returned: success
  type: dict
changes:
  description: Steps that were taken, or would be in check mode.
  returned: always
  type: list
  elements: dict
blocked:
  description: Steps that were left, with the cause of each.
  returned: success
  type: list
  elements: dict
reason:
  description: Stable identifier of the failure.
  returned: failure
  type: str
  sample: gpu_in_use
claim:
  description: Who is at the host, when O(run) was refused.
  returned: failure
  type: dict
"""

import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_upgrade import DriverUpgrade
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_upgrade_planner import REBOOTS, UpgradeState
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module_progress import (
    PROGRESS_OPTIONS,
    run_resource_with_progress,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import GPU_HEALTH, GPU_INJECTIONS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resources_module import ResourcesModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout_record import ROLLOUT_OPTIONS


def main() -> None:
    """Shell around the resource."""
    module = ResourcesModule(
        ["nvidia_driver"],
        {
            "reboot": {"type": "str", "choices": list(REBOOTS), "default": "auto"},
            "gpu_injection": {"type": "str", "choices": list(GPU_INJECTIONS), "default": "runtime"},
            "gpu_health": {"type": "str", "choices": list(GPU_HEALTH), "default": "enforce"},
            "smoke_test": {"type": "bool", "default": True},
            "models": {"type": "list", "elements": "dict", "default": []},
            **ROLLOUT_OPTIONS,
            **PROGRESS_OPTIONS,
        },
    )
    built: list[DriverUpgrade] = []

    def build() -> DriverUpgrade:
        names = ("reboot", "gpu_injection", "gpu_health", "smoke_test", "models", "run", "take_over", "lease")
        built.append(
            DriverUpgrade(
                driver=module.resources()["nvidia_driver"],
                goal=module.params["state"],
                **{name: module.params[name] for name in names},
            )
        )
        return built[0]

    def result(state: UpgradeState) -> dict[str, t.Any]:
        return built[0].result(state)

    run_resource_with_progress(module, build, result)


if __name__ == "__main__":
    main()
