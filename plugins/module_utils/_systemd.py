# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What systemd tells about a unit."""

from __future__ import annotations

import typing as t

from ._host import Host


def unit_properties(host: Host, unit: str, *names: str) -> t.Dict[str, str]:
    """Properties of a systemd unit; empty where there is no systemd."""
    arguments = [word for name in names for word in ("-p", name)]
    result = host.run(["systemctl", "show", "--no-pager", *arguments, unit])
    found: t.Dict[str, str] = {}
    for line in result.stdout.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            found[name] = value
    return found
