# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is on the host after the chain."""

from __future__ import annotations

import json
import re
from typing import Any

from testinfra.host import Host

BRANCH = "580."
SERVICE = "nim-llama"
CACHE = "/var/lib/nim/cache/llama"


def _held(host: Host) -> set[str]:
    return set(host.check_output("apt-mark showhold").split())


def _container(host: Host) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(host.check_output("docker inspect %s", SERVICE))[0]
    return found


def test_driver_is_one_version_everywhere(host: Host) -> None:
    versions = {
        "loaded": host.file("/sys/module/nvidia/version").content_string.strip(),
        "on disk": host.check_output("modinfo --field version nvidia"),
        "user space": host.package("nvidia-utils-580").version.split("-")[0],
        "library": re.findall(
            r"libnvidia-ml\.so\.(\d+\.\d+\S*)", host.check_output("ls /usr/lib/x86_64-linux-gnu/libnvidia-ml.so.*")
        )[-1],
        "nvidia-smi": host.check_output("nvidia-smi --query-gpu=driver_version --format=csv,noheader").split()[0],
    }
    assert len(set(versions.values())) == 1, versions
    assert versions["loaded"].startswith(BRANCH)


def test_driver_is_held(host: Host) -> None:
    assert {"nvidia-open-580", "nvidia-dkms-580-open", "nvidia-utils-580", "libnvidia-compute-580"} <= _held(host)
    assert host.service("nvidia-persistenced").is_running


def test_docker_file_and_daemon(host: Host) -> None:
    wanted = json.loads(host.file("/etc/docker/daemon.json").content_string)
    live = json.loads(host.check_output("docker info --format '{{json .}}'"))
    assert wanted["live-restore"] is live["LiveRestoreEnabled"] is True
    assert wanted["runtimes"]["nvidia"]["path"] == live["Runtimes"]["nvidia"]["path"] == "nvidia-container-runtime"
    assert live["DefaultRuntime"] == "runc"
    assert {"docker-ce", "docker-ce-cli", "containerd.io"} <= _held(host)
    assert host.service("docker").is_enabled


def test_operator_may_use_docker(host: Host) -> None:
    assert host.group("docker").members == ["ops"]
    assert SERVICE in host.check_output("runuser -u ops -- docker ps")


def test_toolkit_is_one_version(host: Host) -> None:
    names = ["nvidia-container-toolkit", "nvidia-container-toolkit-base"]
    names += ["libnvidia-container-tools", "libnvidia-container1"]
    assert {host.package(name).version for name in names} == {"1.20.0-1"}
    assert set(names) <= _held(host)
    assert 'mode = "auto"' in host.file("/etc/nvidia-container-runtime/config.toml").content_string


def test_registry_login_is_private(host: Host) -> None:
    login = host.file("/root/.docker/config.json")
    assert (login.user, login.group, login.mode) == ("root", "root", 0o600)
    assert list(json.loads(login.content_string)["auths"]) == ["nvcr.io"]


def test_configuration_of_the_service(host: Host) -> None:
    assert host.file("/etc/nim").mode == 0o755
    assert host.file("/etc/nim/llama.json").mode == 0o644
    key = host.file("/etc/nim/ngc.env")
    assert (key.user, key.group, key.mode) == ("root", "root", 0o600)


def test_unit(host: Host) -> None:
    unit = host.service(SERVICE)
    assert unit.is_enabled and unit.is_running
    checked = host.run("systemd-analyze verify %s.service nim.target nim.slice", SERVICE)
    assert (checked.rc, checked.stdout + checked.stderr) == (0, "")


def test_container(host: Host) -> None:
    container = _container(host)
    settings, environment = container["HostConfig"], dict(e.split("=", 1) for e in container["Config"]["Env"])
    gpus = host.check_output("nvidia-smi --query-gpu=uuid --format=csv,noheader").split()
    assert environment["NVIDIA_VISIBLE_DEVICES"] in gpus
    assert settings["CapDrop"] == ["ALL"] and settings["CapAdd"] is None
    assert settings["SecurityOpt"] == ["no-new-privileges"]
    assert settings["Runtime"] == "nvidia" and not settings["Privileged"]
    assert settings["RestartPolicy"]["Name"] == "no", "systemd restarts it, not Docker"
    assert container["Config"]["User"] == "1000:1000"
    assert re.fullmatch(r"nvcr\.io/nim/meta/llama-3\.1-8b-instruct@sha256:[0-9a-f]{64}", container["Config"]["Image"])
    # It sees the one GPU it was given.
    devices = host.check_output("ls /proc/%d/root/dev" % container["State"]["Pid"]).split()
    assert len([name for name in devices if re.fullmatch(r"nvidia\d+", name)]) == 1


def test_cache_is_its_users(host: Host) -> None:
    cache = host.file(CACHE)
    assert (cache.uid, cache.gid) == (1000, 1000)
    assert cache.mode & 0o007 == 0
    assert host.check_output("find %s -perm -o+w ! -type l", CACHE) == ""


def test_it_answers(host: Host) -> None:
    url = "http://127.0.0.1:8000/v1/"
    # curl is on the host, not in the image.
    assert (
        host.check_output("curl --silent --output /dev/null --write-out '%%{http_code}' %shealth/ready" % url) == "200"
    )
    models = json.loads(host.check_output("curl --silent %smodels" % url))
    assert models["data"][0]["id"] == "meta/llama-3.1-8b-instruct"
