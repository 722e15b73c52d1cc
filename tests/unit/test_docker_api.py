# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reads of the Engine API over a real unix socket."""

from __future__ import annotations

import http.server
import json
import pathlib
import socketserver
import threading
import typing as t
import urllib.parse

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_api import DockerApi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError

ANSWERS: dict[str, tuple[int, str, str]] = {
    "/_ping": (200, "text/plain; charset=utf-8", "OK"),
    "/version": (200, "application/json", '{"Version": "26.1.5"}'),
    "/info": (200, "application/json", '{"DefaultRuntime": "runc"}'),
    "/containers/json": (200, "application/json", '[{"Id": "a"}]'),
    "/containers/nim-a/json": (200, "application/json", '{"Id": "a"}'),
    "/containers/none/json": (404, "application/json", '{"message": "No such container: none"}'),
    "/images/nvcr.io/nim/x:1/json": (200, "application/json", '{"Id": "sha256:1"}'),
    "/images/broken/json": (500, "application/json", '{"message": "layer does not exist"}'),
    "/events": (200, "application/json", '{"Action": "reload"}\n{"Action": "reload"}\n'),
}


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    requests: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        Server.requests.append(self.path)
        status, kind, body = ANSWERS.get(urllib.parse.unquote(self.path.split("?")[0]), (404, "text/plain", "no"))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: t.Any) -> None:
        return

    def address_string(self) -> str:
        return "unix"


@pytest.fixture
def api(tmp_path: pathlib.Path) -> t.Iterator[DockerApi]:
    path = str(tmp_path / "docker.sock")
    Server.requests = []
    with Server(path, Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield DockerApi(path)
        server.shutdown()


def test_reads(api: DockerApi) -> None:
    assert api.available()
    assert api.version()["Version"] == "26.1.5"
    assert api.info()["DefaultRuntime"] == "runc"
    assert api.containers(labels=["a=b"]) == [{"Id": "a"}]
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(Server.requests[-1]).query)
    assert query["all"] == ["1"]
    assert json.loads(query["filters"][0]) == {"label": ["a=b"]}
    assert api.container("nim-a") == {"Id": "a"}
    assert api.image("nvcr.io/nim/x:1") == {"Id": "sha256:1"}
    assert api.reloaded_since(1.5, 2.5)


def test_absence_is_none(api: DockerApi) -> None:
    assert api.container("none") is None
    assert api.image("none") is None


def test_names_are_escaped(api: DockerApi) -> None:
    assert api.container("../info?") is None
    assert Server.requests[-1] == "/containers/..%2Finfo%3F/json"


def test_the_daemons_own_words(api: DockerApi) -> None:
    with pytest.raises(FleetError) as caught:
        api.image("broken")
    assert caught.value.reason == "docker_error"
    assert "layer does not exist" in caught.value.message


def test_nobody_there(tmp_path: pathlib.Path) -> None:
    api = DockerApi(str(tmp_path / "none.sock"))
    assert not api.available()
    with pytest.raises(FleetError) as caught:
        api.info()
    assert caught.value.reason == "docker_unavailable"
    assert "no such socket" in caught.value.message


def test_nobody_listens(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "dead.sock"
    Server(str(path), Handler).server_close()
    with pytest.raises(FleetError, match="no daemon listens"):
        DockerApi(str(path)).info()
