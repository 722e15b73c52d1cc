# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Where the files of NIM services lie on a host and in their containers, and which services they tell of."""

from __future__ import annotations

import re
import typing as t

if t.TYPE_CHECKING:
    from ._host import Host

#: Names that a service can have.
SERVICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}\Z")

UNIT_DIRECTORY = "/etc/systemd/system"
CONFIGURATION_DIRECTORY = "/etc/nim"
KEY_FILE = CONFIGURATION_DIRECTORY + "/ngc.env"
WRAPPER = "/usr/local/libexec/nim/nim-unit"
BASE_DIRECTORY = "/var/lib/nim"
STATE_DIRECTORY = BASE_DIRECTORY + "/state"
MAINTENANCE_FILE = BASE_DIRECTORY + "/maintenance"
RUNTIME_DIRECTORY = "/run/nim"

#: Where directories of the host appear in a container; the cache path is NIM's own default.
CACHE_PATH = "/opt/nim/.cache"
WEIGHTS_PATH = "/opt/nim/weights"
LORA_PATH = "/opt/nim/loras"
#: The native runtime keeps compiled kernels here; its weights go below it.
NATIVE_CACHE_PATH = "/opt/cache"
_SUFFIX = ".json"


def unit_name(name: str) -> str:
    return "nim-%s.service" % name


def service_of_unit(unit: str) -> str:
    """The name of a service out of :func:`unit_name`."""
    return unit[len("nim-") : -len(".service")]


def container_name(name: str) -> str:
    return "nim-%s" % name


def download_name(name: str) -> str:
    """The container that fetches the model before the service's own is created."""
    return "nim-%s-download" % name


def configuration_path(name: str) -> str:
    """What the wrapper gives the container of a service; that the file is there says that the service is ours."""
    return "%s/%s%s" % (CONFIGURATION_DIRECTORY, name, _SUFFIX)


def configured_services(host: Host) -> list[str]:
    """Names of the services that the collection has put on a host, sorted."""
    names = [entry[: -len(_SUFFIX)] for entry in host.list_dir(CONFIGURATION_DIRECTORY) if entry.endswith(_SUFFIX)]
    # Other files were put there by somebody else; systemctl would refuse their names, or take them for patterns.
    return [name for name in names if SERVICE_NAME.match(name)]


def secret_path(name: str) -> str:
    """Environment file of a model; a model cannot be called ``ngc``, whose name the key's file has."""
    return "%s/%s.env" % (CONFIGURATION_DIRECTORY, name)


def key_pipe(name: str) -> str:
    """Named pipe through which the container of a model gets the NGC key."""
    # Here: the wrapper's own files hold much more.
    from ._nim_unit_key import KEY_PIPES

    return "%s/%s/%s" % (RUNTIME_DIRECTORY, KEY_PIPES, name)
