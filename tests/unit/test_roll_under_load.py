# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A roll of four hosts behind a real HAProxy, by the real playbook and the real modules of the gateway, with clients all the time.

Only the hosts are played: when one's driver is changed, its model server breaks off all that it is doing and is away for a second.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import pathlib
import shutil
import socket
import sys
import tempfile
import threading
import time
import typing as t
import urllib.parse

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_settings import Server
from gateway_world import HAPROXY, Gateway, free_port
from test_rollout_playbooks import GOOD, LOOK, SCRIPTED, Play

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "sandbox"))

from load import Load  # after the path is set

pytestmark = [pytest.mark.rollout, pytest.mark.skipif(HAPROXY is None, reason="needs haproxy; `make unit` installs it")]

#: Host -> the model that it serves, and the name that clients ask for.
FLEET = {
    "gpu01": ("llama", "meta/llama"),
    "gpu02": ("llama", "meta/llama"),
    "gpu03": ("mistral", "mistralai/mistral"),
    "gpu04": ("mistral", "mistralai/mistral"),
}
#: In the place of driver_upgrade: the model server goes and comes back while the driver is changed.
ACTION = """
import json, os, urllib.request
from ansible.plugins.action import ActionBase
class ActionModule(ActionBase):
    _requires_connection = False
    _supports_check_mode = True
    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        host, state = task_vars["inventory_hostname"], self._task.args.get("state", "")
        if state == "ready":
            urllib.request.urlopen("%s/?host=%s" % (os.environ["RESTARTS"], host), data=b"", timeout=60).close()
        with open(os.environ["SCRIPT"]) as stream:
            return dict({"changed": False}, **json.load(stream)[host]["upgrade " + state])
"""


class Model:
    """A model server that can be stopped in the middle of everything, and started again on the same port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.restarts = 0
        self.connections: set[socket.socket] = set()
        self.start()

    def start(self) -> None:
        model = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: t.Any) -> None:
                pass

            def setup(self) -> None:
                model.connections.add(self.request)
                super().setup()

            def finish(self) -> None:
                model.connections.discard(self.request)
                with contextlib.suppress(OSError):
                    super().finish()

            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                tokens = body["max_tokens"]
                answer = json.dumps({"usage": {"completion_tokens": tokens}}).encode()
                self.send_response(200)
                if not body.get("stream"):
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                    return
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for text in (*['{"choices": [{"text": "x"}]}'] * tokens, "[DONE]"):
                    line = b"data: %s\n\n" % text.encode()
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                    self.wfile.flush()
                    time.sleep(0.02)
                self.wfile.write(b"0\r\n\r\n")

        class Quick(http.server.ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def handle_error(self, request: t.Any, client_address: t.Any) -> None:
                pass

        self.server = Quick(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def restart(self) -> None:
        self.restarts += 1
        self.stop()
        time.sleep(1)
        self.start()


class Roll(Play):
    """The playbook with the real modules of the gateway, on a HAProxy of the test's own."""

    scripted: t.Mapping[str, str] = {name: word for name, word in SCRIPTED.items() if not name.startswith("haproxy_")}

    def __init__(self, folder: pathlib.Path, gateway: Gateway, restarts: str) -> None:
        super().__init__(folder)
        (self.copy / "plugins/action/driver_upgrade.py").write_text(ACTION)
        layout = gateway.layout
        self._replace(
            {
                "/run/haproxy/admin.sock": layout.socket,
                "/run/haproxy-master.sock": layout.master_socket,
                "/var/lib/haproxy/nim-server-state": layout.state_file,
                "/etc/haproxy/nim": layout.directory,
                "/var/lib/gpu_fleet/gateway-servers.json": str(folder / "gateway-servers.json"),
                "/run/gpu_fleet/gateway-servers.lock": str(folder / "lock"),
                "/usr/local/libexec/nim/gateway-state": str(self.copy / "plugins/module_utils/_gateway_state.py"),
            }
        )
        self.environment = {"RESTARTS": restarts}
        here = {
            "ansible_connection": "local",
            "ansible_become": False,
            "ansible_python_interpreter": sys.executable,
        }
        self.inventory = {
            "gpu_hosts": {"hosts": {host: {} for host in FLEET}},
            "nim_gateways": {"hosts": {"gw1": here}},
        }
        self.answers = {
            host: dict(
                GOOD,
                **{
                    "upgrade prestaged": dict(LOOK, models=[model], serving=[model]),
                    "upgrade ready": dict(GOOD["upgrade ready"], record={"workloads": [model]}),
                    "upgrade restored": dict(GOOD["upgrade restored"], record={"serving": [model]}),
                },
            )
            for host, (model, _name) in FLEET.items()
        }

    def _replace(self, texts: t.Mapping[str, str]) -> None:
        """Paths of a gateway, in the copy of the collection; each must be there."""
        for old, new in texts.items():
            changed = 0
            for path in (self.copy / "plugins/module_utils").glob("_*.py"):
                text = path.read_text()
                if '"%s"' % old in text:
                    path.write_text(text.replace('"%s"' % old, '"%s"' % new))
                    changed += 1
            assert changed, old


class World(t.NamedTuple):
    gateway: Gateway
    models: dict[str, Model]
    roll: Roll
    folder: pathlib.Path


@pytest.fixture
def world(tmp_path: pathlib.Path) -> t.Iterator[World]:
    models = {host: Model() for host in FLEET}

    class Control(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: t.Any) -> None:
            pass

        def do_POST(self) -> None:
            (host,) = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)["host"]
            models[host].restart()
            self.send_response(200)
            self.end_headers()

    control = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Control)
    threading.Thread(target=control.serve_forever, args=(0.02,), daemon=True).start()
    # The path of a socket must be short.
    short = pathlib.Path(tempfile.mkdtemp(prefix="roll"))
    servers = [
        Server(host, FLEET[host][0], "127.0.0.1", model.port, (FLEET[host][1],)) for host, model in models.items()
    ]
    gateway = Gateway(short, servers)
    try:
        for server in servers:
            gateway.wait_for(server.name, "UP")
        yield World(gateway, models, Roll(tmp_path, gateway, "http://127.0.0.1:%d" % control.server_port), tmp_path)
    finally:
        gateway.close()
        control.shutdown()
        control.server_close()
        for model in models.values():
            model.stop()
        shutil.rmtree(short)


def clients(world: World) -> Load:
    names = sorted({name for _model, name in FLEET.values()})
    return Load("http://127.0.0.1:%d" % world.gateway.port, names, stream_tokens=30, pause=0.02)


def test_a_roll_loses_no_request_although_the_gateway_is_reloaded(world: World) -> None:
    def reload() -> None:
        while not world.models["gpu01"].restarts:
            time.sleep(0.05)
        world.gateway.reload()

    thread = threading.Thread(target=reload, daemon=True)
    with clients(world) as load:
        thread.start()
        code, output = world.roll.run(driver_upgrade_max_unavailable=2, drain_timeout=60)
        assert code == 0, output
        thread.join(30)
        assert not thread.is_alive()
    load.check()
    assert {host: model.restarts for host, model in world.models.items()} == dict.fromkeys(FLEET, 1)
    assert "Batch 2 of 3: gpu02, gpu03." in output and "4 updated." in output and "of them 0 failed" in output
    for host, (model, _name) in FLEET.items():
        world.gateway.wait_for("%s:%s" % (host, model), "UP")
    assert json.loads((world.folder / "gateway-servers.json").read_text())["servers"] == {}


def test_without_the_drain_the_clients_notice(world: World) -> None:
    with clients(world) as load:
        code, output = world.roll.run(driver_upgrade_max_unavailable=2, drain_hook="none")
        assert code == 0, output
    with pytest.raises(AssertionError, match="truncated of"):
        load.check()


def test_a_host_that_somebody_has_drained_stays_so_and_the_others_go(world: World) -> None:
    name = "gpu04:mistral"
    backend = next(
        line.split(",")[0] for line in world.gateway.ask("show stat -1 4 -1").splitlines() if ",%s," % name in line
    )
    world.gateway.ask("set server %s/%s state drain" % (backend, name))
    with clients(world) as load:
        code, output = world.roll.run(driver_upgrade_max_unavailable=2, drain_timeout=60)
    load.check()
    assert "gpu04: somebody else has drained it at a gateway." in output
    # gpu03 is the last one of its model now, and keeps serving.
    assert code == 2 and "model mistral would have 0 ready replicas and keeps at least 1" in output
    restarts = {host: model.restarts for host, model in world.models.items()}
    assert restarts == {"gpu01": 1, "gpu02": 1, "gpu03": 0, "gpu04": 0}
    assert world.gateway.status(name).startswith("DRAIN")
