# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""All NIM services of a host as one resource: GPUs, ports, units and containers are planned together."""

from __future__ import annotations

import os
import typing as t
from dataclasses import replace
from functools import partial

from ._docker_api import DockerApi
from ._errors import FleetError
from ._gpu import Gpu
from ._gpu_placement import place
from ._gpu_wishes import gpu_kinds
from ._host import Host
from ._ngc_key import check_api_key
from ._nim_configuration import Secrets, build_configuration
from ._nim_downloads import needs_download
from ._nim_models import NimModel
from ._nim_paths import MAINTENANCE_FILE, unit_name
from ._nim_service_checks import (
    check_backend_ports,
    check_mask,
    missing_prerequisite,
    shared_gpus,
    unfit,
    unreadable_directory,
)
from ._nim_service_files import (
    directory_changes,
    enablement_changes,
    key_changes,
    new_key,
    reload_changes,
    service_file_changes,
    shared_file_changes,
)
from ._nim_service_starts import (
    Start,
    StartCheck,
    container_changes,
    due_starts,
    fetched,
    idle,
    leaving,
    start_changes,
    start_checks,
)
from ._nim_service_state import RESOURCE, HostState, describe, observe_services
from ._nim_service_stops import removal_changes, stop_changes
from ._options import GPU_HEALTH, GPU_INJECTIONS
from ._resource import Change, Disruption, Resource
from ._verdict import OK, Verdict, refusal

if t.TYPE_CHECKING:
    from ._nim_service_work import ServiceWork

Json = t.Dict[str, t.Any]

ENFORCE, WARN = GPU_HEALTH


class NimService(Resource[HostState]):
    """Every NIM service of one host.

    Args:
        models: All models of the host; those that are on the host but not in the list are reported, not touched.
        key: NGC key; None leaves the stored one alone.
        key_state: ``absent`` removes the stored key.
        injection: How containers get their GPUs: ``runtime``, ``cdi`` or ``gpus``.
        health: ``enforce`` starts no service on a GPU that is not fit for it; ``warn`` does.
        remove_all: Take away every service of the host, listed or not, and all that this resource has written.
            Model caches stay.
    """

    name = RESOURCE

    def __init__(
        self,
        models: t.Sequence[NimModel],
        *,
        key: str | None = None,
        key_state: str = "present",
        injection: str = "runtime",
        health: str = ENFORCE,
        remove_all: bool = False,
        api: DockerApi | None = None,
    ) -> None:
        self.models = list(models)
        self.key = check_api_key(key, "ngc_api_key") if key else None
        self.key_state = key_state
        self.injection = injection
        self.health = health
        self.remove_all = remove_all
        self.api = api or DockerApi()
        self._work: ServiceWork | None = None
        #: For the secrets of models that have no file with a key of its own yet.
        self._secret_key = os.urandom(32).hex()
        if injection not in GPU_INJECTIONS:
            raise FleetError(
                "invalid_option",
                "gpu_injection = %r: no such way; use one of %s." % (injection, ", ".join(GPU_INJECTIONS)),
            )
        if health not in GPU_HEALTH:
            raise FleetError(
                "invalid_option", "gpu_health = %r: no such value; use one of %s." % (health, ", ".join(GPU_HEALTH))
            )

    # -- observe --------------------------------------------------------------------------------------

    def observe(self, host: Host) -> HostState:
        return observe_services(host, self.api, self.models, remove_all=self.remove_all)

    # -- plan -----------------------------------------------------------------------------------------

    def plan(self, state: HostState) -> list[Change]:
        """Everything that must change, stops first, starts last.

        Raises:
            FleetError: ``gpus_unavailable``, ``no_such_profile``, ``profile_unsuitable``, ``port_in_use``, ``gpu_memory``,
                ``disk_full``, ``unit_masked`` and the reasons of :mod:`._gpu_health`: nothing may be touched before these
                are settled.
        """
        if self.remove_all:
            return removal_changes(state)
        prerequisites = self._missing_prerequisites(state)
        if prerequisites:
            # What cannot work anyway is said before an image is pulled for it.
            placed = self.placement(state) if state.gpus else {}
            for check in self._start_checks(idle(self.models, state), placed, set(), state):
                check.run()
            return prerequisites
        check_backend_ports(self.models, state.images)
        configurations = self.configurations(state)
        for model in self.models:
            if model.state == "started":
                check_mask(model, state)
        starts = self._due_starts(state, configurations)
        starting = {start.name for start in starts}
        gpus = {name: configuration["gpus"] for name, configuration in configurations.items()}
        there = {model.name for model in self.models if fetched(model, configurations, state)}
        for check in self._start_checks(starting, gpus, there, state):
            check.run()
        changes = directory_changes(self.models, state) + shared_file_changes(self.models, state)
        changes += key_changes(self.key, self.key_state, state)
        for model in self.models:
            if model.state != "started":
                changes += stop_changes(model, state)
        for model in self.models:
            if model.state != "absent":
                changes += service_file_changes(
                    model, configurations[model.name], self._secrets(model, state), self.injection, state
                )
        changes += enablement_changes(self.models, state)
        changes += reload_changes(self.models, changes, state)
        changes += container_changes(self.models, starting, state)
        return changes + start_changes(self.models, starts, gpus, state)

    def _due_starts(self, state: HostState, configurations: t.Mapping[str, Json]) -> list[Start]:
        renewed = self.key_state == "present" and new_key(self.key, state)
        return due_starts(self.models, state, configurations, new_key=renewed)

    def _start_checks(
        self,
        starting: t.Collection[str],
        gpus: t.Mapping[str, t.Sequence[str]],
        there: t.Collection[str],
        state: HostState,
    ) -> t.Iterator[StartCheck]:
        return start_checks(self.models, starting, gpus, there, state, health=self.health == ENFORCE)

    def preflight(self, state: HostState) -> list[Verdict]:
        """What would keep the services from being set up and started, one verdict a check, all of them together."""
        verdicts: list[Verdict] = []

        def judge(check: StartCheck) -> None:
            try:
                check.run()
            except FleetError as error:
                verdicts.append(refusal(check.name, error, check.model))
                return
            if check.passed:
                verdicts.append(
                    Verdict(check.name, OK, "Model %s: %s." % (check.model, check.passed), "", "", "", check.model)
                )

        models = [model for model in self.models if model.state != "absent" and not self.remove_all]
        for model in models:
            judge(StartCheck("directories", model.name, partial(self._check_directories, model, state)))
            if model.state == "started":
                judge(StartCheck("mask", model.name, partial(check_mask, model, state)))
        judge(StartCheck("port", "", partial(check_backend_ports, models, state.images)))
        placed: dict[str, tuple[str, ...]] = {}
        seen = state if state.gpus else replace(state, gpus=_gpus_on_the_bus(state.devices))
        try:
            # Without a driver nobody knows the UUIDs.
            placed = self.placement(seen, [model for model in models if state.gpus or not _names_uuids(model)])
        except FleetError as error:
            verdicts.append(refusal("gpus", error, str(error.facts.get("model", ""))))
        starting, there = idle(self.models, state), set()
        if placed and self._can_be_configured(state):
            configurations = self.configurations(state)
            starting = {start.name for start in self._due_starts(state, configurations)}
            there = {model.name for model in models if fetched(model, configurations, state)}
        for check in self._start_checks(starting, placed, there, seen):
            judge(check)
        for model in models:
            if model.name in starting:
                verdicts += shared_gpus(model, placed.get(model.name, ()), leaving(self.models, starting), seen)
        for model in models:
            if model.state == "started" and model.name not in starting:
                verdicts.append(
                    Verdict("service", OK, "Model %s runs, or is being started." % model.name, subject=model.name)
                )
        return verdicts

    def _can_be_configured(self, state: HostState) -> bool:
        """Whether GPUs, images and what else a configuration is made of are there."""
        models = [model for model in self.models if model.state != "absent" and not self.remove_all]
        return bool(state.gpus) and not any(missing_prerequisite(model, state, self.injection)[0] for model in models)

    def fetching(self, state: HostState) -> list[str]:
        """Names of models that are to be started and whose files must be fetched first, for which NGC wants a key.

        An image of an unknown family fetches by itself, and nobody can tell whether it must: it counts where it serves, as it would
        be stopped for the start.

        Raises:
            FleetError: As :meth:`placement`.
        """
        if not self._can_be_configured(state):
            return []
        configurations = self.configurations(state)
        starting = {start.name for start in self._due_starts(state, configurations)}
        found = []
        for model in self.models:
            # Where files come from elsewhere, a key for NGC proves nothing.
            if model.name not in starting or model.environment.get("NIM_REPOSITORY_OVERRIDE"):
                continue
            service = state.service(model.name)
            if configurations[model.name]["download"]:
                fetches = not fetched(model, configurations, state) and not service.brought
            else:
                fetches = (
                    bool(configurations[model.name]["key_in_service"]) and service.running and needs_download(model)
                )
            found += [model.name] if fetches else []
        return found

    @staticmethod
    def _check_directories(model: NimModel, state: HostState) -> None:
        message = unreadable_directory(model, state)
        if message:
            raise FleetError("directory_missing", "Service %s cannot be set up: %s" % (model.name, message))

    def configurations(self, state: HostState) -> dict[str, Json]:
        """What ``/etc/nim/<name>.json`` must hold for every model that is not absent."""
        placed = self.placement(state)
        return {
            model.name: build_configuration(
                model,
                state.images[model.image],
                placed[model.name],
                kinds=gpu_kinds(placed[model.name], state.gpus),
                injection=self.injection,
                cgroup_driver=state.cgroup_driver,
                secret=self._secrets(model, state),
            )
            for model in self.models
            if model.state != "absent"
        }

    def placement(self, state: HostState, models: t.Sequence[NimModel] | None = None) -> dict[str, tuple[str, ...]]:
        """UUIDs of the GPUs of every model that is not absent, or of these models.

        Raises:
            FleetError: ``gpus_unavailable``.
        """
        wanted = [model for model in self.models if model.state != "absent"] if models is None else models
        return place(state.wishes(wanted), state.gpus, state.unlisted(self.models), state.topology, state.unfit_gpus)

    def _secrets(self, model: NimModel, state: HostState) -> Secrets:
        """The secrets of a model, with the key that the host has for them already."""
        service = state.service(model.name)
        there = Secrets.parse(service.secret_text)
        if there:
            return Secrets(there.key, model.secret_environment, there.alias)
        return Secrets(self._secret_key, model.secret_environment).as_in(service.inspected)

    def _missing_prerequisites(self, state: HostState) -> list[Change]:
        """One change a model that cannot be planned yet: a host that was never set up is not an error in check mode."""
        changes = []
        for model in self.models:
            if model.state == "absent":
                continue
            reason, message = missing_prerequisite(model, state, self.injection)
            if reason:
                changes.append(
                    Change(
                        self.name,
                        model.unit,
                        "present" if state.service(model.name).exists else None,
                        model.state,
                        "wanted, but not possible yet: " + message.rstrip("."),
                        Disruption.NONE,
                        "prerequisite",
                        {"reason": reason, "message": "Service %s cannot be set up: %s" % (model.name, message)},
                    )
                )
        return changes

    # -- apply ----------------------------------------------------------------------------------------

    def apply(self, host: Host, change: Change) -> None:
        if self._work is None:
            # Here: looks, which do no work, need not load it.
            from ._nim_service_work import ServiceWork

            self._work = ServiceWork(self.api, self.key)
        self._work.apply(host, change, self.models)

    # -- result ---------------------------------------------------------------------------------------

    def result(self, state: HostState) -> Json:
        """Return values of the module: every service, what is there beside the list, and warnings."""
        known = not self.remove_all and not self._missing_prerequisites(state)
        configurations: t.Mapping[str, Json] = self.configurations(state) if known else {}
        listed = {model.name for model in self.models}
        warnings = list(self._work.warnings) if self._work is not None else []
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
        warnings += [service.fetched_damage for service in state.services.values() if service.fetched_damage]
        services = []
        for model in self.models:
            configuration = configurations.get(model.name, {})
            if model.state == "started" and known:
                # A service that runs is left alone, and so is one that was started knowingly.
                warnings += [
                    "Model %s: %s" % (model.name, verdict.sentence)
                    for verdict in unfit(model, configuration.get("gpus", []), state)
                ]
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
                    "state": describe(state.service(model.name), state),
                    "url": model.url,
                }
            )
        return {"services": services, "orphans": orphans, "warnings": warnings}


def _names_uuids(model: NimModel) -> bool:
    return isinstance(model.gpus, tuple) and not all(name.isdigit() for name in model.gpus)


def _gpus_on_the_bus(addresses: t.Iterable[str]) -> tuple[Gpu, ...]:
    """GPUs of which no driver tells more than that they are there, by their PCI addresses."""
    return tuple(
        Gpu(number, bdf, "NVIDIA GPU", "", "", None, None, None, "", "", None, bdf)
        for number, bdf in enumerate(sorted(addresses))
    )
