# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Packages of Debian and Ubuntu: dpkg and apt."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os.path
import re
import typing as t

from ._apt_sources import without_repository
from ._errors import FleetError
from ._host import CommandResult, Host
from ._own_state import read_own_state
from ._package_versions import DPKG_QUERY, compare_debian
from ._packages import (
    LOCK_SIGNS,
    TRANSACTION_TIMEOUT,
    Available,
    Package,
    PackageManager,
    Repository,
    RepositoryState,
    listing,
    sort_newest_first,
    transaction_failed,
)
from ._repository_key import dearmor, is_binary_key
from ._untrusted import MapOf

#: Seconds to wait for another package tool (unattended-upgrades, cloud-init) to give its lock back.
LOCK_TIMEOUT = 600

APT_KEYRINGS = "/etc/apt/keyrings"
APT_SOURCES = "/etc/apt/sources.list.d"
#: Which keys were downloaded, so that another one in their place is seen.
APT_KEYS = "/var/lib/gpu_fleet/apt-keys.json"


def run_when_free(
    host: Host,
    argv: t.Sequence[str],
    *,
    env: t.Optional[t.Mapping[str, str]] = None,
    timeout: t.Optional[float] = None,
) -> CommandResult:
    """Run apt or dpkg, and again while another tool has a lock that they do not wait for.

    apt's ``DPkg::Lock::Timeout`` is for dpkg's locks alone: those of the package lists and of the downloaded archives
    apt-get tries once, and apt-mark tries any once.
    """
    deadline = host.monotonic() + LOCK_TIMEOUT
    while True:
        result = host.run(argv, env=env, timeout=timeout)
        if not lock_held(result) or host.monotonic() >= deadline:
            return result
        host.sleep(2)


def lock_held(result: CommandResult) -> bool:
    """Whether apt or dpkg failed because another tool has a lock."""
    return not result.ok and bool(LOCK_SIGNS.search(result.stderr))


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
        return run_when_free(
            self.host,
            ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=%d" % LOCK_TIMEOUT, *arguments],
            env=self._ENVIRONMENT,
            timeout=TRANSACTION_TIMEOUT,
        )

    def _known(self) -> t.Iterator[t.List[str]]:
        """Name, version, architecture and state of everything that dpkg knows.

        Never by name: resources that ask for different packages ask the same then, and a plan asks once.
        """
        for line in self.host.run(DPKG_QUERY).stdout.splitlines():
            found = line.split("\t")
            if len(found) == 4 and len(found[3]) >= 2:
                yield found

    def installed(self, *patterns: str) -> t.Dict[str, Package]:
        found: t.Dict[str, Package] = {}
        native = {"x86_64": "amd64", "aarch64": "arm64"}.get(self.host.machine(), "")
        wanted = re.compile("|".join(map(fnmatch.translate, patterns or ("*",))))
        for name, version, architecture, status in self._known():
            # Second letter: n and c are "not installed" and "only configuration files left".
            if not version or status[1] in "nc" or not wanted.match(name):
                continue
            if name in found and architecture != native:
                continue
            found[name] = Package(name, version, architecture, status[1] == "i", status[0] == "h")
        return found

    def interrupted(self) -> t.List[str]:
        return [name for name, dummy, dummy, status in self._known() if status[1] in "HUFWt" or status[2:3] == "R"]

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
            sort_newest_first(offers, compare_debian)
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
            key_present=self._key_stands(keyring),
            rivals=tuple(self._rivals(repository, path)),
            indexed=self._indexed(repository),
        )

    def _key_stands(self, keyring: str) -> bool:
        """Whether a keyring holds the key that was put there, and apt's own user (not root) can read it."""
        known = self._known_keys()
        content, found = self.host.read_bytes(keyring), self.host.stat(keyring)
        if content is None or found is None or not is_binary_key(content) or not found.mode & 0o004:
            return False
        return known.get(keyring, _digest(content)) == _digest(content)

    def _known_keys(self) -> t.Dict[str, str]:
        """Keyring -> digest of the key that was downloaded into it; what is not known is taken as it is.

        Raises:
            FleetError: ``state_unreadable`` when the file is broken; it is left as it is.
        """
        remedy = "without it the keys in %s are taken as they are" % APT_KEYRINGS
        return read_own_state(self.host, APT_KEYS, MapOf(str), remedy) or {}

    def _remember_key(self, keyring: str) -> None:
        content = self.host.read_bytes(keyring)
        known = self._known_keys()
        if content is None or known.get(keyring) == _digest(content):
            return
        known[keyring] = _digest(content)
        self.host.make_dir(os.path.dirname(APT_KEYS), mode=0o755)
        self.host.write_file(APT_KEYS, json.dumps(known, indent=2, sort_keys=True) + "\n", mode=0o644)

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
        # What is downloaded is noted at the end: before anything is changed it is known whether that can be.
        self._known_keys()
        content = self.repository_content(repository)[1]
        before = self.host.read_text(path)
        key_before = self.host.read_bytes(keyring)
        # The key first: a definition without it would break every later apt run of this host. Another URL may well be
        # signed with another key.
        if before != content or not self._key_stands(keyring):
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
        self._remember_key(keyring)

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
        if lock_held(result):
            raise transaction_failed(doing, result, apt_cause(result))
        if not result.ok:
            raise FleetError(
                "repository_unreachable",
                "%s failed: %s Check the URL, the proxy and the signing key." % (doing, apt_cause(result)),
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
            raise transaction_failed("Installing %s" % listing(wanted), result, apt_cause(result))

    def remove(self, *names: str, purge: bool = False) -> None:
        present = [name for name in names if name in self.installed(*names)]
        if not present:
            return
        result = self._apt("purge" if purge else "remove", "--allow-change-held-packages", *present)
        if not result.ok:
            raise transaction_failed("Removing %s" % ", ".join(present), result, apt_cause(result))

    def hold(self, *names: str) -> None:
        self._mark("hold", names, "Holding %s" % ", ".join(names))

    def unhold(self, *names: str) -> None:
        self._mark("unhold", names, "Releasing the hold of %s" % ", ".join(names))

    def _mark(self, verb: str, names: t.Sequence[str], doing: str) -> None:
        if not names:
            return
        result = run_when_free(self.host, ["apt-mark", verb, *names])
        if result.ok:
            return
        error = transaction_failed(doing, result, apt_cause(result))
        if error.reason == "package_failed":
            error.reason = "hold_failed"
        raise error

    def repair(self) -> None:
        deadline = self.host.monotonic() + LOCK_TIMEOUT
        while self.interrupted():
            result = self.host.run(
                ["dpkg", "--force-confdef", "--force-confold", "--configure", "-a"],
                env=self._ENVIRONMENT,
                timeout=TRANSACTION_TIMEOUT,
            )
            if result.ok and not self.interrupted():
                return
            # Half installed packages are normal while another tool is at work; dpkg itself does not wait for it.
            locked = lock_held(result)
            if locked and self.host.monotonic() < deadline:
                self.host.sleep(2)
                continue
            # What was cut off while it was unpacked dpkg cannot finish, nor what depends on it; apt unpacks it again.
            attempts = [] if locked else self._cut_off()
            for packages in attempts or ([[]] if result.ok else []):
                result = self._apt(
                    "install",
                    "--fix-broken",
                    "--reinstall",
                    "--no-remove",
                    "--no-install-recommends",
                    "--allow-change-held-packages",
                    "--allow-downgrades",
                    *packages,
                )
                if result.ok:
                    return
            raise transaction_failed("Finishing an interrupted installation", result, apt_cause(result))

    def _cut_off(self) -> t.List[t.List[str]]:
        """Packages that are half installed, as arguments of apt: what is to be tried first, and what after it.

        The newest version may not be wanted. In an upgrade dpkg knows the version that was there before and not the one that
        was being unpacked; others of the same transaction were unpacked already, and most often have the same one.
        Packages that are unpacked are not named: apt cannot put those in place again ("No file name for").
        """
        own: t.Dict[str, str] = {}
        unpacked: t.List[str] = []
        for name, version, dummy, status in self._known():
            if status[1:2] == "H" or status[2:3] == "R":
                own[name] = version
            elif status[1:2] == "U":
                unpacked.append(version)
        if not own:
            return []
        offers = self.available(*own)
        chosen = []
        for name, version in own.items():
            offered = [offer.version for offer in offers.get(name, [])]
            likely = next((found for found in [*unpacked, version] if found in offered), "")
            chosen.append("%s=%s" % (name, likely) if likely else name)
        return [chosen] if chosen == list(own) else [chosen, list(own)]


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def apt_cause(result: CommandResult) -> str:
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
    waited_for = [line for line in lines if line.startswith("Waiting for ") and "is held by" in line]
    if waited_for and LOCK_SIGNS.search(chosen) and "held by" not in chosen:
        # Where apt has waited itself, it names the process only meanwhile.
        chosen = waited_for[-1].split(": ", 1)[1]
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
