# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The package of a module is kept as long as nothing has changed that is in it."""

from __future__ import annotations

import os
import pathlib

import pytest
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils import _payload
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._payload import Payload

NAME = "ansible_collections.gpu_fleet.nim.plugins.modules.look-ZIP_DEFLATED-none"


@pytest.fixture
def plugins(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    directory = tmp_path / "plugins"
    for name in ("modules/look.py", "module_utils/_one.py", "module_utils/_two.py"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("pass\n")
    monkeypatch.setattr(_payload, "_PLUGINS", str(directory))
    monkeypatch.setattr(_payload, "DEFAULT_MODULE_UTILS_PATH", [])
    return directory


class Run:
    """A run of ansible-playbook: its own directory of packages, the same home."""

    def __init__(self, tmp_path: pathlib.Path, number: int) -> None:
        self.local = tmp_path / ("run%d" % number)
        self.payload = Payload("look", local=str(self.local), home=str(tmp_path / "home"))
        self.payload.put()

    def packs(self, content: str) -> None:
        """ansible-core packs the module, with its leftovers."""
        self.local.mkdir(exist_ok=True)
        (self.local / NAME).write_text(content)
        (self.local / (NAME + ".lock")).write_text("")
        (self.local / (NAME.replace("look", "other"))).write_text("another module")
        self.payload.keep()

    @property
    def given(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.local.iterdir()} if self.local.exists() else {}


def test_the_next_run_has_it(plugins: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first = Run(tmp_path, 1)
    assert first.given == {}
    first.packs("package")
    assert Run(tmp_path, 2).given == {NAME: "package"}
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["modules/look.py", "module_utils/_two.py", "module_utils/_new.py"])
def test_not_after_a_change(plugins: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
    Run(tmp_path, 1).packs("package")
    (plugins / name).write_text("Pass\n")
    os.utime(plugins / name, ns=(1, 1))
    assert Run(tmp_path, 2).given == {}


def test_not_for_another_ansible(
    plugins: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(tmp_path, 1).packs("package")
    monkeypatch.setattr(_payload, "core_version", "2.99.0")
    assert Run(tmp_path, 2).given == {}


def test_not_where_somebody_has_module_utils_of_their_own(
    plugins: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/basic.py").write_text("")
    monkeypatch.setattr(_payload, "DEFAULT_MODULE_UTILS_PATH", [str(tmp_path / "own")])
    Run(tmp_path, 1).packs("package")
    assert Run(tmp_path, 2).given == {}


def test_what_is_there_already_stays(plugins: pathlib.Path, tmp_path: pathlib.Path) -> None:
    Run(tmp_path, 1).packs("package")
    second = Run(tmp_path, 2)
    second.packs("packed by another worker")
    second.payload.put()
    assert second.given[NAME] == "packed by another worker"
    assert Run(tmp_path, 3).given == {NAME: "package"}


def test_a_few_are_kept(plugins: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for number in range(7):
        (plugins / "modules/look.py").write_text("x" * number)
        Run(tmp_path, number).packs("package %d" % number)
    assert len(list((tmp_path / "home").iterdir())) == _payload._KEPT


def test_a_home_that_cannot_be_written_disturbs_nobody(plugins: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "home").write_text("no directory")
    Run(tmp_path, 1).packs("package")
    assert Run(tmp_path, 2).given == {}


def test_nothing_is_taken_where_others_can_write(plugins: pathlib.Path, tmp_path: pathlib.Path) -> None:
    Run(tmp_path, 1).packs("package")
    home = tmp_path / "home"
    for directory in (home, *home.iterdir()):
        directory.chmod(0o770)
        assert Run(tmp_path, 2).given == {}
        directory.chmod(0o700)
    assert Run(tmp_path, 3).given == {NAME: "package"}
