# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The NGC API key: its form, its fingerprint, and the file that carries it into a container."""

from __future__ import annotations

import hashlib
import re
import typing as t

from ._errors import FleetError

REGISTRY = "nvcr.io"
#: NGC takes every API key under this literal user name.
USERNAME = "$oauthtoken"
#: Variable that carries the key, on the controller and into the container.
KEY_VARIABLE = "NGC_API_KEY"
#: Keys as NGC makes them: today's, and those of before (base64 of 63 random characters).
_MADE_BY_NGC = re.compile(r"nvapi-[A-Za-z0-9_-]{16,}|[A-Za-z0-9+/]{84}")


def check_api_key(key: t.Any, option: str = "api_key") -> str:
    """Return a key that has the form of one; the message never repeats it.

    Raises:
        FleetError: ``invalid_option`` for what usually goes wrong between a web page, a file and a vault.
    """

    def bad(what: str, remedy: str) -> FleetError:
        return FleetError("invalid_option", "%s = (not shown): %s; %s." % (option, what, remedy))

    if not isinstance(key, str):
        raise bad("the key is no text", "put it in quotes")
    if not key:
        raise bad("the key is empty", "leave the variable out if no key is wanted")
    if "\n" in key or "\r" in key:
        raise bad("there is a line break in the key", "store it without one (printf %s instead of echo)")
    if key[0] in "\"'" or key[-1] in "\"'":
        raise bad("the key is in quotes", "remove the quotes that are part of the value")
    if re.search(r"\s", key):
        raise bad("there is white space in the key", "copy it again without what stands before and after it")
    if "{{" in key or key.startswith("$ANSIBLE_VAULT"):
        raise bad("the key is a template or a vault text that was not resolved", "check where the variable comes from")
    if key.startswith(USERNAME):
        raise bad("the key begins with the user name %s" % USERNAME, "give the key alone")
    if not re.fullmatch(r"[A-Za-z0-9_.~+/=-]+", key):
        raise bad("there are characters in the key that no NGC key has", "copy it again")
    if key == "nvapi-" or len(key) < 8:
        raise bad("the key is too short to be one", "copy it again")
    return key


def check_password(password: t.Any, option: str) -> str:
    """For registries that are not NGC: anything that fits into one line."""
    if not isinstance(password, str) or not password or re.search(r"[\x00-\x1f\x7f]", password):
        raise FleetError(
            "invalid_option",
            "%s = (not shown): the password is empty or has control characters in it; correct it." % option,
        )
    return password


def fingerprint(secret: str) -> str:
    """Stable short name of a secret: a rotation shows, the secret does not."""
    return "sha256:" + hashlib.sha256(secret.encode("utf-8")).hexdigest()[:12]


def printable(secret: str) -> t.Optional[str]:
    """What may be printed of a secret: the fingerprint of a key of NGC, which is long and random. None for anything else:
    a password that somebody thought up could be guessed from its fingerprint.
    """
    return fingerprint(secret) if _MADE_BY_NGC.fullmatch(secret) else None


def render_environment(key: str) -> str:
    """Content of an environment file (systemd, ``docker --env-file``) that carries the key."""
    return "%s=%s\n" % (KEY_VARIABLE, check_api_key(key))


def key_in_environment(text: t.Optional[str]) -> t.Optional[str]:
    """The key in such a file, or None."""
    for line in (text or "").splitlines():
        name, separator, value = line.strip().partition("=")
        if separator and name == KEY_VARIABLE and value:
            return value
    return None
