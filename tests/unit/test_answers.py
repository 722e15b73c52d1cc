# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Answers of hosts that are damaged or in foreign hands: a row of their own, and nothing of the controller or of others."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import pathlib
import re
import tarfile
import types
import typing as t

import pytest
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible_collections.gpu_fleet.nim.plugins.action import (
    fleet_diagnosis,
    fleet_plan,
    fleet_preflight,
    fleet_status,
    gpu_host_diagnosis,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _support_bundle
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._support_bundle import check_archive, unwrap, wrap
from ansible_collections.gpu_fleet.nim.plugins.module_utils._untrusted import MapOf, OneOf
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils import _answers
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._answers import BAD_ANSWER, read_answer
from fuzzing import mutated, values
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

PLAN = {
    "gpu": True,
    "changes": [
        {
            "resource": "docker_daemon",
            "what": "running daemon",
            "from": None,
            "to": {"live-restore": True},
            "why": "it is off",
            "disruption": "reload",
            "blocked": None,
            "after": None,
        }
    ],
    "errors": [{"resource": "nvidia_driver", "reason": "package_failed", "message": "It failed.", "after": None}],
    "notes": ["nim_image: nobody knows."],
}
FACTS = {
    "os": {"name": "Ubuntu"},
    "kernel": "6.8",
    "driver": {"loaded": "580.95.05", "flavour": "open", "on_disk": "580.95.05"},
    "cuda_version": "13.0",
    "docker": {"installed": True, "version": "29.4.3"},
    "container_toolkit": {"version": "1.20.0"},
    "gpus": [
        {"index": 0, "uuid": "GPU-0", "name": "NVIDIA H200", "memory_total_mib": 143771, "memory_used_mib": 64, "x": []}
    ],
    "pci_gpus": [{"architecture": "Hopper"}],
    "nim": [
        {
            "name": "llama",
            "image": "nvcr.io/nim/x:1",
            "digest": "sha256:0123456789abcdef",
            "gpus": ["GPU-0"],
            "port": 8000,
            "state": "ready",
            "ready": True,
            "seconds_to_ready": 94.2,
            "url": "http://127.0.0.1:8000",
            "model_id": "x",
            "message": None,
        }
    ],
    "errors": {"ports": "ss failed"},
}
DIAGNOSIS = {
    "worst": "failed",
    "findings": [
        {
            "severity": "failed",
            "layer": "gpu",
            "model": None,
            "gpu": "GPU-0",
            "reason": "xid",
            "cause": "Xid 79",
            "remedy": "reboot",
            "evidence": ["NVRM: Xid"],
            "signature": None,
        }
    ],
    "models": [],
    "bundle": "/tmp/gpu01.tar.gz",
}
PREFLIGHT = {
    "verdict": "refused",
    "checks": [
        {
            "check": "memory_repair",
            "verdict": "refused",
            "message": "It is broken.",
            "remedy": "reboot",
            "reason": "row_remap_pending",
            "gpu": "GPU-0",
            "subject": "",
        }
    ],
}
TABLES: dict[str, tuple[t.Any, dict[str, t.Any]]] = {
    "plan": (fleet_plan, PLAN),
    "status": (fleet_status, FACTS),
    "diagnosis": (fleet_diagnosis, DIAGNOSIS),
    "preflight": (fleet_preflight, PREFLIGHT),
}


class Shown:
    """One call of a table's action plugin, with everything of Ansible around it replaced."""

    def __init__(self, table: str, looks: dict[str, t.Any], tmp_path: pathlib.Path, **more: t.Any) -> None:
        self.lines: list[str] = []
        module, _sound = TABLES[table]
        plugin = module.ActionModule.__new__(module.ActionModule)
        args = {"variable": "look", "output": str(tmp_path / "rows.json"), **more}
        if table == "plan":
            args.update(report=str(tmp_path / "report.html"), facts="facts")
        if table == "preflight":
            args["fail_on_refusal"] = False
        plugin._task = types.SimpleNamespace(args=args, check_mode=False, async_val=0, action=table, diff=False)
        plugin._connection = types.SimpleNamespace(_shell=types.SimpleNamespace(tmpdir="/tmp/x"))
        plugin._display = types.SimpleNamespace(display=self.lines.append)
        plugin.bundles = []
        hosts = {name: {"look": look, "facts": more.get("facts_of", FACTS)} for name, look in looks.items()}
        args.pop("facts_of", None)
        result = plugin.run(None, {"ansible_play_hosts_all": list(looks), "hostvars": hosts})
        self.rows: list[dict[str, t.Any]] = result["rows"]
        self.text = self.lines[0]
        self.text.encode("utf-8")
        assert json.loads((tmp_path / "rows.json").read_text()) == self.rows
        self.page = (tmp_path / "report.html").read_text(encoding="utf-8") if table == "plan" else ""

    def of(self, host: str) -> list[dict[str, t.Any]]:
        return [row for row in self.rows if row["host"] == host]


@pytest.fixture
def shown(tmp_path: pathlib.Path) -> t.Callable[..., Shown]:
    return lambda table, looks, **more: Shown(table, looks, tmp_path, **more)


def bad_rows(rows: t.Sequence[dict[str, t.Any]]) -> bool:
    (row,) = rows
    words = " ".join(str(row.get(key)) for key in ("state", "verdict", "reason", "message", "cause"))
    return ("look failed" in words or BAD_ANSWER in words) and "none of the module's" in words


@pytest.mark.parametrize("table", sorted(TABLES))
def test_a_sound_answer_is_no_bad_one(table: str, shown: t.Callable[..., Shown]) -> None:
    found = shown(table, {"gpu01": TABLES[table][1]})
    assert "none of the module's" not in found.text
    assert len(found.of("gpu01")) == (2 if table == "plan" else 1)


@pytest.mark.parametrize(
    ("table", "path", "value"),
    [
        ("plan", ("changes",), "ab"),
        ("plan", ("changes", 0), "ab"),
        ("plan", ("changes", 0, "disruption"), "apocalypse"),
        ("plan", ("changes", 0, "disruption"), None),
        ("plan", ("changes", 0, "why"), {"a": 1}),
        ("plan", ("errors",), 7),
        ("plan", ("notes",), 7),
        ("plan", ("notes",), ["x" * 5_000_000]),
        ("status", ("notes",), 7),
        ("status", ("gpus",), {"a": 1}),
        ("status", ("gpus", 0, "memory_used_mib"), 10**400),
        ("status", ("nim", 0, "seconds_to_ready"), "soon"),
        ("status", ("nim", 0, "gpus"), [["GPU-0"]]),
        ("status", ("driver",), ["580"]),
        ("status", ("errors",), {"a": []}),
        ("diagnosis", ("findings",), {"a": 1}),
        ("diagnosis", ("findings", 0, "severity"), "dead"),
        ("diagnosis", ("findings", 0, "severity"), ["failed"]),
        ("diagnosis", ("findings", 0, "evidence"), 7),
        ("diagnosis", ("findings", 0, "evidence"), [None]),
        ("diagnosis", ("bundle",), 7),
        ("diagnosis", ("notes",), True),
        ("preflight", ("checks",), 7),
        ("preflight", ("checks", 0, "verdict"), "unreachable"),
        ("preflight", ("checks", 0, "verdict"), None),
        ("preflight", ("checks", 0, "message"), []),
        ("preflight", ("notes",), [{"a": 1}]),
    ],
)
def test_an_answer_of_another_shape_is_a_failure_of_its_host_alone(
    table: str, path: tuple[t.Any, ...], value: t.Any, shown: t.Callable[..., Shown]
) -> None:
    sound = TABLES[table][1]
    odd = copy.deepcopy(sound)
    place: t.Any = odd
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    found = shown(table, {"gpu01": sound, "gpu02": odd, "gpu03": sound})
    assert bad_rows(found.of("gpu02"))
    for host in ("gpu01", "gpu03"):
        assert found.of(host) == shown(table, {host: sound}).rows


@pytest.mark.parametrize("table", sorted(TABLES))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_answer_is_a_traceback(table: str, data: st.DataObject, shown: t.Callable[..., Shown]) -> None:
    sound = TABLES[table][1]
    odd = data.draw(mutated(sound, 3) | values, label="answer")
    facts = data.draw(mutated(FACTS, 3) | values, label="facts") if table == "plan" else FACTS
    found = shown(table, {"gpu01": sound, "gpu02": odd}, facts_of=facts)
    assert found.of("gpu01") and found.of("gpu02")


@pytest.mark.parametrize("table", sorted(TABLES))
@pytest.mark.parametrize(
    "look",
    [
        {"failed": True, "msg": ["a", 1], "reason": {"a": 1}},
        {"unreachable": True, "msg": "x" * 5_000_000},
        {"unreachable": True, "msg": 7, "changes": 7, "checks": 7, "findings": 7, "gpus": 7},
        {"failed": "yes", "module_stdout": "x" * 5_000_000, "msg": None},
        "text",
        None,
        [],
    ],
)
def test_failures_of_any_kind(table: str, look: t.Any, shown: t.Callable[..., Shown]) -> None:
    found = shown(table, {"gpu01": look})
    assert len(found.rows) == 1
    assert len(found.text) < 10_000
    if isinstance(look, dict) and "unreachable" in look:
        assert "unreachable" in found.text


def test_depth_is_a_failure_like_any_other() -> None:
    deep: t.Any = []
    for _level in range(100_000):
        deep = [deep]
    answer = read_answer({"changes": deep}, _answers.PLAN)
    assert answer is not None
    assert "nested too deeply" in answer["msg"]


def filled(shape: t.Any, text: str) -> t.Any:
    """An answer of a shape with a text wherever one may stand."""
    if isinstance(shape, dict):
        return {**{key: filled(inner, text) for key, inner in shape.items()}, "from": text, "to": [text]}
    if isinstance(shape, list):
        return [filled(shape[0], text)]
    if isinstance(shape, MapOf):
        return {text: filled(shape.shape, text)}
    if isinstance(shape, OneOf):
        return shape.words[-1]
    return {str: text, bool: True, float: 5}[shape]


@pytest.mark.parametrize("table", sorted(TABLES))
def test_nothing_that_a_host_says_steers_a_terminal_or_looks_like_another_row(
    table: str, shown: t.Callable[..., Shown]
) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202e\ud800\ngpu99  2 x NVIDIA H200  ready\n"
    found = shown(table, {"gpu01": filled(TABLES[table][0].ActionModule.shape, evil)})
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", found.text)
    assert not [line for line in found.text.splitlines() if line.startswith("gpu99")]
    assert "gpu99" in found.text


def test_nothing_that_a_host_says_becomes_markup(shown: t.Callable[..., Shown]) -> None:
    evil = "<script>alert(1)</script>\"'><b onload=x>{{ 7 * 7 }}"
    found = shown("plan", {"gpu01": filled(_answers.PLAN, evil)}, facts_of=filled(_answers.FACTS, evil))
    failed = shown("plan", {"gpu01": {"failed": True, "msg": evil}, "gpu02": {"unreachable": True, "msg": evil}})
    for page in (found.page, failed.page):
        assert "&lt;script&gt;" in page
        assert not re.search(r"<script|<b onload|\b49\b", page)


class Unresolved(t.Dict[str, t.Any]):
    def get(self, key: str, default: t.Any = None) -> t.Any:
        if key == "ansible_host":
            raise AnsibleError("it is undefined")
        return super().get(key, default)


def test_an_address_that_cannot_be_resolved_hides_no_table(tmp_path: pathlib.Path) -> None:
    variables = Unresolved(look=FACTS, nim_models=7)
    plugin = fleet_status.ActionModule.__new__(fleet_status.ActionModule)
    (row,) = plugin.rows("gpu01", read_answer(FACTS, _answers.FACTS), variables)
    assert row["url"] == "http://gpu01:8000"


# -- support bundles --------------------------------------------------------------------------------


def packed(*members: tarfile.TarInfo, content: bytes = b"text") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for member in members:
            if member.isreg():
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return stream.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


GOOD = packed(entry("gpu01-x/findings.json"), entry("gpu01-x/files/etc/docker/daemon.json"))


def test_a_bundle_is_what_was_wrapped() -> None:
    content = unwrap(wrap(GOOD, ()))
    check_archive(content)
    assert content == GOOD


BAD: dict[str, t.Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"no archive",
    "cut off": lambda: GOOD[:-20],
    "another thing packed": lambda: gzip.compress(b"no archive at all" * 100),
    "far too large": lambda: gzip.compress(b"\0" * 70_000_000, 1),
    "above": lambda: packed(entry("../../etc/cron.d/x")),
    "absolute": lambda: packed(entry("/etc/cron.d/x")),
    "above in the middle": lambda: packed(entry("x/../../y")),
    "name that steers a terminal": lambda: packed(entry("x/\x1b[2J")),
    "link": lambda: packed(entry("x", tarfile.SYMTYPE, "/etc/passwd")),
    "hard link": lambda: packed(entry("x", tarfile.LNKTYPE, "/etc/passwd")),
    "device": lambda: packed(entry("x", tarfile.CHRTYPE)),
    "pipe": lambda: packed(entry("x", tarfile.FIFOTYPE)),
}


@pytest.mark.parametrize("what", BAD)
def test_an_archive_that_is_not_safe_to_open_is_refused(what: str) -> None:
    content = BAD[what]()
    with pytest.raises(FleetError, match="no support bundle and was not stored") as caught:
        check_archive(content)
    assert caught.value.reason == "bundle_failed"


@given(st.lists(st.tuples(st.integers(0, 10_240), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6))
@example([(0, b"\x1f\x8b\x08")])
def test_a_damaged_archive_is_refused_or_harmless(changes: list[tuple[int, bytes]]) -> None:
    plain = bytearray(gzip.decompress(GOOD))
    for place, piece in changes:
        plain[place : place + len(piece)] = piece
    try:
        check_archive(gzip.compress(bytes(plain), 1))
    except FleetError as error:
        assert error.reason == "bundle_failed"


class Bundled:
    """The action plugin with a host that answers whatever it likes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch

    def __call__(self, **answer: t.Any) -> dict[str, t.Any]:
        plugin = gpu_host_diagnosis.ActionModule.__new__(gpu_host_diagnosis.ActionModule)
        plugin._task = types.SimpleNamespace(
            args={"nim_health": {}, "bundle": str(self.folder)}, check_mode=False, async_val=0, action="x", diff=False
        )
        plugin._connection = types.SimpleNamespace(_shell=types.SimpleNamespace(tmpdir="/tmp/x"))
        self.monkeypatch.setattr(plugin, "_execute_module", lambda **given: dict(answer))
        return t.cast("dict[str, t.Any]", plugin.run(None, {"inventory_hostname": "gpu01"}))


@pytest.fixture
def bundled(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Bundled:
    return Bundled(monkeypatch, tmp_path / "bundles")


def test_a_bundle_is_stored_under_a_name_of_the_controller(bundled: Bundled) -> None:
    archive = wrap(GOOD, ())
    result = bundled(findings=[], archive=dict(archive, stamp="20261120T211500Z"), bundle="/etc/passwd")
    assert result["bundle"] == str(bundled.folder / "gpu01-20261120T211500Z.tar.gz")
    for stamp in (
        "../../x",
        7,
        None,
        ["20261120T211500Z"],
        "20261120T211500Z" * 100,
        "\N{FULLWIDTH DIGIT TWO}0261120T211500Z",
    ):
        result = bundled(findings=[], archive=dict(archive, stamp=stamp))
        assert re.fullmatch(r"gpu01-\d{8}T\d{6}Z\.tar\.gz", os.path.basename(result["bundle"]))
        assert os.path.dirname(result["bundle"]) == str(bundled.folder)
    # A host that sent none has none.
    assert "bundle" not in bundled(findings=[], bundle="/etc/passwd")


@pytest.mark.parametrize(
    "archive",
    [
        "text",
        7,
        ["a"],
        {"a": 1},
        {"content": None, "salt": 0},
        {"content": "!!!!", "salt": 0},
        {"content": "\ud800", "salt": 0},
        {"content": "YWJj", "salt": 0},
        {"content": "YWJj", "salt": "x"},
        {"content": "YWJj", "salt": 10**400},
        {"content": "YWJj", "salt": -1},
        {"content": {"a": 1}, "salt": 0},
    ],
)
def test_what_is_no_bundle_is_told_and_not_stored(archive: t.Any, bundled: Bundled) -> None:
    result = bundled(findings=[], archive=archive)
    assert (result["failed"], result["reason"]) == (True, "bundle_failed")
    assert result["msg"].count("\n") == 0
    result["msg"].encode("ascii")
    assert not bundled.folder.exists()


def test_a_bundle_is_measured_before_it_is_unwrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_support_bundle, "LARGEST", 100)
    with pytest.raises(FleetError, match="larger than any bundle"):
        unwrap({"content": "!" * 201, "salt": 0})


def test_a_file_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: t.Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(AnsibleActionFail, match="No space left"):
        gpu_host_diagnosis.write_private(str(tmp_path), "gpu01.tar.gz", b"content")
    assert list(tmp_path.iterdir()) == []
