# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin util is PRIVATE to the collection; it may change at any time.
"""Action plugins that show what one task found on all hosts of the play, as one table; they connect to none of them."""

from __future__ import annotations

import abc
import contextlib
import json
import os
import typing as t

from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import file_problem
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._answers import read_answer

Row = t.Dict[str, t.Any]
Look = t.Optional[t.Dict[str, t.Any]]


class FleetTableBase(ActionBase, abc.ABC):  # type: ignore[misc]  # ansible-core ships no type information
    """Base class; a subclass says which rows a host has and how they look.

    The task's options are ``variable`` (name under which a task of all hosts was registered), ``format`` (``table`` or
    ``json``) and ``output`` (a file that gets the rows as JSON), and those of the subclass.

    Attributes:
        shape: Of what the module of that task answers.
        options: Argument specification of further options.
    """

    shape: t.ClassVar[t.Any] = None
    options: t.ClassVar[dict[str, dict[str, t.Any]]] = {}

    TRANSFERS_FILES = False
    #: One call for all hosts, so that there is one table.
    BYPASS_HOST_LOOP = True
    _requires_connection = False
    _supports_check_mode = True

    @abc.abstractmethod
    def rows(self, host: str, look: Look, variables: t.Mapping[str, t.Any]) -> list[Row]:
        """The rows of one host.

        Args:
            look: As :func:`read_answer` gives it.
            variables: Of the host; they may hold templates that cannot be resolved, and whatever the host gave as facts.
        """

    @abc.abstractmethod
    def render(self, rows: list[Row], notes: list[str]) -> str:
        """The rows as text for people, with the notes below."""

    def ordered(self, rows: list[Row]) -> list[Row]:
        """The rows in the order in which they are shown."""
        return rows

    def conclude(self, rows: list[Row], args: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """Further return values; ``failed`` and ``msg`` among them fail the task."""
        return {}

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        super().run(tmp, task_vars)
        task_vars = task_vars or {}
        #: Of all hosts of the play, those that have failed included.
        self.variables: dict[str, t.Mapping[str, t.Any]] = {}
        _result, args = self.validate_argument_spec(
            argument_spec={
                "variable": {"type": "str", "required": True},
                "format": {"type": "str", "choices": ["table", "json"], "default": "table"},
                "output": {"type": "path"},
                **self.options,
            }
        )
        rows: list[Row] = []
        notes: list[str] = []
        for host in task_vars.get("ansible_play_hosts_all") or []:
            self.variables[str(host)] = variables = task_vars["hostvars"][host]
            look = read_answer(variables.get(args["variable"]), self.shape)
            rows += self.rows(str(host), look, variables)
            notes += ["%s: %s" % (host, note) for note in (look or {}).get("notes") or []]
        rows = self.ordered(rows)
        if args["format"] == "json":
            self._display.display(json.dumps(rows, indent=2))
        else:
            self._display.display("\n%s\n" % self.render(rows, notes))
        if args["output"] and not self._task.check_mode:
            write_file(args["output"], json.dumps(rows, indent=2) + "\n")
        return {"changed": False, "rows": rows, **self.conclude(rows, args)}


def address_of(host: str, variables: t.Mapping[str, t.Any]) -> str:
    """Where a host is reached; its name where the inventory does not say."""
    try:
        return str(variables.get("ansible_host") or host)
    except AnsibleError:
        return host


def write_file(path: str, content: str) -> None:
    """Write a file of the controller, which is never seen half written.

    Raises:
        AnsibleActionFail: When it cannot be written.
    """
    temporary = "%s.%d" % (path, os.getpid())
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise AnsibleActionFail(file_problem("Writing", path, error)) from error
