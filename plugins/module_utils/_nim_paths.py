# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Where the files of NIM services lie on a host, and which services they tell of."""

from __future__ import annotations

from ._host import Host
from ._nim_unit_key import KEY_PIPES

UNIT_DIRECTORY = "/etc/systemd/system"
CONFIGURATION_DIRECTORY = "/etc/nim"
KEY_FILE = CONFIGURATION_DIRECTORY + "/ngc.env"
WRAPPER = "/usr/local/libexec/nim/nim-unit"
BASE_DIRECTORY = "/var/lib/nim"
STATE_DIRECTORY = BASE_DIRECTORY + "/state"
MAINTENANCE_FILE = BASE_DIRECTORY + "/maintenance"
RUNTIME_DIRECTORY = "/run/nim"


def unit_name(name: str) -> str:
    return "nim-%s.service" % name


def configured_services(host: Host) -> list[str]:
    """Names of the services that the collection has put on a host, sorted."""
    suffix = ".json"
    return [entry[: -len(suffix)] for entry in host.list_dir(CONFIGURATION_DIRECTORY) if entry.endswith(suffix)]


def secret_path(name: str) -> str:
    """Environment file of a model; a model cannot be called ``ngc``, whose name the key's file has."""
    return "%s/%s.env" % (CONFIGURATION_DIRECTORY, name)


def key_pipe(name: str) -> str:
    """Named pipe through which the container of a model gets the NGC key."""
    return "%s/%s/%s" % (RUNTIME_DIRECTORY, KEY_PIPES, name)
