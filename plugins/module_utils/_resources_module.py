# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Modules whose options are the options of several resources at once."""

from __future__ import annotations

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from ._errors import FleetError
from ._options import CHAIN, RESOURCE_OPTIONS, secrets_of


class ResourcesModule(AnsibleModule):  # type: ignore[misc]  # ansible-core ships no type information
    """A module that knows the secrets within its options, whose specification Ansible does not see.

    Args:
        resources: Names of the options that hold the options of a resource each; at least one must be given.
        options: Argument specification of further options.
    """

    def __init__(self, resources: t.Sequence[str] = CHAIN, options: t.Mapping[str, t.Any] | None = None) -> None:
        self.resource_names = tuple(resources)
        super().__init__(
            argument_spec={**{name: {"type": "dict"} for name in resources}, **(options or {})},
            required_one_of=[resources] if len(resources) > 1 else [],
            supports_check_mode=True,
        )

    def _log_invocation(self) -> None:
        """The line in the host's log; Ansible's own has all options in it, and knows nothing of the secrets within."""
        self.log(
            "Invoked for %s" % ", ".join(name for name in self.resource_names if self.params.get(name) is not None)
        )

    def fail_json(self, msg: str, **facts: t.Any) -> t.NoReturn:
        """Also where Ansible itself refuses an option, and prints all of them beside its message."""
        for name in self.resource_names:
            self.no_log_values.update(secrets_of(name, self.params.get(name)))
        super().fail_json(msg, **facts)
        raise AssertionError("fail_json returned")

    def resources(self) -> dict[str, dict[str, t.Any]]:
        """The options of the given resources, as the module of each would get them.

        Raises:
            FleetError: ``invalid_option``.
        """
        if all(self.params[name] is None for name in self.resource_names):
            raise FleetError(
                "invalid_option", "%s is not given; say what is wanted." % " or ".join(self.resource_names)
            )
        found: dict[str, dict[str, t.Any]] = {}
        for name in self.resource_names:
            if self.params[name] is None:
                continue
            specification = RESOURCE_OPTIONS[name]
            result = ArgumentSpecValidator(specification).validate(self.params[name])
            found[name] = result.validated_parameters
            # Also what was given as text, which the validator has turned into mappings.
            self.no_log_values.update(secrets_of(name, found[name]))
            for unknown in result.unsupported_parameters:
                option = ".".join([name, *([unknown] if isinstance(unknown, str) else unknown)])
                raise FleetError(
                    "invalid_option",
                    "%s: there is no such option; see the documentation of gpu_fleet.nim.%s." % (option, name),
                )
            if result.error_messages:
                raise FleetError("invalid_option", "%s: %s." % (name, str(result.error_messages[0]).rstrip(".")))
        return found
