# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Brings the situations of ``failure_table`` about on a host, several at once, and measures what ``nim_health`` makes of them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType

from control import World
from failure_table import PUBLIC, RESTART, Situation
from fleet_testing import CHECKOUT, SANDBOX, SOURCE, Fleet, Host, Json, Run, read_inventory, wait_until

PLAYBOOK = SOURCE / "failure_health.yml"
#: Situations that are brought about at the same time; each is watched by a process of its own.
AT_ONCE = 6


def product_signatures() -> ModuleType:
    """The collection's own table."""
    path = CHECKOUT / "plugins/module_utils/_failure_signatures.py"
    spec = importlib.util.spec_from_file_location("failure_signatures", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


PRODUCT = product_signatures()
SIGNATURES = {entry.id: entry for entry in [*PRODUCT.SIGNATURES, *PRODUCT.EXIT_CODES.values(), PRODUCT.OUT_OF_MEMORY]}


@dataclasses.dataclass
class Seen:
    """What became of one situation.

    Attributes:
        result: What the module returned.
        ended: When the controller had it; seconds since the epoch.
        decided: When the line that decides was printed, or the order given where there is none; never before the first look.
        journal: What container and unit had said by then.
    """

    model: str
    result: Json
    ended: float
    decided: float
    journal: list[str]

    @property
    def seconds(self) -> float:
        return self.ended - self.decided


def batches(situations: Iterable[Situation], size: int = AT_ONCE) -> Iterator[list[Situation]]:
    """In groups of which none asks twice for a change of the world to the same files."""
    waiting = list(situations)
    while waiting:
        chosen: list[Situation] = []
        for situation in waiting:
            free = not situation.world or not any(other.world for other in chosen)
            if len(chosen) < size and free:
                chosen.append(situation)
        yield chosen
        waiting = [situation for situation in waiting if situation not in chosen]


class Theatre:
    """One host, its models, and whoever watches them."""

    def __init__(
        self, fleet: Fleet, host: Host, *, image: str = PUBLIC, key: str = "", injection: str = "runtime"
    ) -> None:
        self.fleet = fleet
        self.host = host
        self.image = image
        self.key = key
        self.injection = injection
        self.ports: dict[str, int] = {}
        self.world = World(SANDBOX)
        group = read_inventory(fleet.connections)["gpu_hosts"]
        self.connection = {**group["vars"], **group["hosts"][host.name]}

    # -- the models

    def model(self, situation: Situation, number: int, name: str = "") -> Json:
        name = name or situation.name
        model: Json = {
            "name": name,
            "image": self.image,
            "gpus": [number],
            # A port of its own: one that just ended again may still hold the last one.
            "port": self.ports.setdefault(name, 8100 + len(self.ports)),
            "start_timeout": 120,
            "environment": {"STANDIN_LOAD_SECONDS": "0.3", "STANDIN_GRAPH_SECONDS": "0.1", **situation.environment},
            **situation.options,
        }
        found: Json = json.loads(json.dumps(model).replace("@NAME", model["name"]))
        return found

    def deploy(self, models: list[Json], injection: str = "") -> None:
        """These models and no others, started but not waited for."""
        injection = injection or self.injection
        wanted = {model["name"] for model in models}
        gone = [
            {"name": name, "image": PUBLIC, "port": 9000 + number, "state": "absent"}
            for number, name in enumerate(self.host.models())
            if name not in wanted
        ]
        variables = {
            "nim_models": models + gone,
            "nim_wait": False,
            "nim_gpu_injection": injection,
            "nvidia_container_toolkit_cdi": injection == "cdi",
            "ngc_api_key": self.key,
        }
        inventory = {"gpu_hosts": {"hosts": {self.host.name: {}}, "vars": variables}}
        options = ["--tags", "nvidia_container_toolkit,docker,nim" if injection == "cdi" else "nim"]
        options += ["--limit", self.host.name]
        self.fleet.site(*options, inventory=inventory, environment={"NGC_API_KEY": self.key})

    def command(self, text: str, model: Json) -> str:
        values = {"DIR": "/var/lib/nim/cache/" + model["name"], "NAME": model["name"]}
        values.update({"PORT": str(model["port"]), "IMAGE": model["image"]})
        return re.sub(r"@(DIR|NAME|PORT|IMAGE)\b", lambda found: values[found.group(1)], text)

    # -- the stories

    def play(self, situations: Sequence[Situation]) -> dict[str, Seen]:
        """Several models: deploy, watch, give the orders one after the other, see the ends."""
        prepared = [(situation, self.model(situation, number)) for number, situation in enumerate(situations)]
        models = [model for _situation, model in prepared]
        with contextlib.ExitStack() as afterwards:
            for situation, model in prepared:
                # Orders of an earlier run.
                self.host.run(self.command("rm -rf @DIR", model), check=False)
                if situation.prepare:
                    self.host.run(self.command(situation.prepare, model))
                afterwards.enter_context(self.changed_world(situation))
                afterwards.callback(self.host.run, self.command(situation.mend, model) or "true", check=False)
            self.deploy(models)
            began = time.time()
            with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
                watching = pool.submit(self.watch, models)
                wait_until(lambda: self.lookers() >= len(models), "all are looked at", 60, 0.1)
                time.sleep(1.5)
                orders = {}
                for situation, model in prepared:
                    if situation.memory:
                        afterwards.enter_context(self.little_memory(model["name"], situation.memory))
                    orders[situation.name] = time.time()
                    self.host.run(self.command(situation.order, model))
                    if situation.kernel:
                        orders[situation.name] = self.kernel_says(situation.kernel, model["name"])
                    time.sleep(0.3)
                run = watching.result()
            said = self.said(began)
        return {
            situation.name: self.seen(run, situation, model, orders[situation.name], said)
            for situation, model in prepared
        }

    def breaks(self, situations: Sequence[Situation], injection: str) -> dict[str, Seen]:
        """One model that runs; the host is broken in one way after the other, the unit starts again, health is asked."""
        # The sandbox's hosts cannot raise limits.
        model = self.model(Situation("victim", options={"ulimits": {}}), 0)
        self.deploy([model], injection)
        found = {}
        for situation in situations:
            began = time.time()
            try:
                with self.changed_world(situation):
                    self.host.run(self.command(situation.order, model))
                    run = self.watch([model])
                found[situation.name] = self.seen(run, situation, model, began, self.said(began))
            finally:
                self.host.run(self.command(situation.mend, model), check=False)
        self.host.run(self.command(RESTART, model))
        self.host.wait_ready(model["port"], seconds=90)
        return found

    @contextlib.contextmanager
    def changed_world(self, situation: Situation) -> Iterator[None]:
        if situation.world is None:
            yield
            return
        how, arguments = situation.world
        if how == "set_key":
            self.world.set_key(self.key, **arguments)
            try:
                yield
            finally:
                self.world.set_key(self.key)
        else:
            fault = getattr(self.world, how)(**arguments)
            try:
                yield
            finally:
                self.world.mend(fault)

    def kernel_says(self, text: str, name: str) -> float:
        """A line in the log of the kernel, which all hosts share with this machine; when it was printed."""
        uuid = self.host.read_json("/etc/nim/%s.json" % name)["gpus"][0]
        found = self.host.run("grep -l %s /proc/driver/nvidia/gpus/*/information" % uuid)
        # Without its end the kernel keeps a line back until the next one comes.
        pathlib.Path("/dev/kmsg").write_text("<2>" + text % found.split("/")[-2].rpartition(".")[0] + "\n")
        return time.time()

    @contextlib.contextmanager
    def little_memory(self, name: str, mebibytes: int) -> Iterator[None]:
        """A limit that the kernel of this machine really enforces for the processes of a container.

        Its own control group, or, where memory is under cgroup v1, one that is named like Docker's there.
        """
        identifier = self.host.run("docker inspect --format '{{.Id}}' nim-" + name)
        places = {}
        for path in pathlib.Path("/proc").glob("[0-9]*/cgroup"):
            with contextlib.suppress(OSError):
                text = path.read_text()
                if identifier in text:
                    places[path.parent.name] = text
        assert places, "no process of nim-%s is seen from here" % name
        old = pathlib.Path("/sys/fs/cgroup/memory")
        if not old.is_dir():
            own = sorted(places.values())[0].split("::", 1)[1].splitlines()[0]
            pathlib.Path("/sys/fs/cgroup" + own, "memory.max").write_text("%dM" % mebibytes)
            yield
            return
        group = old / identifier
        group.mkdir()
        try:
            (group / "memory.limit_in_bytes").write_text("%dM" % mebibytes)
            for pid in places:
                (group / "cgroup.procs").write_text(pid)
            yield
        finally:
            with contextlib.suppress(OSError):
                group.rmdir()

    def watch(self, models: Sequence[Json]) -> Run:
        """``nim_health`` for each model by itself, to their ends."""
        aliases = {"situation-" + model["name"]: {**self.connection, "nim_models": [model]} for model in models}
        return self.fleet.attempt(
            PLAYBOOK, "--forks", str(len(models) + 1), inventory={"situations": {"hosts": aliases}}
        )

    def lookers(self) -> int:
        """Modules that run on the host."""
        return int(self.host.run("pgrep -fxc '/usr/bin/python3[.0-9]*'", check=False) or 0)

    def said(self, since: float) -> list[tuple[float, str, str]]:
        """Time, container or unit, and text of what the services said."""
        shown = self.host.run(
            "journalctl --no-pager --quiet --output=json --output-fields=MESSAGE,CONTAINER_NAME,_SYSTEMD_UNIT"
            " --since=@%d" % (since - 30)
        )
        found = []
        for line in shown.splitlines():
            entry = json.loads(line)
            who = str(entry.get("CONTAINER_NAME") or entry.get("_SYSTEMD_UNIT") or "kernel")
            message = entry.get("MESSAGE")
            if isinstance(message, str):
                found.append((int(entry["__REALTIME_TIMESTAMP"]) / 1e6, who, message))
        return found

    def seen(
        self, run: Run, situation: Situation, model: Json, ordered: float, said: Sequence[tuple[float, str, str]]
    ) -> Seen:
        name = model["name"]
        entry = run.of("situation-" + name, "Health")[-1]
        own = {"nim-" + name, "nim-%s-download" % name, "nim-%s.service" % name}
        lines = [(at, text) for at, who, text in said if who in own]
        pattern = SIGNATURES[situation.failure].pattern if situation.failure else ""
        # What was said before the module began is no news to it; then its beginning counts.
        since = max(ordered, entry["began"])
        printed = [at for at, text in lines if pattern and since <= at <= entry["at"] and re.search(pattern, text)]
        decided = printed[0] if printed else since
        result = {**entry["result"], "failed": entry["outcome"] == "failed"}
        return Seen(name, result, entry["at"], decided, [text for _at, text in lines])


def problems(situation: Situation, seen: Seen) -> list[str]:
    """Everything that is not as the table wants it; empty when all is."""
    result, found = seen.result, []
    message = str(result.get("msg", ""))
    if situation.ready:
        return [] if result.get("ready") else ["it is not ready: %s" % message]
    if not result.get("failed"):
        return ["it did not fail"]
    if result.get("reason") not in situation.reasons:
        found.append("the reason is %s" % result.get("reason"))
    if (result.get("signature") or "") != situation.failure:
        found.append("it was recognised as %s" % result.get("signature"))
    elif situation.failure and not situation.own_words:
        signature = SIGNATURES[situation.failure]
        found += ["%r is not said" % text for text in (signature.cause, signature.remedy) if text not in message]
    found += ["%r is not said" % text for text in situation.says if text not in message]
    if seen.model not in message:
        found.append("the model is not named")
    if seen.seconds > situation.seconds:
        found.append("it took %.1f s" % seen.seconds)
    return ["%s\n%s" % (problem, message) for problem in found]


def report(seen: dict[str, Seen]) -> str:
    """One line a situation: seconds, reason, identifier."""
    rows = [
        "%-16s %5.1f s  %-16s %s"
        % (name, one.seconds, one.result.get("reason") or "ready", one.result.get("signature"))
        for name, one in sorted(seen.items())
    ]
    return "\n".join(rows)
