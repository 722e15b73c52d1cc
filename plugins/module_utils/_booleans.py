# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Truth as Ansible reads it in arguments (ansible.module_utils.parsing.convert_bool), where values come unconverted."""

from __future__ import annotations

import typing as t

_TRUE = ("yes", "on", "true", "1", "y", "t")
_FALSE = ("no", "off", "false", "0", "n", "f")


def parse_boolean(value: t.Any) -> bool | None:
    """None for what Ansible would not take as a boolean."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, (str, int)):
        return None
    text = str(value).lower()
    return True if text in _TRUE else False if text in _FALSE else None
