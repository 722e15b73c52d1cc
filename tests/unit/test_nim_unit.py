# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The wrapper as systemd runs it: a program of its own, against a docker command that keeps its state in files."""

from __future__ import annotations

import http.server
import json
import os
import pathlib
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nim_unit_docker, _nim_unit_key
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_unit_program import PARTS, program

LABEL = _nim_unit_docker.SPEC_LABEL
KEY = "nvapi-unit-test-key"

DOCKER = """\
#!%s
import json, os, signal, sys, time
root = os.path.dirname(os.path.abspath(__file__))
words = sys.argv[1:]
with open(root + "/calls", "a") as stream:
    stream.write(" ".join(words) + "\\n")

def path(name): return "%%s/container-%%s" %% (root, name)
def load(name):
    if not os.path.exists(path(name)):
        sys.stderr.write("Error: No such container: %%s\\n" %% name)
        sys.exit(1)
    for _try in range(50):
        try:
            return json.load(open(path(name)))
        except ValueError:
            time.sleep(0.01)
def save(name, content):
    with open(path(name) + ".new", "w") as stream:
        json.dump(content, stream)
    os.replace(path(name) + ".new", path(name))
def away():
    if os.path.exists(root + "/away"):
        sys.stderr.write("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?\\n")
        sys.exit(1)
def error_of(what):
    if os.path.exists("%%s/%%s-error" %% (root, what)):
        sys.stderr.write(open("%%s/%%s-error" %% (root, what)).read())
        sys.exit(1)

away()
if words[0] == "version":
    print("26.1.5")
elif words[0] == "inspect":
    print(json.dumps([load(words[-1])]))
elif words[0] == "create":
    error_of("create")
    name = words[words.index("--name") + 1]
    if os.path.exists(path(name)):
        sys.stderr.write("Conflict. The container name /%%s is already in use\\n" %% name)
        sys.exit(1)
    label = words[words.index("--label") + 1].split("=", 1)
    env = "".join(open(words[at + 1]).read() for at, word in enumerate(words) if word == "--env-file")
    pipe = next((word.split("source=")[1].split(",")[0] for word in words if "target=/run/secrets/" in word), "")
    print("id-of-" + name)
    save(name, {"Id": "id-of-" + name, "Config": {"Labels": {label[0]: label[1]}, "Env": env, "Pipe": pipe},
                "State": {"Running": False, "ExitCode": 0}})
elif words[0] == "start":
    error_of("start")
    content = load(words[-1])
    pipe = content["Config"].get("Pipe")
    if pipe:
        error_of("shell")
    content["State"]["Running"] = True
    key = ""
    if pipe and not os.path.exists(root + "/ends-at-once"):
        save(words[-1], content)
        if os.fork():
            sys.exit(0)
        os.closerange(0, 3)
        os.setsid()
        signal.alarm(30)  # a test that ends before the key is handed over leaves nobody behind
        while os.path.exists(root + "/reads-late"):
            time.sleep(0.05)
        with open(pipe) as stream:
            key = stream.read()
        content = load(words[-1])
        try:
            mode = "%%o" %% (os.stat(pipe).st_mode & 0o7777)
        except FileNotFoundError:
            mode = "gone"
        with open(root + "/key-" + words[-1], "w") as stream:
            stream.write(mode + " " + key)
    if words[-1].endswith("-download"):
        with open(root + "/download-environment", "w") as stream:
            stream.write(content["Config"]["Env"])
        content["State"] = {"Running": False, "ExitCode": int(open(root + "/download-code").read())}
        if os.path.exists(root + "/download-writes"):
            os.makedirs(root + "/cache/ngc", exist_ok=True)
            open(root + "/cache/ngc/weights", "w").close()
    save(words[-1], content)
elif words[0] == "wait":
    caller = os.getppid()
    while load(words[-1])["State"]["Running"] and os.getppid() == caller:
        away()
        time.sleep(0.05)
    print(load(words[-1])["State"]["ExitCode"])
elif words[0] == "stop":
    content = load(words[-1])
    if content["State"]["Running"]:
        content["State"] = {"Running": False, "ExitCode": 0}
        save(words[-1], content)
elif words[0] == "rm":
    load(words[-1])
    os.unlink(path(words[-1]))
"""


class Machine:
    """A host with a docker command and the wrapper."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        for name in ("etc", "run", "lib/state", "bin", "bin/cache"):
            (root / name).mkdir(parents=True)
        self.bin = root / "bin"
        (self.bin / "docker").write_text(DOCKER % sys.executable)
        (self.bin / "docker").chmod(0o755)
        (self.bin / "systemctl").write_text(
            '#!/bin/sh\necho "$@" >> %s/systemctl-calls\n[ "$1" != show ] || cat %s/docker-unit 2>/dev/null\n'
            % (self.bin, self.bin)
        )
        (self.bin / "systemctl").chmod(0o755)
        (self.bin / "download-code").write_text("0")
        (self.bin / "calls").write_text("")
        self.wrapper = root / "nim-unit"
        self.wrapper.write_text("#!%s\n%s" % (sys.executable, program()))
        self.wrapper.chmod(0o755)
        self.running: list[subprocess.Popen[str]] = []

    def configure(self, **changes: t.Any) -> None:
        content = {
            "name": "llama",
            "spec": "one",
            "create": ["--env=A=b", "image@sha256:0"],
            "download": None,
            "key_in_service": None,
            "cache_directory": str(self.bin / "cache"),
            "ready_url": "http://127.0.0.1:9/v1/health/ready",
            "stop_timeout": 5,
            "docker_timeout": 3,
        }
        content.update(changes)
        (self.root / "etc/llama.json").write_text(json.dumps(content))

    def start(self, verb: str = "run", **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(self.wrapper), verb, "llama"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            env={
                "PATH": "%s:/usr/bin:/bin" % self.bin,
                "CONFIGURATION_DIRECTORY": str(self.root / "etc"),
                "STATE_DIRECTORY": str(self.root / "lib"),
                "RUNTIME_DIRECTORY": str(self.root / "run"),
                "INVOCATION_ID": "first",
                **environment,
            },
        )
        self.running.append(process)
        return process

    def finish(self, process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
        output, _nothing = process.communicate(timeout=seconds)
        return process.returncode, output

    def put(self, name: str = "nim-llama", spec: str = "one", running: bool = True, code: int = 0) -> None:
        content = {"Config": {"Labels": {LABEL: spec}}, "State": {"Running": running, "ExitCode": code}}
        temporary = self.bin / "temporary"
        temporary.write_text(json.dumps(content))
        temporary.replace(self.bin / ("container-" + name))

    def container(self, name: str = "nim-llama") -> dict[str, t.Any] | None:
        path = self.bin / ("container-" + name)
        return json.loads(path.read_text()) if path.exists() else None

    def calls(self, verb: str) -> list[str]:
        return [line for line in (self.bin / "calls").read_text().splitlines() if line.split()[0] == verb]

    def runtime(self) -> dict[str, t.Any]:
        path = self.root / "run/llama.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def until(self, condition: t.Callable[[], t.Any], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.bin / "calls").read_text()
            time.sleep(0.05)

    def phase(self, name: str) -> None:
        self.until(lambda: self.runtime().get("phase") == name)


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> t.Iterator[Machine]:
    made = Machine(tmp_path)
    made.configure()
    yield made
    for process in made.running:
        process.kill()
        process.communicate()


@pytest.fixture
def service() -> t.Iterator[str]:
    """A service that is ready; its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/v1/health/ready" else 404)
            self.end_headers()

        def log_message(self, *arguments: t.Any) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield "http://127.0.0.1:%d/v1/health/ready" % server.server_port
    server.shutdown()


def test_a_fresh_start_creates_without_pull_and_without_restart_policy(machine: Machine) -> None:
    process = machine.start()
    machine.until(lambda: machine.calls("wait"))
    assert machine.runtime()["phase"] == "starting"
    assert machine.calls("create") == [
        "create --name nim-llama --pull=never --restart=no --label %s=one --env=A=b image@sha256:0" % LABEL
    ]
    machine.put(running=False, code=3)
    code, output = machine.finish(process)
    assert code == 3
    assert "nim-llama ended with code 3 before it was ready" in output
    word = machine.runtime()
    assert (word["failures"], word["container"]) == (1, "id-of-nim-llama")
    assert word["since"] == word["failing_since"]
    (machine.root / "run/llama.json").write_text(json.dumps({**word, "failing_since": 4711}))
    machine.start()
    machine.phase("back_off")
    # Who ended, why, and since when, stays to be read.
    assert {**machine.runtime(), "phase": "failed", "since": word["since"]} == {**word, "failing_since": 4711}
    # The container stays for whoever looks for the reason.
    assert machine.container() is not None


@pytest.mark.parametrize("code", [0, 77, 78])
def test_an_end_before_ready_is_a_failure_that_is_tried_again(machine: Machine, code: int) -> None:
    process = machine.start()
    machine.until(lambda: machine.calls("wait"))
    machine.put(running=False, code=code)
    assert machine.finish(process)[0] == 1


def test_ready_resets_the_start_limit_and_the_end_passes_through(machine: Machine, service: str) -> None:
    machine.configure(ready_url=service)
    (machine.root / "run/llama.json").write_text(json.dumps({"spec": "other", "failures": 3}))
    process = machine.start()
    machine.phase("ready")
    machine.until((machine.bin / "systemctl-calls").exists)
    assert (machine.bin / "systemctl-calls").read_text() == "reset-failed nim-llama.service\n"
    assert machine.runtime()["failures"] == 0
    machine.put(running=False, code=0)
    assert machine.finish(process)[0] == 0


def test_an_end_soon_after_ready_is_counted_apart(machine: Machine, service: str) -> None:
    machine.configure(ready_url=service)
    (machine.root / "run/llama.json").write_text(json.dumps({"spec": "one", "unsteady": 1}))
    machine.put()
    process = machine.start()
    machine.phase("ready")
    machine.put(running=False, code=3)
    assert machine.finish(process)[0] == 3
    assert (machine.runtime()["failures"], machine.runtime()["unsteady"]) == (0, 2)
    assert machine.runtime()["detail"] == "ended with code 3 soon after it was ready"


def test_a_service_that_served_for_a_while_starts_counting_anew(machine: Machine, service: str) -> None:
    constant = "STEADY_SECONDS = 30.0"
    text = machine.wrapper.read_text()
    assert constant in text
    machine.wrapper.write_text(text.replace(constant, "STEADY_SECONDS = 0.5"))
    machine.configure(ready_url=service)
    (machine.root / "run/llama.json").write_text(json.dumps({"spec": "one", "unsteady": 2}))
    machine.put()
    process = machine.start()
    machine.until(lambda: machine.runtime().get("phase") == "ready" and machine.runtime()["unsteady"] == 0)
    machine.put(running=False, code=3)
    assert machine.finish(process)[0] == 3
    assert machine.runtime()["unsteady"] == 0


def test_a_running_container_with_the_label_is_adopted(machine: Machine) -> None:
    machine.put(spec="one")
    process = machine.start()
    machine.until(lambda: machine.calls("wait"))
    assert machine.calls("create") == machine.calls("start") == machine.calls("rm") == machine.calls("stop") == []
    machine.put(running=False, code=137)
    assert machine.finish(process)[0] == 137


def test_another_label_is_stopped_removed_and_replaced(machine: Machine) -> None:
    machine.put(spec="old")
    machine.start()
    machine.until(lambda: machine.calls("wait"))
    assert machine.calls("stop") == ["stop -t 5 nim-llama"]
    assert machine.calls("rm") == ["rm -f nim-llama"]
    assert machine.container()["Config"]["Labels"] == {LABEL: "one"}


def test_a_leftover_that_ended_is_replaced_without_a_stop(machine: Machine) -> None:
    machine.put(running=False, code=1)
    machine.start()
    machine.until(lambda: machine.calls("wait"))
    assert machine.calls("stop") == []
    assert machine.calls("rm") == ["rm -f nim-llama"]


def test_sigkill_of_the_wrapper_leaves_the_container_and_the_next_one_adopts_it(machine: Machine) -> None:
    process = machine.start()
    machine.until(lambda: machine.calls("wait"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    # systemd calls ExecStop= without MAINPID then.
    assert machine.finish(machine.start("stop"))[0] == 0
    assert machine.calls("stop") == []
    machine.start()
    machine.until(lambda: len(machine.calls("wait")) == 2)
    assert len(machine.calls("create")) == 1
    assert machine.container()["State"]["Running"]


def test_stop_with_a_main_process_stops_the_container_and_run_ends_with_0(machine: Machine) -> None:
    process = machine.start()
    machine.until(lambda: machine.calls("wait"))
    assert machine.finish(machine.start("stop", MAINPID=str(process.pid)))[0] == 0
    assert machine.finish(process)[0] == 0
    assert machine.calls("stop") == ["stop -t 5 nim-llama"]
    # Both programs say so; one of them has made the container.
    assert machine.runtime() | {"since": 0, "container": ""} == {
        "phase": "stopped",
        "since": 0,
        "spec": "one",
        "failures": 0,
        "failing_since": 0,
        "unsteady": 0,
        "detail": "",
        "container": "",
    }


def test_stop_without_a_container_is_fine_and_without_docker_is_not(machine: Machine) -> None:
    assert machine.finish(machine.start("stop", MAINPID="1"))[0] == 0
    (machine.bin / "away").touch()
    code, output = machine.finish(machine.start("stop", MAINPID="1"))
    assert code == 1
    assert "may still run" in output


def test_stop_does_not_ask_a_docker_that_systemd_has_stopped(machine: Machine) -> None:
    # Its socket may listen already, and then every command hangs until this stop is over.
    (machine.bin / "docker-unit").write_text("LoadState=loaded\nActiveState=inactive\n")
    code, output = machine.finish(machine.start("stop", MAINPID="1"))
    assert code == 1
    assert "Docker is stopped: nim-llama may still run" in output
    assert machine.calls("stop") == machine.calls("rm") == []


def test_a_restart_of_docker_with_live_restore_changes_nothing(machine: Machine, service: str) -> None:
    machine.configure(ready_url=service)
    process = machine.start()
    machine.phase("ready")
    (machine.bin / "away").touch()
    machine.phase("waiting_for_docker")
    (machine.bin / "away").unlink()
    machine.until(lambda: len(machine.calls("wait")) > 1)
    machine.phase("ready")
    assert process.poll() is None
    assert len(machine.calls("create")) == 1


def test_a_restart_of_docker_that_ended_the_container_ends_the_wrapper(machine: Machine) -> None:
    process = machine.start()
    machine.until(lambda: machine.calls("wait"))
    (machine.bin / "away").touch()
    machine.phase("waiting_for_docker")
    machine.put(running=False, code=143)
    (machine.bin / "away").unlink()
    assert machine.finish(process)[0] == 143


def test_docker_away_for_good_is_75(machine: Machine) -> None:
    (machine.bin / "away").touch()
    code, output = machine.finish(machine.start())
    assert code == 75
    assert "Docker stayed away for 3 seconds" in output


def test_docker_away_at_create_is_not_a_bad_configuration(machine: Machine) -> None:
    (machine.bin / "create-error").write_text("error during connect: EOF\n")
    machine.start()
    machine.until(lambda: len(machine.calls("create")) >= 2)
    (machine.bin / "create-error").unlink()
    machine.until(lambda: machine.calls("wait"))


@pytest.mark.parametrize("text", ["Error: No such image: image@sha256:0", "unknown flag: --frobnicate"])
def test_what_docker_refuses_twice_is_78(machine: Machine, text: str) -> None:
    (machine.bin / "create-error").write_text(text + "\n")
    code, output = machine.finish(machine.start())
    assert code == 78
    assert "Cannot start nim-llama: docker create: " + text in output


@pytest.mark.parametrize("content", [None, "{", "{}", '{"spec": "x", "create": 3}'])
def test_a_missing_or_broken_configuration_is_78(machine: Machine, content: str | None) -> None:
    path = machine.root / "etc/llama.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    code, output = machine.finish(machine.start())
    assert code == 78
    assert str(path) in output


def test_a_port_in_use_is_tried_again_after_a_pause(machine: Machine) -> None:
    error = "driver failed: Bind for 0.0.0.0:8000 failed: port is already allocated"
    (machine.bin / "start-error").write_text(error + "\n")
    code, output = machine.finish(machine.start())
    assert code == 1
    assert error in output
    assert machine.runtime()["phase"] == "failed"
    (machine.bin / "start-error").unlink()
    begin = time.monotonic()
    machine.start()
    machine.until(lambda: machine.calls("wait"))
    assert time.monotonic() - begin > 4.5


def test_maintenance_starts_nothing(machine: Machine) -> None:
    (machine.root / "lib/maintenance").touch()
    assert machine.finish(machine.start())[0] == 77
    assert machine.calls("create") == []


def test_a_removed_container_ends_the_wrapper(machine: Machine) -> None:
    process = machine.start()
    machine.until(lambda: machine.calls("wait"))
    (machine.bin / "container-nim-llama").unlink()
    code, output = machine.finish(process)
    assert code == 1
    assert "was removed" in output


def test_usage(machine: Machine) -> None:
    done = subprocess.run([str(machine.wrapper), "run"], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (78, "usage: nim-unit run|stop NAME\n")


# -- the download ---------------------------------------------------------------------------------

LAUNCH = {"options": ["--env=C=d"], "image": "image@sha256:0", "command": ["/entry", "serve"], "uid": os.getuid()}
PLAN = {**LAUNCH, "command": ["/entry", "download-to-cache"], "key": "k1"}


def with_key(machine: Machine, **changes: t.Any) -> None:
    (machine.root / "etc/ngc.env").write_text("NGC_API_KEY=%s\n" % KEY)
    machine.configure(**{"download": PLAN, **changes})


def marker(machine: Machine) -> dict[str, t.Any]:
    path = machine.root / "lib/state/llama.download.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_the_key_goes_to_the_download_and_not_to_the_service(machine: Machine) -> None:
    with_key(machine)
    (machine.bin / "download-writes").touch()
    machine.start()
    machine.until(lambda: machine.container() and machine.calls("wait")[1:])
    # The container got one line through the pipe; nothing that Docker keeps has it.
    assert (machine.bin / "key-nim-llama-download").read_text().split(" ", 1)[1] == KEY + "\n"
    assert KEY not in (machine.bin / "download-environment").read_text()
    assert machine.container("nim-llama-download") is None
    assert KEY not in json.dumps(machine.container())
    assert marker(machine) == {"status": "complete", "key": "k1"}
    assert KEY not in (machine.bin / "calls").read_text()
    created = machine.calls("create")[0]
    assert "--env-file" not in created
    pipe = machine.root / "run/keys/llama"
    assert "--env=C=d --mount=type=bind,source=%s,target=/run/secrets/ngc_api_key,readonly" % pipe in created
    assert "--entrypoint=/bin/sh image@sha256:0 -c IFS= read -r NGC_API_KEY </run/secrets/ngc_api_key" in created
    assert created.endswith('exec "$@" nim /entry download-to-cache')
    assert list((machine.root / "run/keys").iterdir()) == []


def test_what_the_shell_in_a_container_does_with_the_key(machine: Machine) -> None:
    pipe = machine.root / "pipe"
    pipe.write_text(KEY + "\n")
    script = _nim_unit_key.KEY_SCRIPT.replace(_nim_unit_key.KEY_TARGET, str(pipe))
    words = ["-c", script, "nim", "/bin/sh", "-c", 'printf "%s|" "$NGC_API_KEY" "$@"', "x", "two words", "$HOME"]
    done = subprocess.run(["/bin/sh", *words], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == KEY + "|two words|$HOME|"
    pipe.unlink()
    assert subprocess.run(["/bin/sh", *words], capture_output=True, check=False).returncode != 0


def test_only_root_and_the_containers_user_can_reach_the_pipe(machine: Machine) -> None:
    with_key(machine)
    (machine.bin / "reads-late").touch()
    machine.start()
    pipe = machine.root / "run/keys/llama"
    machine.until(lambda: machine.calls("start"))
    assert stat.S_ISFIFO(pipe.stat().st_mode) and stat.S_IMODE(pipe.stat().st_mode) == 0o400
    assert pipe.stat().st_uid == LAUNCH["uid"]
    assert stat.S_IMODE(pipe.parent.stat().st_mode) == 0o700
    (machine.bin / "reads-late").unlink()
    machine.until(lambda: not pipe.exists())


def test_a_container_that_was_left_without_its_key_is_replaced(machine: Machine) -> None:
    """The wrapper was killed between the start of the container and the handing over."""
    with_key(machine)
    machine.put("nim-llama-download", running=True)
    (machine.root / "run/keys").mkdir()
    os.mkfifo(machine.root / "run/keys/llama")
    (machine.bin / "download-writes").touch()
    machine.start()
    machine.until(lambda: machine.container() and machine.calls("wait")[1:])
    assert "nim-llama-download" in " ".join(machine.calls("rm"))
    assert KEY in (machine.bin / "key-nim-llama-download").read_text()


def test_a_container_takes_its_key_while_docker_is_away(machine: Machine) -> None:
    """Docker is restarted in that moment; with live-restore the container does not notice."""
    with_key(machine, download=None, key_in_service=LAUNCH)
    (machine.bin / "reads-late").touch()
    machine.start()
    machine.until(lambda: machine.calls("start"))
    (machine.bin / "away").touch()
    asked = len(machine.calls("inspect"))
    machine.until(lambda: len(machine.calls("inspect")) > asked + 1)
    (machine.bin / "reads-late").unlink()
    machine.until((machine.bin / "key-nim-llama").exists)
    (machine.bin / "away").unlink()
    machine.until(lambda: machine.calls("wait"))
    assert KEY in (machine.bin / "key-nim-llama").read_text()
    assert machine.calls("rm") == []
    machine.until(lambda: list((machine.root / "run/keys").iterdir()) == [])


def test_a_container_whose_start_was_cut_off_is_not_left_waiting_for_its_key(machine: Machine) -> None:
    """Docker went away in the middle of the start, and the container came to run all the same."""
    with_key(machine, download=None, key_in_service=LAUNCH)
    (machine.bin / "start-error").write_text("error during connect: Post ...: EOF\n")
    machine.start()
    machine.until(lambda: machine.calls("start"))
    (machine.bin / "away").touch()
    asked = len(machine.calls("version"))
    machine.until(lambda: len(machine.calls("version")) > asked + 1)
    machine.put(running=True)
    (machine.bin / "start-error").unlink()
    (machine.bin / "away").unlink()
    machine.until(lambda: machine.calls("wait"))
    assert KEY in (machine.bin / "key-nim-llama").read_text()
    assert machine.calls("rm")


def test_a_container_whose_pipe_vanished_is_not_left_waiting(machine: Machine) -> None:
    with_key(machine, download=None, key_in_service=LAUNCH)
    (machine.bin / "reads-late").touch()
    process = machine.start()
    machine.until(lambda: machine.calls("start"))
    (machine.root / "run/keys/llama").unlink()
    rc, output = machine.finish(process)
    assert rc == 1
    assert "run/keys/llama cannot be opened: No such file or directory" in output
    assert machine.container() is None


def test_a_pipe_of_an_earlier_start_is_forgotten(machine: Machine) -> None:
    """The wrapper was killed beside its pipe, then the key was taken off the host."""
    (machine.root / "run/keys").mkdir()
    os.mkfifo(machine.root / "run/keys/llama")
    machine.configure(key_in_service=LAUNCH)
    machine.start()
    machine.until(lambda: machine.calls("wait"))
    assert not list((machine.root / "run/keys").iterdir())


def test_a_container_that_ends_before_it_takes_the_key(machine: Machine) -> None:
    with_key(machine)
    (machine.bin / "ends-at-once").touch()
    (machine.bin / "download-code").write_text("1")
    rc, output = machine.finish(machine.start())
    assert rc == 1
    assert "ended with code 1" in output
    assert list((machine.root / "run/keys").iterdir()) == []


def test_an_image_without_a_shell_goes_without_the_key(machine: Machine) -> None:
    with_key(machine)
    (machine.bin / "shell-error").write_text(
        "Error response from daemon: failed to create task for container: OCI runtime create failed: runc create failed:"
        ' unable to start container process: exec: "/bin/sh": stat /bin/sh: no such file or directory: unknown\n'
    )
    process = machine.start()
    machine.until(lambda: (machine.container() or {"State": {"Running": False}})["State"]["Running"])
    assert machine.container("nim-llama-download") is None
    assert KEY not in json.dumps(machine.container())
    process.kill()
    assert "has no /bin/sh" in machine.finish(process)[1]


def test_a_filled_cache_is_not_fetched_again_until_something_else_is_wanted(machine: Machine) -> None:
    with_key(machine)
    (machine.bin / "cache/weights").touch()
    (machine.root / "lib/state/llama.download.json").write_text(json.dumps({"status": "proven", "key": "k1"}))
    process = machine.start()
    machine.until(lambda: machine.calls("wait"))
    assert "nim-llama-download" not in " ".join(machine.calls("create"))
    process.kill()
    machine.put(running=False)
    with_key(machine, download=dict(PLAN, key="k2"))
    machine.start()
    machine.until(lambda: "nim-llama-download" in " ".join(machine.calls("create")))


def test_an_emptied_cache_is_filled_again(machine: Machine) -> None:
    with_key(machine)
    (machine.root / "lib/state/llama.download.json").write_text(json.dumps({"status": "proven", "key": "k1"}))
    machine.start()
    machine.until(lambda: "nim-llama-download" in " ".join(machine.calls("create")))


@pytest.mark.parametrize(("code", "words"), [(1, "ended with code 1"), (0, "left no file in the cache")])
def test_a_failed_download_fails_the_start_and_leaves_no_key_behind(machine: Machine, code: int, words: str) -> None:
    with_key(machine)
    (machine.bin / "download-code").write_text(str(code))
    rc, output = machine.finish(machine.start())
    assert rc == 1
    assert words in output
    assert machine.container("nim-llama-download") is None
    assert machine.container() is None
    assert marker(machine)["status"] == "incomplete"


def test_a_cache_that_was_brought_here_is_tried_although_the_download_fails(machine: Machine) -> None:
    with_key(machine)
    (machine.bin / "cache/weights").touch()
    (machine.bin / "download-code").write_text("1")
    machine.start()
    machine.until(machine.container)
    assert marker(machine) == {}


MARKER = "lib/state/llama.download.json"


def test_what_has_served_before_is_served_without_another_download(machine: Machine, service: str) -> None:
    """The way there and back again, with a key that has expired meanwhile."""
    with_key(machine, ready_url=service)
    (machine.bin / "download-writes").touch()
    process = machine.start()
    machine.until(lambda: marker(machine).get("status") == "proven")
    process.kill()
    machine.put(running=False)
    (machine.bin / "download-code").write_text("1")
    with_key(machine, download=dict(PLAN, key="k2"))
    assert machine.finish(machine.start())[0] == 1
    assert (marker(machine)["status"], marker(machine)["key"]) == ("incomplete", "k2")
    downloads = len(machine.calls("create"))
    with_key(machine)
    process = machine.start()
    machine.until(lambda: (machine.container() or {"State": {"Running": False}})["State"]["Running"])
    assert len(machine.calls("create")) == downloads + 1
    process.kill()
    machine.put(running=False)
    # The other one is still to be fetched.
    with_key(machine, download=dict(PLAN, key="k2"))
    assert machine.finish(machine.start())[0] == 1


def test_a_cache_that_was_emptied_has_served_nothing(machine: Machine) -> None:
    """What lies in another directory is still there."""
    with_key(machine)
    known = {"k1": str(machine.bin / "cache"), "k2": str(machine.bin / "cache"), "k0": "/elsewhere", "k": ""}
    (machine.root / MARKER).write_text(json.dumps({"status": "proven", "key": "k2", "proven": known}))
    (machine.bin / "download-code").write_text("1")
    assert machine.finish(machine.start())[0] == 1
    assert marker(machine) == {"status": "incomplete", "key": "k1", "proven": {"k0": "/elsewhere"}}


def test_a_record_from_before_what_is_fetched_had_another_name(machine: Machine, service: str) -> None:
    (machine.bin / "cache/weights").touch()
    (machine.bin / "download-code").write_text("1")
    (machine.root / MARKER).write_text(json.dumps({"status": "proven", "key": "k1"}))
    with_key(machine, download=dict(PLAN, key="new", former_key="k1"), ready_url=service)
    process = machine.start()
    machine.until(lambda: machine.calls("wait"))
    assert "nim-llama-download" not in " ".join(machine.calls("create"))
    # It has served under its new name, so its former name (that of a GPU) may change.
    cache = str(machine.bin / "cache")
    machine.until(lambda: marker(machine).get("key") == "new")
    assert marker(machine) == {"status": "proven", "key": "new", "proven": {"k1": "", "new": cache}}
    process.kill()
    machine.put(running=False)
    with_key(machine, download=dict(PLAN, key="new", former_key="another"))
    machine.start()
    machine.until(lambda: (machine.container() or {"State": {"Running": False}})["State"]["Running"])
    assert "nim-llama-download" not in " ".join(machine.calls("create"))


def test_what_has_served_is_not_remembered_without_end(machine: Machine, service: str) -> None:
    (machine.bin / "cache/weights").touch()
    known = {"old-%d" % number: "/x" for number in range(20)}
    (machine.root / MARKER).write_text(json.dumps({"status": "complete", "key": "k1", "proven": known}))
    with_key(machine, ready_url=service)
    machine.start()
    machine.until(lambda: marker(machine).get("status") == "proven")
    found = marker(machine)["proven"]
    assert len(found) == 8
    assert list(found)[-2:] == ["old-19", "k1"]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"status": "proven", "key": ["k1"]}',
        '{"proven": ["k1"]}',
        '{"status": ["proven"], "key": ["k1"], "proven": {"k1": 7}}',
    ],
)
def test_a_broken_record_of_the_download(machine: Machine, content: str) -> None:
    """It says nothing, so the files are fetched."""
    with_key(machine)
    (machine.bin / "cache/weights").touch()
    (machine.root / MARKER).write_text(content)
    machine.start()
    machine.until(lambda: "nim-llama-download" in " ".join(machine.calls("create")))


def test_a_cache_that_was_brought_here_and_has_served_is_not_fetched(machine: Machine, service: str) -> None:
    with_key(machine, ready_url=service)
    (machine.bin / "cache/weights").touch()
    (machine.bin / "download-code").write_text("1")
    process = machine.start()
    machine.until(lambda: marker(machine))
    assert marker(machine) == {"proven": {"k1": str(machine.bin / "cache")}}

    def again() -> int:
        """Downloads that were tried until the service runs once more."""
        process.kill()
        machine.put(running=False)
        machine.start()
        machine.until(lambda: (machine.container() or {"State": {"Running": False}})["State"]["Running"])
        return len([call for call in machine.calls("create") if "nim-llama-download" in call])

    assert again() == 1
    # The files of the next image may have been brought here, too.
    with_key(machine, download=dict(PLAN, key="k2"))
    assert again() == 2
    assert "status" not in marker(machine)


def test_without_a_key_there_is_no_download(machine: Machine) -> None:
    machine.configure(download=PLAN)
    machine.start()
    machine.until(lambda: machine.calls("wait"))
    assert len(machine.calls("create")) == 1


def test_secret_variables_come_from_their_file(machine: Machine) -> None:
    (machine.root / "etc/llama.env").write_text("# key 00\nHF_TOKEN=hf-unit-secret\n")
    with_key(machine, secret_environment=["HF_TOKEN"])
    (machine.bin / "download-writes").touch()
    machine.start()
    machine.until(lambda: machine.container() and machine.calls("wait")[1:])
    assert "hf-unit-secret" in (machine.bin / "download-environment").read_text()
    assert "hf-unit-secret" in json.dumps(machine.container())
    assert KEY not in json.dumps(machine.container())
    assert "hf-unit-secret" not in (machine.bin / "calls").read_text()


def test_without_its_secret_variables_nothing_is_started(machine: Machine) -> None:
    machine.configure(secret_environment=["HF_TOKEN"])
    rc, output = machine.finish(machine.start())
    assert rc == 78
    assert "llama.env with HF_TOKEN is missing" in output
    assert machine.container() is None


def test_a_service_that_must_fetch_by_itself_gets_the_key(machine: Machine) -> None:
    with_key(machine, download=None, key_in_service=LAUNCH)
    machine.start()
    machine.until(lambda: machine.calls("wait"))
    assert KEY in (machine.bin / "key-nim-llama").read_text()
    assert KEY not in json.dumps(machine.container())
    assert KEY not in (machine.bin / "calls").read_text()
    assert machine.calls("create")[0].endswith('exec "$@" nim /entry serve')


def test_a_service_that_must_fetch_by_itself_starts_without_a_key_too(machine: Machine) -> None:
    machine.configure(key_in_service=LAUNCH)
    machine.start()
    machine.until(lambda: machine.calls("wait"))
    assert machine.calls("create")[0].endswith("--env=A=b image@sha256:0")


def test_a_download_goes_on_when_the_wrapper_was_killed_meanwhile(machine: Machine) -> None:
    with_key(machine)
    machine.put("nim-llama-download", running=True)
    machine.start()
    machine.phase("download")
    assert machine.calls("create") == []
    (machine.bin / "cache/weights").touch()
    machine.put("nim-llama-download", running=False)
    machine.until(machine.container)
    assert marker(machine)["status"] == "complete"


def test_stop_during_the_download_removes_its_container(machine: Machine) -> None:
    with_key(machine)
    machine.put("nim-llama-download", running=True)
    process = machine.start()
    machine.until(lambda: machine.calls("wait"))
    assert machine.finish(machine.start("stop", MAINPID=str(process.pid)))[0] == 0
    assert machine.finish(process)[0] == 0
    assert machine.container("nim-llama-download") is None
    assert machine.container() is None


def test_files_that_never_served_are_looked_at_again(machine: Machine) -> None:
    with_key(machine)
    (machine.bin / "download-writes").touch()
    process = machine.start()
    machine.until(lambda: machine.container() and machine.calls("wait")[1:])
    machine.put(running=False, code=1)
    assert machine.finish(process)[0] == 1
    assert marker(machine)["status"] == "incomplete"


def test_the_source_is_whole_and_stands_on_its_own() -> None:
    text = program()
    assert text.startswith("# SPDX-FileCopyrightText")
    assert "from ." not in text
    # Nothing of a part is lost: what it defines is defined once.
    for part in PARTS:
        for name, thing in vars(part).items():
            if getattr(thing, "__module__", "") == part.__name__:
                assert len(re.findall(r"(?m)^(?:def|class) %s\b" % name, text)) == 1, name
    compile(text, "nim-unit", "exec")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            'invalid argument "type=bind" for "--mount" flag: parse error\nSee \'docker create --help\'.\n',
            'invalid argument "type=bind" for "--mount" flag: parse error',
        ),
        (
            "invalid argument\n\nUsage:  docker create\n\nRun 'docker create --help' for more information\n",
            "invalid argument",
        ),
        (
            "x\nError response from daemon: OCI runtime create failed: stderr: Auto-detected mode as 'legacy'\n"
            "nvidia-container-cli: initialization error: nvml error: driver not loaded\n"
            "Error: failed to start containers: nim-llama\n",
            "Error response from daemon: OCI runtime create failed: stderr: Auto-detected mode as 'legacy'"
            " nvidia-container-cli: initialization error: nvml error: driver not loaded",
        ),
        ("", "no message"),
    ],
)
def test_why_a_docker_command_failed(text: str, line: str) -> None:
    assert _nim_unit_docker.complaint(text) == line
