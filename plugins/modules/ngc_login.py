#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
---
module: ngc_login
short_description: Store an NGC API key in a user's Docker configuration
version_added: "1.0.0"
description:
  - Stores the credentials for one registry, by default NVIDIA's C(nvcr.io), in the Docker configuration of a user of the host.
  - Only the entry of that registry is touched. A configuration that cannot be parsed is an error and is left as it is.
  - A new key is checked against the registry before anything is changed; when nothing changes, the registry is not contacted.
    The registry is asked as the host's Docker daemon would ask it (proxies, insecure registries).
  - Without a key nothing is done, since many images are public.
  - That a login was stored by this module is remembered in C(/var/lib/gpu_fleet/logins), readable for root only, as a
    fingerprint that is made with a random key.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
attributes:
  check_mode:
    support: full
    details:
      - A key that would be stored is checked against the registry in check mode too, unless O(validate=never).
options:
  api_key:
    description:
      - The NGC API key, or the password of O(username).
      - Without it, O(state=present) does nothing and a stored login is left as it is.
      - O(state=absent) needs it only where O(only_ours) says so.
    type: str
  registry:
    description: Host of the registry, with its port where it has one.
    type: str
    default: nvcr.io
  username:
    description: User name at the registry. NGC takes every key under the literal name C($oauthtoken).
    type: str
    default: $oauthtoken
  docker_user:
    description:
      - User of the host whose Docker configuration is meant.
      - The file is C(.docker/config.json) in the user's home directory.
    type: str
    default: root
  state:
    description: Whether the login is to be there.
    type: str
    choices: [present, absent]
    default: present
  check_repository:
    description:
      - Repository or image that the key must be allowed to pull, for example C(nim/meta/llama-3.1-8b-instruct:1.8.4).
      - Without it, the key only has to be accepted by the registry.
    type: str
    default: ""
  validate:
    description:
      - V(on_change) asks the registry when a key would be stored.
      - V(always) asks on every run, which notices a stored key that has expired since.
      - V(never) does not ask; for hosts that reach only a mirror.
    type: str
    choices: [on_change, always, never]
    default: on_change
  only_ours:
    description:
      - With O(state=absent), take away only the login that this module has stored, or one with the O(username) and
        O(api_key) that are given. Any other one is left, and so is what a credential helper has; a warning says so.
      - What this module has stored is on record in C(/var/lib/gpu_fleet/logins). A record that cannot be read is left as it is, and
        a warning says so; with O(state=present) nothing new is stored then.
      - Without it, every login at the registry in the file is taken away, whoever has stored it.
    type: bool
    default: false
seealso:
  - module: gpu_fleet.nim.nim_image
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
"""

EXAMPLES = r"""
---
- name: Root can pull from nvcr.io
  gpu_fleet.nim.ngc_login:
    api_key: "{{ vault_ngc_api_key }}"
    check_repository: nim/meta/llama-3.1-8b-instruct:1.8.4
  become: true

- name: The login that this module has stored is gone
  gpu_fleet.nim.ngc_login:
    state: absent
    only_ours: true
  become: true

- name: Nobody is logged in any more
  gpu_fleet.nim.ngc_login:
    state: absent
  become: true
"""

RETURN = r"""
login:
  description: The login as it is stored now.
  returned: success
  type: dict
  contains:
    registry:
      description: Registry host.
      type: str
      returned: always
    docker_user:
      description: User of the host.
      type: str
      returned: always
    path:
      description: The user's Docker configuration file.
      type: str
      returned: always
    username:
      description: User name at the registry; null when no login is stored.
      type: str
      returned: always
    fingerprint:
      description:
        - C(sha256:) and the first 12 hex digits of the SHA-256 of the stored key; null when none is stored.
        - Null also for anything but a key made by NGC, since an ordinary password could be guessed from it.
      type: str
      returned: always
  sample:
    registry: nvcr.io
    docker_user: root
    path: /root/.docker/config.json
    username: $oauthtoken
    fingerprint: sha256:9f86d081884c
key_given:
  description: Whether a key was given.
  returned: success
  type: bool
message:
  description: What it means that no key was given, what O(only_ours) has left, or that the record of our logins cannot be read; else empty.
  returned: success
  type: str
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
    - Stable name of the failure, for example V(bad_key), V(no_entitlement), V(no_such_repository), V(rate_limit),
      V(registry_unreachable), V(tls_error), V(docker_config_unreadable), V(credential_helper), V(no_such_user),
      V(state_unreadable).
  returned: failure
  type: str
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_config import DockerConfig
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import fail, run_resource
from ansible_collections.gpu_fleet.nim.plugins.module_utils._ngc_login import (
    NgcLogin,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import RESOURCE_OPTIONS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import scrub


def main() -> None:
    module = AnsibleModule(
        argument_spec=RESOURCE_OPTIONS["ngc_login"],
        supports_check_mode=True,
    )
    host = Host()
    try:
        login = NgcLogin(**module.params)
        login.precheck(host)
    except FleetError as error:
        fail(module, error)

    def result(state: DockerConfig) -> dict[str, t.Any]:
        answer = login.result(state)
        if login.state == "absent" and answer["message"]:
            module.warn(scrub(answer["message"]))
        return answer

    run_resource(module, lambda: login, result, host=host)


if __name__ == "__main__":
    main()
