# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images: plan, checks before the pull, the pull itself."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nim_image
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import Gpu
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_inventory import GpuInventory
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_pull import (
    progress_text,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_record import (
    RECORD,
    PinnedImage,
    pinned_image,
    read_record,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_reference import ImageReference
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_slices import forecast
from ansible_collections.gpu_fleet.nim.plugins.module_utils._loaded_driver import LoadedDriver
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import converge
from fake_host import FakeHost
from image_world import (
    DIGEST,
    IMAGE_ID,
    KEY,
    LLAMA,
    NANO,
    NEWER,
    FakeClient,
    ImageWorld,
    found_image,
    image_world,
    name_of,
)


@pytest.fixture
def world(host: FakeHost, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> ImageWorld:
    return image_world(host, tmp_path, monkeypatch)


# -- from nothing to pinned, and then nothing -------------------------------------------------------------


def test_pull_pin_and_rest(world: ImageWorld) -> None:
    done = world.run()
    assert done.finished
    (change,) = done.changes
    assert (change.before, change.after) == (None, DIGEST)
    assert world.docker.pulled == [(name_of(LLAMA), DIGEST, None)]
    assert world.docker.tagged == [LLAMA]
    pinned = pinned_image(world.host, LLAMA)
    assert pinned == PinnedImage(LLAMA, name_of(LLAMA), DIGEST, IMAGE_ID)
    assert pinned.run == "%s@%s" % (name_of(LLAMA), DIGEST)
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


@pytest.mark.parametrize("other", ["sha256:" + "8" * 64, None])
def test_the_name_of_a_pinned_image_that_somebody_moved_or_took(world: ImageWorld, other: str | None) -> None:
    world.run()
    world.docker.images.pop(LLAMA)
    if other:
        world.docker.add(LLAMA, image_id=other)
    (change,) = world.run().changes
    assert (change.what, change.before, change.after) == ("tag " + LLAMA, other, IMAGE_ID)
    assert world.docker.images[LLAMA]["Id"] == IMAGE_ID
    assert len(world.docker.pulled) == 1
    assert world.run().changes == []


def test_an_image_that_is_wanted_by_digest_alone_needs_no_name(world: ImageWorld) -> None:
    reference = "%s@%s" % (name_of(LLAMA), DIGEST)
    world.docker.add(digests=[reference])
    world.run(reference)
    assert world.docker.tagged == []
    assert world.run(reference).changes == []


def test_converge_does_the_same_in_one_go(world: ImageWorld) -> None:
    assert converge(world.host, world.images(), check_mode=False).changed
    assert not converge(world.host, world.images(), check_mode=False).changed


def test_a_tag_that_moved_is_followed_only_on_request(world: ImageWorld) -> None:
    world.run()
    FakeClient.tags[LLAMA] = NEWER
    assert world.run().changes == []
    (change,) = world.run(pull="newer").changes
    assert (change.before, change.after) == (DIGEST, NEWER)
    assert pinned_image(world.host, LLAMA).digest == NEWER  # type: ignore[union-attr]
    assert world.run(pull="newer").changes == []


def test_an_image_that_was_pruned_comes_back_as_it_was(world: ImageWorld) -> None:
    world.run()
    world.docker.images.clear()
    FakeClient.tags[LLAMA] = NEWER
    (change,) = world.run().changes
    assert change.after == DIGEST
    assert change.why == "it is no longer on the host"


def test_a_pin_that_the_registry_has_forgotten(world: ImageWorld) -> None:
    world.run()
    world.docker.images.clear()
    FakeClient.tags["%s@%s" % (name_of(LLAMA), DIGEST)] = FleetError("no_such_tag", "Gone.")
    FakeClient.tags[LLAMA] = NEWER
    with pytest.raises(FleetError, match="set pull to newer"):
        world.run()
    assert world.run(pull="newer").finished


def test_what_was_pulled_by_hand_is_pinned(world: ImageWorld) -> None:
    world.docker.add(LLAMA, digests=["other.example/x@" + NEWER, "%s@%s" % (name_of(LLAMA), DIGEST)])
    (change,) = world.run().changes
    assert change.action == "pin"
    assert pinned_image(world.host, LLAMA).digest == DIGEST  # type: ignore[union-attr]
    assert world.run().changes == []
    assert FakeClient.asked == []


@pytest.mark.parametrize("pinned", [False, True])
def test_an_image_for_another_machine_is_pulled_again(world: ImageWorld, pinned: bool) -> None:
    run = "%s@%s" % (name_of(LLAMA), DIGEST)
    if pinned:
        world.run()
    world.docker.images.clear()
    world.docker.add(LLAMA, image_id="sha256:" + "8" * 64, digests=[run], architecture="arm64")
    world.docker.users = [{"Names": ["/nim-llama"], "ImageID": "sha256:" + "8" * 64}]
    (change,) = world.run().changes
    assert (change.action, change.why) == ("pull", "the one on the host is built for arm64")
    for name in (run, LLAMA):
        assert world.docker.images[name]["Architecture"] == "amd64"
    assert pinned_image(world.host, LLAMA).image_id == IMAGE_ID  # type: ignore[union-attr]
    assert world.run().changes == []


def test_a_name_that_another_machines_image_took_moves_no_pin(world: ImageWorld) -> None:
    world.run()
    world.docker.images.clear()
    world.docker.add(LLAMA, image_id="sha256:" + "8" * 64, architecture="arm64")
    FakeClient.tags[LLAMA] = NEWER
    (change,) = world.run().changes
    assert (change.action, change.after, change.why) == ("pull", DIGEST, "the one on the host is built for arm64")
    assert pinned_image(world.host, LLAMA).digest == DIGEST  # type: ignore[union-attr]
    assert world.run().changes == []


def test_an_image_for_another_machine_is_refused_where_nothing_may_be_pulled(world: ImageWorld) -> None:
    world.docker.add(LLAMA, architecture="arm64")
    with pytest.raises(FleetError, match=r"built for arm64.*load the one for this host") as error:
        world.run(pull="never")
    assert error.value.reason == "architecture"


def test_what_docker_pulls_for_another_machine_is_not_taken(world: ImageWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    add = world.docker.add
    monkeypatch.setattr(world.docker, "add", lambda **names: add(**names, architecture="arm64"))
    with pytest.raises(FleetError, match="is built for arm64, and this host is amd64") as error:
        world.run()
    assert error.value.reason == "architecture"
    assert pinned_image(world.host, LLAMA) is None


def test_what_was_loaded_from_an_archive_is_pinned_by_id(world: ImageWorld) -> None:
    world.docker.add(LLAMA)
    done = world.run(pull="never")
    assert done.changes[0].after == IMAGE_ID
    assert pinned_image(world.host, LLAMA).run == IMAGE_ID  # type: ignore[union-attr]
    assert world.run(pull="never").changes == []


def test_never_pulled(world: ImageWorld) -> None:
    with pytest.raises(FleetError) as error:
        world.run(pull="never")
    assert error.value.reason == "image_missing"


def test_by_digest(world: ImageWorld) -> None:
    image = "%s@%s" % (name_of(LLAMA), DIGEST)
    world.run(image)
    assert world.docker.tagged == []
    assert world.run(image).changes == []


def test_mirror(world: ImageWorld) -> None:
    mirrors = {"nvcr.io": "mirror.example:5000/ngc"}
    world.run(registry_mirrors=mirrors, api_key=KEY)
    source = "mirror.example:5000/ngc/nim/meta/llama-3.1-8b-instruct"
    assert pinned_image(world.host, LLAMA).run == "%s@%s" % (source, DIGEST)  # type: ignore[union-attr]
    # The NGC key is not for the mirror.
    assert FakeClient.asked == [(source + ":1.8.4", "", "")]
    assert world.docker.pulled[0][2] is None
    assert world.docker.tagged == [LLAMA]
    assert world.run(registry_mirrors=mirrors).changes == []


def test_credentials(world: ImageWorld) -> None:
    world.run(api_key=KEY)
    assert FakeClient.asked[0][1:] == ("$oauthtoken", KEY)
    world.host.files["/root/.docker/config.json"] = b'{"auths": {"nvcr.io": {"auth": "dTpw"}}}'
    world.run(NANO)
    assert FakeClient.asked[1][1:] == ("u", "p")
    assert world.docker.pulled[1][2] == ("u", "p")


def test_an_identity_token_goes_to_the_registry_and_to_docker(world: ImageWorld) -> None:
    world.host.files["/root/.docker/config.json"] = json.dumps(
        {"auths": {"mirror.example": {"auth": "MDAwMDo=", "identitytoken": KEY}}}
    ).encode()
    world.run(registry_mirrors={"nvcr.io": "mirror.example"})
    assert FakeClient.asked[0][1:] == world.docker.pulled[0][2] == ("<token>", KEY)


# -- removal ----------------------------------------------------------------------------------------------


def test_removal(world: ImageWorld) -> None:
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


def _refused(world: ImageWorld, images: t.Any = LLAMA, **options: t.Any) -> FleetError:
    with pytest.raises(FleetError) as caught:
        world.run(images, **options)
    assert world.docker.pulled == []
    assert world.jobs.started == []
    assert caught.value.facts["changes"] == []
    return caught.value


def _gpu(brand: str) -> Gpu:
    return Gpu(0, "GPU-1", "x", brand, "Ada Lovelace", 24564, 0, 24564, "", "Default", 0, "0000:01:00.0")


def test_the_driver_is_too_old(world: ImageWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    old = GpuInventory(
        driver=LoadedDriver("535.183.01", "proprietary", True), cuda_version="12.2", gpus=(_gpu("GeForce"),)
    )
    monkeypatch.setattr(_nim_image, "observe_gpus", lambda host: old)
    error = _refused(world)
    assert error.reason == "requirement"
    assert error.facts["smallest_branch"] == "555"
    assert "needs a driver of branch 555 or newer; gpu01 runs 535.183.01" in error.message


def test_conditions_on_the_gpu_are_those_of_the_gpus_that_the_models_get(
    world: ImageWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    tesla = dataclasses.replace(_gpu("Tesla"), index=1, uuid="GPU-2", mig_devices=({"uuid": "MIG-2"},))
    mixed = GpuInventory(
        driver=LoadedDriver("580.95.05", "open", True), cuda_version="13.0", gpus=(_gpu("GeForce"), tesla)
    )
    monkeypatch.setattr(_nim_image, "observe_gpus", lambda host: mixed)
    world.docker.add(LLAMA)
    world.docker.images[LLAMA]["Config"] = {"Env": ["NVIDIA_REQUIRE_CUDA=brand=tesla,cuda>=12.5"]}

    def passes(*users: dict[str, t.Any]) -> bool:
        changes = forecast(world.host, world.images([dict(user, image=LLAMA) for user in users]))
        return not changes.blocked

    for names in (["1"], ["gpu-2"], ["MIG-2"]):
        assert passes({"model": "a", "gpus": 1, "gpu_names": names})
    assert not passes({"model": "a", "gpus": 1, "gpu_names": ["0"]})
    # Which one it will get is not known, nor whether it keeps what it has when it wants another number.
    assert not passes({"model": "a", "gpus": 1}) and not passes({})
    world.host.files["/etc/nim/a.json"] = b'{"gpus": ["GPU-2"]}'
    assert passes({"model": "a", "gpus": 1}) and passes({"model": "a"})
    assert not passes({"model": "a", "gpus": 2})
    # One that does without the requirement does not count; another one that wants it does.
    assert passes({"model": "a"}, {"model": "b", "gpus": 1, "gpu_names": ["0"], "check_requirement": False})
    assert not passes({"model": "a"}, {"model": "b", "gpus": 1, "gpu_names": ["0"]})


def test_what_is_on_the_host_already_must_run_on_the_driver_too(
    world: ImageWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = GpuInventory(driver=LoadedDriver("535.183.01", "open", True), cuda_version="12.2")
    monkeypatch.setattr(_nim_image, "observe_gpus", lambda host: old)
    world.docker.add(LLAMA)
    world.docker.images[LLAMA]["Config"] = {"Env": ["PATH=/bin", "NVIDIA_REQUIRE_CUDA=cuda>=12.5"]}
    assert _refused(world).facts["smallest_branch"] == "555"
    assert RECORD not in world.host.files
    assert "branch 555" in str(forecast(world.host, world.images()).blocked[0].blocked)
    assert world.run([{"image": LLAMA, "check_requirement": False}]).finished


def test_the_requirement_can_be_switched_off(world: ImageWorld, monkeypatch: pytest.MonkeyPatch) -> None:
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
    world: ImageWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, refused in (("550.54.15", True), ("570.10.01", False)):
        silent = GpuInventory(driver=LoadedDriver(version, "open", True))
        monkeypatch.setattr(_nim_image, "observe_gpus", lambda host, found=silent: found)
        if refused:
            assert _refused(world).reason == "requirement"
        else:
            assert world.run().finished


def test_disk_space(world: ImageWorld) -> None:
    # 2.8 GB packed are 9.2 GB on the disk of Docker.
    world.host.free = 9_000_000_000
    error = _refused(world)
    assert error.reason == "disk_full"
    assert error.facts["bytes_needed"] == int(2_800_000_000 * 3.3)
    assert "/var/lib/docker on / needs about 9.2 GB" in error.message
    assert "9.0 GB is free" in error.message
    # Containerd's store lies elsewhere, whatever the data-root is.
    world.docker.details.update(
        DockerRootDir="/data/docker", DriverStatus=[["driver-type", "io.containerd.snapshotter.v1"]]
    )
    error = _refused(world)
    assert "/var/lib/containerd on / needs about 9.2 GB" in error.message
    world.host.free = 9_300_000_000
    world.run()


def test_disk_space_of_the_model(world: ImageWorld) -> None:
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


def test_the_list_is_refused_as_a_whole(world: ImageWorld) -> None:
    FakeClient.tags[NANO] = FleetError("no_entitlement", "Not for you.")
    error = _refused(world, [{"image": LLAMA}, {"image": NANO}])
    assert error.reason == "no_entitlement"


def test_an_engine_that_cannot_pull(world: ImageWorld) -> None:
    world.docker.details.update(ServerVersion="29.5.1", DriverStatus=[["driver-type", "io.containerd.snapshotter.v1"]])
    assert _refused(world).reason == "engine_cannot_pull"
    world.docker.details["DriverStatus"] = []
    world.run()


@pytest.mark.parametrize(
    ("version", "label", "oldest"),
    [
        ("23.0.6", "2.0.13", "24.0"),
        ("20.10.24+dfsg1", "1.8.4", "23.0.1"),
        ("23.0.6", "1.8.4", ""),
        ("24.0.0", "2.0.13", ""),
        # Not known what it is or what it needs.
        ("20.10.24", None, ""),
    ],
)
def test_an_engine_that_is_too_old_for_the_family(
    world: ImageWorld, version: str, label: str | None, oldest: str
) -> None:
    labels = {"com.nvidia.nim.version": label} if label else {}
    world.docker.details["ServerVersion"] = version
    FakeClient.tags[NANO] = {"labels": labels}
    if oldest:
        error = _refused(world, [{"image": NANO}])
        assert error.reason == "engine_too_old"
        assert (
            "needs Docker Engine %s or newer, and this host has %s; set docker_minimum_version"
            % (
                oldest,
                version,
            )
            in error.message
        )
        assert world.docker.pulled == []
    else:
        world.run(NANO)
    # An image that somebody has put there by hand.
    world.docker.images.clear()
    world.docker.add(LLAMA)
    world.docker.images[LLAMA]["Config"] = {"Labels": labels}
    if oldest:
        assert _refused(world).reason == "engine_too_old"
    else:
        world.run()


def test_no_docker(world: ImageWorld) -> None:
    world.docker.up = False
    assert _refused(world).reason == "docker_unavailable"


def test_the_clients_options_come_from_the_daemon(world: ImageWorld) -> None:
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


# -- the pull ---------------------------------------------------------------------------------------------


def _work(world: ImageWorld, slept: list[float], **options: t.Any) -> list[dict[str, t.Any]]:
    resource = world.images(**options)
    reference = ImageReference.parse(LLAMA)
    task = _nim_image.PullTask(resource.wanted[0], reference, found_image(reference))
    reports: list[dict[str, t.Any]] = []
    resource.work(
        world.host, task, t.cast(t.Any, world.docker), ("u", KEY), lambda p: reports.append(dict(p)), slept.append
    )
    assert KEY not in repr(reports)
    return reports


def test_transient_errors_are_retried_with_growing_pauses(world: ImageWorld) -> None:
    slept: list[float] = []
    world.docker.failures = [
        FleetError(reason, "x")
        for reason in ("registry_unreachable", "rate_limit", "docker_unavailable", "pull_stalled")
    ]
    reports = _work(world, slept)
    assert len(world.docker.pulled) == 5
    assert [round(seconds / 2**number, 2) for number, seconds in enumerate(slept, 1)] == pytest.approx(
        [1] * 4, abs=0.26
    )
    retries = [report for report in reports if report.get("phase") == "retrying"]
    assert progress_text("nim/x", retries[0]) == "nim/x: registry unreachable, try 2 of 5 follows"


def test_the_last_try_fails_with_its_reason(world: ImageWorld) -> None:
    world.docker.failures = [FleetError("registry_unreachable", "x") for dummy in range(9)]
    slept: list[float] = []
    with pytest.raises(FleetError) as error:
        _work(world, slept, retries=3)
    assert error.value.reason == "registry_unreachable"
    assert error.value.facts["attempts"] == 3
    assert len(slept) == 2


@pytest.mark.parametrize("reason", ["disk_full", "bad_key", "no_such_tag", "pull_failed", "tls_error"])
def test_what_no_retry_can_mend(world: ImageWorld, reason: str) -> None:
    world.docker.failures = [FleetError(reason, "x")]
    with pytest.raises(FleetError) as error:
        _work(world, [])
    assert error.value.reason == reason
    assert len(world.docker.pulled) == 1


# -- options and files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"retries": 0}, {"disk_factor": 0.5}, {"registry_mirrors": "x"}, {"api_key": "a b"}]
)
def test_bad_options(world: ImageWorld, options: dict[str, t.Any]) -> None:
    with pytest.raises(FleetError) as error:
        world.images(**options)
    assert error.value.reason == "invalid_option"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"schema": 2, "images": {}}',
        '{"schema": 1, "images": {"x": 1}}',
        '{"schema": 1, "images": {"x": {"source": "nvcr.io/x", "digest": ""}}}',
        '{"schema": 1, "images": {"x": {"source": "nvcr.io/x", "digest": null, "image_id": "sha256:1"}}}',
    ],
)
def test_a_broken_record_is_left_alone(world: ImageWorld, content: str) -> None:
    world.host.files[RECORD] = content.encode()
    with pytest.raises(FleetError) as error:
        world.run()
    assert error.value.reason == "state_unreadable"
    assert world.host.files[RECORD] == content.encode()
