#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Thin shell around the health check."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nim_health
short_description: Wait until NIM services answer, or say why they never will
version_added: "1.0.0"
description:
  - Waits for all given NIM services of a host at once and shows on the controller, one line a host, in which phase each
    of them is (download, building the engine, loading, …), for how long, and how often it was restarted.
  - Asks from the host itself C(/v1/health/ready) on the published port, the systemd unit, the container and its log. The
    image needs no curl.
  - Reads the container's log, the errors of Docker and the kernel log meanwhile. Ends within 5 seconds of the line that
    decides it, also while the container still runs, and at once when a container ended, loops, or its unit failed, with the
    last lines of its log. Where the log holds a text that is known, the message names cause and remedy.
  - "What looks like an error and is none does not end the wait. For a message that only says that something went wrong, the
    line behind it is looked for."
  - When a service is ready, checks that the model that answers is the one that was asked for, and sends one short
    completion. The completion is sent once for each start of the container.
  - Changes nothing; what is measured is noted in C(/run/gpu_fleet/health).
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
extends_documentation_fragment:
  - gpu_fleet.nim.attributes.info
attributes:
  check_mode:
    details: In check mode the module reports what it sees without waiting and never fails for a service that is not ready.
options:
  models:
    description:
      - Entries of C(nim_models), or mappings of the same form. Entries whose C(state) is not V(started) are left out.
      - "Used are C(name) (required), C(port) (default 8000), C(bind_address), C(start_timeout) (seconds, default 1800),
        C(served_model_name) or C(custom_model_name) (names that the service must offer), C(completion), C(environment)
        (V(NIM_SSL_MODE=tls) makes it ask with TLS) and C(cache_directory); every other key is ignored."
      - "C(completion) is V(auto) (chat, and plain completion for a model without a chat template), V(chat),
        V(completion) or V(none)."
    type: list
    elements: dict
    required: true
  failure_signatures:
    description:
      - Texts of the user's own that explain a failure, in the form of C(nim_failure_signatures) of the role
        P(gpu_fleet.nim.nim#role).
      - "Each has C(id), C(pattern) (a regular expression of Python), C(cause) and C(remedy), and may have C(where)
        (V(container), V(docker), V(host) for the kernel log, or V(registry); default V(container)), C(harmless),
        C(umbrella) (counts only when nothing else is found), C(passing) (a start may survive it, so it does not end the
        wait) and C(sample) (a line that the pattern must match)."
      - They come before those of the collection, and replace the one whose C(id) they use.
    type: list
    elements: dict
    default: []
  wait:
    description: Whether to wait. With V(false) the module looks once, reports, and does not fail.
    type: bool
    default: true
  progress_interval:
    description:
      - Seconds between two lines of progress on the controller. The module returns to the controller this often while
        it waits.
      - V(0) waits in one go without showing anything; asynchronous tasks always do.
    type: int
    default: 5
  resume:
    description: What an earlier, interrupted call returned. Set by the action plugin; leave it alone.
    type: dict
seealso:
  - module: gpu_fleet.nim.nim_service
"""

EXAMPLES = r"""
- name: Wait for all models of the host
  gpu_fleet.nim.nim_health:
    models: "{{ nim_models }}"
  become: true

- name: Wait for one model for an hour at most and send no request to it
  gpu_fleet.nim.nim_health:
    models:
      - name: llama-3-1-8b
        port: 8000
        start_timeout: 3600
        completion: none
  become: true

- name: Explain a failure that only this site knows
  gpu_fleet.nim.nim_health:
    models: "{{ nim_models }}"
    failure_signatures:
      - id: site-quota
        pattern: 'quota exceeded for \S+'
        cause: the team's quota on the model store is used up
        remedy: ask the storage team
  become: true

- name: See how things are without waiting
  gpu_fleet.nim.nim_health:
    models: "{{ nim_models }}"
    wait: false
  become: true
  register: health
"""

RETURN = r"""
ready:
  description: Whether all services are ready.
  returned: always
  type: bool
  sample: true
models:
  description: One entry a service, in the order given.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the model.
      type: str
    ready:
      description: Whether it is ready and is the model that was asked for.
      type: bool
    phase:
      description: V(starting), V(profile), V(download), V(build), V(engine), V(loading), V(graphs), V(serving), V(ready) or V(failed).
      type: str
    seconds_to_ready:
      description: Seconds from the start of the container until it was ready, if that was seen.
      type: float
    restarts:
      description: How often systemd has restarted the unit by itself since it was last started.
      type: int
    url:
      description: Where the host itself reaches the service.
      type: str
    model_id:
      description: Name of the model in the API.
      type: str
    models:
      description: All names that the service offers, LoRA adapters included.
      type: list
      elements: str
    version:
      description: Release of the NIM.
      type: str
    profile:
      description: Profile that the NIM chose, where it says so.
      type: str
    metrics_url:
      description: Where Prometheus can scrape the service; null when it offers no metrics.
      type: str
    gpus:
      description: "The GPUs and MIG devices that a ready service was given: C(index), C(uuid), C(memory_used_mib) and
        C(memory_total_mib), null where the driver does not tell."
      type: list
      elements: dict
    completion:
      description: "The completion that was sent: C(kind), C(ok), C(text), C(seconds) and C(note)."
      type: dict
    reason:
      description: "Why it is not ready: V(container_ended), V(restart_loop), V(start_failed), V(unit_failed), V(unit_missing),
        V(not_running), V(maintenance), V(wrong_server), V(wrong_model), V(completion_failed), V(docker_unavailable),
        V(start_timeout)."
      type: str
    message:
      description: The same as a sentence.
      type: str
reason:
  description: Reason of the first service that failed.
  returned: failure
  type: str
  sample: container_ended
last_lines:
  description: The last lines of the log of the first service that failed, without secrets.
  returned: failure
  type: list
  elements: str
signature:
  description: Identifier of the known failure that was recognised in the log.
  returned: failure
  type: str
  sample: eng-21a
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_api import DockerApi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._health_target import parse_targets
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import fail
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_health import HealthCheck
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import RESOURCE_OPTIONS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._own_signatures import parse_signatures


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **RESOURCE_OPTIONS["nim_health"],
            "wait": {"type": "bool", "default": True},
            "progress_interval": {"type": "int", "default": 5},
            "resume": {"type": "dict"},
        },
        supports_check_mode=True,
    )
    wait = module.params["wait"] and not module.check_mode
    try:
        own = parse_signatures(module.params["failure_signatures"], option="failure_signatures")
        check = HealthCheck(Host(), DockerApi(), parse_targets(module.params["models"]), own)
        outcome = check.run(
            module.params["resume"],
            interval=max(0, module.params["progress_interval"]),
            wait=wait,
            record=not module.check_mode,
        )
    except FleetError as error:
        fail(module, error)
    if not outcome.finished:
        module.exit_json(
            changed=False, finished=False, progress={"text": outcome.text}, resume=outcome.resume, models=outcome.models
        )
    ready = all(model["ready"] for model in outcome.models)
    if wait and outcome.failures:
        _target, first = outcome.failures[0]
        message = " ".join(failure.sentence for _failed, failure in outcome.failures)
        if first.lines:
            message += " Last lines of its log:\n" + "\n".join("  " + line for line in first.lines[-10:])
        module.fail_json(
            msg=message,
            reason=first.reason,
            last_lines=list(first.lines),
            signature=first.signature,
            ready=False,
            models=outcome.models,
            finished=True,
        )
    module.exit_json(changed=False, finished=True, ready=ready, models=outcome.models)


if __name__ == "__main__":
    main()
