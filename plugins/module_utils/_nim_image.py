# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Images on a host: tags pinned to digests, checked before the pull, pulled in the background with progress.

What a run has pinned stands in ``/var/lib/gpu_fleet/images.json``, so that later runs and ``nim_service`` know it
without asking a registry.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import random
import re
import time
import typing as t
from dataclasses import dataclass, replace

from ._background import FAILED, LOST, RUNNING, Jobs, JobStatus, Report
from ._docker_api import DockerApi
from ._driver_branches import branch_of_version, cuda_of_branch
from ._errors import FleetError
from ._gpu import GpuInventory, observe_gpus
from ._host import Host
from ._image_pull import PULL_TRANSIENT, DockerPuller, PullProgress, amount, progress_text
from ._image_reference import DOCKER_HUB, ImageReference, check_mirrors
from ._ngc_login import REGISTRY, USERNAME, check_api_key, stored_credentials
from ._nim_family import detect_family
from ._nim_models import parse_size
from ._registry import RegistryClient, RegistryImage, image_architecture
from ._requirements import check as check_verdict
from ._requirements import evaluate
from ._resource import Change, Resource

STATE_DIRECTORY = "/var/lib/gpu_fleet"
RECORD = STATE_DIRECTORY + "/images.json"
_RECORD_SCHEMA = 1
#: Only root and short: two jobs that end together must not lose each other's entry.
_RECORD_LOCK = "/run/gpu_fleet/images.lock"

_TOOLKIT_CONFIGURATION = "/etc/nvidia-container-runtime/config.toml"

#: Disk space of an unpacked image per byte of download; NVIDIA's image for DGX Spark takes 32 GB from 9.88 GB.
DISK_FACTOR = 3.3
#: Tries of one pull in all; the pauses between them are 2, 4, 8 … seconds, at most 60.
RETRIES = 5
_PAUSE_MAX = 60.0

PULL_MISSING = "missing"
PULL_NEWER = "newer"
PULL_NEVER = "never"


# -- what is wanted -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WantedImage:
    """One entry of the list of images.

    Attributes:
        reference: As the user wrote it, normalised.
        state: ``present`` or ``absent``.
        spaces: Bytes that model files will take in a directory, for each model that runs this image; an empty directory
            stands for Docker's disk.
        check_requirement: Whether the image's NVIDIA_REQUIRE_* must be met by the driver.
    """

    reference: ImageReference
    state: str = "present"
    spaces: t.Tuple[t.Tuple[str, int], ...] = ()
    check_requirement: bool = True


def parse_images(raw: t.Any, option: str = "images") -> t.List[WantedImage]:
    """Read the list of images; an image that several models run is one image, with the disk space of them all.

    Raises:
        FleetError: ``invalid_option``.
    """
    found: t.Dict[str, WantedImage] = {}
    for number, entry in enumerate(raw or []):
        where = "%s[%d]" % (option, number)
        reference = ImageReference.parse(entry.get("image"), where + ".image")
        size = 0
        text = entry.get("disk_space")
        if text not in (None, ""):
            parsed = parse_size(str(text))
            if parsed is None:
                raise FleetError(
                    "invalid_option",
                    "%s.disk_space = %s: not a size with a unit; write it like 20GB." % (where, text),
                )
            size = parsed
        directory = entry.get("cache_directory") or ""
        if directory and not directory.startswith("/"):
            raise FleetError(
                "invalid_option",
                "%s.cache_directory = %s: not an absolute path; begin it with a slash." % (where, directory),
            )
        state = entry.get("state") or "present"
        known = found.get(str(reference))
        if known is not None and known.state != state:
            raise FleetError(
                "invalid_option",
                "%s.image = %s: the image is wanted both present and absent; remove one entry." % (where, reference),
            )
        spaces = known.spaces if known else ()
        if size and (directory, size) not in spaces:
            spaces += ((directory, size),)
        # One model that insists is enough.
        insists = entry.get("check_requirement") is not False or (known is not None and known.check_requirement)
        found[str(reference)] = WantedImage(reference, state, spaces, insists)
    return list(found.values())


# -- what a run has pinned ------------------------------------------------------------------------------


@dataclass(frozen=True)
class PinnedImage:
    """What a reference stands for on this host.

    Attributes:
        image: The reference as it is wanted, normalised: the key of the record.
        source: Registry and repository it was pulled from, which differs from ``image`` behind a mirror.
        digest: Digest in that repository; empty for an image that was loaded from an archive.
        image_id: Docker's id of the image.
        run: What to give to ``docker run``: it names exactly this image.
    """

    image: str
    source: str
    digest: str
    image_id: str

    @property
    def run(self) -> str:
        return "%s@%s" % (self.source, self.digest) if self.digest else self.image_id

    def as_dict(self) -> t.Dict[str, str]:
        return {"source": self.source, "digest": self.digest, "image_id": self.image_id}


def read_record(host: Host) -> t.Dict[str, PinnedImage]:
    """Everything that is pinned on a host, by normalised reference.

    Raises:
        FleetError: ``state_unreadable`` when the file is broken; it is left as it is.
    """
    raw = host.read_text(RECORD)
    if raw is None:
        return {}
    try:
        document = json.loads(raw)
        entries = document["images"].items() if document["schema"] == _RECORD_SCHEMA else document["schema"]["unknown"]
        return {
            str(image): PinnedImage(str(image), str(entry["source"]), str(entry["digest"]), str(entry["image_id"]))
            for image, entry in entries
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FleetError(
            "state_unreadable",
            "Reading %s failed: it is not what this collection writes (%s: %s); repair or remove it: the tags are then "
            "taken from the images on the host again." % (RECORD, type(error).__name__, error),
            path=RECORD,
        ) from None


def pinned_image(host: Host, image: str) -> t.Optional[PinnedImage]:
    """What an image that a user named is pinned to on this host, or None when it was never pulled or pinned.

    Raises:
        FleetError: ``invalid_option``, ``state_unreadable``.
    """
    return read_record(host).get(str(ImageReference.parse(image)))


@contextlib.contextmanager
def _locked(path: str) -> t.Iterator[None]:
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    with open(path, "a", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _update_record(host: Host, image: str, pinned: t.Optional[PinnedImage], lock: str) -> None:
    with _locked(lock):
        record = read_record(host)
        if pinned is None:
            record.pop(image, None)
        else:
            record[image] = pinned
        document = {
            "schema": _RECORD_SCHEMA,
            "images": {name: record[name].as_dict() for name in sorted(record)},
        }
        if not host.exists(STATE_DIRECTORY):
            host.make_dir(STATE_DIRECTORY, mode=0o755)
        host.write_file(RECORD, json.dumps(document, indent=2) + "\n", mode=0o644)


# -- the resource ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageState:
    """One wanted image as it is on the host.

    Attributes:
        pinned: Entry of the record, or None.
        local: ``docker image inspect`` of the pinned image, else of whatever carries the wanted name, or None.
        present: ``local`` is what the record pins (or the wanted digest names).
        newer: What the tag stands for at the registry; asked only for pull = newer.
        users: Names of the containers that use ``local``; looked at only for state = absent.
    """

    wanted: WantedImage
    source: ImageReference
    pinned: t.Optional[PinnedImage]
    local: t.Optional[t.Mapping[str, t.Any]]
    present: bool
    newer: t.Optional[RegistryImage] = None
    users: t.Tuple[str, ...] = ()


@dataclass(frozen=True)
class ImagesState:
    """All wanted images; ``docker`` is False when no daemon answers."""

    docker: bool
    images: t.Tuple[ImageState, ...]


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
        record_lock: str = _RECORD_LOCK,
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
            found.append(ImageState(wanted, source, pinned, local, present, newer, users))
        return ImagesState(docker, tuple(found))

    # -- plan -------------------------------------------------------------------------------------

    def plan(self, state: ImagesState) -> t.List[Change]:
        changes = []
        for image in state.images:
            change = self._plan_absent(image) if image.wanted.state == "absent" else self._plan_present(image, state)
            if change is not None:
                changes.append(change)
        return changes

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
                ``engine_cannot_pull``, ``docker_unavailable``.
        """
        tasks = []
        pulls = [change for change in changes if change.action == "pull"]
        info = self._docker_info() if pulls else {}
        #: What an image requires, by its name.
        required: t.Dict[str, t.Mapping[str, str]] = {}
        for change in changes:
            if change.action == "pin":
                required[str(change.data["image"].wanted.reference)] = _environment(change.data["image"].local)
        for change in pulls:
            image: ImageState = change.data["image"]
            self._check_engine(info, change.data["reference"])
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
            tasks.append(PullTask(image.wanted, image.source, found))
            required[str(image.wanted.reference)] = found.environment
        for wanted in self.wanted:
            if not wanted.check_requirement:
                required.pop(str(wanted.reference), None)
        if required and not _requirements_off(host):
            inventory = observe_gpus(host)
            for name, environment in required.items():
                self.check_requirement(environment, inventory, name)
        self._check_disk(host, str(info.get("DockerRootDir") or "/var/lib/docker"), tasks)
        return tasks

    def check_requirement(self, environment: t.Mapping[str, str], inventory: GpuInventory, name: str) -> None:
        """Compare what the image requires with the loaded driver.

        Raises:
            FleetError: ``requirement``, ``invalid_requirement``.
        """
        driver = inventory.driver.version if inventory.driver else inventory.smi_driver_version
        # nvidia-smi may be missing while the module is loaded; the branch tells as much.
        cuda = inventory.cuda_version or (cuda_of_branch(branch_of_version(driver)) if driver else None)
        # nvidia-smi -q does not print the compute capability, and unknown counts as fulfilled.
        gpus = [(gpu.brand, None) for gpu in inventory.gpus]
        verdict = evaluate(environment, driver or None, cuda, gpus, image=name, host_name=self.host_name)
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

    def _check_disk(self, host: Host, docker_root: str, tasks: t.Sequence[PullTask]) -> None:
        mounts = mount_points(host.read_text("/proc/self/mountinfo") or "")
        needs: t.Dict[str, t.List[t.Tuple[str, int, str]]] = {}
        for task in tasks:
            size = task.found.compressed_size
            needs.setdefault(mount_of(docker_root, mounts), []).append(
                (
                    docker_root,
                    int(size * self.disk_factor),
                    "image %s (%s packed)" % (task.wanted.reference, amount(size)),
                )
            )
            for directory, wanted in task.wanted.spaces:
                missing = max(0, wanted - _used(host, directory))
                path = directory or docker_root
                needs.setdefault(mount_of(path, mounts), []).append(
                    (path, missing, "model of %s" % task.wanted.reference)
                )
        for mount, entries in needs.items():
            free, needed = host.free_bytes(entries[0][0]), sum(entry[1] for entry in entries)
            if needed > free:
                paths = sorted({entry[0] for entry in entries})
                raise FleetError(
                    "disk_full",
                    "%s on %s needs about %s for %s, and %s is free; free space (docker system df, docker image prune), or "
                    "move %s to a larger disk."
                    % (
                        " and ".join(paths),
                        mount,
                        amount(needed),
                        " and ".join("%s: %s" % (entry[2], amount(entry[1])) for entry in entries),
                        amount(free),
                        "it" if len(paths) == 1 else "them",
                    ),
                    mount=mount,
                    bytes_free=free,
                    bytes_needed=needed,
                )

    def _docker_info(self) -> t.Dict[str, t.Any]:
        if self._info is None:
            self._info = self.api.info()
        return self._info

    def credentials(self, host: Host, registry: str) -> t.Optional[t.Tuple[str, str]]:
        """The key that was given is for NGC alone; every other registry gets what is stored for it."""
        if self._key and registry == REGISTRY:
            return USERNAME, self._key
        return stored_credentials(host, registry, self.docker_user)

    def resolve(self, host: Host, reference: ImageReference, architecture: t.Optional[str] = None) -> RegistryImage:
        """Ask the registry for an image, as this host's Docker would: same login, same proxies, same trust."""
        credentials = self.credentials(host, reference.registry) or ("", "")
        try:
            info = self._docker_info()
        except FleetError:
            # Without a daemon the registry can still be asked, with the proxies of our own environment.
            info = {}
        client = self._client(
            reference.registry,
            credentials[0],
            credentials[1],
            insecure=_insecure(info, reference.registry),
            proxies=_proxies(info),
        )
        return client.resolve(reference, architecture or image_architecture(host.machine()))

    # -- apply ------------------------------------------------------------------------------------

    def apply(self, host: Host, change: Change) -> None:
        if change.action == "pin":
            self.preflight(host, [change])
            pinned: PinnedImage = change.data["pinned"]
            _update_record(host, pinned.image, pinned, self._record_lock)
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
        _update_record(host, str(image.wanted.reference), None, self._record_lock)

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
        _update_record(host, pinned.image, pinned, self._record_lock)
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


# -- one slice of the module ----------------------------------------------------------------------------


@dataclass
class Slice:
    """What one call of the module did.

    Attributes:
        state: The last look; None while not ``finished``.
        changes: All changes since the first call.
        progress: For the controller while not ``finished``.
        resume: What the next call needs.
    """

    finished: bool
    state: t.Optional[ImagesState]
    changes: t.List[Change]
    blocked: t.List[Change]
    progress: t.Dict[str, t.Any]
    resume: t.Dict[str, t.Any]


def advance(
    host: Host, resource: NimImages, resume: t.Optional[t.Mapping[str, t.Any]], seconds: t.Optional[float]
) -> Slice:
    """Take the images as far as possible in some seconds (None = to the end).

    Every call looks at the host anew; ``resume`` only tells what earlier calls of the same task have changed and which
    jobs they wait for, so that a task that was cut off is taken up by the next one.

    Raises:
        FleetError: With ``changes`` in its facts.
    """
    resume = resume or {}
    done = [_change_from(entry) for entry in resume.get("changes") or []]
    waited_for: t.List[str] = list(resume.get("jobs") or [])
    applied: t.Set[str] = set()
    try:
        while True:
            # While a job of ours runs there is nothing else to look at.
            statuses = resource.jobs.wait(waited_for, seconds)
            if any(status.state == RUNNING for status in statuses) and not _failed(statuses):
                return Slice(
                    False,
                    None,
                    done,
                    [],
                    _progress(statuses),
                    {"jobs": waited_for, "changes": [change.as_dict() for change in done]},
                )
            state = resource.observe(host)
            planned = resource.plan(state)
            todo = [change for change in planned if not change.blocked]
            pulls = [change for change in todo if change.action == "pull"]
            _raise_failures(resource.jobs, waited_for, pulls)
            if not todo:
                return Slice(True, state, done, [change for change in planned if change.blocked], {}, {})

            attached, fresh = _running(resource.jobs, pulls)
            # All checks before the first change: a list of images is refused as a whole.
            pins = [change for change in todo if change.action == "pin"]
            tasks = resource.preflight(host, fresh + pins) if fresh or pins else []
            for change in todo:
                if change.action == "pull":
                    continue
                if change.what in applied:
                    raise _not_converged(change.what)
                applied.add(change.what)
                done.append(change)
                resource.apply(host, change)
            for change, status in attached:
                done.append(replace(change, after=status.progress.get("digest") or change.after))
                waited_for.append(status.job_id)
            for change, task in zip(fresh, tasks):
                done.append(replace(change, after=task.found.digest))
                waited_for.append(task.job_id)
                resource.start(host, task)
    except FleetError as error:
        error.facts.setdefault("changes", [change.as_dict() for change in done])
        raise


def _not_converged(what: str) -> FleetError:
    return FleetError(
        "not_converged",
        "%s was dealt with, but a second look finds it undone; look for another program that manages images." % what,
    )


#: What keeps a check from being made where the host is not ready yet; in check mode an earlier task may be what mends it.
_NOT_READY = frozenset(("no_key", "registry_unreachable", "tls_error", "docker_unavailable", "no_such_user"))
#: What an earlier task may mend that check mode has not carried out.
_MENDABLE = frozenset(("requirement", "disk_full", "engine_cannot_pull"))


@dataclass
class Forecast:
    """What a run would do, for check mode."""

    state: ImagesState
    changes: t.List[Change]
    blocked: t.List[Change]
    warnings: t.List[str]


def forecast(host: Host, resource: NimImages) -> Forecast:
    """The plan, with the checks before the pull made as far as the host allows.

    Raises:
        FleetError: What would also stop a real run, whatever earlier tasks of it do: a refusal by the registry.
    """
    state = resource.observe(host)
    planned = resource.plan(state)
    found = Forecast(
        state,
        [change for change in planned if not change.blocked],
        [change for change in planned if change.blocked],
        [],
    )
    pulls = [change for change in found.changes if change.action == "pull"]
    fresh = _running(resource.jobs, pulls)[1] + [change for change in found.changes if change.action == "pin"]
    if not fresh:
        return found
    try:
        tasks = resource.preflight(host, fresh)
    except FleetError as error:
        if error.reason in _NOT_READY:
            found.warnings.append("Not checked before the pull: %s" % error.message)
        elif error.reason in _MENDABLE:
            found.changes = [change for change in found.changes if change not in fresh]
            found.blocked += [replace(change, blocked=error.message) for change in fresh]
        else:
            raise
        return found
    resolved = {str(task.wanted.reference): task.found.digest for task in tasks}
    found.changes = [
        replace(change, after=resolved.get(str(change.data["image"].wanted.reference), change.after))
        for change in found.changes
    ]
    return found


def _failed(statuses: t.Sequence[JobStatus]) -> bool:
    return any(status.state in (FAILED, LOST) for status in statuses)


def _raise_failures(jobs: Jobs, waited_for: t.Sequence[str], pulls: t.Sequence[Change]) -> None:
    """A job of ours that has ended while its image is still missing has failed."""
    names = {pull_job_id(change.data["image"].wanted.reference): change for change in pulls}
    for job_id in waited_for:
        status = jobs.read(job_id)
        if job_id not in names or (status is not None and status.state == RUNNING):
            continue
        image = str(names[job_id].data["image"].wanted.reference)
        if status is None or status.state != "done":
            raise (status or JobStatus(job_id, LOST)).failure("Pulling %s" % image)
        raise _not_converged("image %s" % image)


def _running(jobs: Jobs, pulls: t.Sequence[Change]) -> t.Tuple[t.List[t.Tuple[Change, JobStatus]], t.List[Change]]:
    """Pulls that are under way, whoever began them, and those that have to be started."""
    attached, fresh = [], []
    for change in pulls:
        status = jobs.read(pull_job_id(change.data["image"].wanted.reference))
        if status is not None and status.state == RUNNING:
            attached.append((change, status))
        else:
            fresh.append(change)
    return attached, fresh


def _progress(statuses: t.Sequence[JobStatus]) -> t.Dict[str, t.Any]:
    running = [status for status in statuses if status.state == RUNNING]
    texts = [progress_text(str(status.progress.get("name", "image")), status.progress) for status in running]
    return {
        "text": "; ".join(texts),
        "pulls": [status.progress for status in running],
    }


def _change_from(entry: t.Mapping[str, t.Any]) -> Change:
    return Change(NimImages.name, str(entry["what"]), entry.get("from"), entry.get("to"), str(entry["why"]))


# -- the registry alone ---------------------------------------------------------------------------------

#: Refusals that answer the question "may this host have the image", rather than fail to ask it.
REGISTRY_REASONS = frozenset(
    (
        "no_key",
        "bad_key",
        "no_entitlement",
        "no_such_repository",
        "no_such_tag",
        "legal",
        "rate_limit",
        "registry_unreachable",
        "registry_error",
        "tls_error",
        "architecture",
    )
)


def look_up(
    host: Host,
    image: str,
    api_key: t.Optional[str] = None,
    docker_user: str = "root",
    registry_mirrors: t.Any = None,
    architecture: t.Optional[str] = None,
    client: t.Callable[..., RegistryClient] = RegistryClient,
) -> t.Dict[str, t.Any]:
    """Return values of ``nim_image_info`` for an image that the registry hands out.

    Raises:
        FleetError: ``invalid_option``, those of the Docker configuration, and :data:`REGISTRY_REASONS`.
    """
    resource = NimImages(
        [{"image": image}],
        registry_mirrors=registry_mirrors,
        api_key=api_key,
        docker_user=docker_user,
        client=client,
    )
    reference = resource.wanted[0].reference
    found = resource.resolve(host, reference.rewritten(resource.mirrors), architecture)
    return {
        "reference": found.reference,
        "digest": found.digest,
        "platform_digest": found.platform_digest,
        "architecture": found.architecture,
        "architectures": list(found.architectures),
        "compressed_size": found.compressed_size,
        "created": found.created,
        "cuda_version": found.environment.get("CUDA_VERSION"),
        "require_cuda": found.environment.get("NVIDIA_REQUIRE_CUDA"),
        "family": detect_family(found.labels, found.environment, reference.tag).key,
        "labels": found.labels,
    }


# -- helpers --------------------------------------------------------------------------------------------


def mount_points(mountinfo: str) -> t.List[str]:
    """Mount points in ``/proc/self/mountinfo`` (proc(5)), with its octal escapes resolved."""
    found = []
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        if len(fields) > 4:
            found.append(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), fields[4]))
    return found


def mount_of(path: str, mounts: t.Iterable[str]) -> str:
    """The mount point a path is below."""
    path = path.rstrip("/") + "/"
    return max((mount for mount in mounts if path.startswith(mount.rstrip("/") + "/")), key=len, default="/")


def _used(host: Host, directory: str) -> int:
    """Bytes that a model's files already take; 0 when unknown."""
    if not directory or not host.exists(directory):
        return 0
    # A cache on a network file system may hold many files: better a too careful answer than a long wait.
    answer = host.run(["du", "-s", "-B1", directory], timeout=20)
    first = answer.stdout.split("\t")[0].strip()
    return int(first) if answer.ok and first.isdigit() else 0


def _environment(local: t.Optional[t.Mapping[str, t.Any]]) -> t.Dict[str, str]:
    """Environment of an image on the host, from ``docker image inspect``."""
    entries = ((local or {}).get("Config") or {}).get("Env") or []
    return dict(str(entry).split("=", 1) for entry in entries if "=" in str(entry))


def _requirements_off(host: Host) -> bool:
    """Whether the container toolkit was told not to enforce NVIDIA_REQUIRE_* (``disable-require`` in its config.toml)."""
    text = host.read_text(_TOOLKIT_CONFIGURATION) or ""
    return bool(re.search(r"(?m)^\s*disable-require\s*=\s*true\b", text))


def _insecure(info: t.Mapping[str, t.Any], registry: str) -> t.Optional[bool]:
    """Whether the daemon was told not to insist on TLS for a registry; None leaves the decision to the client."""
    config = info.get("RegistryConfig") or {}
    index = (config.get("IndexConfigs") or {}).get(registry) or {}
    if index.get("Secure") is False:
        return True
    host = registry.rsplit(":", 1)[0].strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    for network in config.get("InsecureRegistryCIDRs") or []:
        try:
            if address in ipaddress.ip_network(network):
                return True
        except ValueError:
            continue
    return None


def _proxies(info: t.Mapping[str, t.Any]) -> t.Optional[t.Dict[str, str]]:
    """The daemon's proxies where our own environment has none; None means the environment's."""
    if any(os.environ.get(name) for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")):
        return None
    found = {"http": info.get("HttpProxy"), "https": info.get("HttpsProxy"), "no": info.get("NoProxy")}
    # The daemon does not tell a proxy's password but prints xxxxx in its place.
    usable = {key: str(value) for key, value in found.items() if value and "xxxxx@" not in str(value)}
    return usable if {"http", "https"} & set(usable) else None
