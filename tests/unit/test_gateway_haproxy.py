# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gateway's configuration in a real HAProxy: what clients get, and what survives a reload."""

from __future__ import annotations

import dataclasses
import http.client
import json
import pathlib
import ssl
import subprocess
import tempfile
import time
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_settings import Server, hash_keys
from gateway_world import HAPROXY, Gateway, Load, Nim, until

pytestmark = pytest.mark.skipif(HAPROXY is None, reason="needs haproxy; `make unit` installs it")

KEY = "sk-test-0123456789abcdef"
LIMIT = 65536


class World(t.NamedTuple):
    gateway: Gateway
    one: Nim
    two: Nim
    other: Nim

    def servers(self) -> list[Server]:
        return [
            Server("gpu01", "llama", "127.0.0.1", self.one.port, ("meta/llama", "base")),
            Server("gpu02", "llama", "127.0.0.1", self.two.port, ("meta/llama", "base")),
            Server("gpu02", "mistral", "127.0.0.1", self.other.port, ("mistralai/mistral",)),
        ]


def make_world(**options: t.Any) -> t.Iterator[World]:
    nims = Nim("one"), Nim("two"), Nim("other")
    with tempfile.TemporaryDirectory(prefix="gw") as directory:
        world = World(t.cast(Gateway, None), *nims)
        gateway = Gateway(pathlib.Path(directory), world.servers(), **options)
        world = world._replace(gateway=gateway)
        try:
            for server in world.servers():
                gateway.wait_for(server.name, "UP")
            yield world
        finally:
            gateway.close()
            for nim in nims:
                nim.close()


@pytest.fixture(scope="module")
def shared() -> t.Iterator[World]:
    """For questions that change nothing."""
    yield from make_world(body_limit=LIMIT)


@pytest.fixture
def world() -> t.Iterator[World]:
    yield from make_world()


# -- routing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "servers"),
    [("meta/llama", {"one", "two"}), ("base", {"one", "two"}), ("mistralai/mistral", {"other"})],
)
def test_a_request_goes_to_the_servers_of_its_model(shared: World, model: str, servers: set[str]) -> None:
    answers = [shared.gateway.request(body={"model": model}) for _number in range(6)]
    assert {answer.status for answer in answers} == {200}
    assert {answer.json["server"] for answer in answers} == servers
    assert {answer.json["model"] for answer in answers} == {model}


def test_the_model_may_stand_behind_a_long_conversation(shared: World) -> None:
    body = {"messages": [{"role": "user", "content": "x" * (LIMIT - 200)}], "model": "mistralai/mistral"}
    answer = shared.gateway.request(body=body)
    assert (answer.status, answer.json["server"]) == (200, "other")
    assert answer.json["size"] == len(json.dumps(body)) > LIMIT - 200


@pytest.mark.parametrize("name", ["mistralai\\/mistral", "mistralai/\\u006distral"])
def test_escaped_characters_in_the_name_are_read_as_json_reads_them(shared: World, name: str) -> None:
    # PHP escapes slashes.
    answer = shared.gateway.request(body=b'{"messages": "a\\\\/\\"b", "model": "%s"}' % name.encode())
    assert (answer.status, answer.json["server"]) == (200, "other")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [LIMIT + 1, 4 * LIMIT])
def test_a_body_over_the_limit_is_refused_and_reaches_no_model(shared: World, size: int, chunked: bool) -> None:
    before = len(shared.one.requests) + len(shared.two.requests) + len(shared.other.requests)
    raw = json.dumps({"model": "base", "messages": "x" * size}).encode()[: size - 2] + b'"}'
    answer = shared.gateway.request(body=raw, chunked=chunked)
    assert (answer.status, answer.code) == (413, "request_too_large")
    assert "64 KiB" in answer.json["error"]["message"]
    assert len(shared.one.requests) + len(shared.two.requests) + len(shared.other.requests) == before


def test_a_chunked_body_within_the_limit_is_routed(shared: World) -> None:
    body = {"messages": "x" * (LIMIT - 100), "model": "base"}
    assert shared.gateway.request(body=body, chunked=True).status == 200


@pytest.mark.parametrize("name", ["meta/llama-70b", "META/LLAMA", "base ", '"},{', "x" * 5000, "e\u0000\n\u00e9"])
def test_an_unknown_model_is_an_error_that_names_it(shared: World, name: str) -> None:
    answer = shared.gateway.request(body={"model": name})
    assert (answer.status, answer.code) == (404, "model_not_found")
    assert answer.json["error"]["param"] == "model"
    assert answer.headers["content-type"] == "application/json"
    assert name[:3].strip("\0\n") in answer.json["error"]["message"]


@pytest.mark.parametrize(("levels", "first"), [(19, False), (200, True)])
def test_a_body_may_be_nested(shared: World, levels: int, first: bool) -> None:
    tools = b'"tools": %s%s' % (b"[" * levels, b"]" * levels)
    model = b'"model": "mistralai/mistral"'
    answer = shared.gateway.request(body=b"{%s}" % b", ".join((model, tools) if first else (tools, model)))
    assert (answer.status, answer.json["server"]) == (200, "other")


def test_a_body_that_is_nested_too_deeply_is_told_so(shared: World) -> None:
    answer = shared.gateway.request(body=b'{"tools": %s%s, "model": "base"}' % (b"[" * 20, b"]" * 20))
    assert (answer.status, answer.code) == (400, "missing_model")
    assert "put the model first" in answer.json["error"]["message"]


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"model=base", b'{"messages": {"model": "base"}}', b'{"model": '])
def test_a_body_without_a_model_is_an_error(shared: World, raw: bytes) -> None:
    answer = shared.gateway.request(body=raw, method="POST")
    assert (answer.status, answer.code) == (400, "missing_model")


def test_headers_that_would_crowd_out_the_body_are_refused(shared: World) -> None:
    answer = shared.gateway.request(body={"model": "base"}, headers={"X-Long": "x" * 20000})
    assert (answer.status, answer.code) == (431, "headers_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("POST", "/metrics", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/base", 405, "method_not_allowed"),
        ("POST", "/v1/models/base", 405, "method_not_allowed"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
    ],
)
def test_other_paths_and_methods(shared: World, method: str, path: str, status: int, code: str) -> None:
    answer = shared.gateway.request(path, method=method)
    assert (answer.status, answer.code) == (status, code)


def test_the_models_of_the_fleet_are_listed(shared: World) -> None:
    answer = shared.gateway.request("/v1/models")
    assert answer.status == 200
    assert answer.json["object"] == "list"
    assert [model["id"] for model in answer.json["data"]] == ["base", "meta/llama", "mistralai/mistral"]
    for path in ("/v1/models/mistralai/mistral", "/v1/models/mistralai%2Fmistral"):
        assert shared.gateway.request(path).json == answer.json["data"][2]


def test_metrics_are_on_a_port_of_their_own(shared: World) -> None:
    text = shared.gateway.request("/metrics", port=shared.gateway.metrics_port).text
    assert 'haproxy_server_status{proxy="meta_llama",server="gpu01:llama",state="UP"} 1' in text
    assert shared.gateway.request("/metrics").status == 404


def test_requests_go_to_the_server_with_the_fewest(world: World) -> None:
    world.one.tokens, world.one.pause = 40, 0.05
    world.two.ready = False
    world.gateway.wait_for("gpu02:llama", "DOWN")
    streams = Load(world.gateway, "base", clients=2, streamed=True)
    until(lambda: world.one.running == 2, "two requests run on the first server")
    world.two.ready = True
    world.gateway.wait_for("gpu02:llama", "UP")
    streams.stop.set()
    world.two.requests.clear()
    # Two requests run on the first server, so short ones must all go to the second.
    for _number in range(5):
        assert world.gateway.request(body={"model": "base"}).json["server"] == "two"
    streams.end()
    assert streams.failures == []


# -- keys -----------------------------------------------------------------------------------------


def test_keys_are_asked_for_and_kept_from_the_servers() -> None:
    for world in make_world(keys=hash_keys({"team-a": KEY})):
        gateway = world.gateway
        for refused in (None, KEY + "x", KEY[:-1], KEY.upper(), ""):
            answer = gateway.request(body={"model": "base"}, key=refused)
            assert (answer.status, answer.code) == (401, "invalid_api_key"), refused
            assert answer.headers["www-authenticate"] == "Bearer"
        for scheme in ("Basic ", ""):
            answer = gateway.request(body={"model": "base"}, headers={"Authorization": scheme + KEY})
            assert answer.status == 401
        assert gateway.request("/v1/models").status == 401
        assert gateway.request("/v1/models", key=KEY).status == 200
        assert gateway.request(body={"model": "base"}, key=KEY).status == 200
        assert "authorization" not in (world.one.headers + world.two.headers)[0]
        assert gateway.request("/v1/health/live").status == 200
        kept = "".join(path.read_text() for path in gateway.directory.rglob("*") if path.is_file())
        assert KEY not in kept
        assert "client team-a" in kept


def test_tls_speaks_http_1_1_so_that_refusals_are_read(tmp_path: pathlib.Path) -> None:
    made = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "crt")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=gateway", *made],
        check=True,
        capture_output=True,
    )
    pem = (tmp_path / "crt").read_text() + (tmp_path / "key").read_text()
    for world in make_world(pem=pem, keys=hash_keys({"team-a": KEY})):
        context = ssl.create_default_context(cafile=str(tmp_path / "crt"))
        context.check_hostname = False
        context.set_alpn_protocols(["h2", "http/1.1"])
        # Ten times: without the body being taken in first, about every second client breaks off while it sends.
        for key, status in ((KEY, 200), *[(KEY + "x", 401)] * 10):
            connection = http.client.HTTPSConnection("127.0.0.1", world.gateway.port, timeout=10, context=context)
            body = json.dumps({"messages": "x" * 60000, "model": "base"})
            connection.request("POST", "/v1/completions", body, {"Authorization": "Bearer " + key})
            assert connection.sock.selected_alpn_protocol() == "http/1.1"
            assert connection.getresponse().status == status
            connection.close()
        with pytest.raises((OSError, http.client.HTTPException)):
            world.gateway.request("/v1/health/live")


# -- health, streams, failures --------------------------------------------------------------------


def test_readiness_is_asked_of_the_servers(world: World) -> None:
    gateway = world.gateway
    assert gateway.request("/v1/health/ready").status == 200
    world.one.ready = False
    gateway.wait_for("gpu01:llama", "DOWN")
    assert {gateway.request(body={"model": "base"}).json["server"] for _number in range(4)} == {"two"}
    world.two.ready = world.other.ready = False
    gateway.wait_for("gpu02:llama", "DOWN")
    gateway.wait_for("gpu02:mistral", "DOWN")
    answer = gateway.request(body={"model": "base"})
    assert (answer.status, answer.code) == (503, "model_unavailable")
    assert answer.json["error"]["type"] == "server_error"
    assert gateway.request("/v1/health/ready").status == 503


def test_a_stream_lasts_longer_than_the_timeout_and_silence_does_not() -> None:
    for world in make_world(inactivity_timeout=2):
        world.other.tokens, world.other.pause = 14, 0.2
        answer = world.gateway.request(body={"model": "mistralai/mistral", "stream": True})
        assert answer.status == 200
        assert answer.text.endswith("data: other 13\n\ndata: [DONE]\n\n")
        answer = world.gateway.request(body={"model": "mistralai/mistral", "seconds": 4})
        assert (answer.status, answer.code) == (504, "gateway_timeout")


def test_tokens_are_passed_on_as_they_come(world: World) -> None:
    world.other.tokens, world.other.pause = 5, 0.2
    connection = http.client.HTTPConnection("127.0.0.1", world.gateway.port, timeout=10)
    connection.request(
        "POST", "/v1/completions", json.dumps({"model": "mistralai/mistral", "stream": True}), {"Accept": "*/*"}
    )
    response = connection.getresponse()
    times = []
    while response.readline():
        times.append(time.monotonic())
    assert times[-1] - times[0] > 0.6
    connection.close()


def test_a_server_that_dies_before_it_answers_costs_nothing(world: World) -> None:
    load = Load(world.gateway, "base")
    until(lambda: load.answers > 20, "requests are answered")
    world.one.close()
    seen = load.answers
    until(lambda: load.answers > seen + 40, "requests are answered without the first server")
    load.end()
    # What was in the middle of an answer on the dead server is lost; nothing was refused.
    assert [failure for failure in load.failures if failure.startswith(("502", "503", "504"))] == []


# -- reload ---------------------------------------------------------------------------------------


def test_drain_and_maintenance_survive_a_reload(world: World) -> None:
    gateway = world.gateway
    gateway.ask("set server meta_llama/gpu01:llama state drain")
    gateway.ask("set server mistralai_mistral/gpu02:mistral state maint")
    gateway.write(world.servers(), inactivity_timeout=601)
    gateway.reload()
    assert gateway.status("gpu01:llama").startswith("DRAIN")
    assert gateway.status("gpu02:mistral").startswith("MAINT")
    assert gateway.status("gpu02:llama").startswith("UP")
    assert {gateway.request(body={"model": "base"}).json["server"] for _number in range(4)} == {"two"}


def test_a_reload_under_load_loses_nothing(world: World) -> None:
    world.one.tokens = world.two.tokens = 30
    load = Load(world.gateway, "base", clients=6)
    until(lambda: load.answers > 6, "requests are answered")
    for number in range(3):
        world.gateway.write(world.servers(), inactivity_timeout=700 + number)
        world.gateway.reload()
        seen = load.answers
        until(lambda seen=seen: load.answers > seen + 12, "requests are answered after the reload")
    load.end()
    assert load.failures == []


def test_another_name_for_a_model_costs_nothing_and_brings_nobody_back(world: World) -> None:
    gateway, servers = world.gateway, world.servers()
    # By its name, as an inventory without addresses has it.
    servers[0] = dataclasses.replace(servers[0], address="localhost")
    gateway.write(servers)
    gateway.reload()
    gateway.wait_for("gpu01:llama", "UP")
    gateway.ask("set server meta_llama/gpu02:llama state maint")
    gateway.ask("set server mistralai_mistral/gpu02:mistral state drain")
    load = Load(gateway, "meta/llama", clients=3)
    until(lambda: load.answers > 6, "requests are answered")
    before = len(world.two.requests)
    # "alias" is the first name now, so the backends are called after it; "lora" is on one server only, in a further backend.
    servers[:2] = [dataclasses.replace(server, served=("alias", *server.served)) for server in servers[:2]]
    servers[1] = dataclasses.replace(servers[1], served=(*servers[1].served, "lora"))
    servers[2] = dataclasses.replace(servers[2], port=world.one.port)
    gateway.write(servers)
    gateway.reload()
    seen = load.answers
    until(lambda: load.answers > seen + 12, "requests are answered after the reload")
    load.end()
    assert load.failures == []
    assert len(world.two.requests) == before
    # Also where it has moved; known when it has been checked there.
    gateway.wait_for("gpu02:mistral", "DRAIN")
    rows = [line.split(",") for line in gateway.ask("show stat -1 4 -1").splitlines()[1:-1]]
    assert {(row[0], row[1]): row[17].split()[0] for row in rows} == {
        ("alias", "gpu01:llama"): "UP",
        ("alias", "gpu02:llama"): "MAINT",
        ("lora", "gpu02:llama"): "MAINT",
        ("mistralai_mistral", "gpu02:mistral"): "DRAIN",
    }


def test_a_new_server_gets_requests_only_when_it_is_ready(world: World) -> None:
    fresh = Nim("fresh")
    fresh.ready = False
    try:
        servers = [*world.servers(), Server("gpu03", "llama", "127.0.0.1", fresh.port, ("meta/llama", "base"))]
        world.gateway.write(servers)
        world.gateway.reload()
        assert world.gateway.status("gpu03:llama").startswith("DOWN")
        assert world.gateway.status("gpu01:llama").startswith("UP")
        for _number in range(9):
            assert world.gateway.request(body={"model": "base"}).status == 200
        assert fresh.requests == []
        fresh.ready = True
        world.gateway.wait_for("gpu03:llama", "UP")
        for _number in range(9):
            world.gateway.request(body={"model": "base"})
        assert fresh.requests != []
    finally:
        fresh.close()


def test_a_server_with_another_port_begins_anew(world: World) -> None:
    moved = Nim("moved")
    moved.ready = False
    try:
        servers = world.servers()
        servers[2] = Server("gpu02", "mistral", "127.0.0.1", moved.port, ("mistralai/mistral",))
        world.gateway.write(servers)
        world.gateway.reload()
        assert world.gateway.status("gpu02:mistral").startswith("DOWN")
        moved.ready = True
        world.gateway.wait_for("gpu02:mistral", "UP")
        assert world.gateway.request(body={"model": "mistralai/mistral"}).json["server"] == "moved"
    finally:
        moved.close()
