# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the registry says of one image."""

from __future__ import annotations

import functools
import json
import pathlib
import typing as t

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_lookup import look_up
from ansible_collections.gpu_fleet.nim.plugins.modules import nim_image_info
from fake_host import FakeHost
from image_world import (
    KEY,
    LLAMA,
    FakeClient,
    ImageWorld,
    image_world,
)


@pytest.fixture
def world(host: FakeHost, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> ImageWorld:
    return image_world(host, tmp_path, monkeypatch)


def test_look_up(world: ImageWorld) -> None:
    FakeClient.tags[LLAMA] = {"labels": {"com.nvidia.nim.version": "1.8.4"}}
    found = look_up(world.host, LLAMA, api_key=KEY, client=t.cast(t.Any, FakeClient))
    assert found["family"] == "1.x"
    assert found["compressed_size"] == 2_800_000_000
    assert found["require_cuda"] == "cuda>=12.5"
    assert found["cuda_version"] == "12.5.0"
    assert KEY not in repr(found)
    # Without an index there is one size.
    assert found["compressed_sizes"] == {"amd64": 2_800_000_000}
    assert found["with_key"] is True


def test_sizes_of_all_architectures(world: ImageWorld) -> None:
    FakeClient.sizes = {"amd64": 5, "arm64": 4}
    found = look_up(world.host, LLAMA, client=t.cast(t.Any, FakeClient))
    assert found["compressed_sizes"] == {"amd64": 5, "arm64": 4}
    assert (found["with_key"], found["public"]) == (False, True)
    assert len(FakeClient.asked) == 1


@pytest.mark.parametrize(
    ("reason", "public"),
    [
        ("", True),
        ("no_key", False),
        ("no_such_repository", False),
        ("rate_limit", None),
        ("registry_unreachable", None),
    ],
)
def test_whether_it_can_be_had_without_a_key(world: ImageWorld, reason: str, public: bool | None) -> None:
    FakeClient.anonymous = [FleetError(reason, "Because.")] if reason else []
    found = look_up(world.host, LLAMA, api_key=KEY, client=t.cast(t.Any, FakeClient))
    assert found["public"] is public
    assert [login[1:] for login in FakeClient.asked] == [("$oauthtoken", KEY), ("", "")]


@pytest.mark.parametrize("reason", ["bad_key", "no_such_tag", "tls_error", ""])
def test_info_module(
    world: ImageWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: str
) -> None:
    if reason:
        FakeClient.tags[LLAMA] = FleetError(reason, "Because.", status=404)
    monkeypatch.setattr(nim_image_info, "Host", lambda: world.host)
    monkeypatch.setattr(nim_image_info, "look_up", functools.partial(look_up, client=t.cast(t.Any, FakeClient)))
    with patch_module_args({"name": LLAMA, "api_key": KEY}), pytest.raises(SystemExit):
        nim_image_info.main()
    printed = capsys.readouterr().out
    assert KEY not in printed
    result = json.loads(printed)
    assert result["changed"] is False
    assert result["exists"] is not bool(reason)
    assert result["reason"] == (reason or None)
    assert (result["image"] is None) is bool(reason)
    assert result["status"] == (404 if reason else None)
    assert result["message"] == ("Because." if reason else "")
