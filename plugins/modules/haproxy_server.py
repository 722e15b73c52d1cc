#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
---
module: haproxy_server
short_description: Take a GPU host out of a gateway and bring it back, without losing a request
version_added: "1.0.0"
description:
  - Drains all servers of one GPU host in the HAProxy of this gateway, waits for the requests that run on them, puts them into
    maintenance, or enables them again.
  - Runs on a gateway of role C(nim_gateway); with several gateways, run it on each, for example with C(delegate_to) in a loop.
  - Works on servers that are down already. The last server that serves a model is not taken out unless O(allow_last=true).
  - What it does is noted on the gateway. Servers that somebody else drained or put into maintenance are left alone, and count as
    drained.
  - A server is enabled only when HAProxy's checks of it have passed and it says itself that it is ready.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
attributes:
  check_mode:
    support: full
    details:
      - The last server of a model is refused in check mode too. Nothing is waited for.
options:
  host:
    description: The GPU host, as the inventory names it.
    type: str
    required: true
  state:
    description:
      - V(drained) gives its servers no new requests and waits until the running ones have ended.
      - V(maintenance) does the same, then stops checking them, so that no alarm goes off while they are worked on.
      - V(enabled) waits until they are ready and gives them requests again.
    type: str
    choices: [drained, maintenance, enabled]
    required: true
  timeout:
    description:
      - Seconds that running requests, or the proof of readiness, may take. V(0) does not wait.
      - After it the module fails, and the servers stay drained.
    type: int
    default: 300
  socket:
    description: HAProxy's stats socket, of level admin.
    type: path
    default: /run/haproxy/admin.sock
  master_socket:
    description:
      - Socket of HAProxy's master process, through which requests are counted that began before a reload.
      - Where it does not exist, such requests are not waited for. Role C(nim_gateway) sees to it that it exists.
    type: path
    default: /run/haproxy-master.sock
  allow_last:
    description: Whether the last server that serves a model may be taken out; every request for that model is refused then.
    type: bool
    default: false
  ignore_unknown:
    description: Whether a host that the gateway has no server of is fine; RV(servers) is empty then.
    type: bool
    default: false
  models:
    description:
      - With O(state=enabled), the models that are waited for, by their names in C(nim_models); by default all of the host.
      - Of the others, drained servers whose checks fail are enabled as well, as they get no requests before they are ready; the rest
        stay as they are.
    type: list
    elements: str
seealso:
  - module: gpu_fleet.nim.nim_gateway
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
"""

EXAMPLES = r"""
---
- name: No request begins on this host any more, and those that ran have ended
  gpu_fleet.nim.haproxy_server:
    host: "{{ inventory_hostname }}"
    state: drained
    timeout: 900
  delegate_to: "{{ item }}"
  loop: "{{ groups['nim_gateways'] }}"
  become: true

- name: The host serves again
  gpu_fleet.nim.haproxy_server:
    host: "{{ inventory_hostname }}"
    state: enabled
  delegate_to: "{{ item }}"
  loop: "{{ groups['nim_gateways'] }}"
  become: true
"""

RETURN = r"""
servers:
  description: The servers of the host in all backends, as they are now (in check mode, as they were).
  returned: success, and where O(timeout) has passed
  type: list
  elements: dict
  contains:
    backend:
      description: The backend, named after the model.
      type: str
    server:
      description: The server, named after host and model.
      type: str
    state:
      description: C(enabled), C(drained) or C(maintenance).
      type: str
    status:
      description: HAProxy's own word for it.
      type: str
    sessions:
      description: Requests that run on it or wait for it, also those that began before HAProxy was reloaded.
      type: int
  sample:
    - backend: meta_llama-3.1-8b-instruct
      server: gpu01:llama
      state: drained
      status: DRAIN
      sessions: 0
drained:
  description: Whether no server of the host gets requests, and none runs.
  returned: success, and where O(timeout) has passed
  type: bool
reason:
  description:
    - On failure its stable name, among them V(last_server), V(drain_timeout), V(not_ready), V(unknown_host),
      V(gateway_unreachable), V(gateway_refused), V(state_unreadable).
    - On success V(foreign_drain) where somebody else took a server of the host out, otherwise empty.
  returned: always
  type: str
changes:
  description: What was changed, or in check mode would be.
  returned: always
  type: list
  elements: dict
blocked:
  description: What was left as somebody else has it.
  returned: success
  type: list
  elements: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._haproxy_server import (
    SERVER_OPTIONS,
    HaproxyServer,
    answer,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import run_resource


def main() -> None:
    module = AnsibleModule(argument_spec=SERVER_OPTIONS, supports_check_mode=True)
    run_resource(
        module, lambda: HaproxyServer(**module.params), lambda state: answer(state, str(module.params["host"]))
    )


if __name__ == "__main__":
    main()
