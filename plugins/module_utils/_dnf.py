# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Packages of RHEL and its rebuilds, Fedora and Amazon Linux: rpm with dnf 4 or dnf 5."""

from __future__ import annotations

import contextlib
import re
import typing as t

from ._errors import FleetError
from ._host import CommandResult
from ._package_versions import compare_rpm
from ._packages import (
    TRANSACTION_TIMEOUT,
    Available,
    Package,
    PackageManager,
    Repository,
    RepositoryState,
    sort_newest_first,
    transaction_failed,
)
from ._untrusted import whole_number

DNF_REPOSITORIES = "/etc/yum.repos.d"
#: State of the module streams (dnf.modularity(7)).
_STREAMS = "/etc/dnf/modules.d"
_OTHER_STREAMS = "/run/gpu_fleet/modules.d"
#: Package lists count as current however old they are, so that nothing is asked of a repository that is away.
LISTS_AS_THEY_ARE = "--setopt=*.metadata_expire=-1"
#: One package of the table that dnf prints before a transaction: name, architecture, version, repository, size. Long names
#: stand on a line of their own; packages that go have a repository with an @.
_COMING = re.compile(r"(?m)^ (\S+)\s+(\S+)\s+(\S+)\s+([^@\s]\S*)\s+\d[\d.]*(?: [kMGT])?\s*$")


class Dnf(PackageManager):
    """RHEL and its rebuilds, Fedora, Amazon Linux: dnf 4 and dnf 5."""

    family = "rhel"
    compare = staticmethod(compare_rpm)
    #: Command that dnf is started with, and options of its transactions.
    _view: t.Tuple[str, ...] = ()
    _options: t.Tuple[str, ...] = ()

    def _dnf(self, *arguments: str, quiet: bool = True) -> CommandResult:
        command = [*self._view, "dnf", *(["-q"] if quiet else []), "-y", *self._options, *arguments]
        return self.host.run(command, timeout=TRANSACTION_TIMEOUT)

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
        command = [*self._view, "dnf", "-q", "-C", "repoquery", "--available", "--showduplicates", "--qf", form, *names]
        result = self.host.run(command, timeout=120)
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
            sort_newest_first(offers, compare_rpm)
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
                    raise transaction_failed("Installing %s" % ", ".join(specifications), result, _dnf_cause(result))

    def download(self, wanted: t.Mapping[str, t.Optional[str]], *, again: bool = False) -> int:
        """Have all that an installation takes on the disk, checked, so that it then needs no repository.

        It stays there until it is installed: without keepcache dnf deletes it at the end of the next transaction, whichever
        that is. Transactions of this object then go by the lists that are there.

        Args:
            wanted: As for :meth:`install`.
            again: Download what is installed at that version as well, to install it again later.

        Returns:
            Bytes that it takes unpacked.

        Raises:
            FleetError: ``repository_unreachable``, ``package_damaged``, ``disk_full``, ``package_failed``, ….
        """
        self._options = ()
        installed = self.installed(*wanted) if wanted else {}
        coming: t.List[str] = []
        present: t.List[str] = []
        for name, version in wanted.items():
            there = name in installed and version in (None, installed[name].version)
            (present if there else coming).append(name if version is None else "%s-%s" % (name, version))
        size = self._download("install", "--allowerasing", *coming) if coming else 0
        size += self._download("reinstall", *present) if present and again else 0
        self._options = (LISTS_AS_THEY_ARE,)
        return size

    def _download(self, *verb: str) -> int:
        arguments = [*verb, "--downloadonly", "--setopt=keepcache=1"]
        arguments += ["--disableplugin=versionlock"] if not self._is_dnf5 else []
        # Where all of it is there already, the repository need not be.
        result = self._dnf("-C", *arguments, quiet=False)
        if not result.ok:
            result = self._dnf(*arguments, quiet=False)
        if not result.ok and not re.search("No space left|Failure writing", _dnf_cause(result)):
            # Lists older than the repository name files that are gone.
            self.refresh()
            result = self._dnf(*arguments, quiet=False)
        if not result.ok:
            specifications = [word for word in verb[1:] if not word.startswith("-")]
            raise transaction_failed("Downloading %s" % ", ".join(specifications), result, _dnf_cause(result))
        return self._unpacked_size(result.stdout)

    def _unpacked_size(self, output: str) -> int:
        """Bytes that the packages in dnf's table take when they are installed; 0 when there are none."""
        coming = ["%s-%s.%s" % (name, version, machine) for name, machine, version, _from in _COMING.findall(output)]
        if not coming:
            return 0
        form = "%{name}.%{arch}\\t%{installsize}\\n"
        command = [*self._view, "dnf", "-q", "-C", "repoquery", "--available", "--qf", form, *coming]
        # Two repositories may have the same package.
        lines = {line.strip() for line in self.host.run(command, timeout=120).stdout.splitlines()}
        return sum(whole_number(line.partition("\t")[2]) for line in lines)

    def remove(self, *names: str, purge: bool = False) -> None:
        present = list(self.installed(*names))
        if present:
            result = self._dnf("remove", "--noautoremove", *present)
            if not result.ok:
                raise transaction_failed("Removing %s" % ", ".join(present), result, _dnf_cause(result))

    def hold(self, *names: str) -> None:
        if not names:
            return
        self.install_lock_plugin()
        # A lock on an older version would stay beside the new one and win nothing.
        self.unhold(*names)
        self.host.check(
            ["dnf", "-q", "-y", LISTS_AS_THEY_ARE, "versionlock", "add", *names],
            reason="hold_failed",
            doing="Locking the version of %s" % ", ".join(names),
        )

    def install_lock_plugin(self) -> None:
        plugin = "dnf5-plugins" if self._is_dnf5 else "python3-dnf-plugin-versionlock"
        if self.host.run(["rpm", "-q", plugin]).rc != 0:
            self.install({plugin: None})

    def unhold(self, *names: str) -> None:
        locked = self._locked()
        present = [name for name in names if any(_lock_name(pattern) == name for pattern in locked)]
        if present:
            self.host.check(
                ["dnf", "-q", "-y", LISTS_AS_THEY_ARE, "versionlock", "delete", *present],
                reason="hold_failed",
                doing="Unlocking the version of %s" % ", ".join(present),
            )

    def repair(self) -> None:
        return

    # module streams (EL 8 and 9)

    def module_stream(self, module: str) -> t.Optional[str]:
        """The enabled stream of a module, or None; read from dnf's own state file."""
        text = self.host.read_text("%s/%s.module" % (_STREAMS, module)) or ""
        stream = re.search(r"(?m)^stream\s*=\s*(\S+)", text)
        state = re.search(r"(?m)^state\s*=\s*(\S+)", text)
        return stream.group(1) if stream and state and state.group(1) == "enabled" else None

    @contextlib.contextmanager
    def as_with_stream(self, module: str, stream: str) -> t.Iterator[None]:
        """Look and download as if a stream was enabled, while another one stays it for everybody else.

        dnf hides the packages of streams that are not enabled, and chooses dependencies among the rest. It finds its state in
        one directory, and no option names another: it gets to see one of ours, in a mount namespace that ends with it.
        """
        if not stream or self.module_stream(module) == stream:
            yield
            return
        # What a killed process has left.
        self.host.remove(_OTHER_STREAMS)
        self.host.make_dir(_OTHER_STREAMS, mode=0o755)
        if not self.host.exists(_STREAMS):
            self.host.make_dir(_STREAMS, mode=0o755)
        try:
            for name in self.host.list_dir(_STREAMS):
                self.host.write_file(
                    "%s/%s" % (_OTHER_STREAMS, name), self.host.read_text("%s/%s" % (_STREAMS, name)) or "", mode=0o644
                )
            content = "[%s]\nname=%s\nstream=%s\nprofiles=\nstate=enabled\n" % (module, module, stream)
            self.host.write_file("%s/%s.module" % (_OTHER_STREAMS, module), content, mode=0o644)
            script = 'mount --bind "$0" %s && exec "$@"' % _STREAMS
            self._view = ("unshare", "--mount", "sh", "-c", script, _OTHER_STREAMS)
            yield
        finally:
            self._view = ()
            self.host.remove(_OTHER_STREAMS)


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
    if any("Error downloading packages" in line for line in lines):
        # Every try of a package that could not be had; what comes last does not say why.
        tries = [line[len("[MIRROR] ") :] for line in lines if line.startswith("[MIRROR] ")]
        # What could not be written is seen as a wrong checksum as well.
        for line in [line for line in tries if "Failure writing" in line] or tries:
            return line.rstrip(".") + "."
    for line in lines:
        # "Error: GPG check FAILED" comes after it.
        if re.search(r"is not signed$|^Public key for .* is not installed|^Failing package is", line):
            return line.rstrip(".") + "."
    for index, line in enumerate(lines):
        if re.match(r"(Error|Problem( \d+)?|Errors during [^:]*):.", line):
            reasons = [one[2:] for one in lines[index + 1 : index + 2] if one.startswith("- ")]
            return line.rstrip(".") + (" (%s)." % reasons[0].rstrip(".") if reasons else ".")
    return result.last_line().rstrip(".") + "."
