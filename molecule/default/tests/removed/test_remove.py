# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table, and then everything is taken back. In this order."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from fleet_testing import Fleet, difference

FLEET = Fleet("default")
HOST = FLEET.host("gpu01")
CACHE = "/var/lib/nim/cache/llama"
ALL = ["-e", "remove_caches=llama remove_toolkit=true remove_docker=true remove_driver=true"]


@pytest.fixture
def bare() -> dict[str, str]:
    """The host before anything was done to it; tests/bare has looked."""
    found: dict[str, str] = json.loads((Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "bare.json").read_text())
    return found


def test_status(tmp_path: Path) -> None:
    output = tmp_path / "status.json"
    table = FLEET.play("status", "-e", "status_output=%s" % output)
    assert re.search(
        r"^HOST +GPUS +DRIVER +ENGINE +TOOLKIT +NIM +IMAGE DIGEST +STATE +READY AFTER$", table.output, re.M
    )
    assert re.search(
        r"^%s +2 x NVIDIA H200 +580\.\S+ +26\.1\.5\S* +1\.20\.0 +llama +sha256:\w{12} +ready +\d+ s$" % HOST.name,
        table.output,
        re.M,
    )
    assert table.changed() == []
    (row,) = json.loads(output.read_text(encoding="utf-8"))
    assert (row["host"], row["nim"], row["state"], row["port"]) == (HOST.name, "llama", "ready", 8000)
    printed = FLEET.play("status", "-e", "status_format=json").output
    assert '"model_id": "meta/llama-3.1-8b-instruct"' in printed


def test_check_mode_removes_nothing() -> None:
    run = FLEET.play("remove", "--check", "--diff", *ALL)
    assert len(run.changed()) >= 2
    assert "nim-llama" in HOST.run("docker ps; systemctl is-active nim-llama")
    assert HOST.run("systemctl is-active nim-llama") == "active"


def test_a_cache_nobody_knows_is_refused() -> None:
    run = FLEET.play("remove", "-e", "remove_caches=lama", succeeds=False)
    assert "remove_caches = lama: no model of that name" in run.output
    assert HOST.run("systemctl is-active nim-llama") == "active"


def test_remove_takes_our_things_and_leaves_the_rest(bare: dict[str, str]) -> None:
    cache = HOST.run("find %s -type f | sort | xargs sha256sum" % CACHE)
    assert cache
    assert len(FLEET.play("remove").changed()) >= 3
    assert FLEET.play("remove").changed() == []

    assert HOST.run("find %s -type f | sort | xargs sha256sum" % CACHE) == cache
    assert HOST.run("docker ps --all --quiet; docker images --quiet; ls -d /run/nim /run/gpu_fleet; true") == ""
    units = "systemctl list-units --all --no-legend 'nim*'; systemctl list-unit-files --no-legend 'nim*'; true"
    assert HOST.run(units) == ""
    # What others may use is still there, and works.
    assert "GPU 0" in HOST.run("nvidia-smi -L")
    assert "nvidia" in HOST.run("docker info --format '{{json .Runtimes}}'")
    new = [path for path, what in difference(bare, HOST.snapshot()).items() if what == "new"]
    ours = [path for path in new if re.search(r"\bnim\b|gpu_fleet|nim-|^/root", path) and not path.startswith(CACHE)]
    assert ours == ["/var/lib/nim", "/var/lib/nim/cache"]


#: Left behind on purpose; each with the reason.
LEFT = (
    r"/var/lib/(docker|containerd)\b",  # images, containers and volumes may be somebody else's
    r"/etc/docker$",  # the engine's own directory
    r"/(etc|opt)/containerd\b",  # belongs to the engine's configuration
    r"/etc/(group|gshadow)-?$",  # the group docker is the package's
    r"/var/(cache|lib/apt|lib/dpkg|lib/systemd)\b",  # the package manager's own books
    r"/etc/(sandbox|systemd/system/sockets\.target\.wants)\b",
    # What other packages may depend on by now: dkms, kernel headers, the Python client of Docker.
    r"/usr/(bin|sbin|lib|share|src|include)/",
    r"/(lib|bin|sbin)/",
    r"/var/lib/dkms$",
    r"package (dkms|linux-headers-\S+|python3-\S+) \S+ ii$",
    r"package (docker-ce\S*|containerd\.io) \S+ rc$",  # purging an engine can take /var/lib/docker with it
    r"unit (docker|containerd)\S* ",
    r"module nvidia",  # in memory until the next boot
)


def test_on_request_the_rest_goes_too(bare: dict[str, str]) -> None:
    run = FLEET.play("remove", *ALL)
    assert len(run.changed()) >= 2
    assert "a reboot takes it out of memory" in run.output
    assert FLEET.play("remove", *ALL).changed() == []

    after = HOST.snapshot()
    rest = {path: what for path, what in difference(bare, after).items() if not any(re.match(p, path) for p in LEFT)}
    assert rest == {}
    programs = ("/usr/bin/nvidia-smi", "/usr/bin/nvidia-ctk", "/usr/bin/dockerd", "/usr/local/libexec/nim")
    assert [path for path in programs if path in after] == []
    assert [path for path in after if path.endswith("/nvidia.ko")] == []
    assert HOST.run("apt-mark showhold; ls /etc/apt/preferences.d") == ""
    assert HOST.run("getent group docker").endswith(":")
