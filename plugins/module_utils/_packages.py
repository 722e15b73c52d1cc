# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Packages, holds and repositories of a host: apt and dnf behind one interface.

Ansible's own package modules cannot be used inside a resource (they are modules, not functions), and one resource must be
one execution on the host. Looks never go to the network; ``refresh``, ``install`` and ``apply_repository`` do.
"""

from __future__ import annotations

import abc
import functools
import re
import typing as t
import urllib.parse
from dataclasses import dataclass

from ._errors import FleetError
from ._host import CommandResult, Host
from ._os_release import OsRelease, read_os_release
from ._package_versions import matches_version
from ._redaction import scrub
from ._repository_key import download
from ._resource import Change, FileDiff

#: Seconds after which a package transaction counts as hanging.
TRANSACTION_TIMEOUT = 3600
#: What apt and dpkg say of a lock that another process has; not of one that cannot be had for another reason.
LOCK_SIGNS = re.compile(r"Could not get lock|is another process using it|locked by another process")

Fetch = t.Callable[[str], bytes]


# -- what there is --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """An installed package.

    Attributes:
        version: Full version as the package tool takes it: ``5:28.3.3-1~debian.12~bookworm``, ``3:580.95.05-1.el9``.
        complete: False when an interrupted transaction left it unpacked but not configured.
        held: Whether upgrades leave it alone (dpkg hold, dnf versionlock).
    """

    name: str
    version: str
    architecture: str = ""
    complete: bool = True
    held: bool = False


@dataclass(frozen=True)
class Available:
    """A version that a configured repository offers, as the last refresh saw it; ``origin`` is its URL or id."""

    name: str
    version: str
    origin: str = ""


@dataclass(frozen=True)
class Repository:
    """A package repository.

    Attributes:
        name: Stem of its files, for example ``nvidia-container-toolkit``.
        url: apt: the ``URIs`` field; dnf: the ``baseurl``. http or https.
        key_url: Where the signing key is (ASCII-armoured or binary, either will do).
        suite: apt only; ``/`` for a flat repository.
        components: apt only; empty for a flat repository.
        architectures: apt only; empty for all.
        description: For people.
        repo_gpgcheck: dnf only; whether the repository's index is signed as well as its packages.
        module_hotfixes: dnf only; whether its packages are seen through inactive module streams.
    """

    name: str
    url: str
    key_url: str
    suite: str = "/"
    components: t.Tuple[str, ...] = ()
    architectures: t.Tuple[str, ...] = ()
    description: str = ""
    repo_gpgcheck: bool = False
    module_hotfixes: bool = False


@dataclass(frozen=True)
class RepositoryState:
    """What a look found of one repository.

    Attributes:
        content: Text of its definition, None when absent.
        key_present: Whether the key it refers to is there, is the one that was put there, and can be read by the tool.
        rivals: Other files that define the same repository; apt refuses two definitions with different keys.
        indexed: Whether package lists of it were ever downloaded.
    """

    content: t.Optional[str] = None
    key_present: bool = False
    rivals: t.Tuple[str, ...] = ()
    indexed: bool = False


def check_url(option: str, url: str) -> str:
    """A repository URL without trailing slash.

    Raises:
        FleetError: ``invalid_option`` when it is not http(s) with a host, or could hold credentials; then it is not shown.
    """
    url = url.strip()
    # A password may hold slashes, and then the @ stands in what reads as the path; mirrors have no use for one there.
    if "@" in url or scrub(url) != url:
        raise FleetError(
            "invalid_option",
            "%s = (not shown): there is, or could be, a user name, password or token in the URL, which would lie readable for "
            "everybody on the host; leave it out and store it in /etc/apt/auth.conf.d (apt) or protect the mirror in another "
            "way (an @ that belongs to the path is written %%40)." % option,
            option=option,
        )
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        # "https://[::1/path": brackets that do not match.
        parts = urllib.parse.urlsplit("")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise FleetError(
            "invalid_option",
            "%s = (not shown): what follows the host's colon is no port, and could be a password; give a number from 1 to "
            "65535, or leave it out." % option,
            option=option,
        )
    if parts.scheme not in ("http", "https") or not parts.netloc or re.search(r"\s", url):
        raise FleetError(
            "invalid_option",
            "%s = %s: not an http or https URL of a repository; write it with scheme and host, for example https://mirror.example.org/path."
            % (option, url),
            option=option,
        )
    return url.rstrip("/")


# -- the interface --------------------------------------------------------------------------------


class PackageManager(abc.ABC):
    """Packages of one host. Use :func:`package_manager` to get the right one.

    Every method that starts with a verb of change (``install``, ``hold``, ``apply_repository``, …) raises FleetError
    with the tool's own last line in it.
    """

    family = ""
    #: Order of two versions as the package tool sees it.
    compare: t.Callable[[str, str], int]

    def __init__(self, host: Host, fetch: t.Optional[Fetch] = None) -> None:
        self.host = host
        self.fetch: Fetch = fetch or download

    # looks: no network

    @abc.abstractmethod
    def installed(self, *patterns: str) -> t.Dict[str, Package]:
        """Installed packages whose names match shell-style patterns."""

    @abc.abstractmethod
    def available(self, *names: str) -> t.Dict[str, t.List[Available]]:
        """Versions on offer per name, newest first; names nobody offers are missing. Uses the lists on the host."""

    @abc.abstractmethod
    def repository_state(self, repository: Repository) -> RepositoryState:
        """What is configured of a repository."""

    @abc.abstractmethod
    def interrupted(self) -> t.List[str]:
        """Names of packages that an interrupted transaction left half installed."""

    # plan (pure)

    @abc.abstractmethod
    def repository_content(self, repository: Repository) -> t.Tuple[str, str]:
        """Path and text of a repository's definition."""

    def plan_repository(self, resource: str, repository: Repository, state: RepositoryState) -> t.List[Change]:
        """Changes (action ``repository``, data ``repository``) that configure a repository; empty when it stands."""
        path, content = self.repository_content(repository)
        changes: t.List[Change] = []
        if state.content == content and state.key_present and not state.rivals:
            return changes
        before: t.Optional[str] = None if state.content is None else path
        why = "the packages come from there"
        diff: t.Optional[FileDiff] = FileDiff(path, state.content or "", content)
        if state.content == content:
            diff = None
            if state.key_present:
                before = " and ".join([path, *state.rivals])
                why = "two definitions of one repository, each with its key, stop the package tool"
            else:
                why = "its signing key is missing or another one, or the package tool cannot read it"
        changes.append(
            Change(
                resource,
                "repository %s" % repository.name,
                before,
                repository.url,
                why,
                action="repository",
                data={"repository": repository},
                diff=diff,
            )
        )
        return changes

    # changes

    @abc.abstractmethod
    def apply_repository(self, repository: Repository) -> None:
        """Write key and definition, take the place of rival definitions, and refresh this repository's lists."""

    @abc.abstractmethod
    def refresh(self, repository: t.Optional[Repository] = None) -> None:
        """Download package lists, of one repository or of all."""

    @abc.abstractmethod
    def install(
        self, wanted: t.Mapping[str, t.Optional[str]], *, allow_removal: bool = False, reinstall: bool = False
    ) -> None:
        """Install, upgrade or downgrade in one transaction.

        Args:
            wanted: Name -> exact version, or None for the newest on offer. Holds do not stop it.
            allow_removal: Whether the transaction may remove other packages to make room.
            reinstall: Unpack again even when the version is already there.
        """

    @abc.abstractmethod
    def remove(self, *names: str, purge: bool = False) -> None:
        """Remove packages; those that are not installed are fine."""

    @abc.abstractmethod
    def hold(self, *names: str) -> None:
        """Keep upgrades away from installed packages."""

    @abc.abstractmethod
    def unhold(self, *names: str) -> None:
        """Let upgrades reach packages again."""

    @abc.abstractmethod
    def repair(self) -> None:
        """Finish what an interrupted transaction left half done."""

    def newest(self, name: str, prefix: str = "") -> t.Optional[str]:
        """Newest version on offer whose upstream version is ``prefix`` or starts with ``prefix.``; None without one."""
        for offer in self.available(name).get(name, []):
            if matches_version(offer.version, prefix):
                return offer.version
        return None


# -- shared by the tools --------------------------------------------------------------------------


def plan_hold(
    resource: str, names: t.Sequence[str], installed: t.Mapping[str, Package], *, hold: bool, why: str
) -> t.List[Change]:
    """Holds of packages, those that are yet to be installed included, or their end.

    Args:
        resource: Name of the resource whose packages they are.
        why: What an unattended upgrade would do without them.
    """
    held = [name for name in names if name in installed and installed[name].held]
    loose = [name for name in names if name not in held]
    if hold and loose:
        return [Change(resource, "hold of %s" % ", ".join(loose), None, "held", why, action="hold")]
    if not hold and held:
        return [Change(resource, "hold of %s" % ", ".join(held), "held", None, "holding is off", action="unhold")]
    return []


def sort_newest_first(offers: t.List[Available], compare: t.Callable[[str, str], int]) -> None:
    offers.sort(key=functools.cmp_to_key(lambda left, right: compare(left.version, right.version)), reverse=True)


def listing(wanted: t.Mapping[str, t.Optional[str]]) -> str:
    return ", ".join(name if version is None else "%s %s" % (name, version) for name, version in wanted.items())


def transaction_failed(doing: str, result: CommandResult, cause: str) -> FleetError:
    reason = "package_failed"
    remedy = "Mend what it says and run again; what was finished stays."
    if LOCK_SIGNS.search(cause):
        reason = "package_lock"
        remedy = "Another package tool is running on this host; wait for it and run again."
    elif re.search("No space left|more space needed on|Failure writing output to destination", cause):
        reason = "disk_full"
        remedy = "Free space on this host and run again."
    elif "Hash Sum mismatch" in cause or "checksum doesn't match" in cause:
        reason = "package_damaged"
        remedy = "Another file came than the repository lists: mend it there, or in the mirror or proxy, and run again."
    return FleetError(
        reason,
        "%s failed: %s %s" % (doing, cause, remedy),
        rc=result.rc,
        stdout=result.stdout[-4000:],
        stderr=result.stderr[-4000:],
    )


# -- choice ---------------------------------------------------------------------------------------


def package_manager(host: Host, release: t.Optional[OsRelease] = None) -> PackageManager:
    """The package tool of a host.

    Raises:
        FleetError: ``unsupported_os`` where neither apt nor dnf rules.
    """
    # Imported here, because both build on this file; and a host needs only one of them.
    release = release or read_os_release(host)
    if release.family == "debian":
        from ._apt import Apt

        return Apt(host)
    if release.family == "rhel":
        from ._dnf import Dnf

        return Dnf(host)
    raise FleetError(
        "unsupported_os",
        "%s is not supported: packages are managed with apt (Debian, Ubuntu) or dnf (RHEL and its rebuilds)."
        % (release.pretty or release.id),
        os=release.id,
    )
