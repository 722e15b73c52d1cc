# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Packages, holds and repositories of a host: apt and dnf behind one interface.

Ansible's own package modules cannot be used inside a resource (they are modules, not functions), and one resource must be
one execution on the host. Looks never go to the network; ``refresh``, ``install`` and ``apply_repository`` do.
"""

from __future__ import annotations

import abc
import base64
import binascii
import functools
import re
import ssl
import typing as t
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

from ._errors import FleetError
from ._host import CommandResult, Host
from ._os_release import OsRelease, read_os_release
from ._resource import Change, FileDiff

#: Seconds to wait for another package tool (unattended-upgrades, cloud-init) to give its lock back.
LOCK_TIMEOUT = 600
#: Seconds after which a package transaction counts as hanging.
TRANSACTION_TIMEOUT = 3600
#: Seconds for the download of a repository key.
KEY_TIMEOUT = 30

APT_KEYRINGS = "/etc/apt/keyrings"
APT_SOURCES = "/etc/apt/sources.list.d"
DNF_REPOSITORIES = "/etc/yum.repos.d"

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
        key_present: Whether the key file it refers to is there and is a key.
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
        FleetError: ``invalid_option`` when it is not http(s) with a host.
    """
    try:
        parts = urllib.parse.urlsplit(url.strip())
    except ValueError:
        # "https://[::1/path": brackets that do not match.
        parts = urllib.parse.urlsplit("")
    if "@" in parts.netloc:
        raise FleetError(
            "invalid_option",
            "%s = (not shown): there is a user name or password in the URL, which would lie readable for everybody on the "
            "host; leave it out and store it in /etc/apt/auth.conf.d (apt) or protect the mirror in another way."
            % option,
            option=option,
        )
    if parts.scheme not in ("http", "https") or not parts.netloc or re.search(r"\s", url.strip()):
        raise FleetError(
            "invalid_option",
            "%s = %s: not an http or https URL of a repository; write it with scheme and host, for example https://mirror.example.org/path."
            % (option, url),
            option=option,
        )
    return url.strip().rstrip("/")


# -- versions -------------------------------------------------------------------------------------


def _debian_order(char: str) -> int:
    if char == "~":
        return -1
    if char.isalpha():
        return ord(char)
    return ord(char) + 256


def _cut(pattern: str, text: str) -> t.Tuple[str, str]:
    """The start of a text that matches a pattern, and the rest."""
    found = re.match(pattern, text)
    end = found.end() if found else 0
    return text[:end], text[end:]


def _compare_debian_part(left: str, right: str) -> int:
    """Section "Version" of Debian Policy: alternate non-digit and digit runs; ``~`` sorts before the end."""
    while left or right:
        plain_left, left = _cut(r"\D*", left)
        plain_right, right = _cut(r"\D*", right)
        for index in range(max(len(plain_left), len(plain_right))):
            order_left = _debian_order(plain_left[index]) if index < len(plain_left) else 0
            order_right = _debian_order(plain_right[index]) if index < len(plain_right) else 0
            if order_left != order_right:
                return -1 if order_left < order_right else 1
        digits_left, left = _cut(r"\d*", left)
        digits_right, right = _cut(r"\d*", right)
        number_left, number_right = int(digits_left or "0"), int(digits_right or "0")
        if number_left != number_right:
            return -1 if number_left < number_right else 1
    return 0


def _split_debian(version: str) -> t.Tuple[int, str, str]:
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "0", version
    upstream, dash, revision = rest.rpartition("-")
    if not dash:
        upstream, revision = rest, ""
    return (int(epoch) if epoch.isdigit() else 0), upstream, revision


def compare_debian(left: str, right: str) -> int:
    """-1, 0 or 1 as ``dpkg --compare-versions`` orders two versions."""
    epoch_left, upstream_left, revision_left = _split_debian(left)
    epoch_right, upstream_right, revision_right = _split_debian(right)
    if epoch_left != epoch_right:
        return -1 if epoch_left < epoch_right else 1
    return _compare_debian_part(upstream_left, upstream_right) or _compare_debian_part(revision_left, revision_right)


def _compare_rpm_part(left: str, right: str) -> int:
    """rpmvercmp: segments of digits or letters; ``~`` before everything, ``^`` after the end, digits beat letters."""
    tokens = re.compile(r"~|\^|\d+|[A-Za-z]+")
    found_left, found_right = tokens.findall(left), tokens.findall(right)
    for index in range(max(len(found_left), len(found_right))):
        one = found_left[index] if index < len(found_left) else ""
        two = found_right[index] if index < len(found_right) else ""
        if one == two:
            continue
        if "~" in (one, two):
            return -1 if one == "~" else 1
        if "^" in (one, two):
            if not one or not two:
                return 1 if one else -1
            return -1 if one == "^" else 1
        if not one or not two:
            return -1 if not one else 1
        if one.isdigit() != two.isdigit():
            return 1 if one.isdigit() else -1
        if one.isdigit():
            if int(one) != int(two):
                return -1 if int(one) < int(two) else 1
            continue
        return -1 if one < two else 1
    return 0


def compare_rpm(left: str, right: str) -> int:
    """-1, 0 or 1 as rpm orders ``[epoch:]version[-release]``; a missing release matches any."""
    epoch_left, upstream_left, revision_left = _split_debian(left)
    epoch_right, upstream_right, revision_right = _split_debian(right)
    if epoch_left != epoch_right:
        return -1 if epoch_left < epoch_right else 1
    found = _compare_rpm_part(upstream_left, upstream_right)
    if found or not revision_left or not revision_right:
        return found
    return _compare_rpm_part(revision_left, revision_right)


def upstream_version(version: str) -> str:
    """Upstream part of a package version: ``5:28.3.3-1~debian.12`` -> ``28.3.3``, ``26.1.5+dfsg1-9`` -> ``26.1.5``."""
    upstream = _split_debian(version)[1]
    found = re.match(r"\d+(\.\d+)*", upstream)
    return found.group() if found else upstream


# -- keys -----------------------------------------------------------------------------------------


def download(url: str) -> bytes:
    """Content of a URL, trusting what the host's own trust store trusts.

    Raises:
        FleetError: ``repository_unreachable`` with the cause.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "gpu_fleet.nim"})  # noqa: S310 (scheme: check_url)
    try:
        opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=ssl.create_default_context()))
        with opener.open(request, timeout=KEY_TIMEOUT) as answer:
            return t.cast(bytes, answer.read())
    except urllib.error.HTTPError as error:
        raise FleetError(
            "repository_unreachable",
            "Downloading %s failed: HTTP status %d %s. Check the repository URL." % (url, error.code, error.reason),
            url=url,
        ) from error
    except (OSError, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise FleetError(
            "repository_unreachable",
            "Downloading %s failed: %s. Check the repository URL, the proxy, and for a private authority the host's "
            "trust store." % (url, cause),
            url=url,
        ) from error


def is_binary_key(content: t.Optional[bytes]) -> bool:
    """Whether bytes start like an OpenPGP public key packet (tag 6, RFC 9580 section 4.2), old or new format."""
    return content is not None and len(content) > 0 and (content[0] & 0xFC == 0x98 or content[0] == 0xC6)


def dearmor(content: bytes, url: str = "") -> bytes:
    """Binary form of an OpenPGP key, which every version of apt takes without gpg being installed.

    Raises:
        FleetError: ``invalid_key`` when the content is neither armoured nor binary key material.
    """
    if is_binary_key(content):
        return content
    text = content.decode("ascii", "replace").replace("\r\n", "\n")
    blocks = re.findall(r"-----BEGIN PGP PUBLIC KEY BLOCK-----\n(.*?)-----END PGP PUBLIC KEY BLOCK-----", text, re.S)
    result = b""
    for block in blocks:
        # Armour headers contain a colon ("Version: …"), the CRC line starts with "="; neither is base64.
        lines = block.split("\n")
        encoded = "".join(
            line.strip() for line in lines if line.strip() and not line.startswith("=") and ":" not in line
        )
        try:
            result += base64.b64decode(encoded, validate=True)
        except binascii.Error:
            result = b""
            break
    if not is_binary_key(result):
        raise FleetError(
            "invalid_key",
            "%s is not an OpenPGP public key (a proxy or a log-in page may have answered in its place); check the URL."
            % (url or "The downloaded key"),
            url=url,
        )
    return result


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
                why = "its signing key is missing"
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


def matches_version(version: str, wanted: str) -> bool:
    """Whether a package version is the wanted one.

    ``wanted`` may be a full package version (``1.17.4-1``), an upstream version (``1.17.4``), its leading components
    (``1.17`` or ``580``), or empty, which any version matches.
    """
    if not wanted or version == wanted:
        return True
    upstream = upstream_version(version)
    without_epoch = version.partition(":")[2] if ":" in version else version
    return without_epoch == wanted or upstream == wanted or upstream.startswith(wanted + ".")


# -- apt ------------------------------------------------------------------------------------------


class Apt(PackageManager):
    """Debian and Ubuntu."""

    family = "debian"
    compare = staticmethod(compare_debian)

    _ENVIRONMENT = {
        "DEBIAN_FRONTEND": "noninteractive",
        "APT_LISTCHANGES_FRONTEND": "none",
        # Ubuntu's needrestart restarts services after a transaction; which ones restart is decided here, not there.
        "NEEDRESTART_SUSPEND": "1",
    }

    def _apt(self, *arguments: str) -> CommandResult:
        return self.host.run(
            ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=%d" % LOCK_TIMEOUT, *arguments],
            env=self._ENVIRONMENT,
            timeout=TRANSACTION_TIMEOUT,
        )

    def installed(self, *patterns: str) -> t.Dict[str, Package]:
        result = self.host.run(
            ["dpkg-query", "-W", "-f=${Package}\\t${Version}\\t${Architecture}\\t${db:Status-Abbrev}\\n", *patterns]
        )
        found: t.Dict[str, Package] = {}
        native = {"x86_64": "amd64", "aarch64": "arm64"}.get(self.host.machine(), "")
        for line in result.stdout.splitlines():
            fields = line.split("\t")
            if len(fields) != 4 or not fields[1]:
                continue
            name, version, architecture, status = fields
            # Second letter: n and c are "not installed" and "only configuration files left".
            if len(status) < 2 or status[1] in "nc":
                continue
            if name in found and architecture != native:
                continue
            found[name] = Package(name, version, architecture, status[1] == "i", status[0] == "h")
        return found

    def interrupted(self) -> t.List[str]:
        result = self.host.run(["dpkg-query", "-W", "-f=${Package}\\t${db:Status-Abbrev}\\n"])
        names = []
        for line in result.stdout.splitlines():
            name, dummy, status = line.partition("\t")
            if len(status) >= 2 and (status[1] in "HUFWt" or status[2:3] == "R"):
                names.append(name)
        return names

    def available(self, *names: str) -> t.Dict[str, t.List[Available]]:
        if not names:
            return {}
        result = self.host.run(["apt-cache", "madison", *names])
        found: t.Dict[str, t.List[Available]] = {}
        for line in result.stdout.splitlines():
            fields = [field.strip() for field in line.split("|")]
            if len(fields) != 3 or not fields[2].endswith("Packages"):
                continue
            offer = Available(fields[0], fields[1], fields[2].split(" ")[0])
            offers = found.setdefault(offer.name, [])
            if all(known.version != offer.version for known in offers):
                offers.append(offer)
        for offers in found.values():
            _sort_newest_first(offers, compare_debian)
        return found

    # repositories

    def _paths(self, repository: Repository) -> t.Tuple[str, str]:
        return (
            "%s/%s.sources" % (APT_SOURCES, repository.name),
            "%s/%s.gpg" % (APT_KEYRINGS, repository.name),
        )

    def repository_content(self, repository: Repository) -> t.Tuple[str, str]:
        path, keyring = self._paths(repository)
        lines = [
            "# Managed by gpu_fleet.nim.",
            "Types: deb",
            "URIs: %s" % repository.url,
            "Suites: %s" % repository.suite,
        ]
        if repository.components:
            lines.append("Components: %s" % " ".join(repository.components))
        if repository.architectures:
            lines.append("Architectures: %s" % " ".join(repository.architectures))
        lines.append("Signed-By: %s" % keyring)
        return path, "\n".join(lines) + "\n"

    def repository_state(self, repository: Repository) -> RepositoryState:
        path, keyring = self._paths(repository)
        return RepositoryState(
            content=self.host.read_text(path),
            key_present=is_binary_key(self.host.read_bytes(keyring)),
            rivals=tuple(self._rivals(repository, path)),
            indexed=self._indexed(repository),
        )

    def _rivals(self, repository: Repository, own_path: str) -> t.List[str]:
        candidates = ["/etc/apt/sources.list"]
        candidates += ["%s/%s" % (APT_SOURCES, name) for name in self.host.list_dir(APT_SOURCES)]
        rivals = []
        for path in candidates:
            if path == own_path or not path.endswith((".list", ".sources")):
                continue
            text = self.host.read_text(path)
            if text and without_repository(path, text, repository) != text:
                rivals.append(path)
        return rivals

    def _indexed(self, repository: Repository) -> bool:
        """apt names its lists after the URL: scheme cut off, ``/`` as ``_``, odd characters percent-encoded."""
        stem = repository.url.split("://", 1)[1].rstrip("/").replace("_", "%5f").replace("/", "_")
        stem += "_" if repository.suite == "/" else "_dists_%s_" % repository.suite.replace("/", "_")
        return any(name.startswith(stem) and "Packages" in name for name in self.host.list_dir("/var/lib/apt/lists"))

    def apply_repository(self, repository: Repository) -> None:
        path, keyring = self._paths(repository)
        content = self.repository_content(repository)[1]
        before = self.host.read_text(path)
        key_before = self.host.read_bytes(keyring)
        # The key first: a definition without it would break every later apt run of this host. Another URL may well be
        # signed with another key.
        if before != content or not is_binary_key(key_before):
            key = dearmor(self.fetch(repository.key_url), repository.key_url)
            self.host.make_dir(APT_KEYRINGS, mode=0o755)
            self.host.write_file(keyring, key, mode=0o644)
        for rival in self._rivals(repository, path):
            text = without_repository(rival, self.host.read_text(rival) or "", repository)
            if text.strip():
                self.host.write_file(rival, text, mode=0o644)
            else:
                self.host.remove(rival)
        if before != content:
            self.host.write_file(path, content, mode=0o644)
        try:
            self.refresh(repository)
        except FleetError:
            for name, old in ((path, before), (keyring, key_before)):
                if old is None:
                    self.host.remove(name)
                elif self.host.read_bytes(name) != (old.encode("utf-8") if isinstance(old, str) else old):
                    self.host.write_file(name, old, mode=0o644)
            raise

    def refresh(self, repository: t.Optional[Repository] = None) -> None:
        options = ["-o", "APT::Update::Error-Mode=any"]
        doing = "Downloading the package lists"
        if repository is not None:
            # Only this one: another, broken repository of the host is not our affair.
            options += [
                "-o",
                "Dir::Etc::sourcelist=%s" % self._paths(repository)[0],
                "-o",
                "Dir::Etc::sourceparts=-",
                "-o",
                "APT::Get::List-Cleanup=0",
            ]
            doing = "Downloading the package lists of %s" % repository.url
        result = self._apt("update", *options)
        if not result.ok:
            raise FleetError(
                "repository_unreachable",
                "%s failed: %s Check the URL, the proxy and the signing key." % (doing, _apt_cause(result)),
                url=repository.url if repository else "",
                stderr=result.stderr[-4000:],
            )

    # packages

    def install(
        self, wanted: t.Mapping[str, t.Optional[str]], *, allow_removal: bool = False, reinstall: bool = False
    ) -> None:
        if not wanted:
            return
        self.repair()
        arguments = ["install", "--no-install-recommends", "--allow-downgrades", "--allow-change-held-packages"]
        arguments += ["-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"]
        if not allow_removal:
            arguments.append("--no-remove")
        if reinstall:
            arguments.append("--reinstall")
        arguments += [name if version is None else "%s=%s" % (name, version) for name, version in wanted.items()]
        result = self._apt(*arguments)
        if not result.ok and _stale_lists(result):
            # Lists that are missing or older than the mirror: one full refresh, one more try.
            self.refresh()
            result = self._apt(*arguments)
        if not result.ok:
            raise _transaction_failed("Installing %s" % _listing(wanted), result, _apt_cause(result))

    def remove(self, *names: str, purge: bool = False) -> None:
        present = [name for name in names if name in self.installed(*names)]
        if not present:
            return
        result = self._apt("purge" if purge else "remove", "--allow-change-held-packages", *present)
        if not result.ok:
            raise _transaction_failed("Removing %s" % ", ".join(present), result, _apt_cause(result))

    def hold(self, *names: str) -> None:
        if names:
            self.host.check(["apt-mark", "hold", *names], reason="hold_failed", doing="Holding %s" % ", ".join(names))

    def unhold(self, *names: str) -> None:
        if names:
            self.host.check(
                ["apt-mark", "unhold", *names],
                reason="hold_failed",
                doing="Releasing the hold of %s" % ", ".join(names),
            )

    def repair(self) -> None:
        deadline = self.host.monotonic() + LOCK_TIMEOUT
        while self.interrupted():
            result = self.host.run(
                ["dpkg", "--force-confdef", "--force-confold", "--configure", "-a"],
                env=self._ENVIRONMENT,
                timeout=TRANSACTION_TIMEOUT,
            )
            if result.ok:
                if not self.interrupted():
                    return
                # What was cut off while it was unpacked dpkg cannot finish; apt unpacks it again.
                result = self._apt(
                    "install", "--fix-broken", "--no-remove", "--no-install-recommends", "--allow-change-held-packages"
                )
                if result.ok:
                    return
            # Half installed packages are normal while another tool is at work; dpkg itself does not wait for it.
            if "lock" not in result.stderr or self.host.monotonic() >= deadline:
                raise _transaction_failed("Finishing an interrupted installation", result, _apt_cause(result))
            self.host.sleep(2)


def without_repository(path: str, text: str, repository: Repository) -> str:
    """An apt source file with all entries of one repository taken out (``.list``: lines, ``.sources``: stanzas)."""

    def same(url: str, suite: str) -> bool:
        url = re.sub(r"\$\(ARCH\)", "*", url.rstrip("/"))
        pattern = re.escape(url).replace(r"\*", "[a-z0-9]+") + r"\Z"
        return re.match(pattern, repository.url) is not None and suite.rstrip("/") == repository.suite.rstrip("/")

    if path.endswith(".sources"):
        stanzas = re.split(r"\n[ \t]*\n", text)
        kept = []
        for stanza in stanzas:
            fields = {
                name.lower(): value.strip()
                for name, dummy, value in (
                    line.partition(":") for line in stanza.splitlines() if not line.startswith(("#", " ", "\t"))
                )
            }
            enabled = fields.get("enabled", "yes").lower() != "no"
            urls, suites = fields.get("uris", "").split(), fields.get("suites", "").split()
            if enabled and any(same(url, suite) for url in urls for suite in suites):
                continue
            kept.append(stanza)
        if len(kept) == len(stanzas):
            return text
        if not any(re.search(r"(?im)^types:", stanza) for stanza in kept):
            return ""
        return "\n\n".join(kept).rstrip("\n") + "\n"
    lines = text.splitlines(True)
    kept = []
    for line in lines:
        found = re.match(r"\s*deb(?:-src)?\s+(?:\[[^\]]*\]\s*)?(\S+)\s+(\S+)", line)
        if not (found and same(found.group(1), found.group(2))):
            kept.append(line)
    if len(kept) == len(lines):
        return text
    if path != "/etc/apt/sources.list" and all(not line.strip() or line.lstrip().startswith("#") for line in kept):
        return ""
    return "".join(kept)


def _apt_cause(result: CommandResult) -> str:
    """The first error of apt or dpkg: the later ones only follow from it."""
    # dpkg says "error processing package NAME (--configure):" and what was wrong on the next line.
    text = re.sub(r"(?m)^(dpkg: error processing .*:)\n\s+", r"\1 ", result.stderr + "\n" + result.stdout)
    lines = [line.strip() for line in text.splitlines()]
    errors = [line for line in lines if line.startswith(("E:", "Err:", "dpkg: error"))]
    specific = [
        line
        for line in errors
        if "Sub-process /usr/bin/dpkg" not in line
        and "Some index files failed" not in line
        and "Unable to correct problems" not in line
    ]
    unmet = [line for line in lines if re.search(r"(Depends|Breaks|Conflicts|PreDepends): .*but", line)]
    chosen = (specific or unmet or errors or [result.last_line()])[0]
    if unmet and chosen not in unmet:
        chosen += " (%s)" % unmet[0]
    return chosen.replace("E: ", "", 1).rstrip(".") + "."


def _stale_lists(result: CommandResult) -> bool:
    text = result.stdout + result.stderr
    return any(
        sign in text
        for sign in (
            "Unable to locate package",
            "has no installation candidate",
            "404  Not Found",
            "404 Not Found",
            "was not found",
            "but it is not installable",
        )
    )


# -- dnf ------------------------------------------------------------------------------------------


class Dnf(PackageManager):
    """RHEL and its rebuilds, Fedora, Amazon Linux: dnf 4 and dnf 5."""

    family = "rhel"
    compare = staticmethod(compare_rpm)

    def _dnf(self, *arguments: str) -> CommandResult:
        return self.host.run(["dnf", "-q", "-y", *arguments], timeout=TRANSACTION_TIMEOUT)

    @property
    def _is_dnf5(self) -> bool:
        return self.host.which("dnf5") is not None

    def installed(self, *patterns: str) -> t.Dict[str, Package]:
        result = self.host.run(
            ["rpm", "-qa", "--qf", "%{NAME}\\t%|EPOCH?{%{EPOCH}:}|%{VERSION}-%{RELEASE}\\t%{ARCH}\\n", *patterns]
        )
        locked = self._locked()
        native = self.host.machine()
        found: t.Dict[str, Package] = {}
        for line in result.stdout.splitlines():
            fields = line.split("\t")
            if len(fields) != 3:
                continue
            name, version, architecture = fields
            if name in found:
                known = found[name]
                # Kernels install side by side: the newest counts. Other architectures never do.
                if architecture != native or (
                    known.architecture == native and compare_rpm(version, known.version) <= 0
                ):
                    continue
            found[name] = Package(name, version, architecture, True, _is_locked(name, version, locked))
        return found

    def _locked(self) -> t.List[str]:
        """Patterns of versionlock: ``name-epoch:version-release.*`` lines of dnf 4, ``name`` tables of dnf 5."""
        patterns = []
        for text in (self.host.read_text("/etc/dnf/plugins/versionlock.list") or "").splitlines():
            line = text.strip()
            if line and not line.startswith(("#", "!")):
                patterns.append(line)
        for block in (self.host.read_text("/etc/dnf/versionlock.toml") or "").split("[[packages]]")[1:]:
            found = re.search(r'(?m)^\s*name\s*=\s*"([^"]+)"', block)
            if found:
                patterns.append(found.group(1))
        return patterns

    def interrupted(self) -> t.List[str]:
        # rpm installs package by package; there is no half-configured state to find.
        return []

    def available(self, *names: str) -> t.Dict[str, t.List[Available]]:
        if not names:
            return {}
        form = "%{name}\\t%{epoch}:%{version}-%{release}\\t%{repoid}\\n"
        result = self.host.run(
            ["dnf", "-q", "-C", "repoquery", "--available", "--showduplicates", "--qf", form, *names], timeout=120
        )
        found: t.Dict[str, t.List[Available]] = {}
        for line in result.stdout.splitlines():
            fields = line.strip().split("\t")
            if len(fields) != 3:
                continue
            name, version, origin = fields
            if version.startswith("0:"):
                version = version[2:]
            offers = found.setdefault(name, [])
            if all(known.version != version for known in offers):
                offers.append(Available(name, version, origin))
        for offers in found.values():
            _sort_newest_first(offers, compare_rpm)
        return found

    # repositories

    def repository_content(self, repository: Repository) -> t.Tuple[str, str]:
        lines = [
            "# Managed by gpu_fleet.nim.",
            "[%s]" % repository.name,
            "name=%s" % (repository.description or repository.name),
            "baseurl=%s" % repository.url,
            "enabled=1",
            "gpgcheck=1",
            "repo_gpgcheck=%d" % repository.repo_gpgcheck,
            "gpgkey=%s" % repository.key_url,
        ]
        if repository.module_hotfixes:
            lines.append("module_hotfixes=1")
        return "%s/%s.repo" % (DNF_REPOSITORIES, repository.name), "\n".join(lines) + "\n"

    def repository_state(self, repository: Repository) -> RepositoryState:
        path, dummy = self.repository_content(repository)
        # dnf downloads the key itself, and two definitions of one repository do not disturb it.
        return RepositoryState(content=self.host.read_text(path), key_present=True, indexed=True)

    def apply_repository(self, repository: Repository) -> None:
        path, content = self.repository_content(repository)
        before = self.host.read_text(path)
        if before != content:
            self.host.write_file(path, content, mode=0o644)
        try:
            self.refresh(repository)
        except FleetError:
            if before is None:
                self.host.remove(path)
            elif before != content:
                self.host.write_file(path, before, mode=0o644)
            raise

    def refresh(self, repository: t.Optional[Repository] = None) -> None:
        arguments = ["makecache", "--refresh"]
        doing = "Downloading the package lists"
        if repository is not None:
            # --repo also turns skip_if_unavailable off for it in effect: nothing else is left to succeed.
            arguments += ["--repo", repository.name, "--setopt=%s.skip_if_unavailable=False" % repository.name]
            doing = "Downloading the package lists of %s" % repository.url
        result = self._dnf(*arguments)
        if not result.ok:
            raise FleetError(
                "repository_unreachable",
                "%s failed: %s Check the URL, the proxy and the signing key." % (doing, _dnf_cause(result)),
                url=repository.url if repository else "",
                stderr=result.stderr[-4000:],
            )

    # packages

    def install(
        self, wanted: t.Mapping[str, t.Optional[str]], *, allow_removal: bool = False, reinstall: bool = False
    ) -> None:
        if not wanted:
            return
        installed = self.installed(*wanted)
        upgrade: t.List[str] = []
        downgrade: t.List[str] = []
        again: t.List[str] = []
        for name, version in wanted.items():
            specification = name if version is None else "%s-%s" % (name, version)
            present = installed.get(name)
            if present is not None and version is not None and compare_rpm(version, present.version) < 0:
                downgrade.append(specification)
            elif reinstall and present is not None and version in (None, present.version):
                again.append(specification)
            else:
                upgrade.append(specification)
        # A lock of our own hides every other version from the solver.
        options = ["--disableplugin=versionlock"] if not self._is_dnf5 else []
        held = [name for name, package in installed.items() if package.held]
        if self._is_dnf5 and held:
            self.unhold(*held)
        if allow_removal:
            options.append("--allowerasing")
        for verb, specifications in (("install", upgrade), ("downgrade", downgrade), ("reinstall", again)):
            if specifications:
                result = self._dnf(verb, *options, *specifications)
                if not result.ok:
                    raise _transaction_failed("Installing %s" % ", ".join(specifications), result, _dnf_cause(result))

    def remove(self, *names: str, purge: bool = False) -> None:
        present = list(self.installed(*names))
        if present:
            result = self._dnf("remove", "--noautoremove", *present)
            if not result.ok:
                raise _transaction_failed("Removing %s" % ", ".join(present), result, _dnf_cause(result))

    def hold(self, *names: str) -> None:
        if not names:
            return
        if not self._is_dnf5 and self.host.run(["rpm", "-q", "python3-dnf-plugin-versionlock"]).rc != 0:
            self.install({"python3-dnf-plugin-versionlock": None})
        if self._is_dnf5 and self.host.run(["rpm", "-q", "dnf5-plugins"]).rc != 0:
            self.install({"dnf5-plugins": None})
        # A lock on an older version would stay beside the new one and win nothing.
        self.unhold(*names)
        self.host.check(
            ["dnf", "-q", "-y", "versionlock", "add", *names],
            reason="hold_failed",
            doing="Locking the version of %s" % ", ".join(names),
        )

    def unhold(self, *names: str) -> None:
        locked = self._locked()
        present = [name for name in names if any(_lock_name(pattern) == name for pattern in locked)]
        if present:
            self.host.check(
                ["dnf", "-q", "-y", "versionlock", "delete", *present],
                reason="hold_failed",
                doing="Unlocking the version of %s" % ", ".join(present),
            )

    def repair(self) -> None:
        return

    # module streams (EL 8 and 9)

    def module_stream(self, module: str) -> t.Optional[str]:
        """The enabled stream of a module, or None; read from dnf's own state file."""
        text = self.host.read_text("/etc/dnf/modules.d/%s.module" % module) or ""
        stream = re.search(r"(?m)^stream\s*=\s*(\S+)", text)
        state = re.search(r"(?m)^state\s*=\s*(\S+)", text)
        return stream.group(1) if stream and state and state.group(1) == "enabled" else None

    def switch_stream(self, module: str, stream: str) -> None:
        """Enable a stream; dnf refuses another one until the module is reset."""
        if self.module_stream(module) == stream:
            return
        for arguments in (["module", "reset", module], ["module", "enable", "%s:%s" % (module, stream)]):
            result = self._dnf(*arguments)
            if not result.ok:
                raise _transaction_failed("Enabling module stream %s:%s" % (module, stream), result, _dnf_cause(result))


def _lock_name(pattern: str) -> str:
    """Package name of a versionlock pattern: ``nvidia-open-3:580.95.05-1.el9.*`` -> ``nvidia-open``."""
    found = re.match(r"(.+?)-(?:\d+:)?[^-]+-[^-]+\Z", pattern)
    return found.group(1) if found else pattern


def _is_locked(name: str, version: str, patterns: t.Sequence[str]) -> bool:
    for pattern in patterns:
        if _lock_name(pattern) != name:
            continue
        rest = pattern[len(name) + 1 :]
        if not rest:
            return True
        rest = re.sub(r"\.\*\Z|\.[a-z0-9_]+\Z" if rest.endswith(".*") else r"\Z", "", rest)
        if compare_rpm(rest if ":" in rest else "0:" + rest, version if ":" in version else "0:" + version) == 0:
            return True
    return False


def _dnf_cause(result: CommandResult) -> str:
    """dnf's own sentence; of a conflict the first reason below it, without which it says nothing."""
    lines = [line.strip() for line in (result.stderr + "\n" + result.stdout).splitlines() if line.strip()]
    for line in lines:
        # "Error: GPG check FAILED" comes after it.
        if re.search(r"is not signed$|^Public key for .* is not installed|^Failing package is", line):
            return line.rstrip(".") + "."
    for index, line in enumerate(lines):
        if re.match(r"(Error|Problem( \d+)?|Errors during [^:]*):.", line):
            reasons = [one[2:] for one in lines[index + 1 : index + 2] if one.startswith("- ")]
            return line.rstrip(".") + (" (%s)." % reasons[0].rstrip(".") if reasons else ".")
    return result.last_line().rstrip(".") + "."


# -- shared ---------------------------------------------------------------------------------------


def _sort_newest_first(offers: t.List[Available], compare: t.Callable[[str, str], int]) -> None:
    offers.sort(key=functools.cmp_to_key(lambda left, right: compare(left.version, right.version)), reverse=True)


def _listing(wanted: t.Mapping[str, t.Optional[str]]) -> str:
    return ", ".join(name if version is None else "%s %s" % (name, version) for name, version in wanted.items())


def _transaction_failed(doing: str, result: CommandResult, cause: str) -> FleetError:
    reason = "package_failed"
    remedy = "Mend what it says and run again; what was finished stays."
    if "Could not get lock" in cause or "lock was locked" in cause:
        reason = "package_lock"
        remedy = "Another package tool is running on this host; wait for it and run again."
    elif "No space left" in cause:
        reason = "disk_full"
        remedy = "Free space on this host and run again."
    return FleetError(
        reason,
        "%s failed: %s %s" % (doing, cause, remedy),
        rc=result.rc,
        stdout=result.stdout[-4000:],
        stderr=result.stderr[-4000:],
    )


def package_manager(host: Host, release: t.Optional[OsRelease] = None) -> PackageManager:
    """The package tool of a host.

    Raises:
        FleetError: ``unsupported_os`` where neither apt nor dnf rules.
    """
    release = release or read_os_release(host)
    if release.family == "debian":
        return Apt(host)
    if release.family == "rhel":
        return Dnf(host)
    raise FleetError(
        "unsupported_os",
        "%s is not supported: packages are managed with apt (Debian, Ubuntu) or dnf (RHEL and its rebuilds)."
        % (release.pretty or release.id),
        os=release.id,
    )
