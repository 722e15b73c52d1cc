# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Prints the state of all hosts of the play; connects to none of them."""

from __future__ import annotations

import typing as t

from ansible.errors import AnsibleError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._fleet_status import render_table, rows_of
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._answers import FACTS
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._fleet_table import FleetTableBase, Look, Row, address_of
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._plain import resolved


def wanted_models(variables: t.Mapping[str, t.Any]) -> list[str]:
    """Names of the models that the inventory wants on a host; nothing where it cannot be read."""
    try:
        models = resolved(variables.get("nim_models"))
    except AnsibleError:
        # Status tells how things are; what is wrong with the inventory is told by validate_inventory.
        return []
    return [
        str(model["name"])
        for model in (models if isinstance(models, list) else [])
        if isinstance(model, dict) and model.get("name") and model.get("state") != "absent"
    ]


class ActionModule(FleetTableBase):
    shape = FACTS

    def rows(self, host: str, look: Look, variables: t.Mapping[str, t.Any]) -> list[Row]:
        return rows_of(host, look, address=address_of(host, variables), wanted=wanted_models(variables))

    def render(self, rows: list[Row], notes: list[str]) -> str:
        return render_table(rows)
