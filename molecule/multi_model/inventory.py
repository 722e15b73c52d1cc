#!/usr/bin/env python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The inventory of the README, for the hosts of this scenario, as Ansible asks an inventory script."""

from __future__ import annotations

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests/sandbox"))

import readme

group = readme.inventory_of("multi_model")["gpu_hosts"]
answer = {
    "_meta": {"hostvars": group["hosts"]},
    "gpu_hosts": {"hosts": list(group["hosts"]), "vars": group.get("vars", {})},
}
print(json.dumps(answer))
