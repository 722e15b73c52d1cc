# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Reads of the Docker Engine API over its unix socket, with the standard library only.

Nothing must be installed on a host for it, and importing the Docker SDK for Python costs more than all reads together.
Only GET requests are made here.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import typing as t
import urllib.parse

from ._errors import FleetError
from ._untrusted import MapOf, misfit, parse_json

#: Where every supported package puts the socket.
SOCKET = "/var/run/docker.sock"
#: Seconds until an unanswered request counts as "the daemon hangs".
TIMEOUT = 20.0

#: The two questions that take the daemon longest.
VERSION = "/version"
INFO = "/info"

Json = t.Dict[str, t.Any]


_LABELS = MapOf(str)
#: What is read of the answers, by the Engine API (moby/moby ``api/swagger.yaml``).
_INFO = {
    **dict.fromkeys(
        ("ServerVersion", "CgroupDriver", "CgroupVersion", "Driver", "DockerRootDir", "DefaultRuntime"), str
    ),
    **dict.fromkeys(("LoggingDriver", "HttpProxy", "HttpsProxy", "NoProxy"), str),
    **dict.fromkeys(("LiveRestoreEnabled", "Debug"), bool),
    "DriverStatus": [[str]],
    "Containerd": {"Address": str},
    "Runtimes": MapOf({"path": str, "runtimeType": str}),
    "CDISpecDirs": [str],
    "Labels": [str],
    "Plugins": {"Log": [str]},
    "Swarm": {"LocalNodeState": str},
    "RegistryConfig": {
        "IndexConfigs": MapOf({"Secure": bool}),
        "InsecureRegistryCIDRs": [str],
        "Mirrors": [str],
    },
}
_LISTED = {
    **dict.fromkeys(("Id", "ImageID", "Image", "State"), str),
    "Names": [str],
    "Labels": _LABELS,
    "Ports": [{"IP": str, "PublicPort": int, "PrivatePort": int, "Type": str}],
}
_CONFIG = {"Env": [str], "Labels": _LABELS, "Cmd": [str]}
_CONTAINER = {
    **dict.fromkeys(("Id", "Name", "Image"), str),
    "State": {
        **dict.fromkeys(("Status", "Error", "StartedAt", "FinishedAt"), str),
        **dict.fromkeys(("Running", "OOMKilled"), bool),
        **dict.fromkeys(("ExitCode", "Pid"), int),
    },
    "Config": _CONFIG,
    "HostConfig": {
        **dict.fromkeys(("Runtime", "CgroupParent", "CpusetCpus", "NetworkMode"), str),
        **dict.fromkeys(("AutoRemove", "Privileged", "ReadonlyRootfs"), bool),
        **dict.fromkeys(("ShmSize", "Memory", "NanoCpus"), int),
        **{key: [str] for key in ("CapDrop", "CapAdd", "Binds")},
        "PortBindings": MapOf([{"HostIp": str, "HostPort": str}]),
        "Mounts": [{"Source": str, "Target": str}],
        "RestartPolicy": {"Name": str},
        "Tmpfs": MapOf(str),
        "DeviceRequests": [{"Driver": str, "Capabilities": [[str]], "DeviceIDs": [str]}],
    },
    "NetworkSettings": {"Networks": MapOf({"IPAddress": str})},
}
_IMAGE = {
    "Id": str,
    "RepoDigests": [str],
    "RepoTags": [str],
    "Size": int,
    "Architecture": str,
    "Config": _CONFIG,
}


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class DockerApi:
    """The reads that observers need. A missing object is None; a missing daemon is an error.

    Raises:
        FleetError: ``docker_unavailable`` from every method except :meth:`available` when nobody answers on the socket.
    """

    def __init__(self, socket_path: str = SOCKET, timeout: float = TIMEOUT) -> None:
        self.socket_path = socket_path
        self.timeout = timeout

    def get(self, path: str, parameters: t.Optional[t.Mapping[str, str]] = None) -> t.Any:
        """Parsed JSON of one GET request (text where the answer is no JSON); None for 404."""
        if parameters:
            path += "?" + urllib.parse.urlencode(parameters, errors="replace")
        try:
            with contextlib.closing(self._ask(path)) as connection:
                response = connection.getresponse()
                body = response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise FleetError(
                "docker_unavailable",
                "Asking Docker at %s for %s failed: %s. See 'systemctl status docker' and 'journalctl -u docker'."
                % (self.socket_path, path.split("?")[0], describe_failure(error)),
                socket=self.socket_path,
            ) from error
        if response.status == 404:
            return None
        if response.status >= 400:
            raise FleetError(
                "docker_error",
                "Docker at %s answered %s with status %d: %s"
                % (self.socket_path, path.split("?")[0], response.status, _message(body)),
                status=response.status,
            )
        try:
            return parse_json(body)
        except ValueError:
            # Plain text (/_ping), or several documents one after the other (/events).
            return body

    def _ask(self, path: str) -> http.client.HTTPConnection:
        """A connection over which a GET request was sent and whose answer is to be read."""
        connection = UnixConnection(self.socket_path, self.timeout)
        try:
            connection.request("GET", path)
        except (OSError, http.client.HTTPException):
            connection.close()
            raise
        return connection

    def forget(self) -> None:
        """Ask anew from now on; here nothing is remembered anyway."""

    def _expect(self, path: str, shape: t.Any, parameters: t.Optional[t.Mapping[str, str]] = None) -> t.Any:
        """The answer to a GET, which has the shape that the Engine API promises for what is read here."""
        found = self.get(path, parameters)
        wrong = misfit(found, shape)
        if wrong:
            raise FleetError(
                "docker_error",
                "Docker at %s answered %s with something else than the Engine API promises (%s); check what listens on "
                "that socket." % (self.socket_path, path, wrong),
                socket=self.socket_path,
            )
        return found

    def available(self) -> bool:
        """Whether a daemon answers on the socket; the connection may activate one through docker.socket."""
        try:
            return self.get("/_ping") is not None
        except FleetError:
            return False

    def version(self) -> Json:
        """``GET /version``: Version, ApiVersion, Components, …"""
        return t.cast(Json, self._expect(VERSION, {"Version": str}) or {})

    def info(self) -> Json:
        """``GET /info``: Runtimes, DefaultRuntime, LiveRestoreEnabled, CgroupDriver, …"""
        return t.cast(Json, self._expect(INFO, _INFO) or {})

    def containers(self, all: bool = True, labels: t.Sequence[str] = ()) -> t.List[Json]:
        """``GET /containers/json``; ``labels`` are ``key`` or ``key=value``, all of which must match."""
        parameters = {"all": "1" if all else "0"}
        if labels:
            parameters["filters"] = json.dumps({"label": list(labels)})
        return t.cast("t.List[Json]", self._expect("/containers/json", [_LISTED], parameters) or [])

    def container(self, name: str) -> t.Optional[Json]:
        """``docker container inspect``, or None when there is no such container."""
        path = "/containers/%s/json" % urllib.parse.quote(name, safe="", errors="replace")
        return t.cast("t.Optional[Json]", self._expect(path, _CONTAINER))

    def reloaded_since(self, since: float, until: float) -> bool:
        """Whether the daemon took its configuration over after SIGHUP between two moments (seconds since the epoch)."""
        found = self.get(
            "/events",
            {
                "since": "%.6f" % since,
                # A moment that has passed ends the answer; later it would go on as a stream.
                "until": "%.6f" % until,
                "filters": json.dumps({"type": ["daemon"], "event": ["reload"]}),
            },
        )
        return bool(found)

    def image(self, reference: str) -> t.Optional[Json]:
        """``docker image inspect``, or None when the image is not on the host."""
        path = "/images/%s/json" % urllib.parse.quote(reference, safe="/:@", errors="replace")
        return t.cast("t.Optional[Json]", self._expect(path, _IMAGE))


def describe_failure(error: Exception) -> str:
    """Why nothing could be asked over the socket, in words."""
    if isinstance(error, FileNotFoundError):
        return "there is no such socket"
    if isinstance(error, ConnectionRefusedError):
        return "no daemon listens there"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, socket.timeout):
        return "no answer in time"
    return str(error) or type(error).__name__


def _message(body: str) -> str:
    try:
        found = parse_json(body)
    except ValueError:
        return body.strip()[:500]
    return str(found.get("message", body))[:500] if isinstance(found, dict) else body.strip()[:500]
