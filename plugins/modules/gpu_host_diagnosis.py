#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Thin shell around the diagnosis of a host and its support bundle."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_host_diagnosis
short_description: Say what is wrong with a GPU host and its NIM services, the worst first
version_added: "1.0.0"
description:
  - Looks at a host once and returns findings, each with severity, cause, remedy and the lines that show it.
  - "Heard are: the plan of the host, the verdicts on its GPUs, every service as M(gpu_fleet.nim.nim_health) sees it (its
    endpoint, unit, container, log and Docker's errors, starts that failed before included), the kernel log (Xid errors, kills
    for want of memory), Docker's memory of containers that ended, free space, and whether the containers still have their
    GPUs (C(NVML: Unknown Error) after C(systemctl daemon-reload))."
  - Changes nothing, waits for nothing, and asks no registry. C(nvidia-smi -L) is called inside the services' containers.
  - Without options beside O(bundle), the action plugin takes the variables of the collection's roles, as
    M(gpu_fleet.nim.gpu_host_plan) does.
  - "With O(bundle) it also puts together a support bundle: facts, plan, findings, units and their journals, containers with
    inspection and logs, C(daemon.json), versions of packages, C(nvidia-smi) as XML, and the kernel's lines on GPUs and
    memory. Secrets are masked on the host: the known ones (NGC key, secret variables of models, logins at registries, proxies)
    in every form they may have been written in, and what looks like one. It is made in memory; nothing stays on the host."
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
extends_documentation_fragment:
  - gpu_fleet.nim.attributes.info
  - gpu_fleet.nim.resources
  - gpu_fleet.nim.resources.health
attributes:
  check_mode:
    details: In check mode O(bundle) is not written.
options:
  failure_signatures:
    description: Texts of the user's own that explain a failure, as for M(gpu_fleet.nim.nim_health).
    type: list
    elements: dict
    default: []
  bundle:
    description:
      - Directory on the controller in which the support bundle is put, as C(HOST-DATE.tar.gz), readable for its owner alone.
        It is created where it does not exist.
      - No bundle is made when left out.
    type: path
  versions:
    description: What the controller knows of itself, for the bundle. Set by the action plugin; leave it alone.
    type: dict
seealso:
  - module: gpu_fleet.nim.gpu_host_plan
  - module: gpu_fleet.nim.nim_health
"""

EXAMPLES = r"""
- name: What is wrong with the hosts
  gpu_fleet.nim.gpu_host_diagnosis:
  become: true
  register: diagnosis

- name: The same, with a support bundle of each host
  gpu_fleet.nim.gpu_host_diagnosis:
    bundle: ~/bundles
  become: true
"""

RETURN = r"""
worst:
  description: Severity of the worst finding, V(ok) without any.
  returned: success
  type: str
  sample: failed
findings:
  description: What is wrong; the worst first, and of equal ones the cause before its consequences.
  returned: success
  type: list
  elements: dict
  contains:
    severity:
      description: V(failed) (something does not work), V(warning) (not as wanted, or soon will not work) or V(note).
      type: str
    layer:
      description: V(host), V(gpu), V(model), or the module that manages what it is about.
      type: str
    model:
      description: Name of the model, or null.
      type: str
    gpu:
      description: UUID of the GPU, or null.
      type: str
    reason:
      description: Stable identifier.
      type: str
    cause:
      description: What is wrong, and why.
      type: str
    remedy:
      description: What to do, or null.
      type: str
    evidence:
      description: Lines that show it, without secrets.
      type: list
      elements: str
    signature:
      description: Identifier of the known failure that was recognised, or null.
      type: str
models:
  description: Every service, as M(gpu_fleet.nim.nim_health) returns it.
  returned: success
  type: list
  elements: dict
bundle:
  description: Path of the support bundle on the controller.
  returned: when O(bundle) is given, not in check mode
  type: str
"""

import datetime
import os

from ansible_collections.gpu_fleet.nim.plugins.module_utils._diagnosis import diagnose
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_host_info import gather
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import fail
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import secrets_of
from ansible_collections.gpu_fleet.nim.plugins.module_utils._own_signatures import parse_signatures
from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import known_secrets
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resources_module import ResourcesModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._support_bundle import SHORTEST_BLANKED, SupportBundle, wrap


def main() -> None:
    module = ResourcesModule(
        options={
            "failure_signatures": {"type": "list", "elements": "dict", "default": []},
            "bundle": {"type": "path"},
            "versions": {"type": "dict"},
        }
    )
    host = Host()
    try:
        wanted = module.resources()
        signatures = parse_signatures(module.params["failure_signatures"], option="failure_signatures")
        given: set[str] = set()
        for name, options in wanted.items():
            given |= secrets_of(name, options)
        redactor = known_secrets(host).redactor(given)
        found = diagnose(host, wanted, signatures=signatures, redactor=redactor)
        findings = [finding.as_dict() for finding in found.ordered()]
        answer = {"worst": found.worst, "findings": findings, "models": redactor.structure(found.models)}
        if module.params["bundle"] and not module.check_mode:
            bundle = SupportBundle(host, redactor)
            bundle.add_data("findings.json", findings)
            bundle.add_data("plan.json", found.plan)
            bundle.add_data("models.json", found.models)
            bundle.add_data("facts.json", gather(host))
            stamp = datetime.datetime.fromtimestamp(host.time(), datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
            bundle.add_data("versions.json", dict(module.params["versions"] or {}, collected=stamp))
            bundle.collect(str(model["name"]) for model in found.models)
            content = bundle.archive("%s-%s" % (os.uname().nodename, stamp))
            module.no_log_values = {value for value in module.no_log_values if len(value) >= SHORTEST_BLANKED}
            answer["archive"] = dict(wrap(content, module.no_log_values), stamp=stamp)
    except FleetError as error:
        fail(module, error)
    module.exit_json(changed=False, **answer)


if __name__ == "__main__":
    main()
