# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Work that goes on when the module has returned and when the controller is gone.

A job is a forked process that holds a lock on ``<id>.lock`` as long as it lives and writes ``<id>.json``. The lock,
not a process id, says whether it is alive: the kernel drops it however the process ends. Who asks for a job that is
already running gets the running one.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import tempfile
import time
import traceback
import typing as t
from dataclasses import dataclass, field

from ._errors import FleetError, file_problem
from ._untrusted import parse_json, real_number
from ._zip_imports import import_all

#: On a tmpfs: after a reboot no job claims to run.
DIRECTORY = "/run/gpu_fleet/jobs"
#: Seconds between two writes of the progress.
WRITE_INTERVAL = 0.5
#: Seconds between two looks at a job that is waited for.
POLL_INTERVAL = 0.2

RUNNING = "running"
DONE = "done"
FAILED = "failed"
#: The process ended without saying how: killed, or out of memory.
LOST = "lost"


@dataclass(frozen=True)
class JobStatus:
    """A job as its file shows it.

    Attributes:
        state: ``running``, ``done``, ``failed`` or ``lost``.
        progress: The job's last report.
        result: What the finished work returned.
        error: ``reason``, ``message`` and ``facts`` of a failure.
        started, updated: Seconds since the epoch.
    """

    job_id: str
    state: str
    progress: t.Dict[str, t.Any] = field(default_factory=dict)
    result: t.Dict[str, t.Any] = field(default_factory=dict)
    error: t.Dict[str, t.Any] = field(default_factory=dict)
    started: float = 0.0
    updated: float = 0.0

    @property
    def finished(self) -> bool:
        return self.state != RUNNING

    def failure(self, doing: str) -> FleetError:
        """The error of a job that failed or was lost.

        Args:
            doing: What the job did, for the sentence about a lost one.
        """
        if self.state == LOST or not self.error:
            return FleetError(
                "job_lost",
                "%s ended without a result: its process was killed; see 'journalctl -k' for an out-of-memory kill, and "
                "run again." % doing,
                job=self.job_id,
            )
        facts = {str(key): value for key, value in _mapping(self.error.get("facts")).items()}
        reason, message = facts.pop("reason", None), facts.pop("message", None)
        reason, message = self.error.get("reason") or reason, self.error.get("message") or message
        return FleetError(str(reason or "job_lost"), str(message or "%s failed without saying why." % doing), **facts)


Report = t.Callable[[t.Mapping[str, t.Any]], None]
#: Does the job; may call the reporter as often as it likes.
Work = t.Callable[[Report], t.Dict[str, t.Any]]


def _mapping(value: t.Any) -> t.Dict[str, t.Any]:
    return value if isinstance(value, dict) else {}


class Jobs:
    """The jobs of this host.

    Args:
        directory: Where their files are.
    """

    def __init__(self, directory: str = DIRECTORY) -> None:
        self.directory = directory

    def start(self, job_id: str, work: Work) -> bool:
        """Start a job, or attach to it where it already runs.

        ``work`` runs in a forked process, which outlives the module's own files.

        Returns:
            Whether it was started now.

        Raises:
            FleetError: ``write_failed`` when the directory cannot be used.
        """
        lock = self._lock(job_id)
        if lock is None:
            return False
        try:
            import_all()
            # Written by the parent, so that no reader finds the end of an earlier job.
            self._write(job_id, {"state": RUNNING, "started": time.time(), "progress": {}})
            child = os.fork()
            if child == 0:
                self._become_job(job_id, work)
            os.waitpid(child, 0)
        finally:
            # The job's own copy of the descriptor keeps the lock.
            os.close(lock)
        return True

    def read(self, job_id: str) -> t.Optional[JobStatus]:
        """The state of a job, or None when there never was one since the last boot."""
        # Asked before the file is read: a job that ends in between has then written its end.
        alive = self._alive(job_id)
        try:
            with open(self._path(job_id, "json"), encoding="utf-8") as stream:
                found = parse_json(stream.read())
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(found, dict):
            return None
        state = str(found.get("state"))
        if (state == RUNNING and not alive) or state not in (RUNNING, DONE, FAILED, LOST):
            state = LOST
        return JobStatus(
            job_id,
            state,
            _mapping(found.get("progress")),
            _mapping(found.get("result")),
            _mapping(found.get("error")),
            real_number(found.get("started")),
            real_number(found.get("updated")),
        )

    def wait(self, job_ids: t.Sequence[str], seconds: t.Optional[float]) -> t.List[JobStatus]:
        """Wait until all jobs are finished or one has failed, at most this many seconds (None = no limit)."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            found = [status for status in map(self.read, job_ids) if status is not None]
            if all(status.finished for status in found) or any(status.state in (FAILED, LOST) for status in found):
                return found
            if end is not None and time.monotonic() >= end:
                return found
            time.sleep(POLL_INTERVAL)

    # -- files ------------------------------------------------------------------------------------

    def _path(self, job_id: str, suffix: str) -> str:
        return os.path.join(self.directory, "%s.%s" % (job_id, suffix))

    def _lock(self, job_id: str) -> t.Optional[int]:
        """Descriptor that holds the job's lock, or None when somebody else does."""
        try:
            os.makedirs(self.directory, mode=0o755, exist_ok=True)
            handle = os.open(self._path(job_id, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise FleetError(
                "write_failed", file_problem("Writing below", self.directory, error), path=self.directory
            ) from error
        for _attempt in range(5):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                # A reader holds it for an instant, a job for as long as it lives.
                time.sleep(0.01)
            else:
                return handle
        os.close(handle)
        return None

    def _alive(self, job_id: str) -> bool:
        try:
            handle = os.open(self._path(job_id, "lock"), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            # Shared, and given back at once: readers do not take each other for the job.
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(handle)
        return False

    def _write(self, job_id: str, content: t.Dict[str, t.Any]) -> None:
        content = dict(content, id=job_id, updated=time.time())
        handle, temporary = tempfile.mkstemp(prefix=".job.", dir=self.directory)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream)
        os.replace(temporary, self._path(job_id, "json"))

    # -- the other process ------------------------------------------------------------------------

    def _become_job(self, job_id: str, work: Work) -> t.NoReturn:
        """Runs in the forked child and never returns."""
        try:
            # A session of its own: no hangup when the SSH connection ends; and a second fork, so that it can never
            # get a terminal and its parent has nobody to reap.
            os.setsid()
            if os.fork() != 0:
                os._exit(0)
            os.chdir("/")
            self._detach_descriptors()
            self._run(job_id, work)
        except BaseException:
            # Nobody is there to read a traceback: the lock goes and the job counts as lost.
            os._exit(1)
        os._exit(0)

    @staticmethod
    def _detach_descriptors() -> None:
        """Let go of the connection: whoever waits for the module's output must see its end.

        Only the standard ones: a connection that the module still has open in Python must not lose its descriptor.
        """
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)

    def _run(self, job_id: str, work: Work) -> None:
        base = {"started": time.time(), "pid": os.getpid()}
        last: t.Dict[str, t.Any] = {"progress": {}, "at": 0.0}

        def report(progress: t.Mapping[str, t.Any]) -> None:
            last["progress"] = dict(progress)
            now = time.monotonic()
            if now - last["at"] >= WRITE_INTERVAL:
                last["at"] = now
                self._write(job_id, dict(base, state=RUNNING, progress=last["progress"]))

        try:
            result = work(report)
        except FleetError as error:
            ended = {
                "state": FAILED,
                "error": {"reason": error.reason, "message": error.message, "facts": error.facts},
            }
        except Exception as error:
            where = traceback.extract_tb(sys.exc_info()[2])[-1]
            # Without the text of the exception: it might repeat what it was given.
            ended = {
                "state": FAILED,
                "error": {
                    "reason": "internal_error",
                    "message": "The background job failed with %s at %s:%s; this is a defect, please report it."
                    % (type(error).__name__, os.path.basename(where.filename), where.lineno),
                    "facts": {},
                },
            }
        else:
            ended = {"state": DONE, "result": result}
        self._write(job_id, dict(base, progress=last["progress"], **ended))
