# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A real HAProxy on the loopback with the gateway's own configuration, and small servers that answer like NIMs."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils import _gateway_state
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_settings import (
    Layout,
    Server,
    Settings,
    make_backends,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._haproxy_config import render

HAPROXY = shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
#: Seconds; far more than anything takes on a machine that is not busy with ten other things.
WAIT = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(true: t.Callable[[], t.Any], what: str, seconds: float = WAIT) -> t.Any:
    """The first true answer, or a failure that says what was waited for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            answer = true()
            if answer:
                return answer
        time.sleep(0.02)
    raise AssertionError("not within %s s: %s" % (seconds, what))


class Nim:
    """A server with NIM's paths. ``tokens`` and ``pause`` make its streams; ``ready`` its health."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready = True
        self.tokens = 5
        self.pause = 0.01
        self.requests: list[dict[str, t.Any]] = []
        self.headers: list[dict[str, str]] = []
        self.running = 0
        nim = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: t.Any) -> None:
                pass

            def do_GET(self) -> None:
                status = 200 if self.path == "/v1/health/ready" and nim.ready else 503
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def do_POST(self) -> None:
                raw = self.read_body()
                nim.running += 1
                try:
                    body = json.loads(raw)
                    nim.requests.append(body)
                    nim.headers.append({key.lower(): value for key, value in self.headers.items()})
                    if body.get("stream"):
                        self.stream()
                    else:
                        time.sleep(float(body.get("seconds", 0)))
                        answer = json.dumps({"server": nim.name, "model": body["model"], "size": len(raw)}).encode()
                        self.send_response(200)
                        self.send_header("Content-Length", str(len(answer)))
                        self.end_headers()
                        self.wfile.write(answer)
                except OSError:
                    self.close_connection = True
                finally:
                    nim.running -= 1

            def read_body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                raw = b""
                while True:
                    size = int(self.rfile.readline(), 16)
                    raw += self.rfile.read(size)
                    self.rfile.readline()
                    if not size:
                        return raw

            def stream(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for number in range(nim.tokens):
                    self.chunk("data: %s %d\n\n" % (nim.name, number))
                    time.sleep(nim.pause)
                self.chunk("data: [DONE]\n\n")
                self.wfile.write(b"0\r\n\r\n")

            def chunk(self, text: str) -> None:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text.encode()))
                self.wfile.flush()

        class Quick(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: t.Any, client_address: t.Any) -> None:
                pass

        self.server = Quick(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@dataclasses.dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> t.Any:
        return json.loads(self.text)

    @property
    def code(self) -> str:
        """Code of an OpenAI-style error."""
        return str(self.json["error"]["code"])


class Gateway:
    """HAProxy with master and workers, as its systemd unit starts it, on ports and paths of its own."""

    def __init__(self, directory: pathlib.Path, servers: t.Sequence[Server], **options: t.Any) -> None:
        self.directory = directory
        (directory / "nim").mkdir()
        self.layout = Layout(
            configuration=str(directory / "haproxy.cfg"),
            directory=str(directory / "nim"),
            # The path of a UNIX socket must be short.
            socket=str(directory / "s"),
            master_socket=str(directory / "m"),
            state_file=str(directory / "state"),
        )
        self.port, self.metrics_port = free_port(), free_port()
        self.options = options
        self.version = ""
        self.write(servers)
        self.keep_state()
        self.log = open(directory / "log", "wb")  # noqa: SIM115 - closed with the gateway
        assert HAPROXY is not None
        self.process = subprocess.Popen(
            [HAPROXY, "-W", "-S", self.layout.master_socket, "-f", self.layout.configuration],
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        try:
            self.wait_for_version()
        except AssertionError:
            self.close()
            raise AssertionError((directory / "log").read_text()) from None

    def write(self, servers: t.Sequence[Server], **options: t.Any) -> None:
        self.options.update(options)
        settings = Settings(
            make_backends(servers),
            bind_address="127.0.0.1",
            port=self.port,
            metrics_address="127.0.0.1",
            metrics_port=self.metrics_port,
            **{"slow_start": 0, **self.options},
        )
        self.version, files = render(settings, self.layout)
        for file in files:
            content = file.content
            if file.path == self.layout.configuration:
                # Checks in a tenth of the time, and no other user: the tests need not be run by root.
                content = content.replace("inter 2s fastinter 500ms", "inter 200ms fastinter 50ms")
                content = re.sub(r"(?m)^    (user|group|chroot) .*\n", "", content)
            pathlib.Path(file.path).write_text(content)

    def keep_state(self) -> None:
        """What the unit does before a reload; the program is run as it is on a gateway."""
        program = [sys.executable, _gateway_state.__file__]
        subprocess.run(
            [*program, self.layout.socket, self.layout.servers, self.layout.state_file], check=True, timeout=WAIT
        )

    def reload(self) -> None:
        self.keep_state()
        before = self.pid()
        self.process.send_signal(signal.SIGUSR2)
        until(lambda: self.pid() != before, "a new worker answers")
        self.wait_for_version()

    def wait_for_version(self) -> None:
        until(lambda: self.version in self.ask("show info"), "HAProxy runs with the new configuration")

    def pid(self) -> str:
        return next(line for line in self.ask("show info").splitlines() if line.startswith("Pid:"))

    def ask(self, command: str) -> str:
        return _gateway_state.ask(self.layout.socket, command)

    def status(self, server: str) -> str:
        """Status of a server (``UP``, ``DOWN``, ``DRAIN``, ``MAINT``) in whichever backend it is first."""
        for line in self.ask("show stat -1 4 -1").splitlines():
            fields = line.split(",")
            if len(fields) > 17 and fields[1] == server:
                return fields[17]
        return ""

    def frontend(self, column: str) -> str:
        """What ``show stat`` says of the frontend of clients."""
        head, *rest = self.ask("show stat nim_gateway 1 -1").lstrip("# ").splitlines()
        return rest[0].split(",")[head.split(",").index(column)]

    def wait_for(self, server: str, status: str) -> None:
        until(lambda: self.status(server).startswith(status), "%s is %s" % (server, status))

    def request(
        self,
        path: str = "/v1/chat/completions",
        body: t.Any = None,
        *,
        method: str | None = None,
        key: str | None = None,
        headers: t.Mapping[str, str] | None = None,
        chunked: bool = False,
        port: int | None = None,
    ) -> Answer:
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=WAIT)
        sent = {"Content-Type": "application/json", **(headers or {})}
        if key:
            sent["Authorization"] = "Bearer " + key
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                # A refused body need not be read to its end.
                connection.request(
                    method or ("GET" if raw is None else "POST"),
                    path,
                    iter([raw]) if chunked and raw else raw,
                    sent,
                    encode_chunked=chunked,
                )
            response = connection.getresponse()
            text = response.read().decode()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, text)
        finally:
            connection.close()

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(WAIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


class Load:
    """Clients that ask all the time, streamed and plain, and note whatever is not a whole answer."""

    def __init__(self, gateway: Gateway, model: str, clients: int = 4, *, streamed: bool = False) -> None:
        self.gateway, self.model = gateway, model
        self.answers = 0
        self.failures: list[str] = []
        self.stop = threading.Event()
        # Daemons: a test that fails must not leave them asking for ever.
        self.threads = [
            threading.Thread(target=self.work, args=(streamed or bool(n % 2),), daemon=True) for n in range(clients)
        ]
        for thread in self.threads:
            thread.start()

    def work(self, streamed: bool) -> None:
        while not self.stop.is_set():
            try:
                answer = self.gateway.request(body={"model": self.model, "stream": streamed})
                whole = answer.text.endswith("[DONE]\n\n") if streamed else "server" in answer.text
                if answer.status != 200 or not whole:
                    self.failures.append("%d %s" % (answer.status, answer.text[-200:]))
                self.answers += 1
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(WAIT)
