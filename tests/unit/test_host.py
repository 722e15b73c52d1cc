# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The real host, as far as it can be tried anywhere."""

from __future__ import annotations

import errno
import os
import pathlib

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host


def test_a_program_is_found_where_run_finds_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "driver-tool"
    program.write_text("#!/bin/sh\necho here\n")
    program.chmod(0o755)
    assert Host().which("driver-tool") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Host().which("driver-tool") == str(program)
    assert Host().run(["driver-tool"]).stdout == "here\n"
    assert Host().which("sh") in ("/usr/bin/sh", "/bin/sh")


def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "directory" / "full").mkdir(parents=True)
    for path, wrong in (
        ("file/x.json", "Not a directory; move the file in the place of its directory away"),
        ("directory", "Is a directory; move the directory in its place away"),
        ("no/x", "No such file or directory; create its directory"),
    ):
        with pytest.raises(FleetError) as caught:
            Host().write_file(str(tmp_path / path), "x", mode=0o644)
        assert caught.value.reason == "write_failed"
        assert wrong + " and run again." in caught.value.message


def test_a_path_that_cannot_be_removed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system", path)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(FleetError) as caught:
        Host().remove("/etc/nim/x")
    assert caught.value.reason == "write_failed"
    assert caught.value.message == (
        "Removing /etc/nim/x failed: Read-only file system; mount its file system writable and run again."
    )


def test_what_cannot_be_removed_below_a_directory_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    (tmp_path / "cache" / "blobs" / "model").touch()
    unlink = os.unlink

    def refuse(path: str, **options: object) -> None:
        if path.endswith("model"):
            raise OSError(errno.EPERM, "Operation not permitted", path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(
        FleetError, match=r"^Removing \S+/cache failed at \S*model: .*; become root, or see its attributes"
    ):
        Host().remove(str(tmp_path / "cache"))


def test_a_directory_that_somebody_else_removes_too_is_gone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "cache" / name).touch()
    scandir, taken = os.scandir, []

    def race(*arguments: object, **options: object) -> object:
        found = scandir(*arguments, **options)  # type: ignore[call-overload]
        if not taken:
            taken.append(True)
            (tmp_path / "cache" / "a").unlink()
        return found

    monkeypatch.setattr(os, "scandir", race)
    Host().remove(str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_what_is_no_file_keeps_nobody_waiting(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(FleetError, match="it is no file") as caught:
            Host().read_bytes(str(tmp_path / name))
        assert caught.value.reason == "unreadable"
    (tmp_path / "off").symlink_to("/dev/null")
    assert Host().read_bytes(str(tmp_path / "off")) == b""
    (tmp_path / "file").write_text("content")
    assert Host().read_text(str(tmp_path / "file")) == "content"
    assert Host().read_bytes(str(tmp_path)) is None
    assert Host().read_bytes(str(tmp_path / "none")) is None
    assert Host().read_text("/proc/self/status")


def test_a_program_runs_while_something_else_is_done() -> None:
    started = Host().start(["sh", "-c", "echo out; echo err >&2; read line || echo no input; exit 3"])
    assert started is not None
    result = started.result()
    assert (result.rc, result.stdout, result.stderr) == (3, "out\nno input\n", "err\n")
    assert result == Host().run(["sh", "-c", "echo out; echo err >&2; read line || echo no input; exit 3"])


def test_a_started_program_that_does_not_end_is_killed() -> None:
    started = Host().start(["sleep", "60"])
    assert started is not None
    result = started.result(timeout=0.05)
    assert (result.rc, result.stderr) == (124, "sleep: no end after 0.05 seconds")
    assert result == Host().run(["sleep", "60"], timeout=0.05)


def test_what_cannot_be_started_is_left_to_the_one_who_asks(tmp_path: pathlib.Path) -> None:
    assert Host().start([str(tmp_path / "none")]) is None
    assert Host().start([str(tmp_path)]) is None
