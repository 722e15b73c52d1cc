# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What a gateway must know of a GPU host, out of its variables."""

from __future__ import annotations

import ipaddress
import typing as t

from ._image_reference import ImageReference
from ._nim_models import NimModel, parse_models


def served_names(model: NimModel) -> t.List[str]:
    """Names by which clients ask for a model: what the operator says, otherwise the name that NVIDIA gives it.

    NIM serves a model under the last two parts of its image's repository (docs.nvidia.com/nim: ``meta/llama-3.1-8b-instruct``
    of ``nvcr.io/nim/meta/llama-3.1-8b-instruct``) when nothing else is asked for.
    """
    given = model.served_model_name or model.custom_model_name
    if given:
        return [name for name in given.split(",") if name]
    return ["/".join(ImageReference.parse(model.image).repository.split("/")[-2:])]


def gateway_host(
    name: str, address: str, models: t.Any, names: t.Optional[t.Mapping[str, t.Any]] = None
) -> t.Optional[t.Dict[str, t.Any]]:
    """One entry of the option ``hosts`` of nim_gateway; None where the host has nothing for a gateway.

    Models that are not meant to run, and those that only the host itself can reach, are left out.

    Args:
        names: Name in ``nim_models`` -> names by which clients ask for it, in place of those found here.

    Raises:
        FleetError: ``invalid_option`` for models that are none.
    """
    found = []
    for model in parse_models(models):
        bound = ipaddress.ip_address(model.bind_address)
        if model.state != "started" or bound.is_loopback:
            continue
        served = (names or {}).get(model.name) or served_names(model)
        entry: t.Dict[str, t.Any] = {
            "name": model.name,
            "port": model.port,
            "served": [served] if isinstance(served, str) else list(served),
        }
        if not bound.is_unspecified:
            entry["address"] = str(bound)
        found.append(entry)
    return {"name": name, "address": address, "models": found} if found else None
