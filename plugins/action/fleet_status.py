# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Prints the state of all hosts of the play; connects to none of them."""

from __future__ import annotations

import json
import os
import typing as t

from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.gpu_fleet.nim.plugins.action.validate_inventory import plain
from ansible_collections.gpu_fleet.nim.plugins.module_utils._fleet_status import Row, render_table, rows_of


def wanted_models(variables: t.Mapping[str, t.Any]) -> list[str]:
    """Names of the models that the inventory wants on a host; nothing where it cannot be read."""
    try:
        models = plain(variables.get("nim_models"))
    except AnsibleError:
        # Status tells how things are; what is wrong with the inventory is told by validate_inventory.
        return []
    return [
        str(model["name"])
        for model in models or []
        if isinstance(model, dict) and model.get("name") and model.get("state") != "absent"
    ]


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible-core ships no type information
    TRANSFERS_FILES = False
    #: One call for all hosts, so that there is one table.
    BYPASS_HOST_LOOP = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _result, args = self.validate_argument_spec(
            argument_spec={
                "variable": {"type": "str", "required": True},
                "format": {"type": "str", "choices": ["table", "json"], "default": "table"},
                "output": {"type": "path"},
            }
        )
        rows: list[Row] = []
        for host in task_vars.get("ansible_play_hosts_all") or []:
            variables = task_vars["hostvars"][host]
            look = variables.get(args["variable"])
            rows += rows_of(
                str(host),
                None if look is None else plain(look),
                address=str(variables.get("ansible_host") or host),
                wanted=wanted_models(variables),
            )
        text = json.dumps(rows, indent=2) if args["format"] == "json" else render_table(rows)
        self._display.display("\n%s\n" % text if args["format"] == "table" else text)
        if args["output"] and not self._task.check_mode:
            self._write(args["output"], json.dumps(rows, indent=2) + "\n")
        return {"changed": False, "rows": rows}

    @staticmethod
    def _write(path: str, content: str) -> None:
        temporary = "%s.%d" % (path, os.getpid())
        try:
            with open(temporary, "w", encoding="utf-8") as stream:
                stream.write(content)
            os.replace(temporary, path)
        except OSError as error:
            raise AnsibleActionFail("Writing %s failed: %s." % (path, error.strerror)) from error
