# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Images on a host: tags pinned to digests, checked before the pull, pulled in the background with progress."""

from __future__ import annotations

import hashlib
import random
import re
import time
import typing as t
from dataclasses import dataclass

from ._background import Jobs, Report
from ._disk_space import Need, amount, check_space, file_systems, used_bytes
from ._docker_config import stored_credentials
from ._docker_registries import Registries
from ._dockerd import version_tuple
from ._driver_branches import branch_of_version, cuda_of_branch
from ._errors import FleetError
from ._gpu import Gpu
from ._gpu_inventory import GpuInventory, observe_gpus
from ._gpu_wishes import check_named_profile, device_ids, gpus_of
from ._host import Host
from ._image_pull import PULL_TRANSIENT, DockerPuller, PullProgress
from ._image_record import RECORD_LOCK, PinnedImage, update_record
from ._image_reference import ImageReference
from ._image_store import cannot_pull, containerd_store, image_directory
from ._ngc_key import REGISTRY, USERNAME
from ._nim_family import OLDEST_ENGINE, Family, detect_family, family_of_image
from ._nim_image_planner import ImagesPlanner, ImagesState, ImageState, human_name
from ._nim_manifest_sources import manifest_at_registry
from ._registry import RegistryClient
from ._registry_image import RegistryImage, foreign_architecture, image_architecture, wrong_architecture
from ._requirements import check as check_verdict
from ._requirements import evaluate
from ._resource import Change, Resource
from ._wanted_images import WantedImage

if t.TYPE_CHECKING:
    from ._nim_profile_checks import Check

_TOOLKIT_CONFIGURATION = "/etc/nvidia-container-runtime/config.toml"

_PAUSE_MAX = 60.0


@dataclass(frozen=True)
class ExpectedDriver:
    """The driver that an image will meet, where it is not the loaded one.

    Attributes:
        version: Empty when nothing is known of it.
        words: What is said of it, for example ``this host is to get driver branch 580``.
    """

    version: str
    words: str


@dataclass(frozen=True)
class PullTask:
    """A pull that passed all checks."""

    wanted: WantedImage
    source: ImageReference
    found: RegistryImage

    @property
    def job_id(self) -> str:
        return pull_job_id(self.wanted.reference)


def pull_job_id(reference: ImageReference) -> str:
    """Identifier of the job that pulls an image; equal for everybody who wants the same one."""
    return "pull-" + hashlib.sha256(str(reference).encode("utf-8")).hexdigest()[:16]


class NimImages(ImagesPlanner, Resource[ImagesState]):
    """Images on a host, with everything that pulls them; ``pull: newer`` asks the registry on every look.

    Args:
        logins: Registry -> user and password that go before those that are stored, because they will be stored.
        daemon_options: Keys of daemon.json that the daemon will obey, whatever it says of itself now.
        options: See :class:`._nim_image_planner.ImagesPlanner`.
    """

    def __init__(
        self,
        images: t.Any,
        *,
        host_name: str = "this host",
        jobs: t.Optional[Jobs] = None,
        client: t.Callable[..., RegistryClient] = RegistryClient,
        puller: t.Callable[[], DockerPuller] = DockerPuller,
        record_lock: str = RECORD_LOCK,
        logins: t.Optional[t.Mapping[str, t.Tuple[str, str]]] = None,
        daemon_options: t.Optional[t.Mapping[str, t.Any]] = None,
        **options: t.Any,
    ) -> None:
        super().__init__(images, **options)
        self.host_name = host_name
        self.jobs = jobs or Jobs()
        self.registries = Registries(self.api, daemon_options, client)
        self._puller = puller
        self._record_lock = record_lock
        self._logins = logins or {}

    def at_registry(self, host: Host, source: ImageReference) -> t.Optional[RegistryImage]:
        return self.resolve(host, source)

    # -- before the pull --------------------------------------------------------------------------

    def preflight(self, host: Host, changes: t.Sequence[Change]) -> t.List[PullTask]:
        """Everything that can be known before a byte is pulled or an image is pinned, for all of them together.

        Raises:
            FleetError: Reasons of the registry client; ``requirement``, ``invalid_requirement``, ``disk_full``,
                ``engine_cannot_pull``, ``engine_too_old``, ``docker_unavailable``, ``no_such_profile``,
                ``profile_unsuitable``.
        """
        tasks = []
        pulls = [change for change in changes if change.action == "pull"]
        if pulls:
            # Without a daemon nothing is pulled.
            self.registries.docker_info()
        #: What an image requires, by its name.
        required: t.Dict[str, t.Mapping[str, str]] = {}
        for change in changes:
            if change.action == "pin":
                local, wanted = change.data["image"].local, change.data["image"].wanted.reference
                self._check_age(self.registries.engine(), family_of_image(local or {}, wanted.tag), wanted)
                required[str(wanted)] = environment_of(local)
        for change in pulls:
            task = self.find(host, change)
            tasks.append(task)
            required[str(task.wanted.reference)] = task.found.environment
        for wanted in self.wanted:
            if not wanted.check_requirement:
                required.pop(str(wanted.reference), None)
        users = {str(wanted.reference): wanted.users for wanted in self.wanted}
        if requirements_off(host):
            required.clear()
        named = [task for task in tasks if task.wanted.profiles]
        inventory = observe_gpus(host) if required or named else GpuInventory()
        for name, environment in required.items():
            self.check_requirement(environment, inventory, name, gpus_of(host, users[name], inventory.gpus))
        for task in named:
            self.check_profiles(host, task, inventory)
        check_space(file_systems(host, self.space_needs(host, tasks)))
        return tasks

    def find(self, host: Host, change: Change) -> PullTask:
        """Ask the registry for an image that is to be pulled.

        Raises:
            FleetError: Reasons of the registry client; ``engine_cannot_pull``, ``engine_too_old``.
        """
        image: ImageState = change.data["image"]
        self._check_engine(self.registries.engine(), change.data["reference"])
        try:
            found = image.newer or self.resolve(host, change.data["reference"])
        except FleetError as error:
            if error.reason != "no_such_tag" or image.pinned is None or not image.wanted.reference.tag:
                raise
            raise FleetError(
                "no_such_tag",
                "%s is pinned to %s, which is neither on the host nor at the registry any more; set pull to newer "
                "once, to pin it to what the tag stands for now." % (image.wanted.reference, image.pinned.digest),
                **error.facts,
            ) from None
        reference = image.wanted.reference
        self._check_age(
            self.registries.engine(), detect_family(found.labels, found.environment, reference.tag), reference
        )
        return PullTask(image.wanted, image.source, found)

    def check_profiles(self, host: Host, task: PullTask, inventory: GpuInventory) -> t.Dict[str, t.List[Check]]:
        """Compare the profiles that models name with the manifest at the registry and with the GPUs.

        Returns:
            By model, the questions to which nobody knows the answer.

        Raises:
            FleetError: ``no_such_profile``, ``profile_unsuitable``.
        """
        if not task.wanted.profiles or not inventory.gpus:
            # Nothing to compare; or GPUs that are set up in this very run, and the service looks again.
            return {}
        try:
            manifest = manifest_at_registry(self.client(host, task.source.registry), task.source, task.found)
        except FleetError:
            # What ails the registry is told by the pull.
            manifest = None
        profiles = manifest.profiles if manifest is not None and manifest.certain else None
        return {
            wish.model: check_named_profile(
                wish.model,
                wish.profile,
                profiles,
                inventory.gpus,
                device_ids(inventory),
                count=wish.gpus,
                lora=wish.lora,
                memory=wish.memory,
            )
            for wish in task.wanted.profiles
        }

    def check_requirement(
        self,
        environment: t.Mapping[str, str],
        inventory: GpuInventory,
        name: str,
        gpus: t.Sequence[Gpu],
        expected: t.Optional[ExpectedDriver] = None,
    ) -> None:
        """Compare what the image requires with the loaded driver, or with the one that is expected in its place.

        Args:
            gpus: Those that its containers will see, see :func:`._wanted_images.gpus_of`.

        Raises:
            FleetError: ``requirement``, ``invalid_requirement``.
        """
        driver = inventory.driver.version if inventory.driver else inventory.smi_driver_version
        cuda: t.Optional[str] = inventory.cuda_version
        if expected is not None:
            driver, cuda = expected.version, ""
        # nvidia-smi may be missing while the module is loaded; the branch tells as much.
        cuda = cuda or (cuda_of_branch(branch_of_version(driver)) if driver else None)
        # nvidia-smi -q does not print the compute capability, and unknown counts as fulfilled.
        kinds = [(gpu.brand, None) for gpu in gpus]
        verdict = evaluate(
            environment,
            driver or None,
            cuda,
            kinds,
            architectures=[gpu.architecture for gpu in inventory.gpus or inventory.pci],
            image=name,
            host_name=self.host_name,
            runs=expected.words if expected is not None else "",
        )
        check_verdict(verdict, image=name, driver_version=driver or None)

    @staticmethod
    def _check_engine(info: t.Mapping[str, t.Any], reference: ImageReference) -> None:
        version = str(info.get("ServerVersion") or "")
        if reference.registry == REGISTRY and cannot_pull(version) and containerd_store(info):
            raise FleetError(
                "engine_cannot_pull",
                "Docker Engine %s with the containerd image store cannot pull from %s (Incorrect Repository Format); "
                "install another version, or set features containerd-snapshotter to false in daemon.json."
                % (version, REGISTRY),
                version=version,
            )

    @staticmethod
    def _check_age(info: t.Mapping[str, t.Any], family: Family, reference: ImageReference) -> None:
        """An engine that is older than the family of the image wants; nothing is said where there is none yet."""
        version, oldest = str(info.get("ServerVersion") or ""), OLDEST_ENGINE.get(family.key, "")
        if version_tuple(version) and version_tuple(version) < version_tuple(oldest):
            raise FleetError(
                "engine_too_old",
                "%s is an image of NIM %s, which needs Docker Engine %s or newer, and this host has %s; set "
                "docker_minimum_version to %s, or docker_version to a newer one."
                % (reference, family.key, oldest, version, oldest),
                version=version,
            )

    def space_needs(self, host: Host, tasks: t.Sequence[PullTask]) -> t.List[Need]:
        """What pulls, and the models of the pulled images, will take on the disk."""
        directory_of_images = image_directory(host, self.registries.engine())
        needs = []
        for task in tasks:
            size = task.found.compressed_size
            what = "image %s (%s packed)" % (task.wanted.reference, amount(size))
            needs.append(Need(directory_of_images, int(size * self.disk_factor), what))
            for directory, wanted in task.wanted.spaces:
                missing = max(0, wanted - used_bytes(host, directory))
                needs.append(Need(directory or directory_of_images, missing, "model of %s" % task.wanted.reference))
        return needs

    def credentials(self, host: Host, registry: str) -> t.Optional[t.Tuple[str, str]]:
        """The key that was given is for NGC alone; every other registry gets what is stored for it."""
        if self.key and registry == REGISTRY:
            return USERNAME, self.key
        if registry in self._logins:
            return self._logins[registry]
        return stored_credentials(host, registry, self.docker_user)

    def resolve(self, host: Host, reference: ImageReference, architecture: t.Optional[str] = None) -> RegistryImage:
        """Ask the registry for an image, as this host's Docker would."""
        return self.client(host, reference.registry).resolve(
            reference, architecture or image_architecture(host.machine())
        )

    def client(self, host: Host, registry: str) -> RegistryClient:
        """Who asks a registry as this host's Docker would: same login, same proxies, same trust."""
        return self.registries.client(registry, self.credentials(host, registry))

    # -- apply ------------------------------------------------------------------------------------

    def apply(self, host: Host, change: Change) -> None:
        if change.action == "pin":
            self.preflight(host, [change])
            pinned: PinnedImage = change.data["pinned"]
            self._name(pinned.image_id, change.data["image"].wanted.reference)
            update_record(host, pinned.image, pinned, self._record_lock)
        elif change.action == "tag":
            self._name(change.data["image_id"], change.data["reference"])
        elif change.action == "remove":
            self._remove(host, change.data["image"])
        elif change.action == "pull":
            (task,) = self.preflight(host, [change])
            self.start(host, task)
            for status in self.jobs.wait([task.job_id], None):
                if status.state != "done":
                    raise status.failure("Pulling %s" % task.wanted.reference)
        else:
            raise AssertionError(change.action)

    def _name(self, image_id: str, reference: ImageReference) -> None:
        """Give an image the wanted name, where it has not got it."""
        name = human_name(reference)
        if name and (self.api.image(name) or {}).get("Id") != image_id:
            self._puller().tag(image_id, reference)

    def _remove(self, host: Host, image: ImageState) -> None:
        puller = self._puller()
        names = [str(image.wanted.reference)] if image.wanted.reference.tag else []
        if image.pinned is not None and image.pinned.digest:
            names.append(image.pinned.run)
        elif image.wanted.reference.digest:
            names.append(str(image.source))
        for name in names:
            if self.api.image(name) is not None:
                puller.remove(name)
        update_record(host, str(image.wanted.reference), None, self._record_lock)

    def start(self, host: Host, task: PullTask) -> bool:
        """Start the background job of a pull, or attach to it; see :meth:`._background.Jobs.start`."""
        # Says that Docker is gone while somebody listens.
        self.api.info()
        credentials = self.credentials(host, task.source.registry)
        return self.jobs.start(task.job_id, lambda report: self.work(host, task, self._puller(), credentials, report))

    def work(
        self,
        host: Host,
        task: PullTask,
        puller: DockerPuller,
        credentials: t.Optional[t.Tuple[str, str]],
        report: Report,
        sleep: t.Callable[[float], None] = time.sleep,
    ) -> t.Dict[str, t.Any]:
        """The job itself: pull with retries, check what came, name it, write it down."""
        source, digest = task.source.name, task.found.digest
        tracker = PullProgress(dict(task.found.layers))
        base = {"image": str(task.wanted.reference), "name": task.wanted.reference.short, "digest": digest}

        def on_event(event: t.Mapping[str, t.Any]) -> None:
            tracker.feed(event)
            report(dict(base, **tracker.snapshot(time.monotonic())))

        report(dict(base, **tracker.snapshot(time.monotonic())))
        run = "%s@%s" % (source, digest)
        if foreign_architecture(self.api.image(run), host.machine()):
            # Docker's own image store has one image a digest, also of an index for several machines, and keeps the first.
            puller.remove(run, force=True)
        for attempt in range(1, self.retries + 1):
            try:
                puller.pull(source, digest, credentials, on_event)
                break
            except FleetError as error:
                if error.reason not in PULL_TRANSIENT or attempt == self.retries:
                    error.facts["attempts"] = attempt
                    raise
                why = error.reason.replace("_", " ")
                report(dict(base, phase="retrying", why=why, attempt=attempt + 1, attempts=self.retries))
            tracker.restart()
            # A fleet that lost its mirror must not come back in step.
            sleep(min(_PAUSE_MAX, 2.0**attempt) * random.uniform(0.75, 1.25))  # noqa: S311  # no secret hangs on it
        local = self.api.image(run)
        if local is None:
            raise FleetError(
                "digest_mismatch",
                "Docker reports %s as pulled, but has no such image; look for another program that removes images."
                % run,
                image=run,
            )
        foreign = foreign_architecture(local, host.machine())
        if foreign:
            raise wrong_architecture(run, image_architecture(host.machine()), [foreign])
        image_id = str(local.get("Id", ""))
        if task.wanted.reference.tag:
            puller.tag(image_id, task.wanted.reference)
        pinned = PinnedImage(str(task.wanted.reference), source, digest, image_id)
        update_record(host, pinned.image, pinned, self._record_lock)
        return {"digest": digest, "image_id": image_id}


def environment_of(local: t.Optional[t.Mapping[str, t.Any]]) -> t.Dict[str, str]:
    """Environment of an image on the host, from ``docker image inspect``."""
    entries = ((local or {}).get("Config") or {}).get("Env") or []
    return dict(str(entry).split("=", 1) for entry in entries if "=" in str(entry))


def requirements_off(host: Host) -> bool:
    """Whether the container toolkit was told not to enforce NVIDIA_REQUIRE_* (``disable-require`` in its config.toml)."""
    text = host.read_text(_TOOLKIT_CONFIGURATION) or ""
    return bool(re.search(r"(?m)^\s*disable-require\s*=\s*true\b", text))
