# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lines that decide a start: how soon, with which cause, and which ones do not."""

from __future__ import annotations

import json
import pathlib
import runpy
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._failure_signatures import SIGNATURES, Signature
from ansible_collections.gpu_fleet.nim.plugins.module_utils._health_target import parse_targets
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_health import HealthCheck
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_process_state import EARLY_SECONDS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import scrub
from health_world import Nim, World, check, stamp, word

#: Seconds within which a line that decides must end the wait.
AT_ONCE = 5.0


@pytest.fixture
def starting(world: World, nim: Nim) -> t.Callable[[], t.Any]:
    """A NIM that starts and never gets ready by itself; calling it waits to the end."""
    nim.ready = 503
    world.unit("a")
    world.box("a", box_id="c" * 64)
    world.log("a", "Detected 2 compatible profile(s).")
    return lambda **more: check(world, [{"name": "a", "port": nim.port}], slices=True, **more)


def test_the_line_that_decides_ends_the_wait_while_the_container_runs(world: World, starting: t.Any) -> None:
    record = {"level": "None", "message": "", "exc_info": "Traceback\nValueError: Unknown RoPE scaling type llama3"}
    world.at(23.3, lambda: world.log("a", json.dumps(record)))
    outcome, dummy = starting()
    failure = outcome.failures[0][1]
    assert world.clock - world.start - 23.3 <= AT_ONCE
    assert (failure.reason, failure.signature) == ("start_failed", "eng-30a")
    assert failure.sentence == (
        'NIM a will not start: its log says "ValueError: Unknown RoPE scaling type llama3": the image is too old for the '
        "configuration of the model; use a newer tag of the image."
    )
    assert json.dumps(outcome.resume)


@pytest.mark.parametrize("second", [0.1, 1.7, 2.9, 4.4, 4.9, 5.1])
def test_at_once_also_around_the_end_of_a_slice(world: World, starting: t.Any, second: float) -> None:
    world.at(second, lambda: world.log("a", "EngineDeadError"))
    starting()
    assert world.clock - world.start - second <= AT_ONCE


def test_an_umbrella_waits_for_the_line_behind_it(world: World, starting: t.Any) -> None:
    world.at(10, lambda: world.log("a", "RuntimeError: Engine core initialization failed. See root cause above."))
    world.at(11, lambda: world.log("a", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"))
    outcome, dummy = starting()
    failure = outcome.failures[0][1]
    assert failure.signature == "eng-21a"
    assert "the model does not fit into GPU memory" in failure.sentence
    assert world.clock - world.start - 10 <= AT_ONCE


def test_the_line_far_before_an_umbrella_is_found(world: World, starting: t.Any) -> None:
    lines = [
        "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine."
    ]
    lines += ["  File vllm/engine/core.py, line %d" % number for number in range(400)]
    lines += ["RuntimeError: Engine core initialization failed."]
    world.at(10, lambda: (world.log("a", *lines), world.end("a", ExitCode=1)))
    outcome, dummy = starting()
    assert outcome.failures[0][1].signature == "eng-22"
    assert len(outcome.failures[0][1].lines) == 30


def test_noise_and_what_a_start_survives_do_not_end_it(world: World, nim: Nim, starting: t.Any) -> None:
    world.at(3, lambda: world.log("a", "profile x supports LoRA, but LoRA is disabled. Skipping profile."))
    world.at(4, lambda: world.log("a", "error decoding response body; retrying"))
    low = "Detected additional 3 compatible profile(s) that are currently not runnable due to low free GPU memory."
    world.at(5, lambda: world.log("a", low))
    world.at(6, lambda: world.log("a", "ERROR otel: x509: certificate signed by unknown authority"))
    world.at(60, lambda: setattr(nim, "ready", 200))
    outcome, dummy = starting()
    assert outcome.models[0]["ready"] is True


def test_what_a_start_survives_explains_its_end(world: World, starting: t.Any) -> None:
    low = "Detected additional 3 compatible profile(s) that are currently not runnable due to low free GPU memory."
    none = "Could not find a profile that is currently runnable with the detected hardware."
    world.at(5, lambda: world.log("a", "Detected 0 compatible profile(s).", low, none))
    outcome, dummy = starting()
    assert outcome.failures[0][1].signature == "nim-02"
    assert world.clock - world.start - 5 <= AT_ONCE


def test_a_text_of_the_user_decides_and_one_is_silenced(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    world.box("a")
    world.at(4, lambda: world.log("a", "NCCL error: probe only"))
    world.at(40, lambda: world.log("a", "lease: quota exceeded for team-7"))
    own = [
        Signature("site-1", "quota exceeded", "container", "the team's quota is used up", "ask the storage team"),
        Signature("site-2", "probe only", "container", "a probe", "nothing to do", harmless=True),
    ]
    targets = parse_targets([{"name": "a", "port": nim.port}])
    outcome = HealthCheck(world, world, targets, own).run(None, interval=0, wait=True)
    failure = outcome.failures[0][1]
    assert failure.signature == "site-1"
    assert failure.sentence.endswith("the team's quota is used up; ask the storage team.")
    assert 40 < world.clock - world.start <= 40 + AT_ONCE


# -- the kernel -----------------------------------------------------------------------------------

KILL = (
    "oom-kill:constraint=CONSTRAINT_MEMCG,task_memcg=/nim.slice/docker-%s.scope,task=VLLM::EngineCor,pid=812,uid=1000"
)
XID = "NVRM: Xid (PCI:0000:41:00): %d, pid=812, name=python3, what it says"


def kernel(world: World, text: str) -> None:
    world.kernel.append((world.clock, text))


def gpus(world: World) -> None:
    world.files["/etc/nim/a.json"] = json.dumps({"spec": "", "gpus": ["GPU-1"]}).encode()
    for bdf, uuid in (("0000:41:00.0", "GPU-1"), ("0000:c1:00.0", "GPU-2")):
        world.files["/proc/driver/nvidia/gpus/%s/information" % bdf] = ("GPU UUID: \t %s\n" % uuid).encode()


def test_a_kill_by_the_kernel_inside_a_container_that_lives_on(world: World, starting: t.Any) -> None:
    world.at(8, lambda: kernel(world, KILL % ("d" * 64)))
    world.at(20, lambda: kernel(world, KILL % ("c" * 64)))
    outcome, dummy = starting()
    failure = outcome.failures[0][1]
    assert 20 < world.clock - world.start <= 20 + AT_ONCE
    assert failure.signature == "eng-28b"
    assert 'the kernel log says "oom-kill:' in failure.sentence
    assert "the host ran out of memory" in failure.sentence


def test_the_kernel_names_a_killed_container_a_moment_after_its_end(world: World, starting: t.Any) -> None:
    world.at(9, lambda: world.end("a", ExitCode=137))
    world.at(9.7, lambda: kernel(world, KILL % ("d" * 64)))
    world.at(10.3, lambda: kernel(world, KILL % ("c" * 64)))
    outcome, dummy = starting()
    failure = outcome.failures[0][1]
    assert (failure.reason, failure.signature) == ("container_ended", "eng-28b")
    assert "exit code 137 after 9 s: the host ran out of memory and the kernel killed" in failure.sentence
    assert world.clock - world.start - 9 <= AT_ONCE


def test_docker_names_a_kill_a_moment_after_the_end(world: World, starting: t.Any) -> None:
    # A word of its shell is no explanation yet.
    world.at(9, lambda: (world.log("a", "Killed"), world.end("a", ExitCode=137)))
    world.at(9.9, lambda: world.end("a", ExitCode=137, OOMKilled=True))
    outcome, dummy = starting()
    assert outcome.failures[0][1].signature == "eng-28b"


def test_a_kill_of_which_nobody_knows_is_said_so_soon(world: World, starting: t.Any) -> None:
    world.at(9.3, lambda: world.end("a", ExitCode=137))
    outcome, dummy = starting()
    assert outcome.failures[0][1].signature == "eng-28c"
    assert world.clock - world.start - 9.3 <= AT_ONCE - 2


def test_kills_of_several_at_once_are_waited_for_once(world: World, nim: Nim) -> None:
    nim.ready = 503
    names = ["a%d" % number for number in range(8)]
    for name in names:
        world.unit(name)
        world.box(name, box_id=name)
    world.at(9.3, lambda: [world.end(name, ExitCode=137) for name in names])
    outcome, dummy = check(world, [{"name": name, "port": nim.port} for name in names])
    assert [failure.signature for _target, failure in outcome.failures] == ["eng-28c"] * 8
    assert world.clock - world.start - 9.3 <= AT_ONCE - 2


def test_an_explained_end_waits_for_no_witness(world: World, starting: t.Any) -> None:
    world.at(9.3, lambda: (world.log("a", "Unknown RoPE scaling type x"), world.end("a", ExitCode=137)))
    outcome, dummy = starting()
    assert outcome.failures[0][1].signature == "eng-30a"
    assert world.clock - world.start - 9.3 <= 1


@pytest.mark.parametrize("name", ["nim-a-download ", ""])
def test_a_killed_container_that_is_gone(world: World, nim: Nim, name: str) -> None:
    nim.ready = 503
    world.unit("a")
    word(world, "back_off", 1, name + "ended with code 137", age=3, container="e" * 64)
    kernel(world, KILL % ("e" * 64))
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.failures[0][1].signature == "eng-28b"
    assert world.clock == world.start
    world.kernel.clear()
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.failures[0][1].signature == "eng-28c"


def test_a_gpu_that_falls_off_the_bus_ends_it(world: World, starting: t.Any) -> None:
    gpus(world)
    world.at(12, lambda: kernel(world, XID % 79))
    outcome, dummy = starting()
    assert 12 < world.clock - world.start <= 12 + AT_ONCE
    assert "Xid 79 on GPU 0000:41:00.0: the GPU has fallen off the bus" in outcome.failures[0][1].sentence


def test_an_xid_of_a_program_or_of_another_gpu_does_not(world: World, nim: Nim, starting: t.Any) -> None:
    gpus(world)
    world.at(5, lambda: kernel(world, XID % 13))
    world.at(6, lambda: kernel(world, (XID % 79).replace("41:00", "c1:00")))
    world.at(60, lambda: setattr(nim, "ready", 200))
    outcome, dummy = starting()
    assert outcome.models[0]["ready"] is True


def test_an_xid_explains_an_end_without_a_text(world: World, starting: t.Any) -> None:
    gpus(world)
    world.at(5, lambda: kernel(world, XID % 31))
    world.at(9, lambda: world.end("a", ExitCode=1))
    outcome, dummy = starting()
    assert "exit code 1 after 9 s: Xid 31 on GPU 0000:41:00.0: a program used" in outcome.failures[0][1].sentence


def test_a_service_that_is_ready_costs_no_look_at_the_kernel(world: World, nim: Nim) -> None:
    world.unit("a")
    world.box("a")
    check(world, [{"name": "a", "port": nim.port}])
    assert not [call for call in world.calls if "--dmesg" in call or call[0] == "dmesg"]


def test_what_was_said_before_docker_noted_the_start_counts(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    world.clock += 60
    # Of the run before this one, and of this one.
    world.logs["nim-a"] = [
        (world.clock - 2, "EngineDeadError"),
        (world.clock - 1, "Error 802: system not yet initialized"),
    ]
    world.box("a", FinishedAt=stamp(world.clock - 2, 500_000_000))
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.failures[0][1].signature == "host-50c"
    assert "EngineDeadError" not in outcome.failures[0][1].lines


# -- Docker and the port --------------------------------------------------------------------------


def test_dockers_own_error_is_explained(world: World, starting: t.Any) -> None:
    message = "nvidia-container-cli: initialization error: nvml error: driver/library version mismatch: unknown"
    world.at(3, lambda: world.end("a", ExitCode=128, Error=message))
    outcome, dummy = starting()
    assert outcome.failures[0][1].signature == "host-45a"
    assert "reload the driver" in outcome.failures[0][1].sentence


def _texts_of_docker() -> list[tuple[str, str]]:
    """Identifier and literal text of all that Docker, the toolkit or the registry say; the sandbox has longer ones."""
    folder = pathlib.Path(__file__).parent
    samples = json.loads((folder / "fixtures" / "failure-samples.json").read_text())
    standin = runpy.run_path(str(folder.parent / "sandbox/world/standin/failures.py"))["FAILURES"]
    said = {**samples, **{name: text for name, (_phase, _end, text) in standin.items() if text}}
    # Docker is written in Go, whose errors begin with a small letter; the sample's capital is the container's text too.
    said["nim-16b"] = "write /var/lib/docker/containers/config.v2.json: no space left on device"
    # NVML's own words, which the toolkit hands on.
    elsewhere = ("host-45b",)
    return [(one.id, said[one.id]) for one in SIGNATURES if one.where in ("docker", "registry") or one.id in elsewhere]


@pytest.mark.parametrize("way", ["container", "wrapper"])
@pytest.mark.parametrize(("identifier", "text"), _texts_of_docker(), ids=lambda value: str(value)[:9])
def test_every_text_of_docker_and_the_registry_is_known_in_dockers_own_error(
    world: World, nim: Nim, identifier: str, text: str, way: str
) -> None:
    """Where a start fails, Docker's error stands in the container's state, or in what the unit's wrapper was told."""
    nim.ready = 503
    world.unit("a")
    if way == "container":
        world.box("a", "exited", ExitCode=128, Error=text)
    else:
        word(world, "back_off", 1, "docker create: Error response from daemon: %s" % text, age=3)
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    failure = outcome.failures[0][1]
    [meant] = [one for one in SIGNATURES if one.id == identifier]
    assert failure.signature == identifier
    assert failure.match is not None
    assert failure.match.source == "docker"
    assert "%s; %s" % (meant.cause, meant.remedy) in failure.sentence
    # The container itself has said nothing.
    assert failure.lines == ()


def test_the_wrappers_words_are_kept_when_the_journal_is_read_too(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    word(world, "back_off", 1, "docker create: HTTP 401: Invalid API key.", age=3)
    world.journal["_SYSTEMD_UNIT=nim-a.service"] = ["starting"]
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.failures[0][1].signature == "reg-69"


def test_a_taken_port_is_explained_with_its_holder(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    said = "docker start: Error response from daemon: Bind for 0.0.0.0:8000 failed: port is already allocated"
    word(world, "back_off", 1, said, age=3)
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    failure = outcome.failures[0][1]
    assert failure.signature == "host-53a"
    assert failure.sentence.endswith("port %d is held by docker-proxy (pid 812)." % nim.port)
    world.published = [
        {"Names": ["/other"], "Ports": [{"PublicPort": nim.port + 1, "Type": "tcp"}, {"PrivatePort": nim.port}]},
        {"Names": ["/old-nim"], "Ports": [{"PublicPort": nim.port, "Type": "tcp"}]},
    ]
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.failures[0][1].sentence.endswith("docker-proxy (pid 812) of container old-nim.")


def test_another_server_beside_a_running_container_is_known_by_its_process(world: World, nim: Nim) -> None:
    world.unit("a")
    world.box("a", box_id="c" * 64)
    world.commands["ss *"] = 'LISTEN 0 9 0.0.0.0:8000 0.0.0.0:* users:(("vllm",pid=77,fd=7))\n'
    world.files["/proc/77/cgroup"] = b"0::/user.slice/user-1000.slice/session-4.scope\n"
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    failure = outcome.failures[0][1]
    assert failure.reason == "wrong_server"
    assert "vllm (pid 77) does, although container nim-a runs" in failure.sentence
    world.files["/proc/77/cgroup"] = b"0::/nim.slice/docker-%s.scope\n" % (b"c" * 64)
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.models[0]["ready"] is True


# -- whose lines ----------------------------------------------------------------------------------


def test_lines_of_an_earlier_container_are_not_shown(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    word(world, "back_off", 1, "ended with code 1", age=3)
    lines = [("old", "torch.OutOfMemoryError: CUDA out of memory."), ("new", "Unknown RoPE scaling type x")]
    said = "\n".join(json.dumps({"MESSAGE": text, "CONTAINER_ID_FULL": key}) for key, text in lines)
    world.commands = {"journalctl *CONTAINER_NAME=nim-a": said, **world.commands}
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    failure = outcome.failures[0][1]
    assert failure.lines == ("Unknown RoPE scaling type x",)
    assert failure.signature == "eng-30a"


@pytest.mark.parametrize("name", ["nim-a", "nim-a-download"])
def test_a_silent_container_is_not_given_the_lines_of_an_earlier_one(world: World, nim: Nim, name: str) -> None:
    nim.ready = 503
    world.unit("a")
    detail = "%sended with code 1" % ("nim-a-download " if "download" in name else "")
    word(world, "back_off", 1, detail, age=3, container="present")
    world.journal["CONTAINER_NAME=" + name] = ["ManifestDownloadError: x Authentication Error"]
    world.journal["CONTAINER_ID_FULL=earlier"] = world.journal["CONTAINER_NAME=" + name]
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.failures[0][1].signature is None
    world.journal["CONTAINER_ID_FULL=present"] = ["Unknown RoPE scaling type x"]
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.failures[0][1].signature == "eng-30a"


@pytest.mark.parametrize("written", [[], ["Initializing an LLM engine"]])
def test_lines_that_the_journal_has_not_written_yet_are_asked_for(world: World, nim: Nim, written: list[str]) -> None:
    nim.ready = 503
    world.unit("a")
    world.journal["CONTAINER_ID_FULL=present"] = written
    word(world, "back_off", 1, "ended with code 1", age=3, container="present")

    def sync(_host: t.Any, _argv: t.Any, _in: t.Any, _env: t.Any) -> str:
        world.journal["CONTAINER_ID_FULL=present"] = [*written, "Unknown RoPE scaling type x"]
        return ""

    world.commands = {"journalctl --sync": sync, **world.commands}
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.failures[0][1].signature == "eng-30a"


def test_the_log_begins_where_the_container_was_started(world: World, starting: t.Any) -> None:
    world.at(3, lambda: world.end("a", ExitCode=1))
    starting()
    reads = [call for call in world.calls if call[:2] == ("docker", "logs")]
    assert reads[0][-3:] == ("--since", "%.6f" % (world.start - EARLY_SECONDS), "c" * 64)


# -- strictly, without waiting ----------------------------------------------------------------------


def test_one_strict_look_judges_what_was_before_it(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a", ActiveState="activating", SubState="auto-restart", NRestarts=7)
    word(world, "back_off", 5, "ended with code 1", age=300)
    world.journal["CONTAINER_NAME=nim-a"] = ["EngineDeadError"]
    targets = parse_targets([{"name": "a", "port": nim.port}])
    outcome = HealthCheck(world, world, targets).run(None, interval=0, wait=False, record=False, strict=True)
    failure = outcome.failures[0][1]
    assert failure.reason == "container_ended"
    assert "its container ended with code 1 (5 starts in a row have failed): the engine died" in failure.sentence
    lenient = HealthCheck(world, world, targets).run(None, interval=0, wait=False, record=False)
    assert not lenient.failures


def test_one_look_at_a_lost_start_says_so(world: World, nim: Nim) -> None:
    nim.ready = 503
    world.unit("a")
    world.box("a")
    world.log("a", "Unknown RoPE scaling type")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}], wait=False)
    assert outcome.failures[0][1].reason == "start_failed"
    assert world.clock == world.start


@pytest.mark.parametrize("word_of", ["docker", "wrapper"])
def test_what_docker_says_of_a_start_is_masked(world: World, nim: Nim, word_of: str) -> None:
    """Docker quotes lines of an environment file that it cannot read, and arguments that it cannot run."""
    nim.ready = 503
    world.files["/etc/nim/ngc.env"] = b"NGC_API_KEY=legacykey0123456789\n"
    said = "invalid env file (/etc/nim/a.env): variable 'legacykey0123456789 x' contains whitespaces --api-key=colour7"
    world.unit("a")
    if word_of == "docker":
        world.box("a", "exited", ExitCode=127, Error=said)
    else:
        word(world, "back_off", 1, said, age=3)
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    failure = outcome.failures[0][1]
    told = json.dumps([outcome.models, outcome.resume, failure.sentence, failure.what])
    assert "variable '*** x' contains whitespaces --api-key=***" in told
    assert "legacykey" not in told and "colour7" not in told


def test_no_cause_or_remedy_looks_like_a_secret() -> None:
    for signature in SIGNATURES:
        sentence = "NIM a did not start: %s; %s." % (signature.cause, signature.remedy)
        assert scrub(sentence) == sentence
