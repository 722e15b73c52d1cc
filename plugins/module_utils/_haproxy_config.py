# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The gateway's configuration of HAProxy as text: pure functions of what is wanted.

Written for HAProxy 2.4 to 3.x (``http-request wait-for-body`` and ``json_query`` came with 2.4). References are to its
configuration manual (docs.haproxy.org).
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import typing as t
from dataclasses import dataclass, field

from ._errors import FleetError
from ._nim_models import parse_size

#: Oldest HAProxy whose configuration language is known to suffice.
MINIMUM_VERSION = (2, 4)
#: First line of the files that are ours.
MARKER = "# Managed by gpu_fleet.nim.nim_gateway: changes made here are overwritten."

#: Bytes beside the body that a request's buffer must hold: headers, and what HAProxy reserves (tune.maxrewrite, 1024).
BUFFER_RESERVE = 32768
#: Bytes of headers above which a request is refused, so that a body within the limit always fits.
HEADER_LIMIT = 16384

#: Seconds within which a request's head and its body must have arrived.
REQUEST_SECONDS = 30
#: Seconds that a request may wait for a server when all have as many as they may.
QUEUE_SECONDS = 60

#: Health checks: interval in seconds, and after how many a server's state changes. ``haproxy_server`` counts on these.
CHECK_SECONDS = 2

_HOST_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
_BACKEND_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}\Z")
_KEY = re.compile(r"[\x21-\x7e]{16,512}\Z")
_HASHED_KEY = re.compile(r"sha256:([0-9A-Fa-f]{64})\Z")
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\Z")
_API_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./:@+-]{0,199}\Z")
_PATH = re.compile(r"/[A-Za-z0-9_./+@-]+\Z")


@dataclass(frozen=True)
class Server:
    """One NIM of the fleet as the gateway sees it.

    Attributes:
        host: The GPU host as the inventory names it.
        model: Its name in ``nim_models``.
        address: IP address or host name at which the gateway reaches it.
        served: Names by which clients ask for it, the ``model`` of a request.
    """

    host: str
    model: str
    address: str
    port: int
    served: t.Tuple[str, ...]

    @property
    def name(self) -> str:
        return server_name(self.host, self.model)


@dataclass(frozen=True)
class Backend:
    """The servers that answer for the same names."""

    name: str
    served: t.Tuple[str, ...]
    servers: t.Tuple[Server, ...]


@dataclass(frozen=True)
class Layout:
    """Where things are on the gateway."""

    configuration: str = "/etc/haproxy/haproxy.cfg"
    directory: str = "/etc/haproxy/nim"
    socket: str = "/run/haproxy/admin.sock"
    state_file: str = "/var/lib/haproxy/nim-server-state"
    chroot: str = "/var/lib/haproxy"

    def file(self, name: str) -> str:
        return "%s/%s" % (self.directory, name)

    @property
    def models_map(self) -> str:
        return self.file("models.map")

    @property
    def models_json(self) -> str:
        return self.file("models.json")

    @property
    def keys(self) -> str:
        return self.file("keys.map")

    @property
    def certificate(self) -> str:
        return self.file("tls.pem")

    @property
    def servers(self) -> str:
        return self.file("servers")


@dataclass(frozen=True)
class Settings:
    """What an operator may say about a gateway, checked.

    Attributes:
        body_limit: Bytes of a request's body.
        inactivity_timeout: Seconds without a byte after which a request is given up.
        server_connections: Requests that one server gets at a time; others wait.
        max_connections: Connections of clients at a time.
        keys: Name of a client -> SHA-256 of its key in upper-case hex, as HAProxy's ``hex`` writes it.
        pem: Certificate chain and key, or None.
        certificate_file: Path on the gateway of a file with both, kept by somebody else, or None.
        metrics_port: 0 for no metrics.
    """

    backends: t.Tuple[Backend, ...]
    bind_address: str = "0.0.0.0"  # noqa: S104 - a gateway is meant to be reached
    port: int = 8080
    body_limit: int = 2**20
    inactivity_timeout: int = 600
    slow_start: int = 10
    server_connections: int = 256
    max_connections: int = 4096
    keys: t.Mapping[str, str] = field(default_factory=dict, repr=False)
    pem: t.Optional[str] = field(default=None, repr=False)
    certificate_file: t.Optional[str] = None
    metrics_address: str = "0.0.0.0"  # noqa: S104
    metrics_port: int = 8405

    @property
    def tls(self) -> bool:
        return self.pem is not None or self.certificate_file is not None


@dataclass(frozen=True)
class RenderedFile:
    """A file of the gateway; ``shown`` is its content for a diff."""

    path: str
    content: str
    mode: int
    shown: str


# -- names ----------------------------------------------------------------------------------------


def server_name(host: str, model: str) -> str:
    """Name of a server in HAProxy. The colon can be in neither part, so the host can be read from it."""
    return "%s:%s" % (safe_host(host), model)


def safe_host(host: str) -> str:
    """A host's name in the alphabet that HAProxy allows."""
    return _HOST_UNSAFE.sub("_", host)


def host_of(server: str) -> str:
    """The host's part of a server's name, as :func:`safe_host` wrote it."""
    return server.rpartition(":")[0]


def make_backends(servers: t.Sequence[Server]) -> t.Tuple[Backend, ...]:
    """One backend for each set of servers that the same names ask for.

    Raises:
        FleetError: ``invalid_option`` when two hosts would have the same name in HAProxy.
    """
    hosts: dict[str, str] = {}
    for server in servers:
        if hosts.setdefault(safe_host(server.host), server.host) != server.host:
            raise _invalid(
                "hosts", server.host, "has the same name in HAProxy as %s" % hosts[safe_host(server.host)], "rename one"
            )
    of_name: dict[str, list[Server]] = {}
    for server in servers:
        for name in server.served:
            if server not in of_name.setdefault(name, []):
                of_name[name].append(server)
    names_of: dict[t.Tuple[Server, ...], list[str]] = {}
    for name, found in of_name.items():
        names_of.setdefault(tuple(sorted(found, key=lambda server: server.name)), []).append(name)
    backends: list[Backend] = []
    taken: set[str] = set()
    for members, names in sorted(names_of.items(), key=lambda item: item[1][0]):
        proxy = _BACKEND_UNSAFE.sub("_", names[0])
        if proxy in taken or proxy in ("nim_gateway", "nim_gateway_metrics"):
            proxy = "%s-%s" % (proxy, hashlib.sha256(names[0].encode()).hexdigest()[:8])
        taken.add(proxy)
        backends.append(Backend(proxy, tuple(names), members))
    return tuple(backends)


# -- options --------------------------------------------------------------------------------------


def _invalid(option: str, value: t.Any, problem: str, remedy: str) -> FleetError:
    return FleetError("invalid_option", "%s = %s: %s; %s." % (option, value, problem, remedy), option=option)


def parse_servers(hosts: t.Sequence[t.Mapping[str, t.Any]]) -> t.Tuple[Server, ...]:
    """The servers out of the option ``hosts``.

    Raises:
        FleetError: ``invalid_option``.
    """
    servers: list[Server] = []
    for number, host in enumerate(hosts):
        path = "hosts[%d]" % number
        address = check_address(path + ".address", str(host["address"]))
        if any(server.host == host["name"] for server in servers):
            raise _invalid(path + ".name", host["name"], "is there twice", "name every host once")
        for model in host["models"]:
            at = "%s.models.%s" % (path, model["name"])
            if not 1 <= int(model["port"]) <= 65535:
                raise _invalid(at + ".port", model["port"], "is out of range", "give a port from 1 to 65535")
            for name in model["served"]:
                if not _API_NAME.match(str(name)):
                    raise _invalid(
                        at + ".served", repr(name), "cannot be the name of a model", "use letters, digits and _./:@+-"
                    )
            if not model["served"]:
                raise _invalid(at + ".served", "[]", "is empty", "say by which name clients ask for it")
            own = check_address(at + ".address", str(model["address"])) if model.get("address") else address
            servers.append(
                Server(
                    str(host["name"]),
                    str(model["name"]),
                    own,
                    int(model["port"]),
                    tuple(dict.fromkeys(map(str, model["served"]))),
                )
            )
            if [server.name for server in servers].count(servers[-1].name) > 1:
                raise _invalid(at + ".name", model["name"], "is there twice", "name every model of a host once")
    if not servers:
        raise FleetError(
            "invalid_option",
            "hosts: no host has a model that is started and can be reached from another host, so the gateway would serve "
            "nothing; name hosts with nim_models, or remove the gateway.",
            option="hosts",
        )
    return tuple(servers)


def check_address(option: str, address: str) -> str:
    """An IP address or a host name.

    Raises:
        FleetError: ``invalid_option``.
    """
    try:
        return str(ipaddress.ip_address(address.strip("[]")))
    except ValueError:
        pass
    if not _HOST_NAME.match(address):
        raise _invalid(option, repr(address), "is neither an IP address nor a host name", "correct it")
    return address


def check_port(option: str, port: int, *, zero: bool = False) -> int:
    if not (1 <= port <= 65535 or (zero and port == 0)):
        raise _invalid(option, port, "is out of range", "give a port from 1 to 65535")
    return port


def check_seconds(option: str, seconds: int, least: int, most: int) -> int:
    if not least <= seconds <= most:
        raise _invalid(option, seconds, "is out of range", "give a whole number from %d to %d" % (least, most))
    return seconds


def parse_body_limit(text: str) -> int:
    """Bytes of ``body_limit``.

    Raises:
        FleetError: ``invalid_option``.
    """
    size = parse_size(text)
    if size is None or not 2**14 <= size <= 2**26:
        raise _invalid("body_limit", text, "is no size from 16KB to 64MB", "write a number and a unit, for example 1MB")
    return size


def hash_keys(keys: t.Mapping[str, t.Any]) -> dict[str, str]:
    """Name of a client -> SHA-256 of its key, in upper-case hex.

    Args:
        keys: Name -> the key itself, or ``sha256:`` and 64 hex digits of its SHA-256.

    Raises:
        FleetError: ``invalid_option``; the message never has a key in it.
    """
    hashed: dict[str, str] = {}
    for name, key in keys.items():
        option = "api_keys.%s" % name
        if not _KEY_NAME.match(str(name)):
            # The key itself may have been written in the place of the name.
            raise _invalid(
                "api_keys",
                "(not shown)",
                "one of its names is none",
                "name every client with at most 64 letters, digits and _.@-, and give its key as the value",
            )
        given = _HASHED_KEY.match(str(key))
        if given:
            found = given.group(1).upper()
        elif str(key).startswith("sha256:") or not _KEY.match(str(key)):
            raise _invalid(
                option,
                "(not shown)",
                "is no key of 16 to 512 printable characters without spaces, and no sha256:<64 hex digits>",
                "make one with: openssl rand -hex 32",
            )
        else:
            found = hashlib.sha256(str(key).encode()).hexdigest().upper()
        if found in hashed.values():
            raise _invalid(option, "(not shown)", "is the key of another client too", "give each client its own")
        hashed[str(name)] = found
    return hashed


def check_pem(certificate: t.Optional[str], private_key: t.Optional[str]) -> t.Optional[str]:
    """Certificate chain and key as HAProxy reads them from one file; None without.

    Raises:
        FleetError: ``invalid_option``.
    """
    certificate, private_key = (certificate or "").strip(), (private_key or "").strip()
    if not certificate and not private_key:
        return None
    if "-----BEGIN CERTIFICATE-----" not in certificate:
        raise _invalid(
            "certificate", "(not shown)", "has no certificate in PEM form", "give the chain, the server's own first"
        )
    if "PRIVATE KEY-----" not in private_key and "PRIVATE KEY-----" not in certificate:
        raise _invalid("private_key", "(not shown)", "has no private key in PEM form", "give the certificate's key")
    return "\n".join(part for part in (certificate, private_key) if part) + "\n"


def check_path(option: str, path: str) -> str:
    if not _PATH.match(path) or ".." in path:
        raise _invalid(option, path, "is no absolute path that HAProxy takes unquoted", "choose another path")
    return path


# -- rendering ------------------------------------------------------------------------------------


def openai_error(message: str, code: str, *, kind: str = "invalid_request_error", param: t.Optional[str] = None) -> str:
    """An error in the form that OpenAI's clients read (platform.openai.com/docs/guides/error-codes)."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def _refuse(status: int, body: str, condition: str, *, extra: str = "") -> str:
    return "    http-request return status %d content-type application/json%s string '%s' %s" % (
        status,
        extra,
        body,
        condition,
    )


def _listed(name: str) -> dict[str, t.Any]:
    # OpenAI's clients insist on a time; a constant keeps the file the same from run to run.
    return {"id": name, "object": "model", "created": 0, "owned_by": "gpu_fleet"}


def _bind(address: str, port: int, rest: str = "") -> str:
    shown = "[%s]" % address if ":" in address else address
    return "    bind %s:%d%s%s" % (shown, port, " v4v6" if address == "::" else "", rest)


def _size(count: int) -> str:
    return "%d MiB" % (count // 2**20) if count % 2**20 == 0 else "%d KiB" % (count // 1024)


def render_configuration(settings: Settings, layout: Layout, version: str) -> str:
    """haproxy.cfg; ``version`` identifies everything that the running process was started with."""
    limit = settings.body_limit
    lines = [
        MARKER,
        "global",
        "    description %s" % version,
        "    log stdout format raw daemon info",
        "    user haproxy",
        "    group haproxy",
        "    chroot %s" % layout.chroot,
        "    maxconn %d" % settings.max_connections,
        "    stats socket %s mode 600 level admin" % layout.socket,
        "    stats timeout 2m",
        # What drain and maintenance survive a reload with; written by gateway-state.
        "    server-state-file %s" % layout.state_file,
        # A request is routed by what is in its body, so all of it must fit.
        "    tune.bufsize %d" % (limit + BUFFER_RESERVE),
    ]
    if settings.tls:
        lines += ["    ssl-default-bind-options ssl-min-ver TLSv1.2 no-tls-tickets"]
    gateway = {"kind": "server_error"}
    lines += [
        "",
        "defaults",
        "    mode http",
        "    log global",
        '    log-format "%ci:%cp %ft %b/%s %HM %HP %ST %B bytes, %TR/%Tw/%Tc/%Tr/%Ta ms, %tsc %ac/%fc/%bc/%sc/%rc %sq/%bq, '
        'client %[var(txn.client)]"',
        "    option dontlognull",
        # Tokens are passed on as they come.
        "    option http-no-delay",
        "    option forwardfor",
        "    timeout connect 5s",
        "    timeout http-request %ds" % REQUEST_SECONDS,
        "    timeout http-keep-alive 60s",
        "    timeout queue %ds" % QUEUE_SECONDS,
        "    timeout check 5s",
        # Inactivity, not duration: a stream that has tokens goes on for ever.
        "    timeout client %ds" % settings.inactivity_timeout,
        "    timeout server %ds" % settings.inactivity_timeout,
        # Only while nothing of an answer has reached the client.
        "    retries 3",
        "    option redispatch 1",
        "    retry-on conn-failure empty-response 503",
        "    load-server-state-from-file global",
    ]
    for status, message, code in (
        (400, "The request is no valid HTTP.", "bad_request"),
        (408, "The request did not arrive within %d seconds." % REQUEST_SECONDS, "request_timeout"),
        (500, "The gateway failed.", "gateway_error"),
        (502, "The server of this model broke the connection off, or its answer was no valid HTTP.", "bad_gateway"),
        (503, "No server of this model is ready; try again later.", "model_unavailable"),
        (504, "The server of this model did not answer in time.", "gateway_timeout"),
    ):
        kind = {} if status in (400, 408) else gateway
        lines.append(
            "    http-error status %d content-type application/json string '%s'"
            % (status, openai_error(message, code, **kind))
        )
    certificate = settings.certificate_file or layout.certificate
    lines += [
        "",
        "frontend nim_gateway",
        _bind(
            settings.bind_address,
            settings.port,
            " ssl crt %s alpn h2,http/1.1" % certificate if settings.tls else "",
        ),
        '    http-request return status 200 content-type application/json string \'{"object": "health.response", '
        '"message": "live"}\' if { path /v1/health/live }',
    ]
    lines += ["    acl a_model_is_ready nbsrv(%s) gt 0" % backend.name for backend in settings.backends]
    lines += [
        '    http-request return status 200 content-type application/json string \'{"object": "health.response", '
        '"message": "ready"}\' if { path /v1/health/ready } a_model_is_ready',
        _refuse(
            503, openai_error("No model is ready.", "model_unavailable", **gateway), "if { path /v1/health/ready }"
        ),
    ]
    if settings.keys:
        lines += [
            "    http-request set-var(txn.client) req.fhdr(authorization),word(2,\\ ),sha2(256),hex,map_str(%s) "
            'if { req.fhdr(authorization) -m beg -i "bearer " }' % layout.keys,
            _refuse(
                401,
                openai_error("The API key is missing or not known here; send it as a bearer token.", "invalid_api_key"),
                "unless { var(txn.client) -m found }",
                extra=" hdr WWW-Authenticate Bearer",
            ),
            # The servers behind have no use for it.
            "    http-request del-header authorization",
        ]
    known = json.dumps(_listed("@")).replace('"@"', '"%[var(txn.model),json(utf8s)]"')
    unknown = openai_error("@", "model_not_found", param="model").replace(
        '"@"',
        '"The model `%[var(txn.model),bytes(0,128),json(utf8s)]` is not served here; GET /v1/models lists what is."',
    )
    look_up = "    http-request set-var(txn.backend) var(txn.model),map_str(%s)" % layout.models_map
    # Which model a path names is decided before the body is looked at; a request has one of the two.
    lines += [
        "    acl read method GET HEAD",
        "    http-request return status 200 content-type application/json file %s "
        "if read { path /v1/models /v1/models/ }" % layout.models_json,
        "    acl one_model path_beg /v1/models/",
        "    http-request set-var(txn.model) path,regsub(^/v1/models/,),url_dec if read one_model",
        look_up + " if read one_model",
        "    http-request return status 200 content-type application/json lf-string '%s' "
        "if read one_model { var(txn.backend) -m found }" % known,
        "    http-request return status 404 content-type application/json lf-string '%s' if read one_model" % unknown,
        _refuse(
            404,
            openai_error("There is no such path here: POST /v1/..., GET /v1/models.", "not_found"),
            "unless { path_beg /v1/ }",
        ),
        _refuse(
            405,
            openai_error("This path is for POST; GET /v1/models lists the models.", "method_not_allowed"),
            "unless { method POST } !one_model",
            extra=" hdr Allow POST",
        ),
        _refuse(
            431,
            openai_error(
                "The headers of the request are longer than %d KiB." % (HEADER_LIMIT // 1024), "headers_too_large"
            ),
            "if { req.hdrs,length gt %d }" % HEADER_LIMIT,
        ),
    ]
    too_large = openai_error(
        "The body of the request is larger than the %s that this gateway takes." % _size(limit), "request_too_large"
    )
    lines += [
        _refuse(413, too_large, "if { req.hdr_val(content-length) gt %d }" % limit),
        "    http-request wait-for-body time %ds" % REQUEST_SECONDS,
        _refuse(413, too_large, "if { req.body_size gt %d }" % limit),
        "    http-request set-var(txn.model) req.body,json_query('$.model')",
        # HAProxy's reader of JSON knows no escaped slash, which is how PHP writes "meta/llama".
        "    http-request set-var(txn.model) req.body,regsub('\\\\\\\\/',/,g),json_query('$.model') "
        "unless { var(txn.model) -m found }",
        _refuse(
            400,
            openai_error(
                "The body of the request is no JSON object with a model; GET /v1/models lists the models.",
                "missing_model",
                param="model",
            ),
            "unless { var(txn.model) -m found }",
        ),
        look_up,
        "    http-request return status 404 content-type application/json lf-string '%s' "
        "unless { var(txn.backend) -m found }" % unknown,
        # No default: a request never reaches a model that it did not name.
        "    use_backend %[var(txn.backend)]",
    ]
    if settings.metrics_port:
        lines += [
            "",
            "frontend nim_gateway_metrics",
            _bind(settings.metrics_address, settings.metrics_port),
            "    option dontlog-normal",
            "    http-request use-service prometheus-exporter if { path /metrics }",
            "    http-request return status 404",
        ]
    for backend in settings.backends:
        lines += [
            "",
            "# %s" % ", ".join(backend.served),
            "backend %s" % backend.name,
            "    balance leastconn",
            "    option httpchk",
            "    http-check send meth GET uri /v1/health/ready ver HTTP/1.1 hdr Host nim hdr Connection close",
            "    http-check expect status 200",
            "    default-server inter %ds fastinter 500ms fall 2 rise 2%s maxconn %d init-addr libc,none"
            % (
                CHECK_SECONDS,
                " slowstart %ds" % settings.slow_start if settings.slow_start else "",
                settings.server_connections,
            ),
        ]
        for server in backend.servers:
            address = "[%s]" % server.address if ":" in server.address else server.address
            lines.append("    server %s %s:%d check" % (server.name, address, server.port))
    return "\n".join(lines) + "\n"


def render(settings: Settings, layout: Layout, foreign_pem: t.Optional[str] = None) -> t.Tuple[str, list[RenderedFile]]:
    """What identifies this configuration, and its files, haproxy.cfg last.

    Args:
        foreign_pem: Content of ``certificate_file``: when somebody renews it, the gateway must read it again.
    """
    models_map = "".join(
        "%s %s\n" % (name, backend.name) for backend in settings.backends for name in sorted(backend.served)
    )
    names = sorted(name for backend in settings.backends for name in backend.served)
    models = json.dumps({"object": "list", "data": [_listed(name) for name in names]}, indent=1) + "\n"
    keys = "".join("%s %s\n" % (key, name) for name, key in sorted(settings.keys.items()))
    keys_shown = "".join("sha256:%s %s\n" % (key[:12].lower(), name) for name, key in sorted(settings.keys.items()))
    servers = "".join(
        "%s %s %s %d\n" % (backend.name, server.name, server.address, server.port)
        for backend in settings.backends
        for server in backend.servers
    )
    files = [
        RenderedFile(layout.models_map, models_map, 0o644, models_map),
        RenderedFile(layout.models_json, models, 0o644, models),
        RenderedFile(layout.servers, servers, 0o644, servers),
        RenderedFile(layout.keys, keys, 0o600, keys_shown),
    ]
    if settings.pem is not None:
        files.append(RenderedFile(layout.certificate, settings.pem, 0o600, fingerprint(settings.pem) + "\n"))
    digest = hashlib.sha256()
    for part in (render_configuration(settings, Layout(), "-"), foreign_pem or "", *(file.content for file in files)):
        digest.update(hashlib.sha256(part.encode()).digest())
    version = "nim_gateway-%s" % digest.hexdigest()[:16]
    configuration = render_configuration(settings, layout, version)
    files.append(RenderedFile(layout.configuration, configuration, 0o644, configuration))
    return version, files


def fingerprint(secret: str) -> str:
    return "sha256:" + hashlib.sha256(secret.encode()).hexdigest()[:12]
