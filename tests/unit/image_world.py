# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host without a network for tests of images: Docker, jobs and registry in memory."""

from __future__ import annotations

import pathlib
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nim_image
from ansible_collections.gpu_fleet.nim.plugins.module_utils._background import JobStatus
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_inventory import GpuInventory
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_reference import ImageReference
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_slices import Slice, advance
from ansible_collections.gpu_fleet.nim.plugins.module_utils._loaded_driver import LoadedDriver
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_image import NimImages
from ansible_collections.gpu_fleet.nim.plugins.module_utils._registry_image import RegistryImage
from fake_host import FakeHost

KEY = "nvapi-very-secret-0123456789"
LLAMA = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4"
NANO = "nvcr.io/nim/nvidia/nemotron-3-nano:2.0.13"
DIGEST = "sha256:" + "1" * 64
NEWER = "sha256:" + "2" * 64
IMAGE_ID = "sha256:" + "9" * 64


def name_of(image: str) -> str:
    return image.rsplit(":", 1)[0]


def found_image(reference: ImageReference, digest: str = DIGEST, **values: t.Any) -> RegistryImage:
    values.setdefault("environment", {"NVIDIA_REQUIRE_CUDA": "cuda>=12.5", "CUDA_VERSION": "12.5.0"})
    values.setdefault("layers", (("sha256:" + "a" * 64, 2_000_000_000), ("sha256:" + "b" * 64, 800_000_000)))
    return RegistryImage(str(reference), digest, digest, IMAGE_ID, "amd64", ("amd64",), **values)


class FakeDocker:
    """Engine in memory: images by every name they have, for looking (DockerApi) and changing (DockerPuller)."""

    def __init__(self) -> None:
        self.up = True
        self.images: dict[str, dict[str, t.Any]] = {}
        self.users: list[dict[str, t.Any]] = []
        self.details: dict[str, t.Any] = {"ServerVersion": "29.4.3", "DockerRootDir": "/var/lib/docker"}
        self.pulled: list[tuple[str, str, t.Any]] = []
        self.tagged: list[str] = []
        #: Reasons that the next pulls fail with.
        self.failures: list[FleetError] = []
        self.events: list[dict[str, t.Any]] = []

    def add(
        self, *names: str, image_id: str = IMAGE_ID, digests: t.Sequence[str] = (), architecture: str = "amd64"
    ) -> None:
        for name in (*names, *digests, image_id):
            # As Docker's own store: a digest that names an image already keeps it.
            image = {"Id": image_id, "RepoDigests": list(digests), "Size": 7, "Architecture": architecture}
            self.images.setdefault(name, image) if "@" in name else self.images.update({name: image})

    # DockerApi
    def available(self) -> bool:
        return self.up

    def info(self) -> dict[str, t.Any]:
        if not self.up:
            raise FleetError("docker_unavailable", "Nobody answers.")
        return self.details

    def image(self, name: str) -> dict[str, t.Any] | None:
        return self.images.get(name)

    def containers(self, all: bool = True) -> list[dict[str, t.Any]]:
        return self.users

    # DockerPuller
    def pull(self, source: str, digest: str, credentials: t.Any, on_event: t.Any) -> None:
        self.pulled.append((source, digest, credentials))
        if self.failures:
            raise self.failures.pop(0)
        for event in self.events:
            on_event(event)
        self.add(digests=["%s@%s" % (source, digest)])

    def tag(self, image_id: str, reference: ImageReference) -> None:
        self.tagged.append(str(reference))
        self.images[str(reference)] = self.images[image_id]

    def remove(self, name: str, *, force: bool = False) -> None:
        if self.users and not force:
            raise FleetError("image_in_use", "A container uses it.")
        del self.images[name]


class FakeJobs:
    """Runs the work at once, or with ``hold`` leaves it running."""

    def __init__(self) -> None:
        self.found: dict[str, JobStatus] = {}
        self.hold = False
        self.started: list[str] = []

    def start(self, job_id: str, work: t.Any) -> bool:
        self.started.append(job_id)
        reports: list[dict[str, t.Any]] = [{}]
        if self.hold:
            self.found[job_id] = JobStatus(job_id, "running", {"name": "nim/x", "digest": DIGEST})
            return True
        try:
            result = work(reports.append)
        except FleetError as error:
            failure = {"reason": error.reason, "message": error.message, "facts": error.facts}
            self.found[job_id] = JobStatus(job_id, "failed", reports[-1], error=failure)
        else:
            self.found[job_id] = JobStatus(job_id, "done", reports[-1], result)
        return True

    def read(self, job_id: str) -> JobStatus | None:
        return self.found.get(job_id)

    def wait(self, job_ids: t.Sequence[str], seconds: float | None) -> list[JobStatus]:
        return [self.found[job_id] for job_id in job_ids if job_id in self.found]


class FakeClient:
    """Stands in for RegistryClient."""

    tags: t.ClassVar[dict[str, t.Any]] = {}
    asked: t.ClassVar[list[tuple[str, str, str]]] = []
    options: t.ClassVar[dict[str, t.Any]] = {}
    #: What is said to who has no login.
    anonymous: t.ClassVar[list[FleetError]] = []
    sizes: t.ClassVar[dict[str, int]] = {}

    def __init__(self, registry: str, username: str, password: str, **options: t.Any) -> None:
        self.login = (username, password)
        FakeClient.options = options

    def resolve(self, reference: ImageReference, architecture: str) -> RegistryImage:
        self.asked.append((str(reference), *self.login))
        if not self.login[1] and self.anonymous:
            raise self.anonymous[0]
        answer = self.tags.get(str(reference), DIGEST)
        if isinstance(answer, FleetError):
            raise answer
        if isinstance(answer, dict):
            return found_image(reference, **answer)
        return found_image(reference, reference.digest or answer)

    def compressed_sizes(self, reference: ImageReference) -> dict[str, int]:
        return self.sizes


class ImageWorld(t.NamedTuple):
    host: FakeHost
    docker: FakeDocker
    jobs: FakeJobs
    lock: str

    def images(self, images: t.Any = LLAMA, **options: t.Any) -> NimImages:
        if isinstance(images, str):
            images = [{"image": images}]
        return NimImages(
            images,
            api=t.cast(t.Any, self.docker),
            jobs=t.cast(t.Any, self.jobs),
            client=t.cast(t.Any, FakeClient),
            puller=t.cast(t.Any, lambda: self.docker),
            record_lock=self.lock,
            host_name="gpu01",
            **options,
        )

    def run(self, images: t.Any = LLAMA, **options: t.Any) -> Slice:
        done = advance(self.host, self.images(images, **options), None, 1)
        assert KEY not in repr(done)
        return done


def image_world(host: FakeHost, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> ImageWorld:
    host.files["/etc/passwd"] = b"root:x:0:0:root:/root:/bin/bash\n"
    host.files["/proc/self/mountinfo"] = (
        b"1 1 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / /var/lib/nim rw - ext4 /dev/b rw\n"
    )
    FakeClient.tags.clear()
    FakeClient.asked.clear()
    FakeClient.anonymous, FakeClient.sizes = [], {}
    driver = LoadedDriver("580.95.05", "open", True)
    monkeypatch.setattr(_nim_image, "observe_gpus", lambda host: GpuInventory(driver=driver, cuda_version="13.0"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_nim_image.time, "sleep", lambda seconds: pytest.fail("slept"))
    return ImageWorld(host, FakeDocker(), FakeJobs(), str(tmp_path / "images.lock"))
