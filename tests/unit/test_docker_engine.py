# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Docker Engine: source, version guard, holds, service."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _packages
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_engine import DockerEngine
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._os_release import parse_os_release
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption
from docker_fakes import CONFIG, PID, FakeDockerd
from engine_machine import CE, Machine, ce, installed


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    key = b"\x99" + bytes(40)
    monkeypatch.setattr(_packages, "download", lambda url: key)
    return Machine()


@pytest.mark.parametrize(
    ("options", "names", "version"),
    [
        ({}, CE, ce("29.4.3")),
        ({"version": "28.3"}, CE, ce("28.3.3")),
        ({"version": ce("28.3.3")}, CE, ce("28.3.3")),
        ({"package_source": "distribution"}, ("docker.io", "docker-cli"), "26.1.5+dfsg1-9"),
    ],
)
def test_fresh_host(machine: Machine, options: dict[str, t.Any], names: tuple[str, ...], version: str) -> None:
    """check, real, check, real; the newest on offer is 29.5.1, which cannot pull from nvcr.io."""
    before = dict(machine.host.files)
    promised = machine.run(True, **options)
    assert machine.host.files == before
    done = machine.run(**options)
    assert [change.what for change in promised.changes] == [change.what for change in done.changes]
    for check in (True, False):
        assert not machine.run(check, **options).changed
    for name in names:
        assert machine.apt.packages[name].held
    assert machine.apt.packages[names[0]].version == version
    assert done.state.daemon.answers


def test_sources_are_never_swapped(machine: Machine) -> None:
    machine.have(docker_io="26.1.5+dfsg1-9")
    with pytest.raises(FleetError) as caught:
        machine.run()
    assert caught.value.reason == "source_switch_refused"
    assert "package_source = distribution" in caught.value.message
    assert "stops all containers" in caught.value.message

    other = installed(Machine())
    with pytest.raises(FleetError, match="package_source = docker"):
        other.run(package_source="distribution")


def test_engine_that_fits_is_kept(machine: Machine) -> None:
    installed(machine)
    assert not machine.run().changed
    assert not machine.run(version="28").changed


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"version": "29.5.1"}, "in the image store that a new engine starts with; use 29.4.3 or older."),
        ({"version": "29.5"}, "cannot pull from nvcr.io"),
        ({"version": "5:29.5.0-1~x"}, "cannot pull from nvcr.io"),
        ({"version": "20.10.24"}, "older than minimum_version"),
        ({"version": "23"}, ""),
        ({"version": "latest"}, "not an engine version"),
        ({"minimum_version": "new"}, "minimum_version = new"),
        ({"package_source": "snap"}, "package_source = snap"),
        ({"repository_url": "mirror.example.org"}, "repository_url = mirror.example.org"),
    ],
)
def test_options_are_checked_before_any_look(options: dict[str, t.Any], text: str) -> None:
    if not text:
        DockerEngine(**options)
        return
    with pytest.raises(FleetError) as caught:
        DockerEngine(**options)
    assert caught.value.reason == "invalid_option"
    assert text in caught.value.message


def test_engine_that_cannot_pull_is_replaced_when_nothing_runs(machine: Machine) -> None:
    installed(machine, "29.5.1")
    machine.dockerd.get = _containerd_store(machine.dockerd)  # type: ignore[method-assign] # another answer to /info
    outcome = machine.run()
    assert "cannot pull" in outcome.changes[0].why
    assert "turn features.containerd-snapshotter off" in outcome.changes[0].why
    assert machine.apt.packages["docker-ce"].version == ce("29.4.3")
    assert machine.apt.packages["docker-ce-cli"].version == ce("29.4.3")
    assert not machine.run().changed


def _containerd_store(dockerd: FakeDockerd) -> t.Callable[..., t.Any]:
    original = dockerd.get

    def get(path: str, parameters: t.Mapping[str, str] | None = None) -> t.Any:
        answer = original(path, parameters)
        if path == "/info":
            answer["DriverStatus"] = [["driver-type", "io.containerd.snapshotter.v1"]]
        return answer

    return get


def test_the_same_engine_will_do_without_containerds_store(machine: Machine) -> None:
    installed(machine, "29.5.1")
    assert not machine.run().changed


def test_too_old_for_the_nim_family(machine: Machine) -> None:
    installed(machine, "22.0.1")
    outcome = machine.run()
    assert "23.0.1 or newer" in outcome.changes[0].why
    assert machine.apt.packages["docker-ce"].version == ce("29.4.3")


def test_distribution_without_a_version_that_fits(machine: Machine) -> None:
    machine.have(docker_io="20.10.24+dfsg1-1")
    machine.apt.offers["docker.io"] = ["20.10.24+dfsg1-1"]
    with pytest.raises(FleetError) as caught:
        machine.run(package_source="distribution")
    assert caught.value.reason == "no_suitable_version"
    assert "use package_source = docker" in caught.value.message
    fresh = Machine(version="20.10.24")
    fresh.apt.offers["docker.io"] = ["20.10.24+dfsg1-1"]
    with pytest.raises(FleetError, match=r"20\.10\.24"):
        fresh.run(package_source="distribution")


@pytest.mark.parametrize(
    ("live_restore", "version", "blocked"),
    [(False, "28.3.2", "live-restore is off"), (True, "28.3.2", None), (True, "27.1.0", "patch releases only")],
)
def test_version_change_under_running_containers(
    machine: Machine, live_restore: bool, version: str, blocked: str | None
) -> None:
    installed(machine, version)
    machine.dockerd.live = {"live-restore": live_restore}
    machine.host.files[CONFIG] = b'{"live-restore": true}'
    machine.dockerd.add_container("nim-llama")
    outcome = machine.run(version="28.3.3")
    if blocked:
        assert blocked in (outcome.blocked[0].blocked or "")
        assert "nim-llama" in (outcome.blocked[0].blocked or "")
        assert machine.apt.packages["docker-ce"].version == ce(version)
        assert machine.dockerd.restarts == 0
    else:
        assert machine.apt.packages["docker-ce"].version == ce("28.3.3")
        assert machine.dockerd.running["id-nim-llama"]["State"]["StartedAt"] == "early"


def test_broken_hold_is_mended(machine: Machine) -> None:
    installed(machine)
    machine.apt.put("docker-ce", ce("28.3.3"), False)
    (change,) = machine.run().changes
    assert change.what == "hold of docker-ce"
    assert machine.apt.packages["docker-ce"].held
    assert [c.what for c in machine.run(hold=False).changes] == ["hold of docker-ce, docker-ce-cli, containerd.io"]
    assert not machine.run(hold=False).changed


def test_interrupted_installation_is_finished(machine: Machine) -> None:
    installed(machine)
    machine.apt.put("docker-ce-cli", ce("28.3.3"), True, complete=False)
    (change,) = machine.run().changes
    assert "interrupted" in change.why
    assert machine.apt.packages["docker-ce-cli"].complete


def test_client_of_another_version(machine: Machine) -> None:
    installed(machine)
    machine.apt.put("docker-ce-cli", ce("29.4.3"), True)
    (change,) = machine.run().changes
    assert (change.before, change.after) == (ce("29.4.3"), ce("28.3.3"))


def test_service(machine: Machine) -> None:
    installed(machine)
    machine.dockerd.active = machine.dockerd.enabled = False
    assert [change.what for change in machine.run().changes] == ["docker.service at boot", "docker.service"]
    machine.dockerd.masked = True
    with pytest.raises(FleetError, match=r"docker\.service is masked"):
        machine.run()


def test_service_that_does_not_start(machine: Machine) -> None:
    installed(machine)
    machine.dockerd.active = False
    machine.dockerd.refuse_start = lambda document: True
    with pytest.raises(FleetError) as caught:
        machine.run()
    assert caught.value.reason == "docker_start_failed"
    assert "unknown log driver" in caught.value.message


def test_unreachable_repository(machine: Machine) -> None:
    machine.apt.update = (100, "", "E: The repository 'https://x noble Release' does not have a Release file.")
    with pytest.raises(FleetError) as caught:
        machine.run()
    assert caught.value.reason == "repository_unreachable"
    assert "does not have a Release file" in caught.value.message
    assert not [path for path in machine.host.files if "sources.list.d" in path]


def test_podman_in_the_way(machine: Machine) -> None:
    machine.have(podman_docker="5.4")
    with pytest.raises(FleetError, match="podman-docker"):
        machine.run()


def test_no_engine_of_its_own(machine: Machine) -> None:
    machine.host.files["/etc/os-release"] = (
        b'ID="rocky"\nID_LIKE="rhel fedora"\nVERSION_ID="9.4"\nPRETTY_NAME="Rocky 9"\n'
    )
    with pytest.raises(FleetError, match="package_source = distribution"):
        machine.run(package_source="distribution")
    repository = DockerEngine().repository(parse_os_release('ID=rocky\nVERSION_ID="9.4"'))
    assert repository.url == "https://download.docker.com/linux/centos/9/$basearch/stable"


def test_containerd_stopped_under_a_docker_that_runs(machine: Machine) -> None:
    installed(machine)
    containerd = {"state": "inactive"}

    def start(*_: t.Any) -> str:
        containerd["state"] = "active"
        return ""

    machine.host.commands.update(
        {
            "systemctl show *containerd.service": lambda *_: "LoadState=loaded\nActiveState=%s\n" % containerd["state"],
            "systemctl start containerd.service": start,
        }
    )
    # A dockerd that was not told to use it may have a containerd of its own.
    assert not machine.run().changed
    machine.host.files["/proc/%d/cmdline" % PID] = b"/usr/bin/dockerd\0--containerd=/run/containerd/containerd.sock\0"
    (change,) = machine.run().changes
    assert (change.what, change.before, change.after) == ("containerd.service", "inactive", "active")
    assert change.disruption is Disruption.NONE
    assert not machine.run().changed
    machine.host.commands["systemctl show *containerd.service"] = "LoadState=masked\nActiveState=inactive\n"
    with pytest.raises(FleetError, match=r"containerd\.service is masked"):
        machine.run()
