# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Prints the plan of all hosts of the play; connects to none of them."""

from __future__ import annotations

import json
import os
import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.gpu_fleet.nim.plugins.module_utils._fleet_plan import (
    Row,
    drifted,
    ordered,
    render_table,
    rows_of,
)


def data(value: t.Any) -> t.Any:
    """A copy in plain Python types of what a module returned."""
    if isinstance(value, Mapping):
        return {str(key): data(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [data(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


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
                "fail_on_drift": {"type": "bool", "default": False},
            }
        )
        rows: list[Row] = []
        notes: list[str] = []
        for host in task_vars.get("ansible_play_hosts_all") or []:
            look = task_vars["hostvars"][host].get(args["variable"])
            look = None if look is None else data(look)
            rows += rows_of(str(host), look)
            notes += ["%s: %s" % (host, note) for note in (look or {}).get("notes") or []]
        rows = ordered(rows)
        text = json.dumps(rows, indent=2) if args["format"] == "json" else render_table(rows, notes)
        self._display.display("\n%s\n" % text if args["format"] == "table" else text)
        if args["output"] and not self._task.check_mode:
            self._write(args["output"], json.dumps(rows, indent=2) + "\n")
        hosts = drifted(rows)
        result: dict[str, t.Any] = {"changed": False, "rows": rows, "drift": bool(hosts), "hosts": hosts}
        if hosts and args["fail_on_drift"]:
            result["failed"] = True
            result["msg"] = "Not as wanted, or not known to be: %s." % ", ".join(hosts)
        return result

    @staticmethod
    def _write(path: str, content: str) -> None:
        temporary = "%s.%d" % (path, os.getpid())
        try:
            with open(temporary, "w", encoding="utf-8") as stream:
                stream.write(content)
            os.replace(temporary, path)
        except OSError as error:
            raise AnsibleActionFail("Writing %s failed: %s." % (path, error.strerror)) from error
