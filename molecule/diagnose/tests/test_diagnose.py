# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What diagnose says of a sound host and of one with several faults at once, and what a support bundle gives away."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import re
import stat
import tarfile
import urllib.parse
from typing import Any

import pytest
from control import KEY_VALID
from fleet_testing import Fleet, wait_until

FLEET = Fleet("diagnose")
HOST = FLEET.host("gpu01")
WORD = "Pq7-database/word%9"
OTHER_LOGIN = "robot:other+registry-password"
OPTIONS = ["-e", "database_password=" + WORD]
#: Seconds within which the line that decides ends the wait, as the controller sees it.
AT_ONCE = 5.0
QUOTA = "lease refused: quota of team blue is used up"

Json = dict[str, Any]


def diagnose(path: pathlib.Path, *options: str, succeeds: bool = True) -> list[Json]:
    FLEET.play("diagnose", *OPTIONS, "-e", "diagnose_output=%s" % path, *options, succeeds=succeeds)
    rows: list[Json] = json.loads(path.read_text())
    return rows


def told(rows: list[Json]) -> list[tuple[str, str | None, str]]:
    """What is wrong on the host itself: all hosts of the sandbox share the kernel's log, and so the kills of others."""
    return [
        (row["severity"], row["model"], row["reason"])
        for row in rows
        if row["severity"] in ("failed", "warning") and (row["model"] or row["reason"] != "out_of_memory")
    ]


def lose_gpus(model: str) -> None:
    """As systemctl daemon-reload does it: NVML says Unknown Error where /dev/nvidiactl cannot be used."""
    pid = HOST.run("docker inspect --format '{{.State.Pid}}' nim-" + model)
    HOST.run("nsenter --mount --target %s rm /dev/nvidiactl; systemctl daemon-reload" % pid)
    assert "Failed to initialize NVML: Unknown Error" in HOST.run(
        "docker exec nim-%s nvidia-smi -L" % model, check=False
    )


@pytest.fixture(scope="module")
def served() -> None:
    FLEET.site(*OPTIONS)


def test_a_sound_host(served: None, tmp_path: pathlib.Path) -> None:
    rows = diagnose(tmp_path / "rows.json", "-e", "diagnose_fail_on=failed")
    assert told(rows) == [], rows


def test_lost_gpus_are_seen_explained_and_given_back(served: None, tmp_path: pathlib.Path) -> None:
    before = HOST.identity()
    lose_gpus("llama")
    rows = diagnose(tmp_path / "rows.json")
    assert told(rows)[0] == ("failed", "llama", "gpus_lost")
    assert "systemctl daemon-reload" in rows[0]["cause"]
    plan = tmp_path / "plan.json"
    FLEET.play("plan", *OPTIONS, "-e", "plan_output=%s" % plan)
    assert [(row["what"], row["disruption"]) for row in json.loads(plan.read_text())] == [
        ("nim-llama.service", "restart_nim")
    ]
    assert "lost its GPUs" in plan.read_text()
    run = FLEET.site(*OPTIONS)
    assert run.restarts(HOST.name) == {"nim-llama.service"}
    after = HOST.identity()
    assert after["second"].serving == before["second"].serving
    assert after["llama"].serving != before["llama"].serving
    assert len(HOST.gpus_inside("llama")) == 1
    assert FLEET.site(*OPTIONS).changed() == []


def test_the_line_that_decides_ends_the_wait(served: None) -> None:
    """The NIM goes on running without ever getting ready; the text is one that only this site knows."""
    environment = {"STANDIN_FAIL": "nim-14", "STANDIN_FAIL_TEXT": QUOTA, "STANDIN_FAIL_END": "hang"}
    run = FLEET.site(*OPTIONS, inventory=FLEET.changed("gpu01", "second", environment=environment), succeeds=False)
    failed_at = max(entry["at"] for entry in run.of(HOST.name) if entry["outcome"] == "failed")
    message = run.failure(HOST.name)
    assert "NIM second will not start: its log says" in message
    assert "the team's quota on the model store is used up; ask the storage team" in message
    line = HOST.run("journalctl -q -o json CONTAINER_NAME=nim-second --grep 'quota of team' -n 1")
    said_at = int(json.loads(line)["__REALTIME_TIMESTAMP"]) / 1e6
    assert 0 < failed_at - said_at < AT_ONCE, "%.1f s after the line" % (failed_at - said_at)
    state = HOST.container_state("second")
    assert state is not None
    assert state["Running"]


def test_several_faults_at_once_and_a_bundle_without_secrets(served: None, tmp_path: pathlib.Path) -> None:
    login = base64.b64encode(OTHER_LOGIN.encode()).decode()
    config = HOST.read_json("/root/.docker/config.json")
    config.setdefault("auths", {})["registry.example"] = {"auth": login}
    HOST.write("/root/.docker/config.json", json.dumps(config), "0600")
    lose_gpus("llama")
    # A NIM that prints what it must not, in more than one form.
    said = [
        KEY_VALID,
        "Authorization: Bearer " + KEY_VALID,
        base64.b64encode(KEY_VALID.encode()).decode(),
        KEY_VALID[::-1],
    ]
    said += [urllib.parse.quote(WORD, safe=""), json.dumps({"message": "login with %s" % WORD})]
    said += ["printed by the NIM"]
    for text in said:
        HOST.run("logger --journald", stdin="MESSAGE=%s\nCONTAINER_NAME=nim-llama\n" % text)
    daemon = HOST.read_json("/etc/docker/daemon.json")
    HOST.write("/etc/docker/daemon.json", json.dumps({**daemon, "live-restore": False, "debug": True}))
    HOST.run("touch /run/before-the-bundle")
    bundles = tmp_path / "bundles"
    rows = diagnose(
        tmp_path / "rows.json",
        *("-e", "diagnose_bundle=%s" % bundles),
        *("-e", "diagnose_fail_on=failed"),
        succeeds=False,
    )
    found = told(rows)
    assert found[:2] == [("failed", "llama", "gpus_lost"), ("failed", "second", "start_failed")], found
    assert ("warning", None, "drift") in found
    assert [severity for severity, _model, _reason in found] == sorted(
        (severity for severity, _model, _reason in found), key=("failed", "warning").index
    )
    second = next(row for row in rows if row["model"] == "second" and row["severity"] == "failed")
    assert (second["signature"], second["remedy"]) == ("site-quota", "ask the storage team")
    assert QUOTA in second["evidence"][0]
    assert any("/etc/docker/daemon.json" in (row["cause"] or "") for row in rows)

    # -- the bundle
    [path] = bundles.iterdir()
    assert re.fullmatch(r"diagnose-gpu01-\d{8}T\d{6}Z\.tar\.gz", path.name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size < 8_000_000
    unpacked = tmp_path / "unpacked"
    with tarfile.open(path) as archive:
        archive.extractall(unpacked, filter="data")
    files = {
        str(file.relative_to(unpacked)).partition("/")[2]: file.read_text()
        for file in unpacked.rglob("*")
        if file.is_file()
    }
    for name in (
        "findings.json",
        "plan.json",
        "facts.json",
        "versions.json",
        "gpu/nvidia-smi.xml",
        "files/etc/docker/daemon.json",
        "system/packages.txt",
        "system/kernel.log",
        "units/nim-llama.service.txt",
        "journal/nim-second.service.log",
        "journal/docker.service.log",
        "containers/nim-llama.json",
        "containers/nim-llama.log",
        "manifest.json",
    ):
        assert files.get(name), name
    assert "printed by the NIM" in files["containers/nim-llama.log"]
    assert QUOTA in files["containers/nim-second.log"]
    assert '"gpu_fleet.nim": "' in files["versions.json"]
    assert "cuda-drivers-580" in files["system/packages.txt"] or "nvidia" in files["system/packages.txt"]
    assert [entry["reason"] for entry in json.loads(files["findings.json"])][:2] == ["gpus_lost", "start_failed"]
    everything = "\n".join(files.values())
    for secret in (KEY_VALID, WORD, OTHER_LOGIN.split(":")[1]):
        for form, text in forms(secret).items():
            assert text not in everything, "%s: %s" % (form, [name for name in files if text in files[name]])

    # -- nothing stays on the host
    left = "find / -xdev -newer /run/before-the-bundle -type f -not -path '/proc/*' -not -path '/sys/*' -not -path '/run/*'"
    left += " -not -path '/var/log/*' -not -path '/var/lib/docker/*' -not -path '/var/lib/containerd/*'"
    assert [
        name for name in HOST.run(left).splitlines() if "tar" in name or "ansible" in name or "bundle" in name
    ] == []


def forms(secret: str) -> dict[str, str]:
    raw = secret.encode()
    found = {
        "plain": secret,
        "base64": base64.b64encode(raw).decode().rstrip("="),
        "base64 of a login": base64.b64encode(b"$oauthtoken:" + raw).decode().rstrip("="),
        "url": urllib.parse.quote(secret, safe=""),
        "json": json.dumps(secret)[1:-1],
        "reversed": secret[::-1],
        "beginning": secret[:16],
        "end": secret[-16:],
    }
    for shift in range(3):
        found["base64 at %d" % shift] = base64.b64encode(b"\0" * shift + raw).decode().rstrip("=")[4:-4]
    return found


def test_a_host_that_is_put_right_has_nothing_more_to_say(served: None, tmp_path: pathlib.Path) -> None:
    FLEET.site(*OPTIONS)
    wait_until(lambda: HOST.ready(8001), "second is ready")
    rows = diagnose(tmp_path / "rows.json", "-e", "diagnose_fail_on=failed")
    assert [row for row in rows if row["severity"] == "failed"] == []
    assert os.path.getsize(tmp_path / "rows.json")
