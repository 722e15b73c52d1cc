# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The text of daemon.json: merge, removal, and what a key needs to get into effect."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _daemon_json as dj
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from hypothesis import given, settings
from hypothesis import strategies as st

NVIDIA = {"runtimes": {"nvidia": {"path": "nvidia-container-runtime"}}}


@pytest.mark.parametrize(
    ("before", "wanted", "after"),
    [
        # A: no file, an empty one, a blank one
        (
            None,
            NVIDIA,
            '{\n  "runtimes": {\n    "nvidia": {\n      "path": "nvidia-container-runtime"\n    }\n  }\n}\n',
        ),
        ("", {"debug": True}, '{\n  "debug": true\n}\n'),
        ("{}", {"debug": True}, '{\n  "debug": true\n}'),
        # B: another runtime stays, on one line or many
        (
            '{ "log-driver": "journald", "runtimes": { "kata": { "path": "/opt/kata" } } }',
            {"default-runtime": "nvidia", **NVIDIA},
            '{ "log-driver": "journald", "runtimes": { "kata": { "path": "/opt/kata" }, "nvidia": {"path": '
            '"nvidia-container-runtime"} }, "default-runtime": "nvidia" }',
        ),
        # C: another feature stays
        (
            '{\n\t"features": {\n\t\t"containerd-snapshotter": true\n\t}\n}\n',
            {"features": {"cdi": True}},
            '{\n\t"features": {\n\t\t"containerd-snapshotter": true,\n\t\t"cdi": true\n\t}\n}\n',
        ),
        # odd layout of keys that are not ours is kept to the character
        (
            '{\n    "dns":["1.1.1.1",\n  "9.9.9.9"],\n    "debug" : false\n}',
            {"debug": True},
            '{\n    "dns":["1.1.1.1",\n  "9.9.9.9"],\n    "debug" : true\n}',
        ),
        # custom arguments of our own runtime are somebody's work
        (
            '{"runtimes": {"nvidia": {"path": "old", "runtimeArgs": ["--x"]}}}',
            NVIDIA,
            '{"runtimes": {"nvidia": {"path": "nvidia-container-runtime", "runtimeArgs": ["--x"]}}}',
        ),
        ('\ufeff{"a": 1}', {"debug": True}, '\ufeff{"a": 1, "debug": true}'),
        (
            '{\n  "runtimes": {}\n}',
            NVIDIA,
            '{\n  "runtimes": {\n    "nvidia": {\n      "path": "nvidia-container-runtime"\n    }\n  }\n}',
        ),
    ],
)
def test_merge_samples(before: str | None, wanted: dict[str, t.Any], after: str) -> None:
    assert dj.merge(before, dj.edits(dj.parse(before), wanted)) == after


def test_true_is_not_one() -> None:
    assert dj.edits({"debug": 1}, {"debug": True}) == [(("debug",), True)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["debug", "features", "runtimes", "log-opts", "dns", "labels", "x", "y"])
documents = st.dictionaries(keys, json_values, max_size=6)
layouts = st.sampled_from([None, 1, 2, 4, "\t"])


def merged(document: t.Any, wanted: t.Any) -> t.Any:
    if isinstance(document, dict) and isinstance(wanted, dict):
        result = dict(document)
        for key, value in wanted.items():
            result[key] = merged(document[key], value) if key in document else value
        return result
    return wanted


@settings(max_examples=300, deadline=None)
@given(documents, documents, layouts)
def test_merge_is_what_it_says(document: dict[str, t.Any], wanted: dict[str, t.Any], layout: t.Any) -> None:
    text = json.dumps(document, indent=layout)
    after = dj.merge(text, dj.edits(document, wanted))
    result = dj.parse(after)
    assert result == merged(document, wanted)
    # order of what was there; foreign keys never lost; a second merge finds nothing
    assert [key for key in result if key in document] == list(document)
    assert dj.edits(result, wanted) == []
    assert dj.merge(after, dj.expand(dj.edits(result, wanted))) == after


@settings(max_examples=200, deadline=None)
@given(documents, st.lists(keys, max_size=3), layouts)
def test_removal_takes_only_what_it_names(document: dict[str, t.Any], absent: list[str], layout: t.Any) -> None:
    text = json.dumps(document, indent=layout)
    after = dj.parse(dj.merge(text, [((key,), dj.ABSENT) for key in absent]))
    assert after == {key: value for key, value in document.items() if key not in absent}


@pytest.mark.parametrize(
    ("path", "removal", "action"),
    [
        (("runtimes", "nvidia"), False, "reload"),
        (("runtimes", "nvidia"), True, "reload"),
        (("runtimes",), True, "restart"),
        (("default-runtime",), False, "reload"),
        (("default-runtime",), True, "restart"),
        (("live-restore",), False, "reload"),
        (("live-restore",), True, "restart"),
        (("features", "cdi"), False, "restart"),
        (("features", "containerd-snapshotter"), False, "restart"),
        (("features", "buildkit"), False, "reload"),
        (("features", "buildkit"), True, "reload"),
        (("insecure-registries",), False, "reload"),
        (("max-concurrent-downloads",), True, "reload"),
        (("log-driver",), False, "restart"),
        (("log-opts", "max-size"), False, "restart"),
        (("exec-opts",), False, "restart"),
        (("data-root",), False, "restart"),
        (("default-address-pools",), False, "restart"),
    ],
)
def test_reload_or_restart(path: tuple[str, ...], removal: bool, action: str) -> None:
    assert dj.action_for(path, removal) == action


# -- taking our own keys out again

OWN = {"live-restore": True, "features": {"cdi": True}, "log-opts": {"max-size": "10m"}, "dns": ["192.0.2.53"]}


@pytest.mark.parametrize(
    ("before", "own", "after"),
    [
        # Nothing is left: the file may go.
        ('{"live-restore": true}\n', OWN, None),
        ('{"live-restore": true, "runtimes": {"nvidia": {"path": "nvidia-container-runtime"}}}', OWN, None),
        ('{"features": {"cdi": true}, "dns": ["192.0.2.53"], "log-opts": {"max-size": "10m"}}', OWN, None),
        # What removing the runtime has left.
        ('{"live-restore": true, "runtimes": {}}', OWN, None),
        ('{"runtimes": {}, "default-runtime": "runc"}', {"default-runtime": "nvidia"}, None),
        # Another value is somebody else's, and so is what stands beside ours.
        ('{"live-restore": false}', OWN, '{"live-restore": false}'),
        ('{"debug": true,\n "live-restore": true}\n', OWN, '{"debug": true}\n'),
        ('{"features": {"cdi": true, "buildkit": false}}', OWN, '{"features": {"buildkit": false}}'),
        ('{"features": {"cdi": true}}', {}, '{"features": {"cdi": true}}'),
        ('{"runtimes": {"nvidia": {"path": "x"}, "kata": {"path": "k"}}}', {}, '{"runtimes": {"kata": {"path": "k"}}}'),
        ('{"default-runtime": "runc"}', OWN, '{"default-runtime": "runc"}'),
        ('{"default-runtime": "kata", "dns": ["192.0.2.1"]}', OWN, '{"default-runtime": "kata", "dns": ["192.0.2.1"]}'),
        # No container would start with a default runtime that is not defined.
        ('{"runtimes": {"nvidia": {"path": "x"}}, "default-runtime": "nvidia", "debug": true}', {}, '{"debug": true}'),
        # Nothing to take out: every character stays, a file that was empty before too.
        ('{"debug": true, "runtimes": {}}', OWN, '{"debug": true, "runtimes": {}}'),
        ("{ }\n", OWN, "{ }\n"),
        ("", OWN, ""),
    ],
)
def test_our_own_keys_are_taken_out(before: str, own: dict[str, t.Any], after: str | None) -> None:
    assert dj.taken_out(before, own) == after


def test_a_broken_file_is_not_edited() -> None:
    with pytest.raises(FleetError) as caught:
        dj.taken_out('{"live-restore": true', OWN)
    assert caught.value.reason == "daemon_json_invalid"
