# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The plan of the upgrade of one host's driver: which steps are left, found out by looking, and what is said of them.

A step that is on record but not so any more is due again; one that is so although nobody wrote it down is done.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, replace

from ._docker_api import DockerApi
from ._driver_swap import active_units
from ._driver_upgrade_precheck import check_next_kernel, precheck
from ._driver_upgrade_record import (
    RECORD,
    STEPS,
    Record,
    maintenance,
    read_record,
)
from ._errors import FleetError, check_choice
from ._gpu_inventory import observe_gpus
from ._host import Host
from ._nvidia_driver import NvidiaDriver
from ._nvidia_driver_packages import is_driver_package
from ._nvidia_driver_reload_planner import ReloadState, observe_reload
from ._nvidia_driver_state import DriverState
from ._resource import Change, Disruption, Planner
from ._rollout_record import (
    GOALS,
    LEASE,
    STRANDED,
    UPDATED,
    Rival,
    claimed,
    digest_of,
    rival,
    taken_away,
)
from ._rollout_services import (
    Service,
    observe_own,
    serving,
)
from ._systemd import unit_properties
from ._verdict import REFUSED, Verdict

REBOOTS = ("auto", "never", "always")

#: Makes partitions anew at every boot.
_MIG = "nvidia-mig-manager.service"


def _disrupts(change: Change, driver: DriverState) -> bool:
    """Whether the host is taken out of service for a change of the driver's resource; the others are site's."""
    if change.action == "repair":
        return any(is_driver_package(name) for name in driver.interrupted)
    return change.action in ("packages", "build")


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
        return self.packages_due or not self.reload.current


class UpgradePlanner(Planner[UpgradeState]):
    """What is left of the upgrade of a host to the driver that is wanted.

    Args:
        driver: Options of module nvidia_driver.
        goal: The step at which to stop, one of :data:`._rollout_record.GOALS`. Who wants ``ready`` has taken the host out of the load
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
            check_choice(option, value, allowed)
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
        checks: list[Verdict] = []
        if state.due:
            checks = self._obstacles(host, state)
            checks += precheck(host, self.api, self.driver, state.driver, state.services)
        return replace(state, serving=serving(host, self.api, state.services), checks=tuple(checks))

    def _obstacles(self, host: Host, state: UpgradeState) -> list[Verdict]:
        """What would only show when the host is out; one that is out already must not be kept from coming back."""
        found: list[Verdict] = []
        if state.record is not None and state.record.open:
            return found
        halfway = [name for name in state.driver.interrupted if not is_driver_package(name)]
        if halfway:
            text = "An installation of packages was interrupted on this host and would be gone on with: %s." % (
                ", ".join(halfway[:8])
            )
            remedy = "finish it ('dpkg --configure -a', 'apt-get --fix-broken install')"
            found.append(Verdict("packages", REFUSED, text, remedy, "packages_interrupted"))
        loaded = state.reload.loaded
        if self.reboot == "never" and loaded is not None and not loaded.can_unload:
            text = "Only a reboot loads another driver: the running kernel %s was built without module unloading." % (
                state.reload.kernel
            )
            found.append(Verdict("reboot", REFUSED, text, "set driver_upgrade_reboot to auto", "reboot_needed"))
        if self.reboot != "never":
            found += check_next_kernel(host, self.driver, state.driver)
        return found + self._partitions(host)

    def _partitions(self, host: Host) -> list[Verdict]:
        """Partitions of GPUs (MIG) do not outlive the driver; services on them would find no GPU on either driver."""
        split = [gpu.uuid for gpu in observe_gpus(host).gpus if gpu.mig_devices]
        if not split:
            return []
        if self.reboot == "always" and unit_properties(host, _MIG, "UnitFileState").get("UnitFileState") == "enabled":
            return []
        text = "GPU %s is partitioned (MIG), and the partitions are gone when the driver is unloaded." % ", ".join(
            split
        )
        remedy = "enable %s and set driver_upgrade_reboot to always, or leave the host out (driver_upgrade_skip)" % _MIG
        return [Verdict("mig", REFUSED, text, remedy, "mig_partitions")]

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
            changes=tuple(change for change in changes if _disrupts(change, driver)),
            others=tuple(change for change in changes if not _disrupts(change, driver)),
            driver_error=error,
        )

    # -- plan

    def plan(self, state: UpgradeState) -> list[Change]:
        if not state.driver.inventory.pci:
            return []
        record = state.record or Record()
        # With nothing on record yet, and in check mode too.
        try:
            self._refuse(state.checks)
        except FleetError as error:
            # It serves all the same, and counts so where it is left alone.
            models = [service.name for service in state.services if service.active]
            error.facts.update(models=models, serving=list(state.serving))
            raise
        if not record.open and (not state.due or self.goal == "restored"):
            return []
        # Whoever is told here has not even waited for the other one's job.
        claimed(record, self.run, state.now, take_over=self.take_over)
        if state.rival is not None:
            state.rival.refuse(self.run, state.now, take_over=self.take_over, begun=record.open)
        if self.goal == "restored":
            # Other work that has this host out is no reason: neither of them could be given up then.
            if state.maintenance == "foreign":
                raise taken_away(Record, state.held)
            return [self._change("restored", state, record)]
        if state.held and record.open and self.goal in ("ready", "returned"):
            # Whoever has drained it must not take it for ready.
            raise taken_away(Record, state.held)
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

    def _reboot_ordered(self, state: UpgradeState, record: Record) -> bool:
        """Whether the operator wants a reboot that has not been: whoever asks for the new driver may load it before."""
        return self.reboot == "always" and bool(record.reboot) and record.boot_id == state.reload.boot_id

    def _rebooting(self, state: UpgradeState, record: Record) -> bool:
        """Whether all that is left waits for a reboot, of which the host knows that it is the only one."""
        marker = state.reload.marker or {}
        return (
            bool(record.reboot)
            and not state.packages_due
            and (not state.reload.current or self._reboot_ordered(state, record))
            and marker.get("target") == state.reload.on_disk
            and marker.get("boot_id") == state.reload.boot_id
        )

    def _done(self, step: str, state: UpgradeState, record: Record) -> bool:
        """Whether a step has nothing left to do, as the host is and not as its record says."""
        digest = self.digest(state)
        known = record.digest == digest and (record.open or not record.outcome)
        ours = not self.run or record.claim.get("run") == self.run
        if step == "planned":
            # Two runs that both go on with what a third has left must not do so at once.
            return known and ours
        if step == "prestaged":
            # Downloads of a run that never began may be gone.
            return not state.packages_due or (known and record.prestaged == digest and (ours or record.open))
        if step == "drained":
            return known and record.open and record.outcome != STRANDED
        if step == "workloads_stopped":
            running = any(service.active for service in state.services)
            # What has to run again must be on record before it is believed that nothing runs.
            return not state.due or (state.maintenance == "ours" and not running and record.reached(step))
        if step == "clients_stopped":
            return not state.due or not state.loaded or not state.clients
        if step == "unloaded":
            # What could not be unloaded goes with the reboot.
            return not state.due or not state.loaded or self._rebooting(state, record)
        if step == "packages_changed":
            # An upgrade that was cut off may have left the rest of the driver's resource undone.
            return not state.packages_due and not (record.open and state.others)
        if step == "loaded":
            return not state.due and not self._reboot_ordered(state, record)
        if step == "validated":
            return not state.due and record.validated == self._valid(state)
        if step == "workloads_started":
            return not state.due and state.maintenance != "ours" and not self._missing(state, record)
        if step == "ready":
            return known and ours and record.reached("ready") and self._done("validated", state, record)
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

    @staticmethod
    def _refuse(found: t.Iterable[Verdict]) -> None:
        refused = [verdict for verdict in found if verdict.verdict == REFUSED]
        if refused:
            raise FleetError(
                refused[0].reason or "cannot_upgrade",
                " ".join(dict.fromkeys(verdict.sentence for verdict in refused)),
                checks=[verdict.as_dict() for verdict in found],
            )

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
        loaded, on_disk = state.reload.words
        if rebooting:
            return "Driver %s is installed; a reboot is needed to load it: %s." % (on_disk, record.reboot)
        if not state.due:
            return "Driver %s: loaded = on disk = user space." % state.loaded
        if not state.packages_due and loaded != state.loaded:
            return "Driver %s is loaded and %s is installed." % (loaded, on_disk)
        return "Driver %s is loaded and %s is wanted." % (state.loaded or "none", self.words)
