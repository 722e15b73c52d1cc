# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The base of the tables of a fleet, and its file on the controller."""

from __future__ import annotations

import pathlib

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.gpu_fleet.nim.plugins.module_utils._text_table import shorten, text_table, value_text
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._fleet_table import write_file
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._plain import returned


def test_first_cells_are_not_repeated() -> None:
    lines = [("gpu01", "2 x H200", "llama"), ("gpu01", "2 x H200", "nemo"), ("gpu02", "2 x H200", "llama")]
    assert text_table(("HOST", "GPUS", "NIM"), lines, group=2) == [
        "HOST   GPUS      NIM",
        "gpu01  2 x H200  llama",
        "                 nemo",
        "gpu02  2 x H200  llama",
    ]
    assert text_table(("HOST", "GPUS", "NIM"), lines)[2] == "gpu01  2 x H200  nemo"


def test_cells() -> None:
    assert value_text(None) == "-"
    assert value_text({"b": 1, "a": [2]}) == '{"a": [2], "b": 1}'
    assert shorten("a \n b", 9) == "a b"
    assert shorten("abcdef", 4) == "abc…"


def test_braces_of_a_module_are_text() -> None:
    assert returned({"a": ("{{ x }}", None, 1.5, True)}) == {"a": ["{{ x }}", None, 1.5, True]}


def test_a_file_is_replaced_as_a_whole(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    write_file(str(path), "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "folder").mkdir()
    with pytest.raises(AnsibleActionFail, match="Is a directory"):
        write_file(str(tmp_path / "folder"), "x")
    with pytest.raises(AnsibleActionFail, match="No such file"):
        write_file(str(tmp_path / "nowhere/plan.json"), "x")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "plan.json"]
