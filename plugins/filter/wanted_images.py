# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filter of the role that runs models."""

from __future__ import annotations

import typing as t

from ansible.errors import AnsibleFilterError
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _wanted_images
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError


def wanted_images(models: t.Any) -> list[dict[str, t.Any]]:
    """Images that the models of a host need, for gpu_fleet.nim.nim_image."""
    try:
        return _wanted_images.wanted_images(models)
    except FleetError as error:
        raise AnsibleFilterError(error.message) from error


class FilterModule:
    """Filters that this file offers."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"wanted_images": wanted_images}
