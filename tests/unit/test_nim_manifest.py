# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The manifest is found in the layers of an image, on disk and at the registry, and nowhere else."""

from __future__ import annotations

import gzip
import io
import tarfile
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nim_manifest_sources
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_reference import ImageReference
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_manifest import (
    MANIFEST_PATHS,
    Manifest,
    manifest_in_container,
    manifest_on_disk,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_manifest_sources import (
    manifest_at_registry,
    manifest_by_container,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._registry_image import RegistryImage
from fake_host import FakeHost
from hypothesis import given
from hypothesis import strategies as st

PATH, OLD = MANIFEST_PATHS[0], MANIFEST_PATHS[1]
FIRST = "%064x:\n  tags:\n    tp: '2'\n" % 1
SECOND = "schema_version: 2.0.0\nprofiles:\n- id: %064x\n  tags:\n    tp: '4'\n" % 2


def tps(manifest: Manifest | None) -> list[int | None] | None:
    return None if manifest is None else [profile.tp for profile in manifest.profiles]


# -- on the host ----------------------------------------------------------------------------------

IMAGE = {"GraphDriver": {"Data": {"UpperDir": "/docker/c/diff", "LowerDir": "/docker/b/diff:/docker/a/diff"}}}


def test_uppermost_layer_on_disk() -> None:
    host = FakeHost({"/docker/a/diff" + PATH: FIRST, "/docker/b/diff" + OLD: SECOND})
    assert tps(manifest_on_disk(host, IMAGE)) == [4]
    assert host.calls == []
    del host.files["/docker/b/diff" + OLD]
    assert tps(manifest_on_disk(host, IMAGE)) == [2]
    host.files["/docker/c/diff" + PATH] = b"hello: world"
    assert manifest_on_disk(host, IMAGE) is None


def test_links_in_a_layer_do_not_lead_to_the_host() -> None:
    host = FakeHost({"/docker/a/diff" + PATH: FIRST})
    host.links["/docker/a/diff/opt/nim"] = "/secret"
    assert manifest_on_disk(host, IMAGE) is None


def test_root_of_the_container_that_runs_the_image() -> None:
    image = {"Id": "sha256:1"}
    host = FakeHost({"/proc/42/root" + PATH: FIRST})
    container: dict[str, t.Any] = {"Image": "sha256:1", "State": {"Running": True, "Pid": 42}}
    assert tps(manifest_in_container(host, image, container)) == [2]
    assert host.calls == []
    for other in (
        None,
        {},
        {**container, "Image": "sha256:2"},
        {**container, "State": {"Running": False, "Pid": 42}},
        {**container, "State": {"Running": True, "Pid": 0}},
    ):
        assert manifest_in_container(host, image, other) is None
    host.links["/proc/42/root/opt/nim"] = "/secret"
    assert manifest_in_container(host, image, container) is None


def test_image_store_without_directories() -> None:
    assert manifest_on_disk(FakeHost(), {}) is None
    assert manifest_on_disk(FakeHost(), {"GraphDriver": {"Data": None, "Name": "overlayfs"}}) is None


def test_container_that_prints_it() -> None:
    host = FakeHost(commands={"docker run * " + OLD: FIRST})
    assert tps(manifest_by_container(host, "nim@sha256:1")) == [2]
    for words in host.calls:
        assert {"--rm", "--network=none", "--log-driver=none", "--runtime=runc", "--pull=never"} <= set(words)
    assert manifest_by_container(FakeHost(), "nim") is None


# -- at the registry ------------------------------------------------------------------------------


def layer(**files: str) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name.lstrip("/"))
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return gzip.compress(raw.getvalue())


class Client:
    def __init__(self, *layers: bytes) -> None:
        self.layers = layers
        self.asked: list[str] = []

    def blob(self, reference: ImageReference, digest: str) -> bytes:
        self.asked.append(digest)
        return self.layers[int(digest)]


def at_registry(*layers: bytes, sizes: t.Sequence[int] = ()) -> tuple[Manifest | None, Client]:
    client = Client(*layers)
    image = RegistryImage(
        "r",
        "sha256:1",
        "sha256:1",
        "sha256:2",
        "amd64",
        ("amd64",),
        tuple((str(number), size) for number, size in enumerate(sizes or [len(one) for one in layers])),
    )
    reference = ImageReference.parse("nvcr.io/nim/a/b:1")
    return manifest_at_registry(t.cast(t.Any, client), reference, image), client


def test_layers_from_the_last_one() -> None:
    found, client = at_registry(
        layer(**{PATH: FIRST}), layer(**{"./" + OLD.lstrip("/"): SECOND}), layer(**{"/etc/x": ""})
    )
    assert tps(found) == [4] and found is not None and found.certain
    assert client.asked == ["2", "1"]


def test_removed_by_a_later_layer() -> None:
    directory, base = PATH.rsplit("/", 1)
    assert at_registry(layer(**{PATH: FIRST}), layer(**{"%s/.wh.%s" % (directory, base): ""}))[0] is None
    assert at_registry(layer(**{PATH: FIRST}), layer(**{"/opt/.wh.nim": ""}))[0] is None
    assert at_registry(layer(**{PATH: FIRST}), layer(**{"/opt/nim/.wh..wh..opq": ""}))[0] is None
    # The same layer may put it there anew.
    both = layer(**{"/opt/nim/.wh..wh..opq": "", PATH: SECOND})
    assert tps(at_registry(layer(**{PATH: FIRST}), both)[0]) == [4]


def test_large_layers_are_not_fetched_and_leave_a_doubt() -> None:
    found, client = at_registry(layer(**{PATH: FIRST}), b"", sizes=[100, _nim_manifest_sources.LAYER_MOST + 1])
    assert tps(found) == [2] and found is not None and not found.certain
    assert client.asked == ["0"]
    found, client = at_registry(b"x", layer(**{PATH: FIRST}), sizes=[_nim_manifest_sources.LAYER_MOST + 1, 100])
    assert found is not None and found.certain
    many = [_nim_manifest_sources.LAYER_MOST] * 9
    assert len(at_registry(*[b""] * 9, sizes=many)[1].asked) == 4


def test_layers_that_cannot_be_read_leave_a_doubt() -> None:
    bomb = gzip.compress(b"\0" * (_nim_manifest_sources.UNPACKED_MOST + 1))
    for broken in (b"\x28\xb5\x2f\xfd zstd", layer(**{PATH: FIRST})[:-40], gzip.compress(b"no tar" * 200), bomb):
        found, _client = at_registry(layer(**{PATH: FIRST}), broken)
        assert tps(found) == [2] and found is not None and not found.certain


@given(st.binary(max_size=600))
def test_no_layer_is_an_error(data: bytes) -> None:
    at_registry(data, gzip.compress(data), layer(**{PATH: FIRST})[: len(data)] + data)
