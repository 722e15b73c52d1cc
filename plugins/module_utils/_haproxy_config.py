# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The gateway's configuration of HAProxy as text: pure functions of what is wanted.

Written for HAProxy 2.4 to 3.x (``http-request wait-for-body`` and ``json_query`` came with 2.4). References are to its
configuration manual (docs.haproxy.org).
"""

from __future__ import annotations

import hashlib
import json
import typing as t
from dataclasses import dataclass

from ._gateway_settings import Layout, Settings

#: Oldest HAProxy whose configuration language is known to suffice.
MINIMUM_VERSION = (2, 4)
#: First line of the files that are ours.
MARKER = "# Managed by gpu_fleet.nim.nim_gateway: changes made here are overwritten."

#: Bytes beside the body that a request's buffer must hold: headers, and what HAProxy reserves (tune.maxrewrite, 1024).
BUFFER_RESERVE = 32768
#: Bytes of headers above which a request is refused, so that a body within the limit always fits.
HEADER_LIMIT = 16384

#: Bytes of a body that are taken in before anything is refused: many clients read no answer while they still send.
POLITE_BYTES = 65536

#: Seconds within which a request's head and its body must have arrived.
REQUEST_SECONDS = 30
#: Seconds that a request may wait for a server when all have as many as they may.
QUEUE_SECONDS = 60

#: Seconds between two health checks of a server.
CHECK_SECONDS = 2


@dataclass(frozen=True)
class RenderedFile:
    """A file of the gateway; ``shown`` is its content for a diff."""

    path: str
    content: str
    mode: int
    shown: str


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
        # No HTTP/2: HAProxy 2.6 ends what it refuses before the body is there with RST_STREAM(CANCEL), and curl then shows no error.
        _bind(
            settings.bind_address,
            settings.port,
            " ssl crt %s alpn http/1.1" % certificate if settings.tls else "",
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
    lines.append(
        "    http-request wait-for-body time %ds if { req.hdr_val(content-length) le %d }"
        % (REQUEST_SECONDS, min(limit, POLITE_BYTES))
    )
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
                # HAProxy's reader of JSON follows 19 levels (MJSON_MAX_DEPTH), and ends at what it looks for.
                "The body of the request is no JSON object with a model, or is nested too deeply before it: put the model "
                "first. GET /v1/models lists the models.",
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
