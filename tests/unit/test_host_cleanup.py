# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Taking back what the collection put on a host: everything of ours, nothing of others, nothing in use."""

from __future__ import annotations

import typing as t

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.gpu_fleet.nim.plugins.filter.removal import FilterModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_api import DockerApi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_cleanup import (
    CleanupState,
    HostCleanup,
    removal_of,
    unknown_caches,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._packages import Package
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import converge
from fake_host import FakeHost

MANAGED = "# Managed by gpu_fleet.nim.\nTypes: deb\n"


class NoDocker(DockerApi):
    def get(self, path: str, parameters: t.Mapping[str, str] | None = None) -> t.Any:
        raise FleetError("docker_unavailable", "no daemon")


def cleanup(**options: t.Any) -> HostCleanup:
    return HostCleanup(api=NoDocker("/nowhere"), **options)


def package(name: str) -> Package:
    return Package(name=name, version="1")


def test_what_others_have_put_beside_our_files_stays() -> None:
    theirs = ["/etc/nim/notes.txt", "/usr/local/libexec/nim/tool"]
    host = FakeHost(
        {"/etc/nim/ngc.env": "x", "/usr/local/libexec/nim/nim-unit": "x", **dict.fromkeys(theirs, "theirs")},
        {"systemctl *": ""},
    )
    assert converge(host, cleanup(), check_mode=False).changed
    assert sorted(host.files) == theirs
    assert not converge(host, cleanup(), check_mode=False).changed


def test_own_files_go_and_caches_stay() -> None:
    host = FakeHost(
        {
            "/etc/systemd/system/nim.target": "x",
            "/etc/systemd/system/nim.slice": "x",
            "/usr/local/libexec/nim/nim-unit": "x",
            "/etc/nim/ngc.env": "x",
            "/var/lib/nim/state/a.download.json": "x",
            "/var/lib/nim/cache/llama/model": "x",
            "/var/lib/gpu_fleet/images.json": "x",
            "/run/gpu_fleet/health/a.json": "x",
            "/etc/hosts": "theirs",
        },
        {"systemctl *": ""},
    )
    outcome = converge(host, cleanup(), check_mode=False)
    assert outcome.changed
    assert sorted(host.files) == ["/etc/hosts", "/var/lib/nim/cache/llama/model"]
    assert ("systemctl", "disable", "--now", "nim.target") in host.calls
    assert ("systemctl", "daemon-reload") in host.calls
    assert not converge(host, cleanup(), check_mode=False).changed


def test_named_cache_goes_and_empty_directories_with_it() -> None:
    host = FakeHost({"/var/lib/nim/cache/llama/model": "x", "/srv/other/model": "x"})
    host.dirs |= {"/var/lib/nim", "/var/lib/nim/cache", "/var/lib/nim/cache/llama"}
    resource = cleanup(caches=["/var/lib/nim/cache/llama"])
    assert [change.what for change in converge(host, resource, check_mode=True).changes] == [
        "/var/lib/nim/cache/llama",
        "/var/lib/nim/cache",
        "/var/lib/nim",
    ]
    converge(host, resource, check_mode=False)
    assert sorted(host.files) == ["/srv/other/model"]
    assert not host.exists("/var/lib/nim")


@pytest.mark.parametrize(
    "path",
    [
        "cache",
        "/",
        "/etc",
        "/var/lib",
        "/var/lib/",
        "/srv",
        "/home",
        "/srv/../etc",
        "/srv/x/../../etc",
        "",
        "/etc/ssh",
        "/home/ops",
        "/var/lib/docker",
    ],
)
def test_directories_that_are_no_cache(path: str) -> None:
    with pytest.raises(FleetError) as caught:
        cleanup(caches=[path])
    assert caught.value.reason == "invalid_option"


def test_nothing_goes_while_services_are_there() -> None:
    host = FakeHost({"/etc/nim/llama.json": "{}", "/usr/local/libexec/nim/nim-unit": "x"})
    outcome = converge(host, cleanup(), check_mode=False)
    assert not outcome.changed
    assert all("NIM services llama are still on the host" in str(change.blocked) for change in outcome.blocked)
    assert "/etc/nim/llama.json" in host.files


def test_only_repositories_of_ours_go() -> None:
    host = FakeHost(
        {
            "/etc/os-release": 'ID=debian\nVERSION_ID="13"\nVERSION_CODENAME=trixie\n',
            "/etc/apt/sources.list.d/docker.sources": MANAGED + "Signed-By: /etc/apt/keyrings/docker.gpg\n",
            "/etc/apt/keyrings/docker.gpg": "key",
            "/etc/apt/sources.list.d/nvidia-container-toolkit.sources": "Types: deb\n",
            "/etc/apt/sources.list.d/debian.sources": MANAGED,
        },
        {"dpkg-query *": "", "apt-mark *": ""},
    )
    converge(host, cleanup(parts=["docker", "toolkit"]), check_mode=False)
    assert sorted(host.files) == [
        "/etc/apt/sources.list.d/debian.sources",
        "/etc/apt/sources.list.d/nvidia-container-toolkit.sources",
        "/etc/os-release",
    ]


def test_configuration_goes_with_the_toolkit_only() -> None:
    path = "/etc/nvidia-container-runtime/config.toml"
    files = {"/etc/os-release": 'ID=debian\nVERSION_ID="13"\nVERSION_CODENAME=trixie\n', path: "x"}
    host = FakeHost(files, {"dpkg-query *": "", "apt-mark *": ""})
    converge(host, cleanup(parts=["docker"]), check_mode=False)
    assert path in host.files
    converge(host, cleanup(parts=["toolkit"]), check_mode=False)
    assert path not in host.files
    assert not converge(host, cleanup(parts=["toolkit"]), check_mode=False).changed


DAEMON_JSON = "/etc/docker/daemon.json"
DEBIAN = 'ID=debian\nVERSION_ID="13"\nVERSION_CODENAME=trixie\n'


def docker_host(daemon_json: str | bytes) -> FakeHost:
    return FakeHost(
        {"/etc/os-release": DEBIAN, DAEMON_JSON: daemon_json}, {"dpkg-query *": "", "apt-mark *": "", "systemctl *": ""}
    )


def test_our_keys_of_daemon_json_go_with_docker_only() -> None:
    host = docker_host('{"live-restore": true, "debug": true, "runtimes": {"nvidia": {"path": "x"}}}')
    host.modes[DAEMON_JSON] = (0o600, 0, 0)
    own = {"live-restore": True}
    assert not converge(host, cleanup(parts=["toolkit"], daemon_options=own), check_mode=False).changed
    docker = cleanup(parts=["docker"], daemon_options=own)
    assert [change.what for change in converge(host, docker, check_mode=True).changes] == [
        "own keys in /etc/docker/daemon.json"
    ]
    assert converge(host, docker, check_mode=False).changed
    assert host.read_text(DAEMON_JSON) == '{"debug": true}'
    assert host.modes[DAEMON_JSON][0] == 0o600
    assert not converge(host, docker, check_mode=False).changed


def test_a_daemon_json_that_holds_nothing_else_goes() -> None:
    host = docker_host('{"live-restore": true}')
    docker = cleanup(parts=["docker"], daemon_options={"live-restore": True})
    assert converge(host, docker, check_mode=False).changed
    assert not host.exists("/etc/docker")
    assert not converge(host, docker, check_mode=False).changed


def test_daemon_json_of_an_engine_that_stays_is_left() -> None:
    host = docker_host('{"live-restore": true}')
    # No package of it.
    host.files["/usr/local/bin/dockerd"] = b""
    docker = cleanup(parts=["docker"], daemon_options={"live-restore": True})
    assert not converge(host, docker, check_mode=False).changed
    state = CleanupState(
        packages={"docker": {"docker-ce": package("docker-ce")}}, containers=("postgres",), own_keys=True
    )
    assert [change.what for change in docker.plan(state)] == ["packages of docker"]


@pytest.mark.parametrize("content", ['{"live-restore": true', b'{"debug": "\xff"}', '{"debug": 1, "debug": 2}'])
def test_a_broken_daemon_json_is_told_and_left(content: str | bytes) -> None:
    host = docker_host(content)
    docker = cleanup(parts=["docker"], daemon_options={"live-restore": True})
    outcome = converge(host, docker, check_mode=False)
    assert not outcome.changed
    (warning,) = docker.result(outcome.state)["warnings"]
    assert warning.startswith(
        "The keys of this collection in /etc/docker/daemon.json were not taken out. Reading /etc/docker/daemon.json failed"
    )
    assert DAEMON_JSON in host.files


def test_the_module_stream_goes_with_the_driver() -> None:
    path = "/etc/dnf/modules.d/nvidia-driver.module"
    text = "[nvidia-driver]\nname=nvidia-driver\nstream=580-open\nprofiles=\nstate=%s\n"
    repository = "/etc/yum.repos.d/nvidia-cuda.repo"

    def reset(world: FakeHost, *_rest: t.Any) -> str:
        # dnf needs the repository for it.
        assert repository in world.files
        world.files[path] = (text % "").replace("580-open", "").encode()
        return ""

    host = FakeHost(
        {
            "/etc/os-release": 'ID=rocky\nVERSION_ID="9.4"\nID_LIKE="rhel centos fedora"\n',
            path: text % "enabled",
            repository: MANAGED,
            "/etc/modprobe.d/gpu-fleet-nouveau.conf": "x",
        },
        {"rpm *": "", "dnf -q -y --setopt=* module reset nvidia-driver": reset, "dracut *": "", "dnf *": ""},
    )
    assert not converge(host, cleanup(parts=["toolkit"]), check_mode=False).changed
    assert path in host.files and not any("module" in call for call in host.calls)
    outcome = converge(host, cleanup(parts=["driver"]), check_mode=False)
    assert [change.what for change in outcome.changes] == [
        "/etc/modprobe.d/gpu-fleet-nouveau.conf",
        "module stream nvidia-driver",
        repository,
    ]
    assert ("dracut", "--force", "--regenerate-all") in host.calls
    assert not converge(host, cleanup(parts=["driver"]), check_mode=False).changed


def test_parts_in_use_are_left() -> None:
    resource = cleanup(parts=["toolkit", "docker", "driver"])
    state = CleanupState(
        packages={
            "toolkit": {"nvidia-container-toolkit": package("nvidia-container-toolkit")},
            "docker": {"docker-ce": package("docker-ce")},
            "driver": {"nvidia-driver": package("nvidia-driver")},
        },
        repositories={"docker": ("/etc/apt/sources.list.d/docker.sources",)},
        paths=("/etc/modprobe.d/gpu-fleet-nouveau.conf", "/etc/nim"),
        containers=("postgres",),
        holders=("python3 (pid 7)",),
    )
    changes = {change.what: change for change in resource.plan(state)}
    assert changes["packages of toolkit"].blocked is None
    assert changes["packages of docker"].blocked == "containers postgres still run; stop them first"
    assert changes["packages of driver"].blocked == "python3 (pid 7) still use the GPUs; stop them first"
    assert set(changes) == {"packages of toolkit", "packages of docker", "packages of driver", "/etc/nim"}


def test_reboot_is_due_while_the_module_is_loaded() -> None:
    assert cleanup(parts=["driver"]).result(CleanupState(driver_loaded=True))["reboot_required"]
    assert not cleanup().result(CleanupState(driver_loaded=True))["reboot_required"]


MODELS = [
    {"name": "a", "image": "nvcr.io/nim/x:1", "cache_directory": "/srv/a"},
    {"name": "b", "image": "nvcr.io/nim/x:1"},
]
SERVICES = [{"name": "b", "image": "nvcr.io/nim/x:0", "cache_directory": "/srv/b"}, {"name": "broken"}]


@pytest.mark.parametrize(("cache", "directory"), [("/etc", "/srv/a"), ("/srv/../etc", "/srv/a"), ("a", "/home/ops")])
def test_a_cache_that_must_stay_is_refused_before_a_service_goes(cache: str, directory: str) -> None:
    services = [{"name": "a", "image": "x", "cache_directory": directory}]
    with pytest.raises(AnsibleFilterError, match=r"remove_caches = .* is no directory that can be a model cache"):
        FilterModule().filters()["removal"](services, {"nim": services}, [cache])


def test_removal_of_a_host() -> None:
    found = removal_of(MODELS, SERVICES, "a, b,c,/srv/else")
    assert found["models"] == [
        {"name": "a", "image": "nvcr.io/nim/x:1", "state": "absent"},
        {"name": "b", "image": "nvcr.io/nim/x:0", "state": "absent"},
        {"name": "broken", "image": "registry.invalid/removed:removed", "state": "absent"},
    ]
    assert [entry["image"] for entry in found["images"]] == ["nvcr.io/nim/x:1", "nvcr.io/nim/x:0"]
    assert found["caches"] == ["/srv/a", "/srv/b", "/srv/else"]
    assert removal_of([{"name": "d", "image": "x"}], [], ["d"])["caches"] == ["/var/lib/nim/cache/d"]
    assert removal_of(MODELS, [], None)["caches"] == []


def test_filters() -> None:
    filters = FilterModule().filters()
    hosts = [{"look": {"nim": SERVICES}, "nim_models": MODELS}, {"other": 1}]
    assert filters["unknown_caches"](["a", "x", "/y"], hosts, "look") == ["x"]
    assert filters["removal"](None, None)["models"] == []
    with pytest.raises(AnsibleFilterError, match="write names of models with commas"):
        filters["removal"]([], {}, {"a": 1})
    assert unknown_caches(None, []) == []


@pytest.mark.parametrize("models", ["abc", ["a"], {"a": 1}, [None], 7])
def test_what_is_no_list_of_models_is_refused_in_words(models: t.Any) -> None:
    filters = FilterModule().filters()
    for ask in (
        lambda: filters["removal"](models, {"nim": []}),
        lambda: filters["unknown_caches"](["a"], [{"nim_models": models}], "look"),
    ):
        with pytest.raises(AnsibleFilterError, match=r"nim_models = .*must be a list of models; write each"):
            ask()


@pytest.mark.parametrize(
    "look", [{"nim": 7}, {"nim": [5]}, {"nim": [{"name": {"a": 1}}]}, {"nim": [{"cache_directory": 5}]}]
)
def test_an_odd_answer_of_a_host_is_a_matter_of_that_host(look: t.Any) -> None:
    filters = FilterModule().filters()
    with pytest.raises(AnsibleFilterError, match="answer is none of the module's"):
        filters["removal"]([], look)
    assert filters["unknown_caches"](["a", "b"], [{"look": look}, {"look": {"nim": SERVICES}}], "look") == ["a"]
