# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A managed host in memory: files, directories, command answers, a clock that only moves when told."""

from __future__ import annotations

import errno
import fnmatch
import os
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError, file_problem
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import (
    CommandResult,
    FileStat,
    Host,
    RunningCommand,
)


class FakeRunningCommand(RunningCommand):
    """Runs when its end is waited for."""

    def __init__(self, host: FakeHost, argv: t.Sequence[str]) -> None:
        self._host = host
        self._argv = tuple(argv)

    def result(self, timeout: float | None = None) -> CommandResult:
        return self._host.run(self._argv, timeout=timeout)


Answer = t.Union[str, "tuple[int, str, str]", t.Callable[..., t.Any]]


class FakeHost(Host):
    """Answers from ``files`` and ``commands``; unknown commands end with rc 127 like on a real host.

    Attributes:
        files: path -> content.
        modes: path -> (mode, uid, gid) for files and directories that were written or set.
        dirs: directories that exist beside the parents of files.
        links: path -> target.
        commands: shell-style pattern of the joined argv -> stdout, (rc, stdout, stderr), or a
            callable(host, argv, stdin, env) that returns either and may change the host.
        calls: argv of every command that was run, in order.
        started: argv of every command that was started to run beside others.
    """

    def __init__(self, files: dict[str, str | bytes] | None = None, commands: dict[str, Answer] | None = None) -> None:
        self.files: dict[str, bytes] = {
            path: content.encode() if isinstance(content, str) else content for path, content in (files or {}).items()
        }
        self.modes: dict[str, tuple[int, int, int]] = {}
        self.dirs: set[str] = set()
        self.links: dict[str, str] = {}
        self.commands: dict[str, Answer] = dict(commands or {})
        self.calls: list[tuple[str, ...]] = []
        self.started: list[tuple[str, ...]] = []
        self.clock = 1_000_000.0
        self.free = 10**12
        self.release = "6.1.0-test-amd64"
        self.arch = "x86_64"

    def run(
        self,
        argv: t.Sequence[str],
        *,
        stdin: str | None = None,
        env: t.Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> CommandResult:
        self.calls.append(tuple(argv))
        line = " ".join(argv)
        for pattern, answer in self.commands.items():
            if line == pattern or fnmatch.fnmatchcase(line, pattern):
                given = answer(self, tuple(argv), stdin, env) if callable(answer) else answer
                if isinstance(given, str):
                    return CommandResult(tuple(argv), 0, given, "")
                rc, stdout, stderr = given
                return CommandResult(tuple(argv), rc, stdout, stderr)
        return CommandResult(tuple(argv), 127, "", "%s: command not found" % argv[0])

    def start(self, argv: t.Sequence[str]) -> RunningCommand | None:
        self.started.append(tuple(argv))
        return FakeRunningCommand(self, argv)

    def which(self, program: str) -> str | None:
        for pattern in self.commands:
            if pattern.split(" ")[0] == program:
                return "/usr/bin/" + program
        for directory in ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"):
            if "%s/%s" % (directory, program) in self.files:
                return "%s/%s" % (directory, program)
        return None

    def read_bytes(self, path: str) -> bytes | None:
        return self.files.get(path)

    def list_dir(self, path: str) -> list[str]:
        prefix = path.rstrip("/") + "/"
        known = list(self.files) + list(self.links) + list(self.dirs)
        return sorted({name[len(prefix) :].split("/")[0] for name in known if name.startswith(prefix)})

    def read_link(self, path: str) -> str | None:
        return self.links.get(path)

    def stat(self, path: str) -> FileStat | None:
        path = path.rstrip("/") or "/"
        if path in self.files:
            mode, uid, gid = self.modes.get(path, (0o644, 0, 0))
            return FileStat(uid, gid, mode, len(self.files[path]), False)
        if path in self.dirs or self.list_dir(path):
            mode, uid, gid = self.modes.get(path, (0o755, 0, 0))
            return FileStat(uid, gid, mode, 4096, True)
        return None

    def free_bytes(self, path: str) -> int:
        return self.free

    def write_file(self, path: str, content: str | bytes, *, mode: int, uid: int = 0, gid: int = 0) -> None:
        if self.stat(os.path.dirname(path)) is None:
            error = FileNotFoundError(errno.ENOENT, "No such file or directory")
            raise FleetError("write_failed", file_problem("Writing", path, error), path=path)
        self.files[path] = content.encode() if isinstance(content, str) else content
        self.modes[path] = (mode, uid, gid)

    def make_dir(self, path: str, *, mode: int, uid: int = 0, gid: int = 0) -> None:
        path = path.rstrip("/")
        self.dirs.add(path)
        self.modes[path] = (mode, uid, gid)

    def remove(self, path: str) -> None:
        prefix = path.rstrip("/") + "/"
        for known in [name for name in self.files if name == path or name.startswith(prefix)]:
            del self.files[known]
        self.dirs = {name for name in self.dirs if name != path and not name.startswith(prefix)}

    def kernel_release(self) -> str:
        return self.release

    def machine(self) -> str:
        return self.arch

    def monotonic(self) -> float:
        return self.clock

    def time(self) -> float:
        return self.clock

    def sleep(self, seconds: float) -> None:
        self.clock += seconds
