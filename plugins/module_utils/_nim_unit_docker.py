# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
# Part of the program that the units run, see _nim_unit_program: the standard library and other parts only.
"""The docker command line as the program of the units uses it: errors told apart, containers made, started and removed."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
import typing as t

#: Label that says what a container runs; a container with another value is replaced.
SPEC_LABEL = "io.gpu-fleet.nim.spec"

#: Seconds between two questions to a daemon that is away.
POLL_SECONDS = 1.0
#: Seconds after which a docker command counts as hanging; a stop has its own limit.
COMMAND_SECONDS = 120.0

_AWAY_TEXTS = (
    "cannot connect to the docker daemon",
    "is the docker daemon running",
    "error during connect",
    "connection refused",
    "connection reset",
    "unexpected eof",
    "shutting down",
    "broken pipe",
)

Json = t.Dict[str, t.Any]


class DockerAwayError(Exception):
    """The daemon does not answer; what is to be done later is unknown until it does."""


class BadConfigurationError(Exception):
    """No repetition can help."""


class StartFailedError(Exception):
    """This attempt failed; the next one may succeed."""


def say(text: str) -> None:
    """One line for the journal."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


#: The command line's own pointers to its help, and what it adds to an error of the daemon.
_BESIDE = re.compile(r"(?:(?:See|Run|Usage:) +'?docker |Error: failed to start containers)", re.IGNORECASE)


def complaint(text: str) -> str:
    """Why a docker command failed, in one line.

    An error of the daemon may have several: what a runtime or a hook printed stands behind its first one.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip() and not _BESIDE.match(line.strip())]
    for number, line in enumerate(lines):
        if line.startswith("Error response from daemon"):
            return " ".join(lines[number:])[:2000]
    return lines[-1] if lines else "no message"


def docker(*arguments: str, seconds: float = COMMAND_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run a docker command to its end.

    Raises:
        DockerAwayError: When it hangs or there is no such program (as in the middle of an upgrade).
    """
    try:
        return subprocess.run(
            ["docker", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DockerAwayError("docker %s: no answer after %d seconds" % (arguments[0], seconds)) from None
    except OSError as error:
        raise DockerAwayError("docker cannot be run: %s" % error.strerror) from error


def daemon_answers() -> bool:
    with contextlib.suppress(DockerAwayError):
        return docker("version", "--format", "{{.Server.Version}}", seconds=20).returncode == 0
    return False


def daemon_is_stopped() -> bool:
    """Whether systemd has Docker down.

    A docker command must not be tried then: a restart of this unit asks for Docker too, its socket listens at once, but
    the daemon is not started before this unit's stop has ended (systemd.unit(5), Before=).
    """
    try:
        shown = subprocess.run(
            ["systemctl", "show", "--property=LoadState,ActiveState", "docker.service"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            timeout=20,
            check=False,
        ).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "LoadState=loaded" in shown and ("ActiveState=inactive" in shown or "ActiveState=failed" in shown)


def is_away(text: str) -> bool:
    lowered = text.lower()
    return any(known in lowered for known in _AWAY_TEXTS)


def inspect(container: str) -> Json | None:
    """``docker inspect`` of a container, None when there is none.

    Raises:
        DockerAwayError: When there is no answer.
    """
    done = docker("inspect", "--type", "container", container)
    if done.returncode == 0:
        try:
            return t.cast(Json, json.loads(done.stdout)[0])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise DockerAwayError("docker inspect answered nonsense: %s" % error) from error
    if "no such" in done.stderr.lower():
        return None
    raise DockerAwayError(complaint(done.stderr))


def label_of(container: Json) -> str:
    return str(((container.get("Config") or {}).get("Labels") or {}).get(SPEC_LABEL, ""))


def is_running(container: Json) -> bool:
    return bool((container.get("State") or {}).get("Running"))


def remove_container(name: str, container: Json | None, stop_timeout: int) -> None:
    if container is None:
        return
    if is_running(container):
        say("%s runs something else and is replaced" % name)
        docker("stop", "-t", str(stop_timeout), name, seconds=stop_timeout + 60)
    done = docker("rm", "-f", name)
    if done.returncode != 0 and "no such" not in done.stderr.lower():
        if is_away(done.stderr) or not daemon_answers():
            raise DockerAwayError(complaint(done.stderr))
        raise StartFailedError("the old container %s cannot be removed: %s" % (name, complaint(done.stderr)))


def create_container(name: str, spec: str, arguments: t.Sequence[str]) -> str:
    """Make a container and return its id."""
    command = ["create", "--name", name, "--pull=never", "--restart=no"]
    command += ["--label", "%s=%s" % (SPEC_LABEL, spec), *arguments]
    for last_try in (False, True):
        done = docker(*command)
        if done.returncode == 0:
            return done.stdout.strip()
        if is_away(done.stderr) or not daemon_answers():
            raise DockerAwayError(complaint(done.stderr))
        if last_try:
            raise BadConfigurationError("docker create: %s" % complaint(done.stderr))
        if "already in use" in done.stderr.lower():
            docker("rm", "-f", name)
        else:
            # The daemon may have been restarted between the two questions: only a repeated no is a no.
            time.sleep(POLL_SECONDS)
    raise AssertionError("the last try returns or raises")


def start_container(name: str) -> None:
    done = docker("start", name)
    if done.returncode == 0:
        return
    if is_away(done.stderr) or not daemon_answers():
        raise DockerAwayError(complaint(done.stderr))
    raise StartFailedError("docker start: %s" % complaint(done.stderr))
