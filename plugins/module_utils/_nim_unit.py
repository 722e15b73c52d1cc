# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
# Written to hosts as /usr/local/libexec/nim/nim-unit by gpu_fleet.nim.nim_service; changes made there are overwritten.
"""Run one NIM container for systemd: ``nim-unit run NAME`` is the main process of ``nim-NAME.service``.

This file and its parts are put on the host as one program (see _nim_unit_program), so they use the standard library only.

A container that already runs what is wanted is adopted, so that neither a restart of Docker nor the death of this
program makes a model load again. The container's end ends this program, and systemd starts it again.

Exit codes: 0 the container ended by itself after it had been ready, or was stopped; 75 the Docker daemon stayed away
(systemd tries again); 77 the host is under maintenance (the unit ends without a failure); 78 the configuration cannot
work (systemd does not try again); anything else: the container's own code, or 1 where that was 0 although the service
had never been ready.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import ssl
import subprocess
import sys
import time
import typing as t
import urllib.parse

from ._nim_unit_docker import (
    POLL_SECONDS,
    BadConfigurationError,
    DockerAwayError,
    StartFailedError,
    complaint,
    create_container,
    daemon_answers,
    daemon_is_stopped,
    docker,
    inspect,
    is_running,
    label_of,
    remove_container,
    say,
    start_container,
)
from ._nim_unit_key import KEY_PIPES, KEY_SHELL, KeyPipe, arguments_with_key, read_key

EX_TEMPFAIL = 75
EX_MAINTENANCE = 77
EX_CONFIG = 78

# systemd sets these where a unit has RuntimeDirectory=, StateDirectory= or ConfigurationDirectory=.
CONFIGURATION = os.environ.get("CONFIGURATION_DIRECTORY", "/etc/nim")
STATE = os.environ.get("STATE_DIRECTORY", "/var/lib/nim")
RUNTIME = os.environ.get("RUNTIME_DIRECTORY", "/run/nim")

#: What is noted when all files of a model were fetched, and when they have served since.
FETCHED = ("complete", "proven")
#: Downloads whose files have served, that is: from images and profiles that one may go back to.
PROVEN_MOST = 8

#: Seconds between two questions to a service that is not ready.
READY_SECONDS = 1.0
#: Pause before the start that follows n failures in a row: 5, 10, 20, 40, then 60 seconds.
BACKOFF_FIRST = 5.0
BACKOFF_MOST = 60.0
#: Seconds that a service must serve before its start counts as a good one.
STEADY_SECONDS = 30.0

Json = t.Dict[str, t.Any]


def write_atomically(path: str, content: str) -> None:
    temporary = "%s.%d" % (path, os.getpid())
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(content)
    os.replace(temporary, path)


def read_json(path: str) -> Json:
    """A JSON object, empty when it is absent or broken."""
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def proven_downloads(record: Json) -> t.Dict[str, str]:
    """Keys of the downloads whose files have served, oldest first, each with its cache directory; empty where not known."""
    found = record.get("proven")
    known = {
        key: directory
        for key, directory in (found.items() if isinstance(found, dict) else ())
        if isinstance(directory, str)
    }
    key = record.get("key")
    if record.get("status") == "proven" and isinstance(key, str):
        known.setdefault(key, "")
    return known


def was_fetched(record: Json, plan: Json) -> bool:
    """Whether the record of a model's downloads says that all files of this one were fetched.

    Args:
        plan: ``key``, and ``former_key`` by which earlier versions knew the same download.
    """
    keys = _keys(plan)
    if record.get("status") in FETCHED and record.get("key") in keys:
        return True
    proven = proven_downloads(record)
    return any(key in proven for key in keys)


def _keys(plan: Json) -> t.List[str]:
    return [key for key in (plan.get("key"), plan.get("former_key")) if isinstance(key, str)]


def says_ready(address: str) -> bool:
    """Whether a service answers on its health address with 200, within two seconds."""
    try:
        url = urllib.parse.urlsplit(address)
        port = url.port
    except ValueError:
        return False
    if not url.hostname:
        return False
    connection: http.client.HTTPConnection
    if url.scheme == "https":
        context = ssl.create_default_context()
        # The certificate is made out for the name that clients use, not for this address.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(url.hostname, port, timeout=2, context=context)
    else:
        connection = http.client.HTTPConnection(url.hostname, port, timeout=2)
    try:
        connection.request("GET", url.path or "/")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException, UnicodeError):
        return False
    finally:
        connection.close()


class Unit:
    """One NIM service."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.configuration = os.path.join(CONFIGURATION, name + ".json")
        self.key_file = os.path.join(CONFIGURATION, "ngc.env")
        self.secret_file = os.path.join(CONFIGURATION, name + ".env")
        self.pipe = KeyPipe(os.path.join(RUNTIME, KEY_PIPES, name))
        self.runtime_file = os.path.join(RUNTIME, name + ".json")
        self.stop_file = os.path.join(RUNTIME, name + ".stop")
        self.marker_file = os.path.join(STATE, "state", name + ".download.json")
        self.maintenance_file = os.path.join(STATE, "maintenance")
        self.container = "nim-" + name
        self.downloader = self.container + "-download"
        self.config: Json = {}
        #: Id of the container that was made or adopted last: of the service, or of the download.
        self.current = ""
        self.ready = False
        self.ready_since = 0.0
        self.steady = False
        self.watching = False

    # -- what is wanted and what was ----------------------------------------------------------------

    def load(self) -> None:
        try:
            with open(self.configuration, encoding="utf-8") as stream:
                self.config = json.load(stream)
            self.spec = str(self.config["spec"])
            create = self.config["create"]
            self.create_arguments = [str(argument) for argument in create]
            self.stop_timeout = int(self.config.get("stop_timeout", 60))
            self.docker_timeout = float(self.config.get("docker_timeout", 1800))
        except OSError as error:
            raise BadConfigurationError("%s cannot be read: %s" % (self.configuration, error.strerror)) from error
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise BadConfigurationError("%s is broken: %r" % (self.configuration, error)) from error
        if not isinstance(create, list):
            raise BadConfigurationError("%s is broken: create is no list" % self.configuration)

    def count(self, what: str) -> int:
        """What was counted of this very specification, in a row: ``failures`` before it was ready, ``unsteady`` ends soon
        after; ``failing_since`` is the time of the first of those failures."""
        known = read_json(self.runtime_file)
        count = known.get(what, 0)
        return max(0, count) if known.get("spec") == self.spec and isinstance(count, int) else 0

    def failures(self) -> int:
        """Starts that failed since the service was ready last."""
        return self.count("failures")

    def note(
        self,
        phase: str,
        failures: int | None = None,
        detail: str = "",
        unsteady: int | None = None,
        container: str | None = None,
    ) -> None:
        """Leave word for whoever watches the start."""
        now = int(time.time())
        failed = self.failures() if failures is None else failures
        content = {
            "phase": phase,
            "since": now,
            "spec": self.spec,
            "failures": failed,
            "failing_since": (self.count("failing_since") or now) if failed else 0,
            "unsteady": self.count("unsteady") if unsteady is None else unsteady,
            "detail": detail,
            "container": self.current if container is None else container,
        }
        try:
            write_atomically(self.runtime_file, json.dumps(content) + "\n")
        except OSError as error:
            # A full /run must not take a model down.
            say("%s cannot be written: %s" % (self.runtime_file, error.strerror))

    def stopping(self) -> bool:
        """Whether ``nim-unit stop`` was called for this very run of the unit."""
        try:
            with open(self.stop_file, encoding="utf-8") as stream:
                return stream.read() == os.environ.get("INVOCATION_ID", "")
        except OSError:
            return False

    # -- run ------------------------------------------------------------------------------------------

    def run(self) -> int:
        if os.path.exists(self.maintenance_file):
            # systemd checks ConditionPathExists= at a start, but not when it restarts a service by itself.
            say("%s exists: not started" % self.maintenance_file)
            return EX_MAINTENANCE
        with contextlib.suppress(OSError):
            os.unlink(self.stop_file)
        try:
            self.load()
            while True:
                try:
                    return self.serve()
                except DockerAwayError as error:
                    say("Docker is away (%s)" % error)
                    if not self.wait_for_docker():
                        say("Docker stayed away for %d seconds" % self.docker_timeout)
                        return EX_TEMPFAIL
                    say("Docker is back")
        except BadConfigurationError as error:
            say("Cannot start %s: %s" % (self.container, error))
            return EX_CONFIG
        except StartFailedError as error:
            say("Starting %s failed: %s" % (self.container, error))
            if self.stopping():
                return 0
            self.note("failed", self.failures() + 1, str(error))
            return 1

    def wait_for_docker(self) -> bool:
        self.note("waiting_for_docker")
        end = time.monotonic() + self.docker_timeout
        while not daemon_answers():
            if time.monotonic() >= end:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def serve(self) -> int:
        """Have the container run and wait for its end."""
        container = inspect(self.container)
        if container is not None and is_running(container) and self.is_as_wanted(container):
            say("%s %s" % (self.container, "goes on" if self.watching else "runs already and is adopted"))
            self.current = str(container.get("Id") or "")
            return self.watch()
        if self.watching:
            return self.ended(container)
        self.back_off()
        remove_container(self.container, container, self.stop_timeout)
        self.download()
        self.start()
        return self.watch()

    def is_as_wanted(self, container: Json) -> bool:
        """Whether a container runs what is wanted, and does not wait for a key that nobody will give it any more."""
        return label_of(container) == self.spec and not self.pipe.exists()

    def back_off(self) -> None:
        failures = self.failures()
        if failures:
            seconds = min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** (failures - 1))
            say("%d starts failed in a row: next one in %d seconds" % (failures, seconds))
            # Why the last one failed stays to be read.
            known = read_json(self.runtime_file)
            self.note("back_off", failures, str(known.get("detail") or ""), container=str(known.get("container") or ""))
            time.sleep(seconds)

    def secret_arguments(self) -> list[str]:
        """Docker reads the secret variables from their file, so they are in no argument list."""
        names = self.config.get("secret_environment")
        if not names:
            return []
        if not os.path.exists(self.secret_file):
            raise BadConfigurationError(
                "%s with %s is missing" % (self.secret_file, ", ".join(str(name) for name in names))
            )
        return ["--env-file", self.secret_file]

    # -- the NGC key ------------------------------------------------------------------------------------

    def key(self) -> str:
        return read_key(self.key_file)

    def launch_with_key(self, name: str, launch: Json) -> bool:
        """Create and start a container whose program finds the NGC key in its environment.

        Args:
            launch: ``options`` of ``docker create``, ``image``, ``command`` (the image's entry point with its arguments)
                and ``uid``, the container's user.

        Returns:
            False, and there is no container, when the image has no shell.
        """
        arguments = [*self.secret_arguments(), *arguments_with_key(launch, self.pipe.path)]
        self.pipe.make(int(launch["uid"]))
        self.current = create_container(name, self.spec, arguments)
        try:
            start_container(name)
        except StartFailedError as error:
            if '"%s"' % KEY_SHELL not in str(error):
                raise
            say("%s gets no NGC key: its image has no %s" % (name, KEY_SHELL))
            remove_container(name, inspect(name), self.stop_timeout)
            self.pipe.remove()
            return False
        try:
            self.pipe.hand_over(self.key(), name)
        except StartFailedError:
            remove_container(name, inspect(name), self.stop_timeout)
            raise
        self.pipe.remove()
        return True

    # -- the container ----------------------------------------------------------------------------------

    def start(self) -> None:
        if self.stopping():
            raise StartFailedError("stopped")
        self.note("starting")
        launch = self.config.get("key_in_service")
        if not isinstance(launch, dict) or not self.key() or not self.launch_with_key(self.container, launch):
            # One of an earlier start says nothing about this container.
            self.pipe.remove()
            arguments = [*self.secret_arguments(), *self.create_arguments]
            self.current = create_container(self.container, self.spec, arguments)
            start_container(self.container)
        say("%s started" % self.container)
        if self.stopping():
            # The stop came before there was a container to stop.
            docker("stop", "-t", str(self.stop_timeout), self.container, seconds=self.stop_timeout + 60)

    # -- the container while it runs --------------------------------------------------------------------

    def watch(self) -> int:
        self.watching = True
        self.note("ready" if self.ready else "starting")
        while True:
            code = self.wait(self.container, probe=True)
            if code is None:
                # Raises DockerAwayError when that is why; serve() then looks again.
                container = inspect(self.container)
                if container is not None and is_running(container):
                    time.sleep(POLL_SECONDS)
                    continue
                return self.ended(container)
            return self.ended(None, code)

    def wait(self, name: str, *, probe: bool) -> int | None:
        """Exit code of a container when it ends; None when ``docker wait`` was cut off."""
        try:
            waiter = subprocess.Popen(
                ["docker", "wait", name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
            )
        except OSError as error:
            raise DockerAwayError("docker cannot be run: %s" % error.strerror) from error
        with waiter:
            while waiter.poll() is None:
                if probe and not self.ready and self.answers():
                    self.became_ready()
                elif self.ready and not self.steady and time.monotonic() - self.ready_since >= STEADY_SECONDS:
                    self.steady = True
                    self.note("ready", 0, unsteady=0)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    waiter.wait(timeout=READY_SECONDS if probe and not self.steady else None)
            text = (waiter.stdout.read() if waiter.stdout else "").strip()
        return int(text) if waiter.returncode == 0 and text.isdigit() else None

    def answers(self) -> bool:
        return says_ready(str(self.config.get("ready_url") or ""))

    def became_ready(self) -> None:
        self.ready = True
        self.ready_since = time.monotonic()
        say("%s is ready" % self.container)
        plan = self.download_plan()
        record = read_json(self.marker_file)
        if plan and plan.get("key") not in proven_downloads(record) and self.cache_has_files():
            # It had no key to fetch anything with, so whatever it needs is there, however it came. Where nothing was fetched
            # so far, the files of the next image may be brought by other means, too.
            self.mark("proven" if record.get("status") else "")
        if os.environ.get("INVOCATION_ID"):
            # The start limit is meant for starts that fail in a row; a service that got ready starts counting anew.
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    ["systemctl", "reset-failed", "nim-%s.service" % self.name],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=20,
                    check=False,
                )
        # Last: whoever reads it finds everything in its place.
        self.note("ready", 0)

    def ended(self, container: Json | None, code: int | None = None) -> int:
        """Translate the end of the container for systemd."""
        if code is None:
            code = int((container.get("State") or {}).get("ExitCode", 1)) if container is not None else 1
        if container is None:
            with contextlib.suppress(DockerAwayError):
                container = inspect(self.container)
        state = (container or {}).get("State") or {}
        reason = "was removed" if container is None else "ended with code %d" % code
        if state.get("OOMKilled"):
            reason += " (out of memory)"
        if self.stopping():
            say("%s %s after a stop" % (self.container, reason))
            self.note("stopped", 0)
            return 0
        if self.ready:
            # Counted, but not waited for: somebody may have ended it by hand.
            unsteady = 0 if self.steady else self.count("unsteady") + 1
            if unsteady:
                reason += " soon after it was ready"
            say("%s %s" % (self.container, reason))
            self.note("ended", 0, reason, unsteady)
            return self.exit_code(code)
        say("%s %s before it was ready" % (self.container, reason))
        self.note("failed", self.failures() + 1, reason)
        record = read_json(self.marker_file)
        if record.get("status") == "complete" and record.get("key") in _keys(self.download_plan()):
            # Files that never served may be incomplete: let the download look again.
            self.mark("incomplete")
        return self.exit_code(code) or 1

    @staticmethod
    def exit_code(code: int) -> int:
        """The container's code, unless systemd would take it for a word of this program."""
        return 1 if code in (EX_MAINTENANCE, EX_CONFIG) else code

    # -- the download -----------------------------------------------------------------------------------

    def download_plan(self) -> Json:
        plan = self.config.get("download")
        return plan if isinstance(plan, dict) else {}

    def mark(self, status: str) -> None:
        """Note how far the wanted download is; those that have served before stay proven as long as their files are there.

        Args:
            status: Empty for files that have served and that nobody has fetched here.
        """
        plan = self.download_plan()
        key, directory = str(plan.get("key", "")), str(self.config.get("cache_directory", ""))
        proven = proven_downloads(read_json(self.marker_file))
        if not self.cache_has_files():
            gone = _keys(plan)
            proven = {known: at for known, at in proven.items() if at not in ("", directory) and known not in gone}
        if status in ("", "proven"):
            proven.pop(key, None)
            proven[key] = directory
        content: Json = {"status": status, "key": key} if status else {}
        if proven:
            content["proven"] = dict(list(proven.items())[-PROVEN_MOST:])
        try:
            write_atomically(self.marker_file, json.dumps(content) + "\n")
        except OSError as error:
            say("%s cannot be written: %s" % (self.marker_file, error.strerror))

    def cache_has_files(self) -> bool:
        # os.walk is lazy: this ends at the first file.
        return any(files for _path, _directories, files in os.walk(str(self.config.get("cache_directory", ""))))

    def download(self) -> None:
        """Fetch the model with the NGC key in a container of its own, so that the service itself never has the key."""
        plan = self.download_plan()
        running = inspect(self.downloader)
        if not plan or not self.key():
            remove_container(self.downloader, running, self.stop_timeout)
            return
        marker = read_json(self.marker_file)
        filled = self.cache_has_files()
        if filled and was_fetched(marker, plan):
            if marker.get("key") not in _keys(plan) or self.failures():
                say(
                    "The files of %s have served before and are not fetched again; if some of them are gone, remove %s"
                    % (self.container, self.marker_file)
                )
            remove_container(self.downloader, running, self.stop_timeout)
            return
        # A cache that was brought here by other means may be complete although NGC cannot be reached.
        brought = filled and not marker.get("status")
        if running is None or not is_running(running) or not self.is_as_wanted(running):
            remove_container(self.downloader, running, self.stop_timeout)
            if self.stopping():
                raise StartFailedError("stopped")
            if not brought:
                self.mark("incomplete")
            self.note("download")
            if not self.launch_with_key(self.downloader, plan):
                return
            say("%s fetches the model" % self.downloader)
        else:
            self.current = str(running.get("Id") or "")
            self.note("download")
            say("%s fetches the model already" % self.downloader)
        code = self.wait(self.downloader, probe=False)
        while code is None:
            running = inspect(self.downloader)
            if running is None:
                raise StartFailedError("%s was removed" % self.downloader)
            code = self.wait(self.downloader, probe=False) if is_running(running) else running["State"]["ExitCode"]
        remove_container(self.downloader, inspect(self.downloader), self.stop_timeout)
        if code == 0 and self.cache_has_files():
            say("%s has fetched the model" % self.downloader)
            self.mark("complete")
        elif brought:
            say("%s ended with code %d; the files that are there are tried" % (self.downloader, code))
        else:
            raise StartFailedError(
                "%s ended with code %d%s; see journalctl CONTAINER_NAME=%s"
                % (self.downloader, code, "" if code else " but left no file in the cache", self.downloader)
            )

    # -- stop -------------------------------------------------------------------------------------------

    def stop(self) -> int:
        """Stop the container, but only when systemd still has a main process.

        systemd calls this also after the main process died by itself; the container then goes on and is adopted by
        the next start (systemd.service(5), ExecStop= and $MAINPID).
        """
        if not os.environ.get("MAINPID"):
            return 0
        stop_timeout = 60
        loaded = False
        with contextlib.suppress(BadConfigurationError):
            self.load()
            stop_timeout = self.stop_timeout
            loaded = True
        with contextlib.suppress(OSError):
            write_atomically(self.stop_file, os.environ.get("INVOCATION_ID", ""))
        if daemon_is_stopped():
            say("Docker is stopped: %s may still run" % self.container)
            return 1
        try:
            docker("rm", "-f", self.downloader)
            done = docker("stop", "-t", str(stop_timeout), self.container, seconds=stop_timeout + 20)
        except DockerAwayError as error:
            say("%s may still run: %s" % (self.container, error))
            return 1
        if done.returncode != 0 and "no such" not in done.stderr.lower():
            say("%s may still run: %s" % (self.container, complaint(done.stderr)))
            return 1
        if loaded:
            # systemd may end the main process before it can say so itself.
            self.note("stopped", 0)
        return 0


def main(arguments: t.Sequence[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in ("run", "stop"):
        sys.stderr.write("usage: nim-unit run|stop NAME\n")
        return EX_CONFIG
    unit = Unit(arguments[1])
    return unit.run() if arguments[0] == "run" else unit.stop()


def spec_hash(content: t.Any) -> str:
    """Name of what a container runs: the same content gives the same text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
