# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin util is PRIVATE to the collection; it may change at any time.
"""The roles' own templates, compiled once a run."""

from __future__ import annotations

import os
import re
import typing as t

import jinja2
import jinja2.nodes
from ansible.errors import AnsibleError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.gpu_fleet.nim.plugins.filter.wanted_images import wanted_images


class NotPlainError(Exception):
    """It takes ansible-core's own template engine."""


def _bool(value: t.Any) -> bool:
    return bool(boolean(value, strict=False))


def _lookup(name: str, *terms: str, default: t.Any = "") -> t.Any:
    if name != "ansible.builtin.env" or len(terms) != 1:
        raise jinja2.UndefinedError("only the environment is looked up here")
    return os.environ.get(terms[0], default)


class Expressions:
    """What stands between the braces of the roles' own templates, compiled once for all hosts.

    It is read when Ansible's main process loads this plugin, and its workers, one for every host and task, find it there;
    ansible-core compiles every template anew in each of them, after loading what is named in it. Only for values that are
    literally there: what an inventory gives as a template is for ansible-core, as is everything that fails here.
    """

    _WHOLE = re.compile(r"\s*\{\{(.*)\}\}\s*\Z", re.S)
    #: Most are one name, which needs no engine at all.
    _NAME = re.compile(r"\s*\{\{\s*([a-z_][a-z0-9_]*)\s*\}\}\s*\Z")

    def __init__(self) -> None:
        self.environment = jinja2.Environment(undefined=jinja2.StrictUndefined)  # noqa: S701  # no HTML is made here
        self.environment.filters.update({"bool": _bool, "gpu_fleet.nim.wanted_images": wanted_images})
        self.environment.globals["lookup"] = _lookup
        self.names: dict[str, str] = {}
        self.known: dict[str, tuple[frozenset[str], t.Callable[..., t.Any]] | None] = {}

    def learn_reached(self, templates: t.Iterable[t.Any], variables: t.Mapping[str, t.Any]) -> None:
        """Learn templates, and those among the values of variables that they lead to; compiling is what costs here."""
        seen: set[str] = set()
        waiting = list(templates)
        while waiting:
            template = waiting.pop()
            self.learn(template)
            for name in self.read_by(template) - seen:
                seen.add(name)
                waiting.append(variables.get(name))

    def read_by(self, template: t.Any) -> frozenset[str]:
        """Names of the variables that a learnt template reads."""
        if not isinstance(template, str):
            return frozenset()
        if template in self.names:
            return frozenset([self.names[template]])
        known = self.known.get(template)
        return known[0] if known else frozenset()

    def learn(self, template: t.Any) -> None:
        if not isinstance(template, str) or template in self.known or template in self.names:
            return
        name = self._NAME.match(template)
        if name and name.group(1) not in ("true", "false", "none"):
            self.names[template] = name.group(1)
            return
        found = self._WHOLE.match(template)
        self.known[template] = None
        if found and "{{" not in found.group(1):
            try:
                # No name is made within one expression: all that are read come from outside.
                nodes = self.environment.parse(template).find_all(jinja2.nodes.Name)
                names = {node.name for node in nodes} - {"lookup"}
                expression = self.environment.compile_expression(found.group(1), undefined_to_none=False)
            except jinja2.TemplateError:
                return
            self.known[template] = (frozenset(names), expression)

    def render(self, template: t.Any, variables: t.Mapping[str, t.Any]) -> t.Any:
        """The value of one of the roles' templates.

        Raises:
            NotPlainError: When it takes ansible-core to tell.
        """
        if _is_literal(template):
            return template
        name = self.names.get(template) if isinstance(template, str) else None
        if name is not None and name in variables:
            return self.render(variables[name], variables)
        known = self.known.get(template) if isinstance(template, str) else None
        if known is None:
            raise NotPlainError
        names, expression = known
        values = {name: self.render(variables[name], variables) for name in names if name in variables}
        try:
            value = expression(**values)
        except (jinja2.TemplateError, AnsibleError, TypeError) as error:
            raise NotPlainError from error
        if isinstance(value, jinja2.Undefined):
            raise NotPlainError
        return value


def _is_literal(value: t.Any) -> bool:
    """Whether nothing is in a value that a template engine would change."""
    if isinstance(value, dict):
        return all(_is_literal(key) and _is_literal(entry) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_literal(entry) for entry in value)
    return value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and "{" not in value)
