# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Docker Engine: packages of Docker's own repository or of the distribution, version guard, service."""

from __future__ import annotations

import typing as t
from dataclasses import replace

from ._docker_engine_planner import CONTAINERD, SERVICE, EnginePlanner, EngineState
from ._docker_restart import start_docker
from ._errors import FleetError
from ._host import Host
from ._os_release import OsRelease, read_os_release
from ._packages import PackageManager, package_manager
from ._resource import Change, Resource
from ._systemd import unit_properties


class DockerEngine(EnginePlanner, Resource[EngineState]):
    """An engine that can run NIM: right source, right version, held, enabled and running."""

    def apply(self, host: Host, change: Change) -> None:
        release = read_os_release(host)
        manager = package_manager(host, release)
        if change.action == "repository":
            manager.apply_repository(change.data["repository"])
        elif change.action == "packages":
            self._install(host, manager, release)
        elif change.action == "client":
            self._install_client(manager, release)
            self._hold_again(manager, release)
        elif change.action in ("hold", "unhold"):
            present = manager.installed(*self.engine_packages(release), "docker-cli", "containerd")
            if change.action == "hold":
                manager.hold(*(name for name, package in present.items() if not package.held))
            else:
                manager.unhold(*(name for name, package in present.items() if package.held))
        elif change.action == "enable":
            host.check(
                ["systemctl", "enable", SERVICE],
                reason="docker_start_failed",
                doing="Enabling %s" % SERVICE,
            )
        elif change.action == "start":
            self._start(host)
        elif change.action == "containerd":
            host.check(
                ["systemctl", "start", CONTAINERD],
                reason="docker_start_failed",
                doing="Starting %s" % CONTAINERD,
                remedy="See 'journalctl -u containerd'.",
                timeout=120,
            )

    def _install(self, host: Host, manager: PackageManager, release: OsRelease) -> None:
        manager.repair()
        names = self.engine_packages(release)
        if not manager.available(names[0]):
            manager.refresh()
        state = self.observe(host)
        self._check_source(state)
        engine = state.packages.get(names[0])
        wanted: t.Dict[str, t.Optional[str]] = {name: None for name in names if name not in state.packages}
        if engine is None or not self._good(state, engine):
            offers = manager.available(names[0]).get(names[0], [])
            target = self._best_offer(offers)
            if target is None and self.package_source == "docker":
                manager.refresh(self.repository(release))
                offers = manager.available(names[0]).get(names[0], [])
                target = self._best_offer(offers)
            if target is None:
                state = replace(state, offers={names[0]: offers})
                why = (
                    "version %s is wanted" % self.version
                    if self.version
                    else "%s or newer is wanted" % self.minimum_version
                )
                raise self._no_version(state, engine, why)
            blocked = self._blocked(state, engine, target)
            if blocked:
                raise FleetError("restart_refused", "Changing Docker Engine to %s was refused: %s." % (target, blocked))
            wanted[names[0]] = target
            if "docker-ce-cli" in names:
                wanted["docker-ce-cli"] = target
        if self.package_source == "distribution" and manager.available("docker-cli"):
            wanted["docker-cli"] = None
        manager.install(wanted)
        self._hold_again(manager, release)

    def _hold_again(self, manager: PackageManager, release: OsRelease) -> None:
        """apt forgets the hold of a package that it was told to change all the same."""
        if self.hold:
            manager.hold(*manager.installed(*self.engine_packages(release), "docker-cli", "containerd"))

    def _install_client(self, manager: PackageManager, release: OsRelease) -> None:
        if self.package_source == "distribution":
            manager.install({"docker-cli": None})
            return
        engine = manager.installed("docker-ce").get("docker-ce")
        if engine is not None:
            manager.install({"docker-ce-cli": engine.version})

    def _start(self, host: Host) -> None:
        if unit_properties(host, SERVICE, "ActiveState").get("ActiveState") == "active":
            return
        result = start_docker(host)
        if not result.ok:
            log = host.run(["journalctl", "-u", SERVICE, "-n", "40", "-o", "cat", "--no-pager"]).stdout
            lines = [
                line for line in log.splitlines() if "failed to start daemon" in line or "unable to configure" in line
            ]
            raise FleetError(
                "docker_start_failed",
                "Starting Docker failed: %s. See 'journalctl -u docker'."
                % (lines or [result.last_line()])[-1].rstrip("."),
                rc=result.rc,
            )
