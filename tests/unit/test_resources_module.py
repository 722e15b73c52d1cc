# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Modules whose options are those of resources say what is missing before they look at a host."""

from __future__ import annotations

import json
import types

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpu_fleet.nim.plugins.modules import driver_upgrade, gpu_host_plan, nim_deploy


@pytest.mark.parametrize(
    ("module", "missing"),
    [(driver_upgrade, "nvidia_driver"), (nim_deploy, "nim_service"), (gpu_host_plan, "docker_engine")],
)
def test_nothing_wanted_is_refused(module: types.ModuleType, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    with patch_module_args({}), pytest.raises(SystemExit):
        module.main()
    answer = json.loads(capsys.readouterr().out)
    assert answer["failed"] and missing in answer["msg"]
