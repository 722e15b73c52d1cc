#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Thin shell around the clean-up of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_host_cleanup
short_description: Take back what this collection put on a host
version_added: "1.0.0"
description:
  - Removes the files of this collection that do not belong to a single NIM service (wrapper, C(nim.target), C(/etc/nim),
    its state and run-time directories).
  - On request removes directories of model caches, the NVIDIA Container Toolkit, Docker Engine and the NVIDIA driver,
    with their holds and the repository definitions that this collection wrote.
  - Everything is left while NIM services are still on the host (M(gpu_fleet.nim.nim_service) removes them), Docker Engine
    while containers run, and the driver while somebody uses a GPU; RV(blocked) says so.
  - With Docker Engine go the keys of C(/etc/docker/daemon.json) that still have the values of O(daemon_options), and the runtime
    V(nvidia); a file in which nothing is left then goes as well. All other keys stay.
  - Images, containers and volumes under C(/var/lib/docker) are never removed, nor are packages that others may need by now
    (dkms, kernel headers, the Python client of Docker), nor the group C(docker).
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
options:
  caches:
    description: Directories of model caches to remove, absolute. Nothing in them can be brought back.
    type: list
    elements: path
    default: []
  toolkit:
    description: Whether to remove the NVIDIA Container Toolkit.
    type: bool
    default: false
  docker:
    description: Whether to remove Docker Engine.
    type: bool
    default: false
  daemon_options:
    description: Keys of C(daemon.json) that this collection has set, with their values. Only means something with O(docker=true).
    type: dict
    default: {}
  driver:
    description: Whether to remove the NVIDIA driver. The module that is in memory stays until the next boot.
    type: bool
    default: false
seealso:
  - module: gpu_fleet.nim.nim_service
"""

EXAMPLES = r"""
- name: Remove the collection's own files and one model cache
  gpu_fleet.nim.gpu_host_cleanup:
    caches:
      - /var/lib/nim/cache/llama
  become: true

- name: Remove everything
  gpu_fleet.nim.gpu_host_cleanup:
    toolkit: true
    docker: true
    driver: true
  become: true
"""

RETURN = r"""
changes:
  description: What was removed, or would be in check mode.
  returned: always
  type: list
  elements: dict
blocked:
  description: What was left because it is in use, with who uses it.
  returned: success
  type: list
  elements: dict
reboot_required:
  description: Whether the removed driver's module is still in memory.
  returned: success
  type: bool
reason:
  description: Stable name of the error.
  returned: failure
  type: str
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_cleanup import CleanupState, HostCleanup
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import run_resource
from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import scrub


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "caches": {"type": "list", "elements": "path", "default": []},
            "toolkit": {"type": "bool", "default": False},
            "docker": {"type": "bool", "default": False},
            "daemon_options": {"type": "dict", "default": {}},
            "driver": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    made: list[HostCleanup] = []

    def build() -> HostCleanup:
        parts = [part for part in ("toolkit", "docker", "driver") if module.params[part]]
        made.append(
            HostCleanup(caches=module.params["caches"], parts=parts, daemon_options=module.params["daemon_options"])
        )
        return made[0]

    def result(state: CleanupState) -> dict[str, t.Any]:
        answer = made[0].result(state)
        for warning in answer.pop("warnings"):
            module.warn(scrub(warning))
        return answer

    run_resource(module, build, result)


if __name__ == "__main__":
    main()
