#!/usr/bin/env python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The inventory of the README, for the hosts of this scenario, as Ansible asks an inventory script."""

from __future__ import annotations

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests/sandbox"))

from fleet_testing import readme_inventory, script_inventory

print(json.dumps(script_inventory(readme_inventory("multi_model"))))
