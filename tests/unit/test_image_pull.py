# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Docker's pull: its errors and its progress."""

from __future__ import annotations

import json
import pathlib
import types
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_pull import (
    PULL_TRANSIENT,
    PullProgress,
    Standstill,
    progress_text,
    pull_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from image_world import (
    LLAMA,
)


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
        # containerd's image store: from Engine 28.1 on, moby (daemon/containerd/registry_errors.go) leaves of a registry's
        # error its message, and of one with its code's own message the code, twice.
        ("error from registry: unauthorized\nunauthorized", "bad_key"),
        ("error from registry: unauthorized to access repository: nim/x, action: pull", "bad_key"),
        ("error from registry: authentication required - unknown user", "bad_key"),
        ("authentication required - incorrect username or password", "bad_key"),
        ("error from registry: Access Denied", "no_entitlement"),
        ("error from registry: denied\ndenied", "no_entitlement"),
        ("requested access to the resource is denied - terms not accepted", "no_entitlement"),
        ("error from registry: too many requests - try later", "rate_limit"),
        ("error from registry: toomanyrequests\ntoomanyrequests", "rate_limit"),
        (
            "error from registry: You have reached your unauthenticated pull rate limit. "
            "https://www.docker.com/increase-rate-limit",
            "rate_limit",
        ),
        ("error from registry: Rate exceeded", "rate_limit"),
        ("error from registry: service unavailable - maintenance", "registry_unreachable"),
        ("error from registry: unavailable\nunavailable", "registry_unreachable"),
        ("error from registry: internal server error", "registry_unreachable"),
        ("error from registry: unknown\nunknown", "registry_unreachable"),
        ("error from registry: manifest unknown", "no_such_tag"),
        ("error from registry: repository name not known to registry", "no_such_repository"),
        ("error from registry: blob unknown to registry", "registry_error"),
        ("error from registry: Unavailable For Legal Reasons", "legal"),
        ("error from registry: Payment Required", "no_entitlement"),
        ("error from registry: teapot", "pull_failed"),
        # What is no error of the OCI form stays as containerd tells it.
        (
            'failed to resolve reference "nvcr.io/nim/x@sha256:0": nvcr.io/nim/x@sha256:0: not found',
            "no_such_tag",
        ),
        (
            "failed to copy: httpReadSeeker: failed open: could not fetch content descriptor sha256:0 "
            "(application/vnd.oci.image.layer.v1.tar+gzip) from remote: not found",
            "registry_error",
        ),
        (
            'unknown: failed to resolve reference "nvcr.io/nim/x@sha256:0": unexpected status from HEAD request to '
            "https://nvcr.io/v2/nim/x/manifests/sha256:0: 401 Unauthorized",
            "bad_key",
        ),
        (
            'unknown: failed to resolve reference "nvcr.io/nim/x@sha256:0": unexpected status from HEAD request to '
            "https://nvcr.io/v2/nim/x/manifests/sha256:0: 403 Forbidden",
            "no_entitlement",
        ),
        (
            "unknown: failed to copy: httpReadSeeker: failed open: unexpected status from GET request to "
            "https://nvcr.io/v2/nim/x/blobs/sha256:0: 429 Too Many Requests",
            "rate_limit",
        ),
        (
            "unknown: failed to copy: httpReadSeeker: failed open: unexpected status from GET request to "
            "https://nvcr.io/v2/nim/x/blobs/sha256:0: 502 Bad Gateway",
            "registry_unreachable",
        ),
        (
            'failed to resolve reference "x/y@sha256:0": pull access denied, repository does not exist or may require '
            "authorization: server message: insufficient_scope: authorization failed",
            "bad_key",
        ),
        ("failed to authorize: failed to handle basic auth because missing username or secret", "bad_key"),
        (
            'failed to resolve reference "x/y@sha256:0": failed to do request: Head "https://x/v2/y/manifests/sha256:0": '
            "dial tcp 1.2.3.4:443: i/o timeout",
            "registry_unreachable",
        ),
        (
            'failed to copy: httpReadSeeker: failed open: failed to do request: Get "https://x/blob": EOF',
            "registry_unreachable",
        ),
        (
            'failed to do request: Get "https://x/blob": write tcp 1.2.3.4:5->6.7.8.9:443: write: broken pipe',
            "registry_unreachable",
        ),
        ("failed to copy: read tcp 1.2.3.4:5->6.7.8.9:443: read: connection timed out", "registry_unreachable"),
        (
            'failed commit on ref "layer-sha256:0": "layer-sha256:0" failed size validation: 1 != 2: failed precondition',
            "registry_unreachable",
        ),
        (
            'failed to do request: Head "https://x/v2/y": tls: failed to verify certificate: x509: certificate has expired',
            "tls_error",
        ),
        (
            'failed to do request: Head "https://x/v2/y": http: server gave HTTP response to HTTPS client',
            "tls_error",
        ),
        ("no match for platform in manifest sha256:0: not found", "architecture"),
        (
            "no matching manifest for linux/arm64 in the manifest list entries: no match for platform in manifest: "
            "not found",
            "architecture",
        ),
        (
            "failed to extract layer (application/vnd.oci.image.layer.v1.tar+gzip sha256:0) to overlayfs as x: write "
            "/var/lib/containerd/x: no space left on device: unknown",
            "disk_full",
        ),
        ("failed to copy: write /var/lib/containerd/ingest/x/data: disk quota exceeded", "disk_full"),
        # containerd or the whole daemon goes in the middle of a pull: nothing that the registry did.
        (
            "failed to copy: rpc error: code = Canceled desc = grpc: the client connection is closing",
            "docker_unavailable",
        ),
        ("failed to get status: grpc: the client connection is closing: context canceled", "docker_unavailable"),
        ("failed to copy: context canceled", "docker_unavailable"),
        ("rpc error: code = Unavailable desc = error reading from server: EOF", "docker_unavailable"),
        ("error reading from server: EOF: unavailable", "docker_unavailable"),
        (
            'connection error: desc = "transport: Error while dialing: dial unix '
            '/var/run/docker/containerd/containerd.sock: connect: connection refused": unavailable',
            "docker_unavailable",
        ),
    ],
)
def test_errors_of_the_daemon(text: str, reason: str) -> None:
    error = pull_error(LLAMA, text)
    assert error.reason == reason
    assert error.message.startswith("Pulling %s failed: %s" % (LLAMA, text[:20]))
    assert error.message.endswith(".") and "\n" not in error.message


def test_what_goes_by_itself_is_tried_again() -> None:
    for text in (
        "error from registry: too many requests",
        "error from registry: unavailable\nunavailable",
        "rpc error: code = Canceled desc = grpc: the client connection is closing",
    ):
        assert pull_error(LLAMA, text).reason in PULL_TRANSIENT
    for text in ("error from registry: unauthorized\nunauthorized", "error from registry: Access Denied"):
        assert pull_error(LLAMA, text).reason not in PULL_TRANSIENT


# -- a pull that comes to a halt --------------------------------------------------------------------------

ONE, TWO = "a" * 12, "b" * 12


def _event(layer: str, status: str, current: t.Any = None, total: t.Any = 100, **detail: t.Any) -> dict[str, t.Any]:
    if current is None:
        return {"id": layer, "status": status}
    return {"id": layer, "status": status, "progressDetail": {"current": current, "total": total, **detail}}


def _stood(*events: dict[str, t.Any], every: float = 60.0) -> float:
    """How long it stands after the last event, with as many seconds between two of them."""
    watch = Standstill()
    return [watch.feed(event, number * every) for number, event in enumerate(events)][-1]


def test_a_download_that_is_told_again_and_again_stands_still() -> None:
    # containerd's image store tells of every layer ten times a second, whether or not anything came.
    watch = Standstill()
    for tick in range(7000):
        stood = watch.feed(_event(ONE if tick % 2 else TWO, "Downloading", 40 + tick % 2), tick / 10)
    assert stood == pytest.approx(699.9, abs=0.2)


def test_any_progress_ends_the_standstill() -> None:
    same = [_event(ONE, "Downloading", 40), _event(TWO, "Downloading", 7)]
    assert _stood(*same * 5) == 8 * 60
    for other in (
        _event(ONE, "Downloading", 41),
        # A connection that is made anew begins again.
        _event(ONE, "Downloading", 1),
        _event(ONE, "Download complete"),
        _event("c" * 12, "Pulling fs layer"),
        _event(ONE, "Retrying in 5 seconds"),
        {"status": "Status: Downloaded newer image"},
    ):
        assert _stood(*same * 5, other) == 0
        assert _stood(*same * 5, other, other, _event(TWO, "Downloading", 7)) <= 2 * 60


@pytest.mark.parametrize(
    "work",
    [
        [_event(ONE, "Extracting", 1, 0, units="s")],
        [_event(ONE, "Extracting", 5)],
        [_event(ONE, "Extracting")],
        [_event(ONE, "Verifying Checksum")],
        # All there, and on its way to the disk.
        [_event(ONE, "Downloading", 100)],
        [_event(ONE, "Download complete"), _event(ONE, "Pull complete")],
    ],
)
def test_work_on_the_host_is_no_standstill(work: list[dict[str, t.Any]]) -> None:
    assert _stood(*work * 30) == 0


@pytest.mark.parametrize("status", ["Extracting", "Verifying Checksum"])
def test_no_download_stands_while_a_layer_is_worked_on(status: str) -> None:
    waits = [_event(TWO, "Downloading", 7)] * 30
    working = [_event(ONE, status)]
    assert _stood(*working, *waits) == 0
    # What counts begins with the end of that work.
    assert _stood(*working, *waits, _event(ONE, "Pull complete"), *waits) == 30 * 60


def test_the_recorded_pull_never_stands(recording: types.SimpleNamespace) -> None:
    watch = Standstill()
    assert max(watch.feed(event, event["at"]) for event in recording.events) < 1


@pytest.mark.parametrize(
    "event", [{}, {"id": 7}, {"status": []}, {"status": "Downloading", "progressDetail": {"current": {}, "total": "x"}}]
)
def test_an_event_of_no_known_shape_does_not_upset_it(event: dict[str, t.Any]) -> None:
    assert _stood(event, event) >= 0


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
