# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Reading our own records: what somebody broke is reported, and left as it is."""

from __future__ import annotations

import typing as t

from ._errors import FleetError
from ._host import Host
from ._untrusted import Json, MapOf, misfit, parse_json


def read_own_state(host: Host, path: str, shape: t.Any, remedy: str, *, partial: bool = False) -> t.Optional[Json]:
    """A record of ours; None when there is none.

    Args:
        shape: See :func:`._untrusted.misfit`.
        remedy: What removing the file means, as a clause.
        partial: Whether keys may be missing, or be null.

    Raises:
        FleetError: ``state_unreadable``.
    """
    raw = host.read_bytes(path)
    if raw is None:
        return None
    try:
        found = parse_json(raw.decode("utf-8"))
    except ValueError as error:
        raise unreadable(path, "it is not JSON: %s" % error, remedy) from None
    wrong = "it is null" if found is None else misfit(found, shape)
    if not partial:
        wrong = wrong or ("it has a null where a value belongs" if _has_null(found) else _missing(found, shape))
    if wrong:
        raise unreadable(path, wrong, remedy)
    return t.cast(Json, found)


def _missing(found: t.Any, shape: t.Any) -> str:
    """The first key of the shape that is not there, in words; empty when all are."""
    if isinstance(shape, MapOf):
        return next(filter(None, (_missing(one, shape.shape) for one in found.values())), "")
    if isinstance(shape, dict):
        absent = ("%s is missing" % key for key in shape if key not in found)
        inner = (_missing(found[key], below) for key, below in shape.items() if key in found)
        return next(filter(None, (*absent, *inner)), "")
    return ""


def _has_null(found: t.Any) -> bool:
    """Whether anything in it is null. Without recursion: it may be nested as deeply as JSON can be read."""
    left = [found]
    while left:
        one = left.pop()
        if one is None:
            return True
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return False


def unreadable(path: str, wrong: str, remedy: str) -> FleetError:
    """``state_unreadable``."""
    return FleetError(
        "state_unreadable",
        "Reading %s failed: it is not what this collection writes (%s), so it was left as it is; repair or remove it: %s."
        % (path, wrong, remedy),
        path=path,
    )
