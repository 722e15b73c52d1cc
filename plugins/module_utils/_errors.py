# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The one kind of error that an operator is meant to read."""

from __future__ import annotations

import errno
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


def check_choice(option: str, value: str, allowed: t.Sequence[str]) -> None:
    """Raises:
    FleetError: ``invalid_option``.
    """
    if value not in allowed:
        raise FleetError(
            "invalid_option", "%s = %r: not one of %s; choose one of them." % (option, value, ", ".join(allowed))
        )


#: What to do where the system refuses a file.
_FILE_REMEDIES = {
    errno.ENOSPC: "free space on its file system",
    errno.EDQUOT: "raise the quota of its file system",
    errno.EROFS: "mount its file system writable",
    errno.EIO: "check its disk (dmesg)",
    errno.EISDIR: "move the directory in its place away",
    errno.ENOTDIR: "move the file in the place of its directory away",
    errno.EEXIST: "move the file in the place of its directory away",
    errno.ENOENT: "create its directory",
    errno.ENOTEMPTY: "see what else writes there",
    errno.EBUSY: "unmount what is mounted there",
    errno.EACCES: "become root, or see who may (namei -l)",
    errno.EPERM: "become root, or see its attributes (lsattr)",
}


def file_problem(doing: str, path: str, error: OSError) -> str:
    """The sentence for a file that the system refuses.

    Args:
        doing: What was tried: ``Writing``, ``Reading``.
    """
    remedy = _FILE_REMEDIES.get(error.errno or 0, "see what is there (namei -l)")
    # The file of a whole directory that it was about; newer Pythons name it with its directory.
    name = error.filename if isinstance(error.filename, str) else ""
    inside = name.startswith(path.rstrip("/") + "/") or (name and "/" not in name)
    place = " at %s" % name if inside else ""
    return "%s %s failed%s: %s; %s and run again." % (doing, path, place, error.strerror or error, remedy)
