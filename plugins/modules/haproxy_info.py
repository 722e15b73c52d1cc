#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
---
module: haproxy_info
short_description: What a gateway says of its servers, and the requests that it has counted
version_added: "1.0.0"
description:
  - Asks the HAProxy of this gateway which servers serve, which are drained or in maintenance and by whom, and how many requests it
    has passed on and how many of them have failed.
  - HAProxy counts from nothing after each reload; RV(process) tells whether two answers are of the same process.
  - Changes nothing. Playbooks C(gpu_fleet.nim.upgrade_drivers) and C(gpu_fleet.nim.deploy) ask it before each batch.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes.info
options:
  socket:
    description: HAProxy's stats socket.
    type: path
    default: /run/haproxy/admin.sock
seealso:
  - module: gpu_fleet.nim.haproxy_server
  - module: gpu_fleet.nim.nim_gateway
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
"""

EXAMPLES = r"""
---
- name: What the gateway sees
  gpu_fleet.nim.haproxy_info:
  become: true
  register: gateway

- name: Models without a server that serves
  ansible.builtin.debug:
    msg: >-
      {{ gateway.servers | map(attribute='backend') | unique
      | difference(gateway.servers | selectattr('serving') | map(attribute='backend') | unique) }}
"""

RETURN = r"""
servers:
  description: All servers of all backends.
  returned: success
  type: list
  elements: dict
  contains:
    backend:
      description: The backend, named after the model.
      type: str
    server:
      description: The server, named after host and model.
      type: str
    host:
      description: The GPU host, as the server's name has it.
      type: str
    model:
      description: Name of the model on that host.
      type: str
    port:
      description: Port of the host at which the model is asked.
      type: int
    state:
      description: C(enabled), C(drained) or C(maintenance).
      type: str
    status:
      description: HAProxy's own word for it.
      type: str
    serving:
      description: Whether it gets new requests.
      type: bool
    foreign:
      description: Whether somebody else than this collection has drained it or put it into maintenance.
      type: bool
    sessions:
      description: Requests that run on it or wait for it.
      type: int
process:
  description: Name of the process that answered; another one after a reload or restart.
  returned: success
  type: str
  sample: pid 1422 since 1795243190
traffic:
  description: Counts of each backend since that process began.
  returned: success
  type: list
  elements: dict
  contains:
    backend:
      description: The backend.
      type: str
    requests:
      description: Requests that it was given.
      type: int
    failed:
      description: Those of them that were answered with a status of 500 or more, by a server or by the gateway.
      type: int
    truncated:
      description: Answers that had begun and were broken off by the server.
      type: int
    left:
      description: Requests that their client has broken off.
      type: int
at:
  description: When it was, in seconds since the epoch on the gateway's clock.
  returned: success
  type: float
reason:
  description: Stable identifier of the failure, C(gateway_unreachable) or C(state_unreadable).
  returned: failure
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_settings import Layout
from ansible_collections.gpu_fleet.nim.plugins.module_utils._haproxy_info import observe_gateway
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import fail


def main() -> None:
    module = AnsibleModule(
        argument_spec={"socket": {"type": "path", "default": Layout.socket}}, supports_check_mode=True
    )
    try:
        found = observe_gateway(Host(), module.params["socket"])
    except FleetError as error:
        fail(module, error)
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
