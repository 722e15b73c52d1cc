# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Taking back what the collection put on a host, once its NIM services are gone."""

from __future__ import annotations

import collections.abc
import dataclasses
import os
import re
import typing as t
from dataclasses import dataclass, field

from ._apt import APT_SOURCES
from ._daemon_json import DEFAULT_CONFIG, invalid, read, taken_out
from ._dnf import DNF_REPOSITORIES, Dnf
from ._docker_api import DockerApi
from ._docker_daemon import replace_file
from ._driver_clients import is_client
from ._driver_transaction import MODULE, reset_stream
from ._errors import FleetError
from ._gpu_holders import driver_holders
from ._host import Host
from ._nim_models import is_system_directory
from ._nim_paths import (
    BASE_DIRECTORY,
    CONFIGURATION_DIRECTORY,
    KEY_FILE,
    RUNTIME_DIRECTORY,
    UNIT_DIRECTORY,
    WRAPPER,
    configured_services,
)
from ._nouveau import BLACKLIST, remove_blacklist
from ._nvidia_container_toolkit_planner import CONFIG as TOOLKIT_CONFIG
from ._nvidia_container_toolkit_planner import PACKAGES as TOOLKIT_PACKAGES
from ._nvidia_driver_packages import QUERY_PATTERNS, is_driver_package
from ._nvidia_driver_state import NON_FREE, PREFERENCES, UNATTENDED
from ._os_release import read_os_release
from ._packages import Package, package_manager
from ._resource import Change, Disruption, Resource

TARGET = UNIT_DIRECTORY + "/nim.target"
#: Files and directories that hold nothing but what this collection wrote.
OWN_PATHS = (
    UNIT_DIRECTORY + "/nim.slice",
    WRAPPER,
    KEY_FILE,
    RUNTIME_DIRECTORY,
    BASE_DIRECTORY + "/state",
    BASE_DIRECTORY + "/maintenance",
    "/var/lib/gpu_fleet",
    "/run/gpu_fleet",
)
#: Removed only when nothing is left in them.
EMPTY_PATHS = (
    BASE_DIRECTORY + "/cache",
    BASE_DIRECTORY,
    CONFIGURATION_DIRECTORY,
    os.path.dirname(WRAPPER),
)
DOCKER_PACKAGES = (
    "docker-ce",
    "docker-ce-cli",
    "containerd.io",
    "docker.io",
    "docker-cli",
    "containerd",
    "moby-engine",
)
DRIVER_FILES = (BLACKLIST, PREFERENCES, UNATTENDED, NON_FREE)
#: Part -> names of its repository definitions (without extension).
REPOSITORIES = {
    "toolkit": r"nvidia-container-toolkit",
    "docker": r"docker|docker-ce-stable",
    "driver": r"nvidia-cuda|cuda-.+",
}
#: First line of the repository definitions that this collection wrote.
MANAGED = "# Managed by gpu_fleet.nim."


@dataclass(frozen=True)
class CleanupState:
    """What is still there.

    Attributes:
        services: NIM services that are still configured.
        paths: Own files and directories, and caches to be removed, that exist.
        packages: Installed packages of the parts that are to go, by part.
        repositories: Their repository definitions, by part.
        containers: Names of running containers.
        holders: Who uses the GPUs.
        driver_loaded: Whether the kernel module is in memory.
        stream: Enabled stream of the driver's module (EL 8 and 9); empty for none.
        own_keys: Whether daemon.json has keys of ours and no engine will be there to read them.
        warnings: What cannot be removed and does not block the rest.
    """

    services: tuple[str, ...] = ()
    target: bool = False
    paths: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    packages: t.Mapping[str, t.Mapping[str, Package]] = field(default_factory=dict)
    repositories: t.Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    containers: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()
    driver_loaded: bool = False
    stream: str = ""
    own_keys: bool = False
    warnings: tuple[str, ...] = ()


class HostCleanup(Resource[CleanupState]):
    """Own files always; model caches, toolkit, engine and driver on request.

    Args:
        caches: Directories of model caches to remove.
        parts: Any of ``toolkit``, ``docker``, ``driver``.
        daemon_options: Keys of daemon.json that this collection sets, with their values; what still has them goes with
            the engine.
    """

    name = "gpu_host_cleanup"

    def __init__(
        self,
        *,
        caches: t.Sequence[str] = (),
        parts: t.Collection[str] = (),
        daemon_options: t.Mapping[str, t.Any] | None = None,
        api: DockerApi | None = None,
    ) -> None:
        self.caches = [cache_path(path) for path in caches]
        # The toolkit hooks into the engine, and the engine's containers use the driver: top first.
        self.parts = [part for part in ("toolkit", "docker", "driver") if part in parts]
        self.daemon_options = dict(daemon_options or {})
        self.api = api or DockerApi()

    def observe(self, host: Host) -> CleanupState:
        stream = ""
        packages: dict[str, t.Mapping[str, Package]] = {}
        repositories: dict[str, tuple[str, ...]] = {}
        if self.parts:
            manager = package_manager(host, read_os_release(host))
            wanted = {"toolkit": TOOLKIT_PACKAGES, "docker": DOCKER_PACKAGES, "driver": QUERY_PATTERNS}
            for part in self.parts:
                found = manager.installed(*wanted[part])
                if part == "driver":
                    found = {name: package for name, package in found.items() if is_driver_package(name)}
                packages[part] = found
                repositories[part] = tuple(_definitions(host, REPOSITORIES[part]))
            if "driver" in self.parts and isinstance(manager, Dnf):
                stream = manager.module_stream(MODULE) or ""
        own_keys, warnings = False, []
        # An engine that did not come as a package stays, and keeps its configuration.
        if "docker" in self.parts and (packages["docker"] or host.which("dockerd") is None):
            try:
                own_keys = self._own_keys_out(host)[0]
            except FleetError as error:
                warnings.append("The keys of this collection in %s were not taken out. %s" % (DEFAULT_CONFIG, error))
        paths = [*OWN_PATHS, *self.caches, *(DRIVER_FILES if "driver" in self.parts else ())]
        if "toolkit" in self.parts:
            paths.append(TOOLKIT_CONFIG)
        return CleanupState(
            services=tuple(configured_services(host)),
            target=host.exists(TARGET),
            paths=tuple(path for path in paths if host.exists(path)),
            empty=tuple(path for path in EMPTY_PATHS if host.exists(path) and not self._remains(host, path)),
            packages=packages,
            repositories=repositories,
            containers=self._containers() if packages.get("docker") else (),
            holders=tuple(
                "%s (pid %d)" % (holder.command, holder.pid)
                for holder in (driver_holders(host) if packages.get("driver") else [])
                if not is_client(holder)
            ),
            driver_loaded=host.exists("/sys/module/nvidia"),
            stream=stream,
            own_keys=own_keys,
            warnings=tuple(warnings),
        )

    def _own_keys_out(self, host: Host) -> tuple[bool, str | None]:
        """Whether daemon.json has keys of ours, and its text without them; None when it is empty then.

        Raises:
            FleetError: ``daemon_json_invalid``.
        """
        text, damage = read(host, DEFAULT_CONFIG)
        if damage:
            raise invalid(DEFAULT_CONFIG, damage)
        after = taken_out(text or "", self.daemon_options)
        return after != (text or ""), after

    def _remains(self, host: Host, path: str) -> bool:
        """Whether a directory will still hold something when everything planned is gone."""
        gone = set(OWN_PATHS) | set(self.caches)
        for name in host.list_dir(path):
            inner = "%s/%s" % (path, name)
            if inner not in gone and not (inner in EMPTY_PATHS and not self._remains(host, inner)):
                return True
        return False

    def _containers(self) -> tuple[str, ...]:
        try:
            running = self.api.containers(all=False)
        except FleetError:
            # No daemon, no containers that a removal could stop.
            return ()
        return tuple(str((entry.get("Names") or ["?"])[0]).lstrip("/") for entry in running)

    def plan(self, state: CleanupState) -> list[Change]:
        changes = self._changes(state)
        if state.services:
            left = "NIM services %s are still on the host; remove them first (nim_service, state absent)" % ", ".join(
                state.services
            )
            return [dataclasses.replace(change, blocked=left) for change in changes]
        return changes

    def _changes(self, state: CleanupState) -> list[Change]:
        changes = []
        if state.target:
            changes.append(self._gone("nim.target", "groups services that are gone", "target", TARGET))
        changes += [self._gone(path, "was asked for", "path", path) for path in state.paths if path in self.caches]
        free = []
        for part in self.parts:
            blocked = None
            disruption = Disruption.NONE
            if part == "docker" and state.containers:
                blocked = "containers %s still run; stop them first" % ", ".join(state.containers)
                disruption = Disruption.RESTART_DOCKER
            if part == "driver" and state.holders:
                blocked = "%s still use the GPUs; stop them first" % ", ".join(state.holders)
                disruption = Disruption.UNLOAD_DRIVER
            packages = state.packages.get(part) or {}
            if packages:
                changes.append(
                    Change(
                        self.name,
                        "packages of %s" % part,
                        ", ".join(sorted(packages)),
                        None,
                        "was asked for",
                        disruption,
                        "packages",
                        {"part": part, "names": sorted(packages)},
                        blocked=blocked,
                    )
                )
            if not blocked:
                free.append(part)
            if part == "docker" and state.own_keys and not blocked:
                changes.append(
                    self._gone("own keys in %s" % DEFAULT_CONFIG, "were set by this collection", "daemon_keys", "")
                )
        drivers = {change.what: change.blocked for change in changes}
        changes += [
            self._gone(path, "was written by this collection", "path", path)
            for path in state.paths
            if path not in self.caches and not (path in DRIVER_FILES and drivers.get("packages of driver"))
        ]
        changes += [self._gone(path, "nothing is left in it", "empty", path) for path in state.empty]
        # Last, as dnf may need a repository that is away; and while there is one, as it looks the module up.
        if "driver" in free and state.stream:
            changes.append(
                Change(self.name, "module stream %s" % MODULE, state.stream, None, "was asked for", action="stream")
            )
        changes += [
            self._gone(path, "names the repository of %s" % part, "repository", path)
            for part in free
            for path in state.repositories.get(part, ())
        ]
        return changes

    def _gone(self, what: str, why: str, action: str, path: str) -> Change:
        return Change(self.name, what, "present", None, why, action=action, data={"path": path})

    def apply(self, host: Host, change: Change) -> None:
        path = str(change.data.get("path", ""))
        if change.action == "target":
            # Fails when systemd does not know it any more; the file goes in any case.
            host.run(["systemctl", "disable", "--now", "nim.target"], timeout=60)
            host.run(["systemctl", "stop", "nim.slice"], timeout=60)
            host.remove(path)
            host.remove(UNIT_DIRECTORY + "/nim.slice")
            host.check(["systemctl", "daemon-reload"], reason="systemd", doing="Telling systemd about removed units")
        elif change.action == "packages":
            manager = package_manager(host, read_os_release(host))
            manager.unhold(*change.data["names"])
            # Purging some distributions' engine would take /var/lib/docker with it, and the images and volumes there.
            manager.remove(*change.data["names"], purge=change.data["part"] != "docker")
        elif change.action == "daemon_keys":
            text = self._own_keys_out(host)[1]
            directory = os.path.dirname(DEFAULT_CONFIG)
            if text is not None:
                replace_file(host, DEFAULT_CONFIG, text)
                return
            host.remove(DEFAULT_CONFIG)
            if not host.list_dir(directory):
                host.remove(directory)
        elif change.action == "stream":
            reset_stream(host)
        elif change.action == "repository":
            key = re.search(r"^Signed-By: (/\S+)$", host.read_text(path) or "", re.M)
            host.remove(path)
            if key:
                host.remove(key.group(1))
        elif path == BLACKLIST:
            remove_blacklist(host)
        elif change.action == "empty":
            # Somebody may have put something there since the look.
            if not host.list_dir(path):
                host.remove(path)
        else:
            host.remove(path)
            directory = os.path.dirname(path)
            if path == TOOLKIT_CONFIG and not host.list_dir(directory):
                host.remove(directory)

    def result(self, state: CleanupState) -> dict[str, t.Any]:
        """Return values of the module."""
        return {
            "reboot_required": "driver" in self.parts and state.driver_loaded,
            "warnings": list(state.warnings),
        }


def _definitions(host: Host, names: str) -> list[str]:
    """Repository definitions of these names that this collection wrote."""
    found = []
    for directory, extension in ((APT_SOURCES, ".sources"), (DNF_REPOSITORIES, ".repo")):
        for entry in host.list_dir(directory):
            stem, dot = os.path.splitext(entry)
            path = "%s/%s" % (directory, entry)
            if dot == extension and re.fullmatch(names, stem) and (host.read_text(path) or "").startswith(MANAGED):
                found.append(path)
    return found


# -- what a removal is about, out of the inventory and of a look at the host ------------------------


def cache_names(caches: t.Any) -> list[str]:
    """Names or paths of caches as a list; a text is split at commas."""
    if caches is None:
        return []
    if isinstance(caches, str):
        return [name.strip() for name in caches.split(",") if name.strip()]
    if not isinstance(caches, (list, tuple)):
        raise FleetError(
            "invalid_option", "remove_caches = %r: is no list; write names of models with commas." % (caches,)
        )
    return [str(name) for name in caches]


def listed_models(models: t.Any) -> list[t.Mapping[str, t.Any]]:
    """``nim_models`` as a list of mappings; None is an empty one.

    Raises:
        FleetError: ``invalid_option``; the value is not shown, as it may hold secrets.
    """
    found = [] if models is None else models
    if not isinstance(found, (list, tuple)) or not all(isinstance(model, collections.abc.Mapping) for model in found):
        raise FleetError(
            "invalid_option",
            "nim_models = (not shown): must be a list of models; write each model as one list entry, or leave it out.",
        )
    return list(found)


def cache_path(path: str, option: str = "caches") -> str:
    """A directory that may be removed as a model's cache, in its normal form.

    Raises:
        FleetError: ``invalid_option``.
    """
    normal = os.path.normpath(path)
    if not path.startswith("/") or is_system_directory(normal) or ".." in path.split("/"):
        raise FleetError(
            "invalid_option",
            "%s = %r: is no directory that can be a model cache; name the cache_directory of a model." % (option, path),
        )
    return normal


def removal_of(
    models: t.Sequence[t.Mapping[str, t.Any]], services: t.Sequence[t.Mapping[str, t.Any]], caches: t.Any
) -> dict[str, t.Any]:
    """What is to be removed from one host.

    Args:
        models: ``nim_models`` of the host.
        services: ``nim`` of ``gpu_host_info``.
        caches: Names of models whose caches are to go, or absolute paths.

    Returns:
        ``models`` for nim_service, ``images`` for nim_image, ``caches`` as paths.

    Raises:
        FleetError: ``invalid_option`` for a cache that must not be removed.
    """
    entries: dict[str, str] = {}
    directories: dict[str, str] = {}
    images: list[str] = []
    # The host knows better than the list where the files of a service are.
    for entry in (*models, *services):
        name = str(entry.get("name") or "")
        if not name:
            continue
        image = str(entry.get("image") or "")
        entries[name] = image or entries.get(name) or "registry.invalid/removed:removed"
        directories[name] = str(
            entry.get("cache_directory") or directories.get(name) or "%s/cache/%s" % (BASE_DIRECTORY, name)
        )
        if image and image not in images:
            images.append(image)
    wanted = cache_names(caches)
    return {
        "models": [{"name": name, "image": image, "state": "absent"} for name, image in sorted(entries.items())],
        "images": [{"image": image, "state": "absent"} for image in images],
        # Judged here, because the services are gone by the time the caches are.
        "caches": [
            cache_path(name if name.startswith("/") else directories[name], "remove_caches")
            for name in wanted
            if name[:1] == "/" or name in directories
        ],
    }


def unknown_caches(caches: t.Any, known: t.Collection[str]) -> list[str]:
    """Names that belong to no model anywhere: most likely misspelt."""
    return [name for name in cache_names(caches) if not name.startswith("/") and name not in known]
