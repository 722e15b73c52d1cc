# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gateway as a resource: what it plans, what it refuses, how it comes back from a reload that fails."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
import subprocess
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nim_gateway_planner
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_hosts import gateway_host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_notes import RECORD, read_notes, write_notes
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_settings import (
    Server,
    hash_keys,
    make_backends,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_state import merged
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import render_diff
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_gateway import NimGateway, answer
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_gateway_planner import DROP_IN
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Outcome, converge
from gateway_fakes import CONFIGURATION, DEFAULT, FRAGMENT, Api, GatewayHost, Packages, options
from gateway_world import HAPROXY

KEY = "sk-test-0123456789abcdef"
PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
PRIVATE = "-----BEGIN PRIVATE KEY-----\nMIIEvTOPSECRET\n-----END PRIVATE KEY-----\n"


def gateway(host: GatewayHost, **more: t.Any) -> NimGateway:
    resource = NimGateway(**options(**more))
    resource.api = t.cast(t.Any, Api(host))
    resource.manager = lambda host: t.cast(t.Any, Packages(t.cast(GatewayHost, host)))
    resource.python = "/usr/bin/python3"
    resource.locked = contextlib.nullcontext
    return resource


def run(host: GatewayHost, check_mode: bool = False, **more: t.Any) -> Outcome[t.Any]:
    return converge(host, gateway(host, **more), check_mode=check_mode)


def refused(reason: str, host: GatewayHost | None = None, **more: t.Any) -> FleetError:
    with pytest.raises(FleetError) as caught:
        run(host or GatewayHost("3.0.11-1"), **more)
    assert caught.value.reason == reason
    return caught.value


# -- from nothing to a gateway --------------------------------------------------------------------


def test_a_bare_host_becomes_a_gateway_and_then_nothing_is_to_be_done() -> None:
    host = GatewayHost()
    planned = run(host, check_mode=True)
    assert planned.changed
    assert host.version == ""
    assert run(host).changed
    assert host.indexed
    assert "nim_gateway-" in str(host.live)
    assert "/etc/haproxy/nim.candidate" not in host.dirs
    assert not run(host).changed
    assert not run(host, check_mode=True).changed
    assert host.reloads == 1
    shown = answer(gateway(host), gateway(host).observe(host))["gateway"]
    assert shown["models"] == [
        {"name": "meta/llama", "backend": "meta_llama", "servers": ["gpu01:llama", "gpu02:llama"]}
    ]


def test_the_state_is_kept_before_the_distributions_own_reload() -> None:
    host = GatewayHost("2.6.12-1")
    run(host)
    keep = "/usr/local/libexec/nim/gateway-state /run/haproxy/admin.sock /etc/haproxy/nim/servers"
    reloads = [line for line in host.files[DROP_IN].decode().splitlines() if line.startswith("ExecReload=")]
    assert reloads[0] == "ExecReload="
    assert keep in reloads[1]
    assert reloads[2:] == re.findall(r"(?m)^ExecReload=.*$", FRAGMENT)
    assert host.modes["/usr/local/libexec/nim/gateway-state"] == (0o755, 0, 0)


def test_the_master_process_can_be_asked_for_requests_of_before_a_reload() -> None:
    host = GatewayHost("2.6.12-1")
    run(host)
    assert b"ExecStart=" not in host.files[DROP_IN]
    # The unit of EL has no such socket.
    start = "ExecStart=/usr/sbin/haproxy -Ws -f $CONFIG -f $CFGDIR -p $PIDFILE $OPTIONS"
    host.files["/lib/systemd/system/haproxy.service"] = ("[Service]\n%s\n" % start).encode()
    assert run(host).changed
    assert "\nExecStart=\n%s -S /run/haproxy-master.sock\n" % start in host.files[DROP_IN].decode()
    assert not run(host).changed


@pytest.mark.parametrize(
    "change",
    [
        {"port": 9000},
        {"body_limit": "2MB"},
        {"api_keys": {"a": KEY}},
        {"certificate": PEM, "private_key": PRIVATE},
        {"hosts": options()["hosts"][:1]},
    ],
)
def test_every_change_is_a_reload(change: dict[str, t.Any]) -> None:
    host = GatewayHost("2.6.12-1")
    run(host)
    outcome = run(host, **change)
    assert [str(entry.disruption) for entry in outcome.changes if entry.action == "reload"] == ["reload"]
    assert host.reloads == 2
    assert not run(host, **change).changed
    # And back, with nothing left behind.
    run(host)
    assert "/etc/haproxy/nim/tls.pem" not in host.files
    assert not run(host).changed


def test_what_was_taken_out_by_us_is_ours_in_a_backend_of_another_name() -> None:
    host = GatewayHost("2.6.12-1")
    run(host)
    assert RECORD not in host.files
    write_notes(host, {"meta_llama/gpu01:llama": "drained"})
    hosts = copy.deepcopy(options()["hosts"])
    for entry in hosts:
        entry["models"][0]["served"].insert(0, "alias")
    run(host, hosts=hosts)
    assert read_notes(host) == {"meta_llama/gpu01:llama": "drained", "alias/gpu01:llama": "drained"}


@pytest.mark.parametrize("path", [CONFIGURATION, "/etc/haproxy/nim/models.map", "/etc/haproxy/nim/keys.map", DROP_IN])
def test_files_changed_by_hand_are_put_right(path: str) -> None:
    host = GatewayHost("2.6.12-1")
    run(host)
    host.files[path] += b"# mine\n"
    outcome = run(host)
    assert [change.what for change in outcome.changes] == [path]
    host.modes[path] = (0o666, 0, 0)
    assert [change.what for change in run(host).changes] == [path]
    del host.files[path]
    assert run(host).changed
    assert not run(host).changed


def test_a_process_that_has_not_read_its_files_is_reloaded() -> None:
    host = GatewayHost("2.6.12-1")
    run(host)
    host.live = "nim_gateway-0123"
    assert [change.what for change in run(host).changes] == ["running configuration"]


def test_a_stopped_gateway_is_started() -> None:
    host = GatewayHost("2.6.12-1")
    run(host)
    host.stop()
    outcome = run(host)
    assert [change.action for change in outcome.changes] == ["start"]
    assert host.active
    assert host.enabled


def test_a_renewed_certificate_is_read() -> None:
    host = GatewayHost("2.6.12-1")
    host.files["/etc/ssl/gw.pem"] = (PEM + PRIVATE).encode()
    run(host, certificate_file="/etc/ssl/gw.pem")
    assert b"ssl crt /etc/ssl/gw.pem alpn" in host.files[CONFIGURATION]
    assert not run(host, certificate_file="/etc/ssl/gw.pem").changed
    host.files["/etc/ssl/gw.pem"] += b"\n"
    assert "running configuration" in [change.what for change in run(host, certificate_file="/etc/ssl/gw.pem").changes]
    del host.files["/etc/ssl/gw.pem"]
    refused("certificate_missing", host, certificate_file="/etc/ssl/gw.pem")


def test_selinux_is_told_that_servers_are_to_be_reached() -> None:
    host = GatewayHost("2.6.12-1")
    host.files["/sys/fs/selinux/enforce"] = b"1"
    switch = {"now": "off"}
    host.commands["getsebool haproxy_connect_any"] = lambda *args: "haproxy_connect_any --> %s\n" % switch["now"]

    def turn_on(*args: t.Any) -> str:
        switch["now"] = "on"
        return ""

    host.commands["setsebool -P haproxy_connect_any on"] = turn_on
    assert "SELinux haproxy_connect_any" in [change.what for change in run(host).changes]
    assert not run(host).changed


def test_a_gateway_is_removed() -> None:
    host = GatewayHost("2.6.12-1")
    run(host, api_keys={"a": KEY})
    assert run(host, state="absent").changed
    assert not host.active
    assert not [path for path in (*host.files, *host.dirs) if "nim" in path or "haproxy.service.d" in path]
    # The package's own is back: HAProxy does not start without one.
    assert host.files[CONFIGURATION] == DEFAULT.encode()
    assert not run(host, state="absent").changed
    # Somebody else's HAProxy is no gateway of ours.
    other = GatewayHost("2.6.12-1")
    other.files[CONFIGURATION] = b"frontend mine\n"
    assert not run(other, state="absent").changed
    assert other.active


# -- what is refused ------------------------------------------------------------------------------


def test_broken_notes_hold_up_no_configuration_and_are_told() -> None:
    host = GatewayHost()
    run(host)
    host.files[RECORD] = b"{"
    for absent in (False, True):
        resource = gateway(host, state="absent") if absent else gateway(host, body_limit="2MB")
        converge(host, resource, check_mode=True)
        assert host.files[RECORD] == b"{"
        assert converge(host, resource, check_mode=False).changed
        (warning,) = resource.warnings
        assert warning.startswith("Reading %s failed: " % RECORD)
        assert (RECORD in host.files) != absent


def test_somebody_elses_configuration_is_left_alone() -> None:
    host = GatewayHost("2.6.12-1")
    host.files[CONFIGURATION] = b"frontend mine\n"
    assert "replace_configuration" in refused("foreign_configuration", host).message
    assert host.files[CONFIGURATION] == b"frontend mine\n"
    # And when it may be replaced, it is neither shown nor lost.
    host.files[CONFIGURATION] = mine = b"userlist x\n  user a insecure-password TOPSECRET\n  # \xff\n"
    host.modes[CONFIGURATION] = (0o640, 0, 7)
    outcome = run(host, replace_configuration=True)
    assert "TOPSECRET" not in str(render_diff(outcome.changes)) + str([change.as_dict() for change in outcome.changes])
    assert host.files[CONFIGURATION].startswith(b"# Managed by")
    assert not run(host).changed
    assert run(host, state="absent").changed
    assert (host.files[CONFIGURATION], host.modes[CONFIGURATION]) == (mine, (0o640, 0, 7))
    assert not run(host, state="absent").changed


def test_a_configuration_that_haproxy_refuses_never_gets_there() -> None:
    host = GatewayHost("2.6.12-1")
    run(host)
    before = dict(host.files)
    host.refused = "parsing [/etc/haproxy/nim.candidate/haproxy.cfg:30] : unknown keyword 'x'"
    error = refused("configuration_refused", host, port=9000)
    assert "parsing [/etc/haproxy/nim/haproxy.cfg:30] : unknown keyword" in error.message
    assert host.files == before
    assert host.reloads == 1


def test_a_reload_that_fails_leaves_the_old_gateway_and_its_files() -> None:
    host = GatewayHost("2.6.12-1")
    run(host)
    before, live = dict(host.files), host.live
    host.busy = "9000"
    error = refused("reload_failed", host, port=9000, certificate=PEM, private_key=PRIVATE)
    assert (
        "configuration: Binding [/etc/haproxy/haproxy.cfg:40]: cannot bind socket [0.0.0.0:8080]. The" in error.message
    )
    assert host.files == before
    assert host.live == live
    host.busy = ""
    assert run(host, port=9000).changed


def test_a_port_that_somebody_holds_is_refused_before_haproxy_stops_listening_for_it() -> None:
    host = GatewayHost("2.6.12-1")
    run(host)
    before = dict(host.files)
    host.listen("00000000", 8080, "haproxy.service", "haproxy")
    host.listen("0100007F", 9000, "nginx.service", "nginx")
    for check_mode in (True, False):
        error = refused("port_in_use", host, port=9000, check_mode=check_mode)
        assert "port 9000 on 0.0.0.0: it is held by nginx (pid 9000) of unit nginx.service" in error.message
        assert "(metrics_port)" in refused("port_in_use", host, metrics_port=9000, check_mode=check_mode).message
    assert {path: text for path, text in host.files.items() if not path.startswith("/proc")} == before
    assert host.reloads == 1
    # On another address it is no obstacle, nor is what HAProxy itself has; and a gateway that is as wanted does not look.
    assert run(host, port=9000, bind_address="::1").changed
    assert run(host, body_limit="2MB").changed
    host.files["/proc/8080/cgroup"] = b"0::/\n"
    assert run(host, body_limit="3MB").changed
    host.listen("00000000", 8405, "nginx.service", "nginx")
    assert not run(host, body_limit="3MB").changed


def test_an_address_that_the_host_does_not_have_is_refused() -> None:
    host = GatewayHost("2.6.12-1")
    host.files["/proc/net/fib_trie"] = b"  |-- 10.0.0.5\n     /32 host LOCAL\n"
    assert "ip_nonlocal_bind" in refused("address_missing", host, bind_address="10.0.0.6").message
    assert "metrics_address" in refused("address_missing", host, metrics_address="fd00::6").message
    for address in ("10.0.0.5", "127.0.0.1", "0.0.0.0", "::", "gateway.example.org"):
        assert run(host, bind_address=address, check_mode=True).changed
    # A virtual address that is with another gateway now.
    host.files["/proc/sys/net/ipv4/ip_nonlocal_bind"] = b"1\n"
    assert run(host, bind_address="10.0.0.6").changed


def test_a_start_that_fails_says_why() -> None:
    host = GatewayHost("2.6.12-1")
    host.stop()
    host.busy = "8080"
    assert "cannot bind socket" in refused("start_failed", host).message


def test_a_masked_service_stays_masked() -> None:
    host = GatewayHost("2.6.12-1")
    host.masked = True
    assert "systemctl unmask" in refused("service_masked", host).message


def test_an_old_haproxy_is_refused_before_it_is_installed() -> None:
    host = GatewayHost()
    host.offer = "1.8.27-5.el8"
    assert "2.4" in refused("haproxy_too_old", host).message
    assert host.version == ""
    refused("haproxy_too_old", GatewayHost("2.2.9-2"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"hosts": []}, "hosts"),
        ({"port": 0}, "port = 0"),
        ({"port": 8405}, "metrics_port = 8405"),
        ({"bind_address": "all"}, None),
        ({"bind_address": "a b"}, "bind_address = 'a b'"),
        ({"body_limit": "1"}, "body_limit = 1"),
        ({"body_limit": "1GB"}, "body_limit = 1GB"),
        ({"inactivity_timeout": 1}, "inactivity_timeout = 1"),
        ({"server_connections": 0}, "server_connections = 0"),
        ({"certificate": "x"}, "certificate = (not shown)"),
        ({"certificate": PEM}, "private_key = (not shown)"),
        ({"certificate": PEM, "private_key": PRIVATE, "certificate_file": "/etc/x.pem"}, "certificate_file"),
        ({"certificate_file": "x.pem"}, "certificate_file = x.pem"),
        ({"certificate_file": "/etc/x y.pem"}, "certificate_file"),
        ({"api_keys": {"a": "short"}}, "api_keys.a = (not shown)"),
        ({"api_keys": {"a": KEY + " x"}}, "api_keys.a = (not shown)"),
        ({"api_keys": {"a": "sha256:0123"}}, "api_keys.a = (not shown)"),
        ({"api_keys": {"a": KEY, "b": KEY}}, "api_keys.b = (not shown)"),
        ({"api_keys": {KEY + "!": "a"}}, "api_keys = (not shown)"),
    ],
)
def test_options_are_checked(more: dict[str, t.Any], said: str | None) -> None:
    if said is None:
        NimGateway(**options(**more))
        return
    with pytest.raises(FleetError) as caught:
        NimGateway(**options(**more))
    assert caught.value.reason == "invalid_option"
    assert caught.value.message.startswith(said)
    assert KEY not in caught.value.message


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ({"name": "gpu01", "address": "10.0.0.9"}, "hosts[2].name = gpu01: is there twice"),
        ({"name": "gpu 01"}, None),
        ({"address": "a;b"}, "hosts[2].address"),
        (
            {"models": [{"name": "m\nx", "port": 8000, "served": ["x"]}]},
            "hosts[2].models = 'm\\nx': cannot be the name",
        ),
        ({"models": [{"name": "a:b", "port": 8000, "served": ["x"]}]}, "hosts[2].models = 'a:b': cannot be the name"),
        ({"models": [{"name": "m", "port": 70000, "served": ["x"]}]}, "hosts[2].models.m.port"),
        ({"models": [{"name": "m", "port": 8000, "served": ["x y"]}]}, "hosts[2].models.m.served"),
        ({"models": [{"name": "m", "port": 8000, "served": ["x\ny z"]}]}, "hosts[2].models.m.served"),
        ({"models": [{"name": "m", "port": 8000, "served": []}]}, "hosts[2].models.m.served"),
    ],
)
def test_hosts_are_checked(host: dict[str, t.Any], said: str | None) -> None:
    entry = {"name": "gpu03", "address": "::1", "models": [{"name": "m", "port": 8000, "served": ["x"]}], **host}
    hosts = [*options()["hosts"], entry]
    if said is None:
        assert (
            "server gpu_01:m [::1]:8000"
            in gateway(GatewayHost(), hosts=hosts).rendered(_nim_gateway_planner.GatewayState())[1][-1].content
        )
        return
    with pytest.raises(FleetError) as caught:
        NimGateway(hosts=hosts)
    assert caught.value.message.startswith(said)


# -- secrets --------------------------------------------------------------------------------------


def test_keys_are_in_no_file_diff_or_result() -> None:
    host = GatewayHost("2.6.12-1")
    outcome = run(host, api_keys={"a": KEY}, certificate=PEM, private_key=PRIVATE)
    hashed = hashlib.sha256(KEY.encode()).hexdigest()
    told = str(render_diff(outcome.changes)) + str([change.as_dict() for change in outcome.changes])
    rotated = run(host, api_keys={"a": KEY + "2"}, certificate=PEM + PEM, private_key=PRIVATE)
    told += str(render_diff(rotated.changes)) + str([change.as_dict() for change in rotated.changes])
    for secret in (KEY, "TOPSECRET", hashed, hashed.upper()):
        assert secret not in told
    assert "sha256:" + hashed[:12] in told
    assert KEY.encode() not in b"".join(host.files.values())
    for path in ("/etc/haproxy/nim/keys.map", "/etc/haproxy/nim/tls.pem"):
        assert host.modes[path] == (0o600, 0, 0)


def test_a_hashed_key_is_as_good() -> None:
    hashed = hashlib.sha256(KEY.encode()).hexdigest()
    assert hash_keys({"a": "sha256:" + hashed}) == hash_keys({"a": KEY}) == {"a": hashed.upper()}


# -- backends and hosts ---------------------------------------------------------------------------


def test_names_with_the_same_servers_share_a_backend_and_others_do_not() -> None:
    backends = make_backends(
        [
            Server("gpu01", "a", "10.0.0.1", 8000, ("base", "lora")),
            Server("gpu02", "a", "10.0.0.2", 8000, ("base",)),
            Server("gpu02", "b", "10.0.0.2", 8001, ("nim_gateway",)),
            Server("gpu03", "b", "10.0.0.3", 8001, ("a/b",)),
            Server("gpu04", "b", "10.0.0.4", 8001, ("a:b",)),
        ]
    )
    found = {backend.served: [server.name for server in backend.servers] for backend in backends}
    assert found == {
        ("base",): ["gpu01:a", "gpu02:a"],
        ("lora",): ["gpu01:a"],
        ("nim_gateway",): ["gpu02:b"],
        ("a/b",): ["gpu03:b"],
        ("a:b",): ["gpu04:b"],
    }
    names = [backend.name for backend in backends]
    assert len(set(names)) == 5
    assert "nim_gateway" not in names
    assert all(re.match(r"[A-Za-z0-9_.-]+\Z", name) for name in names)


def test_hosts_that_haproxy_could_not_tell_apart_are_refused() -> None:
    with pytest.raises(FleetError, match="same name in HAProxy"):
        make_backends([Server("gpu/1", "a", "x", 1, ("m",)), Server("gpu_1", "a", "y", 1, ("m",))])


def test_what_a_gateway_serves_of_a_host() -> None:
    image = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4"
    models = [
        {"name": "plain", "image": image},
        {"name": "named", "image": image, "port": 8001, "served_model_name": "base,alias"},
        {"name": "custom", "image": image, "port": 8002, "custom_model_name": "mine"},
        {"name": "other", "image": image, "port": 8003, "bind_address": "10.1.0.1"},
        {"name": "private", "image": image, "port": 8004, "bind_address": "127.0.0.1"},
        {"name": "stopped", "image": image, "port": 8005, "state": "stopped"},
    ]
    entry = gateway_host("gpu01", "10.0.0.1", models, {"custom": ["x", "y"], "other": "z"})
    assert entry == {
        "name": "gpu01",
        "address": "10.0.0.1",
        "models": [
            {"name": "plain", "port": 8000, "served": ["meta/llama-3.1-8b-instruct"]},
            {"name": "named", "port": 8001, "served": ["base", "alias"]},
            {"name": "custom", "port": 8002, "served": ["x", "y"]},
            {"name": "other", "port": 8003, "served": ["z"], "address": "10.1.0.1"},
        ],
    }
    assert gateway_host("gpu01", "10.0.0.1", models[4:]) is None


# -- HAProxy's own opinion ------------------------------------------------------------------------


@pytest.mark.skipif(HAPROXY is None, reason="needs haproxy; `make unit` installs it")
def test_haproxy_takes_a_configuration_with_everything_in_it(tmp_path: t.Any) -> None:
    subject = ["-subj", "/CN=gateway", "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "crt")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject],
        check=True,
        capture_output=True,
    )
    resource = gateway(
        GatewayHost(),
        certificate=(tmp_path / "crt").read_text(),
        private_key=(tmp_path / "key").read_text(),
        api_keys={"a": KEY},
        bind_address="::",
        metrics_address="::1",
        body_limit="64MB",
        slow_start=0,
        hosts=options()["hosts"][:1],
    )
    layout = _nim_gateway_planner.Layout(
        configuration=str(tmp_path / "cfg"),
        directory=str(tmp_path / "nim"),
        socket=str(tmp_path / "s"),
        state_file=str(tmp_path / "st"),
    )
    (tmp_path / "nim").mkdir()
    (tmp_path / "st").write_text(merged("", "", False))
    for file in resource.rendered(_nim_gateway_planner.GatewayState(), layout)[1]:
        with open(file.path, "w", encoding="utf-8") as stream:
            stream.write(file.content)
    done = subprocess.run([str(HAPROXY), "-c", "-f", layout.configuration], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[WARNING]" not in done.stderr, done.stderr
