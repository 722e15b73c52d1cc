#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module nvidia_driver_reload."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nvidia_driver_reload
short_description: Load the installed NVIDIA driver without a reboot, or say why that cannot be done
version_added: "1.0.0"
author: "The gpu_fleet.nim authors (@gpu-fleet)"
description:
  - Swaps the loaded kernel module for the one on disk, or loads it where none is loaded.
  - The driver's own services (CDI refresh, DCGM, IMEX, Fabric Manager, persistence daemon) are stopped in order and exactly
    those are started again. Nobody else is stopped; while somebody else uses a GPU the module fails and names the
    processes, units and containers.
  - Where only a reboot helps, nothing changes and RV(reboot_required) is true with RV(reboot_reason).
  - On a host with NVSwitches whose GPUs are just joining the NVLink fabric, as after a boot, it waits for that, at most two
    minutes. A fabric that is not complete then is a warning; M(gpu_fleet.nim.nim_service) starts nothing on such a GPU.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
  - gpu_fleet.nim.progress
options:
  expected_version:
    description: Branch or version that must be installed; empty for whatever is.
    type: str
    default: ""
  prepare_reboot:
    description:
      - Instead of reloading, record on the host that it is about to be rebooted for the installed driver.
      - Fails when it was already rebooted once for that version.
    type: bool
    default: false
  reboot_reason:
    description: Why the reboot is needed, for the record of O(prepare_reboot).
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: Load what is installed
  gpu_fleet.nim.nvidia_driver_reload:
    expected_version: "580"
  register: reload

- name: Say why a reboot is needed
  ansible.builtin.debug:
    var: reload.reboot_reason
  when: reload.reboot_required
"""

RETURN = r"""
message:
  description: One sentence about the state of the driver.
  type: str
  returned: always
loaded:
  description: Version of the module in memory; empty when none is loaded.
  type: str
  returned: always
on_disk:
  description: Version of the module for the running kernel.
  type: str
  returned: always
user_space:
  description: Version of the libraries; empty when they are not installed by packages.
  type: str
  returned: always
flavour:
  description: Flavour of the loaded module, V(open) or V(proprietary).
  type: str
  returned: always
reboot_required:
  description: Whether only a reboot can load the installed driver.
  type: bool
  returned: always
reboot_reason:
  description: Why a reboot is needed; empty when none is.
  type: str
  returned: always
  sample: the running kernel 6.8.0-45-generic was built without module unloading
holders:
  description: Processes that use a GPU, the driver's own services left out.
  type: list
  elements: dict
  returned: always
changes:
  description: What was changed, or would be in check mode.
  type: list
  elements: dict
  returned: always
blocked:
  description: Changes that a reload cannot make now, with the cause.
  type: list
  elements: dict
  returned: always
reason:
  description: Stable identifier of the failure.
  type: str
  returned: failure
  sample: gpu_in_use
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import run_resource
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module_progress import (
    PROGRESS_OPTIONS,
    own_options,
    run_resource_with_progress,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_reload import DriverReload
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_reload_planner import ReloadState
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import RESOURCE_OPTIONS


def main() -> None:
    """Shell around the resource."""
    module = AnsibleModule(
        argument_spec={
            **RESOURCE_OPTIONS["nvidia_driver_reload"],
            "prepare_reboot": {"type": "bool", "default": False},
            "reboot_reason": {"type": "str", "default": ""},
            **PROGRESS_OPTIONS,
        },
        supports_check_mode=True,
    )
    built: list[DriverReload] = []

    def build() -> DriverReload:
        built.append(DriverReload(**own_options(module)))
        return built[0]

    def result(state: ReloadState) -> dict[str, object]:
        return built[0].result(state)

    if module.params["prepare_reboot"]:
        run_resource(module, build, result)
    run_resource_with_progress(module, build, result)


if __name__ == "__main__":
    main()
