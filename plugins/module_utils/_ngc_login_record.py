# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Which logins of a host this collection has stored, so that nobody else's is taken away with them.

The file holds fingerprints that are made with a random key of the host, as a password could be guessed from a plain hash
of it. That key is in the file too, so it is for root alone and has no name by which a support bundle would take it along.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import typing as t
from dataclasses import dataclass, field

from ._host import Host
from ._image_record import STATE_DIRECTORY
from ._own_state import read_own_state, unreadable
from ._untrusted import MapOf

RECORD = STATE_DIRECTORY + "/logins"

_REMEDY = (
    "without it the logins that are stored now count as somebody else's, unless they have the key of the inventory, and "
    "'remove' leaves them"
)

#: User name and password at a registry.
Credentials = t.Tuple[str, str]


@dataclass
class LoginRecord:
    """The logins that were stored, as fingerprints by user of the host and registry.

    Attributes:
        key: The random key, in hex.
        logins: The last one that was stored comes first; a second is what it replaces, until it has done so.
    """

    key: str
    logins: t.Dict[str, t.List[str]] = field(default_factory=dict)

    def has(self, user: str, registry: str, credentials: t.Optional[Credentials]) -> bool:
        """Whether this is what was stored for a user of the host at a registry."""
        return credentials is not None and self._fingerprint(credentials) in self.logins.get(_name(user, registry), [])

    def add(self, user: str, registry: str, new: Credentials, before: t.Optional[Credentials]) -> None:
        """Note what is about to be stored; what is there counts until then, if it was ours."""
        kept = [self._fingerprint(before)] if before is not None and self.has(user, registry, before) else []
        self.logins[_name(user, registry)] = [self._fingerprint(new), *kept]

    def drop(self, user: str, registry: str) -> None:
        self.logins.pop(_name(user, registry), None)

    def _fingerprint(self, credentials: Credentials) -> str:
        text = json.dumps(credentials).encode("utf-8")
        return hmac.new(bytes.fromhex(self.key), text, hashlib.sha256).hexdigest()


def _name(user: str, registry: str) -> str:
    return "%s %s" % (user, registry)


def read_logins(host: Host) -> LoginRecord:
    """What is not known to be ours is somebody else's: a record that is missing is an empty one.

    Raises:
        FleetError: ``state_unreadable`` when the file is broken; it is left as it is.
    """
    found = read_own_state(host, RECORD, {"key": str, "logins": MapOf([str])}, _REMEDY)
    if found is None:
        return LoginRecord(secrets.token_hex(32))
    try:
        usable = len(bytes.fromhex(found["key"])) > 0
    except ValueError:
        usable = False
    if not usable:
        raise unreadable(RECORD, "key is no number in hex", _REMEDY)
    return LoginRecord(found["key"], {name: list(entries) for name, entries in found["logins"].items()})


def write_logins(host: Host, record: LoginRecord) -> None:
    """Write the record, or remove the file when there is nothing in it.

    Raises:
        FleetError: ``write_failed``.
    """
    if not record.logins:
        host.remove(RECORD)
        return
    if not host.exists(STATE_DIRECTORY):
        host.make_dir(STATE_DIRECTORY, mode=0o755)
    text = json.dumps({"version": 1, "key": record.key, "logins": record.logins}, indent=1, sort_keys=True) + "\n"
    host.write_file(RECORD, text, mode=0o600)
