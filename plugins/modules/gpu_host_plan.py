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
options:
  nvidia_driver:
    description: What is wanted, with the options of M(gpu_fleet.nim.nvidia_driver).
    type: dict
    suboptions:
      source:
        description: As O(gpu_fleet.nim.nvidia_driver#module:source).
        type: str
        choices: [nvidia, distribution]
        default: nvidia
      repository_url:
        description: As O(gpu_fleet.nim.nvidia_driver#module:repository_url).
        type: str
        default: https://developer.download.nvidia.com/compute/cuda/repos
      repository_architecture:
        description: As O(gpu_fleet.nim.nvidia_driver#module:repository_architecture).
        type: str
        default: ""
      branch:
        description: As O(gpu_fleet.nim.nvidia_driver#module:branch).
        type: str
        default: "580"
      version:
        description: As O(gpu_fleet.nim.nvidia_driver#module:version).
        type: str
        default: ""
      flavour:
        description: As O(gpu_fleet.nim.nvidia_driver#module:flavour).
        type: str
        choices: [auto, open, proprietary]
        default: auto
      fabric_manager:
        description: As O(gpu_fleet.nim.nvidia_driver#module:fabric_manager).
        type: str
        choices: [auto, present, absent]
        default: auto
      imex:
        description: As O(gpu_fleet.nim.nvidia_driver#module:imex).
        type: str
        choices: [auto, present, absent]
        default: auto
      persistenced:
        description: As O(gpu_fleet.nim.nvidia_driver#module:persistenced).
        type: bool
        default: true
      hold:
        description: As O(gpu_fleet.nim.nvidia_driver#module:hold).
        type: bool
        default: true
      kernel_headers:
        description: As O(gpu_fleet.nim.nvidia_driver#module:kernel_headers).
        type: bool
        default: true
      kernel_module:
        description: As O(gpu_fleet.nim.nvidia_driver#module:kernel_module).
        type: bool
        default: true
      secure_boot:
        description: As O(gpu_fleet.nim.nvidia_driver#module:secure_boot).
        type: str
        choices: [check, enrolled]
        default: check
      unload:
        description: As O(gpu_fleet.nim.nvidia_driver#module:unload).
        type: bool
        default: true
  nvidia_driver_reload:
    description: What is wanted, with the options of M(gpu_fleet.nim.nvidia_driver_reload).
    type: dict
    suboptions:
      expected_version:
        description: As O(gpu_fleet.nim.nvidia_driver_reload#module:expected_version).
        type: str
        default: ""
  docker_engine:
    description: What is wanted, with the options of M(gpu_fleet.nim.docker_engine).
    type: dict
    suboptions:
      package_source:
        description: As O(gpu_fleet.nim.docker_engine#module:package_source).
        type: str
        choices: [docker, distribution]
        default: docker
      repository_url:
        description: As O(gpu_fleet.nim.docker_engine#module:repository_url).
        type: str
        default: https://download.docker.com/linux
      version:
        description: As O(gpu_fleet.nim.docker_engine#module:version).
        type: str
        default: ""
      minimum_version:
        description: As O(gpu_fleet.nim.docker_engine#module:minimum_version).
        type: str
        default: 23.0.1
      hold:
        description: As O(gpu_fleet.nim.docker_engine#module:hold).
        type: bool
        default: true
      sdk:
        description: As O(gpu_fleet.nim.docker_engine#module:sdk).
        type: bool
        default: true
  docker_daemon:
    description: What is wanted, with the options of M(gpu_fleet.nim.docker_daemon).
    type: dict
    suboptions:
      options:
        description: As O(gpu_fleet.nim.docker_daemon#module:options).
        type: dict
        default: {}
      absent:
        description: As O(gpu_fleet.nim.docker_daemon#module:absent).
        type: list
        elements: str
        default: []
      live_restore:
        description: As O(gpu_fleet.nim.docker_daemon#module:live_restore).
        type: bool
      config_file:
        description: As O(gpu_fleet.nim.docker_daemon#module:config_file).
        type: path
  docker_group:
    description: What is wanted, with the options of M(gpu_fleet.nim.docker_group).
    type: dict
    suboptions:
      users:
        description: As O(gpu_fleet.nim.docker_group#module:users).
        type: list
        elements: str
        required: true
  nvidia_container_toolkit:
    description: What is wanted, with the options of M(gpu_fleet.nim.nvidia_container_toolkit).
    type: dict
    suboptions:
      repository_url:
        description: As O(gpu_fleet.nim.nvidia_container_toolkit#module:repository_url).
        type: str
        default: https://nvidia.github.io/libnvidia-container
      version:
        description: As O(gpu_fleet.nim.nvidia_container_toolkit#module:version).
        type: str
        default: ""
      mode:
        description: As O(gpu_fleet.nim.nvidia_container_toolkit#module:mode).
        type: str
        choices: [auto, legacy, cdi, jit-cdi, csv]
        default: auto
      default_runtime:
        description: As O(gpu_fleet.nim.nvidia_container_toolkit#module:default_runtime).
        type: bool
        default: false
      cdi:
        description: As O(gpu_fleet.nim.nvidia_container_toolkit#module:cdi).
        type: bool
        default: false
      hold:
        description: As O(gpu_fleet.nim.nvidia_container_toolkit#module:hold).
        type: bool
        default: true
      smoke_test:
        description: As O(gpu_fleet.nim.nvidia_container_toolkit#module:smoke_test).
        type: bool
        default: true
      injection:
        description: As O(gpu_fleet.nim.nvidia_container_toolkit#module:injection).
        type: str
        choices: [runtime, cdi, gpus]
        default: runtime
  ngc_login:
    description: What is wanted, with the options of M(gpu_fleet.nim.ngc_login).
    type: dict
    suboptions:
      api_key:
        description: As O(gpu_fleet.nim.ngc_login#module:api_key).
        type: str
      registry:
        description: As O(gpu_fleet.nim.ngc_login#module:registry).
        type: str
        default: nvcr.io
      username:
        description: As O(gpu_fleet.nim.ngc_login#module:username).
        type: str
        default: $oauthtoken
      docker_user:
        description: As O(gpu_fleet.nim.ngc_login#module:docker_user).
        type: str
        default: root
      state:
        description: As O(gpu_fleet.nim.ngc_login#module:state).
        type: str
        choices: [present, absent]
        default: present
      check_repository:
        description: As O(gpu_fleet.nim.ngc_login#module:check_repository).
        type: str
        default: ""
      validate:
        description: As O(gpu_fleet.nim.ngc_login#module:validate).
        type: str
        choices: [on_change, always, never]
        default: on_change
  nim_image:
    description: What is wanted, with the options of M(gpu_fleet.nim.nim_image).
    type: dict
    suboptions:
      images:
        description: As O(gpu_fleet.nim.nim_image#module:images).
        type: list
        elements: dict
        required: true
        suboptions:
          image:
            description: As O(gpu_fleet.nim.nim_image#module:images[].image).
            type: str
            required: true
          state:
            description: As O(gpu_fleet.nim.nim_image#module:images[].state).
            type: str
            choices: [present, absent]
            default: present
          disk_space:
            description: As O(gpu_fleet.nim.nim_image#module:images[].disk_space).
            type: str
          cache_directory:
            description: As O(gpu_fleet.nim.nim_image#module:images[].cache_directory).
            type: path
          check_requirement:
            description: As O(gpu_fleet.nim.nim_image#module:images[].check_requirement).
            type: bool
            default: true
      pull:
        description: As O(gpu_fleet.nim.nim_image#module:pull).
        type: str
        choices: [missing, newer, never]
        default: missing
      registry_mirrors:
        description: As O(gpu_fleet.nim.nim_image#module:registry_mirrors).
        type: dict
        default: {}
      api_key:
        description: As O(gpu_fleet.nim.nim_image#module:api_key).
        type: str
      docker_user:
        description: As O(gpu_fleet.nim.nim_image#module:docker_user).
        type: str
        default: root
      retries:
        description: As O(gpu_fleet.nim.nim_image#module:retries).
        type: int
        default: 5
      disk_factor:
        description: As O(gpu_fleet.nim.nim_image#module:disk_factor).
        type: float
        default: 3.3
  nim_service:
    description: What is wanted, with the options of M(gpu_fleet.nim.nim_service).
    type: dict
    suboptions:
      models:
        description: As O(gpu_fleet.nim.nim_service#module:models).
        type: list
        elements: dict
        required: true
        suboptions:
          name:
            description: As O(gpu_fleet.nim.nim_service#module:models[].name).
            type: str
            required: true
          image:
            description: As O(gpu_fleet.nim.nim_service#module:models[].image).
            type: str
            required: true
          gpus:
            description: As O(gpu_fleet.nim.nim_service#module:models[].gpus).
            type: raw
            default: 1
          port:
            description: As O(gpu_fleet.nim.nim_service#module:models[].port).
            type: int
            default: 8000
          bind_address:
            description: As O(gpu_fleet.nim.nim_service#module:models[].bind_address).
            type: str
            default: "0.0.0.0"
          cache_directory:
            description: As O(gpu_fleet.nim.nim_service#module:models[].cache_directory).
            type: str
          shm_size:
            description: As O(gpu_fleet.nim.nim_service#module:models[].shm_size).
            type: str
            default: 16GB
          ulimits:
            description: As O(gpu_fleet.nim.nim_service#module:models[].ulimits).
            type: dict
            default:
              nofile: 65536
              memlock: -1
              stack: 67108864
          environment:
            description: As O(gpu_fleet.nim.nim_service#module:models[].environment).
            type: dict
            default: {}
          secret_environment:
            description: As O(gpu_fleet.nim.nim_service#module:models[].secret_environment).
            type: dict
            default: {}
          profile:
            description: As O(gpu_fleet.nim.nim_service#module:models[].profile).
            type: str
          served_model_name:
            description: As O(gpu_fleet.nim.nim_service#module:models[].served_model_name).
            type: str
          weights_directory:
            description: As O(gpu_fleet.nim.nim_service#module:models[].weights_directory).
            type: str
          custom_model_name:
            description: As O(gpu_fleet.nim.nim_service#module:models[].custom_model_name).
            type: str
          lora_directory:
            description: As O(gpu_fleet.nim.nim_service#module:models[].lora_directory).
            type: str
          lora_refresh_interval:
            description: As O(gpu_fleet.nim.nim_service#module:models[].lora_refresh_interval).
            type: int
          max_model_length:
            description: As O(gpu_fleet.nim.nim_service#module:models[].max_model_length).
            type: int
          network_mode:
            description: As O(gpu_fleet.nim.nim_service#module:models[].network_mode).
            type: str
            default: bridge
          user:
            description: As O(gpu_fleet.nim.nim_service#module:models[].user).
            type: str
            default: "1000:1000"
          engine_arguments:
            description: As O(gpu_fleet.nim.nim_service#module:models[].engine_arguments).
            type: list
            elements: str
            default: []
          start_timeout:
            description: As O(gpu_fleet.nim.nim_service#module:models[].start_timeout).
            type: int
            default: 1800
          stop_timeout:
            description: As O(gpu_fleet.nim.nim_service#module:models[].stop_timeout).
            type: int
            default: 60
          disk_space:
            description: As O(gpu_fleet.nim.nim_service#module:models[].disk_space).
            type: str
          completion:
            description: As O(gpu_fleet.nim.nim_service#module:models[].completion).
            type: str
            choices: [auto, chat, completion, none]
            default: auto
          state:
            description: As O(gpu_fleet.nim.nim_service#module:models[].state).
            type: str
            choices: [started, stopped, absent]
            default: started
      ngc_api_key:
        description: As O(gpu_fleet.nim.nim_service#module:ngc_api_key).
        type: str
      ngc_key_state:
        description: As O(gpu_fleet.nim.nim_service#module:ngc_key_state).
        type: str
        choices: [present, absent]
        default: present
      state:
        description: As O(gpu_fleet.nim.nim_service#module:state).
        type: str
        choices: [present, absent]
        default: present
      gpu_injection:
        description: As O(gpu_fleet.nim.nim_service#module:gpu_injection).
        type: str
        choices: [runtime, cdi, gpus]
        default: runtime
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

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_engine import (
    DEFAULT_REPOSITORY as DOCKER_REPOSITORY,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_engine import MINIMUM_VERSION
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_plan import CHAIN, plan_host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import fail
from ansible_collections.gpu_fleet.nim.plugins.module_utils._ngc_login import (
    USERNAME,
    VALIDATE_ALWAYS,
    VALIDATE_NEVER,
    VALIDATE_ON_CHANGE,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import NIM_MODEL_OPTIONS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_container_toolkit import (
    DEFAULT_REPOSITORY as TOOLKIT_REPOSITORY,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_container_toolkit import INJECTIONS, MODES
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_packages import DEFAULT_REPOSITORY_URL

#: The options of each module that have a part in the plan.
OPTIONS: dict[str, dict[str, t.Any]] = {
    "nvidia_driver": {
        "source": {"type": "str", "choices": ["nvidia", "distribution"], "default": "nvidia"},
        "repository_url": {"type": "str", "default": DEFAULT_REPOSITORY_URL},
        "repository_architecture": {"type": "str", "default": ""},
        "branch": {"type": "str", "default": "580"},
        "version": {"type": "str", "default": ""},
        "flavour": {"type": "str", "choices": ["auto", "open", "proprietary"], "default": "auto"},
        "fabric_manager": {"type": "str", "choices": ["auto", "present", "absent"], "default": "auto"},
        "imex": {"type": "str", "choices": ["auto", "present", "absent"], "default": "auto"},
        "persistenced": {"type": "bool", "default": True},
        "hold": {"type": "bool", "default": True},
        "kernel_headers": {"type": "bool", "default": True},
        "kernel_module": {"type": "bool", "default": True},
        "secure_boot": {"type": "str", "choices": ["check", "enrolled"], "default": "check"},
        "unload": {"type": "bool", "default": True},
    },
    "nvidia_driver_reload": {
        "expected_version": {"type": "str", "default": ""},
    },
    "docker_engine": {
        "package_source": {"type": "str", "choices": ["docker", "distribution"], "default": "docker"},
        "repository_url": {"type": "str", "default": DOCKER_REPOSITORY},
        "version": {"type": "str", "default": ""},
        "minimum_version": {"type": "str", "default": MINIMUM_VERSION},
        "hold": {"type": "bool", "default": True},
        "sdk": {"type": "bool", "default": True},
    },
    "docker_daemon": {
        "options": {"type": "dict", "default": {}},
        "absent": {"type": "list", "elements": "str", "default": []},
        "live_restore": {"type": "bool"},
        "config_file": {"type": "path"},
    },
    "docker_group": {
        "users": {"type": "list", "elements": "str", "required": True},
    },
    "nvidia_container_toolkit": {
        "repository_url": {"type": "str", "default": TOOLKIT_REPOSITORY},
        "version": {"type": "str", "default": ""},
        "mode": {"type": "str", "choices": list(MODES), "default": "auto"},
        "default_runtime": {"type": "bool", "default": False},
        "cdi": {"type": "bool", "default": False},
        "hold": {"type": "bool", "default": True},
        "smoke_test": {"type": "bool", "default": True},
        "injection": {"type": "str", "choices": list(INJECTIONS), "default": "runtime"},
    },
    "ngc_login": {
        "api_key": {"type": "str", "no_log": True},
        "registry": {"type": "str", "default": "nvcr.io"},
        "username": {"type": "str", "default": USERNAME},
        "docker_user": {"type": "str", "default": "root"},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        "check_repository": {"type": "str", "default": ""},
        "validate": {
            "type": "str",
            "choices": [VALIDATE_ON_CHANGE, VALIDATE_ALWAYS, VALIDATE_NEVER],
            "default": VALIDATE_ON_CHANGE,
        },
    },
    "nim_image": {
        "images": {
            "type": "list",
            "elements": "dict",
            "required": True,
            "options": {
                "image": {"type": "str", "required": True},
                "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
                "disk_space": {"type": "str"},
                "cache_directory": {"type": "path"},
                "check_requirement": {"type": "bool", "default": True},
            },
        },
        "pull": {"type": "str", "choices": ["missing", "newer", "never"], "default": "missing"},
        "registry_mirrors": {"type": "dict", "default": {}},
        "api_key": {"type": "str", "no_log": True},
        "docker_user": {"type": "str", "default": "root"},
        "retries": {"type": "int", "default": 5},
        "disk_factor": {"type": "float", "default": 3.3},
    },
    "nim_service": {
        "models": {"type": "list", "elements": "dict", "required": True, "options": NIM_MODEL_OPTIONS},
        "ngc_api_key": {"type": "str", "no_log": True},
        "ngc_key_state": {"type": "str", "choices": ["present", "absent"], "default": "present", "no_log": False},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        "gpu_injection": {"type": "str", "choices": ["runtime", "cdi", "gpus"], "default": "runtime"},
    },
}


def main() -> None:
    module = AnsibleModule(
        # The line in the host's log of what a module was called with: there Ansible looks for secrets in the text of the
        # whole dictionary, where their quotes and backslashes are escaped, and would miss those.
        no_log=True,
        argument_spec={name: {"type": "dict", "options": OPTIONS[name]} for name in CHAIN},
        required_one_of=[CHAIN],
        supports_check_mode=True,
    )
    for entry in (module.params["nim_service"] or {}).get("models") or []:
        # Also where they were given as text, which Ansible turns into a dictionary after it has noted what is secret.
        module.no_log_values.update(str(value) for value in (entry.get("secret_environment") or {}).values() if value)
    try:
        found = plan_host(Host(), module.params)
    except FleetError as error:
        fail(module, error)
    module.exit_json(changed=False, **found.result())


if __name__ == "__main__":
    main()
