# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What clients of a gateway see: routing, refusals, a host that leaves and returns, reloads, keys and TLS."""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import pathlib
import ssl
from typing import Any

from fleet_testing import Fleet, Run, wait_until

FLEET = Fleet("gateway")
GPU01, GPU02, GATEWAY = FLEET.host("gpu01"), FLEET.host("gpu02"), FLEET.host("gw01")
TAKE_OUT = pathlib.Path(__file__).parents[1] / "take_out.yml"
PORT = 8080
MODEL = "meta/llama-3.1-8b-instruct"
KEY = "sk-gateway-scenario-0123456789"


def runtime(command: str) -> str:
    """What HAProxy answers an operator who asks it himself."""
    program = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('/run/haproxy/admin.sock'); "
        "s.sendall(sys.stdin.buffer.read()); print(s.makefile().read())"
    )
    return GATEWAY.run('python3 -c "%s"' % program, stdin=command + "\n")


def states() -> dict[str, str]:
    """Server -> status, as HAProxy itself says."""
    rows = [line.split(",") for line in runtime("show stat -1 4 -1").splitlines()]
    return {row[1]: row[17] for row in rows if len(row) > 17 and ":" in row[1]}


def drained(server: str) -> bool:
    """Whether a server is to get no new requests, up or not."""
    rows = [line.split() for line in runtime("show servers state").splitlines()]
    # be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state: 0x08 is a drain that was asked for
    (state,) = [int(row[6]) for row in rows if len(row) > 6 and row[3] == server]
    return bool(state & 0x08)


def take_out(host: str, state: str, *options: str, seconds: int = 60, succeeds: bool = True) -> Run:
    limit = "%s,%s" % (FLEET.host(host).name, GATEWAY.name)
    given = ("-e", "state=" + state, "-e", "seconds=%d" % seconds, "--limit", limit, *options)
    return FLEET.play(TAKE_OUT, *given, succeeds=succeeds)


def with_variables(**variables: Any) -> dict[str, Any]:
    """The inventory with these variables of the gateways."""
    inventory = copy.deepcopy(FLEET.inventory)
    inventory["nim_gateways"]["vars"] = variables
    return inventory


def requests_of(host: Any) -> int:
    """Requests that a host's NIM has answered so far."""
    text = host.run("curl -s http://127.0.0.1:8000/v1/metrics")
    return sum(int(float(line.split()[-1])) for line in text.splitlines() if line.startswith("request_success_total"))


def test_requests_are_routed_by_their_model_and_reach_both_hosts() -> None:
    assert GATEWAY.model_names(PORT) == [MODEL]
    before = requests_of(GPU01), requests_of(GPU02)
    for _number in range(8):
        assert GATEWAY.complete(PORT, MODEL)[0] == 200
    assert requests_of(GPU01) > before[0]
    assert requests_of(GPU02) > before[1]
    before = requests_of(GPU01), requests_of(GPU02)
    status, error = GATEWAY.complete(PORT, "meta/llama-3.1-70b-instruct")
    assert (status, error["error"]["code"]) == (404, "model_not_found")
    for size, expected in ((2**20 - 200, 200), (2**20 + 1, 413)):
        # Behind its prompt, where a smaller buffer would not see it.
        body = {"prompt": "x" * size, "max_tokens": 1, "model": MODEL}
        status, error = GATEWAY.get(PORT, "/v1/completions", body)
        assert status == expected, error
    assert error["error"]["code"] == "request_too_large"
    # Of the three, one has reached a model.
    assert requests_of(GPU01) + requests_of(GPU02) == sum(before) + 1
    assert "haproxy_server_status" in GATEWAY.run("curl -s http://127.0.0.1:8405/metrics")


def test_a_host_leaves_is_worked_on_and_returns_and_nobody_notices() -> None:
    name = GPU01.name + ":llama"
    with contextlib.ExitStack() as clients:
        # One on each host, while nobody else asks; the first one is the longer, because it is waited for last.
        with GATEWAY.stream(PORT, 3600) as one, GATEWAY.stream(PORT, 2400) as other:
            first, second = (clients.enter_context(GATEWAY.client(PORT)) for _number in range(2))
            assert take_out("gpu01", "drained", seconds=0, succeeds=False).failure(GPU01.name)
            assert states()[name] == "DRAIN"
        assert (one["done"], other["done"]) == (True, True)
        run = take_out("gpu01", "maintenance")
        assert run.changed()
        assert take_out("gpu01", "maintenance").changed() == []
        GPU01.run("systemctl stop nim-llama")
        # Whoever reloads it: an operator by hand, or the collection with another configuration.
        GATEWAY.run("systemctl reload haproxy")
        assert states()[name] == "MAINT"
        assert FLEET.play("gateway", inventory=with_variables(nim_gateway_body_limit="2MB")).changed()
        assert states()[name] == "MAINT"
        # The other one is the last now.
        refused = take_out("gpu02", "drained", succeeds=False)
        assert "allow_last" in refused.failure(GPU02.name)
        # Enabled only when it has proved ready.
        failed = take_out("gpu01", "enabled", seconds=3, succeeds=False)
        assert "not ready" in failed.failure(GPU01.name) or "not all of its servers" in failed.failure(GPU01.name)
        GPU01.run("systemctl start nim-llama")
        assert take_out("gpu01", "enabled").changed()
        assert take_out("gpu01", "enabled").changed() == []
        before = requests_of(GPU01)
        wait_until(lambda: requests_of(GPU01) > before, "it serves again")
    assert first.failures == second.failures == []
    assert len(first.answers) > 50


def test_drain_survives_a_restart_and_a_reboot_of_the_gateway() -> None:
    take_out("gpu02", "drained")
    name = GPU02.name + ":llama"
    GATEWAY.run("systemctl restart haproxy")
    wait_until(lambda: GATEWAY.ready(PORT), "the gateway is ready after a restart")
    assert drained(name)
    GATEWAY.reboot()
    wait_until(lambda: GATEWAY.ready(PORT), "the gateway is ready after a reboot")
    assert drained(name)
    assert not drained(GPU01.name + ":llama")
    assert take_out("gpu02", "enabled").changed()
    assert GATEWAY.complete(PORT, MODEL)[0] == 200


def test_keys_and_tls() -> None:
    GATEWAY.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=gateway -keyout /root/key -out /root/crt 2>&1"
    )
    inventory = with_variables(
        nim_gateway_certificate=GATEWAY.run("cat /root/crt") + "\n",
        nim_gateway_private_key=GATEWAY.run("cat /root/key") + "\n",
        nim_gateway_api_keys={"team-a": KEY},
    )
    planned = FLEET.play("gateway", "--check", "--diff", inventory=inventory)
    assert planned.changed()
    assert GATEWAY.complete(PORT, MODEL)[0] == 200
    run = FLEET.play("gateway", "--diff", "-vvvv", inventory=inventory)
    assert run.changed() == planned.changed()
    assert FLEET.play("gateway", inventory=inventory).changed() == []
    context = ssl.create_default_context(cadata=GATEWAY.run("cat /root/crt"))
    context.check_hostname = False
    found = {}
    for key in (KEY, KEY + "x"):
        connection = http.client.HTTPSConnection(GATEWAY.address, PORT, timeout=10, context=context)
        body = json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": 2})
        connection.request("POST", "/v1/completions", body, {"Authorization": "Bearer " + key})
        found[key] = connection.getresponse().status
        connection.close()
    assert found == {KEY: 200, KEY + "x": 401}
    secret = GATEWAY.run("cat /root/key").splitlines()[5]
    for said in (planned.output, run.output, json.dumps(run.results), GATEWAY.journal(4000)):
        assert KEY not in said
        assert secret not in said
    assert not GATEWAY.succeeds("grep -rqF %s /etc/haproxy /var/lib/haproxy /var/lib/gpu_fleet" % KEY)
    # Back to plain HTTP; the certificate goes.
    assert FLEET.play("gateway").changed()
    assert not GATEWAY.succeeds("test -e /etc/haproxy/nim/tls.pem")
    assert GATEWAY.complete(PORT, MODEL)[0] == 200


def test_what_an_operator_has_drained_is_left_alone() -> None:
    name = GPU02.name + ":llama"
    (backend,) = {line.split(",")[0] for line in runtime("show stat -1 4 -1").splitlines() if name in line}
    runtime("set server %s/%s state drain" % (backend, name))
    assert take_out("gpu02", "enabled").changed() == []
    assert drained(name)
    # One that serves is left, and it is the last.
    assert "allow_last" in take_out("gpu01", "drained", succeeds=False).failure(GPU01.name)
    runtime("set server %s/%s state ready" % (backend, name))
    wait_until(lambda: states()[name] == "UP", "the server is up")
    assert take_out("gpu01", "drained", "--check").changed()
    assert states()[GPU01.name + ":llama"] == "UP"


def test_a_run_with_nothing_to_do_changes_nothing() -> None:
    run = FLEET.play("site", "-vvv")
    assert run.changed() == []
    assert run.of(GATEWAY.name, "The gateway serves the models")
    # A gateway costs the hosts behind it nothing: they are asked once.
    for host in (GPU01, GPU02):
        assert run.executions(host) == 1


def test_a_gateway_is_taken_back() -> None:
    options = ("-e", "remove_gateways=true", "--limit", GATEWAY.name)
    assert FLEET.play("remove", *options).changed()
    assert not GATEWAY.succeeds("systemctl is-active --quiet haproxy")
    assert not GATEWAY.succeeds(
        "ls -d /etc/haproxy/nim* /etc/systemd/system/haproxy.service.d/nim* /etc/haproxy/*.before-*"
    )
    # The distribution's own configuration is back; documents are no trace: minimal systems leave them out.
    differs = GATEWAY.run("dpkg --verify haproxy").splitlines()
    assert [line for line in differs if " /usr/share/" not in line] == []
    assert FLEET.play("remove", *options).changed() == []
