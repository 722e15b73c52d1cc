# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""All NIM services of a host as one resource: GPUs, ports, units and containers are planned together."""

from __future__ import annotations

import json
import os
import secrets
import typing as t
from dataclasses import dataclass, replace
from functools import partial

from ._docker_api import DockerApi
from ._errors import FleetError
from ._gpu import Gpu
from ._gpu_loss import lost_gpus
from ._gpu_placement import place
from ._gpu_wishes import check_profile_of, given_gpus, requested_count
from ._host import Host
from ._ngc_key import check_api_key, fingerprint, render_environment
from ._nim_configuration import SLICE_TEXT, TARGET_TEXT, Secrets, build_configuration, unit_text, wrapper_text
from ._nim_container import differences, restart_policy
from ._nim_models import NimModel, container_name, unit_name
from ._nim_paths import (
    BASE_DIRECTORY,
    CONFIGURATION_DIRECTORY,
    KEY_FILE,
    MAINTENANCE_FILE,
    RUNTIME_DIRECTORY,
    STATE_DIRECTORY,
    UNIT_DIRECTORY,
    WRAPPER,
    key_pipe,
    secret_path,
)
from ._nim_service_checks import (
    check_address,
    check_backend_ports,
    check_disk,
    check_gpu_health,
    check_gpu_memory,
    check_mask,
    check_port,
    missing_prerequisite,
    unfit,
    unreadable_directory,
)
from ._nim_service_state import (
    HostState,
    ImageState,
    ServiceState,
    describe,
    observe_services,
)
from ._nim_unit import FETCHED, arguments_with_key
from ._options import GPU_HEALTH, GPU_INJECTIONS
from ._resource import Change, Disruption, FileDiff, Resource
from ._untrusted import json_object
from ._verdict import OK, Verdict, refusal

Json = t.Dict[str, t.Any]

ENFORCE, WARN = GPU_HEALTH
#: Seconds until the wrapper must have said that it runs.
WRAPPER_TIMEOUT = 15.0


@dataclass(frozen=True)
class StartCheck:
    """One question that is settled before a service is started.

    Attributes:
        model: Name of the model; empty when it is about several.
        run: Raises :class:`FleetError` when the answer is no.
        passed: What is true otherwise, as a clause; empty when that is not worth a word.
    """

    name: str
    model: str
    run: t.Callable[[], None]
    passed: str = ""


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

    name = "nim_service"

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
        self.warnings: list[str] = []
        self._restarted: set[str] = set()
        #: For the secrets of models that have no file with a key of its own yet.
        self._secret_key = secrets.token_hex(32)
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
            return self._plan_removal(state)
        prerequisites = self._missing_prerequisites(state)
        if prerequisites:
            # What cannot work anyway is said before an image is pulled for it.
            placed = self.placement(state) if state.gpus else {}
            for check in self._start_checks(self._idle(state), placed, set(), state):
                check.run()
            return prerequisites
        check_backend_ports(self.models, state.images)
        configurations = self.configurations(state)
        for model in self.models:
            if model.state == "started":
                check_mask(model, state)
        restarts = self._restarts(state, configurations)
        gpus = {name: configuration["gpus"] for name, configuration in configurations.items()}
        fetched = {model.name for model in self.models if _fetched(model, configurations, state)}
        for check in self._start_checks({name for name, _kind, _why in restarts}, gpus, fetched, state):
            check.run()
        changes = self._plan_directories(state) + self._plan_files(state) + self._plan_key(state)
        for model in self.models:
            if model.state != "started":
                changes += self._plan_stop(model, state)
        for model in self.models:
            if model.state != "absent":
                changes += self._plan_service_files(model, configurations[model.name], state)
        changes += self._plan_enablement(state)
        changes += self._plan_reload(changes, state)
        changes += self._plan_containers({name for name, _kind, _why in restarts}, state)
        changes += self._plan_restarts(
            [(name, kind, why + _new_gpus(gpus[name], name, state)) for name, kind, why in restarts], state
        )
        return changes

    def _idle(self, state: HostState) -> set[str]:
        """Names of models that shall run and do not."""
        services = [state.service(model.name) for model in self.models if model.state == "started"]
        return {service.name for service in services if not service.running and not service.alive}

    def _start_checks(
        self, starting: set[str], gpus: t.Mapping[str, t.Sequence[str]], fetched: t.Collection[str], state: HostState
    ) -> t.Iterator[StartCheck]:
        """What keeps services from being started is found before anything is touched; those that run are left alone.

        Args:
            gpus: Given to each model; a model without an entry is not judged by them.
            fetched: Names of models whose files are there.
        """
        if state.maintenance:
            # Nothing will be started; the run after the maintenance asks.
            return
        models = [model for model in self.models if model.name in starting]
        leaving = starting | {model.name for model in self.models if model.state != "started"}
        for model in models:
            port = "port %d on %s" % (model.port, model.bind_address)
            yield StartCheck("address", model.name, partial(check_address, model, state))
            yield StartCheck("port", model.name, partial(check_port, model, self.models, state), "%s is free" % port)
            given = gpus.get(model.name, ())
            if self.health == ENFORCE:
                fit = "its GPUs are fit for service" if given else ""
                yield StartCheck("gpu_health", model.name, partial(check_gpu_health, model, given, leaving, state), fit)
            yield StartCheck("gpu_memory", model.name, partial(check_gpu_memory, model, given, leaving, state))
            if given:
                count = requested_count(model.gpus, len(state.gpus))
                here = given_gpus(given, state.gpus)
                profile = partial(check_profile_of, model, state.profiles(model), here, state.devices, count)
                yield StartCheck("profile", model.name, profile)
        yield StartCheck("disk", "", partial(check_disk, models, fetched, state))

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
        starting, fetched = self._idle(state), set()
        if state.gpus and placed and not any(missing_prerequisite(model, state, self.injection)[0] for model in models):
            configurations = self.configurations(state)
            starting = {name for name, _kind, _why in self._restarts(state, configurations)}
            fetched = {model.name for model in models if _fetched(model, configurations, state)}
        for check in self._start_checks(starting, placed, fetched, seen):
            judge(check)
        for model in models:
            if model.state == "started" and model.name not in starting:
                verdicts.append(
                    Verdict("service", OK, "Model %s runs, or is being started." % model.name, subject=model.name)
                )
        return verdicts

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

    def _restarts(self, state: HostState, configurations: t.Mapping[str, Json]) -> list[tuple[str, str, str]]:
        """Name, ``start`` or ``restart``, and why, of every service that does not run what it should."""
        found = []
        new_key = self._new_key(state)
        for model in self.models:
            if model.state != "started":
                continue
            service = state.service(model.name)
            spec = str(configurations[model.name]["spec"])
            other = self._differences(model, configurations[model.name], state.images[model.image], service)
            if service.running:
                if service.spec != spec:
                    found.append((model.name, "restart", "the container runs something else"))
                elif other:
                    why = "the container was made or changed by hand: %s" % ", ".join(other)
                    found.append((model.name, "restart", why))
                elif service.silent:
                    found.append((model.name, "restart", service.silent))
                elif not service.alive:
                    found.append((model.name, "start", "the unit is %s, the container goes on" % service.active))
                elif service.lost_gpus:
                    why = (
                        "the container has lost its GPUs, as systemctl daemon-reload does to it: %s" % service.lost_gpus
                    )
                    found.append((model.name, "restart", why))
            elif not service.alive:
                why = "the unit failed" if service.active == "failed" else "the service does not run"
                found.append((model.name, "start", why))
            elif service.paused:
                continue
            elif service.phase == "ready" and not service.container:
                found.append((model.name, "restart", "its container is gone"))
            elif service.started_spec != spec:
                found.append((model.name, "restart", "the unit is starting something else"))
            elif new_key and service.failures:
                found.append((model.name, "restart", "its starts failed, and there is a new key"))
        return found

    @staticmethod
    def _differences(model: NimModel, configuration: Json, image: ImageState, service: ServiceState) -> list[str]:
        """What is other in the container than it was made with."""
        known = [*image.variables, *configuration["secret_environment"]]
        made = [configuration["create"]]
        if configuration["key_in_service"]:
            # What the wrapper does when the host has a key.
            made.append(arguments_with_key(configuration["key_in_service"], key_pipe(model.name)))
        return min((differences(create, service.inspected, known) for create in made), key=len)

    def _plan_containers(self, restarts: t.Collection[str], state: HostState) -> list[Change]:
        """What can be mended in a container that goes on."""
        changes = []
        for model in self.models:
            service = state.service(model.name)
            if model.state != "started" or model.name in restarts:
                continue
            data = {"container": model.container}
            if service.paused:
                why = "somebody has paused the container"
                changes.append(
                    Change(self.name, model.unit, "paused", "running", why, Disruption.NONE, "unpause", data)
                )
            policy = restart_policy(service.inspected)
            if policy != "no":
                what = "restart policy of container %s" % model.container
                why = "systemd restarts it, and there must not be two who do"
                changes.append(Change(self.name, what, policy, "no", why, Disruption.NONE, "restart_policy", data))
        return changes

    def _plan_directories(self, state: HostState) -> list[Change]:
        wanted: dict[str, tuple[int, int, int, str]] = {}
        for path in (BASE_DIRECTORY, STATE_DIRECTORY, CONFIGURATION_DIRECTORY, os.path.dirname(WRAPPER)):
            wanted[path] = (0, 0, 0o755, "holds what all services share")
        for model in self.models:
            if model.state != "absent":
                wanted[model.cache_directory] = (model.uid, model.gid, 0o750, "model cache of %s" % model.name)
        changes = []
        if not any(model.state != "absent" for model in self.models):
            return []
        for path, (uid, gid, fresh, why) in wanted.items():
            found = state.paths.get(path)
            foreign = state.foreign_files.get(path, False)
            right = found is not None and found.uid == uid and found.mode & 0o700 == 0o700 and not found.mode & 0o002
            if right and not foreign:
                continue
            if found is not None and not found.is_dir:
                raise FleetError(
                    "not_a_directory", "%s is needed as a directory and is a file; move it away." % path, path=path
                )
            # Keep what the operator lets the group and others read; nobody else may write.
            mode = fresh if found is None or uid == 0 else (found.mode & 0o055) | 0o700
            changes.append(
                Change(
                    self.name,
                    "directory " + path,
                    None
                    if found is None
                    else _owner(found.mode, found.uid, found.gid) + " with others' files" * foreign,
                    _owner(mode, uid, gid),
                    why,
                    Disruption.NONE,
                    "directory",
                    {"path": path, "mode": mode, "uid": uid, "gid": gid, "files": foreign},
                )
            )
        return changes

    def _plan_files(self, state: HostState) -> list[Change]:
        if not any(model.state != "absent" for model in self.models):
            return []
        changes = []
        for path, text, mode, why in (
            (WRAPPER, wrapper_text(), 0o755, "runs the containers for systemd"),
            (UNIT_DIRECTORY + "/nim.target", TARGET_TEXT, 0o644, "starts and stops all services together"),
            (UNIT_DIRECTORY + "/nim.slice", SLICE_TEXT, 0o644, "holds the containers' processes"),
        ):
            changes += self._plan_file(state, path, state.files.get(path), text, mode, why)
        return changes

    def _plan_file(
        self, state: HostState, path: str, before: str | None, after: str, mode: int, why: str
    ) -> list[Change]:
        shown: tuple[str | None, str] = (None if before is None else "other content", "as wanted")
        if before == after:
            found = state.paths.get(path)
            # Who may write a unit or the wrapper is root; how many may read it is the operator's affair.
            if found is None or (
                found.uid == 0 and not found.mode & 0o022 and found.mode & mode & 0o500 == mode & 0o500
            ):
                return []
            shown = (_owner(found.mode, found.uid, found.gid), _owner(mode, 0, 0))
            why = "only root may write it" if found.uid or found.mode & 0o022 else why
        return [
            Change(
                self.name,
                path,
                *shown,
                why,
                Disruption.NONE,
                "file",
                {"path": path, "text": after, "mode": mode},
                FileDiff(path, before or "", after),
            )
        ]

    def _new_key(self, state: HostState) -> bool:
        return self.key is not None and self.key_state == "present" and fingerprint(self.key) != state.key_fingerprint

    def _plan_key(self, state: HostState) -> list[Change]:
        before = state.key_fingerprint
        if self.key_state == "absent":
            if before is None:
                return []
            return [Change(self.name, KEY_FILE, before, None, "no key is wanted here", Disruption.NONE, "key_absent")]
        if self.key is None or (not self._new_key(state) and state.key_safe):
            return []
        why = (
            "the key changed; services that run keep running" if before else "the key is needed while files are fetched"
        )
        if not self._new_key(state):
            why = "the file could be read by others than root"
        return [Change(self.name, KEY_FILE, before, fingerprint(self.key), why, Disruption.NONE, "key")]

    def _plan_stop(self, model: NimModel, state: HostState) -> list[Change]:
        service = state.service(model.name)
        return self._stop_changes(service, "state is %s" % model.state, model.stop_timeout, model.state == "absent")

    def _stop_changes(self, service: ServiceState, why: str, stop_timeout: int, remove: bool) -> list[Change]:
        unit = unit_name(service.name)
        changes = []
        if service.alive or service.running or service.downloading:
            data = {"name": service.name, "stop_timeout": stop_timeout}
            changes.append(Change(self.name, unit, "started", "stopped", why, Disruption.RESTART_NIM, "stop", data))
        if remove and service.exists:
            why += "; its model cache is kept"
            changes.append(
                Change(self.name, unit, "present", None, why, Disruption.NONE, "remove", {"name": service.name})
            )
        return changes

    def _plan_removal(self, state: HostState) -> list[Change]:
        why = "everything is to be removed"
        changes = []
        for service in state.services.values():
            timeout = service.configuration.get("stop_timeout")
            changes += self._stop_changes(service, why, timeout if isinstance(timeout, int) else 60, True)
        target = UNIT_DIRECTORY + "/nim.target"
        if state.files.get(target) is not None:
            changes.append(Change(self.name, "nim.target", "present", None, why, Disruption.NONE, "remove_target", {}))
        for path in (UNIT_DIRECTORY + "/nim.slice", os.path.dirname(WRAPPER), STATE_DIRECTORY, CONFIGURATION_DIRECTORY):
            if state.files.get(path) is not None or state.paths.get(path) is not None:
                changes.append(
                    Change(self.name, path, "present", None, why, Disruption.NONE, "remove_path", {"path": path})
                )
        return changes + self._plan_reload(changes, state)

    def _plan_service_files(self, model: NimModel, configuration: Json, state: HostState) -> list[Change]:
        service = state.service(model.name)
        changes = self._plan_file(
            state,
            "%s/%s.json" % (CONFIGURATION_DIRECTORY, model.name),
            service.configuration_text,
            json.dumps(configuration, indent=2, sort_keys=True) + "\n",
            0o644,
            "what the container of %s is given" % model.name,
        )
        changes += self._plan_secrets(model, state)
        if not service.masked:
            changes += self._plan_file(
                state,
                "%s/%s" % (UNIT_DIRECTORY, model.unit),
                service.unit_text,
                unit_text(model, self.injection),
                0o644,
                "unit of %s" % model.name,
            )
        return changes

    def _plan_secrets(self, model: NimModel, state: HostState) -> list[Change]:
        service = state.service(model.name)
        path = secret_path(model.name)
        there = Secrets.parse(service.secret_text)
        before = None if service.secret_text is None else (str(there) if there else "other content")
        if not model.secret_environment:
            if before is None:
                return []
            why = "%s has no secret variables" % model.name
            return [Change(self.name, path, before, None, why, Disruption.NONE, "secrets_absent", {"path": path})]
        wanted = self._secrets(model, state)
        text = wanted.render()
        if service.secret_text == text and service.secret_safe:
            return []
        why = "secret variables of %s" % model.name
        if service.secret_text == text:
            why = "the file could be read by others than root"
        data = {"path": path, "text": text}
        # Fingerprints with a new key would be others in every look.
        after = str(wanted) if there else ", ".join(sorted(wanted.values))
        return [Change(self.name, path, before, after, why, Disruption.NONE, "secrets", data)]

    def _plan_reload(self, changes: t.Sequence[Change], state: HostState) -> list[Change]:
        written = any(
            change.action in ("remove", "remove_target", "enable", "disable")
            or (change.action == "file" and str(change.data["path"]).startswith(UNIT_DIRECTORY + "/"))
            for change in changes
        )
        stale = (state.target_need_reload and not self.remove_all) or any(
            state.service(model.name).need_reload
            for model in self.models
            if model.state != "absent" and not self.remove_all
        )
        if not written and not stale:
            return []
        why = "units changed"
        if state.endangered:
            why += "; containers that may lose their GPUs by it: " + ", ".join(state.endangered)
        return [
            Change(
                self.name,
                "systemd",
                "old units loaded",
                "daemon-reload",
                why,
                Disruption.RELOAD,
                "daemon_reload",
                {"endangered": state.endangered},
            )
        ]

    def _plan_enablement(self, state: HostState) -> list[Change]:
        enable, disable = [], []
        for model in self.models:
            service = state.service(model.name)
            if model.state == "started" and service.enabled != "enabled":
                enable.append(model.unit)
            if model.state == "stopped" and service.enabled == "enabled":
                disable.append(model.unit)
        if any(model.state != "absent" for model in self.models) and not state.target_enabled:
            enable.insert(0, "nim.target")
        changes = []
        for verb, units in (("enable", enable), ("disable", disable)):
            for unit in units:
                before, after = ("disabled", "enabled") if verb == "enable" else ("enabled", "disabled")
                changes.append(
                    Change(
                        self.name,
                        unit,
                        before,
                        after,
                        "started at boot" if verb == "enable" else "not started at boot",
                        Disruption.NONE,
                        verb,
                        {"units": units},
                    )
                )
        return changes

    def _plan_restarts(self, restarts: t.Sequence[tuple[str, str, str]], state: HostState) -> list[Change]:
        names = [name for name, _kind, _why in restarts]
        # systemd stops a container only for a unit that is up; another one would be taken over or waited for.
        strangers = [
            name
            for name, kind, _why in restarts
            if kind == "restart" and state.service(name).running and not state.service(name).alive
        ]
        timeouts = {model.name: model.stop_timeout for model in self.models if model.name in strangers}
        blocked = None
        if state.maintenance:
            blocked = "%s exists: the host is under maintenance; remove the file to let services start" % (
                MAINTENANCE_FILE
            )
        changes = []
        for name, kind, why in restarts:
            service = state.service(name)
            changes.append(
                Change(
                    self.name,
                    unit_name(name),
                    "started" if service.running else (service.active or None),
                    "started" if kind == "start" else "restarted",
                    why,
                    Disruption.RESTART_NIM if service.running and kind == "restart" else Disruption.NONE,
                    "restart",
                    {"names": names, "strangers": timeouts},
                    blocked=blocked,
                )
            )
        # Last, because it would start every enabled unit that does not run yet.
        if any(model.state == "started" for model in self.models) and not state.target_active and not blocked:
            changes.append(
                Change(self.name, "nim.target", "inactive", "active", "groups the services", action="start_target")
            )
        return changes

    # -- apply ----------------------------------------------------------------------------------------

    def apply(self, host: Host, change: Change) -> None:
        data = change.data
        if change.action == "prerequisite":
            raise FleetError(str(data["reason"]), str(data["message"]), changes=[])
        if change.action == "directory":
            self._make_directory(host, data)
        elif change.action == "file":
            host.write_file(data["path"], data["text"], mode=data["mode"])
        elif change.action == "unpause":
            self._docker(host, ["unpause", data["container"]], "Waking container %s" % data["container"])
        elif change.action == "restart_policy":
            command = ["update", "--restart=no", data["container"]]
            self._docker(host, command, "Taking Docker's restart policy from %s" % data["container"])
        elif change.action == "key":
            if host.stat(CONFIGURATION_DIRECTORY) is None:
                host.make_dir(CONFIGURATION_DIRECTORY, mode=0o755)
            host.write_file(KEY_FILE, render_environment(self.key or ""), mode=0o600)
        elif change.action == "secrets":
            host.write_file(data["path"], data["text"], mode=0o600)
        elif change.action == "secrets_absent":
            host.remove(data["path"])
        elif change.action == "key_absent":
            host.remove(KEY_FILE)
        elif change.action == "stop":
            self._stop(host, data["name"], data["stop_timeout"])
        elif change.action == "remove":
            self._remove(host, data["name"])
        elif change.action == "remove_target":
            self._systemctl(host, "disable", ["nim.target"], "--now", "--no-reload")
            host.remove(UNIT_DIRECTORY + "/nim.target")
        elif change.action == "remove_path":
            host.remove(data["path"])
        elif change.action == "daemon_reload":
            self._daemon_reload(host, data["endangered"])
        elif change.action in ("enable", "disable"):
            self._set_enabled(host, change.action, data["units"])
        elif change.action == "start_target":
            self._systemctl(host, "start", ["nim.target"])
        elif change.action == "restart":
            self._restart(host, data["names"], data["strangers"])

    @staticmethod
    def _make_directory(host: Host, data: t.Mapping[str, t.Any]) -> None:
        host.make_dir(data["path"], mode=data["mode"], uid=data["uid"], gid=data["gid"])
        if data["files"]:
            owner = "%d:%d" % (data["uid"], data["gid"])
            words = ["!", "-uid", str(data["uid"]), "-exec", "chown", "--no-dereference", owner, "{}", "+"]
            host.check(
                ["find", data["path"], "-xdev", *words],
                reason="chown_failed",
                doing="Giving the files in %s to %s" % (data["path"], owner),
                remedy="On a network file system, do it where that is exported.",
            )

    @staticmethod
    def _docker(host: Host, command: t.Sequence[str], doing: str) -> None:
        host.check(["docker", *command], reason="docker_failed", doing=doing, remedy="See 'docker ps -a'.", timeout=60)

    def _systemctl(self, host: Host, verb: str, units: t.Sequence[str], *options: str) -> None:
        host.check(
            ["systemctl", verb, *options, *units],
            reason="systemctl_failed",
            doing="systemctl %s %s" % (verb, " ".join(units)),
            remedy="See 'systemctl status %s' and 'journalctl -u %s'." % (units[0], units[0]) if units else "",
        )

    def _stop(self, host: Host, name: str, stop_timeout: int) -> None:
        self._systemctl(host, "stop", [unit_name(name)])
        self._stop_containers(host, name, stop_timeout)

    def _stop_containers(self, host: Host, name: str, stop_timeout: int) -> None:
        # A stop between an end of the wrapper and its restart leaves the container running.
        for container in (container_name(name), container_name(name) + "-download"):
            found = self.api.container(container)
            if found is not None and (found.get("State") or {}).get("Running"):
                host.check(
                    ["docker", "stop", "-t", str(stop_timeout), container],
                    reason="stop_failed",
                    doing="Stopping container %s" % container,
                )

    def _remove(self, host: Host, name: str) -> None:
        for container in (container_name(name), container_name(name) + "-download"):
            if self.api.available() and self.api.container(container) is not None:
                host.check(
                    ["docker", "rm", "-f", container],
                    reason="remove_failed",
                    doing="Removing container %s" % container,
                )
        unit = unit_name(name)
        if host.exists("%s/%s" % (UNIT_DIRECTORY, unit)):
            self._systemctl(host, "disable", [unit], "--no-reload")
        host.remove("%s/%s" % (UNIT_DIRECTORY, unit))
        host.remove("%s/%s.json" % (CONFIGURATION_DIRECTORY, name))
        host.remove(secret_path(name))
        host.remove("%s/%s.download.json" % (STATE_DIRECTORY, name))
        host.remove("%s/%s.json" % (RUNTIME_DIRECTORY, name))
        host.remove("%s/%s.stop" % (RUNTIME_DIRECTORY, name))
        host.remove("%s/keys/%s" % (RUNTIME_DIRECTORY, name))
        # Fails when systemd does not remember the unit, and then there is nothing to forget.
        host.run(["systemctl", "reset-failed", unit])

    def _daemon_reload(self, host: Host, endangered: t.Sequence[str]) -> None:
        self._systemctl(host, "daemon-reload", [])
        own = {model.container: model.name for model in self.models if model.state == "started"}
        lost = {container: said for container in endangered for said in [lost_gpus(host, container)] if said}
        for container, said in lost.items():
            self.warnings.append(
                "Container %s has lost its GPUs by systemctl daemon-reload (%s)%s; use the nvidia runtime in mode jit-cdi or "
                "CDI devices so that it does not happen again."
                % (container, said, " and is started anew" if container in own else ": recreate it")
            )
        self._restart(host, [own[container] for container in lost if container in own], {})

    def _set_enabled(self, host: Host, verb: str, units: t.Sequence[str]) -> None:
        todo = []
        for unit in units:
            shown = host.run(["systemctl", "show", "--property", "UnitFileState", "--value", unit]).stdout.strip()
            if (shown == "enabled") != (verb == "enable"):
                todo.append(unit)
        if todo:
            # The one daemon-reload of this run comes after it.
            self._systemctl(host, verb, todo, "--no-reload")

    def _restart(self, host: Host, names: t.Sequence[str], strangers: t.Mapping[str, int]) -> None:
        """Start or restart all services in one go, so that their stops overlap; a later change then finds it done."""
        wanted: dict[str, str] = {}
        for name in names:
            text = host.read_text("%s/%s.json" % (CONFIGURATION_DIRECTORY, name))
            wanted[name] = str(json_object(text).get("spec", ""))
        todo = [name for name in names if name not in self._restarted]
        if not todo:
            return
        self._restarted.update(todo)
        for name in todo:
            # Failures of the past must not delay this start, and its word is how the new wrapper is recognised.
            host.remove("%s/%s.json" % (RUNTIME_DIRECTORY, name))
            if name in strangers:
                self._stop_containers(host, name, strangers[name])
        units = [unit_name(name) for name in todo]
        # Fails for units that systemd has not loaded yet, and those have no start limit to reset.
        host.run(["systemctl", "reset-failed", *units])
        self._systemctl(host, "restart", units)
        end = host.monotonic() + WRAPPER_TIMEOUT
        for name in todo:
            while not self._has_spoken(host, name, wanted[name]) and host.monotonic() < end:
                host.sleep(0.1)

    def _has_spoken(self, host: Host, name: str, spec: str) -> bool:
        """Whether the new wrapper has said what it starts.

        Raises:
            FleetError: ``start_failed`` when systemd has given up already.
        """
        runtime = json_object(host.read_text("%s/%s.json" % (RUNTIME_DIRECTORY, name)))
        if runtime.get("spec") == spec:
            return True
        unit = unit_name(name)
        shown = host.run(["systemctl", "show", "--property", "ActiveState", "--value", unit])
        if shown.stdout.strip() == "failed":
            journal = host.run(["journalctl", "--unit", unit, "--lines", "20", "--output", "cat", "--no-pager"])
            said = [line for line in journal.stdout.splitlines() if line.startswith(("Cannot start", "Starting nim-"))]
            raise FleetError(
                "start_failed",
                "Starting %s failed: %s. See 'journalctl -u %s'."
                % (unit, (said or [journal.last_line()])[-1].rstrip("."), unit),
                unit=unit,
                log=journal.stdout[-4000:],
            )
        return False

    # -- result ---------------------------------------------------------------------------------------

    def result(self, state: HostState) -> Json:
        """Return values of the module: every service, what is there beside the list, and warnings."""
        known = not self.remove_all and not self._missing_prerequisites(state)
        configurations: t.Mapping[str, Json] = self.configurations(state) if known else {}
        listed = {model.name for model in self.models}
        warnings = list(self.warnings)
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


def _fetched(model: NimModel, configurations: t.Mapping[str, Json], state: HostState) -> bool:
    """Whether the wrapper has fetched all files of a model, as it will ask itself before the start."""
    there = state.service(model.name).fetched
    download = configurations.get(model.name, {}).get("download") or {}
    return there.get("status") in FETCHED and there.get("key") == download.get("key", "")


def _owner(mode: int, uid: int, gid: int) -> str:
    return "%04o owner %d:%d" % (mode, uid, gid)


def _new_gpus(gpus: t.Sequence[str], name: str, state: HostState) -> str:
    """``; on GPU 0, 1`` for a service that gets others than it has, and why; empty where they stay."""
    present = state.service(name).gpus
    if sorted(gpus) == sorted(present):
        return ""
    index = {gpu.uuid: str(gpu.index) for gpu in state.gpus}
    left = ["GPU %s %s" % (index[uuid], why) for uuid, why in state.unfit_gpus.items() if uuid in present]
    return "; on GPU %s%s" % (
        ", ".join(index.get(uuid, uuid) for uuid in gpus),
        ", because " + " and ".join(left) if left else "",
    )
