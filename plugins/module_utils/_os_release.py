# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Which operating system a host runs, as os-release(5) says it."""

from __future__ import annotations

import shlex
import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._host import Host
from ._untrusted import whole_number

#: Rebuilds that NVIDIA serves from the directories of RHEL.
_RHEL_REBUILDS = frozenset({"rhel", "rocky", "almalinux", "centos", "ol"})


@dataclass(frozen=True)
class OsRelease:
    """The fields of os-release that choose packages and repositories.

    Attributes:
        id: ``ID``, for example ``ubuntu``, ``debian``, ``rocky``.
        version_id: ``VERSION_ID``, for example ``24.04``, ``12``, ``9.4``; empty on rolling releases.
        major: Number before the first dot of ``version_id``; 0 when there is none.
        codename: ``VERSION_CODENAME``, for example ``noble``; empty where the distribution has none.
        like: ``ID_LIKE``, most similar first.
        pretty: ``PRETTY_NAME``, for messages.
    """

    id: str
    version_id: str = ""
    major: int = 0
    codename: str = ""
    like: t.Tuple[str, ...] = ()
    pretty: str = ""

    @property
    def family(self) -> str:
        """``debian``, ``rhel``, ``suse``, or the ID itself when the family is unknown."""
        names = (self.id, *self.like)
        if "debian" in names or "ubuntu" in names:
            return "debian"
        if self.id in _RHEL_REBUILDS or self.id in ("fedora", "amzn") or "rhel" in names or "fedora" in names:
            return "rhel"
        if "suse" in names or "sles" in names or any(name.startswith("opensuse") for name in names):
            return "suse"
        return self.id

    @property
    def repository_distribution(self) -> str:
        """Directory name in NVIDIA's network repository: ``ubuntu2404``, ``debian12``, ``rhel9``."""
        if self.id == "ubuntu":
            return "ubuntu" + self.version_id.replace(".", "")
        if self.id in _RHEL_REBUILDS:
            return "rhel%d" % self.major
        if self.id.startswith("opensuse"):
            return "opensuse%d" % self.major
        if self.id == "sles":
            return ("sles%d" if self.major < 16 else "suse%d") % self.major
        return "%s%d" % (self.id, self.major)


def parse_os_release(text: str) -> OsRelease:
    """Parse the shell-like assignments of os-release(5); lines that are none are skipped."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if not equals or name.startswith("#"):
            continue
        try:
            words = shlex.split(value)
        except ValueError:
            continue
        fields[name] = " ".join(words)
    version = fields.get("VERSION_ID", "")
    major = version.split(".")[0]
    return OsRelease(
        id=fields.get("ID", "linux").lower(),
        version_id=version,
        major=whole_number(major),
        codename=fields.get("VERSION_CODENAME", "") or fields.get("UBUNTU_CODENAME", ""),
        like=tuple(fields.get("ID_LIKE", "").lower().split()),
        pretty=fields.get("PRETTY_NAME", ""),
    )


def read_os_release(host: Host) -> OsRelease:
    """The operating system of a host.

    Raises:
        FleetError: ``unsupported_os`` when the host has no os-release file.
    """
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        text = host.read_text(path)
        if text is not None:
            return parse_os_release(text)
    raise FleetError(
        "unsupported_os",
        "The operating system is unknown: the host has neither /etc/os-release nor /usr/lib/os-release; "
        "use a distribution that follows os-release(5).",
    )
