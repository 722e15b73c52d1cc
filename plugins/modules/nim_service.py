#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Thin shell around the services of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nim_service
short_description: Run NVIDIA NIM containers as systemd services
version_added: "1.0.0"
description:
  - Makes every model in the list a systemd service C(nim-NAME.service) that runs one container C(nim-NAME).
  - All models of a host belong into one call, because GPUs and ports are given out among them. Services that are on the
    host but not in the list are reported and left alone; their GPUs count as taken.
  - A service is restarted only when what its container runs has changed. A container that runs already what is wanted is
    kept, over restarts of Docker and of the service's own main process too.
  - The image must be on the host; M(gpu_fleet.nim.nim_image) pulls and pins it. Containers are created from the pinned
    digest and with the GPUs' UUIDs.
  - With a key, the files of the model are fetched by a short-lived container C(nim-NAME-download), and the service itself
    runs without the key. Without a key the service fetches public files by itself.
  - Does not wait until the model answers; M(gpu_fleet.nim.nim_health) does.
  - While C(/var/lib/nim/maintenance) exists on the host no service is started.
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
options:
  models:
    description: All models of the host.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the service; at most 60 letters, digits, C(-), C(_) and C(.).
        type: str
        required: true
      image:
        description: Image as registry/repository with tag or digest.
        type: str
        required: true
      gpus:
        description:
          - How many GPUs (a number), which (a list of indices or UUIDs; MIG devices by their UUIDs), or V(all).
          - By default as many as O(models[].profile) needs (its tp times its pp, as far as they are known), else one.
          - A model that was given GPUs by number keeps them as long as nobody names them and they have enough memory. It is
            given whole GPUs that are fit for service and that nobody else computes on, and of those the ones that NVLink or the
            same part of the machine connects.
          - A model that serves on a GPU that is no longer fit stays there, with a warning; one that does not run moves to
            another.
        type: raw
      port:
        description: TCP port on the host.
        type: int
        default: 8000
      bind_address:
        description: Address of the host on which the port is published.
        type: str
        default: "0.0.0.0"
      cache_directory:
        description:
          - Directory of the host for model files and engines; C(/var/lib/nim/cache/NAME) by default.
          - It is created for the container's user, and never removed by this module.
        type: str
      shm_size:
        description: Shared memory with a unit, counted as Docker does.
        type: str
        default: 16GB
      ulimits:
        description: Limits of the container's processes; a number, C(soft:hard), or V(-1) for no limit.
        type: dict
        default:
          nofile: 65536
          memlock: -1
          stack: 67108864
      environment:
        description:
          - Further environment variables. Those that another option sets are refused, and so is everything that looks
            like a secret, because the values are stored readable on the host; O(models[].secret_environment) takes it.
        type: dict
        default: {}
      secret_environment:
        description:
          - Further environment variables with secrets, such as V(HF_TOKEN). They are stored in C(/etc/nim/NAME.env),
            readable for root alone, and given to the container that fetches files and to the service by that file.
          - Another value restarts this model and no other. Differences show names and keyed fingerprints.
          - Who may use Docker on the host can read them with C(docker inspect), as with every container.
          - Ansible blanks out these values wherever they occur in its output, so put only secrets here.
        type: dict
        default: {}
      profile:
        description: Model profile, as its 64-digit id or its description; chosen by NIM when left out.
        type: str
      served_model_name:
        description: Name of the model in the API; several are separated by commas.
        type: str
      weights_directory:
        description: Directory of the host with fine-tuned weights in Hugging Face format, mounted read-only.
        type: str
      custom_model_name:
        description: Name under which a locally built engine is cached (1.x), or of the model in the API (2.x).
        type: str
      lora_directory:
        description: Directory of the host with one directory a LoRA adapter, mounted read-only.
        type: str
      lora_refresh_interval:
        description: Seconds between two looks at O(models[].lora_directory).
        type: int
      max_model_length:
        description: Context length in tokens.
        type: int
      network_mode:
        description: V(bridge), V(host), or the name of a Docker network.
        type: str
        default: bridge
      user:
        description: Numeric UID or UID:GID of the container's process, and owner of its cache.
        type: str
        default: "1000:1000"
      read_only:
        description:
          - Whether the container's root file system is read-only, so that the service can write to its cache and to
            O(models[].tmpfs) alone. It goes for the container that fetches files, too.
          - NVIDIA does not say which images run like that. Try it with yours; C(HOME) set to V(/tmp) in
            O(models[].environment) helps programs that write to their home.
        type: bool
        default: false
      tmpfs:
        description: Directories of a read-only container that are kept in the memory of the host.
        type: list
        elements: str
        default: [/tmp]
      engine_arguments:
        description: Further arguments of the inference engine, one entry each.
        type: list
        elements: str
        default: []
      start_timeout:
        description: Seconds that a start may take; the limit of failed starts is derived from it.
        type: int
        default: 1800
      stop_timeout:
        description: Seconds between the request to stop and the kill.
        type: int
        default: 60
      disk_space:
        description:
          - Free space that the model needs beside the image, with a unit; checked by M(gpu_fleet.nim.nim_image), and again
            before a service is started whose model was not fetched yet.
        type: str
      gpu_memory:
        description:
          - Memory that must be free on each GPU of the model, with a unit, for example V(80GB). Checked before the service is
            started; what its own container holds counts as free.
          - A GPU that does not tell its memory, as those with unified memory, is not refused.
        type: str
      completion:
        description: What M(gpu_fleet.nim.nim_health) asks of the ready model.
        type: str
        choices: [auto, chat, completion, none]
        default: auto
      state:
        description:
          - V(started) runs it now and at boot.
          - V(stopped) stops it and keeps it from starting at boot; it keeps its port and GPUs.
          - V(absent) removes service and container; the cache stays.
        type: str
        choices: [started, stopped, absent]
        default: started
  ngc_api_key:
    description:
      - NGC key for fetching model files; stored in C(/etc/nim/ngc.env), readable for root alone.
      - Left out or empty, a stored key is left alone. Another key replaces the stored one and restarts nothing that runs.
    type: str
  ngc_key_state:
    description: V(absent) removes the stored key.
    type: str
    choices: [present, absent]
    default: present
  state:
    description:
      - V(absent) stops and removes every service of the host, listed in O(models) or not, and everything that this module
        has written, the stored key too. Model caches stay.
    type: str
    choices: [present, absent]
    default: present
  gpu_injection:
    description:
      - How containers get their GPUs. V(runtime) uses the C(nvidia) runtime with C(NVIDIA_VISIBLE_DEVICES).
      - V(cdi) uses CDI devices and needs Docker 28.2 or newer, or Docker 25 with its CDI feature switched on.
      - V(gpus) uses C(docker run --gpus).
    type: str
    choices: [runtime, cdi, gpus]
    default: runtime
  gpu_health:
    description:
      - With V(enforce) no service is started on a GPU that is not fit for it, for example because bad memory waits for a reset
        or the driver asks for one. With V(warn) it is, with a warning. What runs already is left alone, with a warning too.
      - A GPU that does not tell its condition is not refused.
    type: str
    choices: [enforce, warn]
    default: enforce
seealso:
  - module: gpu_fleet.nim.nim_image
  - module: gpu_fleet.nim.nim_health
"""

EXAMPLES = r"""
- name: Serve two models side by side
  gpu_fleet.nim.nim_service:
    models:
      - name: llama
        image: nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4
        gpus: 1
      - name: qwen
        image: nvcr.io/nim/qwen/qwen2.5-7b-instruct:1.8.4
        gpus: [1]
        port: 8001
        served_model_name: qwen
    ngc_api_key: "{{ ngc_api_key }}"
  become: true

- name: Serve a model of Hugging Face that needs a token
  gpu_fleet.nim.nim_service:
    models:
      - name: gated
        image: nvcr.io/nim/nvidia/llm-nim:1.12.0
        environment:
          NIM_MODEL_NAME: hf://meta-llama/Llama-3.1-8B-Instruct
        secret_environment:
          HF_TOKEN: "{{ vault_hf_token }}"
  become: true

- name: Serve fine-tuned weights on the base model's image
  gpu_fleet.nim.nim_service:
    models:
      - name: support-bot
        image: nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4
        weights_directory: /srv/models/support-bot
        served_model_name: support-bot
        start_timeout: 3600
  become: true

- name: Take every NIM service off the host, but not the model caches
  gpu_fleet.nim.nim_service:
    models: []
    state: absent
  become: true
"""

RETURN = r"""
services:
  description: One entry a model, in the order given.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the model.
      type: str
    unit:
      description: Name of the systemd unit.
      type: str
    container:
      description: Name of the container.
      type: str
    image:
      description: Image as given.
      type: str
    digest:
      description: Digest of the image that runs; empty when the image is not on the host.
      type: str
    gpus:
      description: UUIDs of its GPUs.
      type: list
      elements: str
    port:
      description: TCP port on the host.
      type: int
    spec:
      description: Name of what the container runs; another value means that it will be restarted.
      type: str
    state:
      description: V(started), V(starting), V(stopped), V(failed), V(maintenance) or V(absent).
      type: str
    url:
      description: Base URL at which the host itself reaches the service.
      type: str
orphans:
  description: Services of this collection that are on the host but not in the list.
  returned: success
  type: list
  elements: dict
changes:
  description: What was changed, or would be in check mode, with reason and disruption.
  returned: always
  type: list
  elements: dict
blocked:
  description: Changes that were left because the host is under maintenance.
  returned: success
  type: list
  elements: dict
reason:
  description: Stable name of the error, for example V(port_in_use), V(gpus_unavailable) or V(row_remap_pending).
  returned: failure
  type: str
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import run_resource
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import parse_models
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_service import NimService
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_service_state import HostState
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import RESOURCE_OPTIONS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import scrub


def main() -> None:
    module = AnsibleModule(
        # The line in the host's log of what a module was called with: there Ansible looks for secrets in the text of the
        # whole list, where their quotes and backslashes are escaped, and would miss those.
        no_log=True,
        argument_spec=RESOURCE_OPTIONS["nim_service"],
        supports_check_mode=True,
    )
    for entry in module.params["models"]:
        # Also where they were given as text, which Ansible turns into a dictionary after it has noted what is secret.
        module.no_log_values.update(str(value) for value in (entry.get("secret_environment") or {}).values() if value)
    made: list[NimService] = []

    def build() -> NimService:
        made.append(
            NimService(
                parse_models(module.params["models"], variable="models"),
                key=module.params["ngc_api_key"],
                key_state=module.params["ngc_key_state"],
                injection=module.params["gpu_injection"],
                health=module.params["gpu_health"],
                remove_all=module.params["state"] == "absent",
            )
        )
        return made[0]

    def result(state: HostState) -> dict[str, t.Any]:
        answer = made[0].result(state)
        for warning in answer.pop("warnings"):
            module.warn(scrub(warning))
        return answer

    run_resource(module, build, result)


if __name__ == "__main__":
    main()
