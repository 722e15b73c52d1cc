# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What a host has of NIM services, and what they depend on."""

from __future__ import annotations

import os
import re
import typing as t
from dataclasses import dataclass, field, replace

from ._disk_space import FileSystem, Need, file_systems, used_bytes
from ._docker_api import DockerApi
from ._errors import FleetError
from ._gpu import Gpu
from ._gpu_health import KERNEL_LINES, complaint, gpu_health, needs_kernel_log
from ._gpu_holders import parse_cgroup
from ._gpu_inventory import GpuInventory, observe_gpus
from ._gpu_loss import last_daemon_reload, lost_gpus
from ._gpu_placement import Wish, topology_matters
from ._gpu_wishes import device_ids, names_profile, wish_of
from ._host import FileStat, Host
from ._image_record import PinnedImage, read_record
from ._image_reference import ImageReference
from ._listeners import Listener, find_listeners, own_addresses
from ._ngc_key import fingerprint, key_in_environment, printable
from ._nim_family import BACKEND_PORT_VARIABLE, Family, family_of_image
from ._nim_models import NAME_LABEL, NimModel
from ._nim_paths import (
    BASE_DIRECTORY,
    CONFIGURATION_DIRECTORY,
    KEY_FILE,
    MAINTENANCE_FILE,
    RUNTIME_DIRECTORY,
    SERVICE_NAME,
    STATE_DIRECTORY,
    UNIT_DIRECTORY,
    WRAPPER,
    configuration_path,
    configured_services,
    container_name,
    download_name,
    secret_path,
    unit_name,
)
from ._nim_process_state import parse_time
from ._nim_silence import why_silent
from ._nim_unit_docker import SPEC_LABEL
from ._own_state import read_own_state
from ._registry_image import foreign_architecture
from ._systemd import properties_of_units
from ._untrusted import json_object, strings, whole_number
from ._verdict import REFUSED, Verdict

if t.TYPE_CHECKING:
    from ._gpu_topology import Topology
    from ._nim_manifest import Manifest
    from ._nim_profiles import Profile

#: Name of the resource that its changes carry.
RESOURCE = "nim_service"

#: Further looks, a second apart, for the container of a docker-proxy.
PROXY_LOOKS = 3

Json = t.Dict[str, t.Any]


@dataclass(frozen=True)
class ImageState:
    """A pulled image.

    Attributes:
        reference: How ``docker create`` is told: by digest where Docker knows it, otherwise by id.
        command: The image's own default command.
        manifest: Its profiles; looked at only for a model that names one, and None where they cannot be read.
        variables: Names of the variables that the image itself sets.
        entrypoint: What runs it.
    """

    identifier: str
    reference: str
    digest: str
    family: Family
    command: tuple[str, ...] = ()
    manifest: Manifest | None = None
    variables: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServiceState:
    """What the host has under one name.

    Attributes:
        active: systemd's ActiveState; empty when the unit is not known.
        enabled: systemd's UnitFileState.
        running: Whether the container runs.
        paused: Whether somebody has paused it.
        inspected: ``docker inspect`` of the container while it runs or is paused.
        given_gpus: UUIDs that the container was made with, or the one that fetches the model's files.
        silent: Why it has to be restarted although it runs, see :mod:`._nim_silence`; empty for most.
        spec: What the container runs, by its label; empty without a container.
        started_spec: What the wrapper is starting or running, by its own word.
        failures: Starts that failed in a row.
        lost_gpus: What NVML says inside the container when it has lost its GPUs.
        fetched: What the wrapper has noted about the fetching of the model's files.
        fetched_damage: Why that note cannot be read, as a sentence; it counts as empty then, as it does for the wrapper.
        brought: Whether its cache holds files although nothing was fetched by the wrapper, which then gets along without more.
    """

    name: str
    unit_text: str | None = None
    configuration_text: str | None = None
    configuration: Json = field(default_factory=dict)
    masked: bool = False
    active: str = ""
    enabled: str = ""
    need_reload: bool = False
    container: bool = False
    running: bool = False
    paused: bool = False
    inspected: Json = field(default_factory=dict, repr=False)
    given_gpus: tuple[str, ...] = ()
    silent: str = ""
    downloading: bool = False
    spec: str = ""
    started_spec: str = ""
    phase: str = ""
    failures: int = 0
    lost_gpus: str = ""
    secret_text: str | None = field(default=None, repr=False)
    secret_safe: bool = True
    fetched: Json = field(default_factory=dict)
    fetched_damage: str = ""
    brought: bool = False

    @property
    def exists(self) -> bool:
        files = (self.unit_text, self.configuration_text, self.secret_text)
        return any(text is not None for text in files) or self.container or self.masked

    @property
    def alive(self) -> bool:
        """Whether systemd keeps it up or is about to."""
        return self.active in ("active", "activating", "reloading", "deactivating")

    @property
    def uses_gpus(self) -> bool:
        """Whether it serves, or is about to: a move to other GPUs would take something away."""
        return self.running or self.paused or self.downloading

    @property
    def gpus(self) -> tuple[str, ...]:
        """UUIDs by its file; by its container where the file is lost, or no longer names those it was made with."""
        listed = tuple(strings(self.configuration.get("gpus")))
        made = " ".join(strings(self.configuration.get("create")))
        own = self.spec == self.configuration.get("spec") and all(uuid in made for uuid in self.given_gpus)
        return self.given_gpus if self.given_gpus and (own or not listed) else listed


@dataclass(frozen=True)
class GpuUser:
    """A process that computes on a GPU; ``container`` is empty outside of containers."""

    gpu: str
    pid: int
    command: str
    container: str
    used_mib: int | None

    def describe(self) -> str:
        """``python3 (pid 812) of container trainer: 80000 MiB``"""
        text = "%s (pid %d)" % (self.command or "a process", self.pid)
        if self.container:
            text += " of container %s" % self.container
        return text + (": %d MiB" % self.used_mib if self.used_mib is not None else "")


@dataclass(frozen=True)
class HostState:
    """One look at everything that the services of a host consist of or depend on.

    Attributes:
        cdi: Whether Docker's CDI feature is on.
        paths: Owner and mode of directories and files that are managed or needed; None when absent.
        files: Content of the files that all services share; None when absent.
        foreign_files: Cache directory -> whether something in it belongs to another user than its model runs as.
        health: Verdicts on the GPUs.
        gpu_users: Who computes on them.
        spaces: File systems for the files of models that do not run, by the model's name.
    """

    docker: bool = False
    docker_problem: str = ""
    docker_version: str = ""
    cgroup_driver: str = ""
    runtimes: tuple[str, ...] = ()
    cdi: bool = False
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str = ""
    maintenance: bool = False
    services: t.Mapping[str, ServiceState] = field(default_factory=dict)
    images: t.Mapping[str, ImageState] = field(default_factory=dict)
    paths: t.Mapping[str, FileStat | None] = field(default_factory=dict)
    files: t.Mapping[str, str | None] = field(default_factory=dict)
    foreign_files: t.Mapping[str, bool] = field(default_factory=dict)
    target_masked: bool = False
    target_enabled: bool = False
    target_active: bool = False
    target_need_reload: bool = False
    #: For comparing; what of it may be printed is the other.
    key_fingerprint: str | None = None
    key_printable: str | None = None
    key_safe: bool = True
    listeners: tuple[Listener, ...] = ()
    addresses: tuple[str, ...] = ()
    endangered: tuple[str, ...] = ()
    health: tuple[Verdict, ...] = ()
    gpu_users: tuple[GpuUser, ...] = ()
    spaces: tuple[FileSystem, ...] = ()
    devices: t.Mapping[str, str] = field(default_factory=dict)
    topology: Topology | None = None

    def service(self, name: str) -> ServiceState:
        return self.services.get(name) or ServiceState(name)

    def wishes(self, models: t.Sequence[NimModel]) -> list[Wish]:
        """What models ask of the GPUs."""
        found = []
        for model in models:
            service = self.service(model.name)
            found.append(wish_of(model, self.profiles(model), service.gpus, stays=service.uses_gpus))
        return found

    @property
    def unfit_gpus(self) -> dict[str, str]:
        """What is wrong with the GPUs that are not fit for service, as a clause, by UUID."""
        ours = {uuid for service in self.services.values() if service.uses_gpus for uuid in service.gpus}
        found: dict[str, list[str]] = {}
        for gpu in self.gpus:
            for verdict in self.health:
                # That a service of ours holds it says nothing against it.
                held = verdict.reason == "compute_mode_busy" and gpu.uuid in ours
                if gpu.uuid and verdict.gpu == gpu.uuid and verdict.verdict == REFUSED and not held:
                    found.setdefault(gpu.uuid, []).append(complaint(verdict, gpu))
        return {uuid: "; it ".join(clauses) for uuid, clauses in found.items()}

    def profiles(self, model: NimModel) -> tuple[Profile, ...] | None:
        """Profiles of a model's image, where they are known for certain."""
        image = self.images.get(model.image)
        return image.manifest.profiles if image is not None and image.manifest is not None else None

    def unlisted(self, models: t.Sequence[NimModel]) -> dict[str, tuple[str, ...]]:
        """GPUs of the services that are not in the list."""
        listed = {model.name for model in models}
        return {name: service.gpus for name, service in self.services.items() if name not in listed}


def observe_services(
    host: Host, api: DockerApi, models: t.Sequence[NimModel], *, remove_all: bool = False
) -> HostState:
    """One look, without a change.

    Args:
        models: Models that the host shall have.
        remove_all: They shall all go; then nothing is looked at that only a running model needs.
    """
    problem, info, version, containers, inspected = _look_at_docker(api)
    wanted = [model for model in models if model.state != "absent" and not remove_all]
    inventory = observe_gpus(host) if wanted else None
    names = _names(host, models, containers)
    wanted_units = ["nim.target", *map(unit_name, sorted(names))]
    units = properties_of_units(host, wanted_units, "ActiveState", "UnitFileState", "NeedDaemonReload")
    by_name = {str(name).lstrip("/"): entry for entry in containers for name in entry.get("Names") or []}
    key = key_in_environment(host.read_text(KEY_FILE))
    key_stat = host.stat(KEY_FILE)
    paths = [BASE_DIRECTORY, STATE_DIRECTORY, CONFIGURATION_DIRECTORY, os.path.dirname(WRAPPER)]
    images = _images(host, api, wanted) if not problem else {}
    for model in wanted:
        paths += [model.cache_directory]
        paths += [path for path in (model.weights_directory, model.lora_directory) if path]
        paths += ["%s/%s" % (UNIT_DIRECTORY, model.unit), configuration_path(model.name)]
    shared = (WRAPPER, UNIT_DIRECTORY + "/nim.target", UNIT_DIRECTORY + "/nim.slice")
    target = units.get("nim.target", {})
    by_id = {str(entry.get("Id", "")): entry for entry in inspected}
    services = {name: _service(host, name, units.get(unit_name(name), {}), by_name, by_id) for name in sorted(names)}
    for model in wanted:
        service = services[model.name]
        services[model.name] = replace(
            service, silent=_silent(host, model, service), brought=_brought(host, model, service)
        )
    active = [entry for entry in inspected if (entry.get("State") or {}).get("Status") != "paused"]
    endangered = _endangered(host, version, info, active)
    if inventory and inventory.gpus:
        for name, said in _lost_gpus(host, names, endangered, active).items():
            services[name] = replace(services[name], lost_gpus=said)
    state = HostState(
        docker=not problem,
        docker_problem=problem,
        docker_version=version,
        cgroup_driver=str(info.get("CgroupDriver", "")),
        runtimes=tuple(sorted(info.get("Runtimes") or {})),
        cdi=bool(info.get("CDISpecDirs")),
        gpus=inventory.gpus if inventory else (),
        gpu_problem=_gpu_problem(inventory) if inventory else "",
        maintenance=host.exists(MAINTENANCE_FILE),
        services=services,
        images=images,
        paths={path: host.stat(path) for path in (*paths, *shared)},
        files={path: host.read_text(path) for path in shared},
        foreign_files={model.cache_directory: _has_foreign_files(host, model) for model in wanted},
        target_masked=target.get("UnitFileState", "").startswith("masked"),
        target_enabled=target.get("UnitFileState") == "enabled",
        target_active=target.get("ActiveState") == "active",
        target_need_reload=target.get("NeedDaemonReload") == "yes",
        key_fingerprint=fingerprint(key) if key else None,
        key_printable=printable(key) if key else None,
        key_safe=key_stat is None or (key_stat.mode == 0o600 and key_stat.uid == 0),
        listeners=_settled_listeners(host, api, wanted, containers, images),
        addresses=own_addresses(host.read_text("/proc/net/fib_trie") or "", host.read_text("/proc/net/if_inet6") or ""),
        endangered=endangered,
        health=_health(host, inventory) if inventory else (),
        gpu_users=_gpu_users(host, inventory, containers) if inventory else (),
        spaces=file_systems(host, _needs(host, [model for model in wanted if not services[model.name].running])),
        devices=device_ids(inventory) if inventory else {},
    )
    # Asked only for a model that is to be placed: those that have their GPUs keep them.
    if not topology_matters(state.wishes(wanted), state.gpus, state.unlisted(models), state.unfit_gpus):
        return state
    from ._gpu_topology import observe_topology

    return replace(state, topology=observe_topology(host))


def _health(host: Host, inventory: GpuInventory) -> tuple[Verdict, ...]:
    # Where the driver says what a GPU needs, the kernel's log adds nothing that would keep a service from starting.
    if not needs_kernel_log(inventory):
        return gpu_health(inventory)
    from ._kernel_log import read_kernel_log

    return gpu_health(inventory, read_kernel_log(host, only=KERNEL_LINES))


def _gpu_users(host: Host, inventory: GpuInventory, containers: t.Sequence[Json]) -> tuple[GpuUser, ...]:
    names = {str(entry.get("Id", "")): str((entry.get("Names") or [""])[0]).lstrip("/") for entry in containers}
    found = []
    for gpu in inventory.gpus:
        for process in gpu.processes:
            pid = process.get("pid")
            if pid is None:
                continue
            _unit, container_id = parse_cgroup(host.read_text("/proc/%d/cgroup" % pid) or "")
            container = names.get(container_id, "") if container_id else ""
            # Only the program: arguments of strangers may hold secrets.
            command = str(process.get("name") or "").split(" ", 1)[0].rsplit("/", 1)[-1]
            found.append(GpuUser(gpu.uuid, pid, command, container, process.get("used_memory_mib")))
    return tuple(found)


def _needs(host: Host, models: t.Sequence[NimModel]) -> list[Need]:
    return [
        Need(model.cache_directory, max(0, model.disk_space - used_bytes(host, model.cache_directory)), model.name)
        for model in models
        if model.disk_space is not None and model.state == "started"
    ]


def _look_at_docker(api: DockerApi) -> tuple[str, Json, str, list[Json], list[Json]]:
    try:
        version = str(api.version().get("Version", ""))
        info = api.info()
        containers = api.containers(all=True)
        running = [str(entry.get("Id", "")) for entry in containers if entry.get("State") in ("running", "paused")]
        inspected = [found for found in map(api.container, running) if found is not None]
    except FleetError as error:
        return error.message, {}, "", [], []
    return "", info, version, containers, inspected


def _names(host: Host, models: t.Sequence[NimModel], containers: t.Sequence[Json]) -> set[str]:
    """Services that are wanted or that an earlier run has put here."""
    names = {model.name for model in models}
    for container in containers:
        # Its file may be lost.
        name = str((container.get("Labels") or {}).get(NAME_LABEL) or "")
        if SERVICE_NAME.match(name) and "/" + container_name(name) in (container.get("Names") or []):
            names.add(name)
    return names.union(configured_services(host))


def _silent(host: Host, model: NimModel, service: ServiceState) -> str:
    """Why a service that has been ready serves no more. Only the first question costs time where all is well."""
    if model.state != "started" or not service.running or not service.alive or service.phase != "ready":
        return ""
    pid = int((service.inspected.get("State") or {}).get("Pid") or 0)
    return why_silent(host, str(service.configuration.get("ready_url") or ""), pid)


def _brought(host: Host, model: NimModel, service: ServiceState) -> bool:
    """As the wrapper sees it before it fetches anything."""
    return not service.fetched.get("status") and _has_files(host, model.cache_directory)


def _has_files(host: Host, directory: str) -> bool:
    """Whether there is a file anywhere below a directory; ends at the first one."""
    for path in ("%s/%s" % (directory, name) for name in host.list_dir(directory)):
        found = host.stat(path)
        if found is not None and (not found.is_dir or (host.read_link(path) is None and _has_files(host, path))):
            return True
    return False


def _has_foreign_files(host: Host, model: NimModel) -> bool:
    """Whether the container's user would meet somebody else's files in its cache; ends at the first one."""
    if not host.exists(model.cache_directory):
        return False
    words = ["find", model.cache_directory, "-xdev", "!", "-uid", str(model.uid), "-print", "-quit"]
    return bool(host.run(words, timeout=60).stdout.strip())


def _service(
    host: Host,
    name: str,
    unit: t.Mapping[str, str],
    containers: t.Mapping[str, Json],
    inspected: t.Mapping[str, Json],
) -> ServiceState:
    unit_path = "%s/%s" % (UNIT_DIRECTORY, unit_name(name))
    masked = host.read_link(unit_path) == "/dev/null"
    text = host.read_text(configuration_path(name))
    container = containers.get(container_name(name))
    shown = inspected.get(str((container or {}).get("Id", "")), {})
    runtime = json_object(host.read_text("%s/%s.json" % (RUNTIME_DIRECTORY, name)))
    failures = runtime.get("failures")
    download = containers.get(download_name(name)) or {}
    secret_file = host.stat(secret_path(name))
    fetched: Json = {}
    fetched_damage = ""
    try:
        remedy = "the next start of %s fetches again what it needs, and writes it anew" % unit_name(name)
        fetched = read_own_state(host, "%s/%s.download.json" % (STATE_DIRECTORY, name), {}, remedy) or {}
    except FleetError as error:
        fetched_damage = error.message
    return ServiceState(
        name=name,
        unit_text=None if masked else host.read_text(unit_path),
        configuration_text=text,
        configuration=json_object(text),
        masked=masked or unit.get("UnitFileState", "").startswith("masked"),
        active=unit.get("ActiveState", ""),
        enabled=unit.get("UnitFileState", ""),
        need_reload=unit.get("NeedDaemonReload") == "yes",
        container=container is not None,
        running=(container or {}).get("State") == "running",
        paused=(container or {}).get("State") == "paused",
        inspected=shown,
        given_gpus=_given_gpus(shown) or _given_gpus(inspected.get(str(download.get("Id", "")), {})),
        downloading=download.get("State") == "running",
        spec=str(((container or {}).get("Labels") or {}).get(SPEC_LABEL, "")),
        started_spec=str(runtime.get("spec", "")),
        phase=str(runtime.get("phase", "")),
        failures=failures if isinstance(failures, int) else 0,
        secret_text=host.read_text(secret_path(name)),
        secret_safe=secret_file is None or (secret_file.mode == 0o600 and secret_file.uid == 0),
        fetched=fetched,
        fetched_damage=fetched_damage,
    )


def _given_gpus(container: t.Mapping[str, t.Any]) -> tuple[str, ...]:
    """UUIDs of the GPUs and MIG devices that a container was made with, whichever way; indices may mean others today."""
    found: list[str] = []
    for request in (container.get("HostConfig") or {}).get("DeviceRequests") or []:
        # A device of CDI is "nvidia.com/gpu=UUID".
        found += [str(one).rpartition("=")[2] for one in request.get("DeviceIDs") or []]
    if not found:
        # Else it is the image's own, which often asks for all.
        variables = dict(
            str(entry).split("=", 1) for entry in (container.get("Config") or {}).get("Env") or [] if "=" in entry
        )
        found = variables.get("NVIDIA_VISIBLE_DEVICES", "").split(",")
    return tuple(uuid for uuid in found if uuid.startswith(("GPU-", "MIG-")))


def _images(host: Host, api: DockerApi, models: t.Sequence[NimModel]) -> dict[str, ImageState]:
    record = read_record(host)
    found: dict[str, ImageState] = {}
    for model in models:
        reference = ImageReference.parse(model.image)
        pinned = record.get(str(reference))
        # With a pin it does not matter what the tag means today.
        names = (pinned.image_id, pinned.run) if pinned is not None else (str(reference),)
        image = next(filter(None, map(api.image, names)), None)
        # One for another machine is as good as none: nim_image pulls it anew.
        if image is None or foreign_architecture(image, host.machine()):
            continue
        known = found.get(model.image)
        manifest = known.manifest if known is not None else None
        if manifest is None and names_profile(model):
            # Only here: few models name their profile.
            from ._nim_manifest import manifest_in_container, manifest_on_disk

            manifest = manifest_on_disk(host, image)
            if manifest is None:
                # What serves must not be stopped for a profile that its image does not have.
                manifest = manifest_in_container(host, image, api.container(model.container))
        found[model.image] = replace(_image_state(reference, pinned, image), manifest=manifest)
    return found


def _settled_listeners(
    host: Host,
    api: DockerApi,
    models: t.Sequence[NimModel],
    containers: t.Sequence[Json],
    images: t.Mapping[str, ImageState],
) -> tuple[Listener, ...]:
    """The listeners, looked at again while a docker-proxy serves no container that was known a moment before.

    A container that is just being started has its proxy first, and one that ends again and again has another one each time;
    the same one in all looks is a leftover.
    """
    ports = {port for model in models if model.state == "started" for port, dummy in ports_of(model, images)}
    own = {model.container for model in models}
    listeners = find_listeners(host, ports, containers, own)
    lasting = {known.pid for known in listeners if known.stray}
    for _try in range(PROXY_LOOKS):
        if not any(known.stray for known in listeners):
            return listeners
        host.sleep(1.0)
        try:
            api.forget()
            containers = api.containers(all=True)
        except FleetError:
            return listeners
        listeners = find_listeners(host, ports, containers, own)
        lasting &= {known.pid for known in listeners if known.stray}
    return tuple(replace(known, leftover=known.stray and known.pid in lasting) for known in listeners)


def describe(service: ServiceState, state: HostState) -> str:
    """``started``, ``starting``, ``stopped``, ``failed``, ``maintenance`` or ``absent``."""
    if service.running:
        return "started"
    if service.alive:
        return "starting"
    if service.active == "failed":
        return "failed"
    if not service.exists:
        return "absent"
    return "maintenance" if state.maintenance and service.enabled == "enabled" else "stopped"


def ports_of(model: NimModel, images: t.Mapping[str, ImageState]) -> list[tuple[int, str]]:
    """TCP ports that a model takes on the host, with the option that says so."""
    found = [(model.port, "port")]
    image = images.get(model.image)
    backend = image.family.backend_port(model) if image else None
    if backend is not None:
        found.append((backend, "environment." + BACKEND_PORT_VARIABLE))
    return found


def _image_state(reference: ImageReference, pinned: PinnedImage | None, image: Json) -> ImageState:
    identifier = str(image.get("Id", ""))
    known = [str(entry) for entry in image.get("RepoDigests") or []]
    if pinned is not None:
        run, digest = pinned.run, pinned.digest
    else:
        run = next((entry for entry in known if entry.startswith(reference.name + "@")), (known or [identifier])[0])
        digest = run.partition("@")[2]
    config = image.get("Config") or {}
    return ImageState(
        identifier=identifier,
        # A pinned digest is the name even where it was taken from the image: nim_image gives it back, and nothing restarts.
        reference=run if run in known or (pinned is not None and pinned.digest) else identifier,
        digest=digest,
        family=family_of_image(image, reference.tag),
        command=tuple(str(word) for word in config.get("Cmd") or ()),
        variables=tuple(str(entry).partition("=")[0] for entry in config.get("Env") or ()),
        entrypoint=tuple(str(word) for word in config.get("Entrypoint") or ()),
    )


def _gpu_problem(inventory: t.Any) -> str:
    if inventory.gpus:
        return ""
    if not inventory.pci:
        return "This host has no NVIDIA GPU."
    if inventory.driver is None:
        return "The NVIDIA driver is not loaded."
    return "nvidia-smi shows no GPU: %s." % (inventory.smi_error or "no reason given").rstrip(".")


def _lost_gpus(
    host: Host, names: t.Iterable[str], endangered: t.Collection[str], containers: t.Sequence[Json]
) -> dict[str, str]:
    """Services whose container has lost its GPUs, with NVML's word for it.

    Asked are only those that a daemon-reload since their start may have taken them from: no other one costs anything.
    """
    own = sorted(name for name in names if container_name(name) in endangered)
    if not own:
        return {}
    started = {
        str(container.get("Name", "")).lstrip("/"): parse_time(str((container.get("State") or {}).get("StartedAt", "")))
        for container in containers
    }
    reloaded = last_daemon_reload(host)
    found = {}
    for name in own:
        since = started.get(container_name(name))
        if reloaded is None or since is None or since <= reloaded:
            found[name] = lost_gpus(host, container_name(name))
    return found


def _endangered(host: Host, version: str, info: Json, containers: t.Sequence[Json]) -> tuple[str, ...]:
    """Running containers that systemctl daemon-reload may take the GPUs from.

    That happens where systemd manages the cgroups and the devices were given behind runc's back: by ``--gpus`` up to
    Docker 28, or by the nvidia runtime in legacy mode (NVIDIA's troubleshooting page on "Unknown Error").
    """
    if info.get("CgroupDriver") != "systemd":
        return ()
    major = whole_number((re.match(r"[0-9]*", version) or [""])[0])
    settings = host.read_text("/etc/nvidia-container-runtime/config.toml") or ""
    legacy = re.search(r'^\s*mode\s*=\s*"legacy"', settings, re.MULTILINE) is not None
    found = []
    for container in containers:
        configuration = container.get("HostConfig") or {}
        requested = any(
            request.get("Driver") != "cdi" and any("gpu" in names for names in request.get("Capabilities") or [])
            for request in configuration.get("DeviceRequests") or []
        )
        if (requested and major < 29) or (legacy and configuration.get("Runtime") == "nvidia"):
            found.append(str(container.get("Name", "")).lstrip("/"))
    return tuple(sorted(found))
