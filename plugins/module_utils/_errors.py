# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The one kind of error that an operator is meant to read."""

from __future__ import annotations

import typing as t


class FleetError(Exception):
    """An expected failure: one sentence for a person, a stable reason for a program.

    Args:
        reason: Stable identifier in snake_case, for example ``disk_full``.
        message: What was tried, on what, what happened, and what to do about it.
        facts: JSON-serialisable details that are returned beside the message.
    """

    def __init__(self, reason: str, message: str, **facts: t.Any) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.facts: dict[str, t.Any] = facts
