# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Observe and plan of all resources of one host in one call; changes nothing and asks nobody but the host itself."""

from __future__ import annotations

import dataclasses
import typing as t
from dataclasses import dataclass, field

from ._docker_api import DockerApi
from ._docker_daemon_planner import DaemonPlanner
from ._docker_engine_planner import EnginePlanner
from ._docker_group import DockerGroup
from ._errors import FleetError
from ._gpu_inventory import observe_gpus
from ._health_target import parse_targets
from ._host import Host
from ._ngc_login_planner import VALIDATE_ALWAYS, LoginPlanner
from ._nim_image_planner import PULL_NEWER, ImagesPlanner
from ._nim_models import parse_models
from ._nim_paths import MAINTENANCE_FILE, service_of_unit
from ._nim_ready import certainly_ready
from ._nim_service import ENFORCE, WARN, NimService
from ._nim_service_state import HostState
from ._nvidia_container_toolkit_planner import ToolkitPlanner
from ._nvidia_driver_planner import DriverPlanner
from ._nvidia_driver_reload_planner import ReloadPlanner
from ._nvidia_driver_state import DriverState
from ._options import CHAIN
from ._read_only_host import DockerLook, ReadOnlyHost
from ._resource import Change, Disruption, Planner
from ._sleeping_docker import SleepingDocker, sleeps

Options = t.Mapping[str, t.Any]
S = t.TypeVar("S")

#: What stands in the way of a service, and the resources that may remove it, the likeliest first.
_SERVICE_NEEDS = {
    "docker_unavailable": ("docker_engine", "docker_daemon"),
    "no_gpu": ("nvidia_driver_reload", "nvidia_driver"),
    "runtime_missing": ("nvidia_container_toolkit", "docker_daemon", "docker_engine"),
    "cdi_off": ("nvidia_container_toolkit", "docker_daemon", "docker_engine"),
    "image_missing": ("nim_image",),
}


#: Resources that load the driver anew.
DRIVER = ("nvidia_driver", "nvidia_driver_reload")


@dataclass(frozen=True)
class Planned:
    """A change, and the resource that must be there before it can be planned in detail (empty: none)."""

    change: Change
    after: str = ""

    def as_dict(self) -> dict[str, t.Any]:
        return dict(self.change.as_dict(), after=self.after or None)


@dataclass(frozen=True)
class Finding:
    """A resource that could not be planned.

    Attributes:
        after: Set when the cause is one that the error of an earlier resource tells already.
    """

    resource: str
    reason: str
    message: str
    after: str = ""

    def as_dict(self) -> dict[str, t.Any]:
        return {
            "resource": self.resource,
            "reason": self.reason,
            "message": self.message,
            "after": self.after or None,
        }


@dataclass
class HostPlan:
    """All differences between what is wanted on a host and what is.

    Attributes:
        gpu: Whether the host has an NVIDIA GPU; without one it is left alone.
        notes: What a plan leaves open although nothing is wrong: only a run can find it out.
        warnings: What is worth knowing although no run changes it.
    """

    gpu: bool = True
    planned: list[Planned] = field(default_factory=list)
    errors: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def result(self) -> dict[str, t.Any]:
        """Return values of the module; worst disruption first, equal ones in the order of the chain."""
        ordered = sorted(self.planned, key=lambda one: (-one.change.disruption, CHAIN.index(one.change.resource)))
        worst = max((one.change.disruption for one in self.planned), default=Disruption.NONE)
        return {
            "gpu": self.gpu,
            "drift": bool(self.planned or self.errors),
            "worst": str(worst),
            "changes": [one.as_dict() for one in ordered],
            "errors": [error.as_dict() for error in self.errors],
            "notes": self.notes,
        }


def plan_host(host: Host, wanted: t.Mapping[str, Options | None], api: DockerApi | None = None) -> HostPlan:
    """The plan of one host.

    Args:
        host: One that is read-only already is looked at as it is, with what it remembers.
        wanted: Resource -> options of the module of the same name; what is missing or None is not planned.
        api: Docker of the host.

    Returns:
        The plan; what is wrong with one resource is a finding of it and hides no other one.
    """
    host = host if isinstance(host, ReadOnlyHost) else ReadOnlyHost(host)
    return _Walk(host, wanted, api or DockerLook()).run()


class _Walk:
    """One walk along the chain."""

    def __init__(self, host: Host, wanted: t.Mapping[str, Options | None], api: DockerApi) -> None:
        self.host = host
        self.wanted = {name: dict(options) for name, options in wanted.items() if options is not None}
        self.api = api
        self.plan = HostPlan()
        #: What docker_daemon would write, for those that write the same file after it.
        self.daemon_file: tuple[str, str] | None = None
        #: The change of the driver's packages, when there is one.
        self.driver_packages: Change | None = None
        #: Whether these packages bring the module that is loaded already.
        self.driver_keeps_module = False
        #: Version of the module that is to be loaded in the place of another one; empty when none is, or not known.
        self.driver_next = ""

    def run(self) -> HostPlan:
        if not observe_gpus(self.host, with_smi=False).pci:
            self.plan.gpu = False
            return self.plan
        if sleeps(self.host):
            self.api = SleepingDocker()
        steps: dict[str, t.Callable[[Options], None]] = {
            "nvidia_driver": self._driver,
            "nvidia_driver_reload": self._reload,
            "docker_engine": self._engine,
            "docker_daemon": self._daemon,
            "docker_group": self._group,
            "nvidia_container_toolkit": self._toolkit,
            "ngc_login": self._login,
            "nim_image": self._images,
            "nim_service": self._services,
            "nim_health": self._health,
        }
        for name in CHAIN:
            if name not in self.wanted:
                continue
            try:
                steps[name](self.wanted[name])
            except FleetError as error:
                self._error(name, error)
        return self.plan

    # -- what earlier steps have found ----------------------------------------------------------------

    def _unsettled(self, *names: str) -> str:
        """The first of the resources that is not as wanted yet, or cannot be told to be; empty when all are."""
        found = {one.change.resource for one in self.plan.planned} | {one.resource for one in self.plan.errors}
        return next((name for name in names if name in found), "")

    def _error(self, name: str, error: FleetError) -> None:
        # Two resources read the same file: what is wrong with it is told once.
        same = next((one for one in self.plan.errors if one.message == error.message), None)
        if same is not None:
            message = "Not looked at, for what is wrong with %s." % same.resource
            self.plan.errors.append(Finding(name, error.reason, message, same.resource))
            return
        self.plan.errors.append(Finding(name, error.reason, error.message))

    def _add(self, changes: t.Iterable[Change]) -> None:
        changes = list(changes)
        # A test that leaves the host as it is belongs to a plan only beside a change.
        if any(not change.proof for change in changes):
            self.plan.planned += [Planned(change) for change in changes]
            return
        self.plan.notes += ["%s: a run will test %s: %s." % (one.resource, one.what, one.why) for one in changes]

    def _later(
        self,
        name: str,
        what: str,
        before: t.Any,
        to: t.Any,
        after: str,
        disruption: Disruption = Disruption.NONE,
        blocked: str | None = None,
    ) -> None:
        why = "after %s: it cannot be planned in detail before that" % after
        self.plan.planned.append(Planned(Change(name, what, before, to, why, disruption, blocked=blocked), after))

    def _simple(self, resource: Planner[S]) -> S:
        state = resource.observe(self.host)
        self._add(resource.plan(state))
        return state

    # -- the chain ------------------------------------------------------------------------------------

    def _driver(self, options: Options) -> None:
        driver = DriverPlanner(**options)
        state = driver.observe(self.host)
        changes = driver.plan(state)
        self._add(changes)
        pending = next((change for change in changes if change.action in ("packages", "build")), None)
        if pending is not None:
            self.driver_keeps_module = driver.keeps_module(state)
            # Packages that are put back leave the module alone, and so does a build of the one in memory.
            leaves = pending.data.get("adds") or (pending.action == "build" and self.driver_keeps_module)
            self.driver_packages = None if leaves else pending
        if "nvidia_driver_reload" not in self.wanted and driver.kernel_module:
            self._without_reload(driver, state)

    def _without_reload(self, driver: DriverPlanner, state: DriverState) -> None:
        """Where reloading is switched off, only a reboot brings the installed module into the kernel."""
        blocked = "a reboot is needed, because reloading the driver is switched off"
        packages = self.driver_packages
        if packages is not None:
            if not self.driver_keeps_module:
                self._later(
                    "nvidia_driver_reload",
                    "kernel module nvidia",
                    state.loaded_version or None,
                    driver.version or driver.branch,
                    "nvidia_driver",
                    Disruption.REBOOT,
                    packages.blocked or blocked,
                )
            return
        if state.current or not state.on_disk:
            return
        loaded, on_disk = state.modules
        self._add(
            [
                Change(
                    "nvidia_driver_reload",
                    "kernel module nvidia",
                    loaded or None,
                    on_disk,
                    "the module in memory is not the one that is installed"
                    if state.inventory.driver
                    else "no module is loaded",
                    Disruption.REBOOT,
                    blocked=blocked,
                )
            ]
        )

    def _reload(self, options: Options) -> None:
        reload = ReloadPlanner(**options)
        state = reload.observe(self.host)
        packages = self.driver_packages
        waits = packages is not None
        try:
            changes = reload.plan(state)
        except FleetError as error:
            if error.reason not in ("no_kernel_module", "driver_mismatch") or not self._unsettled("nvidia_driver"):
                raise
            changes, waits = [], waits or not self.driver_keeps_module
        stuck = reload.stuck(state)
        if stuck and self.driver_keeps_module:
            # Nothing is unloaded for the packages, and nothing differs after them.
            changes, waits = [change for change in changes if change.action != "reload"], False
        self._add(changes)
        # Which version packages will bring is not known yet.
        if self.driver_packages is None and any(one.action == "reload" and not one.blocked for one in changes):
            self.driver_next = state.on_disk
        # Also where the version stays: the module is unloaded before packages change.
        if not changes and waits:
            blocked = "a reboot is needed: %s" % stuck if stuck else None
            disruption = Disruption.REBOOT if stuck else Disruption.UNLOAD_DRIVER
            self._later(
                reload.name,
                "kernel module nvidia",
                state.loaded_version or None,
                reload.expected_version or "as installed",
                "nvidia_driver",
                disruption if state.loaded is not None else Disruption.NONE,
                (packages.blocked if packages is not None else None) or blocked,
            )

    def _engine(self, options: Options) -> None:
        self._simple(EnginePlanner(**options, api=self.api))

    def _daemon(self, options: Options) -> None:
        daemon = DaemonPlanner(**options, api=self.api)
        state = daemon.observe(self.host)
        changes = daemon.plan(state)
        self._add(changes)
        for change in changes:
            if change.action == "daemon_file" and not change.blocked:
                self.daemon_file = (state.path, str(change.data["after"]))

    def _group(self, options: Options) -> None:
        group = DockerGroup(**options)
        changes = group.plan(group.observe(self.host))
        if self._unsettled("docker_engine"):
            # The engine's package makes the group.
            changes = [change for change in changes if change.action != "create"]
        self._add(changes)

    def _toolkit(self, options: Options) -> None:
        toolkit = ToolkitPlanner(**options, api=self.api)
        state = toolkit.observe(self.host)
        if self.daemon_file is not None and self.daemon_file[0] == state.daemon.path:
            # Whether Docker may be restarted hangs on live-restore, which docker_daemon switches on before.
            state = dataclasses.replace(state, daemon=dataclasses.replace(state.daemon, text=self.daemon_file[1]))
        if self.driver_next and state.driver_version:
            # What is made for the driver that goes is not made anew for it.
            state = dataclasses.replace(state, driver_version=self.driver_next)
        self._add(toolkit.plan(state))

    def _login(self, options: Options) -> None:
        # Without the check at the registry that the module makes before it stores a key.
        login = LoginPlanner(**options)
        self._simple(login)
        if login.validate == VALIDATE_ALWAYS and login.key:
            self.plan.notes.append(
                "ngc_login: validate is always, but a plan asks no registry: whether it still takes the key is found by "
                "the run itself."
            )

    def _images(self, options: Options) -> None:
        resource = ImagesPlanner(**options, api=self.api)
        if resource.pull == PULL_NEWER:
            self.plan.notes.append(
                "nim_image: pull is newer, but a plan asks no registry: tags that have moved are found by the run itself."
            )
        state = resource.observe(self.host)
        if state.docker:
            self._add(resource.plan(state))
            return
        after = self._unsettled("docker_engine", "docker_daemon")
        if not after:
            raise FleetError(
                "docker_unavailable",
                "Looking for images failed: no Docker daemon answers on this host; install and start it first.",
            )
        for image in state.images:
            if image.wanted.state == "present":
                digest = image.pinned.digest if image.pinned is not None else ""
                to = digest or "the digest of tag %s" % image.wanted.reference.tag
                self._later(resource.name, "image %s" % image.wanted.reference, None, to, after)

    def _services(self, options: Options) -> None:
        models = parse_models(options.get("models") or [], variable="models")
        service = NimService(
            models,
            key=options.get("ngc_api_key"),
            key_state=options.get("ngc_key_state") or "present",
            injection=options.get("gpu_injection") or "runtime",
            # A driver that is loaded anew has other GPUs, as far as their condition goes; the run judges them after it.
            health=WARN if self._unsettled(*DRIVER) else options.get("gpu_health") or ENFORCE,
            remove_all=options.get("state") == "absent",
            api=self.api,
        )
        state = service.observe(self.host)
        changes = service.plan(state)
        waiting = {change.what: change for change in changes if change.action == "prerequisite"}
        if not waiting:
            self._add(changes)
            warnings = service.result(state)["warnings"]
            if any(change.blocked for change in changes):
                # What is left out for maintenance says so itself.
                warnings = [warning for warning in warnings if not warning.startswith(MAINTENANCE_FILE)]
            self.plan.warnings += warnings
            return
        # One model that cannot be planned yet hides neither the others nor what is wrong with them.
        ready = [model for model in models if model.unit not in waiting]
        service.models = ready
        for model in models:
            if model.unit in waiting:
                self._waiting(waiting[model.unit], state)
        if not ready:
            return
        try:
            self._add(service.plan(state))
        except FleetError as error:
            # They are in the list, only not in this part of it.
            for unit in waiting:
                error.message = error.message.replace("%s (not in the list)" % service_of_unit(unit), unit)
            raise

    def _health(self, options: Options) -> None:
        """What is to be started, or is not known to be as wanted, need not answer yet."""
        if any(error.resource == "nim_service" for error in self.plan.errors):
            return
        planned = {one.change.what for one in self.plan.planned if one.change.resource == "nim_service"}
        targets = [target for target in parse_targets(options["models"]) if target.unit not in planned]
        signatures = options.get("failure_signatures") or []
        if signatures or not all(certainly_ready(self.host, self.api, target) for target in targets):
            # Only here: it knows why services do not serve, which is a sixth of all code of a plan.
            from ._health_drift import unready

            self._add(unready(self.host, self.api, targets, signatures))

    def _waiting(self, change: Change, state: HostState) -> None:
        """A service that cannot be planned yet: because of an earlier resource, or for good."""
        reason = str(change.data["reason"])
        after = self._unsettled(*_SERVICE_NEEDS.get(reason, ()))
        if not after:
            self._error(change.resource, FleetError(reason, str(change.data["message"])))
            return
        name = service_of_unit(change.what)
        known = state.services.get(name)
        runs = known is not None and (known.running or known.alive)
        disruption = Disruption.RESTART_NIM if runs else Disruption.NONE
        self._later(change.resource, change.what, change.before, change.after, after, disruption)
