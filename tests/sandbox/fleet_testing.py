# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""For tests that tell a story: run a playbook on a changed inventory, break something on a host, see who kept running."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import http.client
import json
import os
import pathlib
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import readme
import yaml

SOURCE = pathlib.Path(__file__).resolve().parent
CHECKOUT = SOURCE.parents[1]
SANDBOX = CHECKOUT / ".sandbox"

sys.path.insert(0, str(SOURCE / "world"))

Json = dict[str, Any]

#: Hosts of the README and what the demo makes them of.
_README_HOSTS: dict[str, Json] = {
    "gpu01": {"sandbox_image": "ubuntu2404", "sandbox_gpus": "NVIDIA H200:143771:2"},
    "gpu02": {},
}


# -- inventories ------------------------------------------------------------------------------------


def host_name(scenario: str, name: str) -> str:
    return "%s-%s" % (scenario.replace("_", "-"), name)


def readme_inventory(scenario: str) -> Json:
    """The README's inventory with the names that the hosts have in a scenario."""
    inventory: Json = yaml.safe_load(readme.inventory_text())
    group = inventory["gpu_hosts"]
    group["hosts"] = {
        host_name(scenario, name): {**variables, **_README_HOSTS[name]} for name, variables in group["hosts"].items()
    }
    return inventory


def file_inventory(scenario: str) -> Json:
    """The scenario's own ``inventory.yml``."""
    found: Json = yaml.safe_load((CHECKOUT / "molecule" / scenario / "inventory.yml").read_text())
    return found


def script_inventory(inventory: Json) -> Json:
    """The same in the form in which an inventory script answers ``--list``."""
    answer: Json = {"_meta": {"hostvars": {}}}
    for group, content in inventory.items():
        answer[group] = {"hosts": list(content["hosts"]), "vars": content.get("vars", {})}
        answer["_meta"]["hostvars"].update(content["hosts"])
    return answer


# -- runs -------------------------------------------------------------------------------------------


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
        return str(failed[-1]["result"]["msg"])

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

    def __init__(self, machine: Machine, port: int) -> None:
        self.machine = machine
        self.port = port
        self.answers: list[tuple[float, int]] = []
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        model = self.machine.model_names(self.port)[0]
        while not self.end.is_set():
            began = time.monotonic()
            self.answers.append((began, self.machine.complete(self.port, model)[0]))
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


class Machine:
    """A host of the scenario, over SSH."""

    def __init__(self, name: str, connection: Json) -> None:
        self.name = name
        self.address = str(connection["ansible_host"])
        self._ssh = [
            "ssh",
            *shlex.split(connection["ansible_ssh_common_args"]),
            *("-o", "LogLevel=ERROR", "-o", "ControlMaster=auto", "-o", "ControlPersist=60"),
            *("-o", "ControlPath=%s/run/ssh-%%C" % SANDBOX),
            *("-i", connection["ansible_ssh_private_key_file"]),
            "%s@%s" % (connection["ansible_user"], self.address),
        ]

    def run(self, command: str, *, check: bool = True, stdin: str | None = None, timeout: float = 120) -> str:
        """Run a shell command and give its output without the last newline."""
        done = subprocess.run(
            [*self._ssh, command], input=stdin or "", capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0 or not check, "%s: %s: %d %s%s" % (
            self.name,
            command,
            done.returncode,
            done.stdout,
            done.stderr,
        )
        return done.stdout.rstrip("\n")

    def succeeds(self, command: str) -> bool:
        return subprocess.run([*self._ssh, command], capture_output=True, check=False, timeout=120).returncode == 0

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
        finally:
            client.end.set()
            client.thread.join(15)
        assert len(client.answers) > 5, "the client asked only %d times" % len(client.answers)

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
    """The hosts of a scenario and the inventory they converged to; changes are made on copies of it."""

    current: list[Fleet] = []

    def __init__(self, scenario: str, inventory: Json) -> None:
        self.scenario = scenario
        self.inventory = inventory
        self.connections = SANDBOX / "inventories" / (scenario + ".yml")
        group = yaml.safe_load(self.connections.read_text())["gpu_hosts"]
        self.machines = {
            name: Machine(name, {**group.get("vars", {}), **variables}) for name, variables in group["hosts"].items()
        }
        Fleet.current.append(self)

    def machine(self, name: str) -> Machine:
        return self.machines[host_name(self.scenario, name)]

    def changed(self, host: str, model: str = "", *, remove: str = "", add: Json | None = None, **values: Any) -> Json:
        """A copy of the inventory in which one model has other values, is gone, or came along. None takes a key away."""
        inventory = copy.deepcopy(self.inventory)
        group = inventory["gpu_hosts"]
        variables = group["hosts"][host_name(self.scenario, host)]
        models = variables.get("nim_models") or group["vars"]["nim_models"]
        if model:
            entry = next(entry for entry in models if entry["name"] == model)
            for key, value in values.items():
                if value is None:
                    entry.pop(key, None)
                else:
                    entry[key] = value
        models[:] = [entry for entry in models if entry["name"] != remove]
        if add:
            models.append(add)
        return inventory

    def play(
        self,
        playbook: str,
        *options: str,
        inventory: Json | None = None,
        variables: Json | None = None,
        key: str | None = None,
        succeeds: bool = True,
    ) -> Run:
        """Run a playbook of the collection as an operator does.

        Args:
            key: NGC key in the controller's environment, in place of the one that works.
            succeeds: What is expected; None of both is an error of the test when it is not known.
        """
        folder = SANDBOX / "run" / ("test-" + self.scenario)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "inventory.json").write_text(json.dumps(inventory or self.inventory))
        (folder / "results.jsonl").write_text("")
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(SANDBOX / "ansible.cfg"),
            "ANSIBLE_CALLBACK_PLUGINS": str(SOURCE / "callback"),
            "ANSIBLE_CALLBACKS_ENABLED": "recorder",
            "RECORDER_FILE": str(folder / "results.jsonl"),
        }
        if key is not None:
            environment["NGC_API_KEY"] = key
        command = ["ansible-playbook", "gpu_fleet.nim." + playbook]
        command += ["-i", str(folder / "inventory.json"), "-i", str(self.connections)]
        if variables:
            command += ["-e", json.dumps(variables)]
        began = time.monotonic()
        done = subprocess.run(
            [*command, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=600,
        )
        results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        run = Run(done.returncode, done.stdout, time.monotonic() - began, results)
        # pytest shows it where a test fails.
        print("$ %s\n%s" % (shlex.join([*command, *options]), run.output))
        assert (run.code == 0) is succeeds, "the run %s" % ("failed" if succeeds else "should have failed")
        return run

    def site(self, *options: str, **arguments: Any) -> Run:
        return self.play("site", *options, **arguments)

    def nim(self, inventory: Json | None = None, host: str = "", **arguments: Any) -> Run:
        """Only the services, of one host or all: what an operator runs after editing nim_models."""
        options = ["--tags", "nim"] + (["--limit", host_name(self.scenario, host)] if host else [])
        return self.play("site", *options, inventory=inventory, **arguments)


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
        for fleet in Fleet.current:
            for machine in fleet.machines.values():
                report.sections.append(("journal of " + machine.name, machine.journal()))
