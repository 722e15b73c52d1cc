# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What cannot work on a host, found out in seconds: before a byte is pulled and before a service is touched.

No rule stands here: the resources say what they would refuse, the registry says which images it hands out, and the GPUs say
what condition they are in. The host is only looked at, and need not have a driver or Docker yet.
"""

from __future__ import annotations

import typing as t
from dataclasses import replace

from ._background import RUNNING
from ._disk_space import amount, check_space, file_systems
from ._docker_api import DockerApi
from ._docker_registries import Registries
from ._errors import FleetError
from ._gpu_health import KERNEL_LINES, gpu_health
from ._gpu_inventory import GpuInventory, observe_gpus
from ._gpu_wishes import gpus_of
from ._host import Host
from ._host_plan import DRIVER, HostPlan, plan_host
from ._kernel_log import read_kernel_log
from ._ngc_key import REGISTRY, USERNAME, key_in_environment
from ._ngc_login import NgcLogin
from ._ngc_login_planner import VALIDATE_NEVER
from ._nim_image import ExpectedDriver, NimImages, PullTask, environment_of, pull_job_id, requirements_off
from ._nim_models import parse_models
from ._nim_paths import KEY_FILE
from ._nim_service import ENFORCE, WARN, NimService
from ._nim_service_checks import cdi_problem
from ._nvidia_driver_planner import DriverPlanner
from ._options import CHAIN
from ._read_only_host import ReadOnlyHost
from ._registry import RegistryClient
from ._sleeping_docker import SleepingDocker, sleeps
from ._verdict import OK, REFUSED, UNKNOWN, WARNING, Verdict, refusal, worst

Options = t.Mapping[str, t.Any]

#: Resources that can be judged before they are there.
JUDGED = tuple(name for name in CHAIN if name != "nim_health")
#: Judged one by one below, and not by their plan as a whole.
_OWN_CHECKS = ("nim_image", "nim_service")
#: Whoever repairs a host at night must get past a refusal that is wrong or does not matter now.
ALL_THE_SAME = (
    "Nothing was touched here; -e site_preflight=false sets up everything up to the services all the same, and "
    "-e nim_preflight=false also the services, as far as they can be."
)
#: Resources that change how Docker reaches registries.
_DOCKER = ("docker_engine", "docker_daemon")
#: What says nothing about an image while Docker is still to be set up: how it will reach the registry is not known.
_BEFORE_DOCKER = ("registry_unreachable", "tls_error", "engine_cannot_pull", "engine_too_old")
#: The same where no Docker answers: the image may be there.
_WITHOUT_DOCKER = (*_BEFORE_DOCKER, "image_missing", "docker_unavailable")


def preflight(
    host: Host,
    wanted: t.Mapping[str, Options | None],
    api: DockerApi | None = None,
    client: t.Callable[..., RegistryClient] = RegistryClient,
) -> list[Verdict]:
    """Verdicts on a host, on its GPUs and on what is wanted there, the worst first.

    Args:
        wanted: Resource -> options of the module of the same name; what is missing or None is not judged.
        api: Docker of the host.
    """
    found = _Preflight(ReadOnlyHost(host), wanted, api or DockerApi(), client).run()
    order = (REFUSED, WARNING, UNKNOWN, OK)
    return sorted(found, key=lambda verdict: order.index(verdict.verdict))


def stands_in_the_way(verdicts: t.Iterable[Verdict]) -> list[Verdict]:
    """The refusals that a run would meet.

    Those of GPUs are none: a service that is to be started on one is refused for it, and one that runs is left alone.
    """
    gpus = ("nvml", "gpu_count")
    return [
        verdict for verdict in verdicts if verdict.verdict == REFUSED and not verdict.gpu and verdict.check not in gpus
    ]


def result(verdicts: t.Sequence[Verdict]) -> dict[str, t.Any]:
    """Return values of the module."""
    return {
        "verdict": worst(verdicts),
        "checks": [verdict.as_dict() for verdict in verdicts],
    }


class _Preflight:
    def __init__(
        self,
        host: Host,
        wanted: t.Mapping[str, Options | None],
        api: DockerApi,
        client: t.Callable[..., RegistryClient],
    ) -> None:
        self.host = host
        self.wanted = {
            name: dict(options) for name, options in wanted.items() if options is not None and name in JUDGED
        }
        self.api = api
        self.client = client
        self.found: list[Verdict] = []
        #: Whether the driver is to be loaded anew, and the GPUs' condition with it.
        self.driver_changes = False
        #: Whether Docker answers, and whether it is to be changed.
        self.docker = True
        self.docker_changes = False
        #: Whether it is known which models would be started on which GPUs.
        self.services_judged = "nim_service" not in self.wanted
        #: The login that is to be stored.
        self.login: NgcLogin | None = None

    def run(self) -> list[Verdict]:
        inventory = observe_gpus(self.host)
        if not inventory.pci:
            self._no_gpu()
            return self.found
        if sleeps(self.host):
            # Asking it would start it, and a preflight changes nothing.
            self.api = SleepingDocker()
        self.docker = self.api.available()
        self._resources()
        place = len(self.found)
        health = gpu_health(inventory, read_kernel_log(self.host, only=KERNEL_LINES) if inventory.driver else None)
        for name, check, step in (
            ("ngc_login", "key", self._login),
            ("nim_image", "image", lambda options: self._images(options, inventory)),
            ("nim_service", "service", self._services),
        ):
            if name not in self.wanted:
                continue
            try:
                step(self.wanted[name])
            except FleetError as error:
                self.found.append(refusal(check, error))
        self.found[place:place] = [self._weighed(verdict) for verdict in health]
        return self.found

    def _no_gpu(self) -> None:
        models = [entry.get("name") for entry in (self.wanted.get("nim_service") or {}).get("models") or []]
        self.found.append(
            Verdict(
                "gpu",
                WARNING if models else OK,
                "This host has no NVIDIA GPU on its PCI bus, so it is left as it is%s."
                % (" and does not serve %s" % ", ".join(map(str, models)) if models else ""),
                "take it out of the inventory's group, or look whether its GPUs are seated and passed through"
                if models
                else "",
                "no_gpu",
            )
        )

    def _resources(self) -> None:
        """What each resource would refuse or leave out, as its plan says."""
        names = [name for name in JUDGED if name in self.wanted and name not in _OWN_CHECKS]
        plan: HostPlan = plan_host(self.host, {name: self.wanted[name] for name in names}, self.api)
        self.driver_changes = any(one.change.resource in DRIVER for one in plan.planned)
        self.docker_changes = any(one.change.resource in _DOCKER for one in plan.planned)
        for error in plan.errors:
            # Told once, where it comes from.
            if not error.after:
                self.found.append(refusal(error.resource, FleetError(error.reason, error.message)))
        left_out: dict[tuple[str, str], list[str]] = {}
        for one in plan.planned:
            if one.change.blocked:
                left_out.setdefault((one.change.resource, one.change.blocked), []).append(one.change.what)
        for (resource, why), what in left_out.items():
            self.found.append(
                Verdict(
                    resource, WARNING, "%s would be left out: %s." % (", ".join(what), why.rstrip(".")), "", "blocked"
                )
            )
        troubled = {verdict.check for verdict in self.found}
        for name in names:
            if name not in troubled:
                todo = any(one.change.resource == name for one in plan.planned)
                text = "%s can be set up." if todo else "%s is as wanted."
                self.found.append(Verdict(name, OK, text % name))

    def _login(self, options: Options) -> None:
        """Whether the registry takes the key that would be stored; one that is stored already is proved by the images."""
        login = NgcLogin(**options, client=self.client, api=self.api, daemon_options=self._daemon_options())
        if not login.key:
            return
        self.login = login
        login.precheck(self.host)
        if login.checked:
            self.found.append(Verdict("key", OK, "%s accepts the key." % login.registry))

    def _daemon_options(self) -> t.Mapping[str, t.Any] | None:
        """Keys of daemon.json that the daemon will obey by the time it is asked for images."""
        return (self.wanted.get("docker_daemon") or {}).get("options")

    # -- GPUs -----------------------------------------------------------------------------------------

    def _health(self) -> str:
        """A driver that is loaded anew has other GPUs, as far as their condition goes; the run judges them after it."""
        return WARN if self.driver_changes else (self.wanted.get("nim_service") or {}).get("gpu_health") or ENFORCE

    def _weighed(self, verdict: Verdict) -> Verdict:
        """What is wrong with a GPU is a refusal only where it keeps a model from being started."""
        if verdict.verdict != REFUSED:
            return verdict
        # The refusal of a service repeats what its GPUs say.
        said = [one.sentence for one in self.found if one.check == "gpu_health"]
        harmless = self.services_judged and not any(verdict.message.rstrip(".") in sentence for sentence in said)
        if self._health() == WARN or (verdict.gpu and harmless):
            return replace(verdict, verdict=WARNING)
        return verdict

    # -- images ---------------------------------------------------------------------------------------

    def _images(self, options: Options, inventory: GpuInventory) -> None:
        name = (self.host.read_text("/proc/sys/kernel/hostname") or "").strip()
        resource = NimImages(
            **options,
            api=self.api,
            client=self.client,
            host_name=name or "this host",
            logins=self._logins(options),
            daemon_options=self._daemon_options(),
        )
        expected = self._expected_driver(inventory)
        unknown = inventory.driver is None and expected is None
        tasks: list[PullTask] = []
        for wanted in list(resource.wanted):
            if wanted.state != "present":
                continue
            name = str(wanted.reference)
            # One at a time: what is wrong with one hides no other.
            resource.wanted = [wanted]
            job = resource.jobs.read(pull_job_id(wanted.reference))
            if job is not None and job.state == RUNNING:
                # Checked when it was begun; a run waits for it, and the disk gives its space already.
                self.found.append(Verdict("image", OK, "%s is being pulled already." % name, subject=name))
                continue
            try:
                environment, task = self._look_up(resource)
            except FleetError as error:
                self.found.append(self._image_refused(error, name))
                continue
            if task is None:
                self.found.append(Verdict("image", OK, "%s is on the host." % name, subject=name))
            else:
                tasks.append(task)
                text = "The registry hands out %s: %s to download." % (name, amount(task.found.compressed_size))
                self.found.append(Verdict("image", OK, text, subject=name))
                self._profiles(resource, task, inventory)
            if not wanted.check_requirement or requirements_off(self.host):
                continue
            try:
                resource.check_requirement(
                    environment, inventory, name, gpus_of(self.host, wanted.users, inventory.gpus), expected
                )
            except FleetError as error:
                self.found.append(refusal("requirement", error, name))
                continue
            if unknown:
                text = "No driver is loaded and none is wanted, so what %s requires of it is not judged." % name
                self.found.append(Verdict("requirement", UNKNOWN, text, "", "driver_not_loaded", subject=name))
            else:
                text = "The driver satisfies what %s requires." % name
                self.found.append(Verdict("requirement", OK, text, subject=name))
        self._disk(resource, tasks)

    def _logins(self, options: Options) -> dict[str, tuple[str, str]]:
        """The login that this very run stores before it pulls."""
        login = self.login
        if login is None or login.docker_user != (options.get("docker_user") or "root"):
            return {}
        return {login.registry: (login.username, login.key)}

    def _image_refused(self, error: FleetError, name: str) -> Verdict:
        """A refusal; but no more than a remark where Docker, once it is set up, may have the image or reach the registry."""
        refused = refusal("image", error, name)
        later = _WITHOUT_DOCKER if not self.docker else _BEFORE_DOCKER if self.docker_changes else ()
        if error.reason in later:
            message = "%s This is asked again after Docker is set up." % refused.message
            return replace(refused, verdict=UNKNOWN, message=message)
        return refused

    def _profiles(self, resource: NimImages, task: PullTask, inventory: GpuInventory) -> None:
        """What the manifest at the registry says of the profiles that models name; of images on the host the service says it."""
        name = str(task.wanted.reference)
        try:
            unknown = resource.check_profiles(self.host, task, inventory)
        except FleetError as error:
            self.found.append(refusal("profile", error, name))
            return
        for wish in task.wanted.profiles:
            text = "Nothing speaks against profile %s of model %s." % (wish.profile, wish.model)
            # What nobody could look at is no promise.
            text = " ".join([text, *(check.message for check in unknown.get(wish.model, ()) if check.message)])
            self.found.append(Verdict("profile", OK, text, subject=name))

    def _look_up(self, resource: NimImages) -> tuple[t.Mapping[str, str], PullTask | None]:
        """Environment of the one image, and what is to be pulled; None when it is on the host.

        Raises:
            FleetError: What a run would refuse; ``docker_unavailable`` when nobody can say whether it is on the host.
        """
        state = resource.observe(self.host)
        (image,) = state.images
        moved = image.newer and image.pinned and image.newer.digest != image.pinned.digest
        if not state.docker and image.pinned and not moved:
            raise FleetError(
                "docker_unavailable",
                "Image %s was pulled before and is not judged: Docker does not answer yet." % image.wanted.reference,
            )
        for change in resource.plan(state):
            if change.action == "pull":
                task = resource.find(self.host, change)
                return task.found.environment, task
        return environment_of(state.images[0].local), None

    def _disk(self, resource: NimImages, tasks: t.Sequence[PullTask]) -> None:
        for system in file_systems(self.host, resource.space_needs(self.host, tasks)):
            try:
                check_space([system])
            except FleetError as error:
                self.found.append(refusal("disk", error))
                continue
            needed = sum(need.size for need in system.needs)
            text = "%s has %s free; about %s will be taken" % (system.mount, amount(system.free), amount(needed))
            untold = [str(task.wanted.reference) for task in tasks if not task.wanted.spaces]
            if untold:
                text += ", without the model files of %s, whose size nobody tells (disk_space)" % ", ".join(untold)
            self.found.append(Verdict("disk", OK, text + "."))

    def _expected_driver(self, inventory: GpuInventory) -> ExpectedDriver | None:
        """The driver that will be there when the images are started, where it is not the loaded one."""
        loaded = inventory.driver.version if inventory.driver else ""
        options = self.wanted.get("nvidia_driver")
        if options is None:
            return None
        try:
            driver = DriverPlanner(**options)
            state = driver.observe(self.host)
            renewed = any(change.action == "packages" for change in driver.plan(state))
        except FleetError:
            # Told as the verdict on that resource.
            return None
        if renewed:
            # Which release of the branch it will be is not known: the newest that there can be is assumed.
            version = driver.version or driver.branch + ".999"
            words = "this host is to get driver %s" % (driver.version or "branch " + driver.branch)
            return ExpectedDriver(version, words)
        installed = state.on_disk or state.user_space
        if installed and installed != loaded:
            return ExpectedDriver(installed, "this host has driver %s installed, which is to be loaded" % installed)
        return None

    def _cdi_comes(self) -> bool:
        """Whether this run switches Docker's CDI feature on, or says by itself why it does not."""
        toolkit = self.wanted.get("nvidia_container_toolkit") or {}
        wanted = toolkit.get("cdi") or toolkit.get("injection") == "cdi"
        return bool(wanted or ((self._daemon_options() or {}).get("features") or {}).get("cdi"))

    # -- services ---------------------------------------------------------------------------------------

    def _services(self, options: Options) -> None:
        service = NimService(
            parse_models(options.get("models") or [], variable="models"),
            key=options.get("ngc_api_key"),
            key_state=options.get("ngc_key_state") or "present",
            injection=options.get("gpu_injection") or "runtime",
            health=self._health(),
            remove_all=options.get("state") == "absent",
            api=self.api,
        )
        state = service.observe(self.host)
        wanted = not service.remove_all and any(model.state != "absent" for model in service.models)
        if wanted and service.injection == "cdi" and state.docker and not state.cdi and not self._cdi_comes():
            self.found.append(refusal("cdi", FleetError("cdi_off", "Services cannot be set up: " + cdi_problem(state))))
        judged = service.preflight(state)
        self.services_judged = True
        short = any((verdict.check, verdict.verdict) == ("disk", REFUSED) for verdict in self.found)
        # What models need is counted with their images, as long as those are to be pulled: told once.
        self.found += [
            verdict for verdict in judged if not (short and verdict.check == "disk" and verdict.verdict == REFUSED)
        ]
        # What has no place is told above.
        if not any((verdict.check, verdict.verdict) == ("gpus", REFUSED) for verdict in judged):
            self._key_for_files(service.fetching(state), options)

    def _key_for_files(self, names: t.Sequence[str], options: Options) -> None:
        """Whether NGC takes the key with which files are to be fetched, before a container that serves is stopped for them."""
        given = options.get("ngc_api_key")
        if not given and options.get("ngc_key_state") != "absent":
            given = key_in_environment(self.host.read_text(KEY_FILE))
        asked = (
            self.login is not None and self.login.checked and (self.login.registry, self.login.key) == (REGISTRY, given)
        )
        never = (self.wanted.get("ngc_login") or {}).get("validate") == VALIDATE_NEVER
        # Not left out behind a mirror: images come from there, but the files still from NGC.
        if not names or not given or asked or never:
            return
        registries = Registries(self.api, self._daemon_options(), self.client)
        words = (
            "fetches files with the NGC key when it starts"
            if len(names) == 1
            else "fetch files with the NGC key when they start"
        )
        who = "%s %s" % (", ".join(names), words)
        try:
            registries.client(REGISTRY, (USERNAME, given)).check_credentials(None)
        except FleetError as error:
            found = refusal("key", error, names[0] if len(names) == 1 else "")
            if error.reason != "bad_key":
                # Which key is good is not said by a registry that cannot be asked now.
                found = replace(found, verdict=UNKNOWN)
            self.found.append(replace(found, message="%s, but %s" % (who, found.message)))
