# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Machines and the server of their repositories."""

from __future__ import annotations

import functools
import http.server
import os
import pathlib
import shutil
import sys
import threading
import typing as t

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import machines

#: Part of a path -> what is wrong with what is there: a status of HTTP, or nothing for a body that is damaged.
_FAULTS: dict[str, int | None] = {}


class _Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: t.Any) -> None:
        """Nobody reads it."""

    def do_GET(self) -> None:
        fault = [status for part, status in _FAULTS.items() if part in self.path]
        if not fault:
            super().do_GET()
        elif fault[0]:
            self.send_error(fault[0])
        else:
            size = pathlib.Path(self.translate_path(self.path)).stat().st_size
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(b"x" * size)


@pytest.fixture
def faults() -> t.Iterator[dict[str, int | None]]:
    """Faults of the server; see :data:`_FAULTS`."""
    yield _FAULTS
    _FAULTS.clear()


@pytest.fixture(scope="session")
def server() -> t.Iterator[str]:
    """URL of all repositories."""
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        pytest.fail("needs root and mmdebstrap")
    handler = functools.partial(_Server, directory=str(machines.build()))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield "http://127.0.0.1:%d" % http_server.server_address[1]
        http_server.shutdown()


@pytest.fixture
def machine(request: pytest.FixtureRequest, server: str, tmp_path: pathlib.Path) -> t.Iterator[machines.Machine]:
    """A fresh machine; the parameter is the major version of EL."""
    directory = tmp_path / "machine"
    made = machines.Machine(request.param, directory)
    machines.connect(made, server)
    yield made
    machines.remove(directory)
