# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Whether what is to be written has room on the file systems of a host, all of it together."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._host import Host
from ._untrusted import whole_number


def amount(size: float) -> str:
    """``2.8 GB``, in the decimal units that registries and disks are sold in."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return "%.1f %s" % (size / step, unit) if size < 100 * step else "%.0f %s" % (size / step, unit)
    return "%d B" % size


@dataclass(frozen=True)
class Need:
    """Bytes that something will take below a directory."""

    directory: str
    size: int
    what: str


@dataclass(frozen=True)
class FileSystem:
    """Where something is to be written, and how many bytes are free there."""

    mount: str
    free: int
    needs: t.Tuple[Need, ...]


def file_systems(host: Host, needs: t.Iterable[Need]) -> t.Tuple[FileSystem, ...]:
    """Sort needs by the file system that they fall on, and look how much is free there."""
    mounts = mount_points(host.read_text("/proc/self/mountinfo") or "")
    by_mount: t.Dict[str, t.List[Need]] = {}
    for need in needs:
        by_mount.setdefault(mount_of(need.directory, mounts), []).append(need)
    return tuple(
        FileSystem(mount, host.free_bytes(entries[0].directory), tuple(entries)) for mount, entries in by_mount.items()
    )


def check_space(found: t.Iterable[FileSystem]) -> None:
    """What is to be written on the same file system must fit there together.

    Raises:
        FleetError: ``disk_full``.
    """
    for mount, free, entries in ((system.mount, system.free, system.needs) for system in found):
        needed = sum(entry.size for entry in entries)
        if needed > free:
            paths = sorted({entry.directory for entry in entries})
            raise FleetError(
                "disk_full",
                "%s on %s needs about %s for %s, and %s is free; free space (docker system df, docker image prune), or "
                "move %s to a larger disk."
                % (
                    " and ".join(paths),
                    mount,
                    amount(needed),
                    " and ".join("%s: %s" % (entry.what, amount(entry.size)) for entry in entries),
                    amount(free),
                    "it" if len(paths) == 1 else "them",
                ),
                mount=mount,
                bytes_free=free,
                bytes_needed=needed,
            )


def mount_points(mountinfo: str) -> t.List[str]:
    """Mount points in ``/proc/self/mountinfo`` (proc(5)), with its octal escapes resolved."""
    found = []
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        # A relative or empty one is none: a line that was cut off.
        if len(fields) > 4 and fields[4].startswith("/"):
            found.append(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), fields[4]))
    return found


def mount_of(path: str, mounts: t.Iterable[str]) -> str:
    """The mount point a path is below."""
    path = path.rstrip("/") + "/"
    return max((mount for mount in mounts if path.startswith(mount.rstrip("/") + "/")), key=len, default="/")


def used_bytes(host: Host, directory: str) -> int:
    """Bytes that a model's files already take; 0 when unknown."""
    if not directory or not host.exists(directory):
        return 0
    # A cache on a network file system may hold many files: better a too careful answer than a long wait.
    answer = host.run(["du", "-s", "-B1", directory], timeout=20)
    first = answer.stdout.split("\t")[0].strip()
    return whole_number(first) if answer.ok else 0
