# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The short look at a service that is thought to be ready; where it is in doubt, :mod:`._nim_health` looks properly."""

from __future__ import annotations

import typing as t

from ._errors import FleetError
from ._health_target import HealthTarget
from ._host import Host
from ._nim_endpoints import ask_models, http_request
from ._nim_process_state import UNSTEADY_ENDS, ContainerReader, ContainerState, parse_container, read_word, wanted_spec
from ._untrusted import json_object

Json = t.Dict[str, t.Any]

#: Where measured start times and what came of the completions are kept; they are void after a reboot, as the containers'
#: start times are.
RECORD_DIRECTORY = "/run/gpu_fleet/health"


def record_path(target: HealthTarget) -> str:
    return "%s/%s.json" % (RECORD_DIRECTORY, target.name)


def read_record(host: Host, target: HealthTarget, container: ContainerState) -> Json:
    """What was found out about the running container when it had become ready; empty when nothing was."""
    try:
        found = json_object(host.read_text(record_path(target)))
    except FleetError:
        # A note of our own that can be taken again at any time.
        return {}
    if found.get("instance") != container.instance:
        return {}
    if target.completion and found.get("asked") != target.completion:
        found.pop("completion", None)
    return found


def certainly_ready(host: Host, api: ContainerReader, target: HealthTarget) -> bool:
    """Whether the full look would find a service ready; False says only that this one cannot tell.

    It serves, what runs is what is wanted, and it has been looked at properly since it was started: that was when who
    answers on the port was found out, and whether it completes.
    """
    try:
        container = parse_container(api.container(target.container))
    except FleetError:
        return False
    if container is None or not container.running:
        return False
    if container.spec and wanted_spec(host, target.name) not in ("", container.spec):
        return False
    if read_word(host, target.name).unsteady >= UNSTEADY_ENDS:
        return False
    known = read_record(host, target, container)
    completion = known.get("completion")
    completes = isinstance(completion, dict) and completion.get("ok")
    if not known or not (completes or target.completion == "none"):
        return False
    answer = http_request(target, "/v1/health/ready")
    if answer is None or answer.status != 200:
        return False
    if target.expected:
        models = ask_models(target)
        return models is None or set(target.expected) <= set(models)
    return True


def asked_otherwise(host: Host, api: ContainerReader, target: HealthTarget) -> bool:
    """Whether a service that was looked at properly was not asked for the kind of completion that is wanted now."""
    if target.completion in ("", "none"):
        return False
    try:
        container = parse_container(api.container(target.container))
    except FleetError:
        return False
    known = read_record(host, target, container) if container is not None else {}
    return bool(known) and known.get("asked") != target.completion
