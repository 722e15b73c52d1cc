# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The registry client against a real HTTP server that speaks the token flow and checks the order of the calls."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import pathlib
import shutil
import socket
import ssl
import subprocess
import threading
import typing as t
import urllib.parse

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_reference import ImageReference
from ansible_collections.gpu_fleet.nim.plugins.module_utils._registry import RegistryClient, parse_challenge, token_url
from ansible_collections.gpu_fleet.nim.plugins.module_utils._registry_image import RegistryImage, image_architecture
from ansible_collections.gpu_fleet.nim.plugins.module_utils._tls_errors import issuer_name

KEY = "nvapi-very-secret-0123456789"
BASIC = "Basic " + base64.b64encode(("$oauthtoken:" + KEY).encode()).decode()
REPOSITORY = "nim/meta/x"


def _document(content: dict[str, t.Any]) -> tuple[bytes, str]:
    raw = json.dumps(content).encode()
    return raw, "sha256:" + hashlib.sha256(raw).hexdigest()


CONFIG, CONFIG_DIGEST = _document(
    {
        "architecture": "amd64",
        "created": "2026-01-01T00:00:00Z",
        "config": {
            "Env": ["NVIDIA_REQUIRE_CUDA=cuda>=12.5", "CUDA_VERSION=12.5.0", "PATH=/bin", "X=a=b"],
            "Labels": {"com.nvidia.nim.version": "1.8.4"},
        },
    }
)
LAYERS = [("sha256:" + "a" * 64, 1000), ("sha256:" + "b" * 64, 500), ("sha256:" + "a" * 64, 1000)]
MANIFEST, MANIFEST_DIGEST = _document(
    {
        "schemaVersion": 2,
        "config": {"digest": CONFIG_DIGEST, "size": len(CONFIG)},
        "layers": [{"digest": digest, "size": size} for digest, size in LAYERS],
    }
)
INDEX, INDEX_DIGEST = _document(
    {
        "schemaVersion": 2,
        "manifests": [
            {"digest": MANIFEST_DIGEST, "platform": {"os": "linux", "architecture": "amd64"}},
            {"digest": "sha256:" + "c" * 64, "platform": {"os": "linux", "architecture": "arm64"}},
            {"digest": "sha256:" + "d" * 64, "platform": {"os": "unknown", "architecture": "unknown"}},
            {"digest": "sha256:" + "e" * 64, "platform": {"os": "windows", "architecture": "amd64"}},
        ],
    }
)


class Call(t.NamedTuple):
    """One expected request and its answer. ``authorization`` None = must be absent; a ``form`` is a POST."""

    path: str
    status: int = 200
    body: bytes = b""
    headers: t.Mapping[str, str] = {}
    authorization: str | None = None
    form: t.Mapping[str, str] | None = None


class Server:
    """Answers the expected calls in their order; anything else is remembered as an error."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.expected: list[Call] = []
        self.errors: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                outer.answer(self, dict(urllib.parse.parse_qsl(self.rfile.read(length).decode())))

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls:
            self.http.socket = tls.wrap_socket(self.http.socket, server_side=True)
        self.port = self.http.server_address[1]
        self.name = "localhost:%d" % self.port
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def expect(self, *calls: Call) -> None:
        self.expected += calls

    def answer(self, request: http.server.BaseHTTPRequestHandler, form: dict[str, str] | None = None) -> None:
        if not self.expected:
            self.errors.append("unexpected %s" % request.path)
            request.send_error(500)
            return
        call = self.expected.pop(0)
        if request.path != call.path:
            self.errors.append("%s where %s was expected" % (request.path, call.path))
        if form != call.form:
            self.errors.append("%s: form %r" % (request.path, form))
        if request.headers.get("Authorization") != call.authorization:
            self.errors.append("%s: Authorization %r" % (request.path, request.headers.get("Authorization")))
        if not str(request.headers.get("User-Agent")).startswith("gpu_fleet"):
            self.errors.append("no User-Agent")
        request.send_response(call.status)
        for name, value in call.headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(call.body)))
        request.end_headers()
        with contextlib.suppress(OSError):
            request.wfile.write(call.body)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    # -- the usual calls ------------------------------------------------------------------------

    def realm(self, repository: str = REPOSITORY) -> str:
        return "http://%s/proxy_auth?scope=repository:%s:pull" % (self.name, repository)

    def challenge(self, repository: str = REPOSITORY) -> dict[str, str]:
        """nvcr.io: the scope is inside the realm."""
        return {"Www-Authenticate": 'Bearer realm="%s"' % self.realm(repository)}

    def token_path(self, repository: str = REPOSITORY, key: bool = True) -> str:
        return "/proxy_auth?scope=repository:%s:pull%s" % (repository, "&account=$oauthtoken" if key else "")

    def login(self, path: str, repository: str = REPOSITORY, key: bool = True) -> list[Call]:
        return [
            Call(path, 401, headers=self.challenge(repository)),
            Call(
                self.token_path(repository, key),
                body=b'{"token": "tkn", "expires_in": 3600}',
                authorization=BASIC if key else None,
            ),
        ]


@pytest.fixture
def server() -> t.Iterator[Server]:
    found = Server()
    yield found
    found.close()
    assert found.errors == []
    assert found.expected == []


def _client(server: Server, key: str = KEY, **options: t.Any) -> RegistryClient:
    options.setdefault("attempts", 1)
    options.setdefault("control_repository", "nvidia/cuda")
    client = RegistryClient(server.name, "$oauthtoken" if key else "", key, proxies={}, timeout=5, **options)
    # The server speaks HTTP only; the try with TLS has a test of its own.
    client._schemes = ["http"]
    return client


def _reference(server: Server, version: str = ":1.8.4") -> ImageReference:
    return ImageReference.parse("%s/%s%s" % (server.name, REPOSITORY, version))


def _resolve(server: Server, client: RegistryClient, architecture: str = "amd64") -> RegistryImage:
    return client.resolve(_reference(server), architecture)


CONTROL = "/v2/nvidia/cuda/tags/list?n=1"
MANIFEST_PATH = "/v2/%s/manifests/1.8.4" % REPOSITORY
BEARER = "Bearer tkn"


@pytest.mark.parametrize("key", [KEY, ""])
def test_from_tag_to_configuration(server: Server, key: str) -> None:
    server.expect(
        *server.login(MANIFEST_PATH, key=bool(key)),
        Call(MANIFEST_PATH, body=INDEX, headers={"Docker-Content-Digest": INDEX_DIGEST}, authorization=BEARER),
        Call("/v2/%s/manifests/%s" % (REPOSITORY, MANIFEST_DIGEST), body=MANIFEST, authorization=BEARER),
        Call("/v2/%s/blobs/%s" % (REPOSITORY, CONFIG_DIGEST), body=CONFIG, authorization=BEARER),
    )
    image = _resolve(server, _client(server, key))
    assert image.digest == INDEX_DIGEST
    assert image.platform_digest == MANIFEST_DIGEST
    assert image.architectures == ("amd64", "arm64")
    # A layer that occurs twice is downloaded once.
    assert image.compressed_size == 1500
    assert image.environment["NVIDIA_REQUIRE_CUDA"] == "cuda>=12.5"
    assert image.environment["X"] == "a=b"
    assert image.labels == {"com.nvidia.nim.version": "1.8.4"}


def test_without_an_index(server: Server) -> None:
    server.expect(
        Call(MANIFEST_PATH, body=MANIFEST),
        Call("/v2/%s/blobs/%s" % (REPOSITORY, CONFIG_DIGEST), body=CONFIG),
    )
    image = _resolve(server, _client(server))
    assert image.digest == image.platform_digest == MANIFEST_DIGEST
    assert image.architectures == ("amd64",)


def test_by_digest(server: Server) -> None:
    path = "/v2/%s/manifests/%s" % (REPOSITORY, MANIFEST_DIGEST)
    server.expect(Call(path, body=MANIFEST), Call("/v2/%s/blobs/%s" % (REPOSITORY, CONFIG_DIGEST), body=CONFIG))
    assert _client(server).resolve(_reference(server, "@" + MANIFEST_DIGEST), "amd64").digest == MANIFEST_DIGEST


def test_the_wrong_architecture(server: Server) -> None:
    server.expect(Call(MANIFEST_PATH, body=INDEX))
    error = _refused(server, _client(server), architecture="riscv64")
    assert error.reason == "architecture"
    assert "built for amd64, arm64" in error.message
    server.expect(
        Call(MANIFEST_PATH, body=MANIFEST), Call("/v2/%s/blobs/%s" % (REPOSITORY, CONFIG_DIGEST), body=CONFIG)
    )
    assert _refused(server, _client(server), architecture="arm64").facts["architectures"] == ["amd64"]


def _refused(server: Server, client: RegistryClient, architecture: str = "amd64") -> FleetError:
    with pytest.raises(FleetError) as caught:
        _resolve(server, client, architecture)
    error = caught.value
    everything = error.message + repr(error.facts)
    assert KEY not in everything
    assert BASIC.split()[1] not in everything
    assert "tkn" not in everything
    assert "\n" not in error.message
    return error


def test_a_bad_key_and_a_wrong_name_are_told_apart_by_the_control_repository(server: Server) -> None:
    refused = [
        Call(MANIFEST_PATH, 401, headers=server.challenge()),
        Call(server.token_path(), 401, authorization=BASIC),
        Call(CONTROL, 401, headers=server.challenge("nvidia/cuda")),
    ]
    server.expect(*refused, Call(server.token_path("nvidia/cuda"), 401, authorization=BASIC))
    assert _refused(server, _client(server)).reason == "bad_key"
    server.expect(*refused, Call(server.token_path("nvidia/cuda"), body=b'{"token":"c"}', authorization=BASIC))
    error = _refused(server, _client(server))
    assert error.reason == "no_such_repository"
    assert "accepts the API key" in error.message


def test_without_control_repository_the_door_is_asked(server: Server) -> None:
    server.expect(
        Call(MANIFEST_PATH, 401, headers=server.challenge()),
        Call(server.token_path(), 401, authorization=BASIC),
        Call("/v2/", 401, headers={"Www-Authenticate": 'Bearer realm="http://%s/token",service="r"' % server.name}),
        Call("/token?service=r&account=$oauthtoken", 401, authorization=BASIC),
    )
    assert _refused(server, _client(server, control_repository="")).reason == "bad_key"


def test_no_key(server: Server) -> None:
    server.expect(Call(MANIFEST_PATH, 401, headers=server.challenge()), Call(server.token_path(key=False), 401))
    error = _refused(server, _client(server, ""))
    assert error.reason == "no_key"
    assert "ngc_api_key" in error.message


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (402, "no_entitlement"),
        (403, "no_entitlement"),
        (451, "legal"),
        (429, "rate_limit"),
        (503, "registry_unreachable"),
    ],
)
@pytest.mark.parametrize("stage", ["token", "manifest"])
def test_what_a_status_means(server: Server, status: int, reason: str, stage: str) -> None:
    body = b'{"errors": [{"code": "DENIED", "message": "Access Denied"}]}' if status == 403 else b"<html>"
    if stage == "token":
        server.expect(
            Call(MANIFEST_PATH, 401, headers=server.challenge()),
            Call(server.token_path(), status, body, authorization=BASIC),
        )
    else:
        server.expect(*server.login(MANIFEST_PATH), Call(MANIFEST_PATH, status, body, authorization=BEARER))
    assert _refused(server, _client(server)).reason == reason


@pytest.mark.parametrize(
    ("status", "key", "reason", "remedy"),
    [
        (401, "", "no_key", "set ngc_api_key, or check the name"),
        (401, KEY, "bad_key", "create a new one"),
        (402, KEY, "no_entitlement", "activate one for the organisation of the key"),
        (403, "", "no_key", "set ngc_api_key"),
        (403, KEY, "no_entitlement", "accept the terms of the image on its NGC page"),
        (404, "", "no_such_repository", "check the name"),
        (404, KEY, "no_such_repository", "check the name"),
        (429, "", "rate_limit", "try again later, log in, or use a mirror"),
        (429, KEY, "rate_limit", "try again later, log in, or use a mirror"),
        (451, "", "legal", "use another model or registry"),
        (451, KEY, "legal", "use another model or registry"),
        (500, KEY, "registry_unreachable", "try again"),
        (418, KEY, "registry_error", "418"),
    ],
)
@pytest.mark.parametrize("code", ["", "DENIED", "UNAUTHORIZED"])
def test_every_cause_with_and_without_a_key(
    server: Server, status: int, key: str, reason: str, remedy: str, code: str
) -> None:
    """The status decides; what registries write beside it (NGC says DENIED to nearly everything) does not."""
    body = json.dumps({"errors": [{"code": code, "message": "No."}]}).encode() if code else b""
    authorization = BASIC if key else None
    server.expect(
        Call(MANIFEST_PATH, 401, headers=server.challenge()),
        Call(server.token_path(key=bool(key)), status, body, authorization=authorization),
    )
    if status == 401 and key:
        server.expect(
            Call(CONTROL, 401, headers=server.challenge("nvidia/cuda")),
            Call(server.token_path("nvidia/cuda"), 401, authorization=BASIC),
        )
    if status in (404, 418) and code == "DENIED":
        reason, remedy = ("no_entitlement", "accept the terms") if key else ("no_key", "set ngc_api_key")
    error = _refused(server, _client(server, key))
    assert error.reason == reason
    assert error.facts.get("status", 401) == status
    assert remedy in error.message


def test_a_registry_that_does_not_tell_what_is_the_matter(server: Server) -> None:
    server.expect(
        Call(MANIFEST_PATH, 401, headers=server.challenge()),
        Call(server.token_path(), 401, authorization=BASIC),
        # Its door is open to everybody.
        Call("/v2/"),
    )
    error = _refused(server, _client(server, control_repository=""))
    assert error.reason == "unauthorized"
    assert "check both" in error.message


@pytest.mark.parametrize("token", ["a\r\nX-Evil: 1", "very secret", "", None, 5, ["x"], {"a": 1}])
def test_a_token_that_is_none_is_not_sent_nor_shown(server: Server, token: t.Any) -> None:
    server.expect(
        Call(MANIFEST_PATH, 401, headers=server.challenge()),
        Call(server.token_path(), body=json.dumps({"token": token}).encode(), authorization=BASIC),
    )
    error = _refused(server, _client(server))
    assert error.reason == "registry_error"
    assert "secret" not in error.message + repr(error.facts)


def test_sizes_of_all_architectures(server: Server) -> None:
    other, other_digest = _document({"config": {"digest": "x"}, "layers": [{"digest": "sha256:1", "size": 7}]})
    index, _digest = _document(
        {
            "manifests": [
                {"digest": MANIFEST_DIGEST, "platform": {"os": "linux", "architecture": "amd64"}},
                {"digest": other_digest, "platform": {"os": "linux", "architecture": "arm64"}},
                {"digest": "sha256:" + "d" * 64, "platform": {"os": "unknown", "architecture": "unknown"}},
            ]
        }
    )
    server.expect(
        Call(MANIFEST_PATH, body=index),
        Call("/v2/%s/manifests/%s" % (REPOSITORY, MANIFEST_DIGEST), body=MANIFEST),
        Call("/v2/%s/manifests/%s" % (REPOSITORY, other_digest), body=other),
    )
    assert _client(server).compressed_sizes(_reference(server)) == {"amd64": 1500, "arm64": 7}
    server.expect(Call(MANIFEST_PATH, body=MANIFEST))
    assert _client(server).compressed_sizes(_reference(server)) == {}


@pytest.mark.parametrize(
    ("code", "reason"), [("MANIFEST_UNKNOWN", "no_such_tag"), ("NAME_UNKNOWN", "no_such_repository")]
)
def test_404(server: Server, code: str, reason: str) -> None:
    body = json.dumps({"errors": [{"code": code, "message": "unknown"}]}).encode()
    server.expect(*server.login(MANIFEST_PATH), Call(MANIFEST_PATH, 404, body, authorization=BEARER))
    error = _refused(server, _client(server))
    assert error.reason == reason
    if reason == "no_such_tag":
        assert "repository nim/meta/x, but nothing in it under :1.8.4;" in error.message


def test_retry_after_is_honoured(server: Server) -> None:
    slept: list[float] = []
    server.expect(
        Call(MANIFEST_PATH, 429, headers={"Retry-After": "7"}),
        Call(MANIFEST_PATH, 502),
        Call(MANIFEST_PATH, body=MANIFEST),
        Call("/v2/%s/blobs/%s" % (REPOSITORY, CONFIG_DIGEST), body=CONFIG),
    )
    _resolve(server, _client(server, attempts=4, sleep=slept.append))
    assert slept == [7.0, 2.0]


def test_a_long_retry_after_is_left_to_the_operator(server: Server) -> None:
    server.expect(Call(MANIFEST_PATH, 429, headers={"Retry-After": "3600"}))
    error = _refused(server, _client(server, attempts=4, sleep=lambda seconds: pytest.fail("slept")))
    assert error.reason == "rate_limit"
    assert error.facts["retry_after"] == 3600
    assert "wait 3600 s" in error.message


def test_credentials_are_not_shown_to_another_host(server: Server) -> None:
    other = Server()
    try:
        other.expect(Call("/blob", body=CONFIG, authorization=None))
        server.expect(
            *server.login(MANIFEST_PATH),
            Call(MANIFEST_PATH, body=MANIFEST, authorization=BEARER),
            Call(
                "/v2/%s/blobs/%s" % (REPOSITORY, CONFIG_DIGEST),
                307,
                headers={"Location": "http://%s/blob" % other.name},
                authorization=BEARER,
            ),
        )
        assert _resolve(server, _client(server)).config_digest == CONFIG_DIGEST
        assert other.errors == []
    finally:
        other.close()


def test_credentials_follow_a_redirect_on_the_same_host(server: Server) -> None:
    server.expect(
        *server.login(MANIFEST_PATH),
        Call(MANIFEST_PATH, 302, headers={"Location": "/moved"}, authorization=BEARER),
        Call("/moved", body=MANIFEST, authorization=BEARER),
        Call("/v2/%s/blobs/%s" % (REPOSITORY, CONFIG_DIGEST), body=CONFIG, authorization=BEARER),
    )
    _resolve(server, _client(server))


def test_no_key_to_a_realm_without_encryption(server: Server) -> None:
    server.expect(Call(MANIFEST_PATH, 401, headers=server.challenge()))
    error = _refused(server, _client(server, insecure=False))
    assert error.reason == "registry_error"
    assert "without encryption" in error.message


def test_changed_content_is_noticed(server: Server) -> None:
    server.expect(Call(MANIFEST_PATH, body=MANIFEST + b" ", headers={"Docker-Content-Digest": MANIFEST_DIGEST}))
    assert _refused(server, _client(server)).reason == "registry_error"
    server.expect(Call(MANIFEST_PATH, body=MANIFEST), Call("/v2/%s/blobs/%s" % (REPOSITORY, CONFIG_DIGEST), body=b"{}"))
    assert _refused(server, _client(server)).reason == "registry_error"


def test_a_login_page_is_no_registry(server: Server) -> None:
    server.expect(Call(MANIFEST_PATH, body=b"<html>please log in</html>"))
    assert "no JSON object" in _refused(server, _client(server)).message


def test_basic_authentication(server: Server) -> None:
    server.expect(
        Call(MANIFEST_PATH, 401, headers={"Www-Authenticate": 'Basic realm="r"'}),
        Call(MANIFEST_PATH, body=MANIFEST, authorization=BASIC),
        Call("/v2/%s/blobs/%s" % (REPOSITORY, CONFIG_DIGEST), body=CONFIG, authorization=BASIC),
    )
    _resolve(server, _client(server))


# -- identity tokens --------------------------------------------------------------------------------------

OAUTH = "/oauth2/token"


def _with_token(server: Server) -> RegistryClient:
    client = RegistryClient(server.name, "<token>", KEY, proxies={}, timeout=5, attempts=1)
    client._schemes = ["http"]
    return client


def _exchanged(server: Server, status: int = 200, body: bytes = b'{"access_token": "tkn"}', path: str = OAUTH) -> Call:
    form = {
        "grant_type": "refresh_token",
        "refresh_token": KEY,
        "client_id": "gpu_fleet.nim",
        "service": "x.azurecr.io",
        "scope": "repository:%s:pull" % REPOSITORY,
    }
    return Call(path, status, body=body, form=form)


def _oauth(server: Server) -> Call:
    challenge = 'Bearer realm="http://%s%s",service="x.azurecr.io",scope="repository:%s:pull"'
    return Call(MANIFEST_PATH, 401, headers={"Www-Authenticate": challenge % (server.name, OAUTH, REPOSITORY)})


def test_an_identity_token_is_exchanged_for_one_of_the_repository(server: Server) -> None:
    server.expect(
        _oauth(server),
        _exchanged(server),
        Call(MANIFEST_PATH, body=MANIFEST, authorization=BEARER),
        Call("/v2/%s/blobs/%s" % (REPOSITORY, CONFIG_DIGEST), body=CONFIG, authorization=BEARER),
    )
    _resolve(server, _with_token(server))


@pytest.mark.parametrize(("status", "body"), [(401, b""), (400, b'{"error": "invalid_grant"}')])
def test_an_identity_token_that_has_expired(server: Server, status: int, body: bytes) -> None:
    server.expect(_oauth(server), _exchanged(server, status, body))
    error = _refused(server, _with_token(server))
    assert error.reason == "bad_key"
    assert "identity token" in error.message and "docker login %s" % server.name in error.message


def test_a_door_without_a_scope_hides_no_cause(server: Server) -> None:
    """The token is good and the repository is not to be seen: the exchange without a scope proves nothing."""
    challenge = 'Bearer realm="http://%s%s",service="x.azurecr.io"' % (server.name, OAUTH)
    form = {
        "grant_type": "refresh_token",
        "refresh_token": KEY,
        "client_id": "gpu_fleet.nim",
        "service": "x.azurecr.io",
    }
    server.expect(
        _oauth(server),
        _exchanged(server),
        Call(MANIFEST_PATH, 401, authorization=BEARER),
        Call("/v2/", 401, headers={"Www-Authenticate": challenge}),
        Call(OAUTH, 400, body=b'{"error": "invalid_request"}', form=form),
    )
    error = _refused(server, _with_token(server))
    assert error.reason == "unauthorized"
    assert "no proxy in its place" not in error.message


@pytest.mark.parametrize("status", [404, 405])
def test_a_registry_that_exchanges_no_identity_tokens(server: Server, status: int) -> None:
    server.expect(_oauth(server), _exchanged(server, status))
    error = _refused(server, _with_token(server))
    assert error.reason == "identity_token"
    assert "docker login %s" % server.name in error.message


def test_a_registry_that_wants_a_password_for_an_identity_token(server: Server) -> None:
    challenged = {"Www-Authenticate": 'Basic realm="r"'}
    server.expect(Call(MANIFEST_PATH, 401, headers=challenged))
    assert _refused(server, _with_token(server)).reason == "identity_token"
    server.expect(Call("/v2/", 401, headers=challenged))
    with pytest.raises(FleetError) as error:
        _with_token(server).check_credentials()
    assert error.value.reason == "identity_token"


@pytest.mark.parametrize(("status", "reason"), [(302, "identity_token"), (307, "registry_error")])
def test_an_identity_token_follows_no_redirect(server: Server, status: int, reason: str) -> None:
    server.expect(_oauth(server), _exchanged(server, status)._replace(headers={"Location": "/elsewhere"}))
    if status == 302:
        # A plain GET, with nothing of the form.
        server.expect(Call("/elsewhere", 404))
    assert _refused(server, _with_token(server)).reason == reason


def test_no_identity_token_to_a_realm_without_encryption(server: Server) -> None:
    server.expect(_oauth(server))
    client = _with_token(server)
    client._insecure = False
    error = _refused(server, client)
    assert error.reason == "registry_error"
    assert "without encryption" in error.message


def test_check_credentials(server: Server) -> None:
    server.expect(*server.login(CONTROL, "nvidia/cuda"))
    _client(server).check_credentials()
    server.expect(*server.login(MANIFEST_PATH), Call(MANIFEST_PATH, body=MANIFEST, authorization=BEARER))
    _client(server).check_credentials(_reference(server))
    server.expect(
        Call(CONTROL, 401, headers=server.challenge("nvidia/cuda")),
        Call(server.token_path("nvidia/cuda"), 401, authorization=BASIC),
    )
    with pytest.raises(FleetError) as error:
        _client(server).check_credentials()
    assert error.value.reason == "bad_key"
    assert "expired" in error.value.message


# -- the network ------------------------------------------------------------------------------------------


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = RegistryClient("127.0.0.1:%d" % port, proxies={}, attempts=2, sleep=lambda seconds: None)
    with pytest.raises(FleetError) as error:
        client.resolve(ImageReference.parse("127.0.0.1:%d/x:1" % port), "amd64")
    assert error.value.reason == "registry_unreachable"
    assert "refused" in error.value.message


def test_no_such_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    client = RegistryClient("registry.invalid", proxies={}, attempts=1)
    with pytest.raises(FleetError) as error:
        client.resolve(ImageReference.parse("registry.invalid/x:1"), "amd64")
    assert error.value.reason == "registry_unreachable"
    assert "resolved" in error.value.message


def test_no_answer() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        name = "127.0.0.1:%d" % silent.getsockname()[1]
        client = RegistryClient(name, proxies={}, attempts=1, timeout=0.3)
        with pytest.raises(FleetError) as error:
            client.resolve(ImageReference.parse(name + "/x:1"), "amd64")
    assert error.value.reason == "registry_unreachable"
    assert error.value.facts["cause"] == "timeout"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/O=Corp/CN=Corp Inspection CA",
            "-addext",
            "subjectAltName=DNS:localhost",
            "-keyout",
            str(folder / "key.pem"),
            "-out",
            str(folder / "ca.pem"),
        ],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture
def tls_server(certificate: pathlib.Path) -> t.Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "ca.pem", certificate / "key.pem")
    found = Server(context)
    yield found
    found.close()


def test_an_unknown_ca_is_named(tls_server: Server, certificate: pathlib.Path, tmp_path: pathlib.Path) -> None:
    name = tls_server.name
    reference = ImageReference.parse(name + "/%s:1.8.4" % REPOSITORY)
    options = {"insecure": False, "proxies": {}, "attempts": 3, "certificates": str(tmp_path)}
    with pytest.raises(FleetError) as caught:
        RegistryClient(name, sleep=lambda seconds: pytest.fail("slept"), **options).resolve(reference, "amd64")
    error = caught.value
    assert error.reason == "tls_error"
    assert error.facts["issuer"] == "Corp Inspection CA"
    assert "update-ca-certificates" in error.message
    assert "/etc/docker/certs.d/%s/ca.crt" % name in error.message

    # The CA where Docker looks for it.
    (tmp_path / name).mkdir()
    shutil.copy(certificate / "ca.pem", tmp_path / name / "ca.crt")
    tls_server.expect(
        Call(MANIFEST_PATH, body=MANIFEST), Call("/v2/%s/blobs/%s" % (REPOSITORY, CONFIG_DIGEST), body=CONFIG)
    )
    RegistryClient(name, **options).resolve(reference, "amd64")
    (tmp_path / name / "ca.crt").write_text("rubbish")
    with pytest.raises(FleetError, match="not a readable certificate"):
        RegistryClient(name, **options)


def test_loopback_needs_no_certificate_and_no_tls(tls_server: Server, server: Server) -> None:
    for each in (tls_server, server):
        each.expect(
            Call(MANIFEST_PATH, body=MANIFEST), Call("/v2/%s/blobs/%s" % (REPOSITORY, CONFIG_DIGEST), body=CONFIG)
        )
    client = RegistryClient(tls_server.name, proxies={}, attempts=1)
    client.resolve(ImageReference.parse(tls_server.name + "/%s:1.8.4" % REPOSITORY), "amd64")
    client = RegistryClient(server.name, proxies={}, attempts=1, timeout=5)
    client.resolve(_reference(server), "amd64")


def test_issuer_name(certificate: pathlib.Path) -> None:
    pem = (certificate / "ca.pem").read_text()
    assert issuer_name(ssl.PEM_cert_to_DER_cert(pem)) == "Corp Inspection CA"


# -- pure parts -------------------------------------------------------------------------------------------


def test_parse_challenge() -> None:
    assert parse_challenge('Bearer realm="https://a/b?scope=x",service="s", error=invalid') == (
        "bearer",
        {"realm": "https://a/b?scope=x", "service": "s", "error": "invalid"},
    )


def test_token_url_of_what_cannot_be_encoded() -> None:
    assert token_url({"realm": "https://nvcr.io/token?x=\ud800"}, "") == "https://nvcr.io/token?x=%3F"


def test_token_url_does_not_repeat_the_scope() -> None:
    inside = {"realm": "https://nvcr.io/proxy_auth?scope=repository:nim/x:pull"}
    assert token_url(inside, "repository:nim/x:pull") == "https://nvcr.io/proxy_auth?scope=repository:nim/x:pull"
    hub = {"realm": "https://auth.docker.io/token", "service": "registry.docker.io"}
    assert token_url(hub, "repository:library/x:pull") == (
        "https://auth.docker.io/token?service=registry.docker.io&scope=repository:library/x:pull"
    )


@pytest.mark.parametrize(("machine", "expected"), [("x86_64", "amd64"), ("aarch64", "arm64"), ("ppc64le", "ppc64le")])
def test_image_architecture(machine: str, expected: str) -> None:
    assert image_architecture(machine) == expected


def test_the_proxy_is_used_and_can_be_bypassed(server: Server) -> None:
    client = RegistryClient(
        "registry.example", insecure=True, proxies={"http": "http://%s" % server.name}, attempts=1, timeout=5
    )
    client._schemes = ["http"]
    path = "http://registry.example/v2/x/manifests/1"
    server.expect(Call(path, body=MANIFEST), Call("http://registry.example/v2/x/blobs/%s" % CONFIG_DIGEST, body=CONFIG))
    client.resolve(ImageReference.parse("registry.example/x:1"), "amd64")
    bypassing = RegistryClient(
        server.name, proxies={"http": "http://127.0.0.1:9", "no": "localhost"}, attempts=1, timeout=5
    )
    bypassing._schemes = ["http"]
    server.expect(
        Call(MANIFEST_PATH, body=MANIFEST), Call("/v2/%s/blobs/%s" % (REPOSITORY, CONFIG_DIGEST), body=CONFIG)
    )
    bypassing.resolve(_reference(server), "amd64")
