# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Paths, progress lines, commands and the lock that every part of the sandbox uses."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any, Iterable, Iterator

SOURCE = pathlib.Path(__file__).resolve().parent.parent  # tests/sandbox
CHECKOUT = SOURCE.parent.parent
# Everything the sandbox writes is below this directory.
ROOT = pathlib.Path(os.environ.get("GPU_FLEET_SANDBOX", str(CHECKOUT / ".sandbox"))).resolve()

SUBNET = "172.30.0.0/16"
GATEWAY = "172.30.0.1"
WORLD_ADDRESS = "172.30.0.2"
NETWORK = "fleet"
BRIDGE = "fleet0"

_STARTED = time.monotonic()
_PRINT_LOCK = threading.Lock()


class SandboxError(Exception):
    """Expected failure; the text says what was tried, what happened and what to do."""


def say(text: str) -> None:
    """Print one progress line with the seconds since the command began."""
    with _PRINT_LOCK:
        sys.stderr.write("[%6.1f s] %s\n" % (time.monotonic() - _STARTED, text))
        sys.stderr.flush()


class Progress:
    """The steps that are running; every 5 s one line about those that last."""

    def __init__(self) -> None:
        self.running: dict[str, float] = {}
        self.teller: threading.Thread | None = None
        self.lock = threading.Lock()

    def begin(self, text: str) -> None:
        with self.lock:
            self.running[text] = time.monotonic()
            if self.teller is None:
                self.teller = threading.Thread(target=self._tell, daemon=True)
                self.teller.start()

    def end(self, text: str) -> None:
        with self.lock:
            self.running.pop(text, None)

    def _tell(self) -> None:
        while True:
            time.sleep(5.0)
            with self.lock:
                if not self.running:
                    self.teller = None
                    return
                now = time.monotonic()
                lasting = {text: now - begin for text, begin in self.running.items() if now - begin >= 2}
            if lasting:
                say("... " + ", ".join("%s (%d s)" % item for item in lasting.items()))


_PROGRESS = Progress()


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Announce a step that lasts longer than a second, tell that it goes on, and how long it took."""
    begin = time.monotonic()
    announcer = threading.Timer(1.0, say, ["%s ..." % text])
    announcer.daemon = True
    announcer.start()
    _PROGRESS.begin(text)
    try:
        yield
    finally:
        announcer.cancel()
        _PROGRESS.end(text)
        if time.monotonic() - begin > 1.0:
            say("%s: %.1f s" % (text, time.monotonic() - begin))


def run(
    command: list[str],
    *,
    check: bool = True,
    stdin: bytes | None = None,
    env: dict[str, str] | None = None,
    cwd: pathlib.Path | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program; raise SandboxError with the end of its output when it fails."""
    done = subprocess.run(
        command,
        input=stdin if stdin is not None else b"",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        check=False,
    )
    if check and done.returncode != 0:
        output = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise SandboxError("%s: exit %d: %s" % (" ".join(command[:12]), done.returncode, output[-2000:]))
    return done


def output_of(command: list[str], **options: Any) -> str:
    """Standard output of a program that must succeed, without the last newline."""
    return run(command, **options).stdout.decode(errors="replace").strip()


@contextlib.contextmanager
def locked(name: str = "lock") -> Iterator[None]:
    """Hold an exclusive lock over all sandbox commands of this checkout; says so when it has to wait."""
    ROOT.mkdir(parents=True, exist_ok=True)
    with (ROOT / name).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with step("waiting for another sandbox command"):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def read_json(path: pathlib.Path, default: Any) -> Any:
    """Content of a JSON file, or `default` when there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return default


def write_text(path: pathlib.Path, text: str, mode: int = 0o644) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(".%s.%d.%d" % (path.name, os.getpid(), threading.get_ident()))
    temporary.write_text(text)
    temporary.chmod(mode)
    temporary.replace(path)


def digest(paths: Iterable[pathlib.Path], *texts: str) -> str:
    """Short hash over the names and contents of files (directories are walked) and over texts."""
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode() + b"\0")
    for path in paths:
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        for file in files:
            if "__pycache__" in file.parts or not file.exists():
                continue
            total.update(str(file.relative_to(path.parent)).encode() + b"\0")
            total.update(oct(file.stat().st_mode & 0o111).encode() + file.read_bytes() + b"\0")
    return total.hexdigest()[:12]
