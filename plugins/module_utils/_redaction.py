# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Secrets that must not appear in what leaves a host."""

from __future__ import annotations

import base64
import re
import typing as t

from ._errors import FleetError
from ._host import Host

#: The file that holds the NGC key on the host; read only in order to mask it.
KEY_FILE = "/etc/nim/ngc.env"

_SECRETS = re.compile(
    r"nvapi-[\w-]{6,}"
    r"|\bhf_[A-Za-z0-9]{8,}"
    r"|(?i:(?<=bearer )|(?<=basic )|(?<=apikey ))[\w.+/=~-]{8,}"
    r"|(?i:(?:(?<=api_key=)|(?<=api-key=)|(?<=token=)|(?<=secret=)|(?<=password=)))[^\s,;&'\"]{4,}"
    r"|(?i:(?:(?<=api_key': ')|(?<=token': ')|(?<=api_key\": \")|(?<=token\": \")))[^'\"]{4,}"
)


def host_secrets(host: Host) -> list[str]:
    """Values that must not appear in a log line that leaves the host: the NGC key and what Docker makes of it."""
    try:
        content = host.read_text(KEY_FILE)
    except FleetError:
        return []
    values: list[str] = []
    for line in (content or "").splitlines():
        value = line.partition("=")[2].strip().strip("'\"")
        if len(value) >= 8:
            values += [value, base64.b64encode(("$oauthtoken:" + value).encode()).decode()]
    return values


def scrub(text: str, secrets: t.Iterable[str] = ()) -> str:
    """Mask known secrets, and whatever looks like one."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return _SECRETS.sub("***", text)
