# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a gateway says of its servers and requests, from a real HAProxy; and what is made of it during a rollout."""

from __future__ import annotations

import contextlib
import http.client
import json
import pathlib
import socket
import tempfile
import time
import typing as t

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _rollout_gateways as gateways
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_settings import Server
from ansible_collections.gpu_fleet.nim.plugins.module_utils._haproxy_info import observe_gateway
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout import FleetHost
from ansible_collections.gpu_fleet.nim.plugins.modules import haproxy_info
from fake_host import FakeHost
from gateway_world import HAPROXY, Gateway, Nim, until

NEEDS_HAPROXY = pytest.mark.skipif(HAPROXY is None, reason="needs haproxy; `make unit` installs it")
RECORD = "/var/lib/gpu_fleet/gateway-servers.json"


class World:
    def __init__(self, directory: pathlib.Path) -> None:
        self.nims = {name: Nim(name) for name in ("one", "two")}
        servers = [
            Server("gpu%02d" % number, "llama", "127.0.0.1", nim.port, ("llama",))
            for number, nim in enumerate(self.nims.values(), 1)
        ]
        self.gateway = Gateway(directory, servers)
        self.host = FakeHost()
        for server in servers:
            self.gateway.wait_for(server.name, "UP")

    def look(self) -> dict[str, t.Any]:
        return observe_gateway(self.host, self.gateway.layout.socket)

    def ask(self, **more: t.Any) -> int:
        return self.gateway.request(body={"model": "llama", **more}).status

    def counts(self) -> dict[str, int]:
        (row,) = self.look()["traffic"]
        assert row.pop("backend") == "llama"
        return t.cast("dict[str, int]", row)

    def close(self) -> None:
        self.gateway.close()
        for nim in self.nims.values():
            nim.close()


@pytest.fixture
def world() -> t.Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="gw") as directory:
        made = World(pathlib.Path(directory))
        try:
            yield made
        finally:
            made.close()


@NEEDS_HAPROXY
def test_who_serves_and_who_was_taken_out_by_whom(world: World) -> None:
    world.gateway.ask("set server llama/gpu01:llama state drain")
    world.nims["two"].ready = False
    world.gateway.wait_for("gpu02:llama", "DOWN")
    first, second = world.look()["servers"]
    assert first["host"] == "gpu01" and first["model"] == "llama" and first["backend"] == "llama"
    assert first["port"] == world.nims["one"].port
    assert (first["state"], first["serving"], first["foreign"]) == ("drained", False, True)
    assert (second["state"], second["serving"], second["foreign"]) == ("enabled", False, False)
    world.host.files[RECORD] = json.dumps({"version": 1, "servers": {"llama/gpu01:llama": "drained"}}).encode()
    assert not world.look()["servers"][0]["foreign"]


@NEEDS_HAPROXY
def test_failed_and_broken_off_requests_are_told_from_whole_ones(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for streamed in (True, False, True):
        assert world.ask(stream=streamed) == 200
    # An unknown model is nobody's failure and no request of a backend.
    assert world.gateway.request(body={"model": "other"}).status == 404
    assert world.counts() == {"requests": 3, "failed": 0, "truncated": 0, "left": 0}
    for nim in world.nims.values():
        monkeypatch.setattr(nim.server.RequestHandlerClass, "stream", _broken_off)
    with pytest.raises(http.client.IncompleteRead):
        world.ask(stream=True)
    until(lambda: world.counts()["truncated"] == 1, "the broken stream is counted")
    for nim in world.nims.values():
        monkeypatch.setattr(nim.server.RequestHandlerClass, "stream", _no_answer)
    assert world.ask(stream=True) == 502
    until(lambda: world.counts() == {"requests": 5, "failed": 1, "truncated": 1, "left": 0}, "the 502 is counted")
    monkeypatch.undo()
    for nim in world.nims.values():
        nim.tokens = 200
    connection = http.client.HTTPConnection("127.0.0.1", world.gateway.port, timeout=10)
    connection.request("POST", "/v1/completions", json.dumps({"model": "llama", "stream": True}))
    response = connection.getresponse()
    response.read(5)
    with contextlib.suppress(OSError):
        response.close()
        connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    until(lambda: world.counts()["left"] == 1, "the client that left is counted")
    # It left by itself: nothing has failed.
    assert (world.counts()["failed"], world.counts()["truncated"]) == (1, 1)


def _broken_off(self: t.Any) -> None:
    self.send_response(200)
    self.send_header("Transfer-Encoding", "chunked")
    self.end_headers()
    self.chunk("data: x\n\n")
    time.sleep(0.1)
    raise OSError


def _no_answer(self: t.Any) -> None:
    raise OSError


@NEEDS_HAPROXY
def test_a_reload_begins_new_counts_and_that_is_told(world: World) -> None:
    def sample() -> tuple[gateways.GatewayLook, ...]:
        return gateways.parse_looks({"results": [dict(world.look(), item="gw1")]})

    for _number in range(3):
        world.ask()
    samples = [sample()]
    for _number in range(4):
        world.ask()
    until(lambda: world.counts()["requests"] == 7, "all are counted")
    samples.append(sample())
    found = gateways.traffic_of(samples)
    assert found is not None and found.as_dict()["complete"] and found.total("requests") == 4
    # The seventh and eighth are counted by the old process, and lost with it.
    for _number in range(2):
        world.ask()
    world.gateway.reload()
    for _number in range(5):
        world.ask()
    until(lambda: world.counts()["requests"] == 5, "the new process has counted all")
    samples.append(sample())
    assert samples[1][0].process != samples[2][0].process
    found = gateways.traffic_of(samples)
    assert found is not None and found.total("requests") == 4 + 5
    assert [gap[0] for gap in found.gaps] == ["gw1"] and not found.as_dict()["complete"]


@NEEDS_HAPROXY
def test_the_module_asks_and_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(haproxy_info, "Host", lambda: world.host)
    answers = []
    for path in (world.gateway.layout.socket, "/nowhere/socket"):
        with patch_module_args({"socket": path}), pytest.raises(SystemExit):
            haproxy_info.main()
        answers.append(json.loads(capsys.readouterr().out))
    assert not answers[0]["changed"] and len(answers[0]["servers"]) == 2 and answers[0]["process"].startswith("pid ")
    assert answers[1]["failed"] and answers[1]["reason"] == "gateway_unreachable"


# -- what a rollout makes of it -------------------------------------------------------------------


def look(*servers: dict[str, t.Any], **more: t.Any) -> gateways.GatewayLook:
    return gateways.GatewayLook("gw1", servers=servers, **more)


def server(host: str = "gpu01", model: str = "llama", **more: t.Any) -> dict[str, t.Any]:
    return {"host": host, "model": model, "serving": True, "foreign": False, **more}


def both(*models: str, **more: t.Any) -> FleetHost:
    return FleetHost("gpu01", frozenset(models), frozenset(models), **more)


def test_a_model_is_ready_where_every_gateway_says_so() -> None:
    host = both("llama", "qwen")
    good = look(server(), server(model="qwen"))
    assert gateways.as_gateways_see(host, [good, good]) == host
    found = gateways.as_gateways_see(host, [good, look(server(serving=False), server(model="qwen"))])
    assert found.serving == {"qwen"} and found.available and not found.down
    found = gateways.as_gateways_see(host, [look(server(serving=False), server(model="qwen", serving=False))])
    assert found.down and not found.available and found.wanted and found.serving == frozenset()
    # Who is not behind the gateways is not judged by them.
    assert gateways.as_gateways_see(host, [look(server("gpu02", serving=False)), look()]) == host


def test_a_host_that_is_out_already_is_not_called_down() -> None:
    host = both("llama", available=False, resumable=True)
    found = gateways.as_gateways_see(host, [look(server(serving=False, state="drained"))])
    assert found.resumable and not found.down and found.wanted


def test_a_host_that_somebody_took_out_is_his() -> None:
    for host in (both("llama"), both("llama", available=False, resumable=True), both("llama", down=True)):
        found = gateways.as_gateways_see(host, [look(server()), look(server(serving=False, foreign=True))])
        assert not found.wanted and found.skip == "somebody else has drained it at a gateway"
    skipped = gateways.as_gateways_see(both("llama", skip="asked for"), [look(server(foreign=True))])
    assert skipped.skip == "asked for" and not skipped.available


def test_names_are_as_haproxy_has_them() -> None:
    odd = FleetHost("gpu 01/a", frozenset(["llama"]), frozenset(["llama"]))
    assert not gateways.as_gateways_see(odd, [look(server("gpu_01_a", serving=False))]).available
    assert gateways.unknown_at("gpu 01/a", [look(server("gpu_01_a")), look(server("gpu02"))]) == "gw1"
    assert gateways.unknown_at("gpu01", [look(server()), gateways.GatewayLook("gw2", error="x")]) == ""


def test_what_cannot_be_told_is_not_made_up() -> None:
    def sample(requests: int, process: str = "p", **more: t.Any) -> list[gateways.GatewayLook]:
        counts = {"m": {"requests": requests, "failed": 0, "truncated": 0}}
        return [gateways.GatewayLook("gw1", process=process, traffic=counts, **more)]

    assert gateways.traffic_of([]) is None and gateways.traffic_of([sample(1)]) is None
    broken = [gateways.GatewayLook("gw1", error="no socket")]
    found = gateways.traffic_of([sample(1), sample(5), broken])
    assert found is not None and found.total("requests") == 4 and found.unknown == ["gw1"]
    # It was away for a while only; nothing is missing.
    found = gateways.traffic_of([sample(1), broken, sample(5)])
    assert found is not None and found.total("requests") == 4 and found.as_dict()["complete"]
    # A backend that was not there before.
    found = gateways.traffic_of([[gateways.GatewayLook("gw1", process="p")], sample(3)])
    assert found is not None and found.total("requests") == 3
    assert gateways.parse_looks(None) == () and gateways.parse_looks({"skipped": True}) == ()
