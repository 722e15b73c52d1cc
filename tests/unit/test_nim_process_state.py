# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What Docker says about a container."""

from __future__ import annotations

from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_process_state import parse_time


def test_docker_times() -> None:
    assert parse_time("1970-01-01T00:01:00.5Z") == 60.5
    assert parse_time("0001-01-01T00:00:00Z") is None
    assert parse_time("") is None
