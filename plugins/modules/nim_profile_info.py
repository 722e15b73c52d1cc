#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
---
module: nim_profile_info
short_description: Model profiles of a NIM image, and which of them this host can run
version_added: "1.0.0"
description:
  - Lists the profiles of an image and compares each with the GPUs of the host. Kind, number and memory of the GPUs and LoRA
    support are looked at.
  - What neither the listing nor the manifest says is V(null), never a guess.
  - With O(method=container), and with O(method=auto) where the image is on the host, it starts a container for some seconds. The
    container runs the image's own C(list-model-profiles) on the GPUs, without a key, and is removed afterwards; nothing of it
    stays on the host. No other module does that to look at something.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes.info
  - gpu_fleet.nim.registry
options:
  image:
    description: Image reference with a tag or a digest.
    type: str
    required: true
    aliases: [name]
  method:
    description:
      - V(container) runs the listing of the image, which must be on the host and needs a GPU. It knows what the profiles are called,
        how much memory they take, and what NIM itself says of them on these GPUs.
      - V(manifest) reads the manifest in the image, on the host or at the registry, and needs neither GPU nor key (a private
        repository needs the login). It knows ids and tags; layers of more than 8 MiB are not fetched for it.
      - V(auto) is V(container) where that is possible, and otherwise V(manifest).
    type: str
    choices: [auto, container, manifest]
    default: auto
  gpus:
    description: GPUs to compare with, as O(gpu_fleet.nim.nim_service#module:models[].gpus); all by default.
    type: raw
  profile:
    description: Id or whole description of a profile to look for; the answer is RV(match).
    type: str
  lora:
    description: Whether LoRA adapters are to be loaded.
    type: bool
    default: false
  gpu_injection:
    description: How the container gets its GPUs, as O(gpu_fleet.nim.nim_service#module:gpu_injection).
    type: str
    choices: [runtime, cdi, gpus]
    default: runtime
  environment:
    description:
      - Variables for the listing, as O(gpu_fleet.nim.nim_service#module:models[].environment). Images without a model of their own
        need C(NIM_MODEL_NAME) or C(NIM_MODEL_PATH).
    type: dict
    default: {}
  timeout:
    description: Seconds after which the listing is ended. Some images start their engine for it.
    type: int
    default: 300
seealso:
  - module: gpu_fleet.nim.nim_image_info
  - module: gpu_fleet.nim.nim_service
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
"""

EXAMPLES = r"""
---
- name: What can this host run?
  gpu_fleet.nim.nim_profile_info:
    image: nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4
  become: true
  register: nim_profiles

- name: Profiles that fit
  ansible.builtin.debug:
    msg: "{{ nim_profiles.profiles | selectattr('fits') | map(attribute='description') }}"

- name: Would this profile run here? Asked of the registry, before anything is pulled
  gpu_fleet.nim.nim_profile_info:
    image: nvcr.io/nim/nvidia/nemotron-3-nano:2.0.13
    method: manifest
    profile: vllm-bf16-tp2-pp1
  become: true
"""

RETURN = r"""
image:
  description: The image, normalised.
  returned: success
  type: str
source:
  description: Where the profiles were read, V(container), V(image) (its manifest on the host) or V(registry).
  returned: success
  type: str
family:
  description: Family of NIM images it belongs to, V(1.x), V(2.x) or V(unknown).
  returned: success
  type: str
gpus:
  description: GPUs that the profiles were compared with, with C(index), C(uuid), C(name) and C(memory_mib).
  returned: success
  type: list
  elements: dict
profiles:
  description: The profiles in the order of their source. Every value but the id is null or empty where it is not known.
  returned: success
  type: list
  elements: dict
  contains:
    id:
      description: What to set C(profile) of a model to.
      type: str
      returned: always
    description:
      description: The other name; empty in a manifest.
      type: str
      returned: always
    backend:
      description: Engine, for example V(vllm) or V(tensorrt_llm).
      type: str
      returned: always
    precision:
      description: Number format of the weights.
      type: str
      returned: always
    tp:
      description: GPUs that every layer is spread over.
      type: int
      returned: always
    pp:
      description: Stages that the layers are spread over.
      type: int
      returned: always
    gpus:
      description: How many GPUs it takes.
      type: int
      returned: always
    gpu:
      description: Kind of GPU it was built for.
      type: str
      returned: always
    gpu_device:
      description: PCI device id of that kind.
      type: str
      returned: always
    memory_gb:
      description:
        - GB that each GPU must have with the profile's own context length, as the listing or the end of its description says it.
        - A manifest has neither, so it is not known there.
      type: float
      returned: always
    reduced_memory_gb:
      description: The same with the context length of RV(profiles[].reduced_model_length).
      type: float
      returned: always
    reduced_model_length:
      description: Value for C(max_model_length) that the listing advises.
      type: int
      returned: always
    lora:
      description: Whether it can load LoRA adapters.
      type: bool
      returned: always
    buildable:
      description: Whether its engine is built on the host.
      type: bool
      returned: always
    tags:
      description: All tags that are known.
      type: dict
      returned: always
    verdict:
      description: What NIM's listing says of it, V(compatible), V(low_memory) or V(incompatible).
      type: str
      returned: always
    section:
      description: Heading of the listing that it stands under.
      type: str
      returned: always
    fits:
      description: Whether it can run on these GPUs.
      type: bool
      returned: always
    checks:
      description: What that rests on, with C(check), C(passed) and C(message).
      type: list
      elements: dict
      returned: always
match:
  description:
    - What O(profile) names, with C(found), C(certain), C(candidates) (ids), C(fits) and C(message).
    - A manifest has no descriptions; there several profiles may be meant.
  returned: success
  type: dict
reason:
  description:
    - Stable name of the error, for example V(image_missing), V(no_gpu), V(listing_failed), V(no_manifest), V(no_profiles), and those
      of M(gpu_fleet.nim.nim_image) for the registry.
  returned: failure
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import fail, succeed
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_profile_info import METHODS, ProfileInfo
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import GPU_INJECTIONS


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "image": {"type": "str", "required": True, "aliases": ["name"]},
            "method": {"type": "str", "choices": list(METHODS), "default": "auto"},
            "gpus": {"type": "raw"},
            "profile": {"type": "str"},
            "lora": {"type": "bool", "default": False},
            "gpu_injection": {"type": "str", "choices": list(GPU_INJECTIONS), "default": "runtime"},
            "environment": {"type": "dict", "default": {}},
            "timeout": {"type": "int", "default": 300},
            "api_key": {"type": "str", "no_log": True},
            "docker_user": {"type": "str", "default": "root"},
            "registry_mirrors": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    options = {name: value for name, value in module.params.items() if name != "name"}
    try:
        question = ProfileInfo(options.pop("image"), injection=options.pop("gpu_injection"), **options)
        answer = question.ask(Host())
    except FleetError as error:
        fail(module, error)
    succeed(module, answer, question.warnings)


if __name__ == "__main__":
    main()
