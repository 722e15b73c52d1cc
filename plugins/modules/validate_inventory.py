#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation only: the action plugin of the same name does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: validate_inventory
short_description: Find every mistake in the collection's variables before a host is touched
version_added: "1.0.0"
description:
  - Checks the variables of all roles of this collection for all hosts of the play, on the controller, without connecting
    to any host.
  - "Found are: names that no role knows (with the nearest known name), wrong types, values that are none of the choices,
    models that share a name, port or GPU, malformed image references, profiles, sizes, paths, keys, URLs and versions,
    driver branches that do not exist, and templates that cannot be resolved."
  - All mistakes of all hosts are reported at once, one sentence each, with host, variable, value and remedy. Values of
    secrets are not shown.
  - Runs once for the whole play. Defaults of roles and variables of a play are not checked; inventory, group and host
    variables and extra variables are.
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
extends_documentation_fragment:
  - gpu_fleet.nim.attributes.info
attributes:
  check_mode:
    details: Does the same in check mode.
  platform:
    platforms: all
options:
  hosts:
    description: Hosts whose variables are checked; by default all hosts of the play.
    type: list
    elements: str
seealso:
  - module: ansible.builtin.validate_argument_spec
"""

EXAMPLES = r"""
- name: Inventory
  hosts: gpu_hosts
  gather_facts: false
  any_errors_fatal: true
  tasks:
    - name: Find mistakes before any host is touched
      gpu_fleet.nim.validate_inventory:
"""

RETURN = r"""
problems:
  description: One sentence for each mistake, with the hosts that have it.
  returned: always
  type: list
  elements: str
  sample: ["gpu01: nvidia_driver_branch = '581': no such driver branch; choose one of 535, 550, 580."]
hosts:
  description: Hosts that were checked.
  returned: always
  type: list
  elements: str
"""
