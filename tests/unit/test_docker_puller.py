# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Changes of images over a real unix socket; the daemon is played, and the Docker SDK for Python says what it must be asked."""

from __future__ import annotations

import base64
import http.server
import json
import pathlib
import socketserver
import threading
import typing as t
import urllib.parse

import docker
import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_pull import DockerPuller
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_reference import ImageReference

SOURCE = "nvcr.io/nim/meta/llama-3.1-8b-instruct"
DIGEST = "sha256:" + "a" * 64
KEY = "nvapi-ä/+secret"
ID = "sha256:" + "1" * 64
LAYER = {"status": "Downloading", "progressDetail": {"current": 1, "total": 2}, "id": "0123456789ab"}


class Daemon(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Answers every change in one way, and remembers what it was asked.

    Attributes:
        status: Of the answer.
        lines: Of its body, each sent as a chunk of its own.
        end: What happens after them: ``end``, ``break`` (the connection breaks), ``hang`` or ``repeat`` (the last line is
            sent again and again, as containerd's image store does).
        gone: Whether whoever asked has hung up while that went on.
    """

    daemon_threads = True

    def __init__(self, path: str) -> None:
        super().__init__(path, Handler)
        self.asked: list[tuple[str, str, dict[str, list[str]], str]] = []
        self.status = 200
        self.lines: list[bytes] = []
        self.end = "end"
        self.over = threading.Event()
        self.gone = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Daemon

    def _answer(self) -> None:
        path, _question, query = self.path.partition("?")
        # The SDK names a version of the API.
        path = "/" + path.split("/", 2)[2] if path.startswith("/v1.") else path
        login = self.headers.get("X-Registry-Auth") or ""
        self.server.asked.append(
            (self.command, urllib.parse.unquote(path), urllib.parse.parse_qs(query), login),
        )
        self.send_response(self.server.status)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in self.server.lines:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        if self.server.end == "hang":
            self.server.over.wait(20)
        elif self.server.end == "repeat":
            try:
                while not self.server.over.wait(0.02):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            except OSError:
                self.server.gone.set()
        elif self.server.end == "end":
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    do_POST = do_DELETE = _answer  # noqa: N815  # names that http.server asks for

    def log_message(self, format: str, *args: t.Any) -> None:
        return

    def address_string(self) -> str:
        return "unix"


@pytest.fixture
def daemon(tmp_path: pathlib.Path) -> t.Iterator[Daemon]:
    with Daemon(str(tmp_path / "docker.sock")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def puller(daemon: Daemon) -> DockerPuller:
    return DockerPuller(str(daemon.server_address), timeout=5)


def pull(daemon: Daemon, **options: t.Any) -> list[t.Mapping[str, t.Any]]:
    events: list[t.Mapping[str, t.Any]] = []
    puller(daemon).pull(SOURCE, DIGEST, ("$oauthtoken", KEY), events.append, **options)
    return events


def event(**values: t.Any) -> bytes:
    return json.dumps(values).encode() + b"\r\n"


# -- the requests -----------------------------------------------------------------------------------------


def decoded(login: str) -> dict[str, t.Any]:
    """A login as the daemon understands it: names in any case, and what is null is not there."""
    found = json.loads(base64.urlsafe_b64decode(login))
    return {name.lower(): value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("source", "entry"),
    [
        (SOURCE, "nvcr.io"),
        ("mirror.example:5000/nim/x", "mirror.example:5000"),
        ("docker.io/library/busybox", "https://index.docker.io/v1/"),
    ],
)
def test_a_pull_is_asked_as_the_sdk_asks(
    daemon: Daemon, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, source: str, entry: str
) -> None:
    login = base64.b64encode(("$oauthtoken:" + KEY).encode()).decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {entry: {"auth": login}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    sdk = docker.APIClient(base_url="unix://%s" % daemon.server_address, version="1.44")
    list(sdk.pull(source, tag=DIGEST, stream=True, decode=True))
    puller(daemon).pull(source, DIGEST, ("$oauthtoken", KEY), lambda event: None)
    theirs, ours = daemon.asked
    assert ours[:3] == theirs[:3]
    assert ours[:2] == ("POST", "/images/create")
    assert (
        decoded(ours[3]) == decoded(theirs[3]) == {"username": "$oauthtoken", "password": KEY, "serveraddress": entry}
    )


def test_an_anonymous_pull_is_asked_as_the_sdk_asks(daemon: Daemon) -> None:
    sdk = docker.APIClient(base_url="unix://%s" % daemon.server_address, version="1.44")
    list(sdk.pull(SOURCE, tag=DIGEST, auth_config={}, stream=True, decode=True))
    puller(daemon).pull(SOURCE, DIGEST, None, lambda event: None)
    theirs, ours = daemon.asked
    assert ours == theirs
    assert decoded(ours[3]) == {}


def test_an_identity_token_is_passed_on_as_one(daemon: Daemon) -> None:
    puller(daemon).pull(SOURCE, DIGEST, ("<token>", KEY), lambda event: None)
    # As Docker's CLI does with what a credential helper has for this user (cli/config/credentials/native_store.go).
    assert decoded(daemon.asked[0][3]) == {"identitytoken": KEY, "serveraddress": "nvcr.io"}


def test_changes_are_asked_as_the_sdk_asks(daemon: Daemon) -> None:
    sdk = docker.APIClient(base_url="unix://%s" % daemon.server_address, version="1.44")
    name = SOURCE + "@" + DIGEST
    daemon.status = 201
    sdk.tag(ID, SOURCE, "1.8.4")
    puller(daemon).tag(ID, ImageReference.parse(SOURCE + ":1.8.4"))
    daemon.status, daemon.lines = 200, [b"[]"]
    for force in (False, True):
        sdk.remove_image(name, force=force)
        puller(daemon).remove(name, force=force)
    tagged, removed, forced = (daemon.asked[index : index + 2] for index in (0, 2, 4))
    # Defaults that the SDK writes down.
    assert tagged[1][2] == {key: value for key, value in tagged[0][2].items() if key != "force"}
    assert [pair[1][:2] for pair in (tagged, removed, forced)] == [pair[0][:2] for pair in (tagged, removed, forced)]
    assert [pair[1][1] for pair in (tagged, removed)] == ["/images/%s/tag" % ID, "/images/" + name]
    assert [pair[1][2] for pair in (removed, forced)] == [{"force": ["0"]}, {"force": ["1"]}]
    assert all(not login for *_rest, login in daemon.asked)


# -- the answers ------------------------------------------------------------------------------------------


def test_events_come_one_by_one(daemon: Daemon) -> None:
    # Two in one chunk, one in two, an empty line, and what is no event.
    whole = event(**LAYER)
    daemon.lines = [whole + whole, whole[:9], whole[9:], b"\r\n", b"[]\r\n", event(status="Status: Downloaded")]
    assert pull(daemon) == [LAYER, LAYER, LAYER, {"status": "Status: Downloaded"}]


@pytest.mark.parametrize(
    "line",
    [
        event(errorDetail={"message": "no space left on device"}, error="no space left on device"),
        event(error="no space left on device"),
        event(errorDetail="no space left on device"),
    ],
)
def test_an_error_within_the_pull(daemon: Daemon, line: bytes) -> None:
    daemon.lines = [event(**LAYER), line]
    with pytest.raises(FleetError) as caught:
        pull(daemon)
    assert caught.value.reason == "disk_full"


@pytest.mark.parametrize(
    "body", [b'{"message": "manifest unknown"}', b"manifest unknown\n", b'{"message": ["manifest unknown"]}']
)
def test_a_pull_that_is_refused(daemon: Daemon, body: bytes) -> None:
    daemon.status, daemon.lines = 404, [body]
    with pytest.raises(FleetError) as caught:
        pull(daemon)
    assert caught.value.reason == "no_such_tag"
    assert KEY not in caught.value.message


@pytest.mark.parametrize("lines", [[], [event(**LAYER)], [event(**LAYER), event(**LAYER)[:7]], [b"no JSON\r\n"]])
def test_an_answer_that_breaks_off(daemon: Daemon, lines: list[bytes]) -> None:
    daemon.lines, daemon.end = lines, "break"
    with pytest.raises(FleetError) as caught:
        pull(daemon)
    assert caught.value.reason == "docker_unavailable"
    assert "broke off" in caught.value.message


@pytest.mark.parametrize("lines", [[], [event(**LAYER)]])
def test_a_pull_that_comes_to_a_halt(daemon: Daemon, lines: list[bytes]) -> None:
    daemon.lines, daemon.end = lines, "hang"
    events: list[t.Mapping[str, t.Any]] = []
    with pytest.raises(FleetError) as caught:
        puller(daemon).pull(SOURCE, DIGEST, None, events.append, stalled_after=0.3)
    assert caught.value.reason == "pull_stalled"
    # They were handed on as they came, not at the end.
    assert events == [LAYER] * len(lines)


def test_a_pull_that_only_seems_to_go_on(daemon: Daemon) -> None:
    daemon.lines, daemon.end = [event(**LAYER)], "repeat"
    with pytest.raises(FleetError, match=r"halt: no byte for 0 s; check the network") as caught:
        pull(daemon, stalled_after=0.3)
    assert caught.value.reason == "pull_stalled"
    # The daemon ends a pull whose asker has hung up.
    assert daemon.gone.wait(5)


def test_extraction_longer_than_the_limit(daemon: Daemon) -> None:
    daemon.lines, daemon.end = [event(status="Extracting", id="0123456789ab")], "repeat"
    threading.Timer(1.0, daemon.over.set).start()
    with pytest.raises(FleetError) as caught:
        pull(daemon, stalled_after=0.3)
    # The played daemon went away after three times the limit.
    assert caught.value.reason == "docker_unavailable"


@pytest.mark.parametrize("status", [204, 301, 304])
def test_an_answer_that_is_none_of_docker(daemon: Daemon, status: int) -> None:
    daemon.status = status
    for attempt in (
        lambda: pull(daemon),
        lambda: puller(daemon).tag(ID, ImageReference.parse(SOURCE + ":1")),
        lambda: puller(daemon).remove(SOURCE),
    ):
        with pytest.raises(FleetError, match="status %d" % status):
            attempt()


def test_an_image_in_use_and_one_that_is_gone(daemon: Daemon) -> None:
    daemon.lines = [b'{"message": "No such image"}']
    daemon.status = 404
    puller(daemon).remove(SOURCE)
    daemon.status, daemon.lines = 409, [b'{"message": "image is being used by running container 1"}']
    with pytest.raises(FleetError, match="used by running container 1; remove the container first") as caught:
        puller(daemon).remove(SOURCE)
    assert caught.value.reason == "image_in_use"
    daemon.status, daemon.lines = 500, [b'{"message": "layer does not exist"}']
    with pytest.raises(FleetError, match="layer does not exist"):
        puller(daemon).remove(SOURCE)
    with pytest.raises(FleetError, match="layer does not exist"):
        puller(daemon).tag(ID, ImageReference.parse(SOURCE + ":1.8.4"))


def test_nobody_answers(tmp_path: pathlib.Path) -> None:
    nobody = DockerPuller(str(tmp_path / "docker.sock"))
    for attempt in (
        lambda: nobody.pull(SOURCE, DIGEST, None, lambda event: None),
        lambda: nobody.tag(ID, ImageReference.parse(SOURCE + ":1")),
        lambda: nobody.remove(SOURCE),
    ):
        with pytest.raises(FleetError) as caught:
            attempt()
        assert caught.value.reason == "docker_unavailable"
