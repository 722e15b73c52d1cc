# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin util is PRIVATE to the collection; it may change at any time.
"""Copies of Ansible's data in plain Python types."""

from __future__ import annotations

import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleError
from ansible.release import __version__ as core_version

#: Before 2.19 ansible-core hands out the template itself where it cannot be resolved, in place of an error.
BEFORE_2_19 = tuple(int(part) for part in core_version.split(".")[:2]) < (2, 19)


def returned(value: t.Any) -> t.Any:
    """A copy of what a module returned, in which braces are text."""
    return _plain(value, str)


def resolved(value: t.Any) -> t.Any:
    """A copy of a variable; reading it resolves what Ansible resolves late.

    Raises:
        AnsibleError: For a template that cannot be resolved, and before 2.19 whatever the template raises.
    """

    def text(value: t.Any) -> str:
        found = str(value)
        # What is marked !unsafe is no template, whatever is in it (AnsibleUnsafe has this attribute).
        if BEFORE_2_19 and "{{" in found and "}}" in found and not getattr(value, "__UNSAFE__", False):
            raise AnsibleError("something in it is undefined")
        return found

    return _plain(value, text)


def _plain(value: t.Any, text: t.Callable[[t.Any], str]) -> t.Any:
    if isinstance(value, Mapping):
        return {_plain(key, text): _plain(entry, text) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, text) for entry in value]
    if isinstance(value, str):
        return text(value)
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)
