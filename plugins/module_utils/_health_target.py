# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What is waited for: the services of ``nim_models`` that are meant to run, and where they are asked."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._nim_paths import container_name, download_name, unit_name

COMPLETIONS = ("auto", "chat", "completion", "none")


@dataclass(frozen=True)
class HealthTarget:
    """One service to wait for.

    Attributes:
        name: Name of the model in ``nim_models``; unit ``nim-<name>.service``, container ``nim-<name>``.
        address: Address on which the host itself reaches the published port.
        start_timeout: Seconds from the beginning of the wait.
        expected: Names that ``/v1/models`` must list; empty when NIM derives the name itself.
        completion: One of ``COMPLETIONS``; empty for a mere look, which takes what was asked last, whatever it was.
        cache_directory: Where the model is downloaded to; its growth is shown as progress.
    """

    name: str
    address: str = "127.0.0.1"
    port: int = 8000
    scheme: str = "http"
    start_timeout: float = 1800.0
    expected: tuple[str, ...] = ()
    completion: str = "auto"
    cache_directory: str = ""

    @property
    def unit(self) -> str:
        return unit_name(self.name)

    @property
    def container(self) -> str:
        return container_name(self.name)

    @property
    def downloader(self) -> str:
        """The container that fetches the model before the service's own is created."""
        return download_name(self.name)

    @property
    def url(self) -> str:
        address = "[%s]" % self.address if ":" in self.address else self.address
        return "%s://%s:%d" % (self.scheme, address, self.port)


def parse_targets(models: t.Sequence[t.Any]) -> list[HealthTarget]:
    """Entries of ``nim_models`` (or mappings with at least ``name``) that are meant to run; other keys are ignored.

    Raises:
        FleetError: ``invalid_option``.
    """
    targets: list[HealthTarget] = []
    for index, entry in enumerate(models):
        where = "models[%d]" % index
        if not isinstance(entry, dict):
            raise _invalid(where, entry, "is no mapping", "give name, and port where it is not 8000")
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", name):
            raise _invalid("%s.name" % where, name, "is no name of a model", "use letters, digits, '.', '_' and '-'")
        if any(target.name == name for target in targets):
            raise _invalid("%s.name" % where, name, "is there twice", "give every model its own name")
        if entry.get("state", "started") != "started":
            continue
        completion = entry.get("completion") or "auto"
        if completion not in COMPLETIONS:
            raise _invalid("%s.completion" % where, completion, "is unknown", "use %s" % ", ".join(COMPLETIONS))
        environment = entry.get("environment") or {}
        tls = isinstance(environment, dict) and str(environment.get("NIM_SSL_MODE", "")).lower() == "tls"
        expected = entry.get("served_model_name") or entry.get("custom_model_name") or ""
        targets.append(
            HealthTarget(
                name=name,
                address=_reachable_address(str(entry.get("bind_address") or "0.0.0.0")),  # noqa: S104  # read, not bound
                port=_number(entry.get("port", 8000), "%s.port" % where, 1, 65535),
                scheme="https" if tls else "http",
                start_timeout=float(
                    _number(entry.get("start_timeout", 1800), "%s.start_timeout" % where, 1, 7 * 24 * 3600)
                ),
                expected=tuple(part.strip() for part in str(expected).split(",") if part.strip()),
                completion=completion,
                cache_directory=str(entry.get("cache_directory") or "/var/lib/nim/cache/%s" % name),
            )
        )
    return targets


def _invalid(option: str, value: t.Any, wrong: str, remedy: str) -> FleetError:
    return FleetError("invalid_option", "%s = %r: %s; %s." % (option, value, wrong, remedy))


def _number(value: t.Any, option: str, least: int, most: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if isinstance(value, bool) or not least <= number <= most:
        raise _invalid(option, value, "is no whole number from %d to %d" % (least, most), "correct it")
    return number


def _reachable_address(bind_address: str) -> str:
    bind_address = bind_address.strip("[]")
    if bind_address == "0.0.0.0":  # noqa: S104  # compared, not bound
        return "127.0.0.1"
    return "::1" if bind_address == "::" else bind_address
