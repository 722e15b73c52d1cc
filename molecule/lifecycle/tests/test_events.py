# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What happens to two NIMs that serve: restarts, crashes, stops and reboots of everything around them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from fleet_testing import Fleet, wait_until

FLEET = Fleet("lifecycle")
HOST = FLEET.host("gpu01")
PORTS = {"llama": 8000, "nemotron": 8001}
MARKER = "/var/lib/nim/maintenance"


@pytest.fixture(autouse=True)
def both_serve() -> None:
    """Every test begins with both models serving, whatever the one before left behind."""
    if not all(HOST.ready(port) for port in PORTS.values()):
        HOST.run("rm -f %s; systemctl start docker; systemctl reset-failed 'nim-*'" % MARKER, check=False)
        FLEET.nim()
    HOST.wait_ready(*PORTS.values())
    # The wrapper asks every second; what it says last is that everything is in its place, the unit's counter too.
    for model in PORTS:
        wait_until(lambda model=model: word(model)["phase"] == "ready", "the wrapper of %s knows" % model)


def kill_wrapper(model: str, signal: str) -> None:
    HOST.run("systemctl kill --kill-whom=main --signal=%s nim-%s.service" % (signal, model))


# -- Docker ---------------------------------------------------------------------------------------


def test_restart_of_docker_is_not_noticed() -> None:
    before = HOST.identity()
    daemon = HOST.run("systemctl show --property MainPID --value docker")
    with HOST.client(8000) as llama, HOST.client(8001) as nemotron, HOST.stream(8000, 3000) as answer:
        HOST.restart_docker()
        time.sleep(1)
    assert HOST.run("systemctl show --property MainPID --value docker") != daemon
    assert HOST.identity() == before
    # What was being answered is answered to its end.
    assert answer == {"tokens": 3000, "done": True}
    # dockerd writes its packet filter anew when it starts; for that moment new connections are refused.
    assert llama.outage < 2 and nemotron.outage < 2


def test_docker_away_and_back() -> None:
    before = HOST.identity()
    with HOST.client(8000) as client:
        HOST.run("systemctl reset-failed docker; systemctl stop docker.socket docker")
        wait_until(lambda: word("llama")["phase"] == "waiting_for_docker", "the unit waits for Docker")
        time.sleep(3)
        # The waiting units must not wake what somebody has stopped.
        assert HOST.run("systemctl is-active docker", check=False) == "inactive"
        assert HOST.active("llama") == HOST.active("nemotron") == "active"
        assert client.failures == []
        HOST.run("systemctl start docker")
        wait_until(lambda: word("llama")["phase"] == "ready", "the unit has found its container again")
    assert client.outage < 2
    assert HOST.identity() == before


def test_start_of_a_unit_brings_docker_up() -> None:
    before = HOST.identity()
    HOST.run("systemctl reset-failed docker; systemctl stop docker.socket docker")
    began = time.monotonic()
    HOST.run("systemctl restart nim-nemotron")
    # Docker's start waits for the unit's stop, so that must not wait for Docker.
    assert time.monotonic() - began < 20
    assert HOST.run("systemctl is-active docker") == "active"
    wait_until(lambda: word("nemotron")["phase"] == "ready", "the container was adopted")
    after = HOST.identity()
    assert after["nemotron"].serving == before["nemotron"].serving
    assert after["llama"] == before["llama"]


def word(model: str) -> dict[str, object]:
    return HOST.read_json("/run/nim/%s.json" % model)


@pytest.fixture
def without_live_restore() -> Iterator[None]:
    kept = HOST.run("cat /etc/docker/daemon.json")
    HOST.write("/etc/docker/daemon.json", kept.replace('"live-restore": true', '"live-restore": false'))
    assert HOST.run("cat /etc/docker/daemon.json") != kept
    HOST.run("systemctl reload docker")
    yield
    HOST.write("/etc/docker/daemon.json", kept)
    HOST.run("systemctl start docker; systemctl reload docker")


@pytest.mark.usefixtures("without_live_restore")
def test_restart_of_docker_without_live_restore_starts_them_again() -> None:
    before = HOST.identity()
    HOST.restart_docker()
    HOST.wait_ready(8000, 8001)
    after = HOST.identity()
    for model in PORTS:
        assert after[model].serving != before[model].serving
        assert HOST.unit(model, "ActiveState", "Result") == {"ActiveState": "active", "Result": "success"}


# -- the wrapper and the container ----------------------------------------------------------------


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
def test_death_of_the_wrapper_leaves_the_container_alone(signal: str) -> None:
    before = HOST.identity()
    with HOST.client(8000) as client:
        kill_wrapper("llama", signal)
        wait_until(
            lambda: HOST.identity("llama")["llama"].wrapper_pid not in (0, before["llama"].wrapper_pid), "a new wrapper"
        )
        wait_until(lambda: word("llama")["phase"] == "ready", "the container was adopted")
    after = HOST.identity()
    assert client.failures == []
    assert after["llama"].serving == before["llama"].serving
    assert after["nemotron"] == before["nemotron"]
    # The old wrapper's docker wait went with it, and the new one has its own.
    waiting = "pgrep -fc '^docker wait nim-llama$'"
    wait_until(lambda: HOST.run(waiting, check=False) == "1", "one docker wait")


@pytest.mark.parametrize("command", ["docker kill", "docker stop", "docker rm -f"])
def test_end_of_the_container_starts_a_new_one(command: str) -> None:
    before = HOST.identity()
    HOST.run("%s nim-nemotron" % command)
    wait_until(
        lambda: (HOST.container_state("nemotron") or {}).get("Pid") not in (None, 0, before["nemotron"].container_pid),
        "there is a new container",
    )
    HOST.wait_ready(8001)
    after = HOST.identity()
    assert after["nemotron"].container != before["nemotron"].container
    assert after["llama"] == before["llama"]


def test_good_restarts_do_not_use_up_the_start_limit() -> None:
    allowed = int(HOST.unit("nemotron", "StartLimitBurst")["StartLimitBurst"])
    for _number in range(allowed + 1):
        pid = HOST.identity("nemotron")["nemotron"].container_pid
        HOST.run("docker kill nim-nemotron")
        wait_until(
            lambda pid=pid: (HOST.container_state("nemotron") or {}).get("Pid") not in (None, 0, pid), "a new container"
        )
        HOST.wait_ready(8001)
        wait_until(lambda: word("nemotron")["phase"] == "ready", "the wrapper knows that it is ready")
    assert HOST.active("nemotron") == "active"


def test_daemon_reload_leaves_containers_and_their_gpus_alone() -> None:
    before = HOST.identity()
    HOST.run("systemctl daemon-reload")
    HOST.run("touch /etc/systemd/system/nim.slice && systemctl daemon-reload")
    assert HOST.identity() == before
    for model in PORTS:
        assert len(HOST.gpus_inside(model)) == 1


# -- stops ----------------------------------------------------------------------------------------


def test_stop_stays_stopped() -> None:
    before = HOST.identity()
    HOST.run("systemctl stop nim-llama")
    state = HOST.container_state("llama")
    assert state and not state["Running"] and state["ExitCode"] == 0
    HOST.restart_docker()
    time.sleep(2)
    assert HOST.unit("llama", "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    assert not HOST.container_state("llama")["Running"]
    assert HOST.identity("nemotron")["nemotron"] == before["nemotron"]
    HOST.run("systemctl start nim-llama")
    HOST.wait_ready(8000)


def test_explicit_restart_makes_a_new_container() -> None:
    before = HOST.identity()
    HOST.run("systemctl restart nim-llama")
    HOST.wait_ready(8000)
    after = HOST.identity()
    assert after["llama"].container != before["llama"].container
    assert after["nemotron"] == before["nemotron"]


def test_stop_of_the_target_stops_all_and_its_start_starts_all() -> None:
    HOST.run("systemctl stop nim.target")
    # systemctl waits for the target, not for what is part of it.
    wait_until(lambda: {HOST.active(model) for model in PORTS} == {"inactive"}, "both units are stopped")
    assert not any(HOST.container_state(model)["Running"] for model in PORTS)
    HOST.run("systemctl start nim.target")
    HOST.wait_ready(*PORTS.values())


def test_stop_between_two_starts() -> None:
    """The pause is 0.2 s; a longer one makes the gap visible that systemd leaves there."""
    drop_in = "/run/systemd/system/nim-llama.service.d/pause.conf"
    before = HOST.identity()
    HOST.write(drop_in, "[Service]\nRestartSec=20\n")
    HOST.run("systemctl daemon-reload")
    try:
        kill_wrapper("llama", "SIGKILL")
        wait_until(lambda: HOST.unit("llama", "SubState")["SubState"] == "auto-restart", "systemd waits", 10, 0.05)
        HOST.run("systemctl stop nim-llama")
        # systemd calls nobody there (systemd.service(5)): the container goes on.
        assert HOST.active("llama") == "inactive"
        assert HOST.container_state("llama")["Running"]
        FLEET.nim(FLEET.changed("gpu01", "llama", state="stopped"))
        assert not HOST.container_state("llama")["Running"]
        assert HOST.identity("nemotron")["nemotron"] == before["nemotron"]
    finally:
        HOST.run("rm -f %s && systemctl daemon-reload" % drop_in)


# -- maintenance and reboot -----------------------------------------------------------------------


def test_maintenance_holds_services_back() -> None:
    before = HOST.identity()
    HOST.run("touch " + MARKER)
    try:
        HOST.run("systemctl stop nim-llama")
        HOST.run("systemctl start nim-llama")
        assert HOST.unit("llama", "ActiveState", "ConditionResult") == {
            "ActiveState": "inactive",
            "ConditionResult": "no",
        }
        assert HOST.run("systemctl is-failed nim-llama", check=False) == "inactive"
        run = FLEET.nim()
        assert "maintenance" in run.warnings()
        assert not HOST.container_state("llama")["Running"]
        # A wrapper that dies under maintenance is not replaced; its container goes on.
        kill_wrapper("nemotron", "SIGKILL")
        wait_until(lambda: HOST.active("nemotron") == "inactive", "the unit gave up")
        assert HOST.unit("nemotron", "Result")["Result"] == "success"
        assert HOST.ready(8001)
    finally:
        HOST.run("rm -f " + MARKER)
    run = FLEET.nim()
    assert run.restarts(HOST.name) == {"nim-llama.service", "nim-nemotron.service"}
    after = HOST.identity()
    assert after["nemotron"].serving == before["nemotron"].serving
    assert after["llama"].container != before["llama"].container


def test_reboot_brings_all_models_back() -> None:
    HOST.reboot()
    HOST.wait_ready(*PORTS.values())
    run = FLEET.site()
    assert run.changed() == []
