# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The upgrade of one host's driver: from services that run on the old one to services that are ready on the new one.

A resource like the others, whose changes are the steps that are left. What a step does is what the resources of the driver, of
its services and of the NIM services do anyway; here stands in which order, what is remembered, and the way back: before the old
module is out of the kernel its services are started again, after that the old packages are put back.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, replace

from ._docker_api import DockerApi
from ._driver_branches import branch_of_version
from ._driver_clients import foreign_holders, in_use_error
from ._driver_swap import active_units, start_clients, stop_clients, unload_modules
from ._driver_upgrade_precheck import precheck, prestage, way_back
from ._driver_upgrade_record import (
    RECORD,
    STEPS,
    Before,
    Record,
    begin_maintenance,
    end_maintenance,
    maintenance,
    read_record,
)
from ._driver_upgrade_services import (
    Service,
    observe_own,
    serving,
    start_services,
    stop_services,
    strangers,
    wait_ready,
)
from ._errors import FleetError
from ._gpu import GpuInventory, driver_holders, observe_gpus, observe_loaded_driver
from ._gpu_health import KERNEL_LINES, gpu_health
from ._gpu_smoke_test import run_gpu_container
from ._host import Host
from ._kernel_log import read_kernel_log
from ._nvidia_driver import NvidiaDriver
from ._nvidia_driver_reload import DriverReload
from ._nvidia_driver_reload_planner import ReloadState, observe_reload
from ._nvidia_driver_state import DriverState
from ._resource import Change, Disruption, Resource, converge
from ._rollout_record import (
    LEASE,
    RESTORED,
    ROLLED_BACK,
    STRANDED,
    UPDATED,
    Rival,
    claimed,
    digest_of,
    finished,
    released,
    rival,
)
from ._rollout_record import write as write_record
from ._verdict import OK, REFUSED, Verdict

#: Where a call of the module stops.
GOALS = ("prestaged", "drained", "ready", "returned", "restored")
REBOOTS = ("auto", "never", "always")

#: Changes of the driver's resource for which the host is taken out of service; the others are site's.
_DUE = ("repair", "packages", "build")
#: Until here the old driver only has to be used again.
_BEFORE_UNLOAD = STEPS[: STEPS.index("packages_changed")]


@dataclass(frozen=True)
class UpgradeState:
    """One look at the host.

    Attributes:
        changes: What the driver's resource would do for which the host must be out of service.
        others: What else it would do, for example hold packages.
        driver_error: Why it cannot say.
        maintenance: See :func:`._driver_upgrade_record.maintenance`.
        clients: Services of the driver that run now.
        serving: Models that are ready; looked for only where the fleet is planned with it.
        checks: Verdicts on the upgrade; likewise.
        rival: Other work that has this host, or had.
        now: When it was, in seconds since the epoch.
    """

    driver: DriverState
    reload: ReloadState
    record: Record | None
    maintenance: str
    services: tuple[Service, ...]
    clients: tuple[str, ...]
    changes: tuple[Change, ...] = ()
    others: tuple[Change, ...] = ()
    driver_error: FleetError | None = None
    serving: tuple[str, ...] = ()
    checks: tuple[Verdict, ...] = ()
    rival: Rival | None = None
    now: float = 0.0

    @property
    def loaded(self) -> str:
        return self.reload.loaded_version

    @property
    def packages_due(self) -> bool:
        return bool(self.changes) or self.driver_error is not None

    @property
    def held(self) -> str:
        """Why the host is left alone; empty when it is not."""
        if self.maintenance == "foreign":
            return "somebody else has put this host under maintenance; it is left alone"
        if self.rival is not None and self.rival.out:
            return "%s has taken this host out of service and not given it back; run that again first" % self.rival.work
        return ""

    @property
    def due(self) -> bool:
        """Whether the driver in memory is not the one that is wanted."""
        return self.packages_due or self.loaded != self.reload.on_disk


class DriverUpgrade(Resource[UpgradeState]):
    """The upgrade of a host to the driver that is wanted.

    Args:
        driver: Options of module nvidia_driver.
        goal: The step at which to stop, one of :data:`GOALS`. Who wants ``ready`` has taken the host out of the load
            balancer. ``restored`` gives up, as long as the old driver is in place.
        reboot: ``auto`` where nothing else loads the new driver, ``never``, or ``always``.
        gpu_injection: How containers get their GPUs, for the proof that they do.
        gpu_health: ``warn``: what is wrong with a GPU keeps the host from nothing.
        smoke_test: Whether that container is run.
        models: Entries of ``nim_models``: what to ask services, and how long to wait for them.
        run: Who upgrades, in words; another one is told of it.
        take_over: Honour no other run.
        lease: Seconds that ``run`` is honoured by others without a sign of life.

    Raises:
        FleetError: ``invalid_option``.
    """

    name = "driver_upgrade"

    def __init__(
        self,
        *,
        driver: t.Mapping[str, t.Any],
        goal: str = "ready",
        reboot: str = "auto",
        gpu_injection: str = "runtime",
        gpu_health: str = "enforce",
        smoke_test: bool = True,
        models: t.Sequence[t.Any] = (),
        run: str = "",
        take_over: bool = False,
        lease: int = LEASE,
        api: DockerApi | None = None,
    ) -> None:
        for option, value, allowed in (("state", goal, GOALS), ("reboot", reboot, REBOOTS)):
            if value not in allowed:
                raise FleetError(
                    "invalid_option",
                    "%s = %r: not one of %s; choose one of them." % (option, value, ", ".join(allowed)),
                )
        self.options = dict(driver, unload=False)
        # Here nothing is unloaded behind the order of steps below.
        self.driver = NvidiaDriver(**self.options)
        self.goal = goal
        self.reboot = reboot
        self.gpu_injection = gpu_injection
        self.gpu_health = gpu_health
        self.smoke_test = smoke_test
        self.models = list(models)
        self.run = run
        self.take_over = take_over
        self.lease = lease
        self.api = api or DockerApi()

    @property
    def expected(self) -> str:
        return self.driver.version or self.driver.branch

    def digest(self, state: UpgradeState) -> str:
        """Name of the target on this host."""
        options = {key: value for key, value in self.options.items() if key not in ("unload", "hold")}
        return digest_of(dict(options, architectures=list(state.driver.inventory.architectures)))

    @property
    def words(self) -> str:
        return self.driver.version or "branch %s" % self.driver.branch

    # -- observe

    def observe(self, host: Host) -> UpgradeState:
        state = self._look(host)
        if self.goal != "prestaged" or not state.driver.inventory.pci:
            return state
        checks = precheck(host, self.api, self.driver, state.driver, state.services) if state.due else []
        return replace(state, serving=serving(host, self.api, state.services), checks=tuple(checks))

    def _look(self, host: Host) -> UpgradeState:
        """What the steps go by."""
        driver = self.driver.observe(host)
        state = UpgradeState(
            driver,
            observe_reload(host),
            read_record(host),
            maintenance(host),
            (),
            (),
            rival=rival(host, RECORD),
            now=host.time(),
        )
        if not driver.inventory.pci:
            return state
        changes: list[Change] = []
        error = None
        try:
            changes = self.driver.plan(driver)
        except FleetError as caught:
            error = caught
        return replace(
            state,
            services=observe_own(host),
            clients=tuple(active_units(host)),
            changes=tuple(change for change in changes if change.action in _DUE),
            others=tuple(change for change in changes if change.action not in _DUE),
            driver_error=error,
        )

    # -- plan

    def plan(self, state: UpgradeState) -> list[Change]:
        if not state.driver.inventory.pci:
            return []
        record = state.record or Record()
        # With nothing on record yet, and in check mode too.
        self._refuse(state.checks)
        if not record.open and (not state.due or self.goal == "restored"):
            return []
        # Whoever is told here has not even waited for the other one's job.
        claimed(record, self.run, state.now, take_over=self.take_over)
        if state.rival is not None:
            state.rival.refuse(self.run, state.now, take_over=self.take_over)
        if self.goal == "restored":
            return [self._change("restored", state, record)]
        return self._steps(state, record, self.goal)

    def _steps(self, state: UpgradeState, record: Record, goal: str) -> list[Change]:
        """The steps that are left up to a goal."""
        steps = STEPS[: STEPS.index(goal) + 1]
        changes = [self._change(step, state, record) for step in steps if not self._done(step, state, record)]
        if state.held:
            return [replace(change, blocked=state.held) for change in changes]
        if self._rebooting(state, record):
            why = "a reboot is needed: %s" % record.reboot
            return [replace(change, blocked=why) for change in changes]
        return changes

    @staticmethod
    def _rebooting(state: UpgradeState, record: Record) -> bool:
        """Whether all that is left waits for a reboot, of which the host knows that it is the only one."""
        marker = state.reload.marker or {}
        return (
            bool(record.reboot)
            and not state.packages_due
            and state.loaded != state.reload.on_disk
            and marker.get("target") == state.reload.on_disk
            and marker.get("boot_id") == state.reload.boot_id
        )

    def _done(self, step: str, state: UpgradeState, record: Record) -> bool:
        """Whether a step has nothing left to do, as the host is and not as its record says."""
        digest = self.digest(state)
        known = record.digest == digest and (record.open or not record.outcome)
        if step == "planned":
            # Two runs that both go on with what a third has left must not do so at once.
            return known and (not self.run or record.claim.get("run") == self.run)
        if step == "prestaged":
            return not state.packages_due or (known and record.prestaged == digest)
        if step == "drained":
            return known and record.open and record.outcome != STRANDED
        if step == "workloads_stopped":
            running = any(service.active for service in state.services)
            return not state.due or (state.maintenance == "ours" and not running)
        if step == "clients_stopped":
            return not state.due or not state.loaded or not state.clients
        if step == "unloaded":
            # What could not be unloaded goes with the reboot.
            return not state.due or not state.loaded or self._rebooting(state, record)
        if step == "packages_changed":
            # An upgrade that was cut off may have left the rest of the driver's resource undone.
            return not state.packages_due and not (record.open and state.others)
        if step == "loaded":
            return not state.due
        if step == "validated":
            return not state.due and record.validated == self._valid(state)
        if step == "workloads_started":
            return not state.due and state.maintenance != "ours" and not self._missing(state, record)
        if step == "ready":
            return known and record.reached("ready") and self._done("validated", state, record)
        return record.outcome == UPDATED and known

    @staticmethod
    def _valid(state: UpgradeState) -> str:
        return "%s in boot %s" % (state.loaded, state.reload.boot_id)

    @staticmethod
    def _missing(state: UpgradeState, record: Record) -> list[str]:
        """Services that ran before and do not run now."""
        return [service.name for service in state.services if service.name in record.workloads and not service.active]

    def _change(self, step: str, state: UpgradeState, record: Record) -> Change:
        models = sorted({*record.workloads, *(service.name for service in state.services if service.active)})
        services = "NIM services %s" % ", ".join(models) if models else "NIM services"
        clients = ", ".join(state.clients) or "services of the driver"
        reboots = self.reboot == "always" or bool(record.reboot)
        if state.reload.loaded is not None and not state.reload.loaded.can_unload:
            reboots = True
        none, nim, unload = Disruption.NONE, Disruption.RESTART_NIM, Disruption.UNLOAD_DRIVER
        reboot = Disruption.REBOOT if reboots and self.reboot != "never" else unload
        what, before, after, why, disruption = {
            "planned": ("record of the upgrade", None, self.words, "any controller can go on", none),
            "prestaged": ("packages of the driver", None, "downloaded", "nothing is waited for while it is out", none),
            "drained": ("the host", "in service", "out of service", "its driver is changed", none),
            "workloads_stopped": (services, "running", "stopped", "they use the old driver", nim),
            "clients_stopped": (clients, "running", "stopped", "they keep the old module in the kernel", none),
            "unloaded": ("kernel module nvidia", state.loaded or None, None, "the new one takes its place", unload),
            "packages_changed": (
                "driver packages",
                state.reload.user_space or None,
                self.words,
                state.changes[0].why if state.changes else "another driver is wanted",
                unload,
            ),
            "loaded": ("kernel module nvidia", None, self.words, "the new driver works only when it is loaded", reboot),
            "validated": ("driver", "not tried", "validated", "versions, GPUs, and a container with them", none),
            "workloads_started": (services, "stopped", "running", "they ran before", none),
            "ready": (services, "starting", "ready", "a host comes back when its models answer", none),
            "returned": ("the host", "out of service", "in service", "the upgrade has ended", none),
            "restored": ("the host", "out of service", "in service", "its upgrade is given up", none),
        }[step]
        return Change(self.name, what, before, after, why, disruption=disruption, action=step)

    # -- apply

    def apply(self, host: Host, change: Change) -> None:
        step = change.action
        began = host.time()
        state = self._look(host)
        record = claimed(state.record or Record(), self.run, began, lease=self.lease, take_over=self.take_over)
        if self._rebooting(state, record) and step != "restored":
            # It was found out in this very call; the steps behind it wait too.
            return
        try:
            record = getattr(self, "_step_" + step)(host, state, record)
        except FleetError as error:
            raise self._failed(host, step, error) from error
        if record is not None:
            write_record(host, finished(record, step, host.time(), began) if step in STEPS else record)

    # -- steps; each returns the record as it is after it, None when it is not finished

    def _step_planned(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        digest = self.digest(state)
        if record.digest == digest and not record.outcome:
            # Known, and under way: only who is at it is new.
            return record
        if record.open:
            # Another target, or another try: what ran before is still what has to run again.
            return replace(
                record, digest=digest, target=self.words, step="drained", outcome="", reboot="", validated=""
            )
        loaded = state.reload.loaded
        version = state.reload.user_space
        gpus = len(observe_gpus(host).gpus) if loaded is not None else 0
        return Record(
            digest=digest,
            target=self.words,
            started=round(host.time(), 1),
            before=Before(
                loaded=state.loaded,
                branch=branch_of_version(version),
                version=version,
                flavour=loaded.flavour if loaded else "",
                source=self.driver.source,
                gpus=gpus,
            ),
            claim=record.claim,
        )

    def _step_prestaged(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        found = precheck(host, self.api, self.driver, state.driver, state.services)
        self._refuse(found)
        ready, more = prestage(host, self.driver)
        # Now the version is known.
        self._refuse(precheck(host, self.api, self.driver, state.driver, state.services, version=ready.version))
        self._refuse(more)
        back = way_back(host, lambda: self._old_driver(record))
        return replace(record, prestaged=self.digest(state), way_back="" if back.verdict == OK else back.message)

    def _old_driver(self, record: Record) -> NvidiaDriver | None:
        """The driver that was there before, None when there was none."""
        before = record.before
        if not before.version:
            return None
        options = dict(self.options, branch=before.branch, version=before.version, source=before.source)
        return NvidiaDriver(**dict(options, flavour=before.flavour or "auto"))

    @staticmethod
    def _refuse(found: t.Iterable[Verdict]) -> None:
        refused = [verdict for verdict in found if verdict.verdict == REFUSED]
        if refused:
            raise FleetError(
                refused[0].reason or "cannot_upgrade",
                " ".join(dict.fromkeys(verdict.sentence for verdict in refused)),
                checks=[verdict.as_dict() for verdict in found],
            )

    @staticmethod
    def _step_drained(_host: Host, _state: UpgradeState, record: Record) -> Record | None:
        # The load balancer is the caller's; what counts here is that a lost run is known to have begun.
        return replace(record, outcome="")

    def _step_workloads_stopped(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        others = strangers(host, self.api, state.services)
        if others:
            raise FleetError(
                "gpu_in_use",
                "Changing the driver would take the GPU away from %s, which this collection does not manage; stop %s and "
                "run again." % ("; ".join(others[:8]), "it" if len(others) == 1 else "them"),
            )
        running = [service.name for service in state.services if service.active]
        record = replace(
            record,
            workloads=tuple(sorted({*record.workloads, *running})),
            clients=tuple(dict.fromkeys([*record.clients, *state.clients])),
        )
        # Before the first of them is stopped: who goes on must know what has to run again.
        write_record(host, record)
        begin_maintenance(host, self.words)
        stop_services(host, self.api, state.services)
        return record

    @staticmethod
    def _step_clients_stopped(host: Host, _state: UpgradeState, record: Record) -> Record | None:
        stop_clients(host)
        late = foreign_holders(driver_holders(host))
        if late:
            raise in_use_error(late, "Changing the driver")
        return record

    def _step_unloaded(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        why = unload_modules(host)
        if self.reboot == "always":
            why = "driver_upgrade_reboot is always"
        if not why:
            return record
        if self.reboot == "never":
            raise _needs_reboot(why)
        return replace(record, reboot=why, boot_id=state.reload.boot_id)

    def _step_packages_changed(self, host: Host, _state: UpgradeState, record: Record) -> Record | None:
        self._install(host, self.driver)
        return record

    @staticmethod
    def _install(host: Host, driver: NvidiaDriver) -> None:
        outcome = converge(host, driver, check_mode=False)
        if outcome.blocked:
            raise FleetError("gpu_in_use", str(outcome.blocked[0].blocked))

    def _step_loaded(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        why = record.reboot if record.boot_id == state.reload.boot_id else ""
        if not why:
            why = self._reload(host, self.expected)
        if not why:
            return self._settled(host, record)
        if self.reboot == "never":
            raise _needs_reboot(why)
        # Told before it is noted for the host: without it the reboot would not be the only one.
        converge(
            host,
            DriverReload(prepare_reboot=True, expected_version=self.expected, reboot_reason=why),
            check_mode=False,
        )
        write_record(host, replace(record, reboot=why, boot_id=state.reload.boot_id))
        return None

    @staticmethod
    def _reload(host: Host, expected: str) -> str:
        """Load the driver on the disk; why only a reboot can, or an empty string."""
        reload = DriverReload(expected_version=expected)
        outcome = converge(host, reload, check_mode=False)
        if outcome.state.loaded_version == outcome.state.on_disk:
            return ""
        return reload.reboot_reason(outcome.state) or "; ".join(str(change.blocked) for change in outcome.blocked)

    @staticmethod
    def _settled(host: Host, record: Record) -> Record:
        """The loaded driver with its services as before, whether a reload has brought it or a reboot."""
        running = active_units(host)
        # In the order in which they start; enabled ones have been started by systemd after a reboot.
        for unit in reversed([unit for unit in record.clients if unit not in running]):
            host.check(
                ["systemctl", "start", unit],
                reason="client_not_started",
                doing="Starting %s, which ran before the driver was changed," % unit,
                remedy="See 'journalctl -u %s'." % unit,
                timeout=90,
            )
        return replace(record, reboot="", boot_id="")

    def _step_validated(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        # After a reboot nothing has been reloaded; here the marker of the reboot goes, too.
        why = self._reload(host, self.expected)
        if why:
            raise _needs_reboot(why)
        record = self._settled(host, record)
        self._check_health(host, self._check_gpus(host, record))
        if self.smoke_test and self.api.available():
            self.tell("trying a container with GPUs")
            run_gpu_container(host, self.gpu_injection, host.which("nvidia-smi") or "nvidia-smi")
        return replace(record, validated=self._valid(replace(state, reload=observe_reload(host))))

    def _check_gpus(self, host: Host, record: Record) -> GpuInventory:
        inventory = observe_gpus(host)
        if len(inventory.gpus) < record.before.gpus:
            raise FleetError(
                "gpu_missing",
                "Driver %s shows %d GPUs where the old one showed %d; look at 'journalctl -k' for lines with NVRM."
                % (inventory.smi_driver_version or self.words, len(inventory.gpus), record.before.gpus),
            )
        return inventory

    def _check_health(self, host: Host, inventory: GpuInventory) -> None:
        if self.gpu_health == "warn":
            return
        for verdict in gpu_health(inventory, read_kernel_log(host, only=KERNEL_LINES)):
            if verdict.verdict == REFUSED:
                raise FleetError(verdict.reason, verdict.sentence, gpu=verdict.gpu)

    @staticmethod
    def _step_workloads_started(host: Host, state: UpgradeState, record: Record) -> Record | None:
        end_maintenance(host)
        start_services(host, state.services, record.workloads)
        return record

    def _step_ready(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        self._wait(host, state, record)
        return record

    def _wait(self, host: Host, state: UpgradeState, record: Record) -> None:
        seen = host.time()

        def tell(text: str) -> None:
            nonlocal seen
            self.tell(text)
            if self.run and host.time() - seen > 60:
                # A sign of life for whoever else would like to begin.
                seen = host.time()
                found = read_record(host)
                if found is not None:
                    write_record(host, claimed(found, self.run, seen, lease=self.lease, take_over=True))

        wait_ready(host, self.api, state.services, record.workloads, self.models, tell)

    @staticmethod
    def _step_returned(_host: Host, _state: UpgradeState, record: Record) -> Record | None:
        return released(replace(record, outcome=UPDATED, failure={}))

    def _step_restored(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        if state.loaded != state.reload.user_space or state.reload.stopped_units:
            raise FleetError(
                "not_restorable",
                "The driver of this host is not whole any more (%s is loaded, %s is installed), so its upgrade cannot just be "
                "given up; run it again, or install the driver that is wanted."
                % (state.loaded or "none", state.reload.user_space or "none"),
            )
        self._serve_again(host, record)
        return released(replace(read_record(host) or record, outcome=RESTORED))

    # -- the way back

    def _failed(self, host: Host, step: str, error: FleetError) -> FleetError:
        """The error of a step, after the host was brought back into service where that is possible."""
        record = read_record(host)
        if record is None or error.reason == "upgrade_running":
            return error
        failure = {"step": step, "reason": error.reason, "message": error.message, "at": round(host.time(), 1)}
        record = write_record(host, replace(record, failure=failure))
        if not record.reached("drained") or step not in STEPS:
            return error
        # A module that is out, or packages that are not the old ones, cannot just be used again.
        reload = observe_reload(host)
        untouched = step in _BEFORE_UNLOAD and reload.loaded_version == reload.user_space != ""
        try:
            if untouched:
                outcome, said = RESTORED, "The old driver %s was left in place" % record.before.version
                start_clients(host)
            else:
                outcome, said = ROLLED_BACK, "The old driver %s was put back" % record.before.version
                self._roll_back(host, record)
            self._serve_again(host, record)
        except FleetError as second:
            write_record(host, replace(read_record(host) or record, outcome=STRANDED))
            error.message = (
                "%s. Going back to driver %s failed too (%s): the host stays out of service, and running again goes on "
                "where it is."
            ) % (error.message.rstrip("."), record.before.version or "none", second.message.rstrip("."))
            error.facts.update(outcome=STRANDED, step=step, record=(read_record(host) or record).as_dict())
            return error
        record = write_record(host, released(replace(read_record(host) or record, outcome=outcome)))
        error.message = "%s. %s and the services run on it again." % (error.message.rstrip("."), said)
        error.facts.update(outcome=outcome, step=step, record=record.as_dict())
        return error

    def _roll_back(self, host: Host, record: Record) -> None:
        """The recorded driver, installed and loaded.

        Raises:
            FleetError: When that is not possible, for example because nobody offers its packages any more.
        """
        before = record.before
        old = self._old_driver(record)
        if old is None:
            raise FleetError("no_old_driver", "There was no driver before.")
        self.tell("going back to driver %s" % before.version)
        state = self._look(host)
        begin_maintenance(host, self.words)
        stop_services(host, self.api, state.services)
        loaded = observe_loaded_driver(host)
        if loaded is not None and loaded.version != before.version:
            stop_clients(host)
            why = unload_modules(host)
            if why:
                raise _needs_reboot(why)
        self._install(host, old)
        why = self._reload(host, before.version)
        if why:
            raise _needs_reboot(why)
        self._settled(host, record)
        self._check_gpus(host, record)

    def _serve_again(self, host: Host, record: Record) -> None:
        record = read_record(host) or record
        write_record(host, replace(record, reboot="", boot_id=""))
        end_maintenance(host)
        state = self._look(host)
        start_services(host, state.services, record.workloads)
        state = self._look(host)
        self._wait(host, state, record)

    # -- answer

    def result(self, state: UpgradeState) -> dict[str, t.Any]:
        """Return values of the module."""
        record = state.record or Record()
        rebooting = self._rebooting(state, record)
        answer: dict[str, t.Any] = {
            "gpu": bool(state.driver.inventory.pci),
            "due": bool(state.driver.inventory.pci) and (state.due or record.open),
            "target": self.words,
            "digest": self.digest(state),
            "step": record.step,
            "outcome": record.outcome,
            "open": record.open,
            "loaded": state.loaded,
            "maintenance": state.maintenance,
            "held": state.held,
            "reboot_required": rebooting,
            "reboot_reason": record.reboot if rebooting else "",
            "models": sorted({*(service.name for service in state.services if service.active), *record.workloads})
            if record.open
            else [service.name for service in state.services if service.active],
            "serving": list(state.serving),
            "checks": [verdict.as_dict() for verdict in state.checks],
            "steps": [change.as_dict() for change in self._left(state, record)],
            "record": record.as_dict() if state.record else {},
            "way_back": record.way_back,
        }
        answer["message"] = self._message(state, record, rebooting)
        return answer

    def _left(self, state: UpgradeState, record: Record) -> list[Change]:
        """Everything that is still to be done until the host is given back."""
        if not state.driver.inventory.pci or not (state.due or record.open):
            return []
        return self._steps(state, record, "returned")

    def _message(self, state: UpgradeState, record: Record, rebooting: bool) -> str:
        if not state.driver.inventory.pci:
            return "This host has no NVIDIA GPU on its PCI bus; it was left alone."
        if state.held:
            return "This host was left alone: %s." % state.held
        if rebooting:
            return "Driver %s is installed; a reboot is needed to load it: %s." % (state.reload.on_disk, record.reboot)
        if not state.due:
            return "Driver %s: loaded = on disk = user space." % state.loaded
        return "Driver %s is loaded and %s is wanted." % (state.loaded or "none", self.words)


def _needs_reboot(why: str) -> FleetError:
    return FleetError(
        "reboot_needed",
        "Only a reboot loads the new driver (%s); set driver_upgrade_reboot to auto to allow it." % why.rstrip("."),
    )
