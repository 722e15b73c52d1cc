# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""One pull: the request that makes it, the sum of its events, and its errors told apart by the daemon's words."""

from __future__ import annotations

import base64
import collections
import contextlib
import http.client
import json
import re
import socket
import time
import typing as t
import urllib.parse

from ._disk_space import amount
from ._docker_api import SOCKET, UnixConnection, describe_failure
from ._docker_config import TOKEN_USER, login_address
from ._errors import FleetError
from ._image_reference import ImageReference
from ._registry import TRANSIENT
from ._untrusted import json_object, parse_json, real_number

#: Seconds without any event from the daemon, or without one that says anything new, until a pull counts as stuck.
STALLED_AFTER = 600


# -- a pull that comes to a halt ------------------------------------------------------------------------


class Standstill:
    """Since when a pull downloads nothing, although its events go on.

    containerd's image store tells of every layer ten times a second, whether or not anything came (moby
    ``daemon/containerd/progress.go``); Docker's own tells only what is new.
    """

    def __init__(self) -> None:
        self._told: t.Dict[str, t.Tuple[str, float]] = {}
        self._downloading: t.Set[str] = set()
        #: Layers that the host unpacks or checks, which takes its time and does not always show.
        self._worked_on: t.Set[str] = set()
        self._since = 0.0

    def feed(self, event: t.Mapping[str, t.Any], now: float) -> float:
        """Take in one event.

        Args:
            now: Seconds of a monotonic clock.

        Returns:
            How many seconds the pull has stood still.
        """
        layer, status = str(event.get("id") or ""), str(event.get("status") or "")
        given = event.get("progressDetail")
        detail: t.Mapping[str, t.Any] = given if isinstance(given, dict) else {}
        current, total = real_number(detail.get("current")), real_number(detail.get("total"))
        self._downloading.discard(layer)
        self._worked_on.discard(layer)
        if status in ("Extracting", "Verifying Checksum") or (status == "Downloading" and 0 < total <= current):
            self._worked_on.add(layer)
        elif status == "Downloading":
            self._downloading.add(layer)
        new = self._told.get(layer) != (status, current)
        self._told[layer] = (status, current)
        if new or self._worked_on or not self._downloading:
            self._since = now
        return now - self._since


# -- progress of one pull -------------------------------------------------------------------------------


class PullProgress:
    """Adds up the events of ``docker pull``.

    Args:
        layers: Size in bytes of each layer by its digest, from the registry: the events name a total only when a
            layer's download begins, and a percentage must not fall back whenever one does.
    """

    _RATE_WINDOW = 15.0

    def __init__(self, layers: t.Mapping[str, int]) -> None:
        # Events name a layer by the first 12 digits of its digest.
        self._size = {digest.split(":")[-1][:12]: size for digest, size in layers.items()}
        self._done: t.Dict[str, int] = {}
        self._unpacked: t.Dict[str, int] = {}
        self._phase: t.Dict[str, str] = {}
        #: Layers that were there before the first event of this pull.
        self._existing: t.Set[str] = set()
        self._samples: t.Deque[t.Tuple[float, int]] = collections.deque()

    def restart(self) -> None:
        """A new try: what is complete stays with the daemon, the rest begins again."""
        for layer, phase in self._phase.items():
            if phase in ("waiting", "downloading"):
                self._done[layer] = 0
        self._samples.clear()

    def feed(self, event: t.Mapping[str, t.Any]) -> None:
        """Take in one event of the daemon."""
        layer, status = str(event.get("id") or ""), str(event.get("status") or "")
        if not re.fullmatch(r"[0-9a-f]{12}", layer):
            return
        given = event.get("progressDetail")
        detail: t.Mapping[str, t.Any] = given if isinstance(given, dict) else {}
        # The containerd image store counts seconds of unpacking, not bytes.
        current, total = (
            0 if detail.get("units") else max(0, int(real_number(detail.get(key)))) for key in ("current", "total")
        )
        if status == "Already exists":
            # In a second try this is also said of a layer that the first one brought.
            if not self._phase.get(layer):
                self._existing.add(layer)
            self._finish(layer)
        elif status in ("Pulling fs layer", "Waiting"):
            self._phase.setdefault(layer, "waiting")
        elif status == "Downloading":
            self._phase[layer] = "downloading"
            if total:
                self._size.setdefault(layer, total)
            self._done[layer] = min(current, self._size.get(layer, current))
        elif status in ("Verifying Checksum", "Download complete"):
            self._phase[layer] = "downloaded"
            self._done[layer] = self._size.get(layer, self._done.get(layer, 0))
        elif status == "Extracting":
            self._phase[layer] = "unpacking"
            self._done[layer] = self._size.get(layer, self._done.get(layer, 0))
            self._unpacked[layer] = min(current, self._size.get(layer, current))
        elif status == "Pull complete":
            self._finish(layer)

    def _finish(self, layer: str) -> None:
        self._phase[layer] = "done"
        size = self._size.get(layer, self._done.get(layer, 0))
        self._done[layer] = self._unpacked[layer] = size

    def snapshot(self, now: float) -> t.Dict[str, t.Any]:
        """State at a moment.

        Args:
            now: Seconds of a monotonic clock.

        Returns:
            ``bytes_done``, ``bytes_total`` (layers that were there already are in neither), ``percent`` (0 to 100),
            ``rate`` (bytes per second, None until known), ``eta`` (seconds, None until known), ``phase`` (waiting,
            downloading, unpacking or done), ``unpacked_percent``, and ``layers`` with the number of layers per phase.
        """
        counted = [layer for layer in self._size if layer not in self._existing]
        total = sum(self._size[layer] for layer in counted)
        # A layer's size may become known only after its first bytes.
        done = sum(min(self._size[layer], self._done.get(layer, 0)) for layer in counted)
        unpacked = sum(min(self._size[layer], self._unpacked.get(layer, 0)) for layer in counted)
        phases = collections.Counter(self._phase.get(layer, "waiting") for layer in self._size)
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[0][0] > self._RATE_WINDOW:
            self._samples.popleft()
        first_time, first_done = self._samples[0]
        rate = (done - first_done) / (now - first_time) if now - first_time >= 1.0 else None
        if phases["done"] == len(self._size):
            phase = "done"
        elif done >= total:
            phase = "unpacking"
        elif phases["waiting"] + phases["done"] == len(self._size) and not done:
            phase = "waiting"
        else:
            phase = "downloading"
        return {
            "bytes_done": done,
            "bytes_total": total,
            "percent": 100 * done // total if total else 100,
            "unpacked_percent": 100 * unpacked // total if total else 100,
            "rate": rate if phase == "downloading" else None,
            "eta": (total - done) / rate if rate and phase == "downloading" else None,
            "phase": phase,
            "layers": dict(phases),
        }


def progress_text(name: str, progress: t.Mapping[str, t.Any]) -> str:
    """One line about one pull: ``nim/meta/x 43% 1.2 of 2.8 GB, 95 MB/s, 0:17 left``."""
    if progress.get("phase") == "retrying":
        return "%s: %s, try %s of %s follows" % (
            name,
            progress.get("why", "interrupted"),
            progress.get("attempt", "?"),
            progress.get("attempts", "?"),
        )
    total, done = int(progress.get("bytes_total") or 0), int(progress.get("bytes_done") or 0)
    if progress.get("phase") in ("unpacking", "done"):
        return "%s unpacking %d%% of %s" % (name, int(progress.get("unpacked_percent") or 0), amount(total))
    if progress.get("phase") != "downloading":
        return "%s: waiting for the first bytes of %s" % (name, amount(total)) if total else "%s: waiting" % name
    amounts = amount(done).split(" "), amount(total).split(" ")
    have = amounts[0][0] if amounts[0][1] == amounts[1][1] else " ".join(amounts[0])
    text = "%s %d%% %s of %s" % (name, int(progress.get("percent") or 0), have, amount(total))
    if progress.get("rate"):
        text += ", %s/s" % amount(progress["rate"])
    if progress.get("eta") is not None:
        minutes, seconds = divmod(int(progress["eta"] + 0.5), 60)
        hours, minutes = divmod(minutes, 60)
        text += ", %d:%02d:%02d left" % (hours, minutes, seconds) if hours else ", %d:%02d left" % (minutes, seconds)
    return text


# -- errors of the daemon -------------------------------------------------------------------------------

#: Pattern, reason, what to do. The first that matches decides. Texts: moby, containerd, distribution, nvcr.io.
#: With containerd's image store, moby (daemon/containerd/registry_errors.go) keeps neither code nor status of what a
#: registry answers but its message, or the code alone where the message is the code's own.
_PULL_ERRORS: t.Tuple[t.Tuple[str, str, str], ...] = (
    (
        r"no space left on device|disk quota exceeded",
        "disk_full",
        "free space (docker system df, docker image prune) or move the images to a larger disk (Docker's "
        "data-root; with containerd's image store the root of containerd)",
    ),
    (
        r"Incorrect Repository Format",
        "engine_cannot_pull",
        "Docker Engine 29.5 cannot pull from nvcr.io: install an older or newer engine, or switch the containerd image "
        "store off in daemon.json (features, containerd-snapshotter)",
    ),
    (
        r"no matching manifest for|no match for platform in manifest|exec format error|does not match the specified platform",
        "architecture",
        "use a tag or repository for this host's architecture",
    ),
    (
        r"x509:|tls: (?!.*handshake timeout)|certificate",
        "tls_error",
        "put the CA certificate into the host's store (update-ca-certificates or update-ca-trust) and restart Docker, or "
        "into /etc/docker/certs.d/REGISTRY/ca.crt",
    ),
    (
        r"server gave HTTP response to HTTPS client",
        "tls_error",
        "give the registry TLS, or name it in Docker's insecure-registries",
    ),
    (
        r"toomanyrequests|429 Too Many Requests|error from registry: .*([Tt]oo many requests|rate limit|Rate exceeded)",
        "rate_limit",
        "try again later, log in, or use a mirror",
    ),
    (
        r"402 Payment Required|error from registry: .*Payment Required",
        "no_entitlement",
        "activate an NVIDIA AI Enterprise licence or trial for the key's organisation",
    ),
    (r"\b451 Unavailable|For Legal Reasons", "legal", "use another model: the registry may not hand it out here"),
    (
        r"manifest unknown|manifest for .* not found|failed to resolve reference .*: not found",
        "no_such_tag",
        "name a tag that exists",
    ),
    (
        r"could not fetch content descriptor .*: not found|blob unknown",
        "registry_error",
        "the registry lacks a part of this image: push it there again, or use another tag",
    ),
    (
        r"403 Forbidden|denied: .*(DENIED|Access Denied)|denied: requested access|"
        r"^requested access to the resource is denied|error from registry: .*\b[Dd]enied\b",
        "no_entitlement",
        "accept the terms of the image on its NGC page and check the key's organisation and its NGC Catalog service",
    ),
    (
        r"401 Unauthorized|unauthorized:|pull access denied|no basic auth credentials|missing username or secret|"
        r"authentication required|error from registry: .*([Uu]nauthorized|[Uu]nauthenticated)",
        "bad_key",
        "check the API key and the name of the repository",
    ),
    (r"name unknown|name not known|repository .* not found", "no_such_repository", "check the name of the repository"),
    (
        r"[Cc]annot connect to the Docker daemon|Connection aborted|Connection refused.*docker\.sock|"
        r"Error while fetching server|containerd\.sock|client connection is closing|error reading from server|"
        r"code = (Canceled|Unavailable)|\bcontext canceled",
        "docker_unavailable",
        "see 'systemctl status docker' and 'journalctl -u docker'",
    ),
    (
        r"no such host|i/o timeout|connection refused|connection reset|handshake timeout|unexpected EOF|\bEOF\b|"
        r"context deadline exceeded|request canceled|network is unreachable|no route to host|"
        r"\b50[0-9] |server misbehaving|proxyconnect|filesystem layer verification failed|unexpected commit digest|"
        r"short read|stream error|http2:|failed size validation|connection timed out|broken pipe|failed to do request|"
        r"error from registry: (unknown unknown$|.*([Uu]navailable|[Ii]nternal [Ss]erver [Ee]rror|[Bb]ad [Gg]ateway))",
        "registry_unreachable",
        "check the network, DNS and the proxy settings of the Docker service",
    ),
)
#: Worth another try without anybody doing anything.
PULL_TRANSIENT = TRANSIENT | {"docker_unavailable", "pull_stalled"}


def pull_error(image: str, text: str) -> FleetError:
    """Tell the errors of a pull apart by the daemon's text."""
    text = " ".join(text.split())
    reason, remedy = next(
        ((reason, remedy) for pattern, reason, remedy in _PULL_ERRORS if re.search(pattern, text)),
        ("pull_failed", "see 'journalctl -u docker'"),
    )
    said = text[:400].rstrip(".")
    return FleetError(reason, "Pulling %s failed: %s; %s." % (image, said, remedy), image=image)


class DockerPuller:
    """The few changes to images, through the Docker Engine API (moby/moby ``api/swagger.yaml``), with the standard library only.

    No package has the Docker SDK for Python that Ansible's modules could import on EL 8 and 10.

    Raises:
        FleetError: ``docker_unavailable`` and the reasons of :func:`pull_error`.
    """

    def __init__(self, socket_path: str = SOCKET, timeout: float = 60.0) -> None:
        self._socket_path = socket_path
        self._timeout = timeout

    def pull(
        self,
        source: str,
        digest: str,
        credentials: t.Optional[t.Tuple[str, str]],
        on_event: t.Callable[[t.Mapping[str, t.Any]], None],
        stalled_after: float = STALLED_AFTER,
    ) -> None:
        """Pull by digest.

        Args:
            stalled_after: Seconds without any event, or without one that says anything new of a download.
        """
        standstill = Standstill()
        image = "%s@%s" % (source, digest)
        path = "/images/create?" + urllib.parse.urlencode({"fromImage": source, "tag": digest})
        login = json.dumps(_login(source, credentials)).encode("utf-8")
        headers = {"X-Registry-Auth": base64.urlsafe_b64encode(login).decode("ascii")}
        try:
            with self._asked("POST", path, stalled_after, headers) as response:
                if response.status != 200:
                    raise pull_error(image, _explanation(response))
                for line in _lines(response):
                    event = parse_json(line) if line.strip() else None
                    if not isinstance(event, dict):
                        continue
                    if event.get("error") or event.get("errorDetail"):
                        detail = event.get("errorDetail")
                        told = detail.get("message") if isinstance(detail, dict) else None
                        raise pull_error(image, str(told or event.get("error") or detail))
                    on_event(event)
                    if standstill.feed(event, time.monotonic()) >= stalled_after:
                        # Hanging up makes the daemon give it up too.
                        raise _stalled(image, stalled_after)
        except socket.timeout:
            raise _stalled(image, stalled_after) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _broken_off(image, error) from None

    def tag(self, image_id: str, reference: ImageReference) -> None:
        """Give an image its human name, which also keeps ``docker image prune`` away from it."""
        parameters = urllib.parse.urlencode({"repo": reference.name, "tag": reference.tag})
        status, said = self._change("POST", image_id, "/tag?" + parameters, str(reference))
        if status != 201:
            raise pull_error(str(reference), said)

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove one name of an image, and the image with its last name; absent is fine.

        Args:
            force: Also where a container that does not run was made of it.
        """
        status, said = self._change("DELETE", name, "?force=%d" % force, name)
        if status == 409:
            raise FleetError(
                "image_in_use", "Removing %s failed: %s; remove the container first." % (name, said), image=name
            )
        if status not in (200, 404):
            raise pull_error(name, said)

    def _change(self, method: str, image: str, rest: str, what: str) -> t.Tuple[int, str]:
        """Status and explanation of a request about one image.

        Args:
            what: The image as errors name it.
        """
        path = "/images/%s%s" % (urllib.parse.quote(image, safe="/:@"), rest)
        try:
            with self._asked(method, path, self._timeout) as response:
                return response.status, _explanation(response)
        except (OSError, http.client.HTTPException) as error:
            raise _broken_off(what, error) from None

    @contextlib.contextmanager
    def _asked(
        self, method: str, path: str, timeout: float, headers: t.Optional[t.Mapping[str, str]] = None
    ) -> t.Iterator[http.client.HTTPResponse]:
        with contextlib.closing(UnixConnection(self._socket_path, timeout)) as connection:
            connection.request(method, path, headers=dict(headers or {}))
            # It has the socket open too.
            with contextlib.closing(connection.getresponse()) as response:
                yield response


def _login(source: str, credentials: t.Optional[t.Tuple[str, str]]) -> t.Dict[str, str]:
    """What Docker's own CLI says of a login; an empty one is anonymous."""
    if credentials is None:
        return {}
    user, secret = credentials
    login = {"identitytoken": secret} if user == TOKEN_USER else {"username": user, "password": secret}
    # Engine 24 with containerd's image store takes a login without it for one of Docker Hub.
    return dict(login, serveraddress=login_address(source.split("/", 1)[0]))


def _lines(response: http.client.HTTPResponse) -> t.Iterator[bytes]:
    """The lines of a chunked body as they come; ``readline`` would take a connection that breaks for the end."""
    rest = b""
    for part in iter(lambda: response.read1(65536), b""):
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
    yield rest


def _explanation(response: http.client.HTTPResponse) -> str:
    """What the daemon says of a request that it refuses."""
    body = response.read()
    said = str(json_object(body).get("message") or "") or body.decode("utf-8", "replace").strip()
    return said or "status %d" % response.status


def _stalled(image: str, seconds: float) -> FleetError:
    return FleetError(
        "pull_stalled",
        "Pulling %s came to a halt: no byte for %d s; check the network between this host and the registry."
        % (image, seconds),
        image=image,
    )


def _broken_off(image: str, error: Exception) -> FleetError:
    """For no answer of the daemon at all, or one that broke off: it was stopped or restarted."""
    silent = isinstance(error, (FileNotFoundError, ConnectionRefusedError, PermissionError, socket.timeout))
    why = describe_failure(error) if silent else "its answer broke off (%s)" % type(error).__name__
    return FleetError(
        "docker_unavailable",
        "Asking Docker about %s failed: %s; see 'systemctl status docker' and 'journalctl -u docker'." % (image, why),
        image=image,
    )
