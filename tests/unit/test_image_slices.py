# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images in slices, what check mode says, and the module around them."""

from __future__ import annotations

import json
import pathlib
import typing as t

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nim_image
from ansible_collections.gpu_fleet.nim.plugins.module_utils._background import JobStatus
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_inventory import GpuInventory
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_record import (
    RECORD,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_reference import ImageReference
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_slices import advance, forecast
from ansible_collections.gpu_fleet.nim.plugins.module_utils._loaded_driver import LoadedDriver
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_image import NimImages, pull_job_id
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import converge
from ansible_collections.gpu_fleet.nim.plugins.modules import nim_image
from fake_host import FakeHost
from image_world import (
    DIGEST,
    KEY,
    LLAMA,
    FakeClient,
    ImageWorld,
    image_world,
    name_of,
)


@pytest.fixture
def world(host: FakeHost, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> ImageWorld:
    return image_world(host, tmp_path, monkeypatch)


# -- check mode -------------------------------------------------------------------------------------------


def test_forecast(world: ImageWorld) -> None:
    found = forecast(world.host, world.images())
    assert [change.after for change in found.changes] == [DIGEST]
    assert (found.blocked, found.warnings) == ([], [])
    assert world.docker.pulled == []
    assert RECORD not in world.host.files


def test_forecast_on_a_fresh_host(world: ImageWorld) -> None:
    world.docker.up = False
    found = forecast(world.host, world.images())
    assert [change.after for change in found.changes] == ["the digest of tag 1.8.4"]
    assert "Nobody answers" in found.warnings[0]


def test_forecast_before_the_driver_is_upgraded(world: ImageWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    old = GpuInventory(driver=LoadedDriver("535.183.01", "open", True), cuda_version="12.2")
    monkeypatch.setattr(_nim_image, "observe_gpus", lambda host: old)
    found = forecast(world.host, world.images())
    assert found.changes == []
    assert "branch 555" in str(found.blocked[0].blocked)


def test_forecast_fails_for_what_no_task_can_mend(world: ImageWorld) -> None:
    FakeClient.tags[LLAMA] = FleetError("no_such_tag", "No such tag.")
    with pytest.raises(FleetError, match="No such tag"):
        forecast(world.host, world.images())


# -- slices -----------------------------------------------------------------------------------------------


def test_slices(world: ImageWorld) -> None:
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
    world.docker.add(LLAMA, digests=["%s@%s" % (name_of(LLAMA), DIGEST)])
    world.host.dirs.add("/var/lib/gpu_fleet")
    converge(world.host, world.images(), check_mode=False)
    job_id = first.resume["jobs"][0]
    world.jobs.found[job_id] = JobStatus(job_id, "done")
    last = advance(world.host, world.images(), second.resume, 1)
    assert last.finished
    assert [change.as_dict()["to"] for change in last.changes] == [DIGEST]
    assert len(world.jobs.started) == 1


def test_a_new_controller_attaches(world: ImageWorld) -> None:
    world.jobs.hold = True
    world.run()
    FakeClient.tags[LLAMA] = FleetError("registry_unreachable", "Away.")
    attached = world.run()
    assert not attached.finished
    assert attached.changes[0].after == DIGEST
    assert len(world.jobs.started) == 1
    assert forecast(world.host, world.images()).warnings == []


@pytest.mark.parametrize("state", ["failed", "lost"])
def test_a_failed_job(world: ImageWorld, state: str) -> None:
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


def test_an_image_that_vanishes_at_once(world: ImageWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    pull = world.docker.pull

    def pull_and_lose(*args: t.Any) -> None:
        pull(*args)
        world.docker.images.clear()

    monkeypatch.setattr(world.docker, "pull", pull_and_lose)
    with pytest.raises(FleetError) as error:
        world.run()
    assert error.value.reason == "digest_mismatch"


# -- the modules ------------------------------------------------------------------------------------------


def _module(
    world: ImageWorld,
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
    world: ImageWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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


def test_module_in_slices(
    world: ImageWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    world: ImageWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world.docker.up = False
    result = _module(world, monkeypatch, capsys, check=True)
    assert result["changed"] is True
    assert "Not checked before the pull" in str(result["warnings"][0])
