# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The logins in a user's Docker configuration.

File format: docker/cli ``cli/config/configfile``; an entry is base64 of ``user:password`` under ``auths``, or an identity
token (an OAuth 2 refresh token) in place of a password.
"""

from __future__ import annotations

import base64
import binascii
import typing as t
from dataclasses import dataclass, field

from ._errors import FleetError
from ._host import FileStat, Host
from ._image_reference import DOCKER_HUB
from ._untrusted import is_digits, json_object, parse_json

#: What Docker and its credential helpers call the user of an identity token, here as there.
TOKEN_USER = "<token>"  # noqa: S105  # no secret


def login_address(registry: str) -> str:
    """Name of a registry among the logins: its host, but for Docker Hub its first address, as Docker itself has it."""
    return "https://index.docker.io/v1/" if registry == DOCKER_HUB else registry


def decode_basic(encoded: str) -> t.Optional[t.Tuple[str, str]]:
    """User and password of base64 ``user:password``, or None when it is no such thing."""
    try:
        text = base64.b64decode(encoded, validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    user, colon, password = text.partition(":")
    # Docker pads the password with NUL when it reads an old file.
    return (user, password.rstrip("\0")) if colon else None


def encode_basic(user: str, password: str) -> str:
    return base64.b64encode(("%s:%s" % (user, password)).encode("utf-8")).decode("ascii")


@dataclass(frozen=True)
class Account:
    """A user of the host."""

    name: str
    uid: int
    gid: int
    home: str


def find_account(host: Host, user: str, option: str = "docker_user") -> Account:
    """Look a user up in /etc/passwd, and where that has none, wherever the host's name service looks.

    Raises:
        FleetError: ``no_such_user``.
    """
    for line in (host.read_text("/etc/passwd") or "").splitlines():
        if line.startswith(user + ":"):
            break
    else:
        line = host.run(["getent", "passwd", user]).stdout.strip()
    fields = line.split(":")
    if len(fields) < 7 or not is_digits(fields[2]) or not is_digits(fields[3]) or not fields[5].startswith("/"):
        raise FleetError(
            "no_such_user",
            "%s = %r: this host has no such user with a home directory; create it first or name another."
            % (option, user),
            user=user,
        )
    return Account(user, int(fields[2]), int(fields[3]), fields[5])


@dataclass(frozen=True)
class DockerConfig:
    """A user's Docker configuration.

    Attributes:
        content: The parsed file; an empty dictionary when there is none.
        helper: Name of the credential helper that Docker would use for the registry, or empty.
        helper_key: Where it is configured: ``credsStore`` or ``credHelpers``.
        ours: Entries that this collection has stored; known only to who has asked for it.
        record_damage: Why our record of them cannot be read, as a sentence; known likewise.
    """

    account: Account
    path: str
    content: t.Dict[str, t.Any] = field(repr=False)
    file: t.Optional[FileStat]
    directory: t.Optional[FileStat]
    helper: str = ""
    helper_key: str = ""
    helper_credentials: t.Optional[t.Tuple[str, str]] = field(default=None, repr=False)
    ours: t.Tuple[str, ...] = ()
    record_damage: str = ""

    def credentials(self, registry: str) -> t.Optional[t.Tuple[str, str]]:
        """User and password that Docker would use for a registry, or None."""
        return self.helper_credentials if self.helper else self.entry(registry)

    def entry(self, name: str) -> t.Optional[t.Tuple[str, str]]:
        """User and password of an entry of the file itself, or None; an identity token is the password of :data:`TOKEN_USER`."""
        entry = (self.content.get("auths") or {}).get(name)
        if not isinstance(entry, dict):
            return None
        if isinstance(entry.get("identitytoken"), str) and entry["identitytoken"]:
            # Docker takes it before a password, which is empty beside it.
            return TOKEN_USER, entry["identitytoken"]
        if isinstance(entry.get("auth"), str) and entry["auth"]:
            return decode_basic(entry["auth"])
        if entry.get("username") and entry.get("password"):
            return str(entry["username"]), str(entry["password"])
        return None


def read_docker_config(host: Host, account: Account, registry: str) -> DockerConfig:
    """Read a user's Docker configuration.

    Raises:
        FleetError: ``docker_config_unreadable`` when it is no JSON of the form that Docker writes; it is left as it is.
    """
    directory = account.home.rstrip("/") + "/.docker"
    path = directory + "/config.json"
    content: t.Any = {}
    raw = host.read_text(path)
    if raw is not None and raw.strip():
        try:
            content = parse_json(raw)
        except ValueError as error:
            # The parser's own message quotes no content.
            raise _unreadable(path, "it is not JSON (%s)" % error) from None
    if not isinstance(content, dict):
        raise _unreadable(path, "it is not a JSON object")
    for key in ("auths", "credHelpers"):
        if content.get(key) is not None and not isinstance(content[key], dict):
            raise _unreadable(path, "%r in it is not an object" % key)
    if content.get("credsStore") is not None and not isinstance(content["credsStore"], str):
        raise _unreadable(path, "'credsStore' in it is not a text")
    helper, helper_key = str((content.get("credHelpers") or {}).get(registry) or ""), "credHelpers"
    if not helper:
        helper, helper_key = str(content.get("credsStore") or ""), "credsStore"
    return DockerConfig(
        account,
        path,
        content,
        host.stat(path),
        host.stat(directory),
        helper,
        helper_key if helper else "",
        _ask_helper(host, helper, registry) if helper else None,
    )


def _ask_helper(host: Host, helper: str, registry: str) -> t.Optional[t.Tuple[str, str]]:
    """What a credential helper has for a registry (docker/docker-credential-helpers, verb ``get``)."""
    answer = host.run(["docker-credential-" + helper, "get"], stdin=registry, timeout=20)
    found = json_object(answer.stdout) if answer.ok else {}
    if found.get("Secret"):
        return str(found.get("Username") or ""), str(found["Secret"])
    return None


def _unreadable(path: str, what: str) -> FleetError:
    return FleetError(
        "docker_config_unreadable",
        "Reading %s failed: %s; repair it or move it away, it is left as it is." % (path, what),
        path=path,
    )


def stored_credentials(host: Host, registry: str, user: str = "root") -> t.Optional[t.Tuple[str, str]]:
    """User and password that Docker on this host would use for a registry when this user calls it, or None.

    An identity token is the password of :data:`TOKEN_USER`.

    Raises:
        FleetError: ``no_such_user``, ``docker_config_unreadable``.
    """
    account = find_account(host, user)
    for name in dict.fromkeys((login_address(registry), registry)):
        found = read_docker_config(host, account, name).credentials(name)
        if found is not None:
            return found
    return None
