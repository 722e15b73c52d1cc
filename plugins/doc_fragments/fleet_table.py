# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Options of modules that make one table of what a module has returned on every host."""

from __future__ import annotations


class ModuleDocFragment:
    """To be named before C(attributes.info), whose details it overrides."""

    DOCUMENTATION = r"""
options:
  variable:
    description: Name of the variable under which the module that looks at a host was registered on the hosts.
    type: str
    required: true
  format:
    description: V(table) for people, V(json) for programs.
    type: str
    choices: [table, json]
    default: table
  output:
    description: File on the controller that gets the rows as JSON as well.
    type: path
attributes:
  check_mode:
    details: In check mode no file is written.
  platform:
    platforms: all
notes:
  - Runs once for the whole play, on the controller, and connects to no host. A host that could not be reached, or whose
    look failed, is a row.
"""
