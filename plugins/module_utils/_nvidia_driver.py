# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The NVIDIA driver as packages: installed, at one version, held, buildable, with nouveau out of the way."""

from __future__ import annotations

import os
import typing as t

from ._apt_sources import debian_source
from ._dkms import BUILD_SIGNS, build_error, build_module
from ._driver_branches import upstream_version
from ._driver_clients import foreign_holders, in_use_error
from ._driver_swap import start_clients_that_can, stop_clients, unload_modules
from ._driver_transaction import (
    download_packages,
    finish_interrupted,
    guard_removal,
    install_headers,
    install_later_headers,
    install_prerequisites,
    switch_stream,
)
from ._errors import FleetError
from ._gpu_holders import driver_holders
from ._gpu_inventory import observe_gpus
from ._host import Host
from ._loaded_driver import is_loaded
from ._nouveau import write_blacklist
from ._nvidia_driver_packages import QUERY_PATTERNS, PackagePlan, foreign_packages, is_driver_package, to_hold
from ._nvidia_driver_planner import DriverPlanner
from ._nvidia_driver_state import (
    LOCKED,
    NON_FREE,
    DriverState,
    boot_states,
    module_on_disk,
    on_disk_version,
)
from ._os_release import read_os_release
from ._package_versions import matches_version
from ._packages import Package, PackageManager, package_manager
from ._resource import Change, Resource


class NvidiaDriver(DriverPlanner, Resource[DriverState]):
    """The driver that is wanted on a host. Options are those of the module of the same name.

    Attributes:
        chosen: Version that is taken where several of the branch are on offer; empty for the newest.
    """

    chosen = ""

    def apply(self, host: Host, change: Change) -> None:
        os_release = read_os_release(host)
        manager = package_manager(host, os_release)
        if change.action == "repair":
            finish_interrupted(host, manager)
            self._enable(host)
        elif change.action == "repository":
            manager.apply_repository(change.data["repository"])
        elif change.action == "components":
            content = debian_source(host, os_release, change.data["components"])
            host.write_file(NON_FREE, content, mode=0o644)
            manager.refresh()
        elif change.action == "file":
            self._write(host, change)
        elif change.action == "blacklist":
            write_blacklist(host)
        elif change.action == "headers":
            install_headers(host, manager, change.data["package"])
        elif change.action == "later_headers":
            install_later_headers(host, manager, change.data["package"])
        elif change.action == "stream":
            switch_stream(host, change.data["stream"])
        elif change.action == "packages":
            self._swap_packages(host, manager)
        elif change.action == "build":
            build_module(host)
        elif change.action == "enable":
            self._enable(host, start=True)
        elif change.action == "hold":
            self._hold(host, manager)
        elif change.action == "unhold":
            self._unhold(host, manager)

    @staticmethod
    def _hold(host: Host, manager: PackageManager) -> None:
        installed = manager.installed(*QUERY_PATTERNS)
        loose = [name for name in to_hold(installed) if not installed[name].held]
        manager.hold(*loose)
        if manager.family == "rhel":
            names = sorted({*loose, *(host.read_text(LOCKED) or "").split()})
            host.make_dir(os.path.dirname(LOCKED), mode=0o755)
            host.write_file(LOCKED, "".join("%s\n" % name for name in names), mode=0o644)

    @staticmethod
    def _unhold(host: Host, manager: PackageManager) -> None:
        installed = manager.installed(*QUERY_PATTERNS)
        held = [name for name in to_hold(installed) if installed[name].held]
        if manager.family == "rhel":
            ours = (host.read_text(LOCKED) or "").split()
            manager.unhold(*[name for name in held if name in ours])
            host.remove(LOCKED)
        else:
            manager.unhold(*held)

    @staticmethod
    def _write(host: Host, change: Change) -> None:
        path, content = change.data["path"], change.data["content"]
        if content is None:
            host.remove(path)
        else:
            host.write_file(path, content, mode=0o644)

    def resolve(
        self, manager: PackageManager, plan: PackagePlan, installed: t.Mapping[str, Package], module: str = ""
    ) -> dict[str, str]:
        """Exact package versions for every choice, all of one driver version.

        Args:
            module: Version of the kernel module, when somebody else brings it.

        Raises:
            FleetError: ``version_not_available`` with what is on offer.
        """
        names = [name for choice in plan.choices for name in choice.names]
        if plan.pinning:
            names.append(plan.pinning)
        offers = manager.available(*names)
        if not any(choice.names[0] in offers for choice in plan.choices):
            # Package lists are missing or older than the repository.
            manager.refresh()
            offers = manager.available(*names)
        target = self.target(plan, installed, module)
        if not target and any(
            upstream_version(offer.version) == self.chosen
            for choice in plan.choices
            if choice.versioned and not choice.optional
            for name in choice.names
            for offer in offers.get(name, [])
        ):
            target = self.chosen
        resolved: dict[str, str] = {}
        if plan.pinning:
            if plan.pinning not in offers and plan.pinning not in installed:
                raise self._not_available(plan.pinning, self.version or self.branch, offers.get(plan.pinning, []))
            if plan.pinning in offers:
                resolved[plan.pinning] = offers[plan.pinning][0].version
        for choice in plan.choices:
            wanted = target or self.branch
            fitting = ""
            for name in choice.names:
                for offer in offers.get(name, []):
                    if not choice.versioned or matches_version(offer.version, wanted):
                        fitting = offer.version
                        resolved[name] = fitting
                        break
                if fitting:
                    break
            present = choice.installed_as(installed)
            if (
                not fitting
                and present is not None
                and (not choice.versioned or matches_version(present.version, wanted))
            ):
                # No longer on offer, but there already.
                fitting = present.version
            if not fitting and not choice.optional:
                found = [offer for name in choice.names for offer in offers.get(name, [])]
                raise self._not_available(" or ".join(choice.names), wanted, found)
            if fitting and choice.versioned and not target:
                # The first package decides; all others must have its version exactly.
                target = upstream_version(fitting)
        return resolved

    def _not_available(self, name: str, wanted: str, offers: t.Sequence[t.Any]) -> FleetError:
        versions = [offer.version for offer in offers]
        return FleetError(
            "version_not_available",
            "The package %s is not on offer %s in the %s; on offer: %s. Choose another nvidia_driver_branch or "
            "nvidia_driver_version, or check nvidia_driver_repository_url."
            % (
                name,
                "at version %s" % wanted if "." in wanted else "in branch %s" % wanted,
                "repository %s" % self.repository_url
                if self.source == "nvidia"
                else "repositories of the distribution",
                ", ".join(versions[:12]) or "nothing",
            ),
            available=versions,
        )

    def _swap_packages(self, host: Host, manager: PackageManager) -> None:
        """Download, stop, unload, remove what cannot stay, install: the order that never leaves a running client with
        half a driver."""
        state = self.observe(host)
        plan = self.package_plan(state)
        change = self._plan_packages(plan, state)
        if change is None:
            # Finishing an interrupted transaction was enough.
            self._finish(host)
            return
        install_prerequisites(host, manager, state, plan)
        resolved = self.resolve(manager, plan, state.installed, self._foreign_module(state))
        foreign = foreign_packages(plan, state.installed, self.branch)
        held = [name for name, package in state.installed.items() if package.held and is_driver_package(name)]
        if foreign:
            guard_removal(host, plan, foreign)
        pinning = {name: version for name, version in resolved.items() if name == plan.pinning}
        others = {name: version for name, version in resolved.items() if name != plan.pinning}
        download_packages(host, manager, {**pinning, **others})
        stopped = False
        if state.inventory.driver is not None and not change.data["adds"]:
            late = foreign_holders(driver_holders(host))
            if late:
                raise in_use_error(late, "Changing the driver packages")
            if self.unloads(state):
                stop_clients(host)
                stopped = True
                late = foreign_holders(driver_holders(host))
                if late:
                    start_clients_that_can(host)
                    raise in_use_error(late, "Changing the driver packages")
                if unload_modules(host):
                    # It stays until the next boot; the reload says so. The clients go on with the old module.
                    start_clients_that_can(host)
                    stopped = False
        try:
            manager.unhold(*held)
            if foreign:
                manager.remove(*foreign, purge=True)
            # First: it changes what the resolver takes for the rest.
            manager.install(pinning, allow_removal=True)
            manager.install(others, allow_removal=True)
        except FleetError as error:
            output = str(error.facts.get("stdout", "")) + str(error.facts.get("stderr", ""))
            if BUILD_SIGNS.search(output):
                raise build_error(host, output) from error
            error.message += (
                " The old driver is unloaded and its services are stopped; running the role again continues here."
                if stopped
                else ""
            )
            raise
        self._finish(host)

    def _finish(self, host: Host) -> None:
        """What the packages' own scripts may have left open."""
        self._enable(host)
        if self.kernel_module and not on_disk_version(host, host.kernel_release()):
            build_module(host)

    def _enable(self, host: Host, *, start: bool = False) -> None:
        """Started only where the installed module is loaded: they need it, and the reload that loads it starts them."""
        inventory = observe_gpus(host, with_smi=False)
        wish = self.wish(read_os_release(host), inventory, False)
        loaded = inventory.driver
        ready = start and loaded is not None and is_loaded(loaded, module_on_disk(host, host.kernel_release()))
        options = ["--now"] if ready else []
        for unit in [unit for unit, state in boot_states(host, wish).items() if state == "disabled"]:
            host.check(
                ["systemctl", "enable", *options, unit], reason="enable_failed", doing="systemctl enable %s" % unit
            )
