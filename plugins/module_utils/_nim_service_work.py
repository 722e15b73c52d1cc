# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What is done to a host for its NIM services: files written, units and containers stopped, started and taken away."""

from __future__ import annotations

import typing as t

from ._docker_api import DockerApi
from ._errors import FleetError
from ._gpu_loss import lost_gpus
from ._host import Host
from ._ngc_key import render_environment
from ._nim_models import NimModel
from ._nim_paths import (
    CONFIGURATION_DIRECTORY,
    KEY_FILE,
    RUNTIME_DIRECTORY,
    STATE_DIRECTORY,
    UNIT_DIRECTORY,
    configuration_path,
    container_name,
    download_name,
    secret_path,
    unit_name,
)
from ._resource import Change
from ._untrusted import json_object

#: Seconds until the wrapper must have said that it runs.
WRAPPER_TIMEOUT = 15.0


class ServiceWork:
    """Applies the changes that a plan of the services consists of, one after the other.

    Args:
        key: NGC key that is to be stored.

    Attributes:
        warnings: What was found out on the way.
    """

    def __init__(self, api: DockerApi, key: str | None) -> None:
        self.api = api
        self.key = key
        self.warnings: list[str] = []
        self._restarted: set[str] = set()

    def apply(self, host: Host, change: Change, models: t.Sequence[NimModel]) -> None:
        """Apply one change.

        Args:
            models: All models of the host.
        """
        data = change.data
        if change.action == "prerequisite":
            raise FleetError(str(data["reason"]), str(data["message"]), changes=[])
        if change.action == "directory":
            self._make_directory(host, data)
        elif change.action == "file":
            host.write_file(data["path"], data["text"], mode=data["mode"])
        elif change.action == "unpause":
            self._docker(host, ["unpause", data["container"]], "Waking container %s" % data["container"])
        elif change.action == "restart_policy":
            command = ["update", "--restart=no", data["container"]]
            self._docker(host, command, "Taking Docker's restart policy from %s" % data["container"])
        elif change.action == "key":
            if host.stat(CONFIGURATION_DIRECTORY) is None:
                host.make_dir(CONFIGURATION_DIRECTORY, mode=0o755)
            host.write_file(KEY_FILE, render_environment(self.key or ""), mode=0o600)
        elif change.action == "secrets":
            host.write_file(data["path"], data["text"], mode=0o600)
        elif change.action == "secrets_absent":
            host.remove(data["path"])
        elif change.action == "key_absent":
            host.remove(KEY_FILE)
        elif change.action == "stop":
            self._stop(host, data["name"], data["stop_timeout"])
        elif change.action == "remove":
            self.remove(host, data["name"])
        elif change.action == "remove_target":
            self._systemctl(host, "disable", ["nim.target"], "--now", "--no-reload")
            host.remove(UNIT_DIRECTORY + "/nim.target")
        elif change.action == "remove_path":
            host.remove(data["path"])
        elif change.action == "daemon_reload":
            self._daemon_reload(host, data["endangered"], models)
        elif change.action in ("enable", "disable"):
            self._set_enabled(host, change.action, data["units"])
        elif change.action == "start_target":
            self._systemctl(host, "start", ["nim.target"])
        elif change.action == "restart":
            self._restart(host, data["names"], data["strangers"])

    @staticmethod
    def _make_directory(host: Host, data: t.Mapping[str, t.Any]) -> None:
        host.make_dir(data["path"], mode=data["mode"], uid=data["uid"], gid=data["gid"])
        if data["files"]:
            owner = "%d:%d" % (data["uid"], data["gid"])
            words = ["!", "-uid", str(data["uid"]), "-exec", "chown", "--no-dereference", owner, "{}", "+"]
            host.check(
                ["find", data["path"], "-xdev", *words],
                reason="chown_failed",
                doing="Giving the files in %s to %s" % (data["path"], owner),
                remedy="On a network file system, do it where that is exported.",
            )

    @staticmethod
    def _docker(host: Host, command: t.Sequence[str], doing: str) -> None:
        host.check(["docker", *command], reason="docker_failed", doing=doing, remedy="See 'docker ps -a'.", timeout=60)

    def _systemctl(self, host: Host, verb: str, units: t.Sequence[str], *options: str) -> None:
        host.check(
            ["systemctl", verb, *options, *units],
            reason="systemctl_failed",
            doing="systemctl %s %s" % (verb, " ".join(units)),
            remedy="See 'systemctl status %s' and 'journalctl -u %s'." % (units[0], units[0]) if units else "",
        )

    def _stop(self, host: Host, name: str, stop_timeout: int) -> None:
        self._systemctl(host, "stop", [unit_name(name)])
        self._stop_containers(host, name, stop_timeout)

    def _stop_containers(self, host: Host, name: str, stop_timeout: int) -> None:
        stop_containers(host, self.api, name, stop_timeout)

    def remove(self, host: Host, name: str) -> None:
        """Take a service away with its container; its cache stays.

        Raises:
            FleetError: ``remove_failed``; ``systemctl_failed``.
        """
        for container in (container_name(name), download_name(name)):
            if self.api.available() and self.api.container(container) is not None:
                host.check(
                    ["docker", "rm", "-f", container],
                    reason="remove_failed",
                    doing="Removing container %s" % container,
                )
        unit = unit_name(name)
        if host.exists("%s/%s" % (UNIT_DIRECTORY, unit)):
            self._systemctl(host, "disable", [unit], "--no-reload")
        host.remove("%s/%s.download.json" % (STATE_DIRECTORY, name))
        host.remove("%s/%s.json" % (RUNTIME_DIRECTORY, name))
        host.remove("%s/%s.stop" % (RUNTIME_DIRECTORY, name))
        host.remove("%s/keys/%s" % (RUNTIME_DIRECTORY, name))
        # Last what the service is known by: who is interrupted finds it again.
        host.remove("%s/%s" % (UNIT_DIRECTORY, unit))
        host.remove(secret_path(name))
        host.remove(configuration_path(name))
        # Fails when systemd does not remember the unit, and then there is nothing to forget.
        host.run(["systemctl", "reset-failed", unit])

    def _daemon_reload(self, host: Host, endangered: t.Sequence[str], models: t.Sequence[NimModel]) -> None:
        self._systemctl(host, "daemon-reload", [])
        own = {model.container: model.name for model in models if model.state == "started"}
        lost = {container: said for container in endangered for said in [lost_gpus(host, container)] if said}
        for container, said in lost.items():
            self.warnings.append(
                "Container %s has lost its GPUs by systemctl daemon-reload (%s)%s; use the nvidia runtime in mode jit-cdi or "
                "CDI devices so that it does not happen again."
                % (container, said, " and is started anew" if container in own else ": recreate it")
            )
        self._restart(host, [own[container] for container in lost if container in own], {})

    def _set_enabled(self, host: Host, verb: str, units: t.Sequence[str]) -> None:
        todo = []
        for unit in units:
            shown = host.run(["systemctl", "show", "--property", "UnitFileState", "--value", unit]).stdout.strip()
            if (shown == "enabled") != (verb == "enable"):
                todo.append(unit)
        if todo:
            # The one daemon-reload of this run comes after it.
            self._systemctl(host, verb, todo, "--no-reload")

    def _restart(self, host: Host, names: t.Sequence[str], strangers: t.Mapping[str, int]) -> None:
        """Start or restart all services in one go, so that their stops overlap; a later change then finds it done."""
        wanted: dict[str, str] = {}
        for name in names:
            text = host.read_text(configuration_path(name))
            wanted[name] = str(json_object(text).get("spec", ""))
        todo = [name for name in names if name not in self._restarted]
        if not todo:
            return
        self._restarted.update(todo)
        for name in todo:
            # Failures of the past must not delay this start, and its word is how the new wrapper is recognised.
            host.remove("%s/%s.json" % (RUNTIME_DIRECTORY, name))
            if name in strangers:
                self._stop_containers(host, name, strangers[name])
        units = [unit_name(name) for name in todo]
        # Fails for units that systemd has not loaded yet, and those have no start limit to reset.
        host.run(["systemctl", "reset-failed", *units])
        self._systemctl(host, "restart", units)
        end = host.monotonic() + WRAPPER_TIMEOUT
        for name in todo:
            while not self._has_spoken(host, name, wanted[name]) and host.monotonic() < end:
                host.sleep(0.1)

    def _has_spoken(self, host: Host, name: str, spec: str) -> bool:
        """Whether the new wrapper has said what it starts.

        Raises:
            FleetError: ``start_failed`` when systemd has given up already.
        """
        runtime = json_object(host.read_text("%s/%s.json" % (RUNTIME_DIRECTORY, name)))
        if runtime.get("spec") == spec:
            return True
        unit = unit_name(name)
        shown = host.run(["systemctl", "show", "--property", "ActiveState", "--value", unit])
        if shown.stdout.strip() == "failed":
            journal = host.run(["journalctl", "--unit", unit, "--lines", "20", "--output", "cat", "--no-pager"])
            said = [line for line in journal.stdout.splitlines() if line.startswith(("Cannot start", "Starting nim-"))]
            raise FleetError(
                "start_failed",
                "Starting %s failed: %s. See 'journalctl -u %s'."
                % (unit, (said or [journal.last_line()])[-1].rstrip("."), unit),
                unit=unit,
                log=journal.stdout[-4000:],
            )
        return False


def stop_containers(host: Host, api: DockerApi, name: str, stop_timeout: int) -> None:
    """Stop what still runs of a service whose unit is stopped.

    A stop between an end of the wrapper and its restart leaves the container running.

    Args:
        stop_timeout: Seconds before it is killed.

    Raises:
        FleetError: ``stop_failed``; ``docker_unavailable``.
    """
    for container in (container_name(name), download_name(name)):
        found = api.container(container)
        if found is not None and (found.get("State") or {}).get("Running"):
            host.check(
                ["docker", "stop", "-t", str(stop_timeout), container],
                reason="stop_failed",
                doing="Stopping container %s" % container,
            )
