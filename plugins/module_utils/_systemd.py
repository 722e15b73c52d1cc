# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What systemd tells about a unit."""

from __future__ import annotations

import typing as t

from ._host import Host

#: What a look at a whole host asks about.
UNITS = (
    "docker.service",
    "docker.socket",
    "containerd.service",
    "nvidia-cdi-refresh.path",
    "nvidia-cdi-refresh.service",
    "nvidia-persistenced.service",
    "nvidia-fabricmanager.service",
)
PROPERTIES = (
    "LoadState",
    "UnitFileState",
    "ActiveState",
    "MainPID",
    "ExecStart",
    "FragmentPath",
    "DropInPaths",
    "RequiredBy",
    "BoundBy",
    "SocketGroup",
    "SocketMode",
)


class UnitTable:
    """The properties of all these units out of one question, for hosts that are only looked at."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._units: t.Optional[t.Dict[str, t.Dict[str, str]]] = None

    def properties(self, unit: str, names: t.Sequence[str]) -> t.Dict[str, str]:
        if unit not in UNITS or not set(names) <= set(PROPERTIES):
            return _ask(self._host, unit, names)
        if self._units is None:
            arguments = [word for name in PROPERTIES for word in ("-p", name)]
            result = self._host.run(["systemctl", "show", "--no-pager", *arguments, *UNITS])
            blocks = result.stdout.strip("\n").split("\n\n")
            # Else this systemd answers in another way: each unit is asked for alone.
            fits = result.ok and len(blocks) == len(UNITS)
            self._units = dict(zip(UNITS, map(_parse, blocks))) if fits else {}
        if unit not in self._units:
            return _ask(self._host, unit, names)
        return {name: value for name, value in self._units[unit].items() if name in names}


class LookedAtOnce(Host):
    """A host whose units do not change while it is looked at."""

    units: UnitTable


def unit_properties(host: Host, unit: str, *names: str) -> t.Dict[str, str]:
    """Properties of a systemd unit; empty where there is no systemd."""
    return host.units.properties(unit, names) if isinstance(host, LookedAtOnce) else _ask(host, unit, names)


def _ask(host: Host, unit: str, names: t.Sequence[str]) -> t.Dict[str, str]:
    arguments = [word for name in names for word in ("-p", name)]
    return _parse(host.run(["systemctl", "show", "--no-pager", *arguments, unit]).stdout)


def _parse(text: str) -> t.Dict[str, str]:
    found: t.Dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            found[name] = value
    return found
