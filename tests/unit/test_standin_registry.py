# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sandbox's nvcr.io and api.ngc.nvidia.com answer as NGC does: who gets what, and which errors."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import json
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

WORLD = Path(__file__).resolve().parents[1] / "sandbox" / "world"
PRIVATE = "nim/meta/llama-3.1-8b-instruct"
PUBLIC = "nim/nvidia/nemotron-3-nano"
MODEL = "/v2/org/nim/team/meta/models/llama-3_1-8b-instruct/hf-1/files"


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


control = load("sandbox_world_control", WORLD / "control.py")
images = load("sandbox_world_images", WORLD / "images.py")
gate = load("sandbox_world_gate", WORLD / "service" / "gate.py")


class Client:
    def __init__(self, server):
        self.port = server.server_address[1]

    def __call__(self, path, host="nvcr.io", method="GET", body=None, basic=None, bearer=None, **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers["Host"] = host
        if basic is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(("$oauthtoken:" + basic).encode()).decode()
        if bearer is not None:
            headers["Authorization"] = "Bearer " + bearer
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), text

    def token(self, repository, key=None):
        return self("/proxy_auth?scope=repository:%s:pull" % repository, basic=key)

    def bearer(self, repository, key=None):
        return json.loads(self.token(repository, key)[2])["token"]


@pytest.fixture
def world(tmp_path):
    world = control.World(tmp_path)
    world.reset()
    world.write("catalogue", images.catalogue())
    return world


@pytest.fixture
def client(world):
    server = gate.Gate(("127.0.0.1", 0), world.state, "http://127.0.0.1:9", "/nonexistent")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield Client(server)
    server.shutdown()
    server.server_close()
    thread.join()


def test_challenge_has_the_scope_inside_the_realm(client):
    status, headers, _body = client("/v2/%s/manifests/1.8.4" % PRIVATE)
    assert status == 401
    realm = "https://nvcr.io/proxy_auth?scope=repository:%s:pull" % PRIVATE
    assert headers["WWW-Authenticate"] == 'Bearer realm="%s"' % realm
    assert client("/v2/")[0] == 401


@pytest.mark.parametrize(
    ("key", "private", "public", "absent", "caller"),
    [
        (control.KEY_VALID, 200, 200, 401, 200),
        (control.KEY_SERVICE, 200, 200, 401, 200),
        (control.KEY_LEGACY, 200, 200, 401, 401),
        (control.KEY_EXPIRED, 401, 401, 401, 401),
        ("nvapi-unknown", 401, 401, 401, 401),
        (control.KEY_WITHOUT_ENTITLEMENT, 403, 200, 401, 200),
        (control.KEY_UNPAID, 402, 402, 401, 200),
        (None, 401, 200, 401, 401),
    ],
)
def test_who_gets_a_token(client, key, private, public, absent, caller):
    assert client.token(PRIVATE, key)[0] == private
    assert client.token(PUBLIC, key)[0] == public
    assert client.token("nim/nobody/nothing", key)[0] == absent
    form = urllib.parse.urlencode({"credentials": key or ""})
    status, _headers, body = client("/v3/keys/get-caller-info", host="api.ngc.nvidia.com", method="POST", body=form)
    assert status == caller
    assert (b"Invalid API key." in body) == (caller == 401)


def test_token_opens_its_repository_only(client):
    token = client.bearer(PRIVATE, control.KEY_VALID)
    status, headers, _body = client("/v2/%s/manifests/1.8.4" % PRIVATE, bearer=token)
    assert (status, headers["X-Accel-Redirect"]) == (200, "/@registry/v2/%s/manifests/1.8.4" % PRIVATE)
    assert client("/v2/%s/manifests/2.0.12" % PUBLIC, bearer=token)[0] == 401
    assert client("/v2/", bearer=token)[0] == 200


def test_basic_on_v2_is_refused(client):
    assert client("/v2/%s/manifests/1.8.4" % PRIVATE, basic=control.KEY_VALID)[0] == 401


def test_login_without_scope_needs_a_key(client):
    assert client("/proxy_auth?account=%24oauthtoken&client_id=docker", basic=control.KEY_VALID)[0] == 200
    assert client("/proxy_auth?account=%24oauthtoken", basic="bad")[0] == 401
    assert client("/proxy_auth")[0] == 401
    assert client("/proxy_auth", method="POST", body="")[0] == 405


def test_expired_token(client, world):
    world.set_token_lifetime(-1)
    token = client.bearer(PUBLIC)
    assert client("/v2/%s/manifests/2.0.12" % PUBLIC, bearer=token)[0] == 401


def test_error_body_makes_docker_say_denied(client):
    body = json.loads(client.token(PRIVATE, control.KEY_WITHOUT_ENTITLEMENT)[2])
    assert body["errors"] == [{"code": "DENIED", "message": "Access Denied"}]
    assert json.loads(body["details"]) == {"errors": [{"code": "DENIED", "message": "Access Denied"}]}


def test_failures_are_counted_and_taken_away(client, world):
    token = client.bearer(PUBLIC)
    path = "/v2/%s/manifests/2.0.12" % PUBLIC
    world.fail(429, where="manifests", times=2, after=1, headers={"Retry-After": "3"})
    answers = [client(path, bearer=token) for dummy in range(4)]
    assert [answer[0] for answer in answers] == [200, 429, 429, 200]
    assert answers[1][1]["Retry-After"] == "3"
    assert b"TOOMANYREQUESTS" in answers[1][2]
    everywhere = world.fail(451, repository="nim/nvidia/*")
    assert client.token(PUBLIC)[0] == 451
    assert client.token(PRIVATE, control.KEY_VALID)[0] == 200
    world.mend(everywhere)
    assert client.token(PUBLIC)[0] == 200


def test_throttle_reaches_nginx(client, world):
    token = client.bearer(PUBLIC)
    path = "/v2/%s/blobs/sha256:00" % PUBLIC
    assert "X-Accel-Limit-Rate" not in client(path, bearer=token)[1]
    identifier = world.throttle(500)
    assert client(path, bearer=token)[1]["X-Accel-Limit-Rate"] == "500000"
    assert "X-Accel-Limit-Rate" not in client("/v2/%s/manifests/x" % PUBLIC, bearer=token)[1]
    world.mend(identifier)
    assert "X-Accel-Limit-Rate" not in client(path, bearer=token)[1]


def test_transfer_breaks_off(client, world):
    world.cut(10, host="api.ngc.nvidia.com", where="files", times=1)
    options = {"host": "api.ngc.nvidia.com", "bearer": control.KEY_VALID, "X_Accel": "yes"}
    with pytest.raises(http.client.IncompleteRead) as broken:
        client(MODEL + "?path=config.json", **options)
    assert len(broken.value.partial) == 10
    assert "X-Accel-Redirect" in client(MODEL + "?path=config.json", **options)[1]


def test_down_drops_or_answers_with_a_status(client, world):
    world.down()
    assert client("/v2/")[0] == gate.DROP
    world.down(how="503")
    assert client("/v2/")[0] == 503
    world.up("nvcr.io")
    assert client("/v2/")[0] == 401


def test_half_written_control_file_keeps_the_last_state(client, world):
    assert client.token(PRIVATE, control.KEY_VALID)[0] == 200
    Path(world.directory, "keys.json").write_text('{"nvapi')
    assert client.token(PRIVATE, control.KEY_VALID)[0] == 200


def test_key_changes_count_at_once(client, world):
    world.set_key(control.KEY_VALID, "expired")
    assert client.token(PRIVATE, control.KEY_VALID)[0] == 401
    world.set_key(control.KEY_VALID, refused={PRIVATE: 451})
    assert client.token(PRIVATE, control.KEY_VALID)[0] == 451
    world.set_repository(PRIVATE, access="public")
    assert client.token(PRIVATE)[0] == 200
    world.set_repository(PRIVATE, access="absent")
    assert client.token(PRIVATE)[0] == 401


def test_mirror_needs_no_key(client):
    headers = client("/v2/%s/manifests/1.8.4" % PRIVATE, host="mirror.fleet.test")[1]
    assert headers["X-Accel-Redirect"].endswith("/manifests/1.8.4")


def test_static_hosts(client, world):
    path = "/compute/cuda/repos/debian12/x86_64/a%2Bb.deb"
    host = "developer.download.nvidia.com"
    assert client(path, host=host)[1]["X-Accel-Redirect"] == "/@static/" + host + path
    world.fail(404, host=host, path=r"\.deb$")
    assert client(path, host=host)[0] == 404


def test_model_files(client):
    host = "api.ngc.nvidia.com"
    assert client(MODEL, host=host)[0] == 401
    assert client(MODEL, host=host, bearer=control.KEY_WITHOUT_ENTITLEMENT)[0] == 403
    status, _headers, body = client(MODEL, host=host, bearer=control.KEY_VALID)
    files = json.loads(body)["modelFiles"]
    assert status == 200 and files[0] == {"path": "config.json", "sizeInBytes": 1024}
    whole = client(MODEL + "?path=config.json", host=host, bearer=control.KEY_VALID)
    assert len(whole[2]) == 1024 and json.loads(whole[2])["model_type"] == "llama"
    part = client(MODEL + "?path=config.json", host=host, bearer=control.KEY_VALID, Range="bytes=1000-")
    assert (part[0], part[2]) == (206, whole[2][1000:])
    public = MODEL.replace("meta", "nvidia").replace("llama-3_1-8b-instruct", "nemotron-3-nano")
    assert client(public, host=host)[0] == 200
    assert client("/v2/org", host=host, bearer=control.KEY_VALID)[0] == 200
    assert client("/v2/org", host=host)[0] == 401
