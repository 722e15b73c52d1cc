#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
---
module: nim_image
short_description: Pull NIM images by digest, checked beforehand and with progress
version_added: "1.0.0"
description:
  - Brings a list of images to the host. A tag is resolved to a digest once, pulled by that digest, and pinned to it in
    C(/var/lib/gpu_fleet/images.json), from where other modules take it.
  - Before a byte is pulled, the registry is asked for the image's architecture, its size, which is compared with the free disk
    space, and its C(NVIDIA_REQUIRE_CUDA), which is compared with the loaded driver.
  - The pull runs in the background on the host. It survives the end of the module and of the controller; a second run attaches
    to it. While it runs, the controller shows percentage, rate and time left for each host.
  - An image that is on the host and pinned costs one look; the registry is not contacted.
  - An image that is on the host and not pinned yet, because somebody pulled or loaded it, is pinned as it is.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
  - gpu_fleet.nim.registry
attributes:
  check_mode:
    support: full
    details:
      - The checks before the pull are made in check mode too. What an earlier task of a real run may mend, such as an old driver,
        a missing login or a missing Docker, does not fail then but appears in RV(blocked) or as a warning.
  async:
    description: Supports being used with the C(async) keyword.
    support: full
    details:
      - Set O(progress_interval=0) when the module is called without its action plugin.
options:
  images:
    description: The images.
    type: list
    elements: dict
    required: true
    suboptions:
      image:
        description: Image reference with a tag or a digest.
        type: str
        required: true
      state:
        description:
          - V(present) pulls the image where it is missing.
          - V(absent) removes its names and with them the image, unless a container uses it.
        type: str
        choices: [present, absent]
        default: present
      disk_space:
        description:
          - Space that the model's files will take in O(images[].cache_directory), for example V(20GB).
          - What is in that directory already is subtracted.
          - An image that several models run may be listed several times; the space of all of them is asked for.
        type: str
      cache_directory:
        description: Directory for the model's files, absolute. Without it, O(images[].disk_space) is asked of Docker's disk.
        type: path
      check_requirement:
        description:
          - Whether the loaded driver must meet what the image requires in C(NVIDIA_REQUIRE_CUDA).
          - Set it to V(false) only for a container that is started with C(NVIDIA_DISABLE_REQUIRE=1).
          - Nothing is required either where the container toolkit's C(config.toml) says C(disable-require = true).
        type: bool
        default: true
      profile:
        description:
          - Model profile that a service will name, by id or description. Before the pull it is looked for in the image's
            manifest, and its kind and number of GPUs, its LoRA support and, where its description names it, its memory are
            compared with the host.
          - Where the manifest cannot be had without the pull, nothing is refused for it.
        type: str
      model:
        description:
          - Name of the service that will run the image.
          - What C(NVIDIA_REQUIRE_CUDA) says of the GPUs is judged by those that the service has or names; by all of the host
            where it is not known which it will get.
        type: str
      gpus:
        description: How many GPUs that service will get; by default as many as O(images[].profile) needs.
        type: int
      gpu_names:
        description: The GPUs that service names, by index or UUID.
        type: list
        elements: str
      lora:
        description: Whether that service has LoRA adapters.
        type: bool
        default: false
      profile_memory:
        description:
          - Whether the GPUs must have the memory that the description of O(images[].profile) ends with, as those of NIM 2.x do
            (V(vllm-fp8-tp1-pp1-34.0) for 34 GB on each GPU).
          - Set it to V(false) for a service with a shorter context or other arguments of the engine, which takes less or more.
        type: bool
        default: true
  pull:
    description:
      - V(missing) pulls only what is not on the host, and keeps the digest that a tag was pinned to.
      - V(newer) asks the registry on every run what the tag stands for, and follows it.
      - V(never) fails when an image is not on the host; for hosts without a registry.
    type: str
    choices: [missing, newer, never]
    default: missing
  retries:
    description: Tries of a pull in all, when the network, the registry or the daemon fails for a moment. The pauses grow.
    type: int
    default: 5
  disk_factor:
    description: Disk space that an unpacked image takes, per byte of its download.
    type: float
    default: 3.3
  host_name:
    description: Name of the host for messages; by default the inventory's.
    type: str
  progress_interval:
    description:
      - Seconds between two lines of progress on the controller.
      - V(0) shows nothing and returns at the end.
    type: int
    default: 5
  resume:
    description: Internal; what one call of the module hands to the next one through the action plugin.
    type: dict
requirements:
  - Docker Engine on the host
seealso:
  - module: gpu_fleet.nim.nim_image_info
  - module: gpu_fleet.nim.ngc_login
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
"""

EXAMPLES = r"""
---
- name: Two models
  gpu_fleet.nim.nim_image:
    images:
      - image: nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4
        disk_space: 20GB
        cache_directory: /var/lib/nim/cache/llama
      - image: nvcr.io/nim/nvidia/nemotron-3-nano:2.0.13
  become: true

- name: From a mirror inside
  gpu_fleet.nim.nim_image:
    images:
      - image: nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4
    registry_mirrors:
      nvcr.io: mirror.example:5000/ngc
  become: true

- name: An old image is removed
  gpu_fleet.nim.nim_image:
    images:
      - image: nvcr.io/nim/meta/llama-3.1-8b-instruct:1.3.3
        state: absent
  become: true
"""

RETURN = r"""
images:
  description: The images as they are now, in the order of the option.
  returned: success
  type: list
  elements: dict
  contains:
    image:
      description: The reference, normalised.
      type: str
      returned: always
    present:
      description: Whether the image that is pinned is on the host.
      type: bool
      returned: always
    digest:
      description: Digest that the reference is pinned to; null when it is not, or when the image came from an archive.
      type: str
      returned: always
    image_id:
      description: Docker's id of the pinned image.
      type: str
      returned: always
    run:
      description: The reference to run; it names exactly the pinned image.
      type: str
      returned: always
    size:
      description: Size on disk in bytes as Docker counts it.
      type: int
      returned: always
  sample:
    - image: nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4
      present: true
      digest: sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
      image_id: sha256:fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210
      run: >-
        nvcr.io/nim/meta/llama-3.1-8b-instruct@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
      size: 14512345678
changes:
  description: What was changed, or in check mode would be.
  returned: always
  type: list
  elements: dict
blocked:
  description: Changes that were left undone, with the reason, for example the removal of an image in use.
  returned: success
  type: list
  elements: dict
reason:
  description:
    - Stable name of the failure.
    - From the registry V(no_key), V(bad_key), V(no_entitlement), V(no_such_repository), V(no_such_tag), V(legal), V(rate_limit), V(unauthorized),
      V(identity_token), V(registry_unreachable), V(tls_error), V(architecture), V(registry_error).
    - From the host V(requirement), V(invalid_requirement), V(disk_full), V(docker_unavailable), V(engine_cannot_pull), V(engine_too_old),
      V(image_in_use), V(image_missing), V(pull_stalled), V(pull_failed), V(digest_mismatch), V(job_lost),
      V(state_unreadable), V(docker_config_unreadable).
  returned: failure
  type: str
smallest_branch:
  description: With RV(reason) V(requirement), the oldest driver branch that would do; null when none is known.
  returned: failure
  type: str
  sample: "555"
finished:
  description: Whether the work is done. The action plugin calls the module until it is, and removes this key.
  returned: success
  type: bool
progress:
  description: State of the running pulls, for the action plugin, which removes it.
  returned: while not finished
  type: dict
resume:
  description: What the next call needs, for the action plugin, which removes it.
  returned: while not finished
  type: dict
"""

import platform

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_slices import advance, forecast
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import fail, render_diff, returned_changes
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_image import NimImages
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import RESOURCE_OPTIONS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import scrub


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **RESOURCE_OPTIONS["nim_image"],
            "host_name": {"type": "str"},
            "progress_interval": {"type": "int", "default": 5},
            "resume": {"type": "dict"},
        },
        supports_check_mode=True,
    )
    params = module.params
    host = Host()
    interval = params["progress_interval"]
    try:
        resource = NimImages(
            params["images"],
            pull=params["pull"],
            registry_mirrors=params["registry_mirrors"],
            api_key=params["api_key"],
            docker_user=params["docker_user"],
            retries=params["retries"],
            disk_factor=params["disk_factor"],
            host_name=params["host_name"] or platform.node() or "this host",
        )
        if module.check_mode:
            expected = forecast(host, resource)
            for warning in expected.warnings:
                module.warn(scrub(warning))
            changes, blocked = expected.changes, expected.blocked
            answer = resource.result(expected.state)
        else:
            done = advance(host, resource, params["resume"], interval if interval > 0 else None)
            if done.state is None:
                module.exit_json(changed=False, finished=False, progress=done.progress, resume=done.resume)
                return
            changes, blocked = done.changes, done.blocked
            answer = resource.result(done.state)
    except FleetError as error:
        fail(module, error)
    module.exit_json(
        changed=bool(changes),
        finished=True,
        changes=returned_changes(changes),
        blocked=returned_changes(blocked),
        diff=render_diff(changes) if module._diff else [],
        **answer,
    )


if __name__ == "__main__":
    main()
