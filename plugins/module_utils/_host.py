# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""All contact with the managed host goes through :class:`Host`, so that plans can be tested without one."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
import typing as t
from dataclasses import dataclass

from ._errors import FleetError, file_problem

#: Commands are parsed, so they must speak English.
_C_LOCALE = {"LC_ALL": "C.UTF-8", "LANGUAGE": "C"}
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class CommandResult:
    """What a finished command left behind; ``rc`` is 127 when the program does not exist and 124 after a time-out."""

    argv: tuple[str, ...]
    rc: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        return self.rc == 0

    def last_line(self) -> str:
        """The line that most likely says why a command failed."""
        for text in (self.stderr, self.stdout):
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if lines:
                return lines[-1]
        return "exit status %d without a message" % self.rc


@dataclass(frozen=True)
class FileStat:
    """Owner, permissions (the lower 12 bits) and size in bytes of a path; symbolic links are followed."""

    uid: int
    gid: int
    mode: int
    size: int
    is_dir: bool


class RunningCommand:
    """A program that was started and whose end is waited for later; see :meth:`Host.start`."""

    def __init__(self, argv: t.Sequence[str], process: subprocess.Popen[str], stdin: str | None = None) -> None:
        self._argv = tuple(argv)
        self._process = process
        self._stdin = stdin

    def result(self, timeout: float | None = None) -> CommandResult:
        """What it leaves behind, as :meth:`Host.run` tells it; ``timeout`` counts from now."""
        with self._process:
            try:
                stdout, stderr = self._process.communicate(self._stdin, timeout=timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                return CommandResult(self._argv, 124, "", "%s: no end after %s seconds" % (self._argv[0], timeout))
            except BaseException:
                self._process.kill()
                raise
        return CommandResult(self._argv, self._process.returncode, stdout, stderr)


def _started(argv: t.Sequence[str], stdin: str | None = None, env: t.Mapping[str, str] | None = None) -> RunningCommand:
    """Raises:
    OSError: When it cannot be started.
    """
    process = subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=_environment(env),
    )
    return RunningCommand(argv, process, stdin)


def _environment(env: t.Mapping[str, str] | None = None) -> dict[str, str]:
    path = _SYSTEM_PATH + ":" + os.environ.get("PATH", "")
    return {**os.environ, **_C_LOCALE, "PATH": path, **(env or {})}


class Host:
    """The managed host as the collection sees it: files, commands, time. Reads never raise for absence."""

    # -- commands ---------------------------------------------------------------------------------

    def run(
        self,
        argv: t.Sequence[str],
        *,
        stdin: str | None = None,
        env: t.Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> CommandResult:
        """Run a program without a shell. Secrets go into ``stdin`` or ``env``, never into ``argv``.

        Args:
            timeout: Seconds after which the program is killed and rc 124 returned.
        """
        try:
            return _started(argv, stdin, env).result(timeout)
        except FileNotFoundError:
            return CommandResult(tuple(argv), 127, "", "%s: command not found" % argv[0])
        except PermissionError as error:
            return CommandResult(tuple(argv), 126, "", str(error))

    def start(self, argv: t.Sequence[str]) -> RunningCommand | None:
        """Start a program without a shell and without input; None where it cannot be started, which :meth:`run` explains."""
        try:
            return _started(argv)
        except OSError:
            return None

    def check(
        self,
        argv: t.Sequence[str],
        *,
        reason: str,
        doing: str,
        remedy: str = "",
        stdin: str | None = None,
        env: t.Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> CommandResult:
        """Run a program that has to succeed.

        Raises:
            FleetError: With ``reason``; the sentence is "<doing> failed: <last line>. <remedy>".
        """
        result = self.run(argv, stdin=stdin, env=env, timeout=timeout)
        if not result.ok:
            message = "%s failed: %s" % (doing, result.last_line())
            if remedy:
                message = "%s. %s" % (message.rstrip("."), remedy)
            raise FleetError(
                reason,
                message,
                rc=result.rc,
                cmd=list(argv),
                stdout=result.stdout[-4000:],
                stderr=result.stderr[-4000:],
            )
        return result

    def which(self, program: str) -> str | None:
        """Absolute path of a program where :meth:`run` finds it, or None."""
        return shutil.which(program, path=_SYSTEM_PATH + ":" + os.environ.get("PATH", ""))

    # -- reading ----------------------------------------------------------------------------------

    def read_bytes(self, path: str) -> bytes | None:
        """Content of a file, or None when there is no such file.

        Raises:
            FleetError: ``unreadable``, also of a pipe or a device: a user who puts one into the place of a file must not keep
                root waiting or fill its memory.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            kind = os.fstat(descriptor).st_mode
            if stat.S_ISREG(kind):
                with open(descriptor, "rb") as stream:
                    return stream.read()
            os.close(descriptor)
            if stat.S_ISDIR(kind):
                return None
            if os.path.realpath(path) == os.devnull:
                # The usual way to switch a file off.
                return b""
            raise FleetError(
                "unreadable", "Reading %s failed: it is no file; remove what is in its place." % path, path=path
            )
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            # sysfs and procfs answer some reads with EIO, EINVAL or ENODEV: as good as absent.
            if path.startswith(("/sys/", "/proc/")):
                return None
            raise FleetError("unreadable", file_problem("Reading", path, error), path=path) from error

    def read_text(self, path: str) -> str | None:
        """Content of a file as UTF-8 (undecodable bytes replaced), or None when there is no such file."""
        content = self.read_bytes(path)
        return None if content is None else content.decode("utf-8", "replace")

    def list_dir(self, path: str) -> list[str]:
        """Sorted names in a directory; empty when there is no such directory."""
        try:
            return sorted(os.listdir(path))
        except OSError:
            return []

    def read_link(self, path: str) -> str | None:
        """Target of a symbolic link, or None."""
        try:
            return os.readlink(path)
        except OSError:
            return None

    def stat(self, path: str) -> FileStat | None:
        """Owner, mode and size of a path, or None when it does not exist."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        return FileStat(
            found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), found.st_size, stat.S_ISDIR(found.st_mode)
        )

    def exists(self, path: str) -> bool:
        return self.stat(path) is not None

    def free_bytes(self, path: str) -> int:
        """Bytes an unprivileged writer may still use on the file system of a path or of its nearest existing parent."""
        while not os.path.exists(path):
            path = os.path.dirname(path) or "/"
        space = os.statvfs(path)
        return space.f_bavail * space.f_frsize

    # -- writing ----------------------------------------------------------------------------------

    def write_file(self, path: str, content: str | bytes, *, mode: int, uid: int = 0, gid: int = 0) -> None:
        """Replace a file atomically: readers see the old content or the new one, with its final mode, never a part."""
        data = content.encode("utf-8") if isinstance(content, str) else content
        # A configuration file may be a symbolic link (etckeeper, /etc on another volume): keep the link.
        path = os.path.realpath(path)
        try:
            handle, temporary = tempfile.mkstemp(prefix=".%s." % os.path.basename(path), dir=os.path.dirname(path))
        except OSError as error:
            raise FleetError("write_failed", file_problem("Writing", path, error), path=path) from error
        try:
            with os.fdopen(handle, "wb") as stream:
                os.fchmod(stream.fileno(), mode)
                os.fchown(stream.fileno(), uid, gid)
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise FleetError("write_failed", file_problem("Writing", path, error), path=path) from error
        directory = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def make_dir(self, path: str, *, mode: int, uid: int = 0, gid: int = 0) -> None:
        """Create a directory (parents as 0755 root) or give an existing one this owner and mode."""
        try:
            os.makedirs(os.path.dirname(path.rstrip("/")), mode=0o755, exist_ok=True)
            os.makedirs(path, exist_ok=True)
            os.chown(path, uid, gid)
            os.chmod(path, mode)
        except OSError as error:
            raise FleetError("write_failed", file_problem("Creating directory", path, error), path=path) from error

    def remove(self, path: str) -> None:
        """Remove a file, or a directory with all it holds; absent is fine."""
        try:
            while os.path.isdir(path) and not os.path.islink(path):
                # Somebody else may remove it at the same time.
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        except OSError as error:
            raise FleetError("write_failed", file_problem("Removing", path, error), path=path) from error

    # -- identity and time ------------------------------------------------------------------------

    def kernel_release(self) -> str:
        return platform.release()

    def machine(self) -> str:
        """Machine hardware name as the kernel says it: ``x86_64``, ``aarch64``."""
        return platform.machine()

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
