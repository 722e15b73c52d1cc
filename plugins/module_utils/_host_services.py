# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What serves on a GPU host: container engine, toolkit, NIM services, disk space and ports, for the look at the host."""

from __future__ import annotations

import typing as t
import urllib.parse

from ._docker_api import DockerApi
from ._errors import FleetError
from ._health_target import HealthTarget
from ._host import Host
from ._image_store import CONTAINERD_ROOT, DOCKER_ROOT
from ._listeners import listening_sockets
from ._nim_health import HealthCheck
from ._nim_log import PHASE_WORDS
from ._nim_paths import configuration_path, configured_services
from ._nim_process_state import read_word
from ._nvidia_container_toolkit_planner import CONFIG, PACKAGES, configured_mode
from ._os_release import OsRelease
from ._package_versions import upstream_version
from ._packages import package_manager
from ._untrusted import json_object, strings

Json = t.Dict[str, t.Any]

#: Where space is used up on a GPU host.
SPACE_PATHS = ("/", DOCKER_ROOT, CONTAINERD_ROOT, "/var/lib/nim")

#: What a service that is not ready is called in one word or two.
_STATES = {
    "unit_missing": "no unit",
    "not_running": "stopped",
    "maintenance": "maintenance",
    "wrong_server": "port taken",
    "wrong_model": "wrong model",
    "unit_failed": "failed",
    "container_ended": "failed",
    "start_failed": "failed",
    "restart_loop": "failed",
}


def engine(host: Host, api: DockerApi) -> Json:
    """The Docker Engine: what is live in the daemon, or why it does not answer."""
    answer: Json = {
        "installed": host.which("dockerd") is not None,
        "running": False,
        "version": "",
        "runtimes": [],
        "default_runtime": "",
        "live_restore": False,
        "cgroup_driver": "",
        "storage_driver": "",
        "cdi": False,
        "root": "",
        "problem": "",
    }
    if not answer["installed"]:
        return answer
    try:
        info = api.info()
    except FleetError as error:
        answer["problem"] = error.message
        return answer
    answer.update(
        running=True,
        version=str(info.get("ServerVersion", "")),
        runtimes=sorted(info.get("Runtimes") or {}),
        default_runtime=str(info.get("DefaultRuntime", "")),
        live_restore=bool(info.get("LiveRestoreEnabled")),
        cgroup_driver=str(info.get("CgroupDriver", "")),
        storage_driver=str(info.get("Driver", "")),
        cdi=bool(info.get("CDISpecDirs")),
        root=str(info.get("DockerRootDir", "")),
    )
    return answer


def toolkit(host: Host, release: OsRelease) -> Json:
    """The NVIDIA Container Toolkit: version, packages, configured mode."""
    packages = {name: package.version for name, package in package_manager(host, release).installed(*PACKAGES).items()}
    return {
        "version": upstream_version(packages.get(PACKAGES[0], "")),
        "packages": packages,
        "consistent": len(set(packages.values())) <= 1,
        "mode": configured_mode(host.read_text(CONFIG)) or "",
    }


def space(host: Host) -> Json:
    """Free bytes on the file systems where images and models lie by default."""
    return {path: host.free_bytes(path) for path in SPACE_PATHS}


def ports(host: Host) -> list[Json]:
    """TCP listeners of the host, without their processes."""
    found = set()
    for path, ipv6 in (("/proc/net/tcp", False), ("/proc/net/tcp6", True)):
        for address, port, _inode in listening_sockets(host.read_text(path) or "", ipv6):
            found.add((port, address))
    return [{"port": port, "address": address} for port, address in sorted(found)]


def services(host: Host, api: DockerApi) -> list[Json]:
    """Every NIM service that this collection has put on the host, as it is now; waits for nothing."""
    entries: list[Json] = []
    targets: list[HealthTarget] = []
    for name in configured_services(host):
        found = json_object(host.read_text(configuration_path(name)))
        url = _parts(found.get("ready_url"))
        if not found or url is None:
            entries.append({"name": name, "ready": False, "state": "broken configuration"})
            continue
        target = HealthTarget(
            name=str(found.get("name") or name),
            address=url[1],
            port=url[2],
            scheme=url[0],
            completion="",
            cache_directory=str(found.get("cache_directory") or "/"),
        )
        targets.append(target)
        entries.append(
            {
                "name": target.name,
                "image": str(found.get("image") or ""),
                "digest": str(found.get("digest") or ""),
                "gpus": strings(found.get("gpus")),
                "port": target.port,
                "family": str(found.get("family") or ""),
                "cache_directory": str(found.get("cache_directory") or ""),
            }
        )
    outcome = HealthCheck(host, api, targets).run(None, interval=0, wait=False, record=False)
    health = {str(model["name"]): model for model in outcome.models}
    for entry in entries:
        model = health.get(entry["name"])
        if model is None:
            continue
        word = read_word(host, entry["name"])
        entry.update(
            {key: model[key] for key in ("ready", "phase", "seconds_to_ready", "restarts", "model_id", "models")},
            version=model["version"],
            url=model["url"],
            reason=model["reason"],
            message=model["message"],
            failures=word.failures,
            state=state_of(model, word.failures),
        )
    return entries


def _parts(url: t.Any) -> tuple[str, str, int] | None:
    """Scheme, address and port of a service; None when it is no such URL."""
    try:
        parts = urllib.parse.urlsplit(str(url or "http://127.0.0.1:8000"))
        port = parts.port or 8000
    except ValueError:
        return None
    return parts.scheme or "http", parts.hostname or "127.0.0.1", port


def state_of(model: t.Mapping[str, t.Any], failures: int) -> str:
    """State of a service in a word or two."""
    if model["ready"]:
        return "ready"
    if model["reason"]:
        return _STATES.get(str(model["reason"]), str(model["reason"]).replace("_", " "))
    if failures:
        return "failing (%d failed start%s)" % (failures, "" if failures == 1 else "s")
    return PHASE_WORDS.get(str(model["phase"]), str(model["phase"]))
