# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which services are waited for."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._health_target import parse_targets


def test_targets_from_nim_models() -> None:
    targets = parse_targets(
        [
            {"name": "a", "image": "nvcr.io/nim/x:1", "gpus": 1},
            {"name": "b", "port": "8001", "bind_address": "::", "served_model_name": "one, two", "start_timeout": 60},
            {"name": "c", "state": "stopped"},
            {"name": "d", "bind_address": "10.0.0.5", "environment": {"NIM_SSL_MODE": "TLS"}, "completion": "none"},
        ]
    )
    assert [(one.unit, one.url, one.expected, one.completion) for one in targets] == [
        ("nim-a.service", "http://127.0.0.1:8000", (), "auto"),
        ("nim-b.service", "http://[::1]:8001", ("one", "two"), "auto"),
        ("nim-d.service", "https://10.0.0.5:8000", (), "none"),
    ]
    assert targets[1].start_timeout == 60


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (["a"], "models[0] = 'a'"),
        ([{}], "models[0].name = None"),
        ([{"name": "a b"}], "models[0].name = 'a b'"),
        ([{"name": "a"}, {"name": "a"}], "models[1].name = 'a': is there twice"),
        ([{"name": "a", "port": 0}], "models[0].port = 0"),
        ([{"name": "a", "port": True}], "models[0].port = True"),
        ([{"name": "a", "start_timeout": "30m"}], "models[0].start_timeout = '30m'"),
        ([{"name": "a", "completion": "poem"}], "use auto, chat, completion, none"),
    ],
)
def test_bad_options(entries: list[t.Any], says: str) -> None:
    with pytest.raises(FleetError) as caught:
        parse_targets(entries)
    assert caught.value.reason == "invalid_option"
    assert says in caught.value.message
