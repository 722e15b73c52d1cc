# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters of the playbook that removes what the collection put on hosts."""

from __future__ import annotations

import typing as t

from ansible.errors import AnsibleFilterError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_cleanup import removal_of, unknown_caches


def removal(models: t.Any, look: t.Any, caches: t.Any = None) -> dict[str, t.Any]:
    """Models, images and caches to remove from one host."""
    try:
        return removal_of(models or [], (look or {}).get("nim") or [], caches)
    except FleetError as error:
        raise AnsibleFilterError(error.message) from error


def unknown(caches: t.Any, hosts: t.Any, variable: str) -> list[str]:
    """Names of caches that belong to no model of any host."""
    known: set[str] = set()
    for variables in hosts:
        look = variables.get(variable) or {}
        for entry in [*(variables.get("nim_models") or []), *(look.get("nim") or [])]:
            known.add(str(entry.get("name")))
    try:
        return unknown_caches(caches, known)
    except FleetError as error:
        raise AnsibleFilterError(error.message) from error


class FilterModule:
    """Filters that this file offers."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"removal": removal, "unknown_caches": unknown}
