# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""All NIM services of a host as one resource: GPUs, ports, units and containers are planned together."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import sys
import typing as t
from dataclasses import dataclass, field

from ._docker_api import DockerApi
from ._errors import FleetError
from ._gpu import Gpu, observe_gpus, parse_cgroup
from ._gpu_placement import Wish, place
from ._host import FileStat, Host
from ._image_record import PinnedImage, read_record
from ._image_reference import ImageReference
from ._ngc_login import check_api_key, fingerprint, key_in_environment, render_environment
from ._nim_family import BACKEND_PORT_VARIABLE, LORA_PATH, WEIGHTS_PATH, Family, family_of_image
from ._nim_models import NimModel, addresses_overlap, container_name, probe_address, unit_name
from ._nim_unit import SPEC_LABEL, source, spec_hash
from ._resource import Change, Disruption, FileDiff, Resource

UNIT_DIRECTORY = "/etc/systemd/system"
CONFIGURATION_DIRECTORY = "/etc/nim"
#: Further looks, a second apart, for the container of a docker-proxy.
PROXY_LOOKS = 3
KEY_FILE = CONFIGURATION_DIRECTORY + "/ngc.env"
WRAPPER = "/usr/local/libexec/nim/nim-unit"
BASE_DIRECTORY = "/var/lib/nim"
STATE_DIRECTORY = BASE_DIRECTORY + "/state"
MAINTENANCE_FILE = BASE_DIRECTORY + "/maintenance"
RUNTIME_DIRECTORY = "/run/nim"

NAME_LABEL = "io.gpu-fleet.nim.name"
IMAGE_LABEL = "io.gpu-fleet.nim.image"
DIGEST_LABEL = "io.gpu-fleet.nim.digest"

INJECTIONS = ("runtime", "cdi", "gpus")
START_LIMIT_BURST = 4
#: Seconds that one failed start takes beyond its start timeout: back-off and the stop of what is left.
START_LIMIT_MARGIN = 120
#: Seconds until the wrapper must have said that it runs.
WRAPPER_TIMEOUT = 15.0

_HEADER = "# Written by gpu_fleet.nim.nim_service; changes made here are overwritten.\n"

TARGET_TEXT = (
    _HEADER
    + """\
[Unit]
Description=All NIM services of this host
Documentation=https://docs.nvidia.com/nim/

[Install]
WantedBy=multi-user.target
"""
)

SLICE_TEXT = (
    _HEADER
    + """\
[Unit]
Description=Containers of the NIM services
Before=slices.target
"""
)

Json = t.Dict[str, t.Any]


def unit_text(model: NimModel, injection: str) -> str:
    """The unit of one model. The image is not named in it: a new image must not need a daemon-reload."""
    wants = ["docker.service", "network-online.target"]
    after = [
        *wants,
        "nvidia-persistenced.service",
        "nvidia-fabricmanager.service",
        "nvidia-cdi-refresh.service",
        "nvidia-gpu-reset.target",
    ]
    if injection == "cdi":
        wants.append("nvidia-cdi-refresh.service")
    interval = START_LIMIT_BURST * (model.start_timeout + START_LIMIT_MARGIN)
    return (
        _HEADER
        + """\
[Unit]
Description=NIM {name}
Documentation=https://docs.nvidia.com/nim/
# Not Requires=: a restart of Docker must not restart the model.
Wants={wants}
After={after}
PartOf=nim.target
# Lies there while the host is being worked on; survives a reboot.
ConditionPathExists=!{maintenance}
StartLimitIntervalSec={interval}
StartLimitBurst={burst}

[Service]
Type=exec
Environment=HOME=/root
ExecStart={wrapper} run {name}
# Also called when the main process died by itself; it then leaves the container alone.
ExecStop={wrapper} stop {name}
TimeoutStopSec={timeout_stop}
KillMode=mixed
# Always: a NIM may end with code 0 although it failed.
Restart=always
# The wrapper waits longer after a failure; a stop during this pause would leave the container running.
RestartSec=200ms
RestartPreventExitStatus=77 78
SuccessExitStatus=77 143
RuntimeDirectory=nim
RuntimeDirectoryPreserve=yes
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
ReadWritePaths=-{state}

[Install]
WantedBy=nim.target multi-user.target
""".format(
            name=model.name,
            wants=" ".join(wants),
            after=" ".join(after),
            maintenance=MAINTENANCE_FILE,
            interval=interval,
            burst=START_LIMIT_BURST,
            wrapper=WRAPPER,
            timeout_stop=model.stop_timeout + 30,
            state=STATE_DIRECTORY,
        )
    )


def wrapper_text() -> str:
    """The program that the units run, with a Python that is there whatever Ansible was told to use."""
    python = sys.executable if sys.executable.startswith(("/usr/bin/", "/usr/libexec/")) else "/usr/bin/python3"
    return "#!%s\n%s" % (python, source())


# -- secret variables -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Secrets:
    """Content of ``/etc/nim/<name>.env``, readable for root alone.

    What is derived from a secret and stands elsewhere (the specification that everybody can read, the differences that
    Ansible prints) is derived with a random key that is kept in the file: a short password could be guessed from a plain
    hash of it.
    """

    key: str
    values: t.Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, text: str | None) -> Secrets | None:
        """What :meth:`render` wrote; None for anything that has no key in it."""
        found = re.match(r"(?:#.*\n)*# key ([0-9a-f]{64})\n", text or "")
        if found is None:
            return None
        lines = (text or "")[found.end() :].splitlines()
        return cls(found.group(1), dict(_pair(line) for line in lines if "=" in line and not line.startswith("#")))

    def render(self) -> str:
        """An environment file as ``docker create --env-file`` reads it: no quotes, no escapes."""
        lines = ["%s=%s\n" % pair for pair in sorted(self.values.items())]
        return "%s# key %s\n%s" % (_HEADER, self.key, "".join(lines))

    def fingerprint(self, content: str) -> str:
        return hmac.new(bytes.fromhex(self.key), content.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()

    def spec(self) -> str:
        """The part of a specification that changes with any of them."""
        return self.fingerprint(json.dumps(sorted(self.values.items())))

    def __str__(self) -> str:
        """``HF_TOKEN hmac:12ab34cd56ef, …``"""
        return ", ".join(
            "%s hmac:%s" % (name, self.fingerprint(json.dumps([name, value]))[:12])
            for name, value in sorted(self.values.items())
        )


def _pair(line: str) -> tuple[str, str]:
    name, _separator, value = line.partition("=")
    return name, value


# -- what is there --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageState:
    """A pulled image.

    Attributes:
        reference: How ``docker create`` is told: by digest where Docker knows it, otherwise by id.
        command: The image's own default command.
    """

    identifier: str
    reference: str
    digest: str
    family: Family
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServiceState:
    """What the host has under one name.

    Attributes:
        active: systemd's ActiveState; empty when the unit is not known.
        enabled: systemd's UnitFileState.
        running: Whether the container runs.
        spec: What the container runs, by its label; empty without a container.
        started_spec: What the wrapper is starting or running, by its own word.
        failures: Starts that failed in a row.
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
    downloading: bool = False
    spec: str = ""
    started_spec: str = ""
    phase: str = ""
    failures: int = 0
    secret_text: str | None = field(default=None, repr=False)
    secret_safe: bool = True

    @property
    def exists(self) -> bool:
        files = (self.unit_text, self.configuration_text, self.secret_text)
        return any(text is not None for text in files) or self.container or self.masked

    @property
    def alive(self) -> bool:
        """Whether systemd keeps it up or is about to."""
        return self.active in ("active", "activating", "reloading", "deactivating")

    @property
    def gpus(self) -> tuple[str, ...]:
        found = self.configuration.get("gpus")
        return tuple(str(uuid) for uuid in found) if isinstance(found, list) else ()


@dataclass(frozen=True)
class Listener:
    """Somebody who holds a TCP port."""

    address: str
    port: int
    pid: int | None
    command: str
    container: str
    unit: str = ""

    def describe(self) -> str:
        """``docker-proxy (pid 812) of container old-nim``, ``nginx (pid 977) of unit nginx.service``."""
        if self.container and self.pid is None:
            return "container %s" % self.container
        process = "a process that cannot be seen" if self.pid is None else "%s (pid %d)" % (self.command, self.pid)
        if self.container:
            return "%s of container %s" % (process, self.container)
        return "%s of unit %s" % (process, self.unit) if self.unit else process


@dataclass(frozen=True)
class HostState:
    """One look at everything that the services of a host consist of or depend on."""

    docker: bool = False
    docker_problem: str = ""
    docker_version: str = ""
    cgroup_driver: str = ""
    runtimes: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str = ""
    maintenance: bool = False
    services: t.Mapping[str, ServiceState] = field(default_factory=dict)
    images: t.Mapping[str, ImageState] = field(default_factory=dict)
    paths: t.Mapping[str, FileStat | None] = field(default_factory=dict)
    files: t.Mapping[str, str | None] = field(default_factory=dict)
    target_enabled: bool = False
    target_active: bool = False
    target_need_reload: bool = False
    key_fingerprint: str | None = None
    key_safe: bool = True
    listeners: tuple[Listener, ...] = ()
    addresses: tuple[str, ...] = ()
    endangered: tuple[str, ...] = ()


def listening_sockets(text: str, ipv6: bool) -> list[tuple[str, int, str]]:
    """Address, port and inode of every listener in ``/proc/net/tcp`` or ``tcp6`` (proc(5))."""
    found = []
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) < 10 or words[3] != "0A":
            continue
        address, _colon, port = words[1].partition(":")
        try:
            raw = bytes.fromhex(address)
            # Each group of four bytes is in the byte order of the machine, and all supported ones are little-endian.
            raw = b"".join(raw[start : start + 4][::-1] for start in range(0, len(raw), 4))
            ip = ipaddress.IPv6Address(raw) if ipv6 else ipaddress.IPv4Address(raw)
            mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
            found.append((str(mapped or ip), int(port, 16), words[9]))
        except ValueError:
            continue
    return found


def own_addresses(fib_trie: str, if_inet6: str) -> tuple[str, ...]:
    """The addresses of the host, loopback included, out of ``/proc/net/fib_trie`` and ``/proc/net/if_inet6``."""
    found = re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", fib_trie)
    for line in if_inet6.splitlines():
        digits = line.split(" ", 1)[0]
        if re.match(r"[0-9a-f]{32}\Z", digits):
            found.append(str(ipaddress.IPv6Address(int(digits, 16))))
    return tuple(dict.fromkeys(found))


class NimService(Resource[HostState]):
    """Every NIM service of one host.

    Args:
        models: All models of the host; those that are on the host but not in the list are reported, not touched.
        key: NGC key; None leaves the stored one alone.
        key_state: ``absent`` removes the stored key.
        injection: How containers get their GPUs: ``runtime``, ``cdi`` or ``gpus``.
        remove_all: Take away every service of the host, listed or not, and all that this resource has written.
            Model caches stay.
    """

    name = "nim_service"

    def __init__(
        self,
        models: t.Sequence[NimModel],
        *,
        key: str | None = None,
        key_state: str = "present",
        injection: str = "runtime",
        remove_all: bool = False,
        api: DockerApi | None = None,
    ) -> None:
        self.models = list(models)
        self.key = check_api_key(key, "ngc_api_key") if key else None
        self.key_state = key_state
        self.injection = injection
        self.remove_all = remove_all
        self.api = api or DockerApi()
        self.warnings: list[str] = []
        self._restarted: set[str] = set()
        #: For the secrets of models that have no file with a key of its own yet.
        self._secret_key = secrets.token_hex(32)
        if injection not in INJECTIONS:
            raise FleetError(
                "invalid_option",
                "gpu_injection = %r: no such way; use one of %s." % (injection, ", ".join(INJECTIONS)),
            )

    # -- observe --------------------------------------------------------------------------------------

    def observe(self, host: Host) -> HostState:
        problem, info, version, containers, inspected = self._look_at_docker(host)
        wanted = [model for model in self.models if model.state != "absent" and not self.remove_all]
        inventory = observe_gpus(host) if wanted else None
        names = self._names(host)
        units = self._units(host, names)
        by_name = {str(name).lstrip("/"): entry for entry in containers for name in entry.get("Names") or []}
        key = key_in_environment(host.read_text(KEY_FILE))
        key_stat = host.stat(KEY_FILE)
        paths = [BASE_DIRECTORY, STATE_DIRECTORY, CONFIGURATION_DIRECTORY, os.path.dirname(WRAPPER)]
        images = self._images(host, wanted) if not problem else {}
        for model in wanted:
            paths += [model.cache_directory]
            paths += [path for path in (model.weights_directory, model.lora_directory) if path]
        target = units.get("nim.target", {})
        return HostState(
            docker=not problem,
            docker_problem=problem,
            docker_version=version,
            cgroup_driver=str(info.get("CgroupDriver", "")),
            runtimes=tuple(sorted(info.get("Runtimes") or {})),
            gpus=inventory.gpus if inventory else (),
            gpu_problem=_gpu_problem(inventory) if inventory else "",
            maintenance=host.exists(MAINTENANCE_FILE),
            services={
                name: self._service(host, name, units.get(unit_name(name), {}), by_name) for name in sorted(names)
            },
            images=images,
            paths={path: host.stat(path) for path in paths},
            files={
                path: host.read_text(path)
                for path in (WRAPPER, UNIT_DIRECTORY + "/nim.target", UNIT_DIRECTORY + "/nim.slice")
            },
            target_enabled=target.get("UnitFileState") == "enabled",
            target_active=target.get("ActiveState") == "active",
            target_need_reload=target.get("NeedDaemonReload") == "yes",
            key_fingerprint=fingerprint(key) if key else None,
            key_safe=key_stat is None or (key_stat.mode == 0o600 and key_stat.uid == 0),
            listeners=self._settled_listeners(host, wanted, containers, images),
            addresses=own_addresses(
                host.read_text("/proc/net/fib_trie") or "", host.read_text("/proc/net/if_inet6") or ""
            ),
            endangered=_endangered(host, version, info, inspected),
        )

    def _look_at_docker(self, host: Host) -> tuple[str, Json, str, list[Json], list[Json]]:
        try:
            version = str(self.api.version().get("Version", ""))
            info = self.api.info()
            containers = self.api.containers(all=True)
            running = [str(entry.get("Id", "")) for entry in containers if entry.get("State") == "running"]
            inspected = [found for found in map(self.api.container, running) if found is not None]
        except FleetError as error:
            return error.message, {}, "", [], []
        return "", info, version, containers, inspected

    def _names(self, host: Host) -> set[str]:
        """Services that are wanted or that an earlier run has put here."""
        names = {model.name for model in self.models}
        for entry in host.list_dir(CONFIGURATION_DIRECTORY):
            if entry.endswith(".json"):
                names.add(entry[: -len(".json")])
        return names

    def _units(self, host: Host, names: t.Iterable[str]) -> dict[str, dict[str, str]]:
        wanted = ["nim.target"] + [unit_name(name) for name in sorted(names)]
        keys = "Id,ActiveState,UnitFileState,NeedDaemonReload"
        shown = host.run(["systemctl", "show", "--property", keys, "--", *wanted])
        found = {}
        for block in shown.stdout.split("\n\n"):
            values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            if values.get("Id"):
                found[values["Id"]] = values
        return found

    def _service(
        self, host: Host, name: str, unit: t.Mapping[str, str], containers: t.Mapping[str, Json]
    ) -> ServiceState:
        unit_path = "%s/%s" % (UNIT_DIRECTORY, unit_name(name))
        masked = host.read_link(unit_path) == "/dev/null"
        text = host.read_text("%s/%s.json" % (CONFIGURATION_DIRECTORY, name))
        container = containers.get(container_name(name))
        runtime = _json_object(host.read_text("%s/%s.json" % (RUNTIME_DIRECTORY, name)))
        failures = runtime.get("failures")
        download = containers.get(container_name(name) + "-download") or {}
        secret_file = host.stat(secret_path(name))
        return ServiceState(
            name=name,
            unit_text=None if masked else host.read_text(unit_path),
            configuration_text=text,
            configuration=_json_object(text),
            masked=masked or unit.get("UnitFileState", "").startswith("masked"),
            active=unit.get("ActiveState", ""),
            enabled=unit.get("UnitFileState", ""),
            need_reload=unit.get("NeedDaemonReload") == "yes",
            container=container is not None,
            running=(container or {}).get("State") == "running",
            downloading=download.get("State") == "running",
            spec=str(((container or {}).get("Labels") or {}).get(SPEC_LABEL, "")),
            started_spec=str(runtime.get("spec", "")),
            phase=str(runtime.get("phase", "")),
            failures=failures if isinstance(failures, int) else 0,
            secret_text=host.read_text(secret_path(name)),
            secret_safe=secret_file is None or (secret_file.mode == 0o600 and secret_file.uid == 0),
        )

    def _images(self, host: Host, models: t.Sequence[NimModel]) -> dict[str, ImageState]:
        record = read_record(host)
        found = {}
        for model in models:
            reference = ImageReference.parse(model.image)
            pinned = record.get(str(reference))
            if pinned is not None:
                # What the tag means today does not matter: the pin alone decides.
                image = self.api.image(pinned.image_id) or self.api.image(pinned.run)
            else:
                image = self.api.image(str(reference))
            if image is not None:
                found[model.image] = _image_state(reference, pinned, image)
        return found

    def _settled_listeners(
        self,
        host: Host,
        models: t.Sequence[NimModel],
        containers: t.Sequence[Json],
        images: t.Mapping[str, ImageState],
    ) -> tuple[Listener, ...]:
        """The listeners, looked at again while a docker-proxy serves no container that was known a moment before: a
        container that is just being started has its proxy first. A leftover proxy stays unexplained."""
        listeners = self._listeners(host, models, containers, images)
        for _try in range(PROXY_LOOKS):
            if not any(known.command == "docker-proxy" and not known.container for known in listeners):
                break
            host.sleep(1.0)
            try:
                containers = self.api.containers(all=True)
            except FleetError:
                break
            listeners = self._listeners(host, models, containers, images)
        return listeners

    def _listeners(
        self,
        host: Host,
        models: t.Sequence[NimModel],
        containers: t.Sequence[Json],
        images: t.Mapping[str, ImageState],
    ) -> tuple[Listener, ...]:
        ports = {port for model in models if model.state == "started" for port, dummy in _ports(model, images)}
        published = [
            (str(port.get("IP") or "0.0.0.0"), int(port["PublicPort"]), str(entry["Names"][0]).lstrip("/"))  # noqa: S104 - compared, not bound
            for entry in containers
            if entry.get("State") == "running" and entry.get("Names")
            for port in entry.get("Ports") or []
            if port.get("PublicPort") in ports and port.get("Type") == "tcp"
        ]
        sockets = [
            found
            for path, ipv6 in (("/proc/net/tcp", False), ("/proc/net/tcp6", True))
            for found in listening_sockets(host.read_text(path) or "", ipv6)
            if found[1] in ports
        ]
        # Looking through all processes is slow, and the ports of our own containers need no explanation.
        own = {port for _ip, port, name in published if name in {model.container for model in models}}
        unexplained = {inode for _address, port, inode in sockets if port not in own}
        owners = _socket_owners(host, unexplained) if unexplained else {}
        names = {str(entry.get("Id", "")): str((entry.get("Names") or [""])[0]).lstrip("/") for entry in containers}
        found = []
        for address, port, inode in sockets:
            pid, command, unit, container_id = owners.get(inode, (None, "", "", ""))
            container = names.get(container_id, "")
            if not container:
                # docker-proxy listens outside of the container that it serves.
                container = next(
                    (name for ip, public, name in published if public == port and addresses_overlap(ip, address)), ""
                )
            found.append(Listener(address, port, pid, command, container, unit))
        for address, port, name in published:
            # Without docker-proxy a published port is a rule of the packet filter only.
            if not any(known.port == port and known.container == name for known in found):
                found.append(Listener(address, port, None, "", name))
        return tuple(found)

    # -- plan -----------------------------------------------------------------------------------------

    def plan(self, state: HostState) -> list[Change]:
        """Everything that must change, stops first, starts last.

        Raises:
            FleetError: ``gpus_unavailable``, ``port_in_use``, ``unit_masked``: nothing may be touched before these
                are settled.
        """
        if self.remove_all:
            return self._plan_removal(state)
        prerequisites = self._missing_prerequisites(state)
        if prerequisites:
            return prerequisites
        self._check_backend_ports(state)
        configurations = self.configurations(state)
        self._check_masks(state)
        restarts = self._restarts(state, configurations)
        self._check_ports(state, configurations, {name for name, _kind, _why in restarts})
        changes = self._plan_directories(state) + self._plan_files(state) + self._plan_key(state)
        for model in self.models:
            if model.state != "started":
                changes += self._plan_stop(model, state)
        for model in self.models:
            if model.state != "absent":
                changes += self._plan_service_files(model, configurations[model.name], state)
        changes += self._plan_enablement(state)
        changes += self._plan_reload(changes, state)
        changes += self._plan_restarts(restarts, state)
        return changes

    def configurations(self, state: HostState) -> dict[str, Json]:
        """What ``/etc/nim/<name>.json`` must hold for every model that is not absent."""
        wanted = [model for model in self.models if model.state != "absent"]
        listed = {model.name for model in self.models}
        placed = place(
            [Wish(model.name, model.gpus, _service_state(state, model.name).gpus) for model in wanted],
            state.gpus,
            {name: service.gpus for name, service in state.services.items() if name not in listed},
        )
        return {
            model.name: build_configuration(
                model,
                state.images[model.image],
                placed[model.name],
                injection=self.injection,
                cgroup_driver=state.cgroup_driver,
                secret=self._secrets(model, state),
            )
            for model in wanted
        }

    def _secrets(self, model: NimModel, state: HostState) -> Secrets:
        """The secrets of a model, with the key that the host has for them already."""
        there = Secrets.parse(_service_state(state, model.name).secret_text)
        return Secrets(there.key if there else self._secret_key, model.secret_environment)

    def _missing_prerequisites(self, state: HostState) -> list[Change]:
        """One change a model that cannot be planned yet: a host that was never set up is not an error in check mode."""
        changes = []
        for model in self.models:
            if model.state == "absent":
                continue
            reason = message = ""
            if not state.docker:
                reason, message = "docker_unavailable", state.docker_problem
            elif not state.gpus:
                reason, message = "no_gpu", state.gpu_problem
            elif self.injection == "runtime" and "nvidia" not in state.runtimes:
                reason = "runtime_missing"
                message = "Docker has no runtime 'nvidia'; set up the NVIDIA Container Toolkit first."
            elif model.image not in state.images:
                reason = "image_missing"
                message = "Image %s is not on this host; pull it with gpu_fleet.nim.nim_image first." % model.image
            else:
                for option in ("weights_directory", "lora_directory"):
                    message = message or _unreadable(option, getattr(model, option), model, state)
                reason = "directory_missing" if message else ""
            if reason:
                changes.append(
                    Change(
                        self.name,
                        model.unit,
                        "present" if _service_state(state, model.name).exists else None,
                        model.state,
                        "wanted, but not possible yet: " + message.rstrip("."),
                        Disruption.NONE,
                        "prerequisite",
                        {"reason": reason, "message": "Service %s cannot be set up: %s" % (model.name, message)},
                    )
                )
        return changes

    def _check_masks(self, state: HostState) -> None:
        for model in self.models:
            if model.state == "started" and _service_state(state, model.name).masked:
                raise FleetError(
                    "unit_masked",
                    "%s is masked, which somebody did to keep it from starting; run 'systemctl unmask %s', or set the "
                    "model to state absent." % (model.unit, model.unit),
                )

    def _restarts(self, state: HostState, configurations: t.Mapping[str, Json]) -> list[tuple[str, str, str]]:
        """Name, ``start`` or ``restart``, and why, of every service that does not run what it should."""
        found = []
        new_key = self._new_key(state)
        for model in self.models:
            if model.state != "started":
                continue
            service = _service_state(state, model.name)
            spec = str(configurations[model.name]["spec"])
            if service.running:
                if service.spec != spec:
                    found.append((model.name, "restart", "the container runs something else"))
                elif not service.alive:
                    found.append((model.name, "start", "the unit is %s, the container goes on" % service.active))
            elif not service.alive:
                why = "the unit failed" if service.active == "failed" else "the service does not run"
                found.append((model.name, "start", why))
            elif service.started_spec != spec:
                found.append((model.name, "restart", "the unit is starting something else"))
            elif new_key and service.failures:
                found.append((model.name, "restart", "its starts failed, and there is a new key"))
        return found

    def _check_ports(self, state: HostState, configurations: t.Mapping[str, Json], starting: set[str]) -> None:
        wanted = {model.container: model for model in self.models}
        for model in self.models:
            if model.name not in starting:
                continue
            self._check_address(state, model)
            for listener in state.listeners:
                option = _collision(model, listener, state.images)
                if not option:
                    continue
                if listener.container == model.container:
                    continue
                other = wanted.get(listener.container)
                if other is not None and (other.state != "started" or not _collision(other, listener, state.images)):
                    # It gives the port up in this very run.
                    continue
                raise FleetError(
                    "port_in_use",
                    "Model %s cannot have port %d on %s%s: it is held by %s; stop that first, or give the model another "
                    "port%s. Nothing was changed."
                    % (
                        model.name,
                        listener.port,
                        model.bind_address,
                        "" if option == "port" else " for its engine",
                        listener.describe(),
                        "" if option == "port" else " there (%s)" % option,
                    ),
                    port=listener.port,
                    address=model.bind_address,
                    pid=listener.pid,
                    command=listener.command,
                    container=listener.container,
                )

    @staticmethod
    def _check_address(state: HostState, model: NimModel) -> None:
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

    def _check_backend_ports(self, state: HostState) -> None:
        """Only the image tells whether a model has a second port, so this cannot be found on the controller."""
        taken: list[tuple[NimModel, int, str]] = []
        for model in self.models:
            if model.state == "absent":
                continue
            for port, option in _ports(model, state.images):
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

    def _plan_directories(self, state: HostState) -> list[Change]:
        wanted: dict[str, tuple[int, int, int, str]] = {}
        for path in (BASE_DIRECTORY, STATE_DIRECTORY, CONFIGURATION_DIRECTORY, os.path.dirname(WRAPPER)):
            wanted[path] = (0, 0, 0o755, "holds what all services share")
        for model in self.models:
            if model.state != "absent":
                wanted[model.cache_directory] = (model.uid, model.gid, 0o750, "model cache of %s" % model.name)
        changes = []
        if not any(model.state != "absent" for model in self.models):
            return []
        for path, (uid, gid, fresh, why) in wanted.items():
            found = state.paths.get(path)
            if found is not None and found.uid == uid and found.mode & 0o700 == 0o700 and not found.mode & 0o002:
                continue
            if found is not None and not found.is_dir:
                raise FleetError(
                    "not_a_directory", "%s is needed as a directory and is a file; move it away." % path, path=path
                )
            # Keep what the operator lets the group and others read; nobody else may write.
            mode = fresh if found is None or uid == 0 else (found.mode & 0o055) | 0o700
            changes.append(
                Change(
                    self.name,
                    "directory " + path,
                    None if found is None else "%04o owner %d:%d" % (found.mode, found.uid, found.gid),
                    "%04o owner %d:%d" % (mode, uid, gid),
                    why,
                    Disruption.NONE,
                    "directory",
                    {"path": path, "mode": mode, "uid": uid, "gid": gid},
                )
            )
        return changes

    def _plan_files(self, state: HostState) -> list[Change]:
        if not any(model.state != "absent" for model in self.models):
            return []
        changes = []
        for path, text, mode, why in (
            (WRAPPER, wrapper_text(), 0o755, "runs the containers for systemd"),
            (UNIT_DIRECTORY + "/nim.target", TARGET_TEXT, 0o644, "starts and stops all services together"),
            (UNIT_DIRECTORY + "/nim.slice", SLICE_TEXT, 0o644, "holds the containers' processes"),
        ):
            changes += self._plan_file(path, state.files.get(path), text, mode, why)
        return changes

    def _plan_file(self, path: str, before: str | None, after: str, mode: int, why: str) -> list[Change]:
        if before == after:
            return []
        return [
            Change(
                self.name,
                path,
                None if before is None else "other content",
                "as wanted",
                why,
                Disruption.NONE,
                "file",
                {"path": path, "text": after, "mode": mode},
                FileDiff(path, before or "", after),
            )
        ]

    def _new_key(self, state: HostState) -> bool:
        return self.key is not None and self.key_state == "present" and fingerprint(self.key) != state.key_fingerprint

    def _plan_key(self, state: HostState) -> list[Change]:
        before = state.key_fingerprint
        if self.key_state == "absent":
            if before is None:
                return []
            return [Change(self.name, KEY_FILE, before, None, "no key is wanted here", Disruption.NONE, "key_absent")]
        if self.key is None or (not self._new_key(state) and state.key_safe):
            return []
        why = (
            "the key changed; services that run keep running" if before else "the key is needed while files are fetched"
        )
        if not self._new_key(state):
            why = "the file could be read by others than root"
        return [Change(self.name, KEY_FILE, before, fingerprint(self.key), why, Disruption.NONE, "key")]

    def _plan_stop(self, model: NimModel, state: HostState) -> list[Change]:
        service = _service_state(state, model.name)
        return self._stop_changes(service, "state is %s" % model.state, model.stop_timeout, model.state == "absent")

    def _stop_changes(self, service: ServiceState, why: str, stop_timeout: int, remove: bool) -> list[Change]:
        unit = unit_name(service.name)
        changes = []
        if service.alive or service.running or service.downloading:
            data = {"name": service.name, "stop_timeout": stop_timeout}
            changes.append(Change(self.name, unit, "started", "stopped", why, Disruption.RESTART_NIM, "stop", data))
        if remove and service.exists:
            why += "; its model cache is kept"
            changes.append(
                Change(self.name, unit, "present", None, why, Disruption.NONE, "remove", {"name": service.name})
            )
        return changes

    def _plan_removal(self, state: HostState) -> list[Change]:
        why = "everything is to be removed"
        changes = []
        for service in state.services.values():
            timeout = service.configuration.get("stop_timeout")
            changes += self._stop_changes(service, why, timeout if isinstance(timeout, int) else 60, True)
        target = UNIT_DIRECTORY + "/nim.target"
        if state.files.get(target) is not None:
            changes.append(Change(self.name, "nim.target", "present", None, why, Disruption.NONE, "remove_target", {}))
        for path in (UNIT_DIRECTORY + "/nim.slice", os.path.dirname(WRAPPER), STATE_DIRECTORY, CONFIGURATION_DIRECTORY):
            if state.files.get(path) is not None or state.paths.get(path) is not None:
                changes.append(
                    Change(self.name, path, "present", None, why, Disruption.NONE, "remove_path", {"path": path})
                )
        return changes + self._plan_reload(changes, state)

    def _plan_service_files(self, model: NimModel, configuration: Json, state: HostState) -> list[Change]:
        service = _service_state(state, model.name)
        changes = self._plan_file(
            "%s/%s.json" % (CONFIGURATION_DIRECTORY, model.name),
            service.configuration_text,
            json.dumps(configuration, indent=2, sort_keys=True) + "\n",
            0o644,
            "what the container of %s is given" % model.name,
        )
        changes += self._plan_secrets(model, state)
        if not service.masked:
            changes += self._plan_file(
                "%s/%s" % (UNIT_DIRECTORY, model.unit),
                service.unit_text,
                unit_text(model, self.injection),
                0o644,
                "unit of %s" % model.name,
            )
        return changes

    def _plan_secrets(self, model: NimModel, state: HostState) -> list[Change]:
        service = _service_state(state, model.name)
        path = secret_path(model.name)
        there = Secrets.parse(service.secret_text)
        before = None if service.secret_text is None else (str(there) if there else "other content")
        if not model.secret_environment:
            if before is None:
                return []
            why = "%s has no secret variables" % model.name
            return [Change(self.name, path, before, None, why, Disruption.NONE, "secrets_absent", {"path": path})]
        wanted = self._secrets(model, state)
        text = wanted.render()
        if service.secret_text == text and service.secret_safe:
            return []
        why = "secret variables of %s" % model.name
        if service.secret_text == text:
            why = "the file could be read by others than root"
        data = {"path": path, "text": text}
        return [Change(self.name, path, before, str(wanted), why, Disruption.NONE, "secrets", data)]

    def _plan_reload(self, changes: t.Sequence[Change], state: HostState) -> list[Change]:
        written = any(
            change.action in ("remove", "remove_target", "enable", "disable")
            or (change.action == "file" and str(change.data["path"]).startswith(UNIT_DIRECTORY + "/"))
            for change in changes
        )
        stale = (state.target_need_reload and not self.remove_all) or any(
            _service_state(state, model.name).need_reload
            for model in self.models
            if model.state != "absent" and not self.remove_all
        )
        if not written and not stale:
            return []
        why = "units changed"
        if state.endangered:
            why += "; containers that may lose their GPUs by it: " + ", ".join(state.endangered)
        return [
            Change(
                self.name,
                "systemd",
                "old units loaded",
                "daemon-reload",
                why,
                Disruption.RELOAD,
                "daemon_reload",
                {"endangered": state.endangered},
            )
        ]

    def _plan_enablement(self, state: HostState) -> list[Change]:
        enable, disable = [], []
        for model in self.models:
            service = _service_state(state, model.name)
            if model.state == "started" and service.enabled != "enabled":
                enable.append(model.unit)
            if model.state == "stopped" and service.enabled == "enabled":
                disable.append(model.unit)
        if any(model.state != "absent" for model in self.models) and not state.target_enabled:
            enable.insert(0, "nim.target")
        changes = []
        for verb, units in (("enable", enable), ("disable", disable)):
            for unit in units:
                before, after = ("disabled", "enabled") if verb == "enable" else ("enabled", "disabled")
                changes.append(
                    Change(
                        self.name,
                        unit,
                        before,
                        after,
                        "started at boot" if verb == "enable" else "not started at boot",
                        Disruption.NONE,
                        verb,
                        {"units": units},
                    )
                )
        return changes

    def _plan_restarts(self, restarts: t.Sequence[tuple[str, str, str]], state: HostState) -> list[Change]:
        names = [name for name, _kind, _why in restarts]
        blocked = None
        if state.maintenance:
            blocked = "%s exists: the host is under maintenance; remove the file to let services start" % (
                MAINTENANCE_FILE
            )
        changes = []
        for name, kind, why in restarts:
            service = _service_state(state, name)
            changes.append(
                Change(
                    self.name,
                    unit_name(name),
                    "started" if service.running else (service.active or None),
                    "started" if kind == "start" else "restarted",
                    why,
                    Disruption.RESTART_NIM if service.running and kind == "restart" else Disruption.NONE,
                    "restart",
                    {"names": names},
                    blocked=blocked,
                )
            )
        # Last, because it would start every enabled unit that does not run yet.
        if any(model.state == "started" for model in self.models) and not state.target_active and not blocked:
            changes.append(
                Change(self.name, "nim.target", "inactive", "active", "groups the services", action="start_target")
            )
        return changes

    # -- apply ----------------------------------------------------------------------------------------

    def apply(self, host: Host, change: Change) -> None:
        data = change.data
        if change.action == "prerequisite":
            raise FleetError(str(data["reason"]), str(data["message"]), changes=[])
        if change.action == "directory":
            host.make_dir(data["path"], mode=data["mode"], uid=data["uid"], gid=data["gid"])
        elif change.action == "file":
            if host.read_text(data["path"]) != data["text"]:
                host.write_file(data["path"], data["text"], mode=data["mode"])
        elif change.action == "key":
            if host.stat(CONFIGURATION_DIRECTORY) is None:
                host.make_dir(CONFIGURATION_DIRECTORY, mode=0o755)
            host.write_file(KEY_FILE, render_environment(self.key or ""), mode=0o600)
        elif change.action == "secrets":
            host.write_file(data["path"], data["text"], mode=0o600)
        elif change.action == "secrets_absent":
            host.remove(data["path"])
        elif change.action == "key_absent":
            host.remove(KEY_FILE)
        elif change.action == "stop":
            self._stop(host, data["name"], data["stop_timeout"])
        elif change.action == "remove":
            self._remove(host, data["name"])
        elif change.action == "remove_target":
            self._systemctl(host, "disable", ["nim.target"], "--now", "--no-reload")
            host.remove(UNIT_DIRECTORY + "/nim.target")
        elif change.action == "remove_path":
            host.remove(data["path"])
        elif change.action == "daemon_reload":
            self._daemon_reload(host, data["endangered"])
        elif change.action in ("enable", "disable"):
            self._set_enabled(host, change.action, data["units"])
        elif change.action == "start_target":
            self._systemctl(host, "start", ["nim.target"])
        elif change.action == "restart":
            self._restart(host, data["names"])

    def _systemctl(self, host: Host, verb: str, units: t.Sequence[str], *options: str) -> None:
        host.check(
            ["systemctl", verb, *options, *units],
            reason="systemctl_failed",
            doing="systemctl %s %s" % (verb, " ".join(units)),
            remedy="See 'systemctl status %s' and 'journalctl -u %s'." % (units[0], units[0]) if units else "",
        )

    def _stop(self, host: Host, name: str, stop_timeout: int) -> None:
        self._systemctl(host, "stop", [unit_name(name)])
        # A stop between an end of the wrapper and its restart leaves the container running.
        for container in (container_name(name), container_name(name) + "-download"):
            found = self.api.container(container)
            if found is not None and (found.get("State") or {}).get("Running"):
                host.check(
                    ["docker", "stop", "-t", str(stop_timeout), container],
                    reason="stop_failed",
                    doing="Stopping container %s" % container,
                )

    def _remove(self, host: Host, name: str) -> None:
        for container in (container_name(name), container_name(name) + "-download"):
            if self.api.available() and self.api.container(container) is not None:
                host.check(
                    ["docker", "rm", "-f", container],
                    reason="remove_failed",
                    doing="Removing container %s" % container,
                )
        unit = unit_name(name)
        if host.exists("%s/%s" % (UNIT_DIRECTORY, unit)):
            self._systemctl(host, "disable", [unit], "--no-reload")
        host.remove("%s/%s" % (UNIT_DIRECTORY, unit))
        host.remove("%s/%s.json" % (CONFIGURATION_DIRECTORY, name))
        host.remove(secret_path(name))
        host.remove("%s/%s.download.json" % (STATE_DIRECTORY, name))
        host.remove("%s/%s.json" % (RUNTIME_DIRECTORY, name))
        host.remove("%s/%s.stop" % (RUNTIME_DIRECTORY, name))
        # Fails when systemd does not remember the unit, and then there is nothing to forget.
        host.run(["systemctl", "reset-failed", unit])

    def _daemon_reload(self, host: Host, endangered: t.Sequence[str]) -> None:
        self._systemctl(host, "daemon-reload", [])
        for container in endangered:
            seen = host.run(["docker", "exec", container, "nvidia-smi", "-L"], timeout=60)
            if not seen.ok:
                self.warnings.append(
                    "Container %s has lost its GPUs by systemctl daemon-reload (%s): recreate it, and use the nvidia "
                    "runtime in mode jit-cdi or CDI devices so that it does not happen again."
                    % (container, seen.last_line())
                )

    def _set_enabled(self, host: Host, verb: str, units: t.Sequence[str]) -> None:
        todo = []
        for unit in units:
            shown = host.run(["systemctl", "show", "--property", "UnitFileState", "--value", unit]).stdout.strip()
            if (shown == "enabled") != (verb == "enable"):
                todo.append(unit)
        if todo:
            # The one daemon-reload of this run comes after it.
            self._systemctl(host, verb, todo, "--no-reload")

    def _restart(self, host: Host, names: t.Sequence[str]) -> None:
        """Start or restart all services in one go, so that their stops overlap; a later change then finds it done."""
        wanted: dict[str, str] = {}
        for name in names:
            text = host.read_text("%s/%s.json" % (CONFIGURATION_DIRECTORY, name))
            wanted[name] = str(_json_object(text).get("spec", ""))
        todo = [name for name in names if name not in self._restarted]
        if not todo:
            return
        self._restarted.update(todo)
        for name in todo:
            # Failures of the past must not delay this start, and its word is how the new wrapper is recognised.
            host.remove("%s/%s.json" % (RUNTIME_DIRECTORY, name))
        units = [unit_name(name) for name in todo]
        # Fails for units that systemd has not loaded yet, and those have no start limit to reset.
        host.run(["systemctl", "reset-failed", *units])
        self._systemctl(host, "restart", units)
        end = host.monotonic() + WRAPPER_TIMEOUT
        for name in todo:
            while not self._has_spoken(host, name, wanted[name]) and host.monotonic() < end:
                host.sleep(0.1)

    def _has_spoken(self, host: Host, name: str, spec: str) -> bool:
        """Whether the new wrapper has said what it starts.

        Raises:
            FleetError: ``start_failed`` when systemd has given up already.
        """
        runtime = _json_object(host.read_text("%s/%s.json" % (RUNTIME_DIRECTORY, name)))
        if runtime.get("spec") == spec:
            return True
        unit = unit_name(name)
        shown = host.run(["systemctl", "show", "--property", "ActiveState", "--value", unit])
        if shown.stdout.strip() == "failed":
            journal = host.run(["journalctl", "--unit", unit, "--lines", "20", "--output", "cat", "--no-pager"])
            said = [line for line in journal.stdout.splitlines() if line.startswith(("Cannot start", "Starting nim-"))]
            raise FleetError(
                "start_failed",
                "Starting %s failed: %s. See 'journalctl -u %s'."
                % (unit, (said or [journal.last_line()])[-1].rstrip("."), unit),
                unit=unit,
                log=journal.stdout[-4000:],
            )
        return False

    # -- result ---------------------------------------------------------------------------------------

    def result(self, state: HostState) -> Json:
        """Return values of the module: every service, what is there beside the list, and warnings."""
        known = not self.remove_all and not self._missing_prerequisites(state)
        configurations: t.Mapping[str, Json] = self.configurations(state) if known else {}
        listed = {model.name for model in self.models}
        warnings = list(self.warnings)
        orphans = [
            {"name": name, "unit": unit_name(name), "gpus": list(service.gpus), "state": describe(service, state)}
            for name, service in sorted(state.services.items())
            if name not in listed and service.exists
        ]
        if orphans:
            warnings.append(
                "Services on this host that are not in the list and were left alone: %s. "
                "To remove one, list it with state absent." % ", ".join(str(orphan["name"]) for orphan in orphans)
            )
        if state.maintenance:
            warnings.append("%s exists, so no service is started." % MAINTENANCE_FILE)
        services = []
        for model in self.models:
            configuration = configurations.get(model.name, {})
            services.append(
                {
                    "name": model.name,
                    "unit": model.unit,
                    "container": model.container,
                    "image": model.image,
                    "digest": configuration.get("digest", ""),
                    "gpus": list(configuration.get("gpus", [])),
                    "port": model.port,
                    "spec": configuration.get("spec", ""),
                    "state": describe(_service_state(state, model.name), state),
                    "url": model.url,
                }
            )
        return {"services": services, "orphans": orphans, "warnings": warnings}


# -- helpers --------------------------------------------------------------------------------------


def build_configuration(
    model: NimModel,
    image: ImageState,
    gpus: t.Sequence[str],
    *,
    injection: str,
    cgroup_driver: str,
    secret: Secrets,
) -> Json:
    """Content of ``/etc/nim/<name>.json``: all that the wrapper needs, nothing secret.

    ``spec`` names what the container runs; it leaves out what can change without a new container.
    """
    family = image.family
    environment = family.environment(model)
    if injection == "runtime":
        environment["NVIDIA_VISIBLE_DEVICES"] = ",".join(gpus)
    # Docker's slices exist with the systemd driver only.
    common = ["--cgroup-parent=nim.slice"] if cgroup_driver == "systemd" else []
    common += ["--cap-drop=ALL", "--security-opt=no-new-privileges", "--user=%d:%d" % (model.uid, model.gid)]
    common += ["--pids-limit=-1", "--shm-size=%d" % model.shm_size]
    common += ["--ulimit=%s=%s" % limit for limit in sorted(model.ulimits.items())]
    common += _gpu_arguments(gpus, injection)
    common += _mounts(model, family)
    network = [] if model.network_mode == "bridge" else ["--network=" + model.network_mode]
    address = "[%s]" % model.bind_address if ":" in model.bind_address else model.bind_address
    publish = (
        [] if model.network_mode == "host" else ["--publish=%s:%d:%d" % (address, model.port, model.container_port)]
    )
    create = [*common, *network, *publish, *_environment_arguments(environment), image.reference]
    create += family.command(model, image.command)
    content: Json = {"image": image.identifier, "create": create}
    if secret.values:
        content["secrets"] = secret.spec()
    spec = spec_hash(content)
    labels = ["--label=%s=%s" % (NAME_LABEL, model.name), "--label=%s=%s" % (IMAGE_LABEL, model.image)]
    labels.append("--label=%s=%s" % (DIGEST_LABEL, image.digest))

    download: Json | None = None
    step = family.download(model)
    if step is not None:
        words = [*_log_arguments(model.container + "-download"), *labels, *common, *network]
        words += [*_environment_arguments({**environment, **step.environment}), image.reference, *step.command]
        download = {
            "create": words,
            # What decides which files are fetched, and where to.
            "key": spec_hash(
                [image.identifier, model.profile, bool(model.lora_directory), model.cache_directory, sorted(gpus)]
            ),
        }
    tls = model.environment.get("NIM_SSL_MODE", "").lower() == "tls"
    return {
        "name": model.name,
        "spec": spec,
        "image": model.image,
        "digest": image.digest,
        "family": family.key,
        "gpus": list(gpus),
        "port": model.port,
        "create": [*_log_arguments(model.container), *labels, *create],
        "download": download,
        # Names alone; the values are in the environment file.
        "secret_environment": sorted(secret.values),
        # No known way to fetch the files beforehand: the service has to do it, and then it needs the key.
        "key_in_service": step is None and family.key == "unknown",
        "cache_directory": model.cache_directory,
        "ready_url": (model.url.replace("http:", "https:", 1) if tls else model.url) + "/v1/health/ready",
        "stop_timeout": model.stop_timeout,
        "docker_timeout": model.start_timeout,
    }


def _log_arguments(tag: str) -> list[str]:
    return ["--log-driver=journald", "--log-opt=tag=" + tag]


def _environment_arguments(environment: t.Mapping[str, str]) -> list[str]:
    return ["--env=%s=%s" % pair for pair in sorted(environment.items())]


def _gpu_arguments(gpus: t.Sequence[str], injection: str) -> list[str]:
    if injection == "runtime":
        return ["--runtime=nvidia"]
    if injection == "cdi":
        return ["--device=nvidia.com/gpu=" + uuid for uuid in gpus]
    # The option is read as CSV, so a list of devices needs quotes of its own.
    return ['--gpus="device=%s"' % ",".join(gpus)]


def _mounts(model: NimModel, family: Family) -> list[str]:
    mounts = ["--mount=type=bind,source=%s,target=%s" % (model.cache_directory, family.cache_path)]
    for source_path, target in ((model.weights_directory, WEIGHTS_PATH), (model.lora_directory, LORA_PATH)):
        if source_path:
            mounts.append("--mount=type=bind,source=%s,target=%s,readonly" % (source_path, target))
    return mounts


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


def _service_state(state: HostState, name: str) -> ServiceState:
    return state.services.get(name) or ServiceState(name)


def secret_path(name: str) -> str:
    """Environment file of a model; a model cannot be called ``ngc``, whose name the key's file has."""
    return "%s/%s.env" % (CONFIGURATION_DIRECTORY, name)


def _ports(model: NimModel, images: t.Mapping[str, ImageState]) -> list[tuple[int, str]]:
    """TCP ports that a model takes on the host, with the option that says so."""
    found = [(model.port, "port")]
    image = images.get(model.image)
    backend = image.family.backend_port(model) if image else None
    if backend is not None:
        found.append((backend, "environment." + BACKEND_PORT_VARIABLE))
    return found


def _collision(model: NimModel, listener: Listener, images: t.Mapping[str, ImageState]) -> str:
    """The option whose port a listener holds; empty when it holds none of the model's."""
    if not addresses_overlap(model.bind_address, listener.address):
        return ""
    return next((option for port, option in _ports(model, images) if port == listener.port), "")


def _json_object(text: str | None) -> Json:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


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
        reference=run if run in known else identifier,
        digest=digest,
        family=family_of_image(image, reference.tag),
        command=tuple(str(word) for word in config.get("Cmd") or ()),
    )


def _gpu_problem(inventory: t.Any) -> str:
    if inventory.gpus:
        return ""
    if not inventory.pci:
        return "This host has no NVIDIA GPU."
    if inventory.driver is None:
        return "The NVIDIA driver is not loaded."
    return "nvidia-smi shows no GPU: %s." % (inventory.smi_error or "no reason given").rstrip(".")


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


def _socket_owners(host: Host, inodes: set[str]) -> dict[str, tuple[int, str, str, str]]:
    """Process id, command, unit and container id by socket inode."""
    wanted = {"socket:[%s]" % inode: inode for inode in inodes}
    found: dict[str, tuple[int, str, str, str]] = {}
    for entry in host.list_dir("/proc"):
        if not entry.isdigit():
            continue
        for descriptor in host.list_dir("/proc/%s/fd" % entry):
            inode = wanted.get(host.read_link("/proc/%s/fd/%s" % (entry, descriptor)) or "")
            if inode is not None and inode not in found:
                command = (host.read_text("/proc/%s/comm" % entry) or "?").strip()
                unit, container_id = parse_cgroup(host.read_text("/proc/%s/cgroup" % entry) or "")
                found[inode] = (int(entry), command, unit, container_id)
        if len(found) == len(wanted):
            break
    return found


def _endangered(host: Host, version: str, info: Json, containers: t.Sequence[Json]) -> tuple[str, ...]:
    """Running containers that systemctl daemon-reload may take the GPUs from.

    That happens where systemd manages the cgroups and the devices were given behind runc's back: by ``--gpus`` up to
    Docker 28, or by the nvidia runtime in legacy mode (NVIDIA's troubleshooting page on "Unknown Error").
    """
    if info.get("CgroupDriver") != "systemd":
        return ()
    major = int((re.match(r"\d+", version) or ["0"])[0])
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
