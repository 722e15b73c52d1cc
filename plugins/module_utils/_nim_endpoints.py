# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The HTTP interface of a NIM: readiness, names, version, and one short completion.

Everything is asked from the host itself: the image may lack curl.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import ssl
import time
import typing as t
from dataclasses import dataclass

from ._health_target import HealthTarget
from ._untrusted import json_object

Json = t.Dict[str, t.Any]

#: Seconds for one health request, and for one completion on a model that may still warm up.
PROBE_TIMEOUT = 3.0
COMPLETION_TIMEOUT = 60.0
#: How the note of a completion begins that was refused for want of one.
NO_CHAT_TEMPLATE = "the model has no chat template"


@dataclass(frozen=True)
class HttpAnswer:
    status: int
    body: str

    def json(self) -> Json:
        """The body as a mapping; empty when it is none."""
        return json_object(self.body)


def connect(scheme: str, address: str, port: int, timeout: float) -> http.client.HTTPConnection:
    """A connection to a service of this host, without proxies."""
    if scheme != "https":
        return http.client.HTTPConnection(address, port, timeout=timeout)
    # Asked over the loopback, where the certificate's name never fits.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(address, port, timeout=timeout, context=context)


def http_request(
    target: HealthTarget, path: str, *, body: Json | None = None, timeout: float = PROBE_TIMEOUT
) -> HttpAnswer | None:
    """One request to a service without proxies; None when nobody answers in HTTP within ``timeout`` seconds."""
    try:
        with contextlib.closing(connect(target.scheme, target.address, target.port, timeout)) as connection:
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return HttpAnswer(response.status, response.read(1_000_000).decode("utf-8", "replace"))
    # An address that is none, in a broken file of ours, is refused or cannot be encoded as a name.
    except (OSError, http.client.HTTPException, UnicodeError):
        return None


def ask_models(target: HealthTarget) -> list[str] | None:
    """Names of the models that the service offers; None when it does not speak that interface."""
    answer = http_request(target, "/v1/models", timeout=10)
    if answer is None or answer.status != 200:
        return None
    entries = answer.json().get("data")
    if not isinstance(entries, list):
        return None
    return [str(entry["id"]) for entry in entries if isinstance(entry, dict) and entry.get("id")]


def ask_version(target: HealthTarget) -> str | None:
    """Release of the NIM as it says itself."""
    answer = http_request(target, "/v1/version", timeout=10)
    if answer is None or answer.status != 200:
        return None
    release = answer.json().get("release") or answer.json().get("version")
    return str(release) if release else None


def ask_profile(target: HealthTarget) -> str | None:
    """The profile that NIM chose (later 1.x and 2.x)."""
    answer = http_request(target, "/v1/metadata", timeout=10)
    if answer is None or answer.status != 200:
        return None
    profile = answer.json().get("selectedModelProfileId")
    return str(profile) if profile else None


def ask_metrics(target: HealthTarget) -> str | None:
    """Where Prometheus can scrape the service: ``/v1/metrics``, in the first 1.x ``/metrics``; None without."""
    for path in ("/v1/metrics", "/metrics"):
        answer = http_request(target, path, timeout=10)
        if answer is not None and answer.status == 200 and re.search(r"^# (HELP|TYPE) ", answer.body, re.MULTILINE):
            return target.url + path
    return None


def error_text(answer: HttpAnswer | None) -> str:
    """What an error answer says, in one line."""
    if answer is None:
        return "no answer"
    body = answer.json()
    error = body.get("error")
    told = error.get("message") if isinstance(error, dict) else error or body.get("message") or body.get("detail")
    text = " ".join(str(told or answer.body).split())
    return "HTTP %d: %s" % (answer.status, text[:300])


def complete(target: HealthTarget, model: str, how: str) -> Json:
    """Send one short request to the model.

    Returns:
        ``kind`` (chat, completion, none), ``ok``, ``text``, ``seconds``, ``note``.
    """
    began = time.monotonic()

    def outcome(kind: str, ok: bool, text: str | None, note: str | None) -> Json:
        return {
            "kind": kind,
            "ok": ok,
            "text": text,
            "seconds": round(time.monotonic() - began, 3),
            "note": note,
        }

    if how == "none":
        return outcome("none", True, None, None)
    refused = ""
    if how in ("auto", "chat"):
        answer = http_request(
            target,
            "/v1/chat/completions",
            body={"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8},
            timeout=COMPLETION_TIMEOUT,
        )
        if answer is not None and answer.status == 200:
            return outcome("chat", True, _chat_text(answer), None)
        if answer is None or answer.status >= 500:
            return outcome("chat", False, None, error_text(answer))
        refused = error_text(answer)
        missing = answer.status in (404, 405)
    else:
        missing = False
    answer = http_request(
        target,
        "/v1/completions",
        body={"model": model, "prompt": "Hello", "max_tokens": 8},
        timeout=COMPLETION_TIMEOUT,
    )
    if answer is not None and answer.status == 200:
        note = None
        if refused:
            note = (
                NO_CHAT_TEMPLATE + "; it answers on /v1/completions"
                if "chat template" in refused.lower() or "chat_template" in refused.lower()
                else "it answers on /v1/completions; on /v1/chat/completions: %s" % refused
            )
        if how == "chat":
            return outcome("chat", False, None, note)
        return outcome("completion", True, _completion_text(answer), note)
    if how == "auto" and missing and answer is not None and answer.status in (404, 405):
        return outcome("none", True, None, "the model offers neither chat nor completions")
    if how == "chat":
        return outcome("chat", False, None, refused)
    return outcome("completion", False, None, error_text(answer))


def _first_choice(answer: HttpAnswer) -> Json:
    choices = answer.json().get("choices")
    first = choices[0] if isinstance(choices, list) and choices else {}
    return first if isinstance(first, dict) else {}


def _chat_text(answer: HttpAnswer) -> str:
    message = _first_choice(answer).get("message")
    return str((message or {}).get("content") or "")[:200] if isinstance(message, dict) else ""


def _completion_text(answer: HttpAnswer) -> str:
    return str(_first_choice(answer).get("text") or "")[:200]
