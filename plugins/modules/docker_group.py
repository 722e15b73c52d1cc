#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Members of the group docker."""

from __future__ import annotations

DOCUMENTATION = r"""
module: docker_group
short_description: Set the exact members of the group docker
version_added: "1.0.0"
author: "The gpu_fleet.nim authors (@gpu-fleet)"
description:
  - Makes the members of the group C(docker) exactly those on the list. Users off the list are taken out.
  - B(Membership is root.) Whoever may use the Docker socket can mount the host's root file system into a container and read
    or change anything on it, without a password and without a trace in sudo's log. Put only people on the list whom you would
    give a root shell.
  - Membership counts from the next log-in. Sessions that are open, including Ansible's own kept connections, keep the groups
    they started with, also those that were taken away.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
options:
  users:
    description:
      - Log-in names. The accounts must exist. An empty list takes everybody out.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Only the operator may use Docker without sudo (and so is root)
  gpu_fleet.nim.docker_group:
    users:
      - operator
"""

RETURN = r"""
members:
  description: Members of the group, including accounts whose primary group it is.
  returned: success
  type: list
  elements: str
  sample: [operator]
changes:
  description: What was changed (in check mode, what would be).
  returned: always
  type: list
  elements: dict
blocked:
  description: Always empty; nothing here disturbs a service.
  returned: success
  type: list
  elements: dict
reason:
  description: Stable identifier of the failure.
  returned: failure
  type: str
  sample: unknown_user
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_group import DockerGroup, GroupState
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import run_resource
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import RESOURCE_OPTIONS


def result(state: GroupState) -> dict[str, t.Any]:
    return {"members": sorted({*state.members, *state.primary})}


def main() -> None:
    module = AnsibleModule(
        argument_spec=RESOURCE_OPTIONS["docker_group"],
        supports_check_mode=True,
    )
    run_resource(module, lambda: DockerGroup(**module.params), result)


if __name__ == "__main__":
    main()
