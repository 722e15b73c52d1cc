# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lets a test change the outside world: keys, entitlements, failures, slow transfers, outages.

Every change is one atomic write of a JSON file that the world reads at the next request.
"""

from __future__ import annotations

import calendar
import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

# Keys the sandbox knows from the start.  They open nothing outside it.
KEY_VALID = "nvapi-sandbox-valid-Zq3vT8mWc1RkYp5LxJ7uHs2D"
KEY_SECOND = "nvapi-sandbox-second-Bn6gK4tEa9QwUd0MfX1oVz8C"
KEY_EXPIRED = "nvapi-sandbox-expired-Hj2sL7yRb5TnGp3KcW9eMv4A"
KEY_WITHOUT_ENTITLEMENT = "nvapi-sandbox-noentitlement-Px8dF1uIo6ZqSa3R"
KEY_UNPAID = "nvapi-sandbox-unpaid-Wm5kN2cVe7JhYt9BgL0rQx4U"
KEY_SERVICE = "nvapi-sandbox-service-Ty4bH8nXf1OsKd6PzE3iGw7M"
KEY_LEGACY = "c2FuZGJveC1sZWdhY3kta2V5LTAxMjM0NTY3ODk6Zm9yLXRlc3Rz"

DEFAULT_KEYS: dict[str, dict[str, Any]] = {
    KEY_VALID: {"kind": "PERSONAL_KEY", "state": "valid"},
    KEY_SECOND: {"kind": "PERSONAL_KEY", "state": "valid"},
    KEY_EXPIRED: {"kind": "PERSONAL_KEY", "state": "expired"},
    KEY_WITHOUT_ENTITLEMENT: {"kind": "PERSONAL_KEY", "state": "valid", "entitlements": []},
    KEY_UNPAID: {"kind": "PERSONAL_KEY", "state": "valid", "refused": {"nim/*": 402}},
    KEY_SERVICE: {"kind": "SERVICE_KEY", "state": "valid"},
    KEY_LEGACY: {"kind": "LEGACY", "state": "valid"},
}


class World:
    """The controls of the world whose state lies below ``sandbox`` (the directory ``.sandbox``)."""

    def __init__(self, sandbox: str | os.PathLike[str]) -> None:
        self.state = os.path.join(os.fspath(sandbox), "world")
        self.directory = os.path.join(self.state, "control")
        os.makedirs(self.directory, exist_ok=True)

    # ---- files

    @contextlib.contextmanager
    def _change(self, name: str, empty: Any) -> Iterator[Any]:
        """Read, let the caller change, write atomically; one writer at a time."""
        path = os.path.join(self.directory, name + ".json")
        with open(os.path.join(self.directory, ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                with open(path, encoding="utf-8") as handle:
                    data = json.load(handle)
            except FileNotFoundError:
                data = empty
            yield data
            with tempfile.NamedTemporaryFile("w", dir=self.directory, delete=False, encoding="utf-8") as handle:
                json.dump(data, handle, indent=1)
            os.chmod(handle.name, 0o644)
            os.replace(handle.name, path)

    def write(self, name: str, data: Any) -> None:
        """Replace a whole control file."""
        with self._change(name, {}) as current:
            current.clear()
            current.update(data) if isinstance(data, dict) else current.extend(data)

    # ---- keys

    def set_key(
        self,
        key: str,
        state: str = "valid",
        *,
        kind: str = "PERSONAL_KEY",
        entitlements: list[str] | None = None,
        refused: dict[str, int] | None = None,
    ) -> None:
        """Make ``key`` valid, expired or revoked.

        ``entitlements``: patterns of the private repositories it may read (default: all); the others answer 403.
        ``refused``: pattern -> status (401, 402, 403, 451) for repositories that refuse this key with a status of their own.
        """
        entry: dict[str, Any] = {"kind": kind, "state": state}
        if entitlements is not None:
            entry["entitlements"] = entitlements
        if refused:
            entry["refused"] = refused
        with self._change("keys", {}) as keys:
            keys[key] = entry

    def remove_key(self, key: str) -> None:
        with self._change("keys", {}) as keys:
            keys.pop(key, None)

    # ---- repositories and models

    def set_repository(
        self, name: str, *, access: str = "", hidden_tags: list[str] | None = None, status: int | None = None
    ) -> None:
        """Change a repository: access public, private or absent; tags its list leaves out; one status for everybody."""
        with self._change("repositories", {}) as repositories:
            entry = repositories.setdefault(name, {})
            if access:
                entry["access"] = access
            if hidden_tags is not None:
                entry["hidden_tags"] = hidden_tags
            if status is not None:
                entry["status"] = status

    def set_model(self, name: str, **values: Any) -> None:
        """Change a model at api.ngc.nvidia.com ("nim/meta/llama-3_1-8b-instruct"): access, versions."""
        with self._change("models", {}) as models:
            models.setdefault(name, {}).update(values)

    # ---- failures

    def fail(
        self,
        status: int,
        *,
        host: str = "nvcr.io",
        where: str = "any",
        repository: str = "",
        path: str = "",
        times: int | None = None,
        after: int = 0,
        delay: float = 0,
        code: str = "",
        message: str = "",
        headers: dict[str, str] | None = None,
    ) -> str:
        """Answer matching requests with ``status`` (599: close the connection without an answer).  Returns the fault's id.

        ``where``: token, ping, manifests, blobs, tags (nvcr.io and the mirror); keys, files (api.ngc.nvidia.com); static
        (package repositories); any.  ``repository`` is a pattern, ``path`` a regular expression.  The first ``after``
        matching requests pass, the ``times`` after them fail (default: all).  ``delay``: seconds before the answer.
        """
        fault: dict[str, Any] = {
            "kind": "fail",
            "status": status,
            "host": host,
            "where": where,
            "repository": repository,
            "path": path,
            "times": times,
            "after": after,
            "delay": delay,
            "code": code,
            "message": message,
            "headers": headers or {},
        }
        return self._add(fault)

    def throttle(
        self, kilobytes_per_second: float, *, host: str = "nvcr.io", where: str = "blobs", repository: str = ""
    ) -> str:
        """Limit each connection's transfer.  Docker opens three at a time."""
        return self._add(
            {
                "kind": "throttle",
                "kilobytes_per_second": kilobytes_per_second,
                "host": host,
                "where": where,
                "repository": repository,
            }
        )

    def cut(
        self,
        after_bytes: int,
        *,
        host: str = "nvcr.io",
        where: str = "blobs",
        repository: str = "",
        path: str = "",
        times: int | None = None,
    ) -> str:
        """Break the connection of matching transfers after so many bytes.  A whole file smaller than that arrives whole."""
        fault: dict[str, Any] = {"kind": "cut", "bytes": after_bytes, "host": host, "where": where}
        return self._add({**fault, "repository": repository, "path": path, "times": times})

    def _add(self, fault: dict[str, Any]) -> str:
        fault["id"] = "%d-%d" % (time.time_ns(), os.getpid())
        with self._change("faults", []) as faults:
            faults.append(fault)
        return str(fault["id"])

    def mend(self, identifier: str) -> None:
        """Take one fault or throttle away."""
        with self._change("faults", []) as faults:
            faults[:] = [fault for fault in faults if fault["id"] != identifier]

    def down(self, host: str = "nvcr.io", how: str = "drop") -> None:
        """Take a whole host away: drop (connection closed without an answer), hang (no answer), or a status as text."""
        with self._change("down", {}) as hosts:
            hosts[host] = how

    def up(self, host: str = "") -> None:
        """Bring one host back, or all."""
        with self._change("down", {}) as hosts:
            if host:
                hosts.pop(host, None)
            else:
                hosts.clear()

    def set_token_lifetime(self, seconds: int) -> None:
        with self._change("settings", {}) as settings:
            settings["token_lifetime"] = seconds

    def reset(self) -> None:
        """Everything as it was when the sandbox came up (published images stay)."""
        for name, data in (
            ("keys", DEFAULT_KEYS),
            ("repositories", {}),
            ("models", {}),
            ("down", {}),
            ("settings", {}),
        ):
            self.write(name, data)
        with self._change("faults", []) as faults:
            faults.clear()

    # ---- what was asked of the world

    def requests(self, since: float = 0, **fields: Any) -> list[dict[str, Any]]:
        """Requests the front has answered since a time.time(), as dicts: host, method, uri, status, bytes, client, agent.

        ``fields`` filter by equality.  The log has whole seconds.
        """
        found = []
        with contextlib.suppress(FileNotFoundError), open(
            os.path.join(self.state, "log", "requests.jsonl"), encoding="utf-8"
        ) as log:
            for line in log:
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    stamp = entry["time"][:19]
                    # The container's clock is UTC.
                    if _timestamp(stamp) >= int(since) and all(
                        entry.get(name) == value for name, value in fields.items()
                    ):
                        found.append(entry)
        return found


def _timestamp(text: str) -> float:
    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
