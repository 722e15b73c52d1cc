# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
# Part of the program that the units run, see _nim_unit_program: the standard library and other parts only.
"""How a container gets the NGC key: through a named pipe that is read once, so that Docker never learns it."""

from __future__ import annotations

import contextlib
import errno
import os
import time
import typing as t

from ._nim_unit_docker import DockerAwayError, StartFailedError, inspect, is_running

Json = t.Dict[str, t.Any]

#: A pipe that is mounted here and read once by a shell, which then becomes the
#: image's own program. A variable of the container would be kept by Docker and containerd in files of their own.
KEY_TARGET = "/run/secrets/ngc_api_key"
#: Directory of these pipes below the runtime directory.
KEY_PIPES = "keys"
KEY_SHELL = "/bin/sh"
KEY_SCRIPT = 'IFS= read -r NGC_API_KEY <%s || exit 1; export NGC_API_KEY; exec "$@"' % KEY_TARGET
#: Seconds within which the shell must have asked for it.
KEY_SECONDS = 60.0


def arguments_with_key(launch: Json, pipe: str) -> list[str]:
    """Arguments of ``docker create`` for a container whose shell takes the NGC key out of a pipe and becomes its program."""
    arguments = [str(word) for word in launch["options"]]
    arguments += ["--mount=type=bind,source=%s,target=%s,readonly" % (pipe, KEY_TARGET)]
    arguments += ["--entrypoint=" + KEY_SHELL, str(launch["image"]), "-c", KEY_SCRIPT, "nim"]
    return arguments + [str(word) for word in launch["command"]]


def read_key(path: str) -> str:
    """The NGC key of the host, empty when it has none."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as stream:
        for line in stream:
            name, _separator, value = line.strip().partition("=")
            if name == "NGC_API_KEY":
                return value
    return ""


class KeyPipe:
    """The pipe of one service.

    Where a handover is cut off the pipe stays: it tells that the container, if it came to run, waits for the key in vain.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def exists(self) -> bool:
        return os.path.lexists(self.path)

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def make(self, uid: int) -> None:
        """A pipe that only the container's user can read, where only root can reach it."""
        directory = os.path.dirname(self.path)
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            os.mkfifo(self.path, 0o400)
            os.chown(self.path, uid, -1)
        except OSError as error:
            raise StartFailedError("%s cannot be made: %s" % (self.path, error.strerror)) from error

    def hand_over(self, key: str, container: str) -> None:
        """Write the key as soon as the container's shell reads it.

        Raises:
            StartFailedError: The container waits, and nobody will give it the key any more.
        """
        end = time.monotonic() + KEY_SECONDS
        while time.monotonic() < end:
            try:
                # Without a reader there is ENXIO instead of a wait (fifo(7)).
                pipe = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise StartFailedError("%s cannot be opened: %s" % (self.path, error.strerror)) from error
            else:
                # A reader that has gone is found out like any other end.
                with contextlib.suppress(BrokenPipeError), open(pipe, "w", encoding="utf-8") as stream:
                    stream.write(key + "\n")
                return
            # A daemon that is away does not keep a container from reading.
            with contextlib.suppress(DockerAwayError):
                found = inspect(container)
                if found is None or not is_running(found):
                    # Why it ended is found out by whoever waits for it.
                    return
            time.sleep(0.1)
        raise StartFailedError("%s did not take the NGC key within %d seconds" % (container, KEY_SECONDS))
