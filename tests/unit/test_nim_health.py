# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Health: a real HTTP server as the NIM, a scripted unit, container and log around it."""

from __future__ import annotations

import base64
import http.server
import json
import pathlib
import threading
import time
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _failure_signatures, _nim_health
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from fake_host import FakeHost

NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template if the "
    "tokenizer does not define one."
)


class Nim:
    """The HTTP side of a NIM on a free port; attributes change its answers at any time."""

    def __init__(self) -> None:
        self.ready = 200
        self.models: list[str] | None = ["meta/llama"]
        self.chat: tuple[int, t.Any] = (200, {"choices": [{"message": {"content": "Hello"}}]})
        self.plain: tuple[int, t.Any] = (200, {"choices": [{"text": "world"}]})
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self, status: int, body: t.Any) -> None:
                data = json.dumps(body).encode()
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


@pytest.fixture
def nim() -> t.Iterator[Nim]:
    server = Nim()
    yield server
    server.close()


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
        self.events: list[tuple[float, t.Callable[[], None]]] = []
        self.docker_down = False
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
        return self.boxes.get(name)

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
        lines = self.logs.get(argv[-1])
        if lines is None:
            return 1, "", "Error response from daemon: No such container"
        # Docker hands the two streams of a container out separately.
        stamped = ["%s %s" % (stamp(when, index), line) for index, (when, line) in enumerate(lines)]
        return 0, "\n".join(stamped[::2]), "\n".join(stamped[1::2])

    def journalctl(self, _host: FakeHost, argv: tuple[str, ...], _in: t.Any, _env: t.Any) -> str:
        return "\n".join(self.journal.get(argv[-1], []))

    def at(self, second: float, action: t.Callable[[], None]) -> None:
        self.events.append((self.start + second, action))

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        for event in sorted(self.events, key=lambda entry: entry[0]):
            if event[0] <= self.clock:
                self.events.remove(event)
                event[1]()


@pytest.fixture
def world() -> World:
    return World()


def check(
    world: World, entries: list[dict[str, t.Any]], *, slices: bool = False, **more: t.Any
) -> tuple[_nim_health.Outcome, list[str]]:
    """Wait to the end, in one go or in slices of five seconds; returns the outcome and the lines shown."""
    targets = _nim_health.parse_targets(entries)
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


# -- options --------------------------------------------------------------------------------------


def test_targets_from_nim_models() -> None:
    targets = _nim_health.parse_targets(
        [
            {"name": "a", "image": "nvcr.io/nim/x:1", "gpus": 1},
            {"name": "b", "port": "8001", "bind_address": "::", "served_model_name": "one, two", "start_timeout": 60},
            {"name": "c", "state": "stopped"},
            {"name": "d", "bind_address": "10.0.0.5", "environment": {"NIM_SSL_MODE": "TLS"}, "completion": "none"},
        ]
    )
    assert [(one.unit, one.url, one.expected, one.completion) for one in targets] == [
        ("nim-a.service", "http://127.0.0.1:8000", (), "auto"),
        ("nim-b.service", "http://[::1]:8001", ("one", "two"), "auto"),
        ("nim-d.service", "https://10.0.0.5:8000", (), "none"),
    ]
    assert targets[1].start_timeout == 60


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (["a"], "models[0] = 'a'"),
        ([{}], "models[0].name = None"),
        ([{"name": "a b"}], "models[0].name = 'a b'"),
        ([{"name": "a"}, {"name": "a"}], "models[1].name = 'a': is there twice"),
        ([{"name": "a", "port": 0}], "models[0].port = 0"),
        ([{"name": "a", "port": True}], "models[0].port = True"),
        ([{"name": "a", "start_timeout": "30m"}], "models[0].start_timeout = '30m'"),
        ([{"name": "a", "completion": "poem"}], "use auto, chat, completion, none"),
    ],
)
def test_bad_options(entries: list[t.Any], says: str) -> None:
    with pytest.raises(FleetError) as caught:
        _nim_health.parse_targets(entries)
    assert caught.value.reason == "invalid_option"
    assert says in caught.value.message


# -- ready ----------------------------------------------------------------------------------------


def test_already_ready_is_one_look(world: World, nim: Nim) -> None:
    world.unit("a")
    world.box("a")
    world.clock += 100
    world.logs["nim-a"] = [(world.start, "starting"), (world.start + 31, "INFO: Application startup complete.")]
    outcome, lines = check(world, [{"name": "a", "port": nim.port}], slices=True)
    assert (outcome.finished, outcome.failures, lines) == (True, [], [])
    [model] = outcome.models
    assert model["ready"] is True
    assert model["phase"] == "ready"
    assert model["seconds_to_ready"] == 31.0
    assert model["model_id"] == "meta/llama"
    assert model["version"] == "1.8.4"
    assert model["profile"] == "a" * 64
    assert model["completion"]["kind"] == "chat"
    assert model["completion"]["text"] == "Hello"
    assert len([call for call in world.calls if call[0] == "systemctl"]) == 1


def test_completion_is_sent_once_for_a_start_of_the_container(world: World, nim: Nim) -> None:
    world.unit("a")
    world.box("a")
    entries = [{"name": "a", "port": nim.port}]
    first, dummy = check(world, entries)
    second, dummy = check(world, entries)
    assert nim.requests.count("/v1/chat/completions") == 1
    assert second.models == first.models
    world.box("a", box_id="c2")
    check(world, entries)
    assert nim.requests.count("/v1/chat/completions") == 2


def test_broken_record_is_taken_again(world: World, nim: Nim) -> None:
    world.unit("a")
    world.box("a")
    world.files["/run/gpu_fleet/health/a.json"] = b"{half"
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.models[0]["ready"]


def test_check_mode_writes_and_sends_nothing(world: World, nim: Nim) -> None:
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}], wait=False, record=False)
    assert outcome.models[0]["ready"] is True
    assert outcome.models[0]["completion"] is None
    assert not any("completions" in path for path in nim.requests)
    assert not world.files


def test_becomes_ready_with_phases_on_the_way(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    world.box("a")
    world.log("a", "Detected 2 compatible profile(s).", "Preparing model workspace. This step might download files")
    world.at(6, lambda: world.log("a", "Building TensorRT-LLM engine", "engine build 35% done"))
    world.at(84, lambda: world.log("a", "Loading safetensors checkpoint shards:  50% Completed | 2/4"))
    world.at(90, lambda: setattr(nim, "ready", 200))
    outcome, lines = check(world, [{"name": "a", "port": nim.port}], slices=True)
    assert outcome.models[0]["seconds_to_ready"] == 90.0
    assert lines[0] == "a downloading the model, 5 s of 1800 s"
    assert any("a building the engine 35 %, " in line for line in lines)
    assert any("a loading the model 50 %, " in line for line in lines)
    assert len(lines) <= 21


def test_all_models_are_waited_for_together(world: World, nim: Nim) -> None:
    other = Nim()
    other.ready = 503
    other.models = ["other"]
    for name in ("a", "b"):
        world.unit(name)
        world.box(name, box_id="id-" + name)
    world.at(7, lambda: setattr(other, "ready", 200))
    outcome, lines = check(world, [{"name": "a", "port": nim.port}, {"name": "b", "port": other.port}], slices=True)
    other.close()
    assert [model["model_id"] for model in outcome.models] == ["meta/llama", "other"]
    assert lines[0].startswith("a ready; b starting the container, 5 s of 1800 s")
    assert nim.requests.count("/v1/chat/completions") == 1


def test_restart_of_the_wrapper_alone_is_no_failure(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    world.box("a")
    world.at(3, lambda: world.unit("a", NRestarts=1, InvocationID="i2"))
    world.at(8, lambda: setattr(nim, "ready", 200))
    outcome, lines = check(world, [{"name": "a", "port": nim.port}], slices=True)
    assert outcome.models[0]["ready"] is True
    assert outcome.models[0]["restarts"] == 1
    assert "1 restart(s)" in lines[0]


def test_docker_may_be_away_for_a_while(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    world.box("a")
    world.at(3, lambda: setattr(world, "docker_down", True))
    world.at(23, lambda: setattr(world, "docker_down", False))
    world.at(30, lambda: setattr(nim, "ready", 200))
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.models[0]["ready"] is True


def test_docker_that_stays_away_ends_the_wait(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    world.docker_down = True
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.failures[0][1].reason == "docker_unavailable"
    assert 60 <= world.clock - world.start < 70


# -- completions ----------------------------------------------------------------------------------


def test_no_chat_template_falls_back_and_says_so(world: World, nim: Nim) -> None:
    nim.chat = (400, {"object": "error", "message": NO_TEMPLATE, "code": 400})
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    completion = outcome.models[0]["completion"]
    assert completion["kind"] == "completion"
    assert completion["text"] == "world"
    assert completion["note"] == "the model has no chat template; it answers on /v1/completions"


def test_embedding_needs_no_completion(world: World, nim: Nim) -> None:
    nim.chat = nim.plain = (404, {"detail": "Not Found"})
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.models[0]["completion"]["kind"] == "none"
    assert outcome.models[0]["completion"]["note"] == "the model offers neither chat nor completions"


def test_service_without_model_list_is_ready(world: World, nim: Nim) -> None:
    nim.models = None
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.models[0]["ready"] is True
    assert outcome.models[0]["model_id"] is None


def test_completion_that_breaks_is_a_failure(world: World, nim: Nim) -> None:
    nim.chat = (500, {"error": {"message": "EngineDeadError with nvapi-abcdefghijkl"}})
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    failure = outcome.failures[0][1]
    assert failure.reason == "completion_failed"
    assert "/v1/chat/completions (HTTP 500: EngineDeadError with ***)" in failure.sentence


def test_completion_none_sends_nothing(world: World, nim: Nim) -> None:
    world.unit("a")
    world.box("a")
    check(world, [{"name": "a", "port": nim.port, "completion": "none"}])
    assert not any("completions" in path for path in nim.requests)


# -- the wrong one answers ------------------------------------------------------------------------


def test_other_model_on_the_port(world: World, nim: Nim) -> None:
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port, "served_model_name": "my-model"}])
    failure = outcome.failures[0][1]
    assert failure.reason == "wrong_model"
    assert "with the model meta/llama, but my-model was asked for" in failure.sentence


def test_lora_names_beside_the_served_name(world: World, nim: Nim) -> None:
    nim.models = ["base", "lora-1"]
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port, "served_model_name": "base"}])
    assert outcome.models[0]["models"] == ["base", "lora-1"]


def test_stranger_on_the_port_is_named(world: World, nim: Nim) -> None:
    world.unit("a", ActiveState="activating", SubState="auto-restart")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    failure = outcome.failures[0][1]
    assert failure.reason == "wrong_server"
    assert "docker-proxy (pid 812)" in failure.sentence
    assert world.clock - world.start < 6


def test_stranger_before_the_container_is_there_is_forgiven(world: World, nim: Nim) -> None:
    world.unit("a", ActiveState="activating", SubState="start")
    world.at(2, lambda: world.box("a"))
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.models[0]["ready"] is True


# -- doomed starts --------------------------------------------------------------------------------


def test_container_that_ends_with_code_0_fails_at_once(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    world.box("a")
    world.files["/etc/nim/ngc.env"] = b"NGC_API_KEY=legacykey0123456789\n"
    world.log("a", "== NVIDIA Inference Microservice LLM NIM ==")

    def end() -> None:
        world.log(
            "a",
            json.dumps({"level": "None", "message": "", "exc_info": "ManifestDownloadError: x\nAuthentication Error"}),
            "tried key legacykey0123456789 and NGC_API_KEY=other-secret",
        )
        world.end("a", ExitCode=0)
        world.unit("a", ActiveState="activating", SubState="auto-restart")

    world.at(11, end)
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}], slices=True)
    failure = outcome.failures[0][1]
    assert failure.reason == "container_ended"
    assert failure.sentence == (
        "NIM a did not start: its container ended with exit code 0 after 11 s: the NGC key in the container is missing "
        "or refused; set a valid ngc_api_key; a login of Docker alone is not enough for the model files."
    )
    assert failure.signature == "nim-08"
    assert "Authentication Error" in failure.lines
    assert failure.lines[-1] == "tried key *** and NGC_API_KEY=***"
    assert world.clock - world.start <= 12
    assert "legacykey" not in json.dumps(outcome.resume)


def test_container_that_was_replaced_between_two_looks(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    world.box("a")
    world.log("a", "Initializing an LLM engine")

    def replace() -> None:
        world.box("a", box_id="c2")
        world.logs["nim-a"] = []
        world.unit("a", NRestarts=1)
        world.journal["CONTAINER_ID_FULL=c1"] = ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"]

    world.at(40, replace)
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}], slices=True)
    failure = outcome.failures[0][1]
    assert failure.reason == "container_ended"
    assert "ended after 40 s and was started again: the model does not fit into GPU memory" in failure.sentence
    assert outcome.models[0]["restarts"] == 1


def test_out_of_memory_killer(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    world.box("a")
    world.log("a", "Loading model weights")
    world.at(5, lambda: world.end("a", ExitCode=137, OOMKilled=True))
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert "exit code 137 after 5 s: the host ran out of memory" in outcome.failures[0][1].sentence


def test_what_an_earlier_start_left_behind_is_no_failure(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.box("a", box_id="old")
    world.end("a", ExitCode=1)
    world.log("a", "torch.OutOfMemoryError: CUDA out of memory.")
    world.clock += 100
    world.start = world.clock
    world.unit("a")

    def create() -> None:
        world.box("a", box_id="new")
        world.logs["nim-a"] = []
        world.log("a", "Initializing an LLM engine")

    world.at(2, create)
    world.at(9, lambda: setattr(nim, "ready", 200))
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}], slices=True)
    assert outcome.models[0]["ready"] is True


def test_failed_unit_without_container_shows_what_the_wrapper_said(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a", ActiveState="failed", SubState="failed", Result="exit-code", ExecMainStatus=78)
    world.journal["_SYSTEMD_UNIT=nim-a.service"] = [
        'docker: could not select device driver "" with capabilities: [[gpu]]'
    ]
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    failure = outcome.failures[0][1]
    assert failure.reason == "unit_failed"
    assert (
        "nim-a.service failed (exit-code, exit status 78, 0 restarts): Docker knows no GPU driver" in failure.sentence
    )
    assert failure.signature == "host-40"


def test_wrapper_that_loops_without_container(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a", ActiveState="activating", SubState="auto-restart", NRestarts=5)
    world.at(20, lambda: world.unit("a", NRestarts=6))
    world.at(40, lambda: world.unit("a", NRestarts=7))
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.failures[0][1].reason == "restart_loop"
    assert world.clock - world.start <= 41


def word(world: World, phase: str, failures: int = 0, detail: str = "", age: float = 0.0, unsteady: int = 0) -> None:
    content = {"phase": phase, "since": int(world.clock - age), "spec": "s", "failures": failures, "detail": detail}
    content["unsteady"] = unsteady
    world.files["/run/nim/a.json"] = json.dumps(content).encode()


def test_download_container_is_followed(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    word(world, "download")
    world.box("a-download", box_id="d1")
    world.log("a-download", "Detected 2 compatible profile(s).", "Downloading file: model-1.safetensors 3/8")

    def start() -> None:
        del world.boxes["nim-a-download"]
        word(world, "starting")
        world.box("a", box_id="c1")
        world.log("a", "Loading model weights")

    world.at(7, start)
    world.at(12, lambda: setattr(nim, "ready", 200))
    outcome, lines = check(world, [{"name": "a", "port": nim.port}], slices=True)
    assert lines[0] == "a downloading the model 37 %, 5 s of 1800 s"
    assert any("a loading the model" in line for line in lines)
    assert outcome.models[0]["seconds_to_ready"] == 5.0


def test_download_that_failed_is_told_by_the_wrapper(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    word(world, "download")
    world.box("a-download", box_id="d1")
    world.log("a-download", "Preparing model workspace.")

    def fail() -> None:
        del world.boxes["nim-a-download"]
        detail = "nim-a-download ended with code 1; see journalctl CONTAINER_NAME=nim-a-download"
        word(world, "failed", 1, detail)
        world.unit("a", NRestarts=1)
        world.journal["CONTAINER_NAME=nim-a-download"] = ["Preparing model workspace.", "OSError: (os error 28)"]

    world.at(6, fail)
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}], slices=True)
    failure = outcome.failures[0][1]
    assert failure.reason == "container_ended"
    assert "nim-a-download ended with code 1" in failure.sentence
    assert failure.lines[-1] == "OSError: (os error 28)"
    assert failure.signature == "nim-16c"
    assert world.clock - world.start <= 7


def test_start_that_failed_before_the_first_look(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    word(world, "back_off", 1, "ended with code 0", age=3)
    world.journal["CONTAINER_NAME=nim-a"] = ["ManifestDownloadError: x Authentication Error"]
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.failures[0][1].sentence.startswith(
        "NIM a did not start: its container ended with code 0: the NGC key"
    )
    assert world.clock == world.start


def test_older_failures_give_the_next_start_a_chance(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a", NRestarts=3)
    word(world, "back_off", 3)
    world.at(20, lambda: (word(world, "starting", 3), world.box("a")))
    world.at(40, lambda: (word(world, "ready", 0), setattr(nim, "ready", 200)))
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.models[0]["ready"] is True


def test_ready_has_to_last_where_it_did_not_before(world: World, nim: Nim) -> None:
    world.unit("a")
    world.box("a")
    word(world, "ready", unsteady=2)
    world.at(30, lambda: word(world, "ready"))
    outcome, lines = check(world, [{"name": "a", "port": nim.port}], slices=True)
    assert outcome.models[0]["ready"] is True
    assert world.clock - world.start >= 30
    assert "watching whether it stays" in lines[0]


def test_a_service_that_ends_whenever_it_was_ready_is_not_ready(world: World, nim: Nim) -> None:
    world.unit("a")
    world.box("a")
    word(world, "ready", unsteady=2)
    world.at(4, lambda: world.box("a", box_id="another"))
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.failures[0][1].reason == "container_ended"


def test_one_end_soon_after_ready_is_not_held_against_it(world: World, nim: Nim) -> None:
    world.unit("a")
    world.box("a")
    word(world, "ready", unsteady=1)
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.models[0]["ready"] is True
    assert world.clock == world.start


def test_container_of_an_earlier_configuration_does_not_count(world: World, nim: Nim) -> None:
    world.unit("a")
    world.files["/etc/nim/a.json"] = b'{"spec": "new"}'
    world.box("a", box_id="old")
    world.boxes["nim-a"]["Config"] = {"Labels": {"io.gpu-fleet.nim.spec": "old"}}

    def replace() -> None:
        world.box("a", box_id="new")
        world.boxes["nim-a"]["Config"] = {"Labels": {"io.gpu-fleet.nim.spec": "new"}}

    world.at(30, replace)
    outcome, lines = check(world, [{"name": "a", "port": nim.port}], slices=True)
    assert outcome.models[0]["ready"] is True
    assert world.clock - world.start >= 30
    assert len(lines) >= 5


@pytest.mark.parametrize(
    ("unit", "reason"),
    [
        ({"LoadState": "not-found", "ActiveState": "inactive"}, "unit_missing"),
        ({"ActiveState": "inactive", "SubState": "dead"}, "not_running"),
        ({"ActiveState": "inactive", "SubState": "dead", "ConditionResult": "no"}, "maintenance"),
    ],
)
def test_nothing_to_wait_for(world: World, unit: dict[str, str], reason: str) -> None:
    world.unit("a", **unit)
    outcome, dummy = check(world, [{"name": "a", "port": 9}])
    assert outcome.failures[0][1].reason == reason
    assert world.clock == world.start


def test_start_timeout_is_each_models_own(world: World, nim: Nim) -> None:
    other = Nim()
    nim.ready = other.ready = 503
    for name in ("a", "b"):
        world.unit(name)
        world.box(name, box_id=name)
    outcome, dummy = check(
        world,
        [{"name": "a", "port": nim.port}, {"name": "b", "port": other.port, "start_timeout": 12}],
        slices=True,
    )
    other.close()
    [(target, failure)] = outcome.failures
    assert (target.name, failure.reason) == ("b", "start_timeout")
    assert "is not ready after 12 s (starting the container); raise start_timeout" in failure.sentence
    assert outcome.models[0]["reason"] is None


def test_without_waiting_nothing_is_judged_twice(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    world.box("a")
    world.log("a", "Downloading model, 40%")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}], wait=False)
    assert outcome.finished
    assert outcome.models[0]["phase"] == "download"
    assert world.clock == world.start


def test_download_shows_what_the_disk_lost(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    world.box("a")
    world.log("a", "Preparing model workspace. This step might download additional files to run the model.")

    def arrive() -> None:
        world.free -= 4_200_000_000

    world.at(3, arrive)
    world.at(12, lambda: setattr(nim, "ready", 200))
    _outcome, lines = check(world, [{"name": "a", "port": nim.port}], slices=True)
    assert lines[0] == "a downloading the model, about 4.2 GB, 5 s of 1800 s"


# -- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        ("Detected 3 compatible profile(s).", "profile"),
        ("Valid profile: 0bc4… (tensorrt_llm-h100-fp8-tp1)", "profile"),
        ("Matched profile 1234 (vllm-bf16-tp1)", "profile"),
        ("Preparing model workspace. This step might download additional files to run the model.", "download"),
        ("Model workspace is now ready. It took 46.012 seconds", "engine"),
        ("Initializing an LLM engine (v0.6.3) with config: model='/x'", "engine"),
        ("Building TRT-LLM engine for the local weights", "build"),
        ("[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0", "build"),
        ("[TRT-LLM] [I] Building engine: layer 8/32", "build"),
        ("[TRT-LLM] [I] Total time of building all engines: 00:01:24", "build"),
        ("Loading model weights took 14.9888 GB", "loading"),
        ("Loading safetensors checkpoint shards:  25% Completed | 1/4 [00:01<00:04]", "loading"),
        ("Graph capturing finished in 30 secs, took 0.2 GiB", "graphs"),
        ("Capturing CUDA graph shapes: 100%", "graphs"),
        ("Serving endpoints:", "serving"),
        ("INFO:     Application startup complete.", "serving"),
        ("Uvicorn running on http://0.0.0.0:8000", "serving"),
        ("supports LoRA, but LoRA is disabled. Skipping profile.", None),
        ("Model: meta/llama-3.1-8b-instruct", None),
        ("Compilable to TRT-LLM using just-in-time compilation of HF models to TRTLLM engines:", None),
    ],
)
def test_phases(line: str, phase: str | None) -> None:
    assert _nim_health.phase_of(line) == phase
    assert _nim_health.phase_of(_nim_health.message_of(json.dumps({"level": "INFO", "message": line}))) == phase


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"level": "INFO", "message": "a", "exc_info": "None"}', "a"),
        ('{"level": "None", "message": "", "exc_info": "Traceback\\nBoom"}', "Traceback\nBoom"),
        ('{"broken', '{"broken'),
        ("{not json}", "{not json}"),
        ('{"other": 1}', '{"other": 1}'),
        ("  plain ", "plain"),
    ],
)
def test_json_lines(line: str, message: str) -> None:
    assert _nim_health.message_of(line) == message


@pytest.mark.parametrize(
    ("line", "percent"),
    [
        ("50% done", 50),
        ("10% … 12.5 %", 12),
        ("250%", None),
        ("v1.5", None),
        ("100%|###|", 100),
        ("Building engine: layer 8/32", 25),
        ("on 11/20/2026", None),
        ("a 3/4", None),
    ],
)
def test_percent(line: str, percent: int | None) -> None:
    assert _nim_health.percent_of(line) == percent


def test_scrub(world: World) -> None:
    key = "plainlegacykey12345"
    world.files["/etc/nim/ngc.env"] = ("NGC_API_KEY=%s\n" % key).encode()
    secrets = _nim_health.host_secrets(world)
    login = base64.b64encode(("$oauthtoken:" + key).encode()).decode()
    for text in (
        "x nvapi-AbCdEf_123-456 y",
        "Authorization: Bearer abcdefgh.ijkl",
        "HF_TOKEN=hf_abcdefghijkl",
        "{'NGC_API_KEY': 'secretvalue'}",
        '"ngc_api_key": "secretvalue"',
        key,
        login,
        "https://h/x?token=abcd1234&y=1",
    ):
        done = _nim_health.scrub(text, secrets)
        assert "***" in done, text
        for part in ("AbCdEf", "abcdefgh", "secretvalue", key, login, "abcd1234"):
            assert part not in done
    assert _nim_health.scrub("Loading model weights took 14 GB") == "Loading model weights took 14 GB"


def test_docker_times() -> None:
    assert _nim_health.parse_time("1970-01-01T00:01:00.5Z") == 60.5
    assert _nim_health.parse_time("0001-01-01T00:00:00Z") is None
    assert _nim_health.parse_time("") is None


# -- signatures -----------------------------------------------------------------------------------


def test_every_signature_matches_its_sample(fixtures: pathlib.Path) -> None:
    samples = json.loads((fixtures / "failure-samples.json").read_text())
    known = {signature.id: signature for signature in _failure_signatures.SIGNATURES}
    assert set(known) == set(samples)
    for name, sample in samples.items():
        found = _failure_signatures.find_cause("before\n%s\nafter" % sample)
        if known[name].harmless:
            assert found is None
            continue
        assert found is not None, name
        assert known[name].cause
        assert known[name].remedy
        # Rows of one kind quote each other's texts, so the family must fit, not the letter.
        assert found.signature.cause == known[name].cause or found.signature.id[:3] == name[:3]


def test_first_cause_counts_and_umbrellas_only_alone() -> None:
    find = _failure_signatures.find_cause
    umbrella = "RuntimeError: Engine core initialization failed. See root cause above."
    cause = "torch.OutOfMemoryError: CUDA out of memory."
    assert find(umbrella).signature.id == "eng-25"  # type: ignore[union-attr]  # None fails the test as well
    assert find("%s\n%s" % (umbrella, cause)).signature.id == "eng-21a"  # type: ignore[union-attr]  # as above
    assert find("a", exit_code=135).signature.cause.startswith("shared memory")  # type: ignore[union-attr]  # as above
    assert find("all is well", exit_code=1) is None
    shm = "OSError: [Errno 28] No space left on device: '/dev/shm/torch_1'"
    assert find(shm).signature.remedy == "raise shm_size"  # type: ignore[union-attr]  # as above
