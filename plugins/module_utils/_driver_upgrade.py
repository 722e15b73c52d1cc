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
from dataclasses import replace

from ._cdi_spec import follow_driver
from ._driver_branches import branch_of_version
from ._driver_clients import in_use_error, lasting_foreign_holders
from ._driver_swap import (
    LOAD_TIMEOUT,
    active_units,
    patiently,
    restore_modules,
    start_client,
    start_clients,
    stop_clients,
    unload_patiently,
)
from ._driver_upgrade_planner import UpgradePlanner, UpgradeState
from ._driver_upgrade_precheck import precheck, prestage, way_back
from ._driver_upgrade_record import (
    RECORD,
    STEPS,
    Before,
    Record,
    begin_maintenance,
    end_maintenance,
    read_record,
)
from ._errors import FleetError
from ._gpu_health import KERNEL_LINES, gpu_health
from ._gpu_inventory import GpuInventory, observe_gpus
from ._gpu_smoke_test import run_gpu_container
from ._host import Host
from ._kernel_log import read_kernel_log
from ._loaded_driver import (
    ModuleFile,
    flavours_differ,
    is_loaded,
    loaded_modules,
    observe_loaded_driver,
)
from ._nvidia_driver import NvidiaDriver
from ._nvidia_driver_packages import source_of
from ._nvidia_driver_reload import DriverReload
from ._nvidia_driver_reload_planner import ReloadState, observe_reload
from ._resource import Change, Resource, converge
from ._rollout_record import (
    RESTORED,
    ROLLED_BACK,
    STRANDED,
    UPDATED,
    claimed,
    failed,
    finished,
    foreseen,
    note,
    released,
    taken_away,
    went_back,
    with_signs_of_life,
)
from ._rollout_record import write as write_record
from ._rollout_services import (
    serving,
    start_services,
    stop_services,
    strangers,
    wait_ready,
)
from ._verdict import OK, REFUSED

#: Seconds for Docker to answer.
_DOCKER_TIMEOUT = 120.0

#: Until here the old driver only has to be used again.
_BEFORE_UNLOAD = STEPS[: STEPS.index("packages_changed")]


class DriverUpgrade(UpgradePlanner, Resource[UpgradeState]):
    """The upgrade of a host to the driver that is wanted; options as for :class:`UpgradePlanner`."""

    # -- apply

    def apply(self, host: Host, change: Change) -> None:
        step = change.action
        began = host.time()
        state = self._look(host)
        record = claimed(state.record or Record(), self.run, began, lease=self.lease, take_over=self.take_over)
        if self._rebooting(state, record) and step != "restored":
            # It was found out in this very call; the steps behind it wait too.
            return
        if state.held and record.open and step != "restored":
            raise taken_away(Record, state.held)
        try:
            record = getattr(self, "_step_" + step)(host, state, record)
            if record is not None:
                write_record(host, finished(record, step, host.time(), began) if step in STEPS else record)
        except Exception as error:
            # Even a defect must not leave the services stopped.
            raise self._failed(host, step, began, foreseen("Step %s of the upgrade" % step, error)) from error

    # -- steps; each returns the record as it is after it, None when it is not finished

    def _step_planned(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        digest = self.digest(state)
        if record.open and record.digest == digest and not record.outcome:
            # Known, and under way: only who is at it is new, and what was ready for another run need not be so now.
            return replace(record, step="workloads_started") if record.reached("ready") else record
        if record.open:
            # Another target, or another try: what ran before is still what has to run again.
            return replace(
                record,
                digest=digest,
                target=self.words,
                step="drained",
                outcome="",
                reboot="",
                validated="",
                chosen="",
            )
        # What an earlier run has found and not begun with counts for nothing: the host has gone on since.
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
                flavour=state.reload.on_disk_flavour or (loaded.flavour if loaded else ""),
                source=source_of(state.driver.installed) or self.driver.source,
                gpus=gpus,
            ),
            claim=record.claim,
            rebooted=record.rebooted,
        )

    def _step_prestaged(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        self._refuse(
            [*self._obstacles(host, state), *precheck(host, self.api, self.driver, state.driver, state.services)]
        )
        ready, more = prestage(host, self.driver, reboot=self.reboot != "never")
        # Now the version is known.
        self._refuse(precheck(host, self.api, self.driver, state.driver, state.services, version=ready.version))
        self._refuse(more)
        back = way_back(host, lambda: self._old_driver(record))
        return replace(
            record,
            prestaged=self.digest(state),
            chosen=ready.version,
            way_back="" if back.verdict == OK else back.message,
        )

    def _old_driver(self, record: Record) -> NvidiaDriver | None:
        """The driver that was there before, None when there was none."""
        before = record.before
        if not before.version:
            return None
        options = dict(self.options, branch=before.branch, version=before.version, source=before.source)
        return NvidiaDriver(**dict(options, flavour=before.flavour or "auto"))

    def _step_drained(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        # The load balancer is the caller's; what counts here is that a lost run is known to have begun.
        ready = record.serving if record.open else serving(host, self.api, state.services)
        return replace(record, outcome="", serving=ready)

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
            modules=tuple(sorted({*record.modules, *state.reload.modules})),
        )
        # Before the first of them is stopped: who goes on must know what has to run again.
        write_record(host, record)
        begin_maintenance(host, self.words)
        stop_services(host, self.api, state.services)
        return record

    @staticmethod
    def _step_clients_stopped(host: Host, _state: UpgradeState, record: Record) -> Record | None:
        stop_clients(host)
        late = lasting_foreign_holders(host)
        if late:
            raise in_use_error(late, "Changing the driver")
        return record

    def _step_unloaded(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        why = unload_patiently(host)
        marker = state.reload.marker or {}
        rebooted = marker.get("target") == state.reload.on_disk and marker.get("boot_id") != state.reload.boot_id
        if self.reboot == "always" and not rebooted:
            why = "driver_upgrade_reboot is always"
        if not why:
            return record
        if self.reboot == "never":
            raise _needs_reboot(why)
        return replace(record, reboot=why, boot_id=state.reload.boot_id)

    def _step_packages_changed(self, host: Host, _state: UpgradeState, record: Record) -> Record | None:
        # What lies ready, and what the other hosts get, although the repository may have a newer one by now.
        self.driver.chosen = record.chosen
        self._install(host, self.driver)
        return record

    @staticmethod
    def _install(host: Host, driver: NvidiaDriver) -> None:
        def install() -> None:
            outcome = converge(host, driver, check_mode=False)
            if outcome.blocked:
                raise FleetError("gpu_in_use", str(outcome.blocked[0].blocked))

        patiently(host, install)

    def _step_loaded(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        tried = record.rebooted != "" and record.rebooted == state.reload.on_disk
        why = record.reboot if record.boot_id == state.reload.boot_id and not tried else ""
        if not why:
            why = self._reload(host, self.expected)
        if not why:
            return self._settled(host, record)
        if tried:
            raise FleetError(
                "rebooted_once",
                "This host was rebooted once for driver %s in an earlier run, which did not load it; it is not "
                "rebooted for it again (%s). Find out why the module does not load (journalctl -k), then remove %s."
                % (record.rebooted, why.rstrip("."), RECORD),
            )
        if self.reboot == "never":
            raise _needs_reboot(why)
        # Told before it is noted for the host: without it the reboot would not be the only one.
        marker = DriverReload(prepare_reboot=True, always=True, expected_version=self.expected, reboot_reason=why)
        patiently(host, lambda: converge(host, marker, check_mode=False))
        write_record(host, replace(record, reboot=why, boot_id=state.reload.boot_id))
        return None

    @staticmethod
    def _reload(host: Host, expected: str) -> str:
        """Load the driver on the disk; why only a reboot can, or an empty string."""
        reload = DriverReload(expected_version=expected)
        outcome = converge(host, reload, check_mode=False)
        if outcome.state.current:
            return ""
        return reload.reboot_reason(outcome.state) or "; ".join(str(change.blocked) for change in outcome.blocked)

    def _settled(self, host: Host, record: Record) -> Record:
        """The loaded driver with its services as before, whether a reload has brought it or a reboot."""
        running = active_units(host)
        # In the order in which they start; enabled ones have been started by systemd after a reboot.
        for unit in reversed([unit for unit in record.clients if unit not in running]):
            start_client(host, unit)
        restore_modules(host, record.modules)
        loaded = observe_loaded_driver(host)
        # Nothing else does it after a reload: what watches for new modules was stopped while they came.
        follow_driver(host, loaded.version if loaded else "", needed=self.gpu_injection == "cdi")
        return replace(record, reboot="", boot_id="")

    def _step_validated(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        # After a reboot nothing has been reloaded; here the marker of the reboot goes, too.
        why = self._reload(host, self.expected)
        if why:
            raise _needs_reboot(why)
        if "nvidia_uvm" not in loaded_modules(host):
            # Where somebody else has loaded the driver, a package or the boot; CUDA needs it, and nvidia-smi does not.
            host.run(["modprobe", "nvidia_uvm"], timeout=LOAD_TIMEOUT)
        record = self._settled(host, record)
        self._check_health(host, self._check_gpus(host, record))
        if self.smoke_test and self._docker(host, record):
            self.tell("trying a container with GPUs")
            run_gpu_container(host, self.gpu_injection, host.which("nvidia-smi") or "nvidia-smi")
        return replace(record, validated=self._valid(replace(state, reload=observe_reload(host))))

    def _docker(self, host: Host, record: Record) -> bool:
        """Whether Docker answers; shortly after a boot it may have to be waited for.

        Raises:
            FleetError: ``docker_unavailable`` where services need it.
        """
        deadline = host.monotonic() + _DOCKER_TIMEOUT
        while not self.api.available():
            if not record.workloads:
                return False
            if host.monotonic() >= deadline:
                raise FleetError(
                    "docker_unavailable",
                    "Docker does not answer after %d seconds, so no container could be tried on driver %s; see "
                    "'journalctl -u docker'." % (_DOCKER_TIMEOUT, self.words),
                )
            host.sleep(2.0)
        return True

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
        self._wait(host, state, record.workloads)
        return record

    def _wait(self, host: Host, state: UpgradeState, names: t.Sequence[str]) -> None:
        tell = with_signs_of_life(host, Record, self.run, self.lease, self.tell)
        wait_ready(host, self.api, state.services, names, self.models, tell)

    @staticmethod
    def _step_returned(_host: Host, _state: UpgradeState, record: Record) -> Record | None:
        return released(replace(record, outcome=UPDATED, failure={}, rebooted=""))

    def _step_restored(self, host: Host, state: UpgradeState, record: Record) -> Record | None:
        if not state.loaded or not _whole(state.reload, record.before):
            loaded, on_disk = state.reload.words
            raise FleetError(
                "not_restorable",
                "The driver of this host is not whole any more (%s is loaded, %s is installed), so its upgrade cannot just be "
                "given up; run it again, or install the driver that is wanted."
                % (loaded or "none", on_disk if state.reload.other_flavour else state.reload.user_space or "none"),
            )
        start_clients(host)
        changed = flavours_differ(state.reload.on_disk_flavour, record.before.flavour)
        if state.loaded != record.before.version or changed:
            # An earlier run has come further; nothing goes back into service untried.
            record = write_record(host, self._step_validated(host, state, record) or record)
        self._serve_again(host, record)
        return released(replace(read_record(host) or record, outcome=RESTORED))

    # -- the way back

    def _failed(self, host: Host, step: str, began: float, error: FleetError) -> FleetError:
        """The error of a step, after the host was brought back into service where that is possible."""
        record = read_record(host)
        if record is None or error.reason == "upgrade_running":
            return error
        failure = failed(step, error, began, host.time())
        if error.reason == "rebooted_once":
            record = replace(record, rebooted=observe_reload(host).on_disk)
        record = note(host, replace(record, failure=failure))
        # A look comes before any turn, and who asked for it cannot give the host its requests back. In the last step it has them.
        if self.goal == "prestaged" or not record.open or step not in STEPS[:-1]:
            return error
        # A module that is out, or packages that are not the old ones, cannot just be used again.
        reload = observe_reload(host)
        untouched = step in _BEFORE_UNLOAD and reload.user_space != "" and _whole(reload, record.before)
        before = reload.loaded_version if untouched else record.before.version
        try:
            if untouched:
                outcome, said = RESTORED, "Driver %s was left in place" % before
                start_clients(host)
            else:
                outcome, said = ROLLED_BACK, "The old driver %s was put back" % before
                self._roll_back(host, record)
            self._serve_again(host, record)
        except Exception as caught:
            second = foreseen("It", caught)
            left = replace(read_record(host) or record, failure=failure)
            record = note(host, went_back(left, STRANDED, host.time()))
            error.message = (
                "%s. Going back to driver %s failed too (%s): the host stays out of service, and running again goes on "
                "where it is."
            ) % (error.message.rstrip("."), before or "none", second.message.rstrip("."))
            error.facts.update(outcome=STRANDED, step=step, record=record.as_dict())
            return error
        left = replace(read_record(host) or record, failure=failure)
        record = note(host, released(went_back(left, outcome, host.time())))
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
        if loaded is not None and not is_loaded(loaded, ModuleFile(before.version, before.flavour)):
            stop_clients(host)
            why = unload_patiently(host)
            if why:
                raise _reboot_back(why)
        self._install(host, old)
        why = self._reload(host, before.version)
        if why:
            raise _reboot_back(why)
        self._settled(host, record)
        self._check_gpus(host, record)

    def _serve_again(self, host: Host, record: Record) -> None:
        record = read_record(host) or record
        note(host, replace(record, reboot="", boot_id=""))
        end_maintenance(host)
        state = self._look(host)
        start_services(host, state.services, record.workloads)
        state = self._look(host)
        self._wait(host, state, record.awaited)
        ready = {*record.serving, *serving(host, self.api, state.services)}
        note(host, replace(read_record(host) or record, serving=tuple(sorted(ready))))


def _whole(reload: ReloadState, before: Before) -> bool:
    """Whether the loaded driver is the installed one. What was loaded beside the other flavour from the beginning counts so:
    user space works with both."""
    swapped = reload.other_flavour and flavours_differ(reload.on_disk_flavour, before.flavour)
    return reload.loaded_version == reload.user_space and not swapped


def _needs_reboot(why: str) -> FleetError:
    return FleetError(
        "reboot_needed",
        "Only a reboot loads the new driver (%s); set driver_upgrade_reboot to auto to allow it." % why.rstrip("."),
    )


def _reboot_back(why: str) -> FleetError:
    return FleetError(
        "reboot_needed",
        "Only a reboot takes the new driver out again (%s), and none is made for the old one; mend what failed and run "
        "again, or install the old driver with role nvidia_driver and reboot" % why.rstrip("."),
    )
