# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""A host and its Docker that are only looked at: everything is asked once, and what takes long is asked first.

Nothing here needs what plans: half the time of a look goes into compiling that, and the host can answer meanwhile.
"""

from __future__ import annotations

import contextlib
import copy
import http.client
import typing as t

from ._docker_api import INFO, VERSION, DockerApi
from ._errors import FleetError
from ._gpu_bus import observe_pci
from ._host import CommandResult, FileStat, Host, RunningCommand
from ._nim_paths import configured_services, unit_name
from ._os_release import read_os_release
from ._package_versions import DPKG_QUERY
from ._systemd import LookedAtOnce, UnitTable

#: Arguments, input and additional environment.
_Command = t.Tuple[t.Tuple[str, ...], t.Optional[str], t.Tuple[t.Tuple[str, str], ...]]

#: Where dockerd says which process it is, unless it is told otherwise.
_DOCKERD_PID = "/var/run/docker.pid"


def _units_of_services(host: Host) -> list[str]:
    return ["nim.target", *map(unit_name, configured_services(host))]


class ReadOnlyHost(LookedAtOnce):
    """A host for looking only: writes are refused, and a command that several resources ask for is run once.

    A command is remembered because nothing changes between two looks of one plan.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self.units = UnitTable(self, _units_of_services(host))
        self._ran: dict[_Command, CommandResult] = {}
        self._started: dict[_Command, RunningCommand] = {}

    def start(self, argv: t.Sequence[str]) -> RunningCommand | None:
        raise AssertionError("a plan waits for what it runs: %s" % argv[0])

    def start_early(self, argv: t.Sequence[str]) -> None:
        """Start a command that :meth:`run` will be asked for; it runs while the caller does something else."""
        running = self._host.start(argv)
        if running is not None:
            self._started[tuple(argv), None, ()] = running

    def run(
        self,
        argv: t.Sequence[str],
        *,
        stdin: str | None = None,
        env: t.Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> CommandResult:
        key = (tuple(argv), stdin, tuple(sorted((env or {}).items())))
        if key not in self._ran:
            started = self._started.pop(key, None)
            self._ran[key] = (
                started.result(timeout)
                if started is not None
                else self._host.run(argv, stdin=stdin, env=env, timeout=timeout)
            )
        return self._ran[key]

    def which(self, program: str) -> str | None:
        return self._host.which(program)

    def read_bytes(self, path: str) -> bytes | None:
        return self._host.read_bytes(path)

    def list_dir(self, path: str) -> list[str]:
        return self._host.list_dir(path)

    def read_link(self, path: str) -> str | None:
        return self._host.read_link(path)

    def stat(self, path: str) -> FileStat | None:
        return self._host.stat(path)

    def free_bytes(self, path: str) -> int:
        return self._host.free_bytes(path)

    def write_file(self, path: str, content: str | bytes, *, mode: int, uid: int = 0, gid: int = 0) -> None:
        raise AssertionError("a plan writes nothing: %s" % path)

    def make_dir(self, path: str, *, mode: int, uid: int = 0, gid: int = 0) -> None:
        raise AssertionError("a plan writes nothing: %s" % path)

    def remove(self, path: str) -> None:
        raise AssertionError("a plan removes nothing: %s" % path)

    def kernel_release(self) -> str:
        return self._host.kernel_release()

    def machine(self) -> str:
        return self._host.machine()

    def monotonic(self) -> float:
        return self._host.monotonic()

    def time(self) -> float:
        return self._host.time()

    def sleep(self, seconds: float) -> None:
        self._host.sleep(seconds)


class DockerLook(DockerApi):
    """Docker that is only looked at: what several resources ask for is asked once."""

    def __init__(self) -> None:
        super().__init__()
        self._answers: dict[tuple[str, str], t.Any] = {}
        self._asked: dict[str, http.client.HTTPConnection] = {}

    def ask_early(self, path: str) -> None:
        """Send a question that :meth:`get` will be asked for; its answer is read then."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            self._asked[path] = super()._ask(path)

    def _ask(self, path: str) -> http.client.HTTPConnection:
        return self._asked.pop(path, None) or super()._ask(path)

    def get(self, path: str, parameters: t.Mapping[str, str] | None = None) -> t.Any:
        key = (path, repr(sorted((parameters or {}).items())))
        if key not in self._answers:
            self._answers[key] = super().get(path, parameters)
        # Nobody may change what another one is given.
        return copy.deepcopy(self._answers[key])

    def forget(self) -> None:
        self._answers.clear()
        while self._asked:
            self._asked.popitem()[1].close()


def ask_early(host: ReadOnlyHost, api: DockerLook, resources: t.Collection[str]) -> None:
    """Ask for what a plan of the whole host will ask for, and what takes those who are asked longest.

    A plan of few resources asks for less, and is left to do so itself. Nothing is waited for, and a Docker that sleeps
    behind its socket is not woken. nvidia-smi is not among it: while it runs it holds the GPUs, and the plan looks for
    those who do.
    """
    # What cannot be read is told by those who need it.
    with contextlib.suppress(FleetError):
        if not {"nvidia_driver", "docker_engine"} <= {*resources} or not observe_pci(host)[0]:
            return
        host.start_early(host.units.question)
        if _dockerd_runs(host):
            api.ask_early(INFO)
            api.ask_early(VERSION)
        if read_os_release(host).family == "debian":
            host.start_early(DPKG_QUERY)


def _dockerd_runs(host: Host) -> bool:
    pid = (host.read_text(_DOCKERD_PID) or "").strip()
    return pid.isdecimal() and (host.read_text("/proc/%s/comm" % pid) or "").strip() == "dockerd"
