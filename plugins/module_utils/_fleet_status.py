# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The state of a fleet as rows and as a table, made on the controller out of one look at every host."""

from __future__ import annotations

import collections
import typing as t

from ._text_table import one_line, text_table

Row = t.Dict[str, t.Any]

#: Heading and key of the table's columns; the first ones are the same for all services of a host.
COLUMNS = (
    ("HOST", "host"),
    ("GPUS", "gpus"),
    ("DRIVER", "driver"),
    ("ENGINE", "engine"),
    ("TOOLKIT", "toolkit"),
    ("NIM", "nim"),
    ("IMAGE DIGEST", "digest"),
    ("STATE", "state"),
    ("READY AFTER", "seconds_to_ready"),
)
HOST_COLUMNS = ("host", "gpus", "driver", "engine", "toolkit")
#: Digits of a digest in the table; enough to tell images apart.
DIGEST_DIGITS = 12


def rows_of(
    host: str, look: t.Mapping[str, t.Any] | None, *, address: str = "", wanted: t.Sequence[str] = ()
) -> list[Row]:
    """One row a service of the host; a host without services, or one that could not be looked at, is one row.

    Args:
        look: What ``gpu_host_info`` returned, or Ansible's word that it failed or never ran.
        address: Where clients reach the host.
        wanted: Names of the models that the inventory wants to run there.
    """
    base: Row = {
        "host": host,
        "address": address or host,
        "gpus": "",
        "driver": "",
        "engine": "",
        "toolkit": "",
        "nim": "",
        "image": "",
        "digest": "",
        "state": "",
        "seconds_to_ready": None,
        "port": None,
        "url": "",
        "model_id": None,
        "message": None,
    }
    problem = _problem(look)
    if look is None or problem is not None:
        state, message = problem or ("not looked at", None)
        return [dict(base, state=state, message=message)]
    base["gpus"] = gpus_text(look)
    driver = look.get("driver") or {}
    base["driver"] = str(driver.get("loaded") or "")
    if not base["driver"] and driver.get("on_disk"):
        base["driver"] = "%s (not loaded)" % driver["on_disk"]
    docker = look.get("docker") or {}
    base["engine"] = str(docker.get("version") or ("not running" if docker.get("installed") else ""))
    base["toolkit"] = str((look.get("container_toolkit") or {}).get("version") or "")
    errors = look.get("errors") or {}
    base["message"] = "; ".join("%s: %s" % pair for pair in sorted(errors.items())) or None

    rows = []
    services = look.get("nim") or []
    for service in services:
        port = service.get("port")
        scheme = "https" if str(service.get("url") or "").startswith("https:") else "http"
        url_address = "[%s]" % base["address"] if ":" in base["address"] else base["address"]
        rows.append(
            dict(
                base,
                nim=str(service.get("name") or ""),
                image=str(service.get("image") or ""),
                digest=str(service.get("digest") or ""),
                state=str(service.get("state") or "unknown"),
                seconds_to_ready=service.get("seconds_to_ready"),
                port=port,
                url="%s://%s:%s" % (scheme, url_address, port) if port else "",
                model_id=service.get("model_id"),
                message=service.get("message") or base["message"],
            )
        )
    present = {row["nim"] for row in rows}
    rows += [dict(base, nim=name, state="not deployed") for name in wanted if name not in present]
    if rows:
        return rows
    return [dict(base, state="no GPU" if not look.get("pci_gpus") else "no NIM")]


def _problem(look: t.Mapping[str, t.Any] | None) -> tuple[str, str | None] | None:
    """State and message of a host that gave no answer."""
    if look is None:
        return None
    message = " ".join(str(look.get("msg") or "").split()) or None
    if look.get("unreachable"):
        return "unreachable", message
    if look.get("failed"):
        return "look failed", message
    return None


def gpus_text(look: t.Mapping[str, t.Any]) -> str:
    """``2 x NVIDIA H200``; from the PCI bus while no driver is loaded; ``none`` without a GPU."""
    names = [str(gpu.get("name") or "GPU") for gpu in look.get("gpus") or []]
    if not names:
        names = [("%s GPU" % (gpu.get("architecture") or "")).strip() for gpu in look.get("pci_gpus") or []]
    counted = collections.Counter(names)
    return ", ".join("%d x %s" % (counted[name], name) for name in sorted(counted)) or "none"


def render_table(rows: t.Sequence[Row]) -> str:
    """The rows as a table of plain text, with what went wrong below it."""
    lines = [[_cell(row, key) for _heading, key in COLUMNS] for row in rows]
    text = text_table([heading for heading, _key in COLUMNS], lines, group=len(HOST_COLUMNS))
    notes: list[str] = []
    for row in rows:
        if row.get("message"):
            name = "%s/%s" % (row["host"], row["nim"]) if row["nim"] else str(row["host"])
            note = "%s: %s" % (name, row["message"])
            if note not in notes:
                notes.append(note)
    return "\n".join(text + (["", *map(one_line, notes)] if notes else []))


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    if key == "seconds_to_ready":
        return "%d s" % round(float(value)) if value is not None else "-"
    if key == "digest":
        algorithm, _colon, digits = str(value or "").partition(":")
        return "%s:%s" % (algorithm, digits[:DIGEST_DIGITS]) if digits else "-"
    return str(value) if value not in (None, "") else "-"
