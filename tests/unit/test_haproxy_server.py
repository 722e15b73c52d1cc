# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Drain, maintenance and return of servers, against a real HAProxy under load."""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
import tempfile
import threading
import time
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _haproxy_runtime
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_notes import RECORD, carried, locked
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_settings import Server
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_state import ask
from ansible_collections.gpu_fleet.nim.plugins.module_utils._haproxy_server import HaproxyServer, answer
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Outcome, converge
from fake_host import FakeHost
from gateway_world import HAPROXY, Gateway, Load, Nim, until

pytestmark = pytest.mark.skipif(HAPROXY is None, reason="needs haproxy; `make unit` installs it")


class GatewayHost(FakeHost):
    """Files in memory, but time passes."""

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.05))


class World:
    def __init__(self, directory: pathlib.Path) -> None:
        self.nims = {name: Nim(name) for name in ("one", "two", "only")}
        self.gateway = Gateway(
            directory,
            [
                Server("gpu01", "llama", "127.0.0.1", self.nims["one"].port, ("llama",)),
                Server("gpu02", "llama", "127.0.0.1", self.nims["two"].port, ("llama",)),
                Server("gpu03", "mistral", "127.0.0.1", self.nims["only"].port, ("mistral",)),
            ],
        )
        self.host = GatewayHost()
        for server in ("gpu01:llama", "gpu02:llama", "gpu03:mistral"):
            self.gateway.wait_for(server, "UP")

    def resource(self, host: str, state: str, **options: t.Any) -> HaproxyServer:
        options.setdefault("timeout", 10)
        layout = self.gateway.layout
        resource = HaproxyServer(host, state, socket=layout.socket, master_socket=layout.master_socket, **options)
        resource.locked = contextlib.nullcontext
        return resource

    def run(self, host: str, state: str, check_mode: bool = False, **options: t.Any) -> Outcome[t.Any]:
        return converge(self.host, self.resource(host, state, **options), check_mode=check_mode)

    def fails(self, host: str, state: str, reason: str, **options: t.Any) -> FleetError:
        with pytest.raises(FleetError) as caught:
            self.run(host, state, **options)
        assert caught.value.reason == reason
        return caught.value

    def served_by(self) -> set[str]:
        return {self.gateway.request(body={"model": "llama"}).json["server"] for _number in range(4)}

    def close(self) -> None:
        self.gateway.close()
        for nim in self.nims.values():
            nim.close()


@pytest.fixture
def world() -> t.Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="gw") as directory:
        world = World(pathlib.Path(directory))
        try:
            yield world
        finally:
            world.close()


def test_a_host_leaves_and_returns_under_load_and_nobody_notices(world: World) -> None:
    for nim in world.nims.values():
        nim.tokens = 40
    load = Load(world.gateway, "llama", clients=6)
    until(lambda: world.nims["one"].running and world.nims["two"].running, "requests run on both")
    for host, name, other in (("gpu01", "one", "two"), ("gpu02", "two", "one")):
        for state in ("drained", "maintenance"):
            outcome = world.run(host, state)
            assert outcome.changed
            assert answer(outcome.state, host)["drained"]
            assert world.nims[name].running == 0
        seen = len(world.nims[other].requests)
        until(lambda other=other, seen=seen: len(world.nims[other].requests) > seen + 6, "the other one serves")
        assert world.nims[name].running == 0
        outcome = world.run(host, "enabled")
        assert answer(outcome.state, host) == {
            "servers": [
                {
                    "backend": "llama",
                    "server": host + ":llama",
                    "state": "enabled",
                    "status": "UP",
                    "sessions": answer(outcome.state, host)["servers"][0]["sessions"],
                }
            ],
            "drained": False,
            "reason": "",
        }
        seen = len(world.nims[name].requests)
        until(lambda name=name, seen=seen: len(world.nims[name].requests) > seen + 3, "it serves again")
    load.end()
    assert load.failures == []
    assert load.answers > 40


def test_a_second_run_changes_nothing_and_check_mode_nothing_at_all(world: World) -> None:
    outcome = world.run("gpu01", "drained", check_mode=True)
    assert outcome.changed
    assert [change.action for change in outcome.changes] == ["drained", "wait"]
    assert world.gateway.status("gpu01:llama").startswith("UP")
    assert world.host.files == {}
    for state in ("drained", "maintenance", "drained", "enabled"):
        assert world.run("gpu01", state, check_mode=True).changed
        assert world.run("gpu01", state).changed
        assert not world.run("gpu01", state).changed
        assert not world.run("gpu01", state, check_mode=True).changed
    assert b"gpu01" not in world.host.files[RECORD]


def test_the_last_server_of_a_model_stays_unless_it_is_allowed(world: World) -> None:
    for check_mode in (True, False):
        error = world.fails("gpu03", "drained", "last_server", check_mode=check_mode)
        assert "gpu03:mistral" in error.message
    world.run("gpu01", "drained")
    world.fails("gpu02", "maintenance", "last_server")
    assert world.served_by() == {"two"}
    assert world.run("gpu03", "drained", allow_last=True).changed
    # What serves nobody takes nothing away, and is just what one wants to repair.
    world.nims["two"].ready = False
    world.gateway.wait_for("gpu02:llama", "DOWN")
    assert world.run("gpu02", "maintenance").changed


def test_a_replica_that_is_down_does_not_count(world: World) -> None:
    world.nims["two"].ready = False
    world.gateway.wait_for("gpu02:llama", "DOWN")
    world.fails("gpu01", "drained", "last_server")
    # The sick one itself can be taken out.
    assert world.run("gpu02", "drained").changed
    assert not world.run("gpu02", "drained").changed


def test_a_replica_whose_last_check_is_old_does_not_count(world: World) -> None:
    resource = world.resource("gpu01", "drained")
    asked = []

    def probe(address: str, port: int) -> str:
        asked.append(port)
        return "Connection refused"

    resource.probe = probe
    with pytest.raises(FleetError, match="gpu02:llama does not say that it is ready: Connection refused") as caught:
        converge(world.host, resource, check_mode=False)
    assert caught.value.reason == "last_server"
    assert asked == [world.nims["two"].port]
    assert world.gateway.status("gpu01:llama").startswith("UP")


def test_what_somebody_else_drained_is_left_alone(world: World) -> None:
    world.gateway.ask("set server llama/gpu01:llama state drain")
    outcome = world.run("gpu01", "drained")
    assert not outcome.changed
    assert answer(outcome.state, "gpu01")["drained"]
    for state in ("enabled", "maintenance"):
        outcome = world.run("gpu01", state)
        assert not outcome.changed
        assert "somebody else" in str(outcome.blocked[0].blocked)
        assert answer(outcome.state, "gpu01")["reason"] == "foreign_drain"
    assert world.gateway.status("gpu01:llama").startswith("DRAIN")
    # Also when somebody goes further with what was drained by us.
    world.run("gpu02", "drained", allow_last=True)
    world.gateway.ask("set server llama/gpu02:llama state maint")
    assert not world.run("gpu02", "enabled").changed
    assert world.gateway.status("gpu02:llama").startswith("MAINT")


def test_a_server_that_somebody_enabled_is_drained_anew_and_is_no_more_ours(world: World) -> None:
    world.run("gpu01", "drained")
    world.gateway.ask("set server llama/gpu01:llama state ready")
    assert world.run("gpu01", "drained").changed
    world.gateway.ask("set server llama/gpu01:llama state ready")
    planned = world.run("gpu01", "enabled", check_mode=True)
    assert [change.what for change in planned.changes] == ["note on server llama/gpu01:llama"]
    assert not planned.changed
    assert not world.run("gpu01", "enabled").changed
    world.gateway.ask("set server llama/gpu01:llama state drain")
    assert answer(world.run("gpu01", "enabled").state, "gpu01")["reason"] == "foreign_drain"
    world.gateway.ask("set server llama/gpu01:llama state ready")
    # It is found out on the way to another host too; a host that is gone leaves no note.
    world.run("gpu01", "drained")
    world.gateway.ask("set server llama/gpu01:llama state ready")
    world.host.files[RECORD] = world.host.files[RECORD].replace(b'"llama/', b'"x/gone:llama": "drained", "llama/')
    world.run("gpu02", "drained")
    assert json.loads(world.host.files[RECORD])["servers"] == {"llama/gpu02:llama": "drained"}
    world.gateway.ask("set server llama/gpu01:llama state drain")
    assert not world.run("gpu01", "enabled").changed


def test_notes_are_carried_into_further_backends_and_no_others() -> None:
    notes = {"base/gpu01:m": "maintenance", "alias/gpu01:m": "drained", "base/gpu02:m": "drained"}
    before = {*notes, "lora/gpu02:m", "base/gpu03:m"}
    after = [*before, "new/gpu01:m", "new/gpu02:m", "new/gpu03:m"]
    # In lora, somebody else has drained gpu02.
    assert carried(notes, before, after) == {**notes, "new/gpu01:m": "maintenance", "new/gpu02:m": "drained"}


def test_the_wait_for_running_requests_ends(world: World) -> None:
    thread = threading.Thread(
        target=world.gateway.request, kwargs={"body": {"model": "mistral", "seconds": 2}}, daemon=True
    )
    thread.start()
    until(lambda: world.nims["only"].running, "a request runs")
    error = world.fails("gpu03", "maintenance", "drain_timeout", timeout=0, allow_last=True)
    assert error.facts["drained"] is False
    assert error.facts["servers"][0]["sessions"] == 1
    assert [change["to"] for change in error.facts["changes"]] == ["drained", 0]
    # It stays drained, and a longer wait goes on from there.
    assert world.gateway.status("gpu03:mistral").startswith("DRAIN")
    assert world.run("gpu03", "maintenance").changed
    thread.join()


@pytest.mark.parametrize("state", ["drained", "maintenance"])
def test_a_host_is_enabled_only_when_it_has_proved_ready(world: World, state: str) -> None:
    world.run("gpu01", state)
    world.nims["one"].ready = False
    error = world.fails("gpu01", "enabled", "not_ready", timeout=1)
    assert "llama/gpu01:llama" in error.message
    assert error.facts["servers"][0]["state"] == "drained"
    assert world.served_by() == {"two"}
    threading.Timer(0.5, lambda: setattr(world.nims["one"], "ready", True)).start()
    assert world.run("gpu01", "enabled").changed
    assert world.served_by() == {"one", "two"}


def test_only_the_models_that_are_there_are_waited_for_and_enabled(world: World) -> None:
    nim = Nim("gone")
    servers = [
        Server("gpu01", "llama", "127.0.0.1", world.nims["one"].port, ("llama",)),
        Server("gpu01", "new", "127.0.0.1", nim.port, ("new",)),
        Server("gpu02", "llama", "127.0.0.1", world.nims["two"].port, ("llama",)),
    ]
    world.gateway.write(servers)
    world.gateway.reload()
    world.gateway.wait_for("gpu01:new", "UP")
    world.run("gpu01", "drained", allow_last=True)
    nim.close()
    # As a whole the host does not come back, and one that serves as before is lost with it.
    assert world.fails("gpu01", "enabled", "not_ready", timeout=1)
    world.gateway.wait_for("gpu01:new", "DOWN")
    assert [change.what for change in world.run("gpu01", "enabled", models=["llama"]).changes] == [
        "readiness of llama/gpu01:llama",
        "server llama/gpu01:llama",
        "server new/gpu01:new",
    ]
    assert world.served_by() == {"one", "two"}
    # It gets nothing, and is not forgotten: whoever brings the model up has nothing to do here.
    assert world.gateway.status("gpu01:new").startswith("DOWN")
    assert world.resource("gpu01", "enabled").observe(world.host).ours == {}
    # One whose checks pass is enabled by those who wait for it.
    world.run("gpu01", "drained")
    assert [change.what for change in world.run("gpu01", "enabled", models=[]).changes] == ["server new/gpu01:new"]


def test_a_check_of_seconds_ago_is_not_believed(world: World) -> None:
    resource = world.resource("gpu01", "enabled", timeout=0)
    converge(world.host, world.resource("gpu01", "drained"), check_mode=False)
    # HAProxy's last check has passed; the server itself says no.
    resource.probe = lambda address, port: "status 503"
    with pytest.raises(FleetError, match="status 503"):
        converge(world.host, resource, check_mode=False)


def test_a_reload_in_between_changes_nothing(world: World) -> None:
    world.run("gpu01", "maintenance")
    world.gateway.reload()
    assert not world.run("gpu01", "maintenance").changed
    assert world.run("gpu01", "enabled").changed
    assert world.served_by() == {"one", "two"}


@pytest.mark.parametrize("lists_nothing", [False, True])
def test_requests_of_before_a_reload_are_waited_for(
    world: World, lists_nothing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_haproxy_2_4(path: str, command: str) -> str:
        text = ask(path, command)
        return text.partition("\n")[0] + "\n\n" if command.startswith("@!") and "show stat" in command else text

    if lists_nothing:
        monkeypatch.setattr(_haproxy_runtime, "ask", as_haproxy_2_4)
    for nim in world.nims.values():
        nim.tokens, nim.pause = 250, 0.2
    # One after the other: two at once may both be given to the same server.
    loads = [Load(world.gateway, "llama", clients=1, streamed=True)]
    until(lambda: world.nims["one"].running or world.nims["two"].running, "a stream runs")
    loads.append(Load(world.gateway, "llama", clients=1, streamed=True))
    until(lambda: world.nims["one"].running and world.nims["two"].running, "a stream runs on each")
    for load in loads:
        load.stop.set()
    world.gateway.reload()
    error = world.fails("gpu01", "drained", "drain_timeout", timeout=0)
    # Which server they are on is not known there, so all are waited for.
    assert error.facts["servers"][0]["sessions"] == (2 if lists_nothing else 1)
    assert world.nims["one"].running == 1
    for nim in world.nims.values():
        nim.pause = 0.02
    world.run("gpu01", "drained")
    assert world.nims["one"].running == 0
    for load in loads:
        load.end()
    assert [load.failures for load in loads] == [[], []]


def test_a_request_that_arrives_during_a_reload_may_still_get_to_the_host(world: World) -> None:
    body = b'{"model": "llama"}'
    with socket.create_connection(("127.0.0.1", world.gateway.port), timeout=30) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n{" % len(body))
        until(lambda: world.gateway.frontend("scur") == "1", "the request has begun to arrive")
        world.gateway.reload()
        # Both hosts may be given it by the process of before, which knows of no drain.
        assert world.fails("gpu01", "drained", "drain_timeout", timeout=0).facts["servers"][0]["sessions"] == 1
        client.sendall(body[1:])
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    world.run("gpu01", "drained")
    # What was drained before the reload gets nothing from any process.
    with socket.create_connection(("127.0.0.1", world.gateway.port), timeout=30) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n{" % len(body))
        until(lambda: world.gateway.frontend("scur") == "1", "the request has begun to arrive")
        world.gateway.reload()
        assert answer(world.run("gpu01", "drained", timeout=0).state, "gpu01")["drained"]


def test_several_gateways_are_told_one_by_one(world: World) -> None:
    with tempfile.TemporaryDirectory(prefix="gw") as directory:
        second = World(pathlib.Path(directory))
        try:
            for gateway in (world, second):
                assert gateway.run("gpu01", "drained").changed
                assert not gateway.run("gpu01", "drained").changed
        finally:
            second.close()


def test_a_gateway_that_is_away_and_a_host_that_it_does_not_know(world: World) -> None:
    error = world.fails("gpu09", "drained", "unknown_host")
    assert "gpu09" in error.message
    assert not world.run("gpu09", "drained", ignore_unknown=True).changed
    world.gateway.close()
    for state in ("drained", "enabled"):
        assert "systemctl status haproxy" in world.fails("gpu01", state, "gateway_unreachable").message


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b'{"servers": ["a"]}', b'{"servers": {"a/b:c": 5}}'])
def test_broken_notes_are_told_and_left(world: World, content: bytes) -> None:
    world.run("gpu01", "drained")
    world.host.files[RECORD] = content
    for wanted in ("enabled", "drained"):
        with pytest.raises(FleetError) as caught:
            world.run("gpu01", wanted)
        assert caught.value.reason == "state_unreadable" and RECORD in caught.value.message
    assert world.host.files[RECORD] == content
    # As the message says.
    del world.host.files[RECORD]
    assert answer(world.run("gpu01", "enabled").state, "gpu01")["reason"] == "foreign_drain"


def test_one_run_at_a_time(tmp_path: pathlib.Path) -> None:
    order = []
    path = str(tmp_path / "run" / "lock")

    def second() -> None:
        with locked(path):
            order.append("second")

    with locked(path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


@pytest.mark.parametrize(("host", "timeout"), [("", 1), ("gpu01", -1)])
def test_options_are_checked(host: str, timeout: int) -> None:
    with pytest.raises(FleetError) as caught:
        HaproxyServer(host, "drained", timeout=timeout)
    assert caught.value.reason == "invalid_option"
