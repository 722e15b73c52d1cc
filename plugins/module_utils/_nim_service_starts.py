# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Which NIM services must be started or restarted and why, and what has to be settled before that."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass
from functools import partial

from ._gpu_wishes import check_profile_of, given_gpus, requested_count
from ._nim_container import differences, restart_policy
from ._nim_models import NimModel
from ._nim_paths import MAINTENANCE_FILE, key_pipe, unit_name
from ._nim_service_checks import (
    check_address,
    check_disk,
    check_gpu_health,
    check_gpu_memory,
    check_port,
)
from ._nim_service_state import RESOURCE, HostState, ImageState, ServiceState
from ._nim_unit import was_fetched
from ._nim_unit_key import arguments_with_key
from ._resource import Change, Disruption

Json = t.Dict[str, t.Any]


@dataclass(frozen=True)
class StartCheck:
    """One question that is settled before a service is started.

    Attributes:
        model: Name of the model; empty when it is about several.
        run: Raises :class:`FleetError` when the answer is no.
        passed: What is true otherwise, as a clause; empty when that is not worth a word.
    """

    name: str
    model: str
    run: t.Callable[[], None]
    passed: str = ""


@dataclass(frozen=True)
class Start:
    """A service that does not run what it should.

    Attributes:
        kind: ``start`` or ``restart``.
    """

    name: str
    kind: str
    why: str


def idle(models: t.Sequence[NimModel], state: HostState) -> set[str]:
    """Names of models that shall run and do not."""
    services = [state.service(model.name) for model in models if model.state == "started"]
    return {service.name for service in services if not service.running and not service.alive}


def leaving(models: t.Sequence[NimModel], starting: t.Collection[str]) -> set[str]:
    """Names of services whose containers end before others start."""
    return {*starting} | {model.name for model in models if model.state != "started"}


def start_checks(
    models: t.Sequence[NimModel],
    starting: t.Collection[str],
    gpus: t.Mapping[str, t.Sequence[str]],
    fetched: t.Collection[str],
    state: HostState,
    *,
    health: bool,
) -> t.Iterator[StartCheck]:
    """What keeps services from being started is found before anything is touched; those that run are left alone.

    Args:
        models: All models of the host.
        starting: Names of those that are to be started.
        gpus: Given to each model; a model without an entry is not judged by them.
        fetched: Names of models whose files are there.
        health: Whether no service may be started on a GPU that is not fit for it.
    """
    if state.maintenance:
        # Nothing will be started; the run after the maintenance asks.
        return
    begun = [model for model in models if model.name in starting]
    ending = leaving(models, starting)
    for model in begun:
        port = "port %d on %s" % (model.port, model.bind_address)
        yield StartCheck("address", model.name, partial(check_address, model, state))
        yield StartCheck("port", model.name, partial(check_port, model, models, state), "%s is free" % port)
        given = gpus.get(model.name, ())
        if health:
            fit = "its GPUs are fit for service" if given else ""
            yield StartCheck("gpu_health", model.name, partial(check_gpu_health, model, given, ending, state), fit)
        yield StartCheck("gpu_memory", model.name, partial(check_gpu_memory, model, given, ending, state))
        if given:
            count = requested_count(model.gpus, len(state.gpus))
            here = given_gpus(given, state.gpus)
            profile = partial(check_profile_of, model, state.profiles(model), here, state.devices, count)
            yield StartCheck("profile", model.name, profile)
    yield StartCheck("disk", "", partial(check_disk, begun, fetched, state))


def fetched(model: NimModel, configurations: t.Mapping[str, Json], state: HostState) -> bool:
    """Whether the wrapper has fetched all files of a model, as it will ask itself before the start."""
    return was_fetched(state.service(model.name).fetched, configurations.get(model.name, {}).get("download") or {})


def due_starts(
    models: t.Sequence[NimModel], state: HostState, configurations: t.Mapping[str, Json], *, new_key: bool
) -> list[Start]:
    """Every service that does not run what it should.

    Args:
        configurations: What the configuration file of each model must hold.
        new_key: Whether another NGC key is to be stored than the one that is there.
    """
    found = []
    for model in models:
        if model.state != "started":
            continue
        service = state.service(model.name)
        spec = str(configurations[model.name]["spec"])
        other = _differences(model, configurations[model.name], state.images[model.image], service)
        if service.running:
            if service.spec != spec:
                found.append(Start(model.name, "restart", "the container runs something else"))
            elif other:
                why = "the container was made or changed by hand: %s" % ", ".join(other)
                found.append(Start(model.name, "restart", why))
            elif service.silent:
                found.append(Start(model.name, "restart", service.silent))
            elif not service.alive:
                found.append(Start(model.name, "start", "the unit is %s, the container goes on" % service.active))
            elif service.lost_gpus:
                why = "the container has lost its GPUs, as systemctl daemon-reload does to it: %s" % service.lost_gpus
                found.append(Start(model.name, "restart", why))
        elif not service.alive:
            why = "the unit failed" if service.active == "failed" else "the service does not run"
            found.append(Start(model.name, "start", why))
        elif service.paused:
            continue
        elif service.phase == "ready":
            # The unit's main process would have said another phase within moments.
            why = (
                "its container has ended, which its unit has not seen" if service.container else "its container is gone"
            )
            found.append(Start(model.name, "restart", why))
        elif service.started_spec != spec:
            found.append(Start(model.name, "restart", "the unit is starting something else"))
        elif new_key and service.failures:
            found.append(Start(model.name, "restart", "its starts failed, and there is a new key"))
    return found


def _differences(model: NimModel, configuration: Json, image: ImageState, service: ServiceState) -> list[str]:
    """What is other in the container than it was made with."""
    known = [*image.variables, *configuration["secret_environment"]]
    made = [configuration["create"]]
    if configuration["key_in_service"]:
        # What the wrapper does when the host has a key.
        made.append(arguments_with_key(configuration["key_in_service"], key_pipe(model.name)))
    return min((differences(create, service.inspected, known) for create in made), key=len)


def container_changes(models: t.Sequence[NimModel], starting: t.Collection[str], state: HostState) -> list[Change]:
    """What can be mended in a container that goes on."""
    changes = []
    for model in models:
        service = state.service(model.name)
        if model.state != "started" or model.name in starting:
            continue
        data = {"container": model.container}
        if service.paused:
            why = "somebody has paused the container"
            changes.append(Change(RESOURCE, model.unit, "paused", "running", why, Disruption.NONE, "unpause", data))
        policy = restart_policy(service.inspected)
        if policy != "no":
            what = "restart policy of container %s" % model.container
            why = "systemd restarts it, and there must not be two who do"
            changes.append(Change(RESOURCE, what, policy, "no", why, Disruption.NONE, "restart_policy", data))
    return changes


def start_changes(
    models: t.Sequence[NimModel], starts: t.Sequence[Start], gpus: t.Mapping[str, t.Sequence[str]], state: HostState
) -> list[Change]:
    """The starts as changes; one that gives a service other GPUs says so.

    Args:
        gpus: Given to each model.
    """
    names = [start.name for start in starts]
    # systemd stops a container only for a unit that is up; another one would be taken over or waited for.
    strangers = [
        start.name
        for start in starts
        if start.kind == "restart" and state.service(start.name).running and not state.service(start.name).alive
    ]
    timeouts = {model.name: model.stop_timeout for model in models if model.name in strangers}
    blocked = None
    if state.maintenance:
        blocked = "%s exists: the host is under maintenance; remove the file to let services start" % (MAINTENANCE_FILE)
    changes = []
    for start in starts:
        service = state.service(start.name)
        changes.append(
            Change(
                RESOURCE,
                unit_name(start.name),
                "started" if service.running else (service.active or None),
                "started" if start.kind == "start" else "restarted",
                start.why + _new_gpus(gpus[start.name], start.name, state),
                Disruption.RESTART_NIM if service.running and start.kind == "restart" else Disruption.NONE,
                "restart",
                {"names": names, "strangers": timeouts},
                blocked=blocked,
            )
        )
    # Last, because it would start every enabled unit that does not run yet.
    if any(model.state == "started" for model in models) and not state.target_active and not blocked:
        changes.append(
            Change(RESOURCE, "nim.target", "inactive", "active", "groups the services", action="start_target")
        )
    return changes


def _new_gpus(gpus: t.Sequence[str], name: str, state: HostState) -> str:
    """``; on GPU 0, 1`` for a service that gets others than it has, and why; empty where they stay."""
    present = state.service(name).gpus
    if sorted(gpus) == sorted(present):
        return ""
    index = {gpu.uuid: str(gpu.index) for gpu in state.gpus}
    left = ["GPU %s %s" % (index[uuid], why) for uuid, why in state.unfit_gpus.items() if uuid in present]
    return "; on GPU %s%s" % (
        ", ".join(index.get(uuid, uuid) for uuid in gpus),
        ", because " + " and ".join(left) if left else "",
    )
