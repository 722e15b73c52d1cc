#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan of a whole host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_host_plan
short_description: Say in one call what would change on a GPU host, and why
version_added: "1.0.0"
author: "The gpu_fleet.nim authors (@gpu-fleet)"
description:
  - Looks at everything that the roles of this collection manage, with the functions of the modules themselves, and returns all
    differences as one list with reason and disruption.
  - Changes nothing, starts no container, loads no kernel module and contacts no registry. So it does not tell whether a
    registry takes the key, and not what a tag stands for today.
  - What depends on something that is not there yet (services on an image, images on Docker) is an entry that names it in
    C(after). A resource that cannot be looked at appears in RV(errors) and hides no other one.
  - A host without an NVIDIA GPU on its PCI bus is left alone.
  - Without any option the variables of the collection's roles are taken, as the roles take them. With options, exactly the
    given resources are planned.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes.info
  - gpu_fleet.nim.resources
  - gpu_fleet.nim.resources.health
seealso:
  - module: gpu_fleet.nim.gpu_host_info
  - module: gpu_fleet.nim.fleet_plan
"""

EXAMPLES = r"""
- name: What would the roles change here
  gpu_fleet.nim.gpu_host_plan:
  become: true
  register: plan

- name: Docker alone
  gpu_fleet.nim.gpu_host_plan:
    docker_engine:
      minimum_version: "24.0"
    docker_daemon:
      live_restore: true
  become: true
"""

RETURN = r"""
gpu:
  description: Whether the host has an NVIDIA GPU; without one nothing else is looked at.
  returned: success
  type: bool
drift:
  description: Whether anything differs from what is wanted, or could not be looked at.
  returned: success
  type: bool
worst:
  description:
    - The worst disruption of all changes, those that would be left out included; V(none), V(reload), V(restart_docker),
      V(restart_nim), V(unload_driver) or V(reboot).
  returned: success
  type: str
  sample: restart_nim
changes:
  description: All differences, the worst disruption first, equal ones in the order in which they are applied.
  returned: success
  type: list
  elements: dict
  contains:
    resource:
      description: Module that manages it.
      type: str
    what:
      description: What differs.
      type: str
    from:
      description: How it is; null when it is not there.
      type: raw
    to:
      description: How it is wanted; null when it must go.
      type: raw
    why:
      description: Why it must change.
      type: str
    disruption:
      description: What changing it does to the services of the host.
      type: str
    blocked:
      description: Why a run would leave it out, and what would allow it; else null.
      type: str
    after:
      description: Resource that must be as wanted before this can be planned in detail; else null.
      type: str
  sample:
    - resource: nim_service
      what: nim-llama.service
      from: started
      to: restarted
      why: the container runs something else
      disruption: restart_nim
      blocked: null
      after: null
errors:
  description: Resources that could not be planned.
  returned: success
  type: list
  elements: dict
  contains:
    resource:
      description: Module that manages it.
      type: str
    reason:
      description: Stable identifier of the cause.
      type: str
    message:
      description: What is wrong and what to do about it.
      type: str
    after:
      description: Resource whose error is the cause of this one too; else null.
      type: str
notes:
  description: What a plan leaves open although nothing is wrong.
  returned: success
  type: list
  elements: str
"""

from ansible_collections.gpu_fleet.nim.plugins.module_utils._zip_imports import compile_once

# Before the others are imported.
compile_once()

from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import fail, succeed
from ansible_collections.gpu_fleet.nim.plugins.module_utils._read_only_host import DockerLook, ReadOnlyHost, ask_early
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resources_module import ResourcesModule


def main() -> None:
    module = ResourcesModule()
    host, api = ReadOnlyHost(Host()), DockerLook()
    try:
        wanted = module.resources()
        ask_early(host, api, wanted)
        # Compiled while the host looks for its answers.
        from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_plan import plan_host

        found = plan_host(host, wanted, api)
    except FleetError as error:
        fail(module, error)
    succeed(module, found.result(), found.warnings)


if __name__ == "__main__":
    main()
