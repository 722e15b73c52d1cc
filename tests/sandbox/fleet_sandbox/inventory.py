# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of hosts (.sandbox/hosts.json), their addresses, and what Ansible needs to reach them."""

from __future__ import annotations

import ipaddress
import json
import re
from typing import Any, Dict

from .common import ROOT, SandboxError, read_json, write_text

TABLE = ROOT / "hosts.json"
#: How the hosts are reached, and nothing else; the demo's inventory.yml lies beside it.
INVENTORY = ROOT / "connections.yml"
SSH = ROOT / "ssh"
KEY = SSH / "id_ed25519"
KNOWN_HOSTS = SSH / "known_hosts"
ANSIBLE_CFG = ROOT / "ansible.cfg"
GROUP = "gpu_hosts"

Table = Dict[str, Dict[str, Any]]


def full_name(scenario: str, name: str) -> str:
    """Name of a host of a test scenario: unique in the sandbox, valid as a host name."""
    name = "%s-%s" % (scenario, name) if scenario else name
    name = name.replace("_", "-").lower()
    if not re.match(r"^[a-z][a-z0-9-]{0,40}$", name) or name in ("world", "localhost"):
        raise SandboxError(
            "host name %r: use letters, digits and hyphens, a letter first, at most 41 characters" % name
        )
    return name


def allocate(name: str, taken: set[str]) -> str:
    """Free address: gpuNN has 172.30.1.NN for ever, every other host the lowest free one from 172.30.2.1 on."""
    numbered = re.match(r"^gpu(\d{1,3})$", name)
    if numbered and 1 <= int(numbered.group(1)) <= 254:
        return "172.30.1.%d" % int(numbered.group(1))
    address = ipaddress.ip_address("172.30.2.1")
    while str(address) in taken:
        address += 1
        if str(address).startswith("172.30.255."):
            raise SandboxError("no free address is left in the sandbox's network: remove hosts")
    return str(address)


def load() -> Table:
    """The table of hosts."""
    table: Table = read_json(TABLE, {})
    return table


def save(table: Table) -> None:
    """Store the table and everything that is rendered from it."""
    write_text(TABLE, json.dumps(table, indent=2, sort_keys=True) + "\n")
    lines = ["%s %s" % (host["address"], host["host_key"]) for dummy, host in sorted(table.items())]
    write_text(KNOWN_HOSTS, "".join(line + "\n" for line in lines))
    write_text(INVENTORY, render(select(table, "")))
    write_text(ANSIBLE_CFG, configuration())


def select(table: Table, scenario: str) -> Table:
    """Hosts of one scenario; "" are those that belong to none (the demo's)."""
    return {name: host for name, host in table.items() if host.get("scenario", "") == scenario}


def structure(table: Table) -> dict[str, Any]:
    """Inventory of the given hosts as a structure."""
    # A paused host is noticed after 15 s also by a connection that was open before.
    options = (
        "-o UserKnownHostsFile=%s -o StrictHostKeyChecking=yes -o ConnectTimeout=10 "
        "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
    ) % KNOWN_HOSTS
    return {
        GROUP: {
            "hosts": {name: {"ansible_host": host["address"]} for name, host in sorted(table.items())},
            "vars": {
                "ansible_user": "root",
                "ansible_ssh_private_key_file": str(KEY),
                "ansible_ssh_common_args": options,
                "ansible_ssh_pipelining": True,
                "ansible_python_interpreter": "/usr/bin/python3",
            },
        }
    }


def render(table: Table) -> str:
    """Inventory of the given hosts as YAML (JSON scalars are YAML scalars, so no library is needed)."""
    lines = ["# Written by tests/sandbox/sandbox.py; changes are lost."]

    def emit(node: dict[str, Any], indent: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                lines.append("%s%s:" % (indent, key))
                emit(value, indent + "  ")
            else:
                lines.append("%s%s: %s" % (indent, key, json.dumps(value)))

    emit(structure(table), "")
    return "\n".join(lines) + "\n"


def configuration() -> str:
    """ansible.cfg for this sandbox."""
    return """\
# Written by tests/sandbox/sandbox.py; changes are lost.
[defaults]
inventory = %(inventory)s
local_tmp = %(root)s/ansible/tmp
retry_files_enabled = False
forks = 20

[connection]
pipelining = True

[ssh_connection]
pipelining = True
control_path_dir = %(root)s/ansible/cp
""" % {"inventory": INVENTORY, "root": ROOT}
