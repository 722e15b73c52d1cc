# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Services that should be ready and are not, as changes of a plan, with what a look can tell of the cause."""

from __future__ import annotations

import typing as t

from ._health_target import HealthTarget
from ._host import Host
from ._host_services import state_of
from ._nim_health import HealthCheck
from ._nim_process_state import ContainerReader, read_word
from ._nim_ready import asked_otherwise
from ._own_signatures import parse_signatures
from ._resource import Change


def unready(
    host: Host, api: ContainerReader, targets: t.Sequence[HealthTarget], signatures: t.Sequence[t.Any]
) -> list[Change]:
    """Those of the services that one full look does not find ready.

    Args:
        signatures: ``failure_signatures`` as they are given.

    Raises:
        FleetError: ``invalid_option``.
    """
    known = parse_signatures(signatures, option="failure_signatures")
    looked = HealthCheck(host, api, targets, known).run(None, interval=0, wait=False, record=False)
    changes = []
    for target, model in zip(targets, looked.models):
        if not model["ready"]:
            state = state_of(model, read_word(host, target.name).failures)
            why = str(model["message"] or "the run waits for it").rstrip(".")
            changes.append(Change("nim_health", target.unit, state, "ready", why))
        elif asked_otherwise(host, api, target):
            why = "it has not been asked for a completion of this kind yet"
            changes.append(Change("nim_health", target.unit, "ready", "completion: " + target.completion, why))
    return changes
