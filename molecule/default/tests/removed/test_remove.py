# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table, and then everything is taken back. In this order."""

from __future__ import annotations

import json
import re
from pathlib import Path

from story import Story, difference, snapshot

HOST = "default-gpu01"
REMOVE = "gpu_fleet.nim.remove"
CACHE = "/var/lib/nim/cache/llama"
ALL = ["remove_caches=llama", "remove_toolkit=true", "remove_docker=true", "remove_driver=true"]


def test_status(story: Story, tmp_path: Path) -> None:
    output = tmp_path / "status.json"
    table = story.play("gpu_fleet.nim.status", "-e", "status_output=%s" % output)
    assert re.search(
        r"^HOST +GPUS +DRIVER +ENGINE +TOOLKIT +NIM +IMAGE DIGEST +STATE +READY AFTER$", table.output, re.M
    )
    assert re.search(
        r"^%s +2 x NVIDIA H200 +580\.\S+ +26\.1\.5\S* +1\.20\.0 +llama +sha256:\w{12} +ready +\d+ s$" % HOST,
        table.output,
        re.M,
    )
    assert table.recap(HOST)["changed"] == 0
    (row,) = json.loads(output.read_text(encoding="utf-8"))
    assert (row["host"], row["nim"], row["state"], row["port"]) == (HOST, "llama", "ready", 8000)
    printed = story.play("gpu_fleet.nim.status", "-e", "status_format=json").output
    assert '"model_id": "meta/llama-3.1-8b-instruct"' in printed


def test_check_mode_removes_nothing(story: Story) -> None:
    run = story.play(REMOVE, "--check", "--diff", *[word for value in ALL for word in ("-e", value)])
    assert run.recap(HOST)["changed"] >= 2
    assert "nim-llama" in story.ssh(HOST, "docker ps; systemctl is-active nim-llama")
    assert story.ssh(HOST, "systemctl is-active nim-llama").strip() == "active"


def test_a_cache_nobody_knows_is_refused(story: Story) -> None:
    run = story.play(REMOVE, "-e", "remove_caches=lama", check=False)
    assert run.rc != 0 and "remove_caches = lama: no model of that name" in run.output
    assert story.ssh(HOST, "systemctl is-active nim-llama").strip() == "active"


def test_remove_takes_our_things_and_leaves_the_rest(story: Story, bare: dict[str, str]) -> None:
    cache = story.ssh(HOST, "find %s -type f | sort | xargs sha256sum" % CACHE)
    assert cache
    assert story.play(REMOVE).recap(HOST)["changed"] >= 3
    assert story.play(REMOVE).recap(HOST)["changed"] == 0

    assert story.ssh(HOST, "find %s -type f | sort | xargs sha256sum" % CACHE) == cache
    assert story.ssh(HOST, "docker ps --all --quiet; docker images --quiet; ls -d /run/nim /run/gpu_fleet; true") == ""
    units = "systemctl list-units --all --no-legend 'nim*'; systemctl list-unit-files --no-legend 'nim*'; true"
    assert story.ssh(HOST, units) == ""
    # What others may use is still there, and works.
    assert "GPU 0" in story.ssh(HOST, "nvidia-smi -L")
    assert "nvidia" in story.ssh(HOST, "docker info --format '{{json .Runtimes}}'")
    new = [path for path, what in difference(bare, snapshot(story, HOST)).items() if what == "new"]
    ours = [path for path in new if re.search(r"\bnim\b|gpu_fleet|nim-|^/root", path) and not path.startswith(CACHE)]
    assert ours == ["/var/lib/nim", "/var/lib/nim/cache"]


#: Left behind on purpose; each with the reason.
LEFT = (
    r"/var/lib/(docker|containerd)\b",  # images, containers and volumes may be somebody else's
    r"/etc/docker(/daemon\.json)?$",  # may hold other people's settings
    r"/(etc|opt)/containerd\b",  # belongs to the engine's configuration
    r"/etc/(group|gshadow)-?$",  # the group docker is the package's
    r"/var/(cache|lib/apt|lib/dpkg|lib/systemd)\b",  # the package manager's own books
    r"/etc/(sandbox|systemd/system/sockets\.target\.wants)\b",
    # What other packages may depend on by now: dkms, kernel headers, the Python client of Docker.
    r"/usr/(bin|sbin|lib|share|src|include)/",
    r"/(lib|bin|sbin)/",
    r"/var/lib/dkms$",
    r"package (dkms|linux-headers-\S+|python3-\S+) \S+ ii ",
    r"package (docker-ce\S*|containerd\.io) \S+ rc ",  # purging an engine can take /var/lib/docker with it
    r"unit (docker|containerd)\S* ",
    r"module nvidia",  # in memory until the next boot
)


def test_on_request_the_rest_goes_too(story: Story, bare: dict[str, str]) -> None:
    arguments = [word for value in ALL for word in ("-e", value)]
    run = story.play(REMOVE, *arguments)
    assert run.recap(HOST)["changed"] >= 2
    assert "a reboot takes it out of memory" in run.output
    assert story.play(REMOVE, *arguments).recap(HOST)["changed"] == 0

    after = snapshot(story, HOST)
    rest = {path: what for path, what in difference(bare, after).items() if not any(re.match(p, path) for p in LEFT)}
    assert rest == {}
    programs = ("/usr/bin/nvidia-smi", "/usr/bin/nvidia-ctk", "/usr/bin/dockerd", "/usr/local/libexec/nim")
    assert [path for path in programs if path in after] == []
    assert [path for path in after if path.endswith("/nvidia.ko")] == []
    assert story.ssh(HOST, "apt-mark showhold; ls /etc/apt/preferences.d; getent group docker | cut -d: -f4") == "\n"
