# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""No secret leaves a host, however it was written down; what helps stays."""

from __future__ import annotations

import base64
import json
import time
import urllib.parse

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import (
    Redactor,
    docker_secrets,
    known_secrets,
    looks_secret,
)
from fake_host import FakeHost

#: Looks like nothing that a pattern knows, so only the known value can give it away.
KEY = 'Zm9vLWJhci+/quux"17%&äö-legacy-KEY-0815'


def written(secret: str) -> dict[str, str]:
    raw = secret.encode()
    return {
        "plain": secret,
        "base64": base64.b64encode(raw).decode(),
        "base64 of a login": base64.b64encode(b"$oauthtoken:" + raw).decode(),
        "base64 inside 1": base64.b64encode(b"x" + raw + b"yyyy").decode(),
        "base64 inside 2": base64.b64encode(b"xy" + raw + b"zzzzz").decode(),
        "base64 url": base64.urlsafe_b64encode(raw).decode(),
        "url": urllib.parse.quote(secret, safe=""),
        "form": urllib.parse.quote_plus(secret),
        "json": json.dumps({"a": secret}),
        "json utf-8": json.dumps({"a": secret}, ensure_ascii=False),
        "hex": raw.hex(),
        "reversed": secret[::-1],
        "in a url": "https://user:%s@proxy.example:3128/" % urllib.parse.quote(secret, safe=""),
    }


@pytest.mark.parametrize("form", sorted(written(KEY)))
def test_a_known_secret_in_every_form(form: str) -> None:
    done = Redactor([KEY]).text("before %s after" % written(KEY)[form])
    assert done.startswith("before ")
    assert done.endswith(" after") or form.startswith("json")
    around = ("base64 of a login", "in a url")
    for text in [text for name, text in written(KEY).items() if name not in around]:
        for start in range(0, len(text) - 16):
            assert text[start : start + 16] not in done or text[start : start + 16].isspace()


@pytest.mark.parametrize("cut", [15, 20, 27])
def test_a_part_of_a_known_secret(cut: int) -> None:
    """A column that is too narrow, a line that is wrapped."""
    redactor = Redactor([KEY])
    assert KEY[:cut] not in redactor.text("key %s…" % KEY[:cut])
    assert KEY[-cut:] not in redactor.text("…%s" % KEY[-cut:])
    wrapped = base64.encodebytes(KEY.encode() * 3).decode()
    done = redactor.text(wrapped)
    assert not [line for line in wrapped.splitlines() if len(line) > 20 and line in done]


@pytest.mark.parametrize(
    "text",
    [
        "x nvapi-AbCdEf_123-456 y",
        "HF_TOKEN=hf_AbCdEf123456",
        "authorization: Bearer AbCdEf123456",
        "> Authorization: Basic AbCdEf123456=",
        '{"Authorization": "Bearer AbCdEf123456"}',
        "curl -H 'apikey AbCdEf123456'",
        "postgres://user:AbCdEf123456@db/x",
        "http://AbCdEf123456@proxy:8080",
        "MY_SERVICE_PASSWORD=AbCdEf123456",
        "--api-key AbCdEf123456",
        "--token=AbCdEf123456",
        '"client_secret": "AbCdEf123456"',
        "{'aws_secret_access_key': 'AbCdEf123456'}",
        '"auth": "AbCdEf123456"',
        "password: AbCdEf123456",
        "token eyJhbGciOiJIUzI1.AbCdEf123456.AbCdEf123456",
        "-----BEGIN RSA PRIVATE KEY-----\nAbCdEf123456\nAbCdEf123456\n-----END RSA PRIVATE KEY-----",
        "ghp_AbCdEf123456AbCdEf123456",
        "glpat-AbCdEf123456AbCdEf",
        "sk-AbCdEf123456AbCdEf123456",
        "sk-proj-AbCdEf123456AbCdEf123456",
        "sk-ant-api03-AbCdEf123456AbCd_Ef123456-AbCdEf123456",
    ],
)
def test_what_looks_like_a_secret(text: str) -> None:
    redactor = Redactor([])
    done = redactor.text(text)
    assert "AbCdEf" not in done
    assert "***" in done
    assert redactor.count


@pytest.mark.parametrize(
    "text",
    [
        "Loading model weights took 14.9 GB",
        "max_num_batched_tokens=8192, tokenizer='meta/llama'",
        "nim-llama.service: Main process exited, code=exited, status=1/FAILURE",
        "GPU 0: NVIDIA H200 (UUID: GPU-5a4d9e64-0c2f-4b4a-9d5e-1f2a3b4c5d6e)",
        "sha256:" + "ab" * 32,
        "KeyError: 'weights'",
        "NVRM: Xid (PCI:0000:01:00): 79, pid=1, GPU has fallen off the bus.",
        "http://127.0.0.1:8000/v1/health/ready",
        "See 'journalctl -u nim-skyfall-36b-v2.service'; /var/lib/nim/cache/skyfall-36b-v2",
        "unrecognized arguments: --hf-config-path /x --skip-mm-profiling --skip-tokenizer-init",
        "ASIA-PACIFIC-GPU-01, hf-transfer 0.1.9, sk-learn-pipeline",
    ],
)
def test_what_helps_stays(text: str) -> None:
    assert Redactor([KEY]).text(text) == text


def test_environment_of_a_container() -> None:
    given = [
        "NIM_SERVED_MODEL_NAME=llama",
        "NIM_CACHE_PATH=/opt/nim/.cache",
        "NVIDIA_VISIBLE_DEVICES=GPU-5a4d9e64-0c2f-4b4a-9d5e-1f2a3b4c5d6e",
        "NGC_API_KEY=short",
        "MY_PASSWORD=x",
        "REGISTRY_AUTH=abc",
        "STRANGE=Xk29fjW0qLm42nPz",
        "STRANGE_PATH=/usr/local/lib/python3.12/site-packages",
        "VERSION=1.8.4-rc1",
        "EMPTY_TOKEN=",
        "NIM_X=nvapi-AbCdEf123456",
        "PATH=/usr/bin:/bin",
    ]
    assert Redactor([]).environment(given) == [
        *given[:3],
        "NGC_API_KEY=***",
        "MY_PASSWORD=***",
        "REGISTRY_AUTH=***",
        "STRANGE=***",
        given[7],
        given[8],
        "EMPTY_TOKEN=",
        "NIM_X=***",
        given[11],
    ]


@pytest.mark.parametrize(
    ("value", "secret"),
    [
        ("Xk29fjW0qLm42nPz", True),
        ("0123456789abcdef0123456789abcdef", True),
        ("meta/llama-3.1-8b-instruct", False),
        ("GPU-5a4d9e64-0c2f-4b4a-9d5e-1f2a3b4c5d6e", False),
        ("sha256:" + "ab" * 32, False),
        ("/opt/nim/0a1b2c3d4e5f6g7h8i9j", False),
        ("580.95.05-0ubuntu1", False),
        ("two words Xk29fjW0qLm42nPz", False),
        ("disabled-by-default", False),
    ],
)
def test_looks_secret(value: str, secret: bool) -> None:
    assert looks_secret(value) is secret


def test_structures() -> None:
    found = Redactor([KEY]).structure(
        {
            "Args": ["serve", "--api-key", "abcdefgh", "--port", "8000", KEY],
            "Config": {"Env": ["NGC_API_KEY=abc", "A=b"]},
            "password": "x",
            "key_fingerprint": "sha256:0123456789ab",
            "max_tokens": 8,
            KEY: 1,
        }
    )
    assert found == {
        "Args": ["serve", "--api-key", "***", "--port", "8000", "***"],
        "Config": {"Env": ["NGC_API_KEY=***", "A=b"]},
        "password": "***",
        "key_fingerprint": "sha256:0123456789ab",
        "max_tokens": 8,
        "***": 1,
    }


def test_known_secrets_of_a_host() -> None:
    host = FakeHost()
    login = base64.b64encode(b"robot:other-registry-pw").decode()
    host.files.update(
        {
            "/etc/nim/ngc.env": b"NGC_API_KEY=the-ngc-key\n",
            "/etc/nim/llama.env": b"# key 0123\nDB_PASS=pass=word word\n",
            "/etc/passwd": b"root:x:0:0:root:/root:/bin/bash\nops:x:1000:1000::/home/ops:/bin/sh\n",
            "/home/ops/.docker/config.json": json.dumps(
                {"auths": {"registry.example": {"auth": login}, "x": {"identitytoken": "identity-1"}, "y": 7}}
            ).encode(),
            "/root/.docker/config.json": b"{broken",
            "/etc/docker/daemon.json": b'{"proxies": {"http-proxy": "http://ops:pr%40xy@proxy:3128"}}',
            "/etc/systemd/system/docker.service.d/proxy.conf": b"Environment=HTTPS_PROXY=http://a:bcdef@p:1\n",
        }
    )
    known = known_secrets(host)
    found = known.values
    assert sorted(known.names) == ["DB_PASS", "NGC_API_KEY"]
    for secret in ("the-ngc-key", "pass=word word", "other-registry-pw", login, "identity-1", "ops:pr@xy", "a:bcdef"):
        assert secret in found
    assert not any("0123" in secret for secret in found)
    assert docker_secrets(None) == docker_secrets("[]") == docker_secrets('{"auths": []}') == []


def test_what_users_put_into_their_homes_keeps_nobody_from_a_diagnosis() -> None:
    host = FakeHost()
    host.files["/etc/passwd"] = b"a:x:1:1::/home/a:/bin/sh\nb:x:2:2::/home/b:/bin/sh\n"
    host.files["/home/a/.docker/config.json"] = json.dumps({"auths": {"x": {"password": "p" * 2**20}}}).encode()
    host.files["/home/b/.docker/config.json"] = json.dumps({"auths": {"x": {"password": "hunter22"}}}).encode()
    assert known_secrets(host).values == ("hunter22",)


def test_a_short_value_does_not_mask_words() -> None:
    assert Redactor(["on", "true", "$oauthtoken"]).text("on is true for $oauthtoken") == "on is true for $oauthtoken"


def test_megabytes_take_seconds() -> None:
    lines = "2026-11-20T21:00:00 INFO engine.py:12 step %d took 0.01 s, throughput 1200.5 tokens/s, id " + "ab12" * 16
    text = "\n".join(lines % number for number in range(4000))
    # What makes expressions slow: long runs of one kind, with and without borders in them.
    for piece in ("x", "x.", "-a", "a=", "key", "://", "@a", " ", "'", "a:b"):
        text += "\n" + "\n".join([(piece * 8000)[:8000]] * 10)
    began = time.process_time()
    Redactor([KEY, "another-secret-value", "third-secret-0123456789"]).text(text)
    assert time.process_time() - began < 10
