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
    "NeedDaemonReload",
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
    """The properties of many units out of one question, for hosts that are only looked at.

    Args:
        services: Units of the host that are asked about beside :data:`UNITS`.
    """

    def __init__(self, host: Host, services: t.Iterable[str] = ()) -> None:
        self._host = host
        self._names = (*UNITS, *services)
        self._units: t.Optional[t.Dict[str, t.Dict[str, str]]] = None

    def properties(self, unit: str, names: t.Sequence[str]) -> t.Dict[str, str]:
        """Properties of a unit; out of the one question where they are in it."""
        if not self.has([unit], names):
            return _ask(self._host, unit, names)
        return {name: value for name, value in self._answers()[unit].items() if name in names}

    def has(self, units: t.Iterable[str], names: t.Iterable[str]) -> bool:
        """Whether the one question tells all of this."""
        return {*units} <= {*self._names} and {*names} <= {*PROPERTIES} and bool(self._answers())

    def _answers(self) -> t.Dict[str, t.Dict[str, str]]:
        if self._units is None:
            result = self._host.run(self.question)
            # Empty where this systemd answers in another way: each unit is asked for alone then.
            self._units = _in_order(self._names, result.stdout) if result.ok else {}
        return self._units

    @property
    def question(self) -> t.List[str]:
        """The command that asks."""
        arguments = [word for name in PROPERTIES for word in ("-p", name)]
        return ["systemctl", "show", "--no-pager", *arguments, *self._names]


class LookedAtOnce(Host):
    """A host whose units do not change while it is looked at."""

    units: UnitTable


def unit_properties(host: Host, unit: str, *names: str) -> t.Dict[str, str]:
    """Properties of a systemd unit; empty where there is no systemd."""
    return host.units.properties(unit, names) if isinstance(host, LookedAtOnce) else _ask(host, unit, names)


def properties_of_units(host: Host, units: t.Sequence[str], *names: str) -> t.Dict[str, t.Dict[str, str]]:
    """Properties of several units with one question, where systemd answers it; empty ones where there is no systemd."""
    if isinstance(host, LookedAtOnce) and host.units.has(units, names):
        return {unit: host.units.properties(unit, names) for unit in units}
    shown = host.run(["systemctl", "show", "--property", ",".join(names), "--", *units]).stdout
    return _in_order(units, shown) or {unit: _ask(host, unit, names) for unit in units}


def _ask(host: Host, unit: str, names: t.Sequence[str]) -> t.Dict[str, str]:
    arguments = [word for name in names for word in ("-p", name)]
    return _parse(host.run(["systemctl", "show", "--no-pager", *arguments, unit]).stdout)


def _in_order(units: t.Sequence[str], shown: str) -> t.Dict[str, t.Dict[str, str]]:
    """The answer for several units by the names that were asked for, which for an alias is not its Id; empty if it has others."""
    blocks = shown.strip("\n").split("\n\n")
    return dict(zip(units, map(_parse, blocks))) if len(blocks) == len(units) else {}


def _parse(text: str) -> t.Dict[str, str]:
    found: t.Dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            found[name] = value
    return found
