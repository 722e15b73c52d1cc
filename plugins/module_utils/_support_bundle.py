# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What somebody who helps from afar needs of a host, as one archive without secrets.

It is put together in memory: nothing is written on the host, so nothing can be left there.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import tarfile
import typing as t
import zlib

from ._docker_api import DockerApi
from ._errors import FleetError
from ._host import Host
from ._kernel_log import read_kernel_log
from ._nim_paths import (
    RUNTIME_DIRECTORY,
    configuration_path,
    configured_services,
    container_name,
    download_name,
    unit_name,
)
from ._redaction import Redactor
from ._text_table import shorten

Json = t.Dict[str, t.Any]

#: Lines and characters of one log, and characters of everything; of what is longer the end is kept.
LOG_LINES = 3000
LOG_CHARACTERS = 500_000
ALL_CHARACTERS = 12_000_000
#: Characters of one line: what is longer is hardly text.
LINE_CHARACTERS = 8000

#: Units that a GPU host's services hang on.
UNITS = (
    "docker.service",
    "docker.socket",
    "containerd.service",
    "nvidia-persistenced.service",
    "nvidia-fabricmanager.service",
    "nvidia-imex.service",
    "nvidia-cdi-refresh.service",
    "nvidia-cdi-refresh.path",
    "nim.target",
    "nim.slice",
)
FILES = (
    "/etc/docker/daemon.json",
    "/etc/nvidia-container-runtime/config.toml",
    "/etc/os-release",
    "/proc/driver/nvidia/version",
    "/proc/driver/nvidia/params",
    "/proc/cmdline",
    "/proc/meminfo",
    "/proc/loadavg",
    "/proc/mounts",
)
#: Name in the archive -> command.
COMMANDS: dict[str, tuple[str, ...]] = {
    "gpu/nvidia-smi.xml": ("nvidia-smi", "-q", "-x"),
    "gpu/nvidia-smi.txt": ("nvidia-smi",),
    "gpu/topology.txt": ("nvidia-smi", "topo", "-m"),
    "gpu/devices.txt": ("ls", "-l", "/dev", "/dev/char"),
    "docker/containers.txt": ("docker", "ps", "--all", "--no-trunc"),
    "docker/images.txt": ("docker", "images", "--digests"),
    "docker/disk.txt": ("docker", "system", "df"),
    "system/disk.txt": ("df", "--block-size=1M", "--print-type"),
    "system/inodes.txt": ("df", "--inodes"),
    "system/listeners.txt": ("ss", "-Htlnp"),
    "system/failed-units.txt": ("systemctl", "list-units", "--failed", "--all", "--no-pager", "--plain"),
    "system/uptime.txt": ("uptime",),
}
#: Variables as systemd shows them: with blanks inside they stand in quotes.
_VARIABLES = re.compile(r'"(?:\\.|[^"\\])*"|\S+')
_PACKAGES = re.compile(
    r"nvidia|cuda|docker|containerd|runc|libnvidia|linux-image|linux-headers|dkms|kernel|^xserver-xorg-video-nv"
)
_KERNEL_LINES = re.compile(
    r"NVRM|nvidia|Xid|nvlink|oom|Out of memory|Killed process|segfault|I/O error|EXT4-fs error|No space|pcieport.*error|AER",
    re.I,
)


class SupportBundle:
    """Collects and redacts; a part that cannot be had is a line that says why."""

    def __init__(self, host: Host, redactor: Redactor, api: DockerApi | None = None) -> None:
        self.host = host
        self.redactor = redactor
        self.api = api or DockerApi()
        self.entries: dict[str, str] = {}
        self.left_out: list[str] = []
        self._room = ALL_CHARACTERS

    # -- adding -----------------------------------------------------------------------------------

    def add_text(self, name: str, text: str, *, log: bool = False) -> None:
        """A text, redacted and cut to size: of a log the end is kept, of anything else the beginning."""
        lines = [line[:LINE_CHARACTERS] for line in text.splitlines()]
        if log:
            lines = lines[-LOG_LINES:]
        text = self.redactor.text("\n".join(lines) + "\n")
        room = min(LOG_CHARACTERS if log else 4 * LOG_CHARACTERS, self._room)
        if len(text) > room:
            self.left_out.append("%s: %d of %d characters" % (name, len(text) - room, len(text)))
            text = text[len(text) - room :] if log else text[:room]
        self._room -= len(text)
        self.entries[name] = text

    def add_data(self, name: str, data: t.Any) -> None:
        self.add_text(name, json.dumps(self.redactor.structure(data), indent=2, sort_keys=True, default=str))

    def _run(self, name: str, argv: t.Sequence[str], *, log: bool = False) -> None:
        done = self.host.run(argv, timeout=60)
        text = done.stdout
        if not done.ok:
            text += "[%s: exit status %d] %s\n" % (argv[0], done.rc, done.stderr.strip())
        elif log and done.stderr:
            text += done.stderr
        self.add_text(name, text, log=log)

    # -- the parts --------------------------------------------------------------------------------

    def collect(self, models: t.Iterable[str]) -> None:
        """Everything that is read on the host.

        Args:
            models: Names of models that are wanted; those that are there are found.
        """
        names = sorted({*models, *configured_services(self.host)})
        for name, argv in COMMANDS.items():
            self._run(name, argv)
        for path in FILES:
            self._file("files" + path, path)
        self._packages()
        self._docker()
        units = [*UNITS, *(unit_name(name) for name in names)]
        for unit in units:
            self._unit(unit)
        for name in names:
            self._file("nim/%s.json" % name, configuration_path(name))
            self._file("nim/%s.runtime.json" % name, "%s/%s.json" % (RUNTIME_DIRECTORY, name))
            for container in (container_name(name), download_name(name)):
                self._container(container)
        for record in self.host.list_dir("/var/lib/gpu_fleet"):
            if record.endswith(".json"):
                self._file("records/" + record, "/var/lib/gpu_fleet/" + record)
        kernel = [line for line in read_kernel_log(self.host) or () if _KERNEL_LINES.search(line.text)]
        self.add_text("system/kernel.log", "\n".join("%.3f %s" % (line.at, line.text) for line in kernel), log=True)

    def _file(self, name: str, path: str) -> None:
        try:
            text = self.host.read_text(path)
        except FleetError as error:
            self.add_text(name, error.message)
            return
        if text is None:
            return
        try:
            # As data, so that what is secret is known by the name of its key.
            data = json.loads(text) if path.endswith(".json") else None
        except ValueError:
            data = None
        if data is None:
            self.add_text(name, text)
        else:
            self.add_data(name, data)

    def _packages(self) -> None:
        for argv in (
            ("dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Package} ${Version}\\n"),
            ("rpm", "-qa", "--qf", "%{NAME} %{EPOCHNUM}:%{VERSION}-%{RELEASE}\\n"),
        ):
            done = self.host.run(argv, timeout=60)
            if done.ok:
                lines = [line for line in done.stdout.splitlines() if _PACKAGES.search(line)]
                self.add_text("system/packages.txt", "\n".join(sorted(lines)))
                return

    def _docker(self) -> None:
        for name, ask in (("info", self.api.info), ("version", self.api.version)):
            try:
                self.add_data("docker/%s.json" % name, ask())
            except FleetError as error:
                self.add_text("docker/%s.json" % name, error.message)

    def _unit(self, unit: str) -> None:
        shown = self.host.run(["systemctl", "show", unit], timeout=30).stdout
        if "LoadState=not-found" in shown.splitlines():
            return
        lines = []
        for line in shown.splitlines():
            key, separator, value = line.partition("=")
            if key == "Environment":
                value = " ".join(self._variable(found) for found in _VARIABLES.findall(value))
            lines.append(key + separator + value)
        self.add_text("units/%s.properties" % unit, "\n".join(lines))
        self._run("units/%s.txt" % unit, ["systemctl", "cat", "--no-pager", unit])
        argv = ["journalctl", "--no-pager", "--quiet", "--output=short-iso-precise", "--lines=%d" % LOG_LINES]
        self._run("journal/%s.log" % unit, [*argv, "--unit", unit], log=True)

    def _variable(self, word: str) -> str:
        quote = '"' if word.startswith('"') else ""
        return quote + self.redactor.environment([word.strip('"') if quote else word])[0] + quote

    def _container(self, name: str) -> None:
        try:
            inspected = self.api.container(name)
        except FleetError as error:
            self.add_text("containers/%s.txt" % name, error.message)
            inspected = None
        if inspected is not None:
            self.add_data("containers/%s.json" % name, inspected)
        # Also of containers that are gone.
        argv = ["journalctl", "--no-pager", "--quiet", "--output=short-iso-precise", "--lines=%d" % LOG_LINES]
        self._run("containers/%s.log" % name, [*argv, "CONTAINER_NAME=" + name], log=True)

    # -- the archive ------------------------------------------------------------------------------

    def manifest(self) -> Json:
        return {
            "files": {name: len(text.encode("utf-8", "replace")) for name, text in sorted(self.entries.items())},
            "cut": self.left_out,
            "masked": self.redactor.count,
        }

    def archive(self, top: str) -> bytes:
        """A ``.tar.gz`` in which everything lies below ``top``, readable for its owner alone."""
        entries = dict(self.entries)
        entries["manifest.json"] = json.dumps(self.manifest(), indent=2, sort_keys=True) + "\n"
        now = int(self.host.time())
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", mtime=now) as stream, tarfile.open(
            fileobj=stream, mode="w"
        ) as archive:
            for name, text in sorted(entries.items()):
                content = text.encode("utf-8", "replace")
                member = tarfile.TarInfo("%s/%s" % (top, name.lstrip("/")))
                member.size, member.mode, member.mtime = len(content), 0o600, now
                archive.addfile(member, io.BytesIO(content))
        return packed.getvalue()


# -- the way to the controller --------------------------------------------------------------------

#: Ansible blanks out secrets wherever they occur in a result; one of fewer characters occurs in any larger content.
SHORTEST_BLANKED = 4
#: Bytes of a bundle, packed or not; a character has four at most, and every file has a header.
LARGEST = 5 * ALL_CHARACTERS


def wrap(content: bytes, blanked: t.Iterable[str]) -> Json:
    """Content as text in which none of the values occurs that Ansible would blank out in it.

    Raises:
        FleetError: ``bundle_failed``.
    """
    values = [value for value in blanked if len(value) >= SHORTEST_BLANKED]
    for salt in range(256):
        text = base64.b64encode(content.translate(_table(salt))).decode("ascii")
        if not any(value in text for value in values):
            return {"salt": salt, "content": text}
    raise FleetError(
        "bundle_failed",
        "The support bundle cannot be handed over: values of secrets are so short that they occur in everything; give "
        "secret_environment values of at least 8 characters.",
    )


def unwrap(wrapped: t.Any) -> bytes:
    """What :func:`wrap` was given.

    Raises:
        FleetError: ``bundle_failed`` when it is nothing of the kind: it comes from a host in an unknown state.
    """
    try:
        content, salt = wrapped["content"], int(wrapped["salt"])
        if len(content) <= 2 * LARGEST:
            return base64.b64decode(content, validate=True).translate(_table(salt))
        error: Exception = ValueError("it is larger than any bundle")
    except (ValueError, ArithmeticError, LookupError, TypeError) as caught:
        error = caught
    raise _no_bundle(error)


def check_archive(content: bytes) -> None:
    """See to it that an archive from a host is safe to open.

    Raises:
        FleetError: ``bundle_failed`` for what no :class:`SupportBundle` has made.
    """
    try:
        wrong = _wrong_with(content)
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, ArithmeticError, RecursionError) as error:
        raise _no_bundle(error) from error
    if wrong:
        raise _no_bundle(ValueError(wrong))


def _wrong_with(content: bytes) -> str:
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
        unpacked = stream.read(LARGEST + 1)
    if len(unpacked) > LARGEST:
        return "it is larger than any bundle when it is unpacked"
    with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
        for member in archive:
            plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
            inside = not member.name.startswith("/") and ".." not in member.name.split("/")
            if not plain or not inside or not member.name.isprintable():
                return "one of its entries is no file, or lies outside of it"
    return ""


def _no_bundle(error: Exception) -> FleetError:
    return FleetError(
        "bundle_failed",
        "What the host sent is no support bundle and was not stored (%s); look at the host itself, and do not trust it before."
        % shorten(ascii(str(error) or type(error).__name__)[1:-1], 200),
    )


def _table(salt: int) -> bytes:
    return bytes(byte ^ salt for byte in range(256))
