# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes Debian packages and flat apt repositories with nothing but the standard library (and gpg for signatures).

Everything is deterministic: the same input gives the same bytes, because times, owners and orders are fixed.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

#: Time stamp of every file in every package: 2026-01-01T00:00:00Z.
EPOCH = 1767225600

#: Maintainer scripts that dpkg knows, in the order in which they are stored.
SCRIPTS = ("preinst", "postinst", "prerm", "postrm", "triggers", "conffiles")


@dataclass
class Package:
    """A binary package. ``files`` maps an absolute path to (content, mode); ``links`` maps a path to its target."""

    name: str
    version: str
    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    scripts: dict[str, str] = field(default_factory=dict)
    architecture: str = "amd64"
    section: str = "non-free/utils"
    description: str = "stand-in of the gpu_fleet.nim sandbox"
    #: data.tar.gz made before, for contents that several packages share.
    data: bytes | None = None

    @property
    def filename(self) -> str:
        """Epochs are not part of file names."""
        return f"{self.name}_{self.version.split(':', 1)[-1]}_{self.architecture}.deb"

    def control(self) -> str:
        size = sum(len(content) for content, _mode in self.files.values()) // 1024 + 1
        fields = {
            "Package": self.name,
            "Version": self.version,
            "Architecture": self.architecture,
            "Maintainer": "gpu_fleet.nim sandbox <sandbox@example.invalid>",
            "Installed-Size": str(size),
            **{key: value for key, value in self.fields.items() if value},
            "Section": self.section,
            "Priority": "optional",
            "Description": self.description,
        }
        return "".join(f"{key}: {value}\n" for key, value in fields.items())

    def build(self) -> bytes:
        """The bytes of the .deb."""
        control = {"control": (self.control().encode(), 0o644)}
        for name in SCRIPTS:
            if name in self.scripts:
                mode = 0o644 if name in ("triggers", "conffiles") else 0o755
                control[name] = (self.scripts[name].encode(), mode)
        members = (
            ("debian-binary", b"2.0\n"),
            ("control.tar.gz", data_archive(control, {})),
            ("data.tar.gz", data_archive(self.files, self.links) if self.data is None else self.data),
        )
        out = io.BytesIO()
        out.write(b"!<arch>\n")
        for name, content in members:
            out.write(f"{name:<16}{EPOCH:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
            out.write(content + (b"\n" if len(content) % 2 else b""))
        return out.getvalue()


def data_archive(files: dict[str, tuple[bytes, int]], links: dict[str, str], level: int = 6) -> bytes:
    """A compressed archive of files and links, with their directories."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as tar:
        made = set()

        def add(name: str, kind: bytes, mode: int, content: bytes = b"", target: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.mtime, info.size, info.linkname = kind, mode, EPOCH, len(content), target
            info.uname = info.gname = "root"
            tar.addfile(info, io.BytesIO(content))

        def parents(path: str) -> None:
            directory = os.path.dirname(path)
            if directory not in ("", ".") and directory not in made:
                parents(directory)
                made.add(directory)
                add(directory, tarfile.DIRTYPE, 0o755)

        add("./", tarfile.DIRTYPE, 0o755)
        for path in sorted([*files, *links]):
            name = "./" + path.lstrip("/")
            parents(name)
            if path in links:
                add(name, tarfile.SYMTYPE, 0o777, target=links[path])
            elif path.endswith("/"):
                made.add(name.rstrip("/"))
                add(name, tarfile.DIRTYPE, files[path][1])
            else:
                add(name, tarfile.REGTYPE, files[path][1], files[path][0])
    return gzip.compress(raw.getvalue(), compresslevel=level, mtime=0)


@dataclass
class Key:
    """The signing key of the sandbox, in a GnuPG home of its own."""

    home: Path
    user: str = "gpu_fleet.nim sandbox <sandbox@example.invalid>"

    def ensure(self) -> None:
        if not (self.home / "pubring.kbx").exists():
            self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._gpg("--faked-system-time", _BORN, "--quick-generate-key", self.user, "ed25519", "sign", "never")

    def public(self, armor: bool) -> bytes:
        return self._gpg(*(["--armor"] if armor else []), "--export", self.user)

    def clear_sign(self, text: bytes) -> bytes:
        # A fixed time and a deterministic signature scheme (EdDSA): unchanged input gives an unchanged file.
        return self._gpg("--clear-sign", "--digest-algo", "SHA256", "--faked-system-time", _FAKED, stdin=text)

    def detach_sign(self, text: bytes) -> bytes:
        return self._gpg(
            "--armor", "--detach-sign", "--digest-algo", "SHA256", "--faked-system-time", _FAKED, stdin=text
        )

    def stop(self) -> None:
        """Ends the agent that gpg left behind."""
        subprocess.run(["gpgconf", "--homedir", str(self.home), "--kill", "all"], check=False, capture_output=True)

    def _gpg(self, *arguments: str, stdin: bytes = b"") -> bytes:
        argv = ["gpg", "--homedir", str(self.home), "--batch", "--yes", "--pinentry-mode", "loopback"]
        argv += ["--passphrase", "", "--quiet", *arguments]
        done = subprocess.run(argv, input=stdin, capture_output=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(argv)} failed: {done.stderr.decode().strip()}")
        return done.stdout


# Fixed times, so that the signature of unchanged data is unchanged; the key must be older than what it signs.
_BORN = "20260101T000000!"
_FAKED = "20260102T000000!"


def write_if_changed(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not (path.is_file() and path.read_bytes() == content):
        path.write_bytes(content)


def index_entry(package: Package, content: bytes, filename: str) -> str:
    digests = "".join(
        f"{label}: {hashlib.new(algorithm, content).hexdigest()}\n"
        for label, algorithm in (("MD5sum", "md5"), ("SHA256", "sha256"))
    )
    control = package.control()
    head, description = control.split("Description: ", 1)
    return f"{head}Filename: {filename}\nSize: {len(content)}\n{digests}Description: {description}"


def write_release(directory: Path, files: dict[str, bytes], fields: dict[str, str], key: Key | None) -> None:
    """Release, InRelease and Release.gpg over index files that are written too."""
    text = "".join(f"{name}: {value}\n" for name, value in fields.items())
    text += "Date: Thu, 01 Jan 2026 00:00:00 UTC\n"
    for label, algorithm in (("MD5Sum", "md5"), ("SHA256", "sha256")):
        text += f"{label}:\n"
        for name, content in sorted(files.items()):
            text += f" {hashlib.new(algorithm, content).hexdigest()} {len(content):>16} {name}\n"
    for name, content in files.items():
        write_if_changed(directory / name, content)
    write_if_changed(directory / "Release", text.encode())
    if key:
        write_if_changed(directory / "InRelease", key.clear_sign(text.encode()))
        write_if_changed(directory / "Release.gpg", key.detach_sign(text.encode()))


def flat_repository(directory: Path, packages: list[Package], key: Key | None, fields: dict[str, str]) -> None:
    """A repository whose suite is ``/`` (or ``./``): packages and indexes in one directory."""
    entries = []
    for package in sorted(packages, key=lambda one: (one.name, one.version)):
        content = package.build()
        write_if_changed(directory / package.filename, content)
        entries.append(index_entry(package, content, f"./{package.filename}"))
    index = "\n".join(entries).encode()
    write_release(directory, {"Packages": index, "Packages.gz": gzip.compress(index, mtime=0)}, fields, key)
    for stale in {path.name for path in directory.glob("*.deb")} - {package.filename for package in packages}:
        (directory / stale).unlink()
