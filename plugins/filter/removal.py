# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters of the playbook that removes what the collection put on hosts."""

from __future__ import annotations

import contextlib
import typing as t

from ansible.errors import AnsibleFilterError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_cleanup import (
    listed_models,
    removal_of,
    unknown_caches,
)
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._answers import FACTS, read_answer


def _services(look: t.Any) -> list[t.Any]:
    """NIM services that ``gpu_host_info`` found on a host.

    Raises:
        FleetError: For what is no answer of that module.
    """
    answer = read_answer(look, FACTS) or {}
    if answer.get("failed"):
        raise FleetError(str(answer.get("reason") or "look_failed"), str(answer.get("msg") or "the look failed"))
    return answer.get("nim") or []


def removal(models: t.Any, look: t.Any, caches: t.Any = None) -> dict[str, t.Any]:
    """Models, images and caches to remove from one host."""
    try:
        return removal_of(listed_models(models), _services(look), caches)
    except FleetError as error:
        raise AnsibleFilterError(error.message) from error


def unknown(caches: t.Any, hosts: t.Any, variable: str) -> list[str]:
    """Names of caches that belong to no model of any host."""
    known: set[str] = set()
    try:
        for variables in hosts:
            # What is wrong with a host's answer is told by the removal of that host.
            with contextlib.suppress(FleetError):
                known.update(str(entry.get("name")) for entry in _services(variables.get(variable)))
            known.update(str(entry.get("name")) for entry in listed_models(variables.get("nim_models")))
        return unknown_caches(caches, known)
    except FleetError as error:
        raise AnsibleFilterError(error.message) from error


class FilterModule:
    """Filters that this file offers."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"removal": removal, "unknown_caches": unknown}
