# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decides every request to the outside world: who may have it, and whether it is to fail.

nginx in front ends TLS and moves the bytes: the gate answers ``X-Accel-Redirect`` and nginx fetches from docker-registry,
the static repositories or the model files, at the rate the gate names.  All state that tests change is read from the JSON
files of the control directory at every request.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import hashlib
import hmac
import json
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REGISTRY_HOST = "nvcr.io"
MIRROR_HOST = "mirror.fleet.test"
NGC_HOST = "api.ngc.nvidia.com"
USER = "$oauthtoken"
# nginx closes the connection without an answer when it sees this status (error_page in nginx.conf).
DROP = 599
REASONS = {
    401: ("UNAUTHORIZED", "authentication required"),
    402: ("PAYMENT_REQUIRED", "402 Payment Required"),
    403: ("DENIED", "Access Denied"),
    404: ("NOT_FOUND", "not found"),
    429: ("TOOMANYREQUESTS", "too many requests"),
    451: ("UNAVAILABLE_FOR_LEGAL_REASONS", "Unavailable For Legal Reasons"),
    500: ("UNKNOWN", "internal error"),
    503: ("UNAVAILABLE", "service unavailable"),
}
V2 = re.compile(r"^/v2/(?P<repository>.+?)/(?P<what>manifests|blobs|tags)/(?P<reference>.+)$")
MODEL = re.compile(
    r"^/v2/org/(?P<org>[^/]+)/team/(?P<team>[^/]+)/models/(?P<model>[^/]+)/(?:versions/)?(?P<version>[^/]+)/files(?:/(?P<path>.+))?$"
)


class Control:
    """The control files.  A file that is missing or half-written counts as its last good content."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._good: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, name: str, empty: Any) -> Any:
        try:
            with open(os.path.join(self.directory, name + ".json"), encoding="utf-8") as handle:
                self._good[name] = json.load(handle)
        except FileNotFoundError:
            return empty
        except (OSError, ValueError):
            pass
        return self._good.get(name, empty)

    def key(self, value: str) -> dict[str, Any] | None:
        entry = self.read("keys", {}).get(value)
        return entry if entry and entry.get("state", "valid") == "valid" else None

    def repository(self, name: str) -> dict[str, Any] | None:
        changed = self.read("repositories", {}).get(name, {})
        known = self.read("catalogue", {}).get("repositories", {}).get(name)
        if known is None and not changed:
            return None
        merged = {**(known or {}), **changed}
        return None if merged.get("access") == "absent" else merged

    def model(self, name: str) -> dict[str, Any] | None:
        known = self.read("catalogue", {}).get("models", {}).get(name)
        if known is None:
            return None
        return {**known, **self.read("models", {}).get(name, {})}

    def fault(self, host: str, where: str, path: str, repository: str, kind: str = "fail") -> dict[str, Any] | None:
        """The first fault that matches; one with ``times`` stops after that many, ``after`` lets some pass first."""
        for fault in self.read("faults", []):
            if fault.get("kind", "fail") != kind or fault.get("host", host) != host:
                continue
            if fault.get("where", "any") not in ("any", where):
                continue
            if fault.get("repository") and not fnmatch.fnmatchcase(repository, fault["repository"]):
                continue
            if fault.get("path") and not re.search(fault["path"], path):
                continue
            with self._lock:
                count = self._counts.get(fault["id"], 0)
                self._counts[fault["id"]] = count + 1
            after = fault.get("after", 0)
            if count < after or (fault.get("times") is not None and count >= after + fault["times"]):
                continue
            return dict(fault)
        return None

    def rate(self, host: str, where: str, repository: str) -> int:
        """Bytes a second for one connection; 0 means no limit."""
        fault = self.fault(host, where, "", repository, "throttle")
        return max(1, int(fault["kilobytes_per_second"] * 1000)) if fault else 0

    def down(self, host: str) -> str:
        return str(self.read("down", {}).get(host, ""))


class Tokens:
    """Bearer tokens that the gate can check without remembering them."""

    def __init__(self, directory: str) -> None:
        path = os.path.join(directory, "token-secret")
        try:
            with open(path, "rb") as handle:
                self.secret = handle.read()
        except FileNotFoundError:
            self.secret = os.urandom(32)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as handle:
                handle.write(self.secret)

    def issue(self, repositories: list[str], lifetime: int) -> str:
        body = json.dumps({"repositories": repositories, "until": time.time() + lifetime}).encode()
        seal = hmac.new(self.secret, body, hashlib.sha256).hexdigest()
        return base64.urlsafe_b64encode(body).decode() + "." + seal

    def repositories(self, token: str) -> list[str] | None:
        try:
            encoded, seal = token.split(".", 1)
            body = base64.urlsafe_b64decode(encoded)
            if not hmac.compare_digest(seal, hmac.new(self.secret, body, hashlib.sha256).hexdigest()):
                return None
            data = json.loads(body)
        except ValueError:
            return None
        return list(data["repositories"]) if data["until"] > time.time() else None


def verdict(control: Control, name: str, entry: dict[str, Any] | None, key: str | None) -> int:
    """200 or the status with which NGC refuses ``key`` (None: no key was sent) the repository or model ``name``."""
    known = control.key(key) if key is not None else None
    if key is not None and known is None:
        return 401
    # A repository that does not exist answers as one that is private: nobody learns which names there are.
    if entry is None:
        return 401
    if known is not None:
        for pattern, status in known.get("refused", {}).items():
            if fnmatch.fnmatchcase(name, pattern):
                return int(status)
    if entry.get("status"):
        return int(entry["status"])
    if entry["access"] == "public":
        return 200
    if known is None:
        return 401
    allowed = any(fnmatch.fnmatchcase(name, pattern) for pattern in known.get("entitlements", ["*"]))
    return 200 if allowed else 403


def model_bytes(name: str, size: int) -> bytes:
    """The bytes of a model file: JSON where its name says so, else noise that does not compress."""
    if not name.endswith(".json"):
        return hashlib.shake_128(name.encode()).digest(size)
    data = json.dumps({"model_type": "llama", "sandbox": name, "padding": ""})
    return (data[:-2] + "x" * (size - len(data)) + data[-2:]).encode()


class Gate(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], state: str, registry: str, static: str) -> None:
        self.state = state
        self.control = Control(os.path.join(state, "control"))
        self.tokens = Tokens(state)
        self.registry = registry
        self.static = static
        # Other names under which a host of the world is reached (unit tests, on loopback).
        self.aliases: dict[str, str] = {}
        self.making = threading.Lock()
        super().__init__(address, Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no event."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gate

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # ---- answers

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, headers: dict[str, str] | None = None, code: str = "", message: str = "") -> None:
        default = REASONS.get(status, ("UNKNOWN", "error"))
        text = message or default[1]
        if self.host == NGC_HOST:
            body: Any = {"requestStatus": {"statusCode": code or default[0], "statusDescription": text}}
        else:
            error = {"code": code or default[0], "message": text}
            body = {"errors": [error]}
            # The shapes that make Docker print what people report from nvcr.io: "unauthorized: authentication required"
            # and "denied: {"errors": [{"code": "DENIED", "message": "Access Denied"}]}".
            if status == 401:
                error["detail"] = self.path.split("?")[0]
            elif status == 403:
                body["details"] = json.dumps({"errors": [dict(error)]})
        self.answer(status, body, headers)

    def accelerate(self, location: str, where: str, repository: str = "") -> None:
        """Let nginx send what lies at the internal ``location``."""
        cut = (
            self.server.control.fault(self.host, where, self.path, repository, "cut") if self.command == "GET" else None
        )
        if cut:
            self.truncate(location, int(cut["bytes"]))
            return
        rate = self.server.control.rate(self.host, where, repository)
        headers = {"X-Accel-Redirect": location}
        if rate:
            headers["X-Accel-Limit-Rate"] = str(rate)
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def truncate(self, location: str, limit: int) -> None:
        """Promise the whole file, send its first bytes and break the connection."""
        if location.startswith("/@registry/"):
            with urllib.request.urlopen(self.server.registry + location[len("/@registry") :], timeout=30) as reply:
                length, data = int(reply.headers["Content-Length"]), reply.read(limit)
        else:
            roots = {"/@models": os.path.join(self.server.state, "models"), "/@static": self.server.static}
            head, dummy, rest = urllib.parse.unquote(location)[1:].partition("/")
            path = os.path.join(roots["/" + head], rest)
            with open(path, "rb") as handle:
                length, data = os.path.getsize(path), handle.read(limit)
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()
        self.close_connection = True

    # ---- requests

    def do_GET(self) -> None:
        name = self.headers.get("Host", "").split(":")[0].lower()
        self.host = self.server.aliases.get(name, name)
        parsed = urllib.parse.urlsplit(self.path)
        self.query = urllib.parse.parse_qs(parsed.query)
        self.route(parsed.path)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_POST()

    do_PATCH = do_DELETE = do_PUT  # noqa: N815  (the names http.server looks for)

    def route(self, path: str) -> None:
        down = self.server.control.down(self.host)
        if down == "hang":
            while self.server.control.down(self.host) == "hang":
                time.sleep(0.2)
        if down:
            status = int(down) if down.isdigit() else DROP
            self.refuse(status if down != "hang" else 503)
            return
        if self.host in (REGISTRY_HOST, MIRROR_HOST):
            self.route_registry(path)
        elif self.host == NGC_HOST:
            self.route_ngc(path)
        else:
            if not self.failed("static", path, ""):
                self.accelerate("/@static/%s%s" % (self.host, path), "static")

    def failed(self, where: str, path: str, repository: str) -> bool:
        fault = self.server.control.fault(self.host, where, path, repository)
        if fault is None:
            return False
        time.sleep(fault.get("delay", 0))
        self.refuse(int(fault["status"]), fault.get("headers"), fault.get("code", ""), fault.get("message", ""))
        return True

    def credentials(self) -> tuple[str, str]:
        """(scheme, secret): the password of Basic, the token of Bearer."""
        scheme, dummy, value = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                user, dummy, password = base64.b64decode(value).decode().partition(":")
            except ValueError:
                return "basic", ""
            # Any other user name is refused as a wrong key is.
            return "basic", password if user == USER else ""
        return scheme.lower(), value.strip()

    # ---- registry

    def challenge(self, repository: str, status: int = 401) -> None:
        scope = "?scope=repository:%s:pull" % repository if repository else ""
        realm = "https://%s/proxy_auth%s" % (self.host, scope)
        self.refuse(
            status, {"WWW-Authenticate": 'Bearer realm="%s"' % realm, "Docker-Distribution-Api-Version": "registry/2.0"}
        )

    def route_registry(self, path: str) -> None:
        if path == "/proxy_auth":
            self.token(path)
            return
        match = V2.match(path)
        where = match.group("what") if match else "ping"
        repository = match.group("repository") if match else ""
        if self.failed(where, path, repository):
            return
        if path not in ("/v2/", "/v2") and not match:
            self.refuse(404)
            return
        if self.command not in ("GET", "HEAD"):
            self.refuse(405, {"Allow": "GET, HEAD"}, "UNSUPPORTED", "The operation is unsupported.")
            return
        if self.host != MIRROR_HOST:
            scheme, secret = self.credentials()
            allowed = self.server.tokens.repositories(secret) if scheme == "bearer" else None
            if allowed is None or (repository and repository not in allowed):
                self.challenge(repository)
                return
        if not match:
            self.answer(200, {}, {"Docker-Distribution-Api-Version": "registry/2.0"})
        elif where == "tags":
            self.tags(repository)
        else:
            self.accelerate("/@registry" + path, where, repository)

    def token(self, path: str) -> None:
        control = self.server.control
        names: list[str] = []
        for scope in self.query.get("scope", []):
            for part in scope.split(" "):
                pieces = part.split(":")
                if len(pieces) == 3 and pieces[0] == "repository" and pieces[1] not in names:
                    names.append(pieces[1])
        if self.failed("token", path, names[0] if names else ""):
            return
        if self.command not in ("GET", "HEAD"):
            self.refuse(405, {"Allow": "GET"})
            return
        scheme, secret = self.credentials()
        key = secret if scheme == "basic" else None
        if not names and (key is None or control.key(key) is None):
            self.refuse(401)
            return
        for name in names:
            status = verdict(control, name, control.repository(name), key)
            if status != 200:
                self.refuse(status)
                return
        lifetime = int(control.read("settings", {}).get("token_lifetime", 3600))
        self.answer(200, {"token": self.server.tokens.issue(names, lifetime), "expires_in": lifetime})

    def tags(self, repository: str) -> None:
        url = "%s/v2/%s/tags/list" % (self.server.registry, repository)
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                tags = json.load(reply)["tags"] or []
        except urllib.error.HTTPError as exc:
            self.answer(exc.code, exc.read())
            return
        except OSError:
            self.refuse(503)
            return
        hidden = (self.server.control.repository(repository) or {}).get("hidden_tags", [])
        tags = sorted(tag for tag in tags if tag not in hidden)
        last = self.query.get("last", [""])[0]
        tags = [tag for tag in tags if tag > last]
        count = int(self.query.get("n", ["100"])[0])
        headers = {}
        if len(tags) > count:
            tags = tags[:count]
            following = urllib.parse.urlencode({"n": count, "last": tags[-1]})
            headers["Link"] = '</v2/%s/tags/list?%s>; rel="next"' % (repository, following)
        self.answer(200, {"name": repository, "tags": tags}, headers)

    # ---- NGC

    def route_ngc(self, path: str) -> None:
        if path == "/v3/keys/get-caller-info":
            self.caller_info(path)
            return
        scheme, secret = self.credentials()
        key = secret if scheme == "bearer" and secret else None
        if path == "/v2/org":
            if self.failed("keys", path, ""):
                return
            entry = self.server.control.key(key) if key else None
            if entry is None:
                self.refuse(401)
            else:
                self.answer(200, {"organizations": [{"name": entry.get("org", "sandbox")}]})
            return
        match = MODEL.match(path)
        if not match:
            self.refuse(404)
            return
        name = "%s/%s/%s" % (match.group("org"), match.group("team"), match.group("model"))
        if self.failed("files", self.path, name):
            return
        entry = self.server.control.model(name)
        status = verdict(self.server.control, name, entry, key)
        if status != 200 or entry is None:
            self.refuse(status)
            return
        files = entry["versions"].get(match.group("version"))
        if files is None:
            self.refuse(404)
            return
        wanted = match.group("path") or self.query.get("path", [""])[0]
        if not wanted:
            self.answer(200, {"modelFiles": files})
            return
        sizes = {entry["path"]: int(entry["sizeInBytes"]) for entry in files}
        if wanted not in sizes:
            self.refuse(404)
            return
        blob = self.model_file("%s:%s/%s" % (name, match.group("version"), wanted), sizes[wanted])
        if self.headers.get("X-Accel") == "yes":
            self.accelerate("/@models/" + blob, "files", name)
        else:
            self.plain_file(os.path.join(self.server.state, "models", blob))

    def model_file(self, name: str, size: int) -> str:
        """The file's name below models/; its bytes depend on nothing but its name."""
        blob = hashlib.sha256(("%s %d" % (name, size)).encode()).hexdigest()
        path = os.path.join(self.server.state, "models", blob)
        with self.server.making:
            if not os.path.exists(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path + ".part", "wb") as handle:
                    handle.write(model_bytes(name, size))
                os.chmod(path + ".part", 0o644)
                os.replace(path + ".part", path)
        return blob

    def plain_file(self, path: str) -> None:
        """Without nginx in front (unit tests): the bytes themselves, from the offset of a Range header."""
        with open(path, "rb") as handle:
            data = handle.read()
        match = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        start = int(match.group(1)) if match else 0
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:])

    def caller_info(self, path: str) -> None:
        if self.failed("keys", path, ""):
            return
        if self.command != "POST":
            self.refuse(405)
            return
        key = urllib.parse.parse_qs(self.body.decode("utf-8", "replace")).get("credentials", [""])[0]
        entry = self.server.control.key(key)
        # Keys of the old kind work at the registry, but this interface does not know them.
        if entry is None or entry.get("kind") == "LEGACY":
            self.refuse(401, None, "UNAUTHORIZED", "Invalid API key.")
            return
        self.answer(
            200,
            {
                "type": entry.get("kind", "PERSONAL_KEY"),
                "orgName": entry.get("org", "sandbox"),
                "products": entry.get("products", ["nim-dev", "nv-ai-enterprise"]),
                "user": {"name": "Sandbox", "email": "sandbox@fleet.test"},
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", default="127.0.0.1:8090")
    parser.add_argument("--state", default="/var/lib/world")
    parser.add_argument("--registry", default="http://127.0.0.1:5000")
    parser.add_argument("--static", default="/srv/repositories")
    options = parser.parse_args()
    address, dummy, port = options.listen.rpartition(":")
    Gate((address, int(port)), options.state, options.registry, options.static).serve_forever()


if __name__ == "__main__":
    main()
