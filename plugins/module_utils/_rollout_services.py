# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The NIM services of a host while it is out of service, and whoever else uses the GPUs."""

from __future__ import annotations

import typing as t
import urllib.parse
from dataclasses import dataclass, replace

from ._docker_api import DockerApi
from ._driver_clients import foreign_holders, lasting
from ._errors import FleetError
from ._gpu_holders import driver_holders
from ._health_target import HealthTarget, parse_targets
from ._host import Host
from ._nim_health import HealthCheck
from ._nim_paths import configuration_path, configured_services, container_name, download_name, unit_name
from ._nim_process_state import observe_units
from ._nim_service_work import stop_containers
from ._untrusted import json_object, real_number

#: Seconds between two lines about services that start.
INTERVAL = 5
#: Seconds to stop a service where its configuration does not say.
_STOP_TIMEOUT = 60


@dataclass(frozen=True)
class Service:
    """A NIM service that this collection has put on the host.

    Attributes:
        active: Whether its unit runs or is about to.
        reference: Image as its container is made from it.
        stop_timeout: Seconds before a container that does not end is killed.
    """

    name: str
    active: bool
    reference: str
    image: str
    stop_timeout: int
    target: HealthTarget

    @property
    def unit(self) -> str:
        return unit_name(self.name)


def observe_own(host: Host) -> tuple[Service, ...]:
    """All NIM services of the host, sorted by name."""
    names = configured_services(host)
    units = observe_units(host, list(map(unit_name, names)))
    found = []
    for name in names:
        configuration = json_object(host.read_text(configuration_path(name)))
        create = configuration.get("create")
        words = [str(word) for word in create] if isinstance(create, list) else []
        found.append(
            Service(
                name=name,
                active=units[unit_name(name)].active in ("active", "activating", "reloading"),
                reference=next((word for word in words if not word.startswith("--")), ""),
                image=str(configuration.get("image") or ""),
                stop_timeout=int(real_number(configuration.get("stop_timeout"), _STOP_TIMEOUT)),
                target=_target(name, configuration),
            )
        )
    return tuple(found)


def _target(name: str, configuration: t.Mapping[str, t.Any]) -> HealthTarget:
    try:
        url = urllib.parse.urlsplit(str(configuration.get("ready_url") or ""))
        address, port, scheme = url.hostname or "127.0.0.1", url.port or 8000, url.scheme or "http"
    except ValueError:
        address, port, scheme = "127.0.0.1", 8000, "http"
    return HealthTarget(
        name=name,
        address=address,
        port=port,
        scheme=scheme,
        start_timeout=real_number(configuration.get("docker_timeout"), 1800.0),
        cache_directory=str(configuration.get("cache_directory") or "/"),
    )


def serving(host: Host, api: DockerApi, services: t.Sequence[Service]) -> tuple[str, ...]:
    """Names of those that are ready now; waits for nothing."""
    active = [service.target for service in services if service.active]
    if not active:
        return ()
    outcome = HealthCheck(host, api, active).run(None, interval=0, wait=False, record=False)
    return tuple(str(model["name"]) for model in outcome.models if model["ready"])


def strangers(host: Host, api: DockerApi, services: t.Sequence[Service]) -> list[str]:
    """Who uses the GPUs beside the services and the driver's own daemons, in words.

    Containers that could use one are among them although they do not at the moment: the new driver is not the one whose
    libraries they have.
    """
    own = {name for service in services for name in (container_name(service.name), download_name(service.name))}
    return sorted(lasting(host, lambda: _strangers(host, api, own)).values())


def _strangers(host: Host, api: DockerApi, own: t.Collection[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    running: dict[str, str] = {}
    try:
        for entry in api.containers(all=False):
            name = str((entry.get("Names") or [""])[0]).lstrip("/")
            running[str(entry.get("Id") or name)] = name
        for identifier, name in running.items():
            if name not in own and _has_gpus(api.container(identifier) or {}):
                found[name] = "container %s" % name
    except FleetError:
        # Without Docker no container uses a GPU; its processes are found below.
        pass
    for holder in foreign_holders(driver_holders(host)):
        # Docker's own record of the name is not found where its data were moved by anything but daemon.json.
        name = holder.container or running.get(holder.container_id, "")
        if name not in own:
            found[name or "pid %d" % holder.pid] = replace(holder, container=name).describe()
    return found


def _has_gpus(container: t.Mapping[str, t.Any]) -> bool:
    """Whether a container was given GPUs, by runtime, request or device."""
    host = container.get("HostConfig") or {}
    if any(
        request.get("Driver") in ("cdi", "nvidia") or any("gpu" in names for names in request.get("Capabilities") or [])
        for request in host.get("DeviceRequests") or []
    ):
        return True
    entries = [str(entry) for entry in (container.get("Config") or {}).get("Env") or []]
    visible = [entry.partition("=")[2] for entry in entries if entry.startswith("NVIDIA_VISIBLE_DEVICES=")]
    return host.get("Runtime") == "nvidia" and bool(visible) and visible[-1] not in ("", "void", "none")


def stop_services(host: Host, api: DockerApi, services: t.Sequence[Service]) -> None:
    """Stop them all at once, each with its own time to finish.

    Raises:
        FleetError: ``systemctl_failed``; ``stop_failed``.
    """
    units = [service.unit for service in services if service.active]
    if units:
        host.check(
            ["systemctl", "stop", *units],
            reason="systemctl_failed",
            doing="systemctl stop %s" % " ".join(units),
            remedy="See 'journalctl -u %s'." % units[0],
        )
    if api.available():
        for service in services:
            stop_containers(host, api, service.name, service.stop_timeout)


def start_services(host: Host, services: t.Sequence[Service], names: t.Sequence[str]) -> None:
    """Start those of them that do not run; one that was removed meanwhile is not missed.

    Raises:
        FleetError: ``systemctl_failed``.
    """
    units = [service.unit for service in services if service.name in names and not service.active]
    if not units:
        return
    # Failures of the past must not delay this start; fails for units without any.
    host.run(["systemctl", "reset-failed", *units])
    host.check(
        ["systemctl", "start", *units],
        reason="systemctl_failed",
        doing="systemctl start %s" % " ".join(units),
        remedy="See 'journalctl -u %s'." % units[0],
    )


def wait_ready(
    host: Host,
    api: DockerApi,
    services: t.Sequence[Service],
    names: t.Sequence[str],
    models: t.Sequence[t.Any],
    tell: t.Callable[[str], None],
) -> None:
    """Wait until every service is ready and has answered a request.

    Args:
        models: Entries of ``nim_models``, which say what to ask and how long to wait.
        tell: Gets a line now and then.

    Raises:
        FleetError: With the reason of the first service that does not become ready.
    """
    known = {target.name: target for target in parse_targets(models)}
    targets = [known.get(service.name, service.target) for service in services if service.name in names]
    if not targets:
        return
    check, resume = HealthCheck(host, api, targets), None
    while True:
        outcome = check.run(resume, interval=INTERVAL, wait=True)
        if outcome.failures:
            failure = outcome.failures[0][1]
            raise FleetError(
                failure.reason,
                " ".join(one.sentence for _target, one in outcome.failures),
                last_lines=list(failure.lines),
                signature=failure.signature,
            )
        if outcome.finished:
            return
        tell(outcome.text)
        resume = outcome.resume
