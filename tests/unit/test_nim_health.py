# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Waiting for services: a real HTTP server as the NIM, a scripted unit, container and log around it."""

from __future__ import annotations

import json
import pathlib

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import parse_smi
from health_world import Nim, World, check, word

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


@pytest.mark.parametrize("path", ["/v1/metrics", "/metrics"])
def test_metrics_and_gpu_memory_of_a_ready_service(world: World, nim: Nim, fixtures: pathlib.Path, path: str) -> None:
    nim.metrics = path
    world.unit("a")
    world.box("a")
    xml = (fixtures / "nvidia-smi/h200-x2.xml").read_text()
    gpus = parse_smi(xml)[2]
    world.files["/sys/module/nvidia/version"] = b"580.159.04\n"
    world.commands["nvidia-smi -q -x"] = xml
    world.files["/etc/nim/a.json"] = json.dumps({"gpus": [gpus[1].uuid, "GPU-gone"]}).encode()
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    [model] = outcome.models
    assert model["metrics_url"] == "http://127.0.0.1:%d%s" % (nim.port, path)
    assert model["gpus"] == [
        {
            "index": 1,
            "uuid": gpus[1].uuid,
            "memory_used_mib": gpus[1].memory_used_mib,
            "memory_total_mib": gpus[1].memory_total_mib,
        },
        {"index": None, "uuid": "GPU-gone", "memory_used_mib": None, "memory_total_mib": None},
    ]


def test_no_metrics_and_nothing_known_of_gpus(world: World, nim: Nim) -> None:
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.models[0]["metrics_url"] is None
    assert outcome.models[0]["gpus"] == []


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
    world.files["/etc/nim/a.env"] = b"SHADE=7\nCOLOUR=r3d\nTINT=gr3y\n"
    world.files["/etc/docker/daemon.json"] = b'{"proxies": {"http-proxy": "http://ops:p@ss/w0rd@proxy:3128"}}'
    world.log("a", "== NVIDIA Inference Microservice LLM NIM ==")

    def end() -> None:
        world.log(
            "a",
            json.dumps({"level": "None", "message": "", "exc_info": "ManifestDownloadError: x\nAuthentication Error"}),
            "settings SHADE=7, COLOUR=r3d; paint it gr3y over p@ss/w0rd",
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
    # Secrets of any length, the user's own and those of proxies.
    assert failure.lines[-2] == "settings SHADE=***, COLOUR=***; paint it *** over ***"
    assert failure.lines[-1] == "tried key *** and NGC_API_KEY=***"
    assert world.clock - world.start <= 12
    assert "legacykey" not in json.dumps(outcome.resume)


@pytest.mark.parametrize("successor", [503, 200])
def test_container_that_was_replaced_between_two_looks(world: World, nim: Nim, successor: int) -> None:
    nim.ready = 503
    world.unit("a")
    world.box("a")
    world.log("a", "Initializing an LLM engine")

    def replace() -> None:
        world.box("a", box_id="c2")
        world.logs["nim-a"] = []
        world.unit("a", NRestarts=1)
        world.journal["CONTAINER_ID_FULL=c1"] = ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"]
        nim.ready = successor

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


@pytest.mark.parametrize("age, fails", [(25, True), (59, True), (61, False)])
def test_starts_that_failed_since_the_deployment_are_enough(world: World, nim: Nim, age: float, fails: bool) -> None:
    nim.ready = 503
    world.unit("a", NRestarts=3)
    detail = "docker start: unknown or invalid runtime name: nvidia"
    word(world, "back_off", 3, detail, age=2, failing_since=int(world.clock - age))
    world.at(20, lambda: (word(world, "starting", 3), world.box("a"), setattr(nim, "ready", 200)))
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.models[0]["ready"] is not fails
    if fails:
        assert world.clock == world.start
        assert "(3 starts in a row have failed): Docker does not know the runtime" in outcome.failures[0][1].sentence


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


def test_a_service_that_was_stopped_has_not_failed(world: World) -> None:
    world.unit("a", ActiveState="inactive", SubState="dead")
    world.box("a")
    world.end("a")
    outcome, dummy = check(world, [{"name": "a", "port": 9}])
    assert [failure.reason for target, failure in outcome.failures] == ["not_running"]


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


def test_one_that_was_ready_and_is_silent_is_waited_for(world: World, nim: Nim) -> None:
    nim.ready = 504
    world.unit("a")
    world.box("a")
    word(world, "ready")
    world.at(12, lambda: setattr(nim, "ready", 200))
    outcome, lines = check(world, [{"name": "a", "port": nim.port}], slices=True)
    assert "a silent: busy or hung, 5 s of 1800 s" in lines[0]
    assert outcome.models[0]["ready"]
    nim.ready = 504
    outcome, lines = check(world, [{"name": "a", "port": nim.port, "start_timeout": 30}])
    assert outcome.failures[0][1].sentence == (
        "NIM a is not ready after 30 s (silent: busy or hung); "
        "if it has hung, 'systemctl restart nim-a.service' starts it anew."
    )
