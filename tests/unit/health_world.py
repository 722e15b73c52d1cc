# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A NIM for the tests of health: a real HTTP server, and a scripted unit, container and log around it."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nim_health
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._health_target import parse_targets
from fake_host import FakeHost


class Nim:
    """The HTTP side of a NIM on a free port; attributes change its answers at any time."""

    def __init__(self) -> None:
        self.ready = 200
        self.models: list[str] | None = ["meta/llama"]
        self.chat: tuple[int, t.Any] = (200, {"choices": [{"message": {"content": "Hello"}}]})
        self.plain: tuple[int, t.Any] = (200, {"choices": [{"text": "world"}]})
        self.metrics = ""
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self, status: int, body: t.Any) -> None:
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                outer.requests.append(self.path)
                if self.path == "/v1/health/ready":
                    return self.answer(outer.ready, {"object": "health.response"})
                if self.path == "/v1/models" and outer.models is not None:
                    return self.answer(200, {"object": "list", "data": [{"id": name} for name in outer.models]})
                if self.path == "/v1/version":
                    return self.answer(200, {"release": "1.8.4", "api": "1.8"})
                if self.path == "/v1/metadata":
                    return self.answer(200, {"selectedModelProfileId": "a" * 64})
                if self.path == outer.metrics:
                    return self.answer(200, "# HELP num_requests_running Requests\nnum_requests_running 0\n")
                return self.answer(404, {"detail": "Not Found"})

            def do_POST(self) -> None:
                outer.requests.append(self.path)
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(*(outer.chat if "chat" in self.path else outer.plain))

            def log_message(self, *_args: t.Any) -> None:
                """Stay silent."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def stamp(seconds: float, nanoseconds: int = 0) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + ".%09dZ" % nanoseconds


class World(FakeHost):
    """A host with units and containers of NIMs; ``at`` runs a function when the clock reaches a second."""

    def __init__(self) -> None:
        super().__init__()
        self.start = self.clock
        self.units: dict[str, dict[str, t.Any]] = {}
        self.boxes: dict[str, dict[str, t.Any]] = {}
        self.logs: dict[str, list[tuple[float, str]]] = {}
        self.journal: dict[str, list[str]] = {}
        self.kernel: list[tuple[float, str]] = []
        self.events: list[tuple[float, t.Callable[[], None]]] = []
        self.docker_down = False
        self.published: list[dict[str, t.Any]] = []
        self.commands = {
            "systemctl show *": self.systemctl,
            "docker logs *": self.docker_logs,
            "journalctl *": self.journalctl,
            "ss *": 'LISTEN 0 4096 0.0.0.0:8000 0.0.0.0:* users:(("docker-proxy",pid=812,fd=7))\n',
        }

    def unit(self, name: str, **values: t.Any) -> None:
        defaults = {
            "LoadState": "loaded",
            "ActiveState": "active",
            "SubState": "running",
            "NRestarts": 0,
            "InvocationID": "i1",
            "Result": "success",
            "ExecMainStatus": 0,
            "ConditionResult": "yes",
            "ExecMainStartTimestampMonotonic": int((self.clock - 1) * 1e6),
        }
        self.units["nim-%s.service" % name] = {**defaults, **self.units.get("nim-%s.service" % name, {}), **values}

    def box(self, name: str, status: str = "running", box_id: str = "c1", **state: t.Any) -> None:
        self.boxes["nim-" + name] = {
            "Id": box_id,
            "State": {
                "Status": status,
                "StartedAt": stamp(self.clock),
                "FinishedAt": "0001-01-01T00:00:00Z" if status == "running" else stamp(self.clock),
                "ExitCode": 0,
                "OOMKilled": False,
                "Error": "",
                **state,
            },
        }

    def end(self, name: str, **state: t.Any) -> None:
        self.boxes["nim-" + name]["State"].update(
            {"Status": "exited", "FinishedAt": stamp(self.clock), "ExitCode": 0, **state}
        )

    def container(self, name: str) -> dict[str, t.Any] | None:
        if self.docker_down:
            raise FleetError("docker_unavailable", "Asking Docker failed: no daemon listens there.")
        by_id = (box for box in self.boxes.values() if box["Id"] == name)
        return self.boxes.get(name) or next(by_id, None)

    def containers(self, all: bool = True) -> list[dict[str, t.Any]]:
        return self.published

    def log(self, name: str, *lines: str) -> None:
        for line in lines:
            self.logs.setdefault("nim-" + name, []).append((self.clock, line))

    def systemctl(self, _host: FakeHost, argv: tuple[str, ...], _in: t.Any, _env: t.Any) -> str:
        blocks = []
        for unit in argv[3:]:
            values = self.units.get(unit, {"LoadState": "not-found", "ActiveState": "inactive"})
            blocks.append("".join("%s=%s\n" % pair for pair in {"Id": unit, **values}.items()))
        return "\n".join(blocks)

    def docker_logs(self, _host: FakeHost, argv: tuple[str, ...], _in: t.Any, _env: t.Any) -> tuple[int, str, str]:
        names = [name for name, box in self.boxes.items() if argv[-1] in (name, box["Id"])]
        lines = self.logs.get(names[0], []) if names else None
        if lines is None:
            return 1, "", "Error response from daemon: No such container"
        # Docker hands the two streams of a container out separately.
        since = argv[argv.index("--since") + 1] if "--since" in argv else "0"
        begin = float(since) if re.match(r"[0-9.]+\Z", since) else 0.0
        stamped = ["%s %s" % (stamp(when, index), line) for index, (when, line) in enumerate(lines) if when >= begin]
        return 0, "\n".join(stamped[::2]), "\n".join(stamped[1::2])

    def journalctl(self, _host: FakeHost, argv: tuple[str, ...], _in: t.Any, _env: t.Any) -> str:
        if "--dmesg" in argv:
            since = [float(word.partition("@")[2]) for word in argv if word.startswith("--since=@")]
            entries = [(when, {"MESSAGE": text}) for when, text in self.kernel if when >= (since or [0.0])[0]]
        else:
            entries = [(self.clock, {"MESSAGE": text}) for text in self.journal.get(argv[-1], [])]
        return "\n".join(json.dumps({**entry, "__REALTIME_TIMESTAMP": str(int(when * 1e6))}) for when, entry in entries)

    def at(self, second: float, action: t.Callable[[], None]) -> None:
        self.events.append((self.start + second, action))

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        for event in sorted(self.events, key=lambda entry: entry[0]):
            if event[0] <= self.clock:
                self.events.remove(event)
                event[1]()


def check(
    world: World, entries: list[dict[str, t.Any]], *, slices: bool = False, **more: t.Any
) -> tuple[_nim_health.Outcome, list[str]]:
    """Wait to the end, in one go or in slices of five seconds; returns the outcome and the lines shown."""
    targets = parse_targets(entries)
    lines: list[str] = []
    resume: t.Any = None
    arguments = {"interval": 5.0 if slices else 0, "wait": True, **more}
    for _round in range(1000):
        outcome = _nim_health.HealthCheck(world, world, targets).run(resume, **arguments)
        if outcome.finished:
            return outcome, lines
        lines.append(outcome.text)
        resume = json.loads(json.dumps(outcome.resume))
    raise AssertionError("no end")


def word(
    world: World,
    phase: str,
    failures: int = 0,
    detail: str = "",
    age: float = 0.0,
    unsteady: int = 0,
    **more: t.Any,
) -> None:
    content = {"phase": phase, "since": int(world.clock - age), "spec": "s", "failures": failures, "detail": detail}
    content.update(more, unsteady=unsteady)
    world.files["/run/nim/a.json"] = json.dumps(content).encode()
