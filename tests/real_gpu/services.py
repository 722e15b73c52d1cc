# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Services on this machine's GPUs, set up by nim_service, seen by nim_health, gpu_host_info and the plan."""

from __future__ import annotations

import json
import os
import re
import resource
import time
import typing as t
import urllib.request

from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import Gpu
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_holders import driver_holders
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_host_info import gather
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_inventory import observe_gpus
from ansible_collections.gpu_fleet.nim.plugins.module_utils._health_target import parse_targets
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_plan import plan_host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_family import family_of_image
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_health import HealthCheck, Outcome
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import NimModel, parse_models
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_paths import WEIGHTS_PATH
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_service import NimService
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Change, converge

# Beside this file.
from engine import Engine, torch_directory
from machine import Machine, Unit
from report import Json, Report, wait_for
from serve import HELD_MIB

IMAGE = "nvcr.io/nim/gpu-fleet/real-gpu:2.0.0"
INJECTION = "cdi"


def requests_for(gpus: t.Sequence[str]) -> t.List[t.Tuple[str, t.Any]]:
    """Name and ``gpus`` of the services for a host: every way to ask, and a GPU that stays free from five GPUs on.

    Args:
        gpus: UUIDs in the order of their indices.
    """
    count = len(gpus)
    if count == 1:
        return [("one", 1)]
    if count == 2:
        return [("named", [gpus[1]]), ("one", 1)]
    if count == 3:
        return [("pair", 2), ("named", [0])]
    return [("group", count // 2), ("named", [gpus[-1]]), ("one", 1)]


class Services:
    """From options to models that compute, and to their end."""

    def __init__(self, host: Machine, engine: Engine, report: Report, gpus: t.Sequence[Gpu]) -> None:
        self.host, self.engine, self.report = host, engine, report
        self.gpus = list(gpus)
        self.api = engine.api
        self.limits = grantable_limits()
        self.entries = [
            self.entry(number, name, wish)
            for number, (name, wish) in enumerate(requests_for([gpu.uuid for gpu in self.gpus]))
        ]
        #: UUIDs of each service, by its name.
        self.given: t.Dict[str, t.List[str]] = {}

    def entry(self, number: int, name: str, gpus: t.Any) -> Json:
        entry: Json = {
            "name": "real-gpu-" + name,
            "image": IMAGE,
            "gpus": gpus,
            "port": 18000 + number,
            "bind_address": "127.0.0.1",
            "served_model_name": "gpu-fleet/real-gpu",
            "shm_size": "1GB",
            "start_timeout": 180,
            "stop_timeout": 20,
            # A container with a GPU in both ways.
            "read_only": name == "one",
        }
        site = torch_directory()
        if site:
            # How a NIM gets files that are on the host already; here it is how the container gets PyTorch.
            entry.update(
                weights_directory=site, environment={"PYTHONPATH": WEIGHTS_PATH, "HOME": "/tmp", "USER": "nim"}
            )
        if self.limits is not None:
            entry["ulimits"] = self.limits
        return entry

    def run(self) -> None:
        if self.limits is not None:
            self.report.note("note", "limits that this machine can grant", self.limits)
        image = self.engine.build_image(IMAGE)
        self.report.same("family of the image", family_of_image(image).key, "2.x")
        environment = (image.get("Config") or {}).get("Env") or []
        self.report.check("its requirement is read", "NVIDIA_REQUIRE_CUDA=cuda>=12.0" in environment)
        before = self._memory()
        self._planned_before()
        changes = self._converge(self.entries)
        self.report.check("nim_service sets the services up", changes, "%d changes" % len(changes))
        self._placed()
        outcome = self._health(self.entries)
        if any(not found["ready"] for found in outcome.models):
            self._why(outcome)
            return
        models = parse_models(self.entries)
        for model in models:
            self._computed(model, before)
        self._nobody_else(before)
        self._seen_by_health(outcome)
        self._seen_by_info(models)
        self._seen_by_plan(models)
        self._stays(models)
        self._adoption(models[0])
        self._daemon_away(models[0])
        self._stop(models, before)
        self._too_large()

    # -- set up ---------------------------------------------------------------------------------------

    def _service(self, entries: t.Sequence[Json]) -> NimService:
        return NimService(parse_models(entries), injection=INJECTION, api=self.api)

    def _converge(self, entries: t.Sequence[Json]) -> t.List[Change]:
        return converge(self.host, self._service(entries), check_mode=False).changes

    def _plan(self, entries: t.Sequence[Json]) -> Json:
        services = {"models": list(entries), "gpu_injection": INJECTION}
        wanted = {"nim_service": services, "nim_health": {"models": list(entries)}}
        return plan_host(self.host, wanted, self.api).result()

    def _planned_before(self) -> None:
        plan = self._plan(self.entries)
        units = {change["what"] for change in plan["changes"]}
        wanted = {"nim-%s.service" % entry["name"] for entry in self.entries}
        self.report.check("the plan names every service", wanted <= units and not plan["errors"], plan["errors"])
        self.report.same("and the disruption", plan["worst"], "reload")
        self.report.check("and has changed nothing", not os.path.exists("/etc/nim/%s.json" % self.entries[0]["name"]))

    def _placed(self) -> None:
        every = [gpu.uuid for gpu in self.gpus]
        for entry in self.entries:
            text = self.host.read_text("/etc/nim/%s.json" % entry["name"]) or "{}"
            self.report.keep("%s.json" % entry["name"], text)
            self.given[entry["name"]] = json.loads(text)["gpus"]
        taken = [uuid for uuids in self.given.values() for uuid in uuids]
        self.report.check("no GPU is given twice", len(taken) == len(set(taken)) and set(taken) <= set(every), taken)
        for entry in self.entries:
            wish, got = entry["gpus"], self.given[entry["name"]]
            if isinstance(wish, int):
                self.report.same("%s: number of GPUs" % entry["name"], len(got), wish)
            else:
                named = [every[one] if isinstance(one, int) else one for one in wish]
                self.report.check("%s: the GPUs that it names" % entry["name"], got == named, got)

    def _health(self, entries: t.Sequence[Json]) -> Outcome:
        return HealthCheck(self.host, self.api, parse_targets(entries)).run(None, interval=0, wait=True)

    def _why(self, outcome: Outcome) -> None:
        for entry, found in zip(self.entries, outcome.models):
            self.report.check("%s is ready" % entry["name"], found["ready"], found["message"])
            self.report.note("note", "wrapper", self._unit(entry["name"]).said()[-3000:])
            journal = self.host.journal
            lines = journal.lines("CONTAINER_NAME", "nim-" + entry["name"]) if journal else []
            self.report.note("note", "log", lines[-30:])
        self.report.note("note", "dockerd", self.engine.log())

    def _unit(self, name: str) -> Unit:
        return self.host.systemd.units["nim-%s.service" % name]

    # -- while they run -------------------------------------------------------------------------------

    def _memory(self) -> t.Dict[str, int]:
        return {gpu.uuid: gpu.memory_used_mib or 0 for gpu in observe_gpus(self.host).gpus}

    def _computed(self, model: NimModel, before: t.Mapping[str, int]) -> None:
        wanted, name = self.given[model.name], model.name
        with urllib.request.urlopen("http://127.0.0.1:%d/gpu" % model.port, timeout=60) as response:
            told = json.load(response)
        used = told["gpus"]
        self.report.check("%s computed right" % name, all(one["error"] < 1e-3 for one in used), told)
        same = {one["uuid"] for one in used} == set(wanted) and len(used) == len(wanted)
        self.report.check("%s computed on exactly the GPUs that it was given" % name, same, len(used))
        self.report.check("%s: GPUs in sight of NVML: those alone" % name, sorted(told["nvml"]) == sorted(wanted))
        seen = {gpu.uuid: gpu for gpu in observe_gpus(self.host).gpus}
        holders = [holder for holder in driver_holders(self.host) if holder.container == model.container]
        self.report.check("%s holds its GPUs" % name, holders, [holder.describe() for holder in holders])
        nodes = {device for holder in holders for device in holder.devices if re.fullmatch(r"/dev/nvidia\d+", device)}
        own = {"/dev/nvidia%d" % (seen[uuid].minor or 0) for uuid in wanted}
        self.report.check("%s holds no others" % name, nodes == own, sorted(nodes))
        for uuid in wanted:
            grown = (seen[uuid].memory_used_mib or 0) - before[uuid]
            what = "%s: memory of its GPU %d has grown" % (name, seen[uuid].index)
            self.report.check(what, grown >= HELD_MIB, "%d MiB" % grown)
            listed = {entry["pid"] for entry in seen[uuid].processes}
            what = "%s: the driver lists its process on GPU %d" % (name, seen[uuid].index)
            if listed:
                self.report.check(what, {one.pid for one in holders} & listed, sorted(listed))
            else:
                self.report.note("skipped", what, "it lists none here")
        configuration = (self.api.container(model.container) or {}).get("HostConfig") or {}
        self.report.note("note", "limits of the container", configuration.get("Ulimits"))
        self.report.same("%s: capabilities dropped" % name, configuration.get("CapDrop"), ["ALL"])
        pid = self.api.container(model.container)["State"]["Pid"]
        lines = (self.host.read_text("/proc/%d/mounts" % pid) or "").splitlines()
        mounts = {line.split()[1]: line.split()[3].split(",")[0] for line in lines}
        wanted_mounts = ("ro", "rw") if model.read_only else ("rw", None)
        self.report.same("%s: its root and /tmp" % name, (mounts.get("/"), mounts.get("/tmp")), wanted_mounts)

    def _nobody_else(self, before: t.Mapping[str, int]) -> None:
        taken = {uuid for uuids in self.given.values() for uuid in uuids}
        for gpu in observe_gpus(self.host).gpus:
            if gpu.uuid not in taken:
                grown = (gpu.memory_used_mib or 0) - before[gpu.uuid]
                self.report.check("GPU %d was given to nobody and is idle" % gpu.index, grown <= 64, "%d MiB" % grown)

    def _seen_by_health(self, outcome: Outcome) -> None:
        seen = {gpu.uuid: gpu for gpu in observe_gpus(self.host).gpus}
        for entry, found in zip(self.entries, outcome.models):
            name = entry["name"]
            keys = ("seconds_to_ready", "model_id", "version", "completion")
            self.report.check("%s is ready and completes" % name, found["ready"], {key: found[key] for key in keys})
            told = [one["uuid"] for one in found["gpus"]]
            self.report.check("nim_health: GPUs of %s" % name, told == self.given[name], told)
            for one in found["gpus"]:
                gpu = seen[one["uuid"]]
                near = abs((one["memory_used_mib"] or 0) - (gpu.memory_used_mib or 0)) <= 2048
                good = near and one["memory_used_mib"] >= HELD_MIB and one["memory_total_mib"] == gpu.memory_total_mib
                what = "nim_health: memory of GPU %s" % one["index"]
                self.report.check(what, good, "%s of %s MiB" % (one["memory_used_mib"], one["memory_total_mib"]))
            address = "http://127.0.0.1:%d/v1/metrics" % entry["port"]
            if self.report.same("nim_health: metrics of %s" % name, found["metrics_url"], address):
                with urllib.request.urlopen(found["metrics_url"], timeout=30) as response:
                    metrics = response.read().decode()
                counted = re.search(r"^gpu_memory_used_bytes\{.*\} (\d+)", metrics, re.MULTILINE)
                self.report.check(
                    "and they count the GPU's memory", counted and int(counted.group(1)) >= HELD_MIB << 20
                )

    def _seen_by_info(self, models: t.Sequence[NimModel]) -> None:
        info = gather(self.host, (), self.api)
        self.report.keep("gather.json", json.dumps(info, indent=1, sort_keys=True))
        states = {entry["name"]: (entry["state"], entry["ready"]) for entry in info["nim"]}
        self.report.same("gpu_host_info: services", states, {model.name: ("ready", True) for model in models})
        ports = {entry["port"] for entry in info["ports"]}
        self.report.check("gpu_host_info: ports", {model.port for model in models} <= ports, sorted(ports))
        self.report.check("gpu_host_info: Docker", info["docker"]["running"] and info["docker"]["cdi"], info["docker"])
        named = {holder["container"] for holder in info["holders"]}
        self.report.check("gpu_host_info: holders", {model.container for model in models} <= named, sorted(named))
        self.report.same("gpu_host_info: errors", info["errors"], {})

    def _seen_by_plan(self, models: t.Sequence[NimModel]) -> None:
        plan = self._plan(self.entries)
        self.report.keep("plan.json", json.dumps(plan, indent=1, sort_keys=True))
        self.report.check(
            "the plan finds all ready, and nothing to do", not plan["drift"], plan["changes"] or plan["errors"]
        )
        last = dict(
            self.entries[-1], environment=dict(self.entries[-1].get("environment") or {}, NIM_LOG_LEVEL="DEBUG")
        )
        plan = self._plan([*self.entries[:-1], last])
        disrupted = [change["what"] for change in plan["changes"] if change["disruption"] != "none"]
        self.report.same("another environment restarts that service alone", disrupted, [models[-1].unit])
        self.report.same("and is called a restart of it", plan["worst"], "restart_nim")
        # What the driver reserves is free for nobody.
        total = next(gpu.memory_total_mib or 0 for gpu in self.gpus if gpu.uuid in self.given[last["name"]])
        plan = self._plan([*self.entries[:-1], dict(last, gpu_memory="%dMiB" % total)])
        reasons = [error["reason"] for error in plan["errors"]]
        self.report.same("more memory than is free on its GPU is refused", reasons, ["gpu_memory"])
        self.report.note("note", "in these words", plan["errors"][0]["message"] if plan["errors"] else "")
        wish = dict(self.entries[-1], name="real-gpu-more", gpus=len(self.gpus), port=18099)
        plan = self._plan([*self.entries, wish])
        reasons = [error["reason"] for error in plan["errors"]]
        self.report.same("one model too many is refused", reasons, ["gpus_unavailable"])
        self.report.note("note", "its table", plan["errors"][0]["message"] if plan["errors"] else "")

    def _stays(self, models: t.Sequence[NimModel]) -> None:
        """Models in another order, one of them stopped and started: each keeps its GPUs."""
        instances = {model.name: self._instance(model) for model in models}
        self.report.same("a second run changes nothing", self._converge(self.entries), [])
        self._converge([dict(self.entries[0], state="stopped"), *self.entries[1:]])
        others = [model for model in models[1:] if self._instance(model) != instances[model.name]]
        self.report.same("the others run on while one is stopped", others, [])
        self._converge(list(reversed(self.entries)))
        for model in models:
            configured = json.loads(self.host.read_text("/etc/nim/%s.json" % model.name) or "{}")["gpus"]
            self.report.check("%s keeps its GPUs" % model.name, configured == self.given[model.name])
        outcome = self._health(self.entries)
        self.report.check("and all are ready again", all(found["ready"] for found in outcome.models))

    def _instance(self, model: NimModel) -> t.Tuple[str, str]:
        found = self.api.container(model.container) or {}
        state = found.get("State") or {}
        return str(found.get("Id")), str(state.get("StartedAt")) if state.get("Running") else "not running"

    def _adoption(self, model: NimModel) -> None:
        unit, instance = self._unit(model.name), self._instance(model)
        before = unit.said().count("is adopted")
        unit.kill()
        adopted = wait_for(lambda: unit.said().count("is adopted") > before, 30)
        self.report.check("a wrapper that was killed is started again and adopts its container", adopted)
        self.report.check("which has computed on", self._instance(model) == instance)
        outcome = self._health(self.entries)
        self.report.check("and it is ready", outcome.models[0]["ready"], outcome.models[0]["message"] or "")

    def _daemon_away(self, model: NimModel) -> None:
        unit, instance = self._unit(model.name), self._instance(model)
        networks = ((self.api.container(model.container) or {}).get("NetworkSettings") or {}).get("Networks") or {}
        address = networks["bridge"]["IPAddress"]
        self.engine.kill()
        away = wait_for(lambda: "Docker is away" in unit.said(), 30)
        self.report.check("the wrapper notices that Docker is away", away)
        # Not through the published port: on the loopback that is a process of the daemon's.
        ready = "http://%s:%d/v1/health/ready" % (address, model.container_port)
        with urllib.request.urlopen(ready, timeout=10) as answer:
            self.report.same("the service answers without the daemon", answer.status, 200)
        self.engine.start_again()
        back = wait_for(lambda: "goes on" in unit.said(), 60)
        self.report.check("the wrapper goes on", back, "" if back else unit.said()[-1000:] + self.engine.log())
        self.report.check("with the same container", self._instance(model) == instance)

    # -- the end --------------------------------------------------------------------------------------

    def _stop(self, models: t.Sequence[NimModel], before: t.Mapping[str, int]) -> None:
        logs = {model.name: self._unit(model.name) for model in models}
        began = time.monotonic()
        self._converge([dict(entry, state="absent") for entry in self.entries])
        self.report.note("note", "seconds to stop all", "%.1f" % (time.monotonic() - began))
        for model in models:
            self.report.same("%s: code of the stopped wrapper" % model.name, logs[model.name].status, 0)
            self.report.same("%s: its container" % model.name, self._instance(model)[0], "None")
            self.report.keep("%s.log" % model.name, logs[model.name].said())
        # The driver frees memory a moment after the process has gone.
        freed = wait_for(lambda: all(used <= before[uuid] + 64 for uuid, used in self._memory().items()), 20)
        self.report.check("the memory of the GPUs is free again", freed)
        names = {holder.container for holder in driver_holders(self.host)}
        self.report.check("no container holds a GPU", not names - {""}, sorted(names))
        left = [name for name in self.host.list_dir("/etc/nim") if name.startswith("real-gpu")]
        self.report.same("no configuration is left", left, [])

    def _too_large(self) -> None:
        """A model that does not fit into its GPU, with PyTorch's own words for it."""
        entry = self.entry(9, "too-large", 1)
        if "environment" not in entry:
            self.report.note("skipped", "a model that is too large", "no PyTorch")
            return
        entry["environment"] = dict(entry["environment"], REAL_GPU_TOO_LARGE="1")
        began = time.monotonic()
        try:
            self._converge([entry])
        except FleetError as error:
            self.report.check("it is started at least", False, error.message)
            return
        outcome = self._health([entry])
        failures = [failure for _target, failure in outcome.failures]
        if self.report.check(
            "a model that is too large is reported", failures, "after %.1f s" % (time.monotonic() - began)
        ):
            failure = failures[0]
            self.report.check("with its cause", failure.signature, "%s: %s" % (failure.signature, failure.sentence))
            self.report.keep("too-large.log", "\n".join(failure.lines))
        plan = self._plan([entry])
        said = [change["why"] for change in plan["changes"] if change["resource"] == "nim_health"]
        self.report.check("the plan says so, too", said and "GPU memory" in said[0], said)
        unit = self._unit(entry["name"])
        failed = wait_for(lambda: unit.restarts > 0 or unit.active == "failed", 60)
        self.report.check("its wrapper ends with a failure", failed, unit.said().splitlines()[-1:])
        self._converge([dict(entry, state="absent")])


def grantable_limits() -> t.Optional[t.Dict[str, int]]:
    """Of the collection's default limits those that can be set here; None when all can."""
    wanted = {"memlock": (resource.RLIMIT_MEMLOCK, -1), "nofile": (resource.RLIMIT_NOFILE, 65536)}
    wanted["stack"] = (resource.RLIMIT_STACK, 67108864)
    good: t.Dict[str, int] = {}
    for name, (which, value) in wanted.items():
        _soft, hard = resource.getrlimit(which)
        try:
            resource.setrlimit(which, (resource.getrlimit(which)[0], resource.RLIM_INFINITY if value < 0 else value))
            good[name] = value
        except (OSError, ValueError):
            continue
        finally:
            try:
                resource.setrlimit(which, (resource.getrlimit(which)[0], hard))
            except (OSError, ValueError):
                pass
    return None if len(good) == len(wanted) else good
