# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Which models come from NGC."""

from __future__ import annotations

from ._nim_models import NimModel

#: A model that comes from somewhere else than NGC, or must not be fetched at all, needs no download with the NGC key.
_FOREIGN_SOURCES = ("NIM_MODEL_NAME", "NIM_MODEL_PATH", "NIM_REPOSITORY_OVERRIDE")
_OFFLINE = ("NIM_DISABLE_MODEL_DOWNLOAD", "HF_HUB_OFFLINE")


def needs_download(model: NimModel) -> bool:
    """Whether files of the model may have to come from NGC."""
    if model.weights_directory:
        return False
    environment = {**model.environment, **model.secret_environment}
    if any(environment.get(name, "").lower() in ("1", "true", "yes", "on") for name in _OFFLINE):
        return False
    return not any(
        environment.get(name, "") and not environment[name].startswith("ngc://") for name in _FOREIGN_SOURCES
    )
