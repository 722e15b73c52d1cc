# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin util is PRIVATE to the collection; it may change at any time.
"""Entries of ``nim_models`` on their way to a module."""

from __future__ import annotations

import typing as t


def without_secrets(models: t.Any) -> t.Any:
    """For modules that need no secret: what is not sent can be in no result. Whatever is no list of mappings stays."""
    if not isinstance(models, list):
        return models
    return [
        {key: value for key, value in entry.items() if key != "secret_environment"}
        if isinstance(entry, dict)
        else entry
        for entry in models
    ]
