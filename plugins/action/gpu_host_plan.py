# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gives the module the variables of the collection's roles, as the roles give them to their modules."""

from __future__ import annotations

import functools
import os
import re
import typing as t

from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.module_utils.common.yaml import yaml_load
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import CHAIN, RESOURCE_OPTIONS
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._expressions import Expressions, NotPlainError
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._models import without_secrets
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._payload import Payload

try:
    from ansible.template import trust_as_template
except ImportError:  # ansible-core 2.18 trusts every string

    def trust_as_template(value: str) -> str:
        return value


_ROLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "roles")


class Part(t.NamedTuple):
    """A resource as a role sets it up.

    Attributes:
        role: Role whose task manages it.
        when: Conditions of that task which hang on variables alone.
        options: Its options, as templates.
    """

    role: str
    when: tuple[str, ...]
    options: t.Mapping[str, t.Any]


def tasks_of(folder: str, name: str = "main.yml") -> list[dict[str, t.Any]]:
    """The tasks of a role, with those that it imports."""
    with open(os.path.join(folder, name), encoding="utf-8") as stream:
        found: list[dict[str, t.Any]] = yaml_load(stream)
    imports = [(task, task.get("ansible.builtin.import_tasks")) for task in found]
    return [one for task, file in imports for one in (tasks_of(folder, str(file)) if file else [task])]


@functools.lru_cache(maxsize=None)
def parts(roles: str = _ROLES) -> dict[str, Part]:
    """What the roles of the collection set up, read from their own tasks: the first task of each resource.

    What a task makes hang on the result of an earlier one is left out: the plan looks at that itself.
    """
    found: dict[str, Part] = {}
    for role in sorted(os.listdir(roles)):
        tasks = tasks_of(os.path.join(roles, role, "tasks"))
        results = [re.compile(r"\b%s\b" % re.escape(task["register"])) for task in tasks if "register" in task]
        for task in tasks:
            resource = next((name for name in CHAIN if "gpu_fleet.nim." + name in task), None)
            if resource is None or resource in found:
                continue
            when = task.get("when", [])
            conditions = [str(condition) for condition in (when if isinstance(when, list) else [when])]
            found[resource] = Part(
                role,
                tuple(text for text in conditions if not any(result.search(text) for result in results)),
                {
                    name: value
                    for name, value in task["gpu_fleet.nim." + resource].items()
                    if name in RESOURCE_OPTIONS[resource]
                },
            )
    return {resource: found[resource] for resource in CHAIN if resource in found}


def _trusted(value: t.Any) -> t.Any:
    """Templates of our own files, which ansible-core takes for plain text otherwise."""
    if isinstance(value, dict):
        return {key: _trusted(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_trusted(entry) for entry in value]
    return trust_as_template(value) if isinstance(value, str) else value


@functools.lru_cache(maxsize=None)
def role_variables(kind: str, roles: str = _ROLES) -> dict[str, t.Any]:
    """Variables of all roles of the collection: those of ``defaults`` or those of ``vars``."""
    found: dict[str, t.Any] = {}
    for role in sorted(os.listdir(roles)):
        path = os.path.join(roles, role, kind, "main.yml")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as stream:
                found.update(yaml_load(stream) or {})
    return t.cast("dict[str, t.Any]", _trusted(found))


def _condition(text: str) -> str:
    return "{{ %s }}" % text


_EXPRESSIONS = Expressions()
# As the documentation gives the key.
_EXPRESSIONS.learn("{{ lookup('ansible.builtin.env', 'NGC_API_KEY') }}")
_EXPRESSIONS.learn_reached(
    (_text for _part in parts().values() for _text in (*map(_condition, _part.when), *_part.options.values())),
    {**role_variables("defaults"), **role_variables("vars")},
)


def role_options(
    given: t.Any, task_vars: t.Mapping[str, t.Any], names: t.Collection[str] = CHAIN
) -> dict[str, dict[str, t.Any]]:
    """Options of those resources of ``names`` that the roles would set up with the variables of a host.

    Args:
        given: The templar of the task.
    """
    variables = {**role_variables("defaults"), **task_vars, **role_variables("vars")}
    templar: t.Any = None

    def render(value: t.Any) -> t.Any:
        nonlocal templar
        try:
            return _EXPRESSIONS.render(value, variables)
        except NotPlainError:
            templar = templar or given.copy_with_new_env(available_variables=variables)
            return templar.template(_trusted(value))

    options: dict[str, dict[str, t.Any]] = {}
    for resource, part in parts().items():
        if resource not in names:
            continue
        try:
            if all(boolean(render(_condition(condition))) for condition in part.when):
                options[resource] = {name: render(value) for name, value in part.options.items()}
        except (AnsibleError, TypeError, RecursionError):
            # The message may quote a template with a secret in it.
            raise AnsibleActionFail(
                "The variables of role %s that %s needs cannot be resolved; gpu_fleet.nim.validate_inventory says "
                "which, and why." % (part.role, resource)
            ) from None
    if "nim_health" in options:
        options["nim_health"]["models"] = without_secrets(options["nim_health"]["models"])
    return options


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible-core ships no type information
    TRANSFERS_FILES = False
    _supports_check_mode = True
    #: The module that is given the options.
    module = "gpu_fleet.nim.gpu_host_plan"
    #: Made once a run, for modules that every run asks.
    payload: Payload | None = Payload("gpu_host_plan")

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        super().run(tmp, task_vars)
        task_vars = task_vars or {}
        given = dict(self._task.args)
        if not any(name in given for name in CHAIN):
            given.update(self.options(task_vars))
        if self.payload is not None:
            self.payload.put()
        result: dict[str, t.Any] = self._execute_module(module_name=self.module, module_args=given, task_vars=task_vars)
        if self.payload is not None:
            self.payload.keep()
        return result

    def options(self, task_vars: t.Mapping[str, t.Any]) -> dict[str, dict[str, t.Any]]:
        return role_options(self._templar, task_vars)
