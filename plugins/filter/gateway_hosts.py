# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filter of the role that makes a gateway."""

from __future__ import annotations

import typing as t

from ansible.errors import AnsibleFilterError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_hosts import gateway_host
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._models import without_secrets
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._plain import resolved


def gateway_hosts(
    hosts: t.Sequence[str],
    hostvars: t.Mapping[str, t.Mapping[str, t.Any]],
    names: t.Mapping[str, t.Any] | None = None,
) -> list[dict[str, t.Any]]:
    """GPU hosts with what they serve, for gpu_fleet.nim.nim_gateway."""
    found = []
    for host in hosts:
        variables = hostvars[host]
        address = variables.get("nim_gateway_address") or variables.get("ansible_host") or host
        # Not resolved: a key that the models share need not be known where the gateway is made.
        models = [
            {key: model[key] for key in model if key != "secret_environment"} if hasattr(model, "keys") else model
            for model in variables.get("nim_models") or []
        ]
        try:
            entry = gateway_host(
                str(host), str(address), without_secrets(resolved(models)), resolved(names) if names else None
            )
        except FleetError as error:
            raise AnsibleFilterError("%s: %s" % (host, error.message)) from error
        if entry is not None:
            found.append(entry)
    return found


class FilterModule:
    """Filters that this file offers."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"gateway_hosts": gateway_hosts}
