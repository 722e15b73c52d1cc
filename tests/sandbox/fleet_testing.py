# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""For tests that tell a story: run playbooks against a scenario's hosts, break something there, see who kept running."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import http.client
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import pytest
import yaml
from control import KEY_VALID
from fleet_sandbox.inventory import full_name
from processes import kill_tree

SOURCE = pathlib.Path(__file__).resolve().parent
CHECKOUT = SOURCE.parents[1]
SANDBOX = CHECKOUT / ".sandbox"
#: Seconds after which a playbook counts as stuck.
PATIENCE = 600

Json = dict[str, Any]


def sandbox(*arguments: str) -> None:
    """A command of the sandbox: ``sandbox("add", "gpu01", "--scenario", "x")``."""
    command = [sys.executable, str(SOURCE / "sandbox.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def read_inventory(path: pathlib.Path) -> Json:
    """An inventory file as a structure."""
    found: Json = yaml.safe_load(path.read_text())
    return found


@dataclasses.dataclass
class Run:
    """One run of a playbook."""

    code: int
    output: str
    seconds: float
    results: list[Json]

    def of(self, host: str, task: str = "") -> list[Json]:
        """Results of a host's tasks with this text in their name."""
        return [entry for entry in self.results if entry["host"] == host and task in entry["task"]]

    def changed(self) -> list[str]:
        """``host: task`` of everything that was changed."""
        return ["%s: %s" % (entry["host"], entry["task"]) for entry in self.results if entry["result"].get("changed")]

    def changes(self, host: str) -> list[Json]:
        """What the modules say they changed on a host."""
        return [
            change for entry in self.of(host) if entry["result"].get("changed") for change in entry["result"]["changes"]
        ]

    def restarts(self, host: str) -> set[str]:
        """Services that the run started or restarted, by its own word."""
        return {
            change["what"]
            for change in self.changes(host)
            if change["to"] in ("started", "restarted") and change["what"].startswith("nim-")
        }

    def failure(self, host: str) -> str:
        """The message with which the run failed on a host; it is an error that it did not."""
        failed = [entry for entry in self.of(host) if entry["outcome"] == "failed"]
        assert failed, "the run did not fail on %s:\n%s" % (host, self.output)
        result = failed[-1]["result"]
        # Of a loop, the items tell it.
        items = [item for item in result.get("results") or [] if item.get("failed")]
        return "\n".join(str(item["msg"]) for item in items or [result])

    def executions(self, host: Host) -> int:
        """Commands that Ansible ran on a host over SSH, file transfers included; the run must have been loud (-vvv)."""
        return len(re.findall(r"<%s> (?:SSH: EXEC|PUT |FETCH )" % re.escape(host.address), self.output))

    def warnings(self) -> str:
        return "\n".join(str(text) for entry in self.results for text in entry["result"].get("warnings") or [])


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which processes make up a service just now; equal as long as nobody restarted anything."""

    container: str
    container_pid: int
    wrapper_pid: int
    restarts: int

    @property
    def serving(self) -> tuple[str, int]:
        """What matters to clients: the container and its process."""
        return (self.container, self.container_pid)


class Client:
    """Requests one after the other; every answer with its time."""

    def __init__(self, host: Host, port: int) -> None:
        self.host = host
        self.port = port
        self.answers: list[tuple[float, int]] = []
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        model = self.host.model_names(self.port)[0]
        while not self.end.is_set():
            began = time.monotonic()
            self.answers.append((began, self.host.complete(self.port, model)[0]))
            self.end.wait(0.05)

    @property
    def failures(self) -> list[int]:
        """Statuses other than 200; 0 is no answer."""
        return [status for _when, status in self.answers if status != 200]

    @property
    def outage(self) -> float:
        """Seconds from the first request that failed to the first one after it that did not."""
        failed = [when for when, status in self.answers if status != 200]
        good = [when for when, status in self.answers if status == 200 and failed and when > failed[-1]]
        return 0.0 if not failed else (good[0] if good else float("inf")) - failed[0]


class Host:
    """A host of the scenario, over SSH as root."""

    def __init__(self, name: str, connection: Json, sockets: str) -> None:
        self.name = name
        self.address = str(connection["ansible_host"])
        self._ssh = [
            "ssh",
            *shlex.split(connection["ansible_ssh_common_args"]),
            *("-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-o", "ControlMaster=auto", "-o", "ControlPersist=60"),
            *("-o", "ControlPath=%s/%%C" % sockets, "-i", connection["ansible_ssh_private_key_file"]),
            "%s@%s" % (connection["ansible_user"], self.address),
        ]

    def run(self, command: str, *, check: bool = True, stdin: str = "") -> str:
        """Run a shell command and give its output without the last newline."""
        arguments = [*self._ssh, command]
        done = subprocess.run(
            arguments, input=stdin, capture_output=True, text=True, errors="replace", timeout=300, check=False
        )
        said = "%s: %s: %d %s%s" % (self.name, command, done.returncode, done.stdout, done.stderr)
        assert done.returncode == 0 or not check, said
        return done.stdout.rstrip("\n")

    def succeeds(self, command: str) -> bool:
        return subprocess.run([*self._ssh, command], capture_output=True, check=False, timeout=120).returncode == 0

    def start_program(self, name: str, request: Json) -> subprocess.Popen[bytes]:
        """Start a Python program of this folder on the host; ``request`` is the first line of its standard input.

        Neither the program nor the request appears in an argument list or a file of the host.
        """
        source = (SOURCE / name).read_bytes()
        loader = "python3 -c 'import sys; exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))'"
        process = subprocess.Popen([*self._ssh, loader], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin
        process.stdin.write(b"%d\n%s%s\n" % (len(source), source, json.dumps(request).encode()))
        process.stdin.flush()
        return process

    def run_program(self, name: str, request: Json) -> Any:
        """The same to its end; it answers in JSON."""
        with self.start_program(name, request) as process:
            answer = process.communicate(timeout=300)[0]
        assert process.returncode == 0, "%s: %s: %d" % (self.name, name, process.returncode)
        return json.loads(answer)

    def snapshot(self, skip: Sequence[str] = (), *, by_size: Sequence[str] = (), live: bool = False) -> dict[str, str]:
        """Every file (mode, owner, content), package, unit file and kernel module, for ``difference``.

        Args:
            skip: Paths that are left out with all that is below them.
            by_size: Folders whose files are told by their size, which is much faster.
            live: Whether to add units' states, Docker's settings, images and containers.
        """
        request: Json = {"skip": list(skip), "by_size": list(by_size), "live": live}
        found: dict[str, str] = self.run_program("snapshot_host.py", request)
        return found

    def write(self, path: str, text: str, mode: str = "0644") -> None:
        self.run("install -D -m %s /dev/stdin %s" % (mode, shlex.quote(path)), stdin=text)

    def read_json(self, path: str) -> Json:
        found: Json = json.loads(self.run("cat " + shlex.quote(path)))
        return found

    # -- services

    def unit(self, model: str, *keys: str) -> dict[str, str]:
        shown = self.run("systemctl show --property %s nim-%s.service" % (",".join(keys), model))
        return dict(line.split("=", 1) for line in shown.splitlines())

    def active(self, model: str) -> str:
        return self.unit(model, "ActiveState")["ActiveState"]

    def container_state(self, model: str) -> Json | None:
        """``State`` of the container of a model, None when there is none."""
        text = self.run("docker inspect --format '{{json .State}}' nim-%s 2>/dev/null" % model, check=False)
        found: Json | None = json.loads(text) if text.strip() else None
        return found

    def identity(self, *models: str) -> dict[str, Identity]:
        """Who runs for each model: of all services that are on the host when none is named."""
        names = models or self.models()
        found = {}
        for name in names:
            unit = self.unit(name, "MainPID", "NRestarts")
            # State.Pid is that of the host's own PID namespace.
            seen = self.run("docker inspect --format '{{.Id}} {{.State.Pid}}' nim-%s" % name).split()
            found[name] = Identity(seen[0], int(seen[1]), int(unit["MainPID"]), int(unit["NRestarts"]))
        return found

    def gpus_inside(self, model: str) -> list[str]:
        """UUIDs of the GPUs that the container of a model has, as nvidia-smi lists them in there."""
        # Not docker exec: it asks for the container's limits again, which the sandbox's hosts cannot grant.
        pid = self.run("docker inspect --format '{{.State.Pid}}' nim-" + model)
        listed = self.run("nsenter --mount --target %s nvidia-smi -L" % pid)
        return [line.rpartition("UUID: ")[2].rstrip(")") for line in listed.splitlines()]

    def models(self) -> list[str]:
        return self.run("cd /etc/nim && ls *.json 2>/dev/null | sed 's/[.]json$//'", check=False).split()

    def ready(self, port: int) -> bool:
        return self.get(port, "/v1/health/ready")[0] == 200

    def wait_ready(self, *ports: int, seconds: float = 60) -> None:
        for port in ports:
            wait_until(lambda port=port: self.ready(port), "%s answers on port %d" % (self.name, port), seconds)

    def get(self, port: int, path: str, body: Json | None = None, timeout: float = 10) -> tuple[int, Json]:
        """Status and JSON of a request as a client on another machine sends it; status 0 when nobody answers."""
        connection = http.client.HTTPConnection(self.address, port, timeout=timeout)
        try:
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException):
            return 0, {}
        finally:
            connection.close()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, {}

    def model_names(self, port: int) -> list[str]:
        return [entry["id"] for entry in self.get(port, "/v1/models")[1].get("data", [])]

    def complete(self, port: int, model: str = "") -> tuple[int, Json]:
        body = {"model": model or self.model_names(port)[0], "prompt": "Hello", "max_tokens": 4}
        return self.get(port, "/v1/completions", body)

    @contextlib.contextmanager
    def client(self, port: int) -> Iterator[Client]:
        """A client that asks again and again, each time on a new connection, while the test does something."""
        client = Client(self, port)
        client.thread.start()
        try:
            yield client
            # Also where it was over in an instant: what comes right after it counts.
            wait_until(lambda: len(client.answers) > 5, "the client has asked more than five times", 30)
        finally:
            client.end.set()
            client.thread.join(15)

    @contextlib.contextmanager
    def stream(self, port: int, tokens: int) -> Iterator[Json]:
        """A streamed completion that began before what the test does and must come to its end after it."""
        seen: Json = {"tokens": 0, "done": False}
        body = {"model": self.model_names(port)[0], "prompt": "Hello", "max_tokens": tokens}
        connection = http.client.HTTPConnection(self.address, port, timeout=60)
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps({**body, "stream": True, "ignore_eos": True}),
            {"Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()

        def read() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                for line in answer:
                    seen["tokens"] += line.startswith(b"data: {")
                    seen["done"] = seen["done"] or line.strip() == b"data: [DONE]"

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            wait_until(lambda: seen["tokens"] > 0, "the stream has begun")
            yield seen
            assert not seen["done"], "the stream was over before the event was: nothing was proven"
            reader.join(60)
        finally:
            connection.close()

    # -- the host itself

    def boot_id(self) -> str:
        return self.run("cat /proc/sys/kernel/random/boot_id", check=False)

    def reboot(self, seconds: float = 60) -> None:
        before = self.boot_id()
        self.run("systemctl reboot", check=False)
        subprocess.run([*self._ssh[:-1], "-O", "exit", self._ssh[-1]], capture_output=True, check=False)
        wait_until(lambda: self.boot_id() not in ("", before), "%s is back after a reboot" % self.name, seconds)

    def restart_docker(self) -> None:
        """Not held up by Docker's start limit, which tests meet sooner than operators."""
        self.run("systemctl reset-failed docker; systemctl restart docker")

    def journal(self, lines: int = 60) -> str:
        return self.run("journalctl --no-pager --quiet -o short-precise -n %d" % lines, check=False)


class Fleet:
    """The hosts of a scenario and their inventory; by default the scenario's own ``inventory.yml``."""

    #: The last one of every scenario.
    current: dict[str, Fleet] = {}

    def __init__(self, scenario: str, inventory: Json | None = None) -> None:
        self.scenario = scenario
        self.inventory = inventory or read_inventory(CHECKOUT / "molecule" / scenario / "inventory.yml")
        self.connections = SANDBOX / "inventories" / (scenario + ".yml")
        # Connections are this object's own: hosts that come later may have the same addresses.
        self._sockets = tempfile.TemporaryDirectory(prefix="fleet-")
        group = read_inventory(self.connections)["gpu_hosts"]
        self.hosts = {
            name: Host(name, {**group["vars"], **variables}, self._sockets.name)
            for name, variables in group["hosts"].items()
        }
        Fleet.current[scenario] = self

    def host(self, name: str) -> Host:
        return self.hosts[full_name(self.scenario, name)]

    def changed(self, host: str, model: str = "", *, remove: str = "", add: Json | None = None, **values: Any) -> Json:
        """A copy of the inventory in which one model has other values, is gone, or came along. None takes a key away."""
        inventory = copy.deepcopy(self.inventory)
        group = inventory["gpu_hosts"]
        models = group["hosts"][self.host(host).name].get("nim_models") or group["vars"]["nim_models"]
        if model:
            entry = next(entry for entry in models if entry["name"] == model)
            entry.update(values)
            for key in [key for key, value in entry.items() if value is None]:
                del entry[key]
        models[:] = [entry for entry in models if entry["name"] != remove]
        if add:
            models.append(add)
        return inventory

    def play(self, playbook: str | pathlib.Path, *options: str, succeeds: bool = True, **how: Any) -> Run:
        """Run a playbook, of the collection ("site") or a file, to its end as an operator does.

        Args:
            succeeds: What is expected.
            inventory: In place of the scenario's own; its hosts are known in any case.
            environment: Further variables of the controller. NGC_API_KEY is the key that works unless it is here.
        """
        run = self._run(playbook, options, **how)
        assert (run.code == 0) is succeeds, "the run %s" % ("failed" if succeeds else "should have failed")
        return run

    def attempt(self, playbook: str | pathlib.Path, *options: str, **how: Any) -> Run:
        """Run a playbook to its end, whatever that is."""
        return self._run(playbook, options, **how)

    def play_until(
        self,
        moment: str | Callable[[], bool],
        playbook: str | pathlib.Path,
        *options: str,
        after: float = 0,
        **how: Any,
    ) -> Run:
        """Run a playbook and kill the controller ``after`` seconds after a moment: a pattern in its output, or a question.

        All its processes get SIGKILL at once, as when the controller loses power: nothing is cleaned up.
        """
        run = self._run(playbook, options, moment=moment, after=after, **how)
        if isinstance(moment, str):
            assert re.search(moment, run.output), "the moment %r never came" % moment
        return run

    def _run(
        self,
        playbook: str | pathlib.Path,
        options: Sequence[str],
        *,
        inventory: Json | None = None,
        environment: Mapping[str, str] | None = None,
        moment: str | Callable[[], bool] = "",
        after: float = PATIENCE,
        label: str = "",
    ) -> Run:
        # Runs at the same time need a label each.
        folder = SANDBOX / "run" / ("test-" + self.scenario + label)
        folder.mkdir(parents=True, exist_ok=True)
        variables, results, output = folder / "inventory.json", folder / "results.jsonl", folder / "output"
        variables.write_text(json.dumps(inventory or self.inventory))
        results.write_text("")
        command = [str(pathlib.Path(sys.executable).parent / "ansible-playbook")]
        command += [str(playbook) if isinstance(playbook, pathlib.Path) else "gpu_fleet.nim." + playbook]
        command += ["-i", str(variables), "-i", str(self.connections), *options]
        settings = {
            "ANSIBLE_COLLECTIONS_PATH": str(CHECKOUT / ".build/collections"),
            **os.environ,
            "ANSIBLE_CONFIG": str(SANDBOX / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_FORCE_COLOR": "0",
            "ANSIBLE_CALLBACK_PLUGINS": str(SOURCE / "callback"),
            "ANSIBLE_CALLBACKS_ENABLED": "recorder",
            "RECORDER_FILE": str(results),
            "PYTHONUNBUFFERED": "1",
            "NGC_API_KEY": KEY_VALID,
            **(environment or {}),
        }
        began = time.monotonic()
        with output.open("wb") as stream, subprocess.Popen(
            command, env=settings, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, cwd=CHECKOUT
        ) as process:
            try:
                if moment:
                    came = _in_file(moment, output) if isinstance(moment, str) else moment
                    wait_until(lambda: process.poll() is not None or came(), str(moment), 400, 0.05)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(after)
            finally:
                if process.poll() is None:
                    kill_tree(process.pid)
                text = output.read_text(errors="replace")
                # pytest shows it where a test fails.
                print("$ %s\n%s" % (shlex.join(command), text))
        lines = results.read_text().rpartition("\n")[0].splitlines()
        return Run(process.returncode, text, time.monotonic() - began, [json.loads(line) for line in lines])

    def site(self, *options: str, **arguments: Any) -> Run:
        return self.play("site", *options, **arguments)

    def nim(self, inventory: Json | None = None, host: str = "", options: Sequence[str] = (), **arguments: Any) -> Run:
        """Only the services, of one host or all: what an operator runs after editing nim_models."""
        limit = ["--limit", self.host(host).name] if host else []
        return self.site("--tags", "nim", *limit, *options, inventory=inventory, **arguments)


def _in_file(pattern: str, path: pathlib.Path) -> Callable[[], bool]:
    """Whether a pattern is in a file by now."""
    compiled = re.compile(pattern.encode())
    return lambda: compiled.search(path.read_bytes()) is not None


def difference(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """What is new, gone or different in the second of two snapshots."""
    return {
        path: "new" if path not in before else "gone" if path not in after else "different"
        for path in sorted({*before, *after})
        if before.get(path) != after.get(path)
    }


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 30, pause: float = 0.2) -> Any:
    """The first true answer; an error when there is none in time."""
    end = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < end, "not within %d s: %s" % (seconds, what)
        time.sleep(pause)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, None]:
    """What the hosts did last, where a test failed."""
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" and report.failed:
        for fleet in Fleet.current.values():
            for host in fleet.hosts.values():
                report.sections.append(("journal of " + host.name, host.journal()))
