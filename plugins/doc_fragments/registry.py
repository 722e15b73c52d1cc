# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Options of modules that ask a registry as a host would: with its login, and at its mirrors."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  registry_mirrors:
    description:
      - 'Where to look for images in place of a registry, for example C({"nvcr.io": "mirror.example:5000/ngc"}).'
      - Registries and mirrors are hosts with optional port and path, without scheme. The longest match wins.
    type: dict
    default: {}
  api_key:
    description:
      - NGC API key for C(nvcr.io), in place of the login that is stored in the Docker configuration of O(docker_user).
      - It is never sent to another registry.
    type: str
  docker_user:
    description: User of the host whose Docker configuration holds the logins at registries.
    type: str
    default: root
"""
