# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Starts the outside world (tests/sandbox/world): registry, repositories and names that the hosts see."""

from __future__ import annotations

from .common import SOURCE, say

WORLD = SOURCE / "world"
KEEP = {"world", "repositories"}


def start() -> None:
    """Build what is missing of the world and start it."""
    if not WORLD.exists():
        say("no world in this checkout: hosts only")


def stop() -> None:
    """Forget the world."""


def report() -> str:
    """One line about the world."""
    return "world: not there"
