# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""daemon.json and the live daemon that obeys it: reload or restart, and when neither."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _docker_daemon as dd
from ansible_collections.gpu_fleet.nim.plugins.module_utils._dockerd import DaemonState
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption, Outcome, converge
from docker_fakes import CONFIG, PID, FakeDockerd
from fake_host import FakeHost

NVIDIA = {"runtimes": {"nvidia": {"path": "nvidia-container-runtime"}}}


@pytest.fixture
def dockerd(host: FakeHost) -> FakeDockerd:
    host.files["/usr/bin/nvidia-container-runtime"] = b""
    return FakeDockerd(host)


def run(host: FakeHost, dockerd: FakeDockerd, check: bool = False, **arguments: t.Any) -> Outcome[DaemonState]:
    arguments.setdefault("options", {})
    return converge(host, dd.DockerDaemon(api=dockerd, **arguments), check_mode=check)


def converged(host: FakeHost, dockerd: FakeDockerd, **arguments: t.Any) -> list[dict[str, t.Any]]:
    """check, real, check, real: check mode changes nothing and promises what happens; a second run finds nothing."""
    before = dict(host.files)
    promised = run(host, dockerd, True, **arguments)
    assert host.files == before
    assert dockerd.reloads == dockerd.restarts == 0
    done = run(host, dockerd, **arguments)
    assert [change.as_dict() for change in promised.changes] == [change.as_dict() for change in done.changes]
    for check in (True, False):
        assert not run(host, dockerd, check, **arguments).changed
    assert dd.PENDING not in host.files
    return [change.as_dict() for change in done.changes]


@pytest.mark.parametrize(
    "text", ['{"a": 1,}', "{", "[]", "null", '"x"', '{"a": 1 "b": 2}', "# c\n{}", '{"a": 1, "a": 2}', "{}{}"]
)
def test_broken_files_are_errors_and_stay(host: FakeHost, dockerd: FakeDockerd, text: str) -> None:
    host.files[CONFIG] = text.encode()
    with pytest.raises(FleetError) as caught:
        run(host, dockerd, options={"debug": True})
    assert caught.value.reason == "daemon_json_invalid"
    assert CONFIG in caught.value.message
    assert "left as it is" in caught.value.message
    assert host.files[CONFIG] == text.encode()
    assert dockerd.reloads == 0


@pytest.mark.parametrize("text", [None, b'{"data-root": "/srv/d\xe4ten"}'])
def test_what_is_no_text_is_an_error_and_stays(host: FakeHost, dockerd: FakeDockerd, text: bytes | None) -> None:
    if text is None:
        host.dirs.add(CONFIG)
    else:
        host.files[CONFIG] = text
    with pytest.raises(FleetError) as caught:
        run(host, dockerd, options={"debug": True})
    assert caught.value.reason == "daemon_json_invalid"
    wrong = "it is a directory" if text is None else "it is no UTF-8 text (byte 22)"
    assert caught.value.message == (
        "Reading %s failed: %s. It was left as it is; mend it by hand and run again." % (CONFIG, wrong)
    )
    assert host.files.get(CONFIG) == text
    assert dockerd.reloads == 0


# -- decisions ------------------------------------------------------------------------------------


def test_runtime_is_registered_by_reload(host: FakeHost, dockerd: FakeDockerd) -> None:
    dockerd.add_container("other")
    host.files[CONFIG] = b'{"log-driver": "json-file"}'
    (change,) = converged(host, dockerd, options=NVIDIA)
    assert change["disruption"] == "reload"
    assert (dockerd.reloads, dockerd.restarts) == (1, 0)
    assert json.loads(host.files[CONFIG]) == {"log-driver": "json-file", **NVIDIA}
    assert host.files[dd.BACKUP] == b'{"log-driver": "json-file"}'


def test_absolute_spelling_of_the_same_program_is_no_difference(host: FakeHost, dockerd: FakeDockerd) -> None:
    host.files[CONFIG] = b'{"runtimes": {"nvidia": {"path": "/usr/bin/nvidia-container-runtime", "args": []}}}'
    dockerd.live = json.loads(host.files[CONFIG])
    assert not run(host, dockerd, options=NVIDIA).changed


def test_file_right_but_daemon_not_told(host: FakeHost, dockerd: FakeDockerd) -> None:
    host.files[CONFIG] = json.dumps(NVIDIA).encode()
    (change,) = converged(host, dockerd, options=NVIDIA)
    assert change["what"] == "running daemon"
    assert change["from"] == {"runtimes.nvidia": None}
    assert "not told" in change["why"]
    assert (dockerd.reloads, dockerd.restarts) == (1, 0)


def test_restart_comes_after_live_restore(host: FakeHost, dockerd: FakeDockerd) -> None:
    dockerd.add_container("nim-llama")
    changes = converged(host, dockerd, options={"features": {"cdi": True}}, live_restore=True)
    assert [change["disruption"] for change in changes] == ["reload", "restart_docker"]
    assert (dockerd.reloads, dockerd.restarts) == (1, 1)
    assert dockerd.running["id-nim-llama"]["State"]["StartedAt"] == "early"


def test_what_the_daemon_has_is_only_written(host: FakeHost, dockerd: FakeDockerd) -> None:
    host.files[CONFIG] = b'{"features": {"cdi": false}}'
    dockerd.live = {"features": {"cdi": True}, "log-driver": "journald"}
    options = {"features": {"cdi": True}, "log-driver": "journald"}
    (change,) = converged(host, dockerd, options=options)
    assert (change["what"], change["disruption"]) == (CONFIG, "none")
    assert (dockerd.reloads, dockerd.restarts) == (0, 0)
    assert json.loads(host.files[CONFIG]) == options
    # What the daemon does not tell is not known to be there.
    (written, restarted) = converged(host, dockerd, options={**options, "exec-opts": ["native.umask=normal"]})
    assert (written["disruption"], restarted["disruption"]) == ("none", "restart_docker")
    assert "exec-opts" in restarted["why"] and "log-driver" not in restarted["why"]


def test_cdi_of_a_new_engine_is_not_written(host: FakeHost, dockerd: FakeDockerd) -> None:
    """Docker 28.2 and newer have it on by themselves; a fresh host has no daemon.json."""
    dockerd.live = {"features": {"cdi": True}}
    converged(host, dockerd, options={"log-opts": {"max-size": "50m"}})
    assert json.loads(host.files[CONFIG]) == {"log-opts": {"max-size": "50m"}}


def test_a_file_that_is_gone_costs_one_restart_and_no_gpu(host: FakeHost, dockerd: FakeDockerd) -> None:
    host.files["/usr/bin/nvidia-container-runtime"] = b""
    gpus = {**NVIDIA, "default-runtime": "nvidia", "features": {"cdi": True}}
    dockerd.live = {**gpus, "live-restore": True, "log-opts": {"max-size": "10m"}}
    dockerd.add_container("nim-llama")
    own = {"options": {"log-opts": {"max-size": "10m"}}, "live_restore": True}
    changes = converged(host, dockerd, **own)
    assert [(change["what"], change["disruption"]) for change in changes] == [
        (CONFIG, "reload"),
        ("running daemon", "restart_docker"),
    ]
    assert dockerd.restarts == 1
    assert json.loads(host.files[CONFIG]) == {**gpus, "live-restore": True, "log-opts": {"max-size": "10m"}}
    # The toolkit has nothing left to do.
    assert not run(host, dockerd, options=gpus).changed
    # Where nothing is to be restarted, where the file is there, and where they are not wanted, they are nobody's affair.
    host.files[CONFIG] = b""
    run(host, dockerd, options={}, live_restore=True)
    assert json.loads(host.files[CONFIG]) == {"live-restore": True}
    run(host, dockerd, **own)
    assert "runtimes" not in json.loads(host.files[CONFIG])
    dockerd.live = {**gpus, "live-restore": True}
    del host.files[CONFIG]
    run(host, dockerd, **own, absent=["default-runtime"])
    assert json.loads(host.files[CONFIG])["default-runtime"] == "runc"


def test_a_flag_is_not_said_twice(host: FakeHost) -> None:
    host.files["/usr/bin/nvidia-container-runtime"] = b""
    dockerd = FakeDockerd(host, argv=["--default-runtime", "nvidia"])
    dockerd.live = {**NVIDIA, "default-runtime": "nvidia"}
    converged(host, dockerd, options={"log-driver": "journald"})
    assert json.loads(host.files[CONFIG]) == {**NVIDIA, "log-driver": "journald"}


def test_restart_without_containers_needs_no_live_restore(host: FakeHost, dockerd: FakeDockerd) -> None:
    converged(host, dockerd, options={"log-driver": "journald"})
    assert (dockerd.reloads, dockerd.restarts) == (0, 1)


def test_restart_is_refused_without_live_restore(host: FakeHost, dockerd: FakeDockerd) -> None:
    dockerd.add_container("nim-llama")
    for dummy in range(2):
        outcome = run(host, dockerd, options={"log-driver": "journald", "debug": True})
        (blocked,) = outcome.blocked
        assert "nim-llama" in (blocked.blocked or "")
        assert "live-restore is off" in (blocked.blocked or "")
        # what a reload can do is done all the same
        assert json.loads(host.files[CONFIG]) == {"debug": True}
    assert dockerd.restarts == 0
    assert dockerd.reloads == 1


def test_live_restore_that_goes_off_does_not_carry_a_restart(host: FakeHost, dockerd: FakeDockerd) -> None:
    dockerd.add_container("nim-llama")
    host.files[CONFIG] = b'{"live-restore": true}'
    dockerd.live = {"live-restore": True}
    outcome = run(host, dockerd, options={"log-driver": "journald"}, live_restore=False)
    assert "live-restore is off" in (outcome.blocked[0].blocked or "")
    assert json.loads(host.files[CONFIG]) == {"live-restore": False}
    assert dockerd.restarts == 0


@pytest.mark.parametrize(
    ("prepare", "options", "text"),
    [
        (lambda d: setattr(d, "swarm", "active"), {"log-driver": "journald"}, "swarm"),
        (lambda d: None, {"bip": "10.0.0.1/24"}, "bip"),
        (lambda d: None, {"features": {"containerd-snapshotter": True}}, "features.containerd-snapshotter"),
        (lambda d: setattr(d, "required_by", "shop.service"), {"log-driver": "journald"}, "shop.service"),
        (lambda d: setattr(d, "engine", "24.0.7"), {"log-driver": "journald"}, "--rm"),
    ],
)
def test_restart_is_refused_where_live_restore_fails(
    host: FakeHost, dockerd: FakeDockerd, prepare: t.Any, options: dict[str, t.Any], text: str
) -> None:
    dockerd.add_container("shop", auto_remove=True)
    prepare(dockerd)
    outcome = run(host, dockerd, options=options, live_restore=True)
    (blocked,) = outcome.blocked
    assert text in (blocked.blocked or "")
    assert dockerd.restarts == 0
    assert dockerd.live["live-restore"] is True


def test_rejected_reload_puts_the_file_back(host: FakeHost, dockerd: FakeDockerd) -> None:
    host.files[CONFIG] = b'{"debug": false}'
    dockerd.reject_reload = True
    with pytest.raises(FleetError) as caught:
        run(host, dockerd, options={"debug": True})
    assert caught.value.reason == "daemon_reload_rejected"
    assert "back as it was" in caught.value.message
    assert host.files[CONFIG] == b'{"debug": false}'
    assert dd.PENDING not in host.files


def test_a_note_that_cannot_be_removed_puts_nothing_back(
    host: FakeHost, dockerd: FakeDockerd, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.files[CONFIG] = b'{"debug": false}'
    remove = host.remove

    def refuse(path: str) -> None:
        if path == dd.PENDING:
            raise FleetError("write_failed", "Removing %s failed: Read-only file system." % path)
        remove(path)

    monkeypatch.setattr(host, "remove", refuse)
    with pytest.raises(FleetError, match="Read-only file system"):
        run(host, dockerd, options={"debug": True})
    assert json.loads(host.files[CONFIG])["debug"] is True
    assert dockerd.live["debug"] is True
    # Once it can, the next run finishes.
    monkeypatch.undo()
    run(host, dockerd, options={"debug": True})
    assert dd.PENDING not in host.files
    assert run(host, dockerd, options={"debug": True}).changes == []


def test_daemon_that_does_not_start_gets_its_file_back(host: FakeHost, dockerd: FakeDockerd) -> None:
    dockerd.refuse_start = lambda document: document.get("log-driver") == "rejected"
    host.files[CONFIG] = b'{"debug": false}'
    with pytest.raises(FleetError) as caught:
        run(host, dockerd, options={"log-driver": "rejected"})
    assert caught.value.reason == "daemon_restart_failed"
    assert "unknown log driver" in caught.value.message
    assert host.files[CONFIG] == b'{"debug": false}'
    assert dockerd.active


def test_a_socket_that_systemd_has_lost_is_made_anew(host: FakeHost, dockerd: FakeDockerd) -> None:
    dockerd.live = {"live-restore": True}
    host.files[CONFIG] = b'{"live-restore": true}'
    lost = {"socket": True}

    def restart(*_: t.Any) -> t.Any:
        if lost["socket"]:
            dockerd.log = "failed to load listeners: no sockets found via socket activation: make sure ..."
            return (1, "", "Job for docker.service failed")
        return dockerd._restart()

    def stop(*_: t.Any) -> str:
        lost["socket"] = False
        return ""

    host.commands = {
        "systemctl restart docker.service": restart,
        "systemctl start docker.service": restart,
        "systemctl stop docker.socket docker.service": stop,
        **host.commands,
    }
    run(host, dockerd, options={"log-driver": "local"})
    assert dockerd.live["log-driver"] == "local"
    assert dockerd.restarts == 1


def test_validation_by_dockerd_comes_before_the_file(host: FakeHost, dockerd: FakeDockerd) -> None:
    dockerd.validate = lambda text: (
        1,
        "",
        "unable to configure the Docker daemon with file x: unknown option: nonsense",
    )
    with pytest.raises(FleetError) as caught:
        run(host, dockerd, options={"nonsense": 1})
    assert caught.value.reason == "daemon_config_rejected"
    assert CONFIG not in host.files
    # Engine 20.10 has no --validate
    dockerd.validate = lambda text: (125, "", "unknown flag: --validate\nSee 'dockerd --help'.")
    assert run(host, dockerd, options={"debug": True}).changed


def test_interrupted_between_file_and_restart(host: FakeHost, dockerd: FakeDockerd) -> None:
    """The key is one that the daemon does not tell about: only the note left behind knows."""
    host.files[CONFIG] = b'{"shutdown-timeout": 60, "log-opts": {"max-size": "1m"}}'
    host.files[dd.PENDING] = json.dumps({"main_pid": PID, "keys": ["log-opts.max-size"], "action": "restart"}).encode()
    (change,) = converged(host, dockerd, options={"log-opts": {"max-size": "1m"}})
    assert change["disruption"] == "restart_docker"
    assert change["to"] == ["log-opts.max-size"]
    assert dockerd.restarts == 1


def test_note_of_an_older_daemon_counts_for_nothing(host: FakeHost, dockerd: FakeDockerd) -> None:
    host.files[dd.PENDING] = json.dumps({"main_pid": PID - 1, "keys": ["debug"], "action": "restart"}).encode()
    assert not run(host, dockerd).changed
    host.files[dd.PENDING] = b"{half"
    assert not run(host, dockerd).changed


# -- removal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [["runtimes.nvidia"], ["runtimes.nvidia", "default-runtime"]])
def test_removal_of_the_live_default_runtime_takes_two_reloads(
    host: FakeHost, dockerd: FakeDockerd, absent: list[str]
) -> None:
    host.files[CONFIG] = json.dumps({"default-runtime": "nvidia", **NVIDIA}).encode()
    dockerd.live = json.loads(host.files[CONFIG])
    changes = converged(host, dockerd, absent=absent)
    assert len(changes) == 2
    assert changes[0]["to"] == {"default-runtime": "runc"}
    assert (dockerd.reloads, dockerd.restarts) == (2, 0)
    assert json.loads(host.files[CONFIG]) == {"default-runtime": "runc", "runtimes": {}}
    assert dockerd.live["runtimes"] == {}


def test_removal_of_a_runtime_that_only_the_daemon_still_has(host: FakeHost, dockerd: FakeDockerd) -> None:
    dockerd.live = {"runtimes": {"nvidia": {"path": "nvidia-container-runtime"}}}
    converged(host, dockerd, absent=["runtimes.nvidia"])
    assert json.loads(host.files[CONFIG]) == {"runtimes": {}}
    assert dockerd.live["runtimes"] == {}


# -- command line and own checks ------------------------------------------------------------------


def test_flag_with_the_wanted_value_satisfies(host: FakeHost) -> None:
    dockerd = FakeDockerd(host, argv=["--live-restore"])
    dockerd.live = {"live-restore": True}
    assert not run(host, dockerd, live_restore=True).changed


def test_flag_with_another_value_is_a_clash(host: FakeHost) -> None:
    dockerd = FakeDockerd(host, argv=["--log-driver=json-file"])
    with pytest.raises(FleetError) as caught:
        run(host, dockerd, options={"log-driver": "journald"})
    assert caught.value.reason == "daemon_flag_conflict"
    assert "/lib/systemd/system/docker.service" in caught.value.message
    assert CONFIG not in host.files


def test_config_file_of_the_command_line(host: FakeHost) -> None:
    dockerd = FakeDockerd(host, argv=["--config-file", "/srv/daemon.json"])
    host.dirs.add("/srv")
    assert run(host, dockerd, True, options={"debug": True}).changes[0].what == "/srv/daemon.json"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"options": {"default-runtime": "nvidia"}}, "undefined_runtime"),
        ({"options": {"runtimes": {"kata": {"path": "/opt/kata/bin/kata-runtime"}}}}, "missing_runtime"),
        ({"options": {"log-driver": "nonsense"}}, "unknown_log_driver"),
        ({"options": {"runtimes": {"runc": {"path": "/x"}}}}, "invalid_option"),
        ({"options": {"runtimes": {"x": {}}}}, "invalid_option"),
        ({"options": {"runtimes": []}}, "invalid_option"),
        ({"options": {"features": {"cdi": "yes"}}}, "invalid_option"),
        ({"options": {"exec-opts": None}}, "invalid_option"),
        ({"options": {"exec-opts": [5]}}, "invalid_option"),
        ({"options": {"live-restore": False}, "live_restore": True}, "invalid_option"),
        ({"options": {"Log Driver": 1}}, "invalid_option"),
        ({"options": {"debug": True}, "absent": ["debug"]}, "invalid_option"),
        ({"config_file": "daemon.json"}, "invalid_option"),
    ],
)
def test_own_checks(host: FakeHost, dockerd: FakeDockerd, arguments: dict[str, t.Any], reason: str) -> None:
    with pytest.raises(FleetError) as caught:
        run(host, dockerd, **arguments)
    assert caught.value.reason == reason
    assert CONFIG not in host.files


def test_cdi_needs_engine_25(host: FakeHost) -> None:
    dockerd = FakeDockerd(host, version="24.0.9")
    with pytest.raises(FleetError, match=r"25\.0"):
        run(host, dockerd, options={"features": {"cdi": True}})


def test_fresh_host_gets_the_file_only(host: FakeHost) -> None:
    host.dirs |= {"/etc", "/run", "/var/lib"}
    resource = dd.DockerDaemon({"debug": True}, live_restore=True)
    (change,) = converge(host, resource, check_mode=True).changes
    assert change.disruption is Disruption.NONE
    assert converge(host, resource, check_mode=False).changed
    assert not converge(host, resource, check_mode=False).changed
    assert dd.PENDING not in host.files


def test_somebody_else_wrote_meanwhile(host: FakeHost, dockerd: FakeDockerd) -> None:
    resource = dd.DockerDaemon({"debug": True}, api=dockerd)
    (change,) = resource.plan(resource.observe(host))
    host.files[CONFIG] = b'{"labels": ["a=b"]}'
    with pytest.raises(FleetError, match="somebody else"):
        resource.apply(host, change)
    assert host.files[CONFIG] == b'{"labels": ["a=b"]}'


def test_secrets_of_the_file_stay_out_of_the_diff(host: FakeHost, dockerd: FakeDockerd) -> None:
    host.files[CONFIG] = (
        b'{"proxies": {"https-proxy": "http://u:hunter2@proxy:1"}, "log-opts": {"splunk-token": "hunter2"}}'
    )
    outcome = run(host, dockerd, True, options={"debug": True})
    assert outcome.changes[0].diff is not None
    assert "hunter2" not in repr(outcome.changes[0].diff) + repr(outcome.changes[0].as_dict())
    run(host, dockerd, options={"debug": True})
    assert b"hunter2" in host.files[CONFIG]
    assert host.modes[dd.BACKUP][0] == 0o600
