#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What cannot work on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: gpu_host_preflight
short_description: Say in seconds what cannot work on a GPU host
version_added: "1.0.0"
author: "The gpu_fleet.nim authors (@gpu-fleet)"
description:
  - Judges a host before anything is installed, pulled or touched. Says what each resource of this collection would refuse, in
    what condition the GPUs are, whether the registry hands out the images to this host and takes the key, whether the driver
    satisfies what the images require, whether image and model fit on the disk, and for each model whether its GPUs, their
    memory, its profile, its port and its directories are there.
  - Uses the functions of the modules themselves, so that it refuses what they would refuse, in the same words.
  - Works on a bare host, without a driver and without Docker; images are then judged by the driver that is wanted. Changes
    nothing, starts no container and loads no kernel module, but contacts the registry.
  - Images are judged with the login and the Docker options that are wanted. What only a Docker that is still to be set up or
    changed can tell is V(unknown). A GPU that is not fit for service is a warning where no model is to be started on it.
  - Only images that would be pulled are asked for at the registry.
  - Without any resource among the options the variables of the collection's roles are taken, as the roles take them. With
    some, exactly those are judged.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes.info
  - gpu_fleet.nim.resources
options:
  fail_on_refusal:
    description:
      - Fail when something would keep a run from working, before it touches anything. A GPU that is not fit for service is no
        reason where no model is to be started on it.
      - The message ends with the variables that let a run of the collection's playbooks and roles go on all the same.
    type: bool
    default: false
seealso:
  - module: gpu_fleet.nim.gpu_host_plan
  - module: gpu_fleet.nim.fleet_preflight
"""

EXAMPLES = r"""
- name: Could the roles do what the inventory asks for
  gpu_fleet.nim.gpu_host_preflight:
  become: true
  register: preflight

- name: Can this host have the image, and run it
  gpu_fleet.nim.gpu_host_preflight:
    nvidia_driver:
      branch: "580"
    nim_image:
      images:
        - image: nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4
          disk_space: 20GB
      api_key: "{{ ngc_api_key }}"
    fail_on_refusal: true
  become: true
"""

RETURN = r"""
verdict:
  description: The worst verdict of all; V(ok), V(unknown), V(warning) or V(refused).
  returned: always
  type: str
checks:
  description: All checks, the worst first.
  returned: always
  type: list
  elements: dict
  contains:
    check:
      description:
        - Stable name of the check. Of the GPUs V(nvml), V(gpu_count), V(recovery_action), V(memory_repair), V(ecc), V(fabric),
          V(compute_mode), V(mig), V(persistence), V(slowdown) and V(xid); of images V(key), V(image), V(requirement) and
          V(disk); of models V(gpus), V(port), V(address), V(gpu_health), V(gpu_memory), V(profile), V(directories), V(mask),
          V(disk) and V(service); else the name of the resource, or V(gpu) for a host without a GPU.
      type: str
    verdict:
      description:
        - V(ok), V(warning), V(refused), or V(unknown) where nothing can be said, for example because a GPU does not tell.
      type: str
    message:
      description: What was found, as a sentence.
      type: str
    remedy:
      description: What to do about it; empty when nothing has to be done.
      type: str
    reason:
      description: Stable identifier of what is wrong, as the modules return it; empty when nothing is.
      type: str
    gpu:
      description: UUID of the GPU that it is about; empty when it is about the host.
      type: str
    subject:
      description: Model or image that it is about; empty when it is about neither.
      type: str
  sample:
    - check: memory_repair
      verdict: refused
      message: GPU 3 (NVIDIA H200, GPU-…) has bad memory that is only taken out of use by a reset (row remapping pending).
      remedy: stop what uses it and run 'nvidia-smi --gpu-reset -i 3', or reboot the host
      reason: row_remap_pending
      gpu: GPU-…
      subject: ""
reason:
  description: Reason of the first refusal.
  returned: failure
  type: str
"""

from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_preflight import (
    ALL_THE_SAME,
    JUDGED,
    preflight,
    result,
    stands_in_the_way,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import fail, succeed
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resources_module import ResourcesModule


def main() -> None:
    module = ResourcesModule(JUDGED, {"fail_on_refusal": {"type": "bool", "default": False}})
    try:
        verdicts = preflight(Host(), module.resources())
    except FleetError as error:
        fail(module, error)
    refused = stands_in_the_way(verdicts)
    if refused and module.params["fail_on_refusal"]:
        sentences = dict.fromkeys(verdict.sentence for verdict in refused)
        fail(module, FleetError(refused[0].reason, " ".join([*sentences, ALL_THE_SAME]), **result(verdicts)))
    succeed(module, result(verdicts))


if __name__ == "__main__":
    main()
