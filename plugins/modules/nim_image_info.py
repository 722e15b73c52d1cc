#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
---
module: nim_image_info
short_description: What the registry knows of an image before it is pulled
version_added: "1.0.0"
description:
  - Asks the registry for an image's digest, sizes, architectures, requirements and family, without pulling it and without Docker.
  - With a key (O(api_key), or the login that is stored on the host) it also tells whether the image can be had without one.
  - When the registry refuses, says exactly why. A key that is missing, wrong or not entitled, a repository or tag that does not
    exist, a limit, the network and TLS are told apart.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes.info
  - gpu_fleet.nim.registry
options:
  image:
    description: Image reference with a tag or a digest.
    type: str
    required: true
    aliases: [name]
  architecture:
    description: Architecture to look for, as image manifests name it, for example V(amd64) or V(arm64). By default the host's.
    type: str
seealso:
  - module: gpu_fleet.nim.nim_image
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
"""

EXAMPLES = r"""
---
- name: What is behind the tag?
  gpu_fleet.nim.nim_image_info:
    image: nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4
  become: true
  register: nim_llama

- name: Size of the download
  ansible.builtin.debug:
    msg: "{{ nim_llama.image.compressed_size | human_readable if nim_llama.exists else nim_llama.message }}"
"""

RETURN = r"""
exists:
  description: Whether the registry hands the image out to this host.
  returned: success
  type: bool
image:
  description: The image as the registry describes it; null when RV(exists) is false.
  returned: success
  type: dict
  contains:
    reference:
      description: The reference at the place that was asked.
      type: str
      returned: always
    digest:
      description: Digest that a pull by this reference would record.
      type: str
      returned: always
    platform_digest:
      description: Digest of the manifest for the architecture.
      type: str
      returned: always
    architecture:
      description: Architecture of that manifest.
      type: str
      returned: always
    architectures:
      description: All architectures on offer.
      type: list
      elements: str
      returned: always
    compressed_size:
      description: Bytes to download for the architecture.
      type: int
      returned: always
    compressed_sizes:
      description: Bytes to download for each architecture on offer.
      type: dict
      returned: always
      sample: {amd64: 7341209600, arm64: 7012345678}
    with_key:
      description: Whether the registry was asked with a login.
      type: bool
      returned: always
    public:
      description: Whether the registry hands the image out without a login too; null when it did not say.
      type: bool
      returned: always
    created:
      description: Time stamp of the build as the image states it.
      type: str
      returned: always
    cuda_version:
      description: CUDA_VERSION in the image's environment; null when absent.
      type: str
      returned: always
    require_cuda:
      description: NVIDIA_REQUIRE_CUDA in the image's environment; null when absent.
      type: str
      returned: always
    family:
      description: Family of NIM images it belongs to, V(1.x), V(2.x), V(native) or V(unknown).
      type: str
      returned: always
    labels:
      description: Labels of the image.
      type: dict
      returned: always
status:
  description: HTTP status of the registry's refusal, for example 401, 402, 403, 404, 429 or 451; null where it gave none.
  returned: success
  type: int
reason:
  description: Why the registry does not hand it out; null when RV(exists) is true. See M(gpu_fleet.nim.nim_image) for the names.
  returned: always
  type: str
message:
  description: The reason as one sentence with a remedy; empty when RV(exists) is true.
  returned: success
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_lookup import REGISTRY_REASONS, look_up
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import fail, succeed


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "image": {"type": "str", "required": True, "aliases": ["name"]},
            "api_key": {"type": "str", "no_log": True},
            "docker_user": {"type": "str", "default": "root"},
            "registry_mirrors": {"type": "dict", "default": {}},
            "architecture": {"type": "str"},
        },
        supports_check_mode=True,
    )
    image, reason, message, status = None, None, "", None
    try:
        # The alias is among the parameters too.
        image = look_up(Host(), **{name: value for name, value in module.params.items() if name != "name"})
    except FleetError as error:
        if error.reason not in REGISTRY_REASONS:
            fail(module, error)
        reason, message, status = error.reason, error.message, error.facts.get("status")
    found = {"exists": image is not None, "image": image, "reason": reason, "message": message, "status": status}
    succeed(module, found)


if __name__ == "__main__":
    main()
