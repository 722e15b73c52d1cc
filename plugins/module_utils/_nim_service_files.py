# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Directories, files, units and secrets of the NIM services: what of them has to be written anew."""

from __future__ import annotations

import json
import os
import typing as t

from ._errors import FleetError
from ._ngc_key import fingerprint, printable
from ._nim_configuration import SLICE_TEXT, TARGET_TEXT, Secrets, unit_text, wrapper_text
from ._nim_models import NimModel
from ._nim_paths import (
    BASE_DIRECTORY,
    CONFIGURATION_DIRECTORY,
    KEY_FILE,
    STATE_DIRECTORY,
    UNIT_DIRECTORY,
    WRAPPER,
    configuration_path,
    secret_path,
)
from ._nim_service_state import RESOURCE, HostState
from ._resource import Change, Disruption, FileDiff

Json = t.Dict[str, t.Any]


def directory_changes(models: t.Sequence[NimModel], state: HostState) -> list[Change]:
    """Directories that are not there or not in the right hands.

    Raises:
        FleetError: ``not_a_directory``.
    """
    wanted: dict[str, tuple[int, int, int, str]] = {}
    for path in (BASE_DIRECTORY, STATE_DIRECTORY, CONFIGURATION_DIRECTORY, os.path.dirname(WRAPPER)):
        wanted[path] = (0, 0, 0o755, "holds what all services share")
    for model in models:
        if model.state != "absent":
            wanted[model.cache_directory] = (model.uid, model.gid, 0o750, "model cache of %s" % model.name)
    changes = []
    if not any(model.state != "absent" for model in models):
        return []
    for path, (uid, gid, fresh, why) in wanted.items():
        found = state.paths.get(path)
        foreign = state.foreign_files.get(path, False)
        right = found is not None and found.uid == uid and found.mode & 0o700 == 0o700 and not found.mode & 0o002
        if right and not foreign:
            continue
        if found is not None and not found.is_dir:
            raise FleetError(
                "not_a_directory", "%s is needed as a directory and is a file; move it away." % path, path=path
            )
        # Keep what the operator lets the group and others read; nobody else may write.
        mode = fresh if found is None or uid == 0 else (found.mode & 0o055) | 0o700
        changes.append(
            Change(
                RESOURCE,
                "directory " + path,
                None if found is None else _owner(found.mode, found.uid, found.gid) + " with others' files" * foreign,
                _owner(mode, uid, gid),
                why,
                Disruption.NONE,
                "directory",
                {"path": path, "mode": mode, "uid": uid, "gid": gid, "files": foreign},
            )
        )
    return changes


def shared_file_changes(models: t.Sequence[NimModel], state: HostState) -> list[Change]:
    """The files that all services share."""
    if not any(model.state != "absent" for model in models):
        return []
    changes = []
    for path, text, mode, why in (
        (WRAPPER, wrapper_text(), 0o755, "runs the containers for systemd"),
        (UNIT_DIRECTORY + "/nim.target", TARGET_TEXT, 0o644, "starts and stops all services together"),
        (UNIT_DIRECTORY + "/nim.slice", SLICE_TEXT, 0o644, "holds the containers' processes"),
    ):
        changes += _file_change(state, path, state.files.get(path), text, mode, why)
    return changes


def service_file_changes(
    model: NimModel, configuration: Json, secrets: Secrets, injection: str, state: HostState
) -> list[Change]:
    """The files of one service."""
    service = state.service(model.name)
    changes = _file_change(
        state,
        configuration_path(model.name),
        service.configuration_text,
        json.dumps(configuration, indent=2, sort_keys=True) + "\n",
        0o644,
        "what the container of %s is given" % model.name,
    )
    changes += _secret_changes(model, secrets, state)
    if not service.masked:
        changes += _file_change(
            state,
            "%s/%s" % (UNIT_DIRECTORY, model.unit),
            service.unit_text,
            unit_text(model, injection),
            0o644,
            "unit of %s" % model.name,
        )
    return changes


def _secret_changes(model: NimModel, wanted: Secrets, state: HostState) -> list[Change]:
    service = state.service(model.name)
    path = secret_path(model.name)
    there = Secrets.parse(service.secret_text)
    before = None if service.secret_text is None else (str(there) if there else "other content")
    if not model.secret_environment:
        if before is None:
            return []
        why = "%s has no secret variables" % model.name
        return [Change(RESOURCE, path, before, None, why, Disruption.NONE, "secrets_absent", {"path": path})]
    text = wanted.render()
    if service.secret_text == text and service.secret_safe:
        return []
    why = "secret variables of %s" % model.name
    if service.secret_text == text:
        why = "the file could be read by others than root"
    data = {"path": path, "text": text}
    # Fingerprints with a new key would be others in every look.
    after = str(wanted) if there else ", ".join(sorted(wanted.values))
    return [Change(RESOURCE, path, before, after, why, Disruption.NONE, "secrets", data)]


def _file_change(state: HostState, path: str, before: str | None, after: str, mode: int, why: str) -> list[Change]:
    shown: tuple[str | None, str] = (None if before is None else "other content", "as wanted")
    if before == after:
        found = state.paths.get(path)
        # Who may write a unit or the wrapper is root; how many may read it is the operator's affair.
        if found is None or (found.uid == 0 and not found.mode & 0o022 and found.mode & mode & 0o500 == mode & 0o500):
            return []
        shown = (_owner(found.mode, found.uid, found.gid), _owner(mode, 0, 0))
        why = "only root may write it" if found.uid or found.mode & 0o022 else why
    return [
        Change(
            RESOURCE,
            path,
            *shown,
            why,
            Disruption.NONE,
            "file",
            {"path": path, "text": after, "mode": mode},
            FileDiff(path, before or "", after),
        )
    ]


def new_key(key: str | None, state: HostState) -> bool:
    """Whether a key is to be stored that is not there."""
    return key is not None and fingerprint(key) != state.key_fingerprint


def key_changes(key: str | None, key_state: str, state: HostState) -> list[Change]:
    """The file with the NGC key."""
    before = (state.key_printable or "a key") if state.key_fingerprint is not None else None
    if key_state == "absent":
        if before is None:
            return []
        return [Change(RESOURCE, KEY_FILE, before, None, "no key is wanted here", Disruption.NONE, "key_absent")]
    if key is None or (not new_key(key, state) and state.key_safe):
        return []
    why = "the key changed; services that run keep running" if before else "the key is needed while files are fetched"
    if not new_key(key, state):
        why = "the file could be read by others than root"
    after = printable(key) or "the key that is given"
    return [Change(RESOURCE, KEY_FILE, before, after, why, Disruption.NONE, "key")]


def reload_changes(
    models: t.Sequence[NimModel], changes: t.Sequence[Change], state: HostState, *, removing: bool = False
) -> list[Change]:
    """A daemon-reload where units changed.

    Args:
        changes: All that come before it.
        removing: Whether all services are being removed, so that stale units do not matter.
    """
    written = any(
        change.action in ("remove", "remove_target", "enable", "disable")
        or (change.action == "file" and str(change.data["path"]).startswith(UNIT_DIRECTORY + "/"))
        for change in changes
    )
    stale = (state.target_need_reload and not removing) or any(
        state.service(model.name).need_reload for model in models if model.state != "absent"
    )
    if not written and not stale:
        return []
    why = "units changed"
    if state.endangered:
        why += "; containers that may lose their GPUs by it: " + ", ".join(state.endangered)
    return [
        Change(
            RESOURCE,
            "systemd",
            "old units loaded",
            "daemon-reload",
            why,
            Disruption.RELOAD,
            "daemon_reload",
            {"endangered": state.endangered},
        )
    ]


def enablement_changes(models: t.Sequence[NimModel], state: HostState) -> list[Change]:
    """What is started at boot, and what no longer."""
    enable, disable = [], []
    for model in models:
        service = state.service(model.name)
        if model.state == "started" and service.enabled != "enabled":
            enable.append(model.unit)
        if model.state == "stopped" and service.enabled == "enabled":
            disable.append(model.unit)
    if any(model.state != "absent" for model in models) and not state.target_enabled:
        enable.insert(0, "nim.target")
    changes = []
    for verb, units in (("enable", enable), ("disable", disable)):
        for unit in units:
            before, after = ("disabled", "enabled") if verb == "enable" else ("enabled", "disabled")
            changes.append(
                Change(
                    RESOURCE,
                    unit,
                    before,
                    after,
                    "started at boot" if verb == "enable" else "not started at boot",
                    Disruption.NONE,
                    verb,
                    {"units": units},
                )
            )
    return changes


def _owner(mode: int, uid: int, gid: int) -> str:
    return "%04o owner %d:%d" % (mode, uid, gid)
