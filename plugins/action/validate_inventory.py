# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Checks the variables of all hosts of the play on the controller; connects to none of them."""

from __future__ import annotations

import os
import re
import typing as t

from ansible.module_utils.common.yaml import yaml_load
from ansible.plugins.action import ActionBase
from ansible_collections.gpu_fleet.nim.plugins.module_utils._inventory import (
    PREFIXES,
    Problem,
    Unresolved,
    report,
    validate,
)
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._plain import BEFORE_2_19, resolved

_ROLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "roles")


def load_specs(roles: str = _ROLES) -> dict[str, dict[str, t.Any]]:
    """Options of every role that the collection has, out of its argument specification."""
    specs: dict[str, dict[str, t.Any]] = {}
    for role in sorted(os.listdir(roles)):
        path = os.path.join(roles, role, "meta", "argument_specs.yml")
        if not os.path.exists(path):
            continue
        with open(path, encoding="utf-8") as stream:
            document = yaml_load(stream) or {}
        options: dict[str, t.Any] = {}
        for entry_point in (document.get("argument_specs") or {}).values():
            options.update(entry_point.get("options") or {})
        specs[role] = options
    return specs


def _why(error: Exception) -> str:
    """What was wrong with a template, without the template: before 2.19 messages quote it, and it may hold secrets."""
    text = " ".join(str(error).split())
    text = re.sub(r"\s*\bString: .*", "", text)
    text = re.sub(r"\bwhile templating '.*?'\. (?=Error was|original message|$)", "in a template. ", text)
    return text[:200] or type(error).__name__


def resolve(hostvars: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """All variables of a host that could be meant for this collection."""
    found: dict[str, t.Any] = {}
    for name in hostvars:
        if not str(name).startswith(PREFIXES):
            continue
        try:
            found[str(name)] = resolved(hostvars[name])
        except Exception as error:
            # Up to ansible-core 2.18 a template lets through whatever it raises: ZeroDivisionError, RecursionError, ...
            found[str(name)] = Unresolved(_why(error))
    return found


def read_file(path: str) -> str | None:
    """A file of the controller."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8", errors="replace") as stream:
            return stream.read(10_000)
    except OSError:
        return None


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible-core ships no type information
    TRANSFERS_FILES = False
    #: One call for all hosts, so that one message has all mistakes.
    BYPASS_HOST_LOOP = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _result, args = self.validate_argument_spec(argument_spec={"hosts": {"type": "list", "elements": "str"}})
        hosts = args["hosts"] if args["hosts"] is not None else task_vars.get("ansible_play_hosts_all") or []
        specs = load_specs()
        problems: dict[str, list[Problem]] = {}
        for host in hosts:
            if host not in task_vars["hostvars"]:
                problems[host] = [Problem(host, "this host is not in the inventory; correct hosts.")]
                continue
            variables = resolve(task_vars["hostvars"][host])
            problems[host] = validate(variables, specs, environment=os.environ, read_file=read_file)
        lines = report(problems)
        result: dict[str, t.Any] = {"changed": False, "problems": lines, "hosts": [str(host) for host in hosts]}
        if lines:
            result["failed"] = True
            count = "one mistake" if len(lines) == 1 else "%d mistakes" % len(lines)
            result["msg"] = "The inventory has %s; no host was touched.\n%s" % (
                count,
                "\n".join("  " + line for line in lines),
            )
            if BEFORE_2_19:
                # It prints the message of a failed task with its line breaks escaped.
                self._display.display(result["msg"], color="red", stderr=True)
        else:
            result["msg"] = "The variables of %d hosts are sound." % len(hosts)
        return result
