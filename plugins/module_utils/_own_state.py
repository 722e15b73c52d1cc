# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Reading our own records: what somebody broke is reported, and left as it is."""

from __future__ import annotations

import typing as t

from ._errors import FleetError
from ._host import Host
from ._untrusted import Json, misfit, parse_json


def read_own_state(host: Host, path: str, shape: t.Any, remedy: str) -> t.Optional[Json]:
    """A record of ours; None when there is none.

    Args:
        shape: See :func:`._untrusted.misfit`; of a mapping every key must be there.
        remedy: What removing the file means, as a clause.

    Raises:
        FleetError: ``state_unreadable``.
    """
    raw = host.read_bytes(path)
    if raw is None:
        return None
    try:
        found = parse_json(raw)
    except ValueError as error:
        raise unreadable(path, "it is not JSON: %s" % error, remedy) from None
    wrong = "it has a null where a value belongs" if _has_null(found) else misfit(found, shape)
    if not wrong and isinstance(shape, dict):
        wrong = next(("%s is missing" % key for key in shape if found.get(key) is None), "")
    if wrong:
        raise unreadable(path, wrong, remedy)
    return t.cast(Json, found)


def _has_null(found: t.Any) -> bool:
    """Whether anything in it is null, which no record of ours holds."""
    inner = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return found is None or any(map(_has_null, inner))


def unreadable(path: str, wrong: str, remedy: str) -> FleetError:
    """``state_unreadable``."""
    return FleetError(
        "state_unreadable",
        "Reading %s failed: it is not what this collection writes (%s), so it was left as it is; repair or remove it: %s."
        % (path, wrong, remedy),
        path=path,
    )
