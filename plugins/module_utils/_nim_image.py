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
from ._disk_space import Need, check_space, file_systems, used_bytes
from ._docker_api import DockerApi
from ._docker_registries import daemon_proxies, insecure_registry, with_daemon_options
from ._dockerd import version_tuple
from ._driver_branches import branch_of_version, cuda_of_branch
from ._errors import FleetError
from ._gpu import GpuInventory, observe_gpus
from ._gpu_wishes import check_named_profile, device_ids
from ._host import Host
from ._image_pull import PULL_TRANSIENT, DockerPuller, PullProgress, amount
from ._image_record import RECORD_LOCK, PinnedImage, read_record, update_record
from ._image_reference import DOCKER_HUB, ImageReference, check_mirrors
from ._ngc_login import REGISTRY, USERNAME, check_api_key, stored_credentials
from ._nim_family import OLDEST_ENGINE, Family, detect_family, family_of_image
from ._nim_manifest import manifest_at_registry
from ._registry import RegistryClient, RegistryImage, image_architecture
from ._requirements import check as check_verdict
from ._requirements import evaluate
from ._resource import Change, Resource
from ._wanted_images import WantedImage, parse_images

_TOOLKIT_CONFIGURATION = "/etc/nvidia-container-runtime/config.toml"

#: Disk space of an unpacked image per byte of download; NVIDIA's image for DGX Spark takes 32 GB from 9.88 GB.
DISK_FACTOR = 3.3
#: Tries of one pull in all; the pauses between them are 2, 4, 8 … seconds, at most 60.
RETRIES = 5
_PAUSE_MAX = 60.0

PULL_MISSING = "missing"
PULL_NEWER = "newer"
PULL_NEVER = "never"


@dataclass(frozen=True)
class ImageState:
    """One wanted image as it is on the host.

    Attributes:
        pinned: Entry of the record, or None.
        local: ``docker image inspect`` of the pinned image, else of whatever carries the wanted name, or None.
        present: ``local`` is what the record pins (or the wanted digest names).
        named: Identifier of the image that carries the wanted name, whatever the record pins; empty when none does.
        newer: What the tag stands for at the registry; asked only for pull = newer.
        users: Names of the containers that use ``local``; looked at only for state = absent.
    """

    wanted: WantedImage
    source: ImageReference
    pinned: t.Optional[PinnedImage]
    local: t.Optional[t.Mapping[str, t.Any]]
    present: bool
    named: str = ""
    newer: t.Optional[RegistryImage] = None
    users: t.Tuple[str, ...] = ()


@dataclass(frozen=True)
class ImagesState:
    """All wanted images; ``docker`` is False when no daemon answers."""

    docker: bool
    images: t.Tuple[ImageState, ...]


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


class NimImages(Resource[ImagesState]):
    """Images on a host.

    Args:
        images: See :func:`parse_images`.
        pull: ``missing`` keeps what a tag was pinned to; ``newer`` asks the registry on every run and follows a tag
            that has moved; ``never`` takes only what is on the host (air gap).
        registry_mirrors: See :func:`._image_reference.check_mirrors`.
        api_key: NGC key for nvcr.io in place of the stored login.
        docker_user: User whose Docker configuration holds the login.
        retries: Tries of a pull.
        disk_factor: Disk space of an unpacked image per byte of download.
        logins: Registry -> user and password that go before those that are stored, because they will be stored.
        daemon_options: Keys of daemon.json that the daemon will obey, whatever it says of itself now.

    Raises:
        FleetError: ``invalid_option``.
    """

    name = "nim_image"

    def __init__(
        self,
        images: t.Any,
        *,
        pull: str = PULL_MISSING,
        registry_mirrors: t.Any = None,
        api_key: t.Optional[str] = None,
        docker_user: str = "root",
        retries: int = RETRIES,
        disk_factor: float = DISK_FACTOR,
        host_name: str = "this host",
        api: t.Optional[DockerApi] = None,
        jobs: t.Optional[Jobs] = None,
        client: t.Callable[..., RegistryClient] = RegistryClient,
        puller: t.Callable[[], DockerPuller] = DockerPuller,
        record_lock: str = RECORD_LOCK,
        logins: t.Optional[t.Mapping[str, t.Tuple[str, str]]] = None,
        daemon_options: t.Optional[t.Mapping[str, t.Any]] = None,
    ) -> None:
        self.wanted = parse_images(images)
        self.pull = pull
        self.mirrors = check_mirrors(registry_mirrors)
        self._key = check_api_key(api_key) if api_key else ""
        self.docker_user = docker_user
        if retries < 1:
            raise FleetError("invalid_option", "retries = %d: at least one try is needed; give 1 or more." % retries)
        if disk_factor < 1:
            raise FleetError(
                "invalid_option",
                "disk_factor = %s: an image is larger on disk than packed; give 1 or more." % disk_factor,
            )
        self.retries = retries
        self.disk_factor = disk_factor
        self.host_name = host_name
        self.api = api or DockerApi()
        self.jobs = jobs or Jobs()
        self._client = client
        self._puller = puller
        self._record_lock = record_lock
        self._logins = logins or {}
        self._daemon_options = daemon_options or {}
        self._info: t.Optional[t.Dict[str, t.Any]] = None

    # -- observe ----------------------------------------------------------------------------------

    def observe(self, host: Host) -> ImagesState:
        """Reads the record and asks Docker; asks the registry only for pull = newer, which is what that means."""
        record = read_record(host)
        docker = self.api.available()
        containers: t.Optional[t.List[t.Dict[str, t.Any]]] = None
        found = []
        for wanted in self.wanted:
            source = wanted.reference.rewritten(self.mirrors)
            pinned = record.get(str(wanted.reference))
            local: t.Optional[t.Mapping[str, t.Any]] = None
            present = False
            if docker:
                if pinned is not None:
                    local = self.api.image(pinned.run)
                    present = local is not None
                if local is None:
                    for name in (str(wanted.reference), str(source)):
                        local = self.api.image(name)
                        if local is not None:
                            break
            named = ""
            if present and _human_name(wanted.reference):
                named = str((self.api.image(_human_name(wanted.reference)) or {}).get("Id", ""))
            newer = None
            if self.pull == PULL_NEWER and wanted.state == "present" and not wanted.reference.digest:
                newer = self.resolve(host, source)
            users: t.Tuple[str, ...] = ()
            if wanted.state == "absent" and local is not None:
                if containers is None:
                    containers = self.api.containers(all=True)
                users = tuple(
                    str((entry.get("Names") or [entry.get("Id", "?")[:12]])[0]).lstrip("/")
                    for entry in containers
                    if entry.get("ImageID") == local.get("Id")
                )
            found.append(ImageState(wanted, source, pinned, local, present, named, newer, users))
        return ImagesState(docker, tuple(found))

    # -- plan -------------------------------------------------------------------------------------

    def plan(self, state: ImagesState) -> t.List[Change]:
        changes = []
        for image in state.images:
            change = self._plan_absent(image) if image.wanted.state == "absent" else self._plan_present(image, state)
            if change is None:
                change = self._plan_tag(image)
            if change is not None:
                changes.append(change)
        return changes

    def _plan_tag(self, image: ImageState) -> t.Optional[Change]:
        """The pinned image shall carry the wanted name: people use it, and ``docker image prune`` goes by it."""
        reference, local = image.wanted.reference, image.local
        if image.wanted.state != "present" or not image.present or local is None or not _human_name(reference):
            return None
        if image.named == str(local.get("Id", "")):
            return None
        return Change(
            self.name,
            "tag %s" % _human_name(reference),
            image.named or None,
            str(local.get("Id", "")),
            "somebody gave the name to another image" if image.named else "somebody took the name from the image",
            action="tag",
            data={"image_id": str(local.get("Id", "")), "reference": reference},
        )

    def _plan_present(self, image: ImageState, state: ImagesState) -> t.Optional[Change]:
        what = "image %s" % image.wanted.reference
        pinned = image.pinned
        before = pinned.digest or pinned.image_id if pinned and image.present else None
        if image.newer is not None and (pinned is None or pinned.digest != image.newer.digest or not image.present):
            return Change(
                self.name,
                what,
                before,
                image.newer.digest,
                "the tag stands for another image now" if before else "it is not on the host",
                action="pull",
                data={"image": image, "reference": image.source.with_digest(image.newer.digest)},
            )
        if image.present:
            return None
        lost = pinned is not None and pinned.digest
        if image.local is not None and not lost:
            adopted = self._adopt(image)
            return Change(
                self.name,
                what,
                before,
                adopted.digest or adopted.image_id,
                "it is on the host and not pinned yet",
                action="pin",
                data={"image": image, "pinned": adopted},
            )
        if self.pull == PULL_NEVER:
            raise FleetError(
                "image_missing",
                "Image %s is not on the host and pull is never; load it (docker load) or set pull to missing."
                % image.wanted.reference,
                image=str(image.wanted.reference),
            )
        reference = image.source.with_digest(pinned.digest) if pinned and lost else image.source
        return Change(
            self.name,
            what,
            None,
            reference.digest or "the digest of tag %s" % reference.tag,
            "it is no longer on the host" if lost else "it is not on the host",
            action="pull",
            data={"image": image, "reference": reference},
        )

    def _plan_absent(self, image: ImageState) -> t.Optional[Change]:
        if image.local is None and image.pinned is None:
            return None
        before = (image.pinned and (image.pinned.digest or image.pinned.image_id)) or str(
            (image.local or {}).get("Id", "")
        )
        return Change(
            self.name,
            "image %s" % image.wanted.reference,
            before,
            None,
            "it is to be removed",
            action="remove",
            data={"image": image},
            blocked="in use by container %s: remove that first" % ", ".join(image.users) if image.users else None,
        )

    def _adopt(self, image: ImageState) -> PinnedImage:
        """Pin what is on the host: its digest in the wanted repository, or its id where it came from an archive."""
        local = image.local or {}
        digests = dict(
            entry.split("@", 1) for entry in reversed([text for text in local.get("RepoDigests") or [] if "@" in text])
        )
        for name in (image.wanted.reference.name, image.source.name):
            # Docker shortens the names of its own hub.
            for known in (name, name.replace(DOCKER_HUB + "/library/", "", 1), name.replace(DOCKER_HUB + "/", "", 1)):
                if known in digests:
                    return PinnedImage(str(image.wanted.reference), name, digests[known], str(local.get("Id", "")))
        return PinnedImage(str(image.wanted.reference), image.source.name, "", str(local.get("Id", "")))

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
            self._docker_info()
        #: What an image requires, by its name.
        required: t.Dict[str, t.Mapping[str, str]] = {}
        for change in changes:
            if change.action == "pin":
                local, wanted = change.data["image"].local, change.data["image"].wanted.reference
                self._check_age(self._engine(), family_of_image(local or {}, wanted.tag), wanted)
                required[str(wanted)] = environment_of(local)
        for change in pulls:
            task = self.find(host, change)
            tasks.append(task)
            required[str(task.wanted.reference)] = task.found.environment
        for wanted in self.wanted:
            if not wanted.check_requirement:
                required.pop(str(wanted.reference), None)
        if requirements_off(host):
            required.clear()
        named = [task for task in tasks if task.wanted.profiles]
        inventory = observe_gpus(host) if required or named else GpuInventory()
        for name, environment in required.items():
            self.check_requirement(environment, inventory, name)
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
        self._check_engine(self._engine(), change.data["reference"])
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
        self._check_age(self._engine(), detect_family(found.labels, found.environment, reference.tag), reference)
        return PullTask(image.wanted, image.source, found)

    def check_profiles(self, host: Host, task: PullTask, inventory: GpuInventory) -> None:
        """Compare the profiles that models name with the manifest at the registry and with the GPUs.

        Raises:
            FleetError: ``no_such_profile``, ``profile_unsuitable``.
        """
        if not task.wanted.profiles or not inventory.gpus:
            # Nothing to compare; or GPUs that are set up in this very run, and the service looks again.
            return
        try:
            manifest = manifest_at_registry(self.client(host, task.source.registry), task.source, task.found)
        except FleetError:
            # What ails the registry is told by the pull.
            manifest = None
        profiles = manifest.profiles if manifest is not None and manifest.certain else None
        for wish in task.wanted.profiles:
            check_named_profile(
                wish.model,
                wish.profile,
                profiles,
                inventory.gpus,
                device_ids(inventory),
                count=wish.gpus,
                lora=wish.lora,
            )

    def check_requirement(
        self,
        environment: t.Mapping[str, str],
        inventory: GpuInventory,
        name: str,
        expected: t.Optional[ExpectedDriver] = None,
    ) -> None:
        """Compare what the image requires with the loaded driver, or with the one that is expected in its place.

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
        gpus = [(gpu.brand, None) for gpu in inventory.gpus]
        verdict = evaluate(
            environment,
            driver or None,
            cuda,
            gpus,
            architectures=[gpu.architecture for gpu in inventory.gpus or inventory.pci],
            image=name,
            host_name=self.host_name,
            runs=expected.words if expected is not None else "",
        )
        check_verdict(verdict, image=name, driver_version=driver or None)

    @staticmethod
    def _check_engine(info: t.Mapping[str, t.Any], reference: ImageReference) -> None:
        version = str(info.get("ServerVersion") or "")
        containerd = any("io.containerd.snapshotter" in str(entry) for entry in info.get("DriverStatus") or [])
        if reference.registry == REGISTRY and version.startswith("29.5.") and containerd:
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
        docker_root = str(self._engine().get("DockerRootDir") or "/var/lib/docker")
        needs = []
        for task in tasks:
            size = task.found.compressed_size
            what = "image %s (%s packed)" % (task.wanted.reference, amount(size))
            needs.append(Need(docker_root, int(size * self.disk_factor), what))
            for directory, wanted in task.wanted.spaces:
                missing = max(0, wanted - used_bytes(host, directory))
                needs.append(Need(directory or docker_root, missing, "model of %s" % task.wanted.reference))
        return needs

    def _engine(self) -> t.Mapping[str, t.Any]:
        """What Docker says of itself, and nothing where there is no daemon yet; with the options that it is to get."""
        try:
            info = self._docker_info()
        except FleetError:
            info = {}
        return with_daemon_options(info, self._daemon_options)

    def _docker_info(self) -> t.Dict[str, t.Any]:
        if self._info is None:
            self._info = self.api.info()
        return self._info

    def credentials(self, host: Host, registry: str) -> t.Optional[t.Tuple[str, str]]:
        """The key that was given is for NGC alone; every other registry gets what is stored for it."""
        if self._key and registry == REGISTRY:
            return USERNAME, self._key
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
        return self.client_with(registry, self.credentials(host, registry))

    def client_with(self, registry: str, credentials: t.Optional[t.Tuple[str, str]]) -> RegistryClient:
        """The same with another login, or with none."""
        user, password = credentials or ("", "")
        # Without a daemon the registry can still be asked, with the proxies of our own environment.
        info = self._engine()
        return self._client(
            registry, user, password, insecure=insecure_registry(info, registry), proxies=daemon_proxies(info)
        )

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
        name = _human_name(reference)
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
        # Says what is missing while somebody listens, and imports what the job needs; the job connects by itself.
        self._puller().close()
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
        run = "%s@%s" % (source, digest)
        local = self.api.image(run)
        if local is None:
            raise FleetError(
                "digest_mismatch",
                "Docker reports %s as pulled, but has no such image; look for another program that removes images."
                % run,
                image=run,
            )
        image_id = str(local.get("Id", ""))
        if task.wanted.reference.tag:
            puller.tag(image_id, task.wanted.reference)
        pinned = PinnedImage(str(task.wanted.reference), source, digest, image_id)
        update_record(host, pinned.image, pinned, self._record_lock)
        return {"digest": digest, "image_id": image_id}

    # -- return values ----------------------------------------------------------------------------

    def result(self, state: ImagesState) -> t.Dict[str, t.Any]:
        """Return values of the module."""
        images = []
        for image in state.images:
            pinned = image.pinned
            images.append(
                {
                    "image": str(image.wanted.reference),
                    "present": image.present,
                    "digest": pinned.digest or None if pinned else None,
                    "image_id": pinned.image_id if pinned else None,
                    "run": pinned.run if pinned else None,
                    "size": int(image.local.get("Size") or 0) if image.local and image.present else None,
                }
            )
        return {"images": images}


def _human_name(reference: ImageReference) -> str:
    """The name that an image carries for people; empty where a digest alone is wanted."""
    return "%s:%s" % (reference.name, reference.tag) if reference.tag else ""


def environment_of(local: t.Optional[t.Mapping[str, t.Any]]) -> t.Dict[str, str]:
    """Environment of an image on the host, from ``docker image inspect``."""
    entries = ((local or {}).get("Config") or {}).get("Env") or []
    return dict(str(entry).split("=", 1) for entry in entries if "=" in str(entry))


def requirements_off(host: Host) -> bool:
    """Whether the container toolkit was told not to enforce NVIDIA_REQUIRE_* (``disable-require`` in its config.toml)."""
    text = host.read_text(_TOOLKIT_CONFIGURATION) or ""
    return bool(re.search(r"(?m)^\s*disable-require\s*=\s*true\b", text))
