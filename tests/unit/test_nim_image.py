# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images: plan, checks before the pull, the pull itself, progress, slices."""

from __future__ import annotations

import functools
import json
import pathlib
import types
import typing as t

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nim_image
from ansible_collections.gpu_fleet.nim.plugins.module_utils._background import JobStatus
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import Gpu, GpuInventory, LoadedDriver
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_pull import (
    DockerPuller,
    PullProgress,
    progress_text,
    pull_error,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_reference import ImageReference
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_image import (
    RECORD,
    NimImages,
    PinnedImage,
    advance,
    forecast,
    look_up,
    mount_of,
    mount_points,
    parse_images,
    pinned_image,
    pull_job_id,
    read_record,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._registry import RegistryImage
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import converge
from ansible_collections.gpu_fleet.nim.plugins.modules import nim_image, nim_image_info
from fake_host import FakeHost
from hypothesis import given, settings
from hypothesis import strategies as st

KEY = "nvapi-very-secret-0123456789"
LLAMA = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4"
NANO = "nvcr.io/nim/nvidia/nemotron-3-nano:2.0.13"
DIGEST = "sha256:" + "1" * 64
NEWER = "sha256:" + "2" * 64
IMAGE_ID = "sha256:" + "9" * 64


def _name(image: str) -> str:
    return image.rsplit(":", 1)[0]


def _found(reference: ImageReference, digest: str = DIGEST, **values: t.Any) -> RegistryImage:
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

    def add(self, *names: str, image_id: str = IMAGE_ID, digests: t.Sequence[str] = ()) -> None:
        for name in (*names, *digests, image_id):
            self.images[name] = {"Id": image_id, "RepoDigests": list(digests), "Size": 7}

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
    def close(self) -> None:
        pass

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

    def remove(self, name: str) -> None:
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

    def __init__(self, registry: str, username: str, password: str, **options: t.Any) -> None:
        self.login = (username, password)
        FakeClient.options = options

    def resolve(self, reference: ImageReference, architecture: str) -> RegistryImage:
        self.asked.append((str(reference), *self.login))
        answer = self.tags.get(str(reference), DIGEST)
        if isinstance(answer, FleetError):
            raise answer
        if isinstance(answer, dict):
            return _found(reference, **answer)
        return _found(reference, reference.digest or answer)


class World(t.NamedTuple):
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

    def run(self, images: t.Any = LLAMA, **options: t.Any) -> _nim_image.Slice:
        done = advance(self.host, self.images(images, **options), None, 1)
        assert KEY not in repr(done)
        return done


@pytest.fixture
def world(host: FakeHost, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> World:
    host.files["/etc/passwd"] = b"root:x:0:0:root:/root:/bin/bash\n"
    host.files["/proc/self/mountinfo"] = (
        b"1 1 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / /var/lib/nim rw - ext4 /dev/b rw\n"
    )
    FakeClient.tags.clear()
    FakeClient.asked.clear()
    driver = LoadedDriver("580.95.05", "open", True)
    monkeypatch.setattr(_nim_image, "observe_gpus", lambda host: GpuInventory(driver=driver, cuda_version="13.0"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_nim_image.time, "sleep", lambda seconds: pytest.fail("slept"))
    return World(host, FakeDocker(), FakeJobs(), str(tmp_path / "images.lock"))


# -- from nothing to pinned, and then nothing -------------------------------------------------------------


def test_pull_pin_and_rest(world: World) -> None:
    done = world.run()
    assert done.finished
    (change,) = done.changes
    assert (change.before, change.after) == (None, DIGEST)
    assert world.docker.pulled == [(_name(LLAMA), DIGEST, None)]
    assert world.docker.tagged == [LLAMA]
    pinned = pinned_image(world.host, LLAMA)
    assert pinned == PinnedImage(LLAMA, _name(LLAMA), DIGEST, IMAGE_ID)
    assert pinned.run == "%s@%s" % (_name(LLAMA), DIGEST)
    assert world.host.modes[RECORD][0] == 0o644

    FakeClient.asked.clear()
    again = world.run()
    assert again.finished
    assert again.changes == []
    # What is pinned and there costs one look: nobody asks the registry.
    assert FakeClient.asked == []
    assert world.images().result(t.cast(t.Any, again.state)) == {
        "images": [
            {
                "image": LLAMA,
                "present": True,
                "digest": DIGEST,
                "image_id": IMAGE_ID,
                "run": pinned.run,
                "size": 7,
            }
        ]
    }


def test_converge_does_the_same_in_one_go(world: World) -> None:
    assert converge(world.host, world.images(), check_mode=False).changed
    assert not converge(world.host, world.images(), check_mode=False).changed


def test_a_tag_that_moved_is_followed_only_on_request(world: World) -> None:
    world.run()
    FakeClient.tags[LLAMA] = NEWER
    assert world.run().changes == []
    (change,) = world.run(pull="newer").changes
    assert (change.before, change.after) == (DIGEST, NEWER)
    assert pinned_image(world.host, LLAMA).digest == NEWER  # type: ignore[union-attr]
    assert world.run(pull="newer").changes == []


def test_an_image_that_was_pruned_comes_back_as_it_was(world: World) -> None:
    world.run()
    world.docker.images.clear()
    FakeClient.tags[LLAMA] = NEWER
    (change,) = world.run().changes
    assert change.after == DIGEST
    assert change.why == "it is no longer on the host"


def test_a_pin_that_the_registry_has_forgotten(world: World) -> None:
    world.run()
    world.docker.images.clear()
    FakeClient.tags["%s@%s" % (_name(LLAMA), DIGEST)] = FleetError("no_such_tag", "Gone.")
    FakeClient.tags[LLAMA] = NEWER
    with pytest.raises(FleetError, match="set pull to newer"):
        world.run()
    assert world.run(pull="newer").finished


def test_what_was_pulled_by_hand_is_pinned(world: World) -> None:
    world.docker.add(LLAMA, digests=["other.example/x@" + NEWER, "%s@%s" % (_name(LLAMA), DIGEST)])
    (change,) = world.run().changes
    assert change.action == "pin"
    assert pinned_image(world.host, LLAMA).digest == DIGEST  # type: ignore[union-attr]
    assert world.run().changes == []
    assert FakeClient.asked == []


def test_what_was_loaded_from_an_archive_is_pinned_by_id(world: World) -> None:
    world.docker.add(LLAMA)
    done = world.run(pull="never")
    assert done.changes[0].after == IMAGE_ID
    assert pinned_image(world.host, LLAMA).run == IMAGE_ID  # type: ignore[union-attr]
    assert world.run(pull="never").changes == []


def test_never_pulled(world: World) -> None:
    with pytest.raises(FleetError) as error:
        world.run(pull="never")
    assert error.value.reason == "image_missing"


def test_by_digest(world: World) -> None:
    image = "%s@%s" % (_name(LLAMA), DIGEST)
    world.run(image)
    assert world.docker.tagged == []
    assert world.run(image).changes == []


def test_mirror(world: World) -> None:
    mirrors = {"nvcr.io": "mirror.example:5000/ngc"}
    world.run(registry_mirrors=mirrors, api_key=KEY)
    source = "mirror.example:5000/ngc/nim/meta/llama-3.1-8b-instruct"
    assert pinned_image(world.host, LLAMA).run == "%s@%s" % (source, DIGEST)  # type: ignore[union-attr]
    # The NGC key is not for the mirror.
    assert FakeClient.asked == [(source + ":1.8.4", "", "")]
    assert world.docker.pulled[0][2] is None
    assert world.docker.tagged == [LLAMA]
    assert world.run(registry_mirrors=mirrors).changes == []


def test_credentials(world: World) -> None:
    world.run(api_key=KEY)
    assert FakeClient.asked[0][1:] == ("$oauthtoken", KEY)
    world.host.files["/root/.docker/config.json"] = b'{"auths": {"nvcr.io": {"auth": "dTpw"}}}'
    world.run(NANO)
    assert FakeClient.asked[1][1:] == ("u", "p")
    assert world.docker.pulled[1][2] == ("u", "p")


# -- removal ----------------------------------------------------------------------------------------------


def test_removal(world: World) -> None:
    world.run()
    absent = [{"image": LLAMA, "state": "absent"}]
    world.docker.users = [{"Names": ["/nim-llama"], "ImageID": IMAGE_ID}, {"Names": ["/x"], "ImageID": "sha256:0"}]
    done = world.run(absent)
    assert done.changes == []
    assert done.blocked[0].blocked == "in use by container nim-llama: remove that first"
    world.docker.users = []
    (change,) = world.run(absent).changes
    assert (change.before, change.after) == (DIGEST, None)
    assert read_record(world.host) == {}
    assert LLAMA not in world.docker.images
    assert world.run(absent).changes == []


# -- before the pull --------------------------------------------------------------------------------------


def _refused(world: World, images: t.Any = LLAMA, **options: t.Any) -> FleetError:
    with pytest.raises(FleetError) as caught:
        world.run(images, **options)
    assert world.docker.pulled == []
    assert world.jobs.started == []
    assert caught.value.facts["changes"] == []
    return caught.value


def _gpu(brand: str) -> Gpu:
    return Gpu(0, "GPU-1", "x", brand, "Ada Lovelace", 24564, 0, 24564, "", "Default", 0, "0000:01:00.0")


def test_the_driver_is_too_old(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = GpuInventory(
        driver=LoadedDriver("535.183.01", "proprietary", True), cuda_version="12.2", gpus=(_gpu("GeForce"),)
    )
    monkeypatch.setattr(_nim_image, "observe_gpus", lambda host: old)
    error = _refused(world)
    assert error.reason == "requirement"
    assert error.facts["smallest_branch"] == "555"
    assert "needs a driver of branch 555 or newer; gpu01 runs 535.183.01" in error.message


def test_what_is_on_the_host_already_must_run_on_the_driver_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = GpuInventory(driver=LoadedDriver("535.183.01", "open", True), cuda_version="12.2")
    monkeypatch.setattr(_nim_image, "observe_gpus", lambda host: old)
    world.docker.add(LLAMA)
    world.docker.images[LLAMA]["Config"] = {"Env": ["PATH=/bin", "NVIDIA_REQUIRE_CUDA=cuda>=12.5"]}
    assert _refused(world).facts["smallest_branch"] == "555"
    assert RECORD not in world.host.files
    assert "branch 555" in str(forecast(world.host, world.images()).blocked[0].blocked)
    assert world.run([{"image": LLAMA, "check_requirement": False}]).finished


def test_the_requirement_can_be_switched_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = GpuInventory(driver=LoadedDriver("535.183.01", "open", True), cuda_version="12.2")
    monkeypatch.setattr(_nim_image, "observe_gpus", lambda host: old)
    off = {"image": LLAMA, "check_requirement": False}
    assert _refused(world, [off, {"image": LLAMA}]).reason == "requirement"
    path = "/etc/nvidia-container-runtime/config.toml"
    world.host.files[path] = b"#disable-require = true\n"
    assert _refused(world).reason == "requirement"
    assert world.run([off, off]).finished
    world.host.files[path] = b"supported = 1\ndisable-require = true\n"
    assert world.run(NANO).finished


def test_the_cuda_version_follows_from_the_branch_where_nvidia_smi_is_silent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, refused in (("550.54.15", True), ("570.10.01", False)):
        silent = GpuInventory(driver=LoadedDriver(version, "open", True))
        monkeypatch.setattr(_nim_image, "observe_gpus", lambda host, found=silent: found)
        if refused:
            assert _refused(world).reason == "requirement"
        else:
            assert world.run().finished


def test_disk_space(world: World) -> None:
    # 2.8 GB packed are 9.2 GB on the disk of Docker.
    world.host.free = 9_000_000_000
    error = _refused(world)
    assert error.reason == "disk_full"
    assert error.facts["bytes_needed"] == int(2_800_000_000 * 3.3)
    assert "/var/lib/docker on / needs about 9.2 GB" in error.message
    assert "9.0 GB is free" in error.message
    world.host.free = 9_300_000_000
    world.run()


def test_disk_space_of_the_model(world: World) -> None:
    entry = {"image": LLAMA, "disk_space": "10GB", "cache_directory": "/var/lib/nim/cache/a"}
    world.host.free = 10_000_000_000
    error = _refused(world, [entry])
    assert "/var/lib/nim/cache/a on /var/lib/nim needs about 10.7 GB" in error.message
    # On the same file system as Docker both count together.
    entry["cache_directory"] = "/srv/cache"
    world.host.free = 19_000_000_000
    error = _refused(world, [entry])
    assert error.facts["mount"] == "/"
    assert "/srv/cache and /var/lib/docker on / needs about 20.0 GB" in error.message
    # What is in the cache already need not be downloaded again.
    world.host.dirs.add("/srv/cache")
    world.host.commands["du -s -B1 /srv/cache"] = "8000000000\t/srv/cache\n"
    world.run([entry])


def test_the_list_is_refused_as_a_whole(world: World) -> None:
    FakeClient.tags[NANO] = FleetError("no_entitlement", "Not for you.")
    error = _refused(world, [{"image": LLAMA}, {"image": NANO}])
    assert error.reason == "no_entitlement"


def test_an_engine_that_cannot_pull(world: World) -> None:
    world.docker.details.update(ServerVersion="29.5.1", DriverStatus=[["driver-type", "io.containerd.snapshotter.v1"]])
    assert _refused(world).reason == "engine_cannot_pull"
    world.docker.details["DriverStatus"] = []
    world.run()


def test_no_docker(world: World) -> None:
    world.docker.up = False
    assert _refused(world).reason == "docker_unavailable"


def test_the_clients_options_come_from_the_daemon(world: World) -> None:
    world.docker.details.update(
        HttpsProxy="http://proxy:3128",
        NoProxy="localhost",
        RegistryConfig={
            "IndexConfigs": {"mirror:5000": {"Secure": False}},
            "InsecureRegistryCIDRs": ["::1/128", "127.0.0.0/8", "10.0.0.0/8"],
        },
    )
    for registry, insecure in (("mirror:5000", True), ("10.1.2.3:80", True), ("nvcr.io", None), ("11.0.0.1", None)):
        image = registry + "/x:1"
        world.images(image).resolve(world.host, ImageReference.parse(image))
        assert FakeClient.options["insecure"] is insecure
        assert FakeClient.options["proxies"] == {"https": "http://proxy:3128", "no": "localhost"}
    world.docker.details["HttpsProxy"] = "http://xxxxx:xxxxx@proxy:3128"
    world.images().resolve(world.host, ImageReference.parse(LLAMA))
    assert FakeClient.options["proxies"] is None


# -- check mode -------------------------------------------------------------------------------------------


def test_forecast(world: World) -> None:
    found = forecast(world.host, world.images())
    assert [change.after for change in found.changes] == [DIGEST]
    assert (found.blocked, found.warnings) == ([], [])
    assert world.docker.pulled == []
    assert RECORD not in world.host.files


def test_forecast_on_a_fresh_host(world: World) -> None:
    world.docker.up = False
    found = forecast(world.host, world.images())
    assert [change.after for change in found.changes] == ["the digest of tag 1.8.4"]
    assert "Nobody answers" in found.warnings[0]


def test_forecast_before_the_driver_is_upgraded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = GpuInventory(driver=LoadedDriver("535.183.01", "open", True), cuda_version="12.2")
    monkeypatch.setattr(_nim_image, "observe_gpus", lambda host: old)
    found = forecast(world.host, world.images())
    assert found.changes == []
    assert "branch 555" in str(found.blocked[0].blocked)


def test_forecast_fails_for_what_no_task_can_mend(world: World) -> None:
    FakeClient.tags[LLAMA] = FleetError("no_such_tag", "No such tag.")
    with pytest.raises(FleetError, match="No such tag"):
        forecast(world.host, world.images())


# -- slices -----------------------------------------------------------------------------------------------


def test_slices(world: World) -> None:
    world.jobs.hold = True
    first = world.run()
    assert not first.finished
    assert first.state is None
    assert first.resume["jobs"] == [pull_job_id(ImageReference.parse(LLAMA))]
    assert json.loads(json.dumps(first.resume)) == first.resume
    FakeClient.asked.clear()
    second = advance(world.host, world.images(), first.resume, 1)
    assert not second.finished
    assert FakeClient.asked == []
    # The job ends.
    world.docker.add(LLAMA, digests=["%s@%s" % (_name(LLAMA), DIGEST)])
    world.host.dirs.add("/var/lib/gpu_fleet")
    converge(world.host, world.images(), check_mode=False)
    job_id = first.resume["jobs"][0]
    world.jobs.found[job_id] = JobStatus(job_id, "done")
    last = advance(world.host, world.images(), second.resume, 1)
    assert last.finished
    assert [change.as_dict()["to"] for change in last.changes] == [DIGEST]
    assert len(world.jobs.started) == 1


def test_a_new_controller_attaches(world: World) -> None:
    world.jobs.hold = True
    world.run()
    FakeClient.tags[LLAMA] = FleetError("registry_unreachable", "Away.")
    attached = world.run()
    assert not attached.finished
    assert attached.changes[0].after == DIGEST
    assert len(world.jobs.started) == 1
    assert forecast(world.host, world.images()).warnings == []


@pytest.mark.parametrize("state", ["failed", "lost"])
def test_a_failed_job(world: World, state: str) -> None:
    world.jobs.hold = True
    resume = world.run().resume
    job_id = resume["jobs"][0]
    error = {"reason": "disk_full", "message": "No room.", "facts": {"image": LLAMA}} if state == "failed" else {}
    world.jobs.found[job_id] = JobStatus(job_id, state, error=error)
    with pytest.raises(FleetError) as caught:
        advance(world.host, world.images(), resume, 1)
    assert caught.value.reason == ("disk_full" if state == "failed" else "job_lost")
    assert len(caught.value.facts["changes"]) == 1
    # The next run is not bound by it.
    world.jobs.hold = False
    assert world.run().finished


def test_an_image_that_vanishes_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pull = world.docker.pull

    def pull_and_lose(*args: t.Any) -> None:
        pull(*args)
        world.docker.images.clear()

    monkeypatch.setattr(world.docker, "pull", pull_and_lose)
    with pytest.raises(FleetError) as error:
        world.run()
    assert error.value.reason == "digest_mismatch"


# -- the pull ---------------------------------------------------------------------------------------------


def _work(world: World, slept: list[float], **options: t.Any) -> list[dict[str, t.Any]]:
    resource = world.images(**options)
    reference = ImageReference.parse(LLAMA)
    task = _nim_image.PullTask(resource.wanted[0], reference, _found(reference))
    reports: list[dict[str, t.Any]] = []
    resource.work(
        world.host, task, t.cast(t.Any, world.docker), ("u", KEY), lambda p: reports.append(dict(p)), slept.append
    )
    assert KEY not in repr(reports)
    return reports


def test_transient_errors_are_retried_with_growing_pauses(world: World) -> None:
    slept: list[float] = []
    world.docker.failures = [
        FleetError(reason, "x") for reason in ("registry_unreachable", "rate_limit", "docker_unavailable")
    ]
    reports = _work(world, slept)
    assert len(world.docker.pulled) == 4
    assert [round(seconds / 2**number, 2) for number, seconds in enumerate(slept, 1)] == pytest.approx(
        [1] * 3, abs=0.26
    )
    retries = [report for report in reports if report.get("phase") == "retrying"]
    assert progress_text("nim/x", retries[0]) == "nim/x: registry unreachable, try 2 of 5 follows"


def test_the_last_try_fails_with_its_reason(world: World) -> None:
    world.docker.failures = [FleetError("registry_unreachable", "x") for dummy in range(9)]
    slept: list[float] = []
    with pytest.raises(FleetError) as error:
        _work(world, slept, retries=3)
    assert error.value.reason == "registry_unreachable"
    assert error.value.facts["attempts"] == 3
    assert len(slept) == 2


@pytest.mark.parametrize("reason", ["disk_full", "bad_key", "no_such_tag", "pull_failed", "tls_error"])
def test_what_no_retry_can_mend(world: World, reason: str) -> None:
    world.docker.failures = [FleetError(reason, "x")]
    with pytest.raises(FleetError) as error:
        _work(world, [])
    assert error.value.reason == reason
    assert len(world.docker.pulled) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('Head "https://nvcr.io/v2/nim/x/manifests/1": unauthorized: authentication required', "bad_key"),
        (
            "failed to authorize: failed to fetch oauth token: unexpected status from GET request to "
            "https://nvcr.io/proxy_auth?scope=x: 403 Forbidden",
            "no_entitlement",
        ),
        (
            "failed to authorize: failed to fetch oauth token: unexpected status from GET request to "
            "https://nvcr.io/proxy_auth?scope=x: 401 Unauthorized",
            "bad_key",
        ),
        ("failed to fetch anonymous token: unexpected status: 401 Unauthorized", "bad_key"),
        ('denied: {"errors": [{"code": "DENIED", "message": "Access Denied"}]}', "no_entitlement"),
        ("unexpected status code 402 Payment Required", "no_entitlement"),
        ("unexpected status: 451 Unavailable For Legal Reasons", "legal"),
        ("manifest unknown: manifest unknown", "no_such_tag"),
        ("pull access denied for x, repository does not exist or may require 'docker login'", "bad_key"),
        ("toomanyrequests: Rate exceeded", "rate_limit"),
        ("received unexpected HTTP status: 503 Service Unavailable", "registry_unreachable"),
        (
            'Get "https://nvcr.io/v2/": tls: failed to verify certificate: x509: certificate signed by unknown authority',
            "tls_error",
        ),
        ("net/http: TLS handshake timeout", "registry_unreachable"),
        ("dial tcp: lookup nvcr.io on 127.0.0.53:53: no such host", "registry_unreachable"),
        ("dial tcp 1.2.3.4:443: connect: connection refused", "registry_unreachable"),
        ("unexpected EOF", "registry_unreachable"),
        ("failed to register layer: write /x: no space left on device", "disk_full"),
        ("error from registry: Incorrect Repository Format", "engine_cannot_pull"),
        ("no matching manifest for linux/arm64/v8 in the manifest list entries", "architecture"),
        ("something else", "pull_failed"),
    ],
)
def test_errors_of_the_daemon(text: str, reason: str) -> None:
    error = pull_error(LLAMA, text)
    assert error.reason == reason
    assert error.message.startswith("Pulling %s failed: %s" % (LLAMA, text[:20]))
    assert error.message.endswith(".")


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(t.cast(t.Any, __import__("sys").modules), "docker", None)
    with pytest.raises(FleetError) as error:
        DockerPuller("/nowhere")
    assert error.value.reason == "missing_library"
    assert "python3-docker" in error.value.message


def test_the_sdk_without_a_daemon(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FleetError) as error:
        DockerPuller(str(tmp_path / "docker.sock"))
    assert error.value.reason == "docker_unavailable"


# -- progress ---------------------------------------------------------------------------------------------


@pytest.fixture
def recording(fixtures: pathlib.Path) -> types.SimpleNamespace:
    """A real pull: Docker Engine 26.1.5, image store of its own, three layers there before."""
    folder = fixtures / "docker-pull"
    manifest = json.loads((folder / "engine-26.1.manifest.json").read_text())
    return types.SimpleNamespace(
        layers={layer["digest"]: layer["size"] for layer in manifest["layers"]},
        events=[json.loads(line) for line in (folder / "engine-26.1.jsonl").read_text().splitlines()],
    )


def test_a_recorded_pull(recording: types.SimpleNamespace) -> None:
    tracker = PullProgress(recording.layers)
    start = tracker.snapshot(0)
    assert start["phase"] == "waiting"
    assert start["bytes_total"] == sum(recording.layers.values())
    existing = {event["id"] for event in recording.events if event["status"] == "Already exists"}
    assert len(existing) == 3
    shots = []
    for event in recording.events:
        tracker.feed(event)
        shots.append(tracker.snapshot(event["at"]))
    total = sum(size for digest, size in recording.layers.items() if digest[7:19] not in existing)
    settled = [shot for shot in shots if shot["bytes_total"] == total]
    assert len(settled) > 70
    percents = [shot["percent"] for shot in settled]
    assert percents == sorted(percents)
    assert {shot["phase"] for shot in settled} == {"waiting", "downloading", "unpacking", "done"}
    assert settled[-1]["percent"] == settled[-1]["unpacked_percent"] == 100
    assert settled[-1]["layers"] == {"done": len(recording.layers)}
    rated = [shot for shot in settled if shot["rate"]]
    assert rated
    for shot in rated:
        assert shot["eta"] == pytest.approx((total - shot["bytes_done"]) / shot["rate"])
        assert 0 < shot["rate"] < 40e6


def test_a_second_try_keeps_what_is_complete() -> None:
    tracker = PullProgress({"sha256:" + "a" * 64: 100, "sha256:" + "b" * 64: 100})
    one, two = "a" * 12, "b" * 12
    tracker.feed({"id": one, "status": "Pull complete"})
    tracker.feed({"id": two, "status": "Downloading", "progressDetail": {"current": 60, "total": 100}})
    assert tracker.snapshot(0)["bytes_done"] == 160
    tracker.restart()
    assert tracker.snapshot(1)["bytes_done"] == 100
    # What the first try brought was not there before: it stays in the total.
    tracker.feed({"id": one, "status": "Already exists"})
    assert tracker.snapshot(2)["bytes_total"] == 200


def test_events_of_the_containerd_store_do_not_upset_it() -> None:
    tracker = PullProgress({"sha256:" + "a" * 64: 100})
    tracker.feed({"id": "a" * 12, "status": "Extracting", "progressDetail": {"current": 4, "units": "s"}})
    shot = tracker.snapshot(0)
    assert (shot["bytes_done"], shot["unpacked_percent"], shot["phase"]) == (100, 0, "unpacking")


_events = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.sampled_from(["a" * 12, "b" * 12, "c" * 12, "1.8.4"]),
            "status": st.sampled_from(
                [
                    "Pulling fs layer",
                    "Waiting",
                    "Downloading",
                    "Verifying Checksum",
                    "Download complete",
                    "Extracting",
                    "Pull complete",
                    "Already exists",
                    "Retrying in 5 seconds",
                ]
            ),
            "progressDetail": st.fixed_dictionaries(
                {}, optional={"current": st.integers(0, 300), "total": st.just(100)}
            ),
        }
    )
)


@settings(deadline=None)
@given(_events)
def test_progress_stays_in_its_bounds(events: list[dict[str, t.Any]]) -> None:
    tracker = PullProgress({"sha256:" + letter * 64: 100 for letter in "ab"})
    for now, event in enumerate(events):
        tracker.feed(event)
        shot = tracker.snapshot(now)
        assert 0 <= shot["bytes_done"] <= shot["bytes_total"]
        assert 0 <= shot["percent"] <= 100
        assert 0 <= shot["unpacked_percent"] <= 100
        assert progress_text("nim/x", shot)


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (
            {"phase": "downloading", "percent": 43, "bytes_done": 1.2e9, "bytes_total": 2.8e9, "rate": 95e6, "eta": 17},
            "nim/x 43% 1.2 of 2.8 GB, 95.0 MB/s, 0:17 left",
        ),
        (
            {"phase": "downloading", "percent": 1, "bytes_done": 5e8, "bytes_total": 150e9, "rate": 4e6, "eta": 37375},
            "nim/x 1% 500 MB of 150 GB, 4.0 MB/s, 10:22:55 left",
        ),
        ({"phase": "downloading", "percent": 0, "bytes_done": 0, "bytes_total": 2e9}, "nim/x 0% 0 B of 2.0 GB"),
        ({"phase": "unpacking", "unpacked_percent": 37, "bytes_total": 2.8e9}, "nim/x unpacking 37% of 2.8 GB"),
        ({"phase": "waiting", "bytes_total": 2.8e9}, "nim/x: waiting for the first bytes of 2.8 GB"),
        ({}, "nim/x: waiting"),
    ],
)
def test_progress_text(progress: dict[str, t.Any], text: str) -> None:
    assert progress_text("nim/x", progress) == text


# -- options and files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"image": "https://nvcr.io/x"}, "images[0].image"),
        ({"image": LLAMA, "disk_space": "20"}, "not a size with a unit"),
        ({"image": LLAMA, "disk_space": "much"}, "not a size with a unit"),
        ({"image": LLAMA, "cache_directory": "relative"}, "not an absolute path"),
    ],
)
def test_bad_images(entry: dict[str, str], part: str) -> None:
    with pytest.raises(FleetError) as error:
        parse_images([entry])
    assert error.value.reason == "invalid_option"
    assert part in error.value.message


def test_the_same_image_twice() -> None:
    one = {"image": LLAMA, "disk_space": "1GB"}
    two = {"image": LLAMA, "disk_space": "3GB"}
    (image,) = parse_images(
        [dict(one, cache_directory="/a"), dict(two, cache_directory="/b"), {"image": LLAMA}, two, two]
    )
    assert image.spaces == (("/a", 1024**3), ("/b", 3 * 1024**3), ("", 3 * 1024**3))
    with pytest.raises(FleetError, match="both present and absent"):
        parse_images([one, dict(two, state="absent")])


@pytest.mark.parametrize(
    "options", [{"retries": 0}, {"disk_factor": 0.5}, {"registry_mirrors": "x"}, {"api_key": "a b"}]
)
def test_bad_options(world: World, options: dict[str, t.Any]) -> None:
    with pytest.raises(FleetError) as error:
        world.images(**options)
    assert error.value.reason == "invalid_option"


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"schema": 2, "images": {}}', '{"schema": 1, "images": {"x": 1}}']
)
def test_a_broken_record_is_left_alone(world: World, content: str) -> None:
    world.host.files[RECORD] = content.encode()
    with pytest.raises(FleetError) as error:
        world.run()
    assert error.value.reason == "state_unreadable"
    assert world.host.files[RECORD] == content.encode()


def test_mounts() -> None:
    text = "1 1 8:1 / / rw - ext4 a rw\n2 1 8:2 / /var/lib/docker rw - x b rw\n3 1 8:3 / /mnt/a\\040b rw - x c rw\n\n"
    mounts = mount_points(text)
    assert mounts == ["/", "/var/lib/docker", "/mnt/a b"]
    assert mount_of("/var/lib/docker", mounts) == "/var/lib/docker"
    assert mount_of("/var/lib/docker2", mounts) == "/"
    assert mount_of("/mnt/a b/c", mounts) == "/mnt/a b"
    assert mount_of("/x", []) == "/"


def test_look_up(world: World) -> None:
    FakeClient.tags[LLAMA] = {"labels": {"com.nvidia.nim.version": "1.8.4"}}
    found = look_up(world.host, LLAMA, api_key=KEY, client=t.cast(t.Any, FakeClient))
    assert found["family"] == "1.x"
    assert found["compressed_size"] == 2_800_000_000
    assert found["require_cuda"] == "cuda>=12.5"
    assert found["cuda_version"] == "12.5.0"
    assert KEY not in repr(found)


# -- the modules ------------------------------------------------------------------------------------------


def _module(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    check: bool = False,
    **options: t.Any,
) -> dict[str, t.Any]:
    def build(images: t.Any, **given: t.Any) -> NimImages:
        given.pop("host_name")
        return world.images(images, **given)

    monkeypatch.setattr(nim_image, "Host", lambda: world.host)
    monkeypatch.setattr(nim_image, "NimImages", build)
    arguments = dict({"images": [{"image": LLAMA}], "api_key": KEY}, **options)
    arguments.update(_ansible_check_mode=check, _ansible_diff=True)
    with patch_module_args(arguments), pytest.raises(SystemExit):
        nim_image.main()
    printed = capsys.readouterr().out
    assert KEY not in printed
    return t.cast("dict[str, t.Any]", json.loads(printed))


def test_module_check_real_check_real(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_1, real_1, check_2, real_2 = (
        _module(world, monkeypatch, capsys, check) for check in (True, False, True, False)
    )
    assert [result["changed"] for result in (check_1, real_1, check_2, real_2)] == [True, True, False, False]
    assert check_1["diff"] == real_1["diff"]
    assert real_1["diff"][0]["after"] == "image %s: %s\n" % (LLAMA, DIGEST)
    assert check_2["diff"] == real_2["diff"] == []
    assert check_1["changes"] == real_1["changes"]
    assert all(result["finished"] for result in (check_1, real_1, check_2, real_2))
    assert check_1["images"][0]["present"] is False
    assert real_1["images"] == real_2["images"]
    assert real_1["images"][0]["digest"] == DIGEST


def test_module_in_slices(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    world.jobs.hold = True
    first = _module(world, monkeypatch, capsys)
    assert (first["finished"], first["changed"]) == (False, False)
    assert first["progress"]["text"] == "nim/x: waiting"
    job_id = first["resume"]["jobs"][0]
    world.jobs.found[job_id] = JobStatus(
        job_id, "failed", error={"reason": "disk_full", "message": "No room.", "facts": {"image": LLAMA}}
    )
    failed = _module(world, monkeypatch, capsys, resume=first["resume"])
    assert (failed["failed"], failed["reason"], failed["msg"]) == (True, "disk_full", "No room.")


def test_module_in_check_mode_on_a_fresh_host(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world.docker.up = False
    result = _module(world, monkeypatch, capsys, check=True)
    assert result["changed"] is True
    assert "Not checked before the pull" in str(result["warnings"][0])


@pytest.mark.parametrize("reason", ["bad_key", "no_such_tag", "tls_error", ""])
def test_info_module(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: str
) -> None:
    if reason:
        FakeClient.tags[LLAMA] = FleetError(reason, "Because.")
    monkeypatch.setattr(nim_image_info, "Host", lambda: world.host)
    monkeypatch.setattr(nim_image_info, "look_up", functools.partial(look_up, client=t.cast(t.Any, FakeClient)))
    with patch_module_args({"image": LLAMA, "api_key": KEY}), pytest.raises(SystemExit):
        nim_image_info.main()
    printed = capsys.readouterr().out
    assert KEY not in printed
    result = json.loads(printed)
    assert result["changed"] is False
    assert result["exists"] is not bool(reason)
    assert result["reason"] == (reason or None)
    assert (result["image"] is None) is bool(reason)
    assert result["message"] == ("Because." if reason else "")
