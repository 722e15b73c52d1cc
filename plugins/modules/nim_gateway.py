#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
---
module: nim_gateway
short_description: HAProxy as the one OpenAI-compatible endpoint of a fleet
version_added: "1.0.0"
description:
  - Installs the distribution's HAProxy (2.4 or newer) and configures it to route requests to the hosts that serve the model
    named in their body.
  - A new configuration is checked by HAProxy before it takes the place of the live one, and applied by a reload. When the reload
    fails, the files are put back.
  - Drain and maintenance survive reloads and restarts, whoever makes them. A new server gets requests when its checks have
    passed.
  - An unknown model, a body above O(body_limit) and an unknown key are refused with errors in OpenAI's form.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
options:
  state:
    description: Whether this host is a gateway. V(absent) stops HAProxy and removes our files; the package stays.
    type: str
    choices: [present, absent]
    default: present
  hosts:
    description: The GPU hosts and what they serve; the filter P(gpu_fleet.nim.gateway_hosts#filter) makes it of the inventory.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The host, as the inventory names it.
        type: str
        required: true
      address:
        description: Address or name at which the gateway reaches it.
        type: str
        required: true
      models:
        description: What it serves.
        type: list
        elements: dict
        required: true
        suboptions:
          name:
            description: Name in C(nim_models).
            type: str
            required: true
          port:
            description: Port on the host.
            type: int
            required: true
          served:
            description: Names that clients give as C(model).
            type: list
            elements: str
            required: true
          address:
            description: Address of this model where it listens on another one.
            type: str
  bind_address:
    description: Address on which clients are served; V(::) is IPv6 and IPv4.
    type: str
    default: 0.0.0.0
  port:
    description: Port on which clients are served.
    type: int
    default: 8080
  body_limit:
    description:
      - Largest body of a request, from V(16KB) to V(64MB). It is held in memory until it is routed.
    type: str
    default: 1MB
  inactivity_timeout:
    description:
      - Seconds without a byte from server or client after which a request is given up.
      - Must be longer than the longest time to a first token, and for requests that are not streamed longer than the longest answer.
    type: int
    default: 600
  slow_start:
    description: Seconds over which a server that comes back gets its full share.
    type: int
    default: 10
  server_connections:
    description: Requests that one server gets at a time; more wait, up to a minute.
    type: int
    default: 256
  max_connections:
    description: Connections of clients at a time.
    type: int
    default: 4096
  api_keys:
    description:
      - Name of a client, and its key or V(sha256:) and the 64 hex digits of the key's SHA-256. Clients send it as a bearer token.
      - The gateway keeps the hashes only. With none, every client is served.
    type: dict
    default: {}
  certificate:
    description: Certificate chain in PEM form, the gateway's own first. With it, the port speaks TLS only.
    type: str
  private_key:
    description: Private key of O(certificate) in PEM form.
    type: str
  certificate_file:
    description:
      - In place of O(certificate), a file on the gateway with chain and key that somebody else keeps, for example certbot.
      - When it has changed, the next run reloads HAProxy.
    type: path
  metrics_address:
    description: Address on which HAProxy offers its metrics.
    type: str
    default: 0.0.0.0
  metrics_port:
    description: Port of C(/metrics); V(0) for none.
    type: int
    default: 8405
  replace_configuration:
    description: Whether a C(haproxy.cfg) that is neither ours nor the package's may be replaced.
    type: bool
    default: false
seealso:
  - module: gpu_fleet.nim.haproxy_server
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
"""

EXAMPLES = r"""
---
- name: One endpoint for the fleet
  gpu_fleet.nim.nim_gateway:
    hosts: "{{ groups['gpu_hosts'] | gpu_fleet.nim.gateway_hosts(hostvars) }}"
    port: 443
    certificate_file: /etc/ssl/private/gateway.pem
    api_keys: "{{ vault_gateway_keys }}"
  become: true
"""

RETURN = r"""
gateway:
  description: The gateway as it is now.
  returned: success
  type: dict
  contains:
    haproxy:
      description: Version of the package; empty when it is not installed.
      type: str
    running:
      description: Whether it runs.
      type: bool
    configuration:
      description: What identifies the configuration that the running process has read.
      type: str
    models:
      description: Every name that clients may ask for, with its backend and servers.
      type: list
      elements: dict
  sample:
    haproxy: 3.0.11-1
    running: true
    configuration: nim_gateway-5d41402abc4b2a76
    models:
      - name: meta/llama-3.1-8b-instruct
        backend: meta_llama-3.1-8b-instruct
        servers: ["gpu01:llama", "gpu02:llama"]
changes:
  description: What was changed, or in check mode would be.
  returned: always
  type: list
  elements: dict
blocked:
  description: Changes that were left undone, with the reason.
  returned: success
  type: list
  elements: dict
reason:
  description:
    - Stable name of the failure, for example V(configuration_refused), V(foreign_configuration), V(reload_failed),
      V(start_failed), V(haproxy_too_old), V(certificate_missing), V(service_masked), V(port_in_use), V(address_missing).
  returned: failure
  type: str
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import fail, run_resource
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_gateway import NimGateway, answer
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_gateway_planner import GATEWAY_OPTIONS, GatewayState
from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import scrub


def main() -> None:
    module = AnsibleModule(argument_spec=GATEWAY_OPTIONS, supports_check_mode=True)
    try:
        resource = NimGateway(**module.params)
    except FleetError as error:
        fail(module, error)

    def result(state: GatewayState) -> dict[str, t.Any]:
        for warning in resource.warnings:
            module.warn(scrub(warning))
        return answer(resource, state)

    run_resource(module, lambda: resource, result)


if __name__ == "__main__":
    main()
