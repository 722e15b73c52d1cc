# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The files of a host's NIM services as they were, so that the services can run again as they did.

The file is for root alone, as those among them that hold secrets are; it is gone when the deployment has ended.
"""

from __future__ import annotations

import json
import os
import typing as t
from dataclasses import dataclass

from ._host import Host
from ._nim_paths import (
    KEY_FILE,
    RUNTIME_DIRECTORY,
    UNIT_DIRECTORY,
    WRAPPER,
    configuration_path,
    secret_path,
    unit_name,
)
from ._own_state import read_own_state, unreadable
from ._untrusted import MapOf, misfit

PATH = "/var/lib/gpu_fleet/nim-deploy.before"
#: What all services share.
_SHARED = (KEY_FILE, WRAPPER, UNIT_DIRECTORY + "/nim.target", UNIT_DIRECTORY + "/nim.slice")


@dataclass(frozen=True)
class Snapshot:
    """Files and units of before.

    Attributes:
        files: Path -> content and mode; None for what was not there.
        enabled: Name of a service -> whether it was started at boot.
    """

    files: t.Mapping[str, t.Optional[t.Tuple[str, int]]]
    enabled: t.Mapping[str, bool]

    @staticmethod
    def exists(host: Host) -> bool:
        return host.exists(PATH)

    @staticmethod
    def forget(host: Host) -> None:
        if host.exists(PATH):
            host.remove(PATH)

    @staticmethod
    def take(host: Host, names: t.Iterable[str]) -> None:
        """Keep the files of these services, whether there are some or not."""
        services = sorted(set(names))
        files = {}
        for path in (*_SHARED, *(path for name in services for path in _paths(name))):
            text, found = host.read_text(path), host.stat(path)
            files[path] = None if text is None or found is None else [text, found.mode & 0o777]
        enabled = {name: _is_enabled(host, name) for name in services}
        host.make_dir(os.path.dirname(PATH), mode=0o755)
        host.write_file(PATH, json.dumps({"files": files, "enabled": enabled}, sort_keys=True) + "\n", mode=0o600)

    @classmethod
    def read(cls, host: Host) -> Snapshot | None:
        """What was kept; None where nothing was.

        Raises:
            FleetError: ``state_unreadable``.
        """
        remedy = "without it what ran before cannot be put back, so look at the services first"
        found = read_own_state(host, PATH, {"files": {}, "enabled": MapOf(bool)}, remedy, partial=True)
        if found is None:
            return None
        files, enabled = found.get("files"), found.get("enabled")
        if files is None or enabled is None or not all(map(_is_kept, files.values())):
            raise unreadable(PATH, "it does not hold files with their modes, and units", remedy)
        return cls(
            {path: None if kept is None else (kept[0], kept[1]) for path, kept in files.items()},
            {name: bool(was) for name, was in enabled.items()},
        )

    def different(self, host: Host) -> list[str]:
        """Services that do not run from the files of before."""
        shared = KEY_FILE if self.files.get(KEY_FILE) is not None else ""
        other_key = bool(shared) and not self._same(host, shared)
        return [
            name
            for name in self.enabled
            if (other_key and self.had(name)) or any(not self._same(host, path) for path in _paths(name))
        ]

    def had(self, name: str) -> bool:
        """Whether there was such a service."""
        return any(self.files.get(path) is not None for path in _paths(name))

    def _same(self, host: Host, path: str) -> bool:
        kept = self.files.get(path)
        return host.read_text(path) == (None if kept is None else kept[0])

    def restore(self, host: Host, names: t.Sequence[str]) -> None:
        """Put the files of these services back, and what all share.

        Raises:
            FleetError: ``systemctl_failed``, ``write_failed``.
        """
        for name in names:
            # Before the files: systemd must still know the unit that it disables.
            if not self.enabled[name] and _is_enabled(host, name):
                _systemctl(host, "disable", "--no-reload", unit_name(name))
        own = [path for name in names for path in _paths(name)]
        for path in (*_SHARED, *own):
            kept = self.files.get(path)
            if self._same(host, path):
                continue
            if kept is not None:
                host.write_file(path, kept[0], mode=kept[1])
            elif path in own:
                host.remove(path)
        for name in names:
            # The word of the unit's process is about what ran meanwhile.
            host.remove("%s/%s.json" % (RUNTIME_DIRECTORY, name))
            if self.enabled[name] and not _is_enabled(host, name):
                _systemctl(host, "enable", "--no-reload", unit_name(name))
        _systemctl(host, "daemon-reload")


def _is_kept(kept: t.Any) -> bool:
    """Whether it is a file's content and mode, or nothing for a file that was not there."""
    if kept is None:
        return True
    return isinstance(kept, list) and len(kept) == 2 and not misfit(kept[:1], [str]) and not misfit(kept[1:], [int])


def _paths(name: str) -> tuple[str, ...]:
    return (
        configuration_path(name),
        secret_path(name),
        "%s/%s" % (UNIT_DIRECTORY, unit_name(name)),
    )


def _is_enabled(host: Host, name: str) -> bool:
    shown = host.run(["systemctl", "show", "--property", "UnitFileState", "--value", unit_name(name)])
    return shown.stdout.strip() == "enabled"


def _systemctl(host: Host, *words: str) -> None:
    host.check(
        ["systemctl", *words],
        reason="systemctl_failed",
        doing="systemctl %s" % " ".join(words),
        remedy="See 'systemctl status %s'." % words[-1],
    )
