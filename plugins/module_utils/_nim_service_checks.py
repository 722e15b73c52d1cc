# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What keeps a NIM service from being set up or started on its host."""

from __future__ import annotations

import ipaddress
import typing as t

from ._disk_space import FileSystem, Need, check_space
from ._dockerd import version_tuple
from ._errors import FleetError
from ._gpu import Gpu
from ._gpu_health import gpu_label
from ._listeners import PROXY, Listener
from ._nim_family import BACKEND_PORT_VARIABLE
from ._nim_models import NimModel, addresses_overlap, probe_address
from ._nim_paths import container_name
from ._nim_service_state import GpuUser, HostState, ImageState, ports_of
from ._verdict import REFUSED, WARNING, Verdict

#: First version of the engine that hands out CDI devices, where its feature is switched on.
CDI_ENGINE = (25,)


def missing_prerequisite(model: NimModel, state: HostState, injection: str) -> tuple[str, str]:
    """Reason and message of what a model needs and the host does not have yet; both empty when nothing is missing."""
    if not state.docker:
        return "docker_unavailable", state.docker_problem
    if not state.gpus:
        return "no_gpu", state.gpu_problem
    if injection == "runtime" and "nvidia" not in state.runtimes:
        return "runtime_missing", "Docker has no runtime 'nvidia'; set up the NVIDIA Container Toolkit first."
    if injection == "cdi" and not state.cdi:
        return "cdi_off", cdi_problem(state)
    if model.image not in state.images:
        return (
            "image_missing",
            "Image %s is not on this host; pull it with gpu_fleet.nim.nim_image first." % model.image,
        )
    message = unreadable_directory(model, state)
    return ("directory_missing", message) if message else ("", "")


def cdi_problem(state: HostState) -> str:
    """Why Docker, as it runs, hands out no CDI devices, and what to do."""
    if version_tuple(state.docker_version) < CDI_ENGINE:
        return (
            "gpu_injection = cdi, and Docker Engine %s has no CDI; use Engine 25.0 or newer, or set gpu_injection "
            "(nim_gpu_injection) to runtime." % (state.docker_version or "of this host")
        )
    return (
        "gpu_injection = cdi, and Docker's CDI feature is off; set features.cdi in daemon.json (role "
        "nvidia_container_toolkit with nvidia_container_toolkit_cdi: true), or set gpu_injection (nim_gpu_injection) to "
        "runtime."
    )


def unreadable_directory(model: NimModel, state: HostState) -> str:
    """Why files that must be there already could not be read by the container; empty when they can."""
    for option in ("weights_directory", "lora_directory"):
        message = _unreadable(option, getattr(model, option), model, state)
        if message:
            return message
    return ""


def check_mask(model: NimModel, state: HostState) -> None:
    if state.target_masked:
        raise FleetError(
            "unit_masked",
            "nim.target, which starts the services at boot, is masked, which somebody did to keep them from starting; "
            "run 'systemctl unmask nim.target'.",
        )
    if state.service(model.name).masked:
        raise FleetError(
            "unit_masked",
            "%s is masked, which somebody did to keep it from starting; run 'systemctl unmask %s', or set the "
            "model to state absent." % (model.unit, model.unit),
        )


def check_port(model: NimModel, models: t.Sequence[NimModel], state: HostState) -> None:
    """Refuse a model that is about to start on ports that somebody else holds.

    Args:
        models: All models of the host: one of them may give the port up in this very run.

    Raises:
        FleetError: ``port_in_use``.
    """
    wanted = {other.container: other for other in models}
    for listener in state.listeners:
        option = _collision(model, listener, state.images)
        if not option or listener.container == model.container:
            continue
        if not state.docker and (listener.command == PROXY or listener.unit.startswith("docker-")):
            # Without the daemon nobody knows whose container it is; it may be the model's own.
            continue
        service = state.service(model.name)
        if listener.stray and not listener.leftover and service.alive:
            # Its own container ends and is started again and again; what is done to the unit ends that.
            continue
        other = wanted.get(listener.container)
        if other is not None and (other.state != "started" or not _collision(other, listener, state.images)):
            continue
        who, remedy = listener.describe(), "stop that first"
        if listener.leftover:
            who += ", which Docker has left behind for a container that is gone"
            who += " (most likely an earlier %s)" % model.container if service.exists else ""
            remedy = "end it with 'kill %s'" % listener.pid
        raise FleetError(
            "port_in_use",
            "Model %s cannot have port %d on %s%s: it is held by %s; %s, or give the model another port%s. Nothing was "
            "changed."
            % (
                model.name,
                listener.port,
                model.bind_address,
                "" if option == "port" else " for its engine",
                who,
                remedy,
                "" if option == "port" else " there (%s)" % option,
            ),
            port=listener.port,
            address=model.bind_address,
            pid=listener.pid,
            command=listener.command,
            container=listener.container,
        )


def check_gpu_health(model: NimModel, uuids: t.Sequence[str], leaving: t.Collection[str], state: HostState) -> None:
    """Refuse a model that is about to start on GPUs that are not fit for service.

    Args:
        uuids: GPUs and MIG devices that the model gets.
        leaving: Names of services that are stopped before.

    Raises:
        FleetError: With the reason of the first verdict that refuses.
    """
    refused = unfit(model, uuids, state, leaving)
    if refused:
        raise FleetError(
            refused[0].reason,
            "Model %s cannot be started: %s %s Or accept it knowingly with "
            "gpu_health (nim_gpu_health) = warn. Nothing was changed."
            % (
                model.name,
                " ".join(verdict.sentence for verdict in refused),
                _way_out(model, state) if any(verdict.gpu for verdict in refused) else "",
            ),
            model=model.name,
            verdicts=[verdict.as_dict() for verdict in refused],
        )


def _way_out(model: NimModel, state: HostState) -> str:
    """How a model comes to other GPUs than those that are not fit for it."""
    if model.gpus is not None and not isinstance(model.gpus, int):
        return "Other GPUs can be given to it with gpus."
    if state.service(model.name).uses_gpus:
        return "It is not moved while it serves: 'systemctl stop nim-%s' lets it move to other GPUs." % model.name
    return "No other GPU of this host is free for it."


def unfit(model: NimModel, uuids: t.Sequence[str], state: HostState, leaving: t.Collection[str] = ()) -> list[Verdict]:
    """Verdicts that speak against the GPUs of a model, and those on all of the host's GPUs together.

    Args:
        leaving: Names of services that are stopped before.
    """
    gpus = {gpu.uuid for gpu, _device in _devices(uuids, state)}
    services = [state.service(name) for name in {model.name, *leaving}]
    # Those who have them now give them up before the model is started.
    given_up = {gpu.uuid for service in services if service.running for gpu, _device in _devices(service.gpus, state)}
    return [
        verdict
        for verdict in state.health
        if verdict.verdict == REFUSED
        and (verdict.gpu in gpus or (verdict.check == "nvml" and not verdict.gpu))
        and not (verdict.gpu in given_up and verdict.reason == "compute_mode_busy")
    ]


def _devices(uuids: t.Sequence[str], state: HostState) -> list[tuple[Gpu, t.Mapping[str, t.Any] | None]]:
    """Each GPU, or the MIG device and its GPU."""
    found: list[tuple[Gpu, t.Mapping[str, t.Any] | None]] = []
    for uuid in uuids:
        for gpu in state.gpus:
            if gpu.uuid == uuid:
                found.append((gpu, None))
            found += [(gpu, device) for device in gpu.mig_devices if device.get("uuid") == uuid]
    return found


def check_gpu_memory(model: NimModel, uuids: t.Sequence[str], leaving: t.Collection[str], state: HostState) -> None:
    """Refuse a model that is about to start where memory is short. A GPU that does not tell is not refused.

    Args:
        uuids: GPUs and MIG devices that the model gets.
        leaving: Names of services that are stopped before; what their containers hold counts as free.

    Raises:
        FleetError: ``gpu_memory``.
    """
    needed = model.gpu_memory_mib
    if needed is None:
        return
    for gpu, device in _devices(uuids, state):
        if device is not None:
            total, used = device.get("memory_total_mib"), device.get("memory_used_mib")
            # Which of a GPU's processes run on which of its MIG devices is not told.
            free = total if leaving else (total - used if total is not None and used is not None else None)
            users: list[GpuUser] = []
        else:
            total, free, users = gpu.memory_total_mib, _free_mib(gpu, leaving, state), _staying(gpu, leaving, state)
        if free is None or free >= needed:
            continue
        who = ", held by %s" % ", ".join(user.describe() for user in users) if users else ""
        raise FleetError(
            "gpu_memory",
            "Model %s needs %d MiB of free memory (gpu_memory) on each of its GPUs, and %s%s has %d MiB of %s MiB free%s; "
            "%s. Nothing was changed."
            % (
                model.name,
                needed,
                gpu_label(gpu),
                "" if device is None else " on its MIG device %s" % device.get("uuid"),
                free,
                total,
                who,
                "stop that, or give the model other GPUs (gpus)"
                if users
                else "give the model other GPUs (gpus), or more of them with a profile that needs less of each",
            ),
            model=model.name,
            gpu=gpu.uuid,
            needed_mib=needed,
            free_mib=free,
        )


def shared_gpus(
    model: NimModel, uuids: t.Sequence[str], leaving: t.Collection[str], state: HostState
) -> t.Iterator[Verdict]:
    """A warning for each GPU on which others hold memory while nobody says how much the model needs.

    Args:
        uuids, leaving: As for :func:`check_gpu_memory`, which judges models that say it.
    """
    if model.gpu_memory is not None:
        return
    for gpu, device in _devices(uuids, state):
        users = [] if device is not None else _staying(gpu, leaving, state)
        if users:
            yield Verdict(
                "gpu_memory",
                WARNING,
                "Model %s gets %s, on which memory is held by %s, and how much the model needs is not known."
                % (model.name, gpu_label(gpu), ", ".join(user.describe() for user in users)),
                "stop that, give the model other GPUs (gpus), or say what it needs (gpu_memory)",
                "gpu_shared",
                subject=model.name,
            )


def _free_mib(gpu: Gpu, leaving: t.Collection[str], state: HostState) -> int | None:
    if gpu.memory_free_mib is None:
        return None
    users = [user for user in state.gpu_users if user.gpu == gpu.uuid]
    if not users and any(gpu.uuid in state.service(name).gpus for name in leaving):
        # Processes in other PID namespaces are not listed.
        return gpu.memory_free_mib + (gpu.memory_used_mib or 0)
    staying = _staying(gpu, leaving, state)
    if users and not staying:
        return gpu.memory_free_mib + (gpu.memory_used_mib or 0)
    return gpu.memory_free_mib + sum(user.used_mib or 0 for user in users if user not in staying)


def _staying(gpu: Gpu, leaving: t.Collection[str], state: HostState) -> list[GpuUser]:
    gone = {container_name(name) for name in leaving}
    return [user for user in state.gpu_users if user.gpu == gpu.uuid and user.container not in gone]


def check_disk(models: t.Sequence[NimModel], complete: t.Collection[str], state: HostState) -> None:
    """Refuse models that are about to start when their files do not fit.

    Args:
        models: Models that start.
        complete: Names of those whose files were all fetched already.

    Raises:
        FleetError: ``disk_full``.
    """
    names = {model.name for model in models} - set(complete)
    check_space(
        FileSystem(
            system.mount,
            system.free,
            tuple(Need(need.directory, need.size, "model " + need.what) for need in system.needs if need.what in names),
        )
        for system in state.spaces
    )


def check_address(model: NimModel, state: HostState) -> None:
    """Docker cannot publish a port on an address that the host has not; nobody would ever reach the service."""
    address = probe_address(model.bind_address)
    if not state.addresses or address in state.addresses or address.startswith("127."):
        return
    shown = [known for known in state.addresses if not ipaddress.ip_address(known).is_link_local]
    raise FleetError(
        "no_such_address",
        "Model %s cannot listen on bind_address = %s: the host has %s; set bind_address to 0.0.0.0 or to one of its "
        "addresses (%s). Nothing was changed."
        % (
            model.name,
            model.bind_address,
            "IPv6 switched off" if address == "::1" else "no such address",
            ", ".join(shown[:8]),
        ),
        address=model.bind_address,
    )


def check_backend_ports(models: t.Sequence[NimModel], images: t.Mapping[str, ImageState]) -> None:
    """Only the image tells whether a model has a second port, so this cannot be found on the controller."""
    taken: list[tuple[NimModel, int, str]] = []
    for model in models:
        if model.state == "absent":
            continue
        for port, option in ports_of(model, images):
            for other, other_port, other_option in taken:
                if port != other_port or (option == other_option == "port"):
                    # Two that want one port for the API were refused before any host was touched.
                    continue
                if not addresses_overlap(model.bind_address, other.bind_address):
                    continue
                named = "model %s" % other.name if other is not model else "the same model"
                raise FleetError(
                    "invalid_option",
                    "Model %s: %s = %d: is %s of %s too, because network_mode host shares the host's ports and the "
                    "engine of %s listens beside its API; set another port, or environment.%s."
                    % (
                        model.name,
                        option,
                        port,
                        "the port" if other_option == "port" else "the engine's port",
                        named,
                        model.name if option != "port" else other.name,
                        BACKEND_PORT_VARIABLE,
                    ),
                )
            taken.append((model, port, option))


def _collision(model: NimModel, listener: Listener, images: t.Mapping[str, ImageState]) -> str:
    """The option whose port a listener holds; empty when it holds none of the model's."""
    if not addresses_overlap(model.bind_address, listener.address):
        return ""
    return next((option for port, option in ports_of(model, images) if port == listener.port), "")


def _unreadable(option: str, path: str | None, model: NimModel, state: HostState) -> str:
    """Why the container's user could not read a directory that must be there already; empty when it can."""
    if not path:
        return ""
    found = state.paths.get(path)
    if found is None or not found.is_dir:
        return "%s = %s does not exist as a directory on this host; put the files there first." % (option, path)
    if model.uid == 0:
        needed = 0o000
    elif found.uid == model.uid:
        needed = 0o500
    elif found.gid == model.gid:
        needed = 0o050
    else:
        needed = 0o005
    if found.mode & needed != needed:
        return "%s = %s (%04o owner %d:%d) cannot be read by the container's user %d:%d; use chmod or chown." % (
            option,
            path,
            found.mode,
            found.uid,
            found.gid,
            model.uid,
            model.gid,
        )
    return ""
