# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Secrets are masked."""

from __future__ import annotations

import base64

from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import known_secrets, scrub
from fake_host import FakeHost


def test_scrub() -> None:
    host = FakeHost()
    key = "plainlegacykey12345"
    host.files["/etc/nim/ngc.env"] = ("NGC_API_KEY=%s\n" % key).encode()
    secrets = known_secrets(host, homes=False).values
    login = base64.b64encode(("$oauthtoken:" + key).encode()).decode()
    for text in (
        "x nvapi-AbCdEf_123-456 y",
        "Authorization: Bearer abcdefgh.ijkl",
        "HF_TOKEN=hf_abcdefghijkl",
        "{'NGC_API_KEY': 'secretvalue'}",
        '"ngc_api_key": "secretvalue"',
        key,
        login,
        "https://h/x?token=abcd1234&y=1",
    ):
        done = scrub(text, secrets)
        assert "***" in done, text
        for part in ("AbCdEf", "abcdefgh", "secretvalue", key, login, "abcd1234"):
            assert part not in done
    assert scrub("Loading model weights took 14 GB") == "Loading model weights took 14 GB"
