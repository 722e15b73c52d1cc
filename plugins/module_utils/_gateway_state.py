# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
# Written to gateways as /usr/local/libexec/nim/gateway-state by gpu_fleet.nim.nim_gateway; changes made there are overwritten.
"""Keep what the gateway knows of its servers over reloads: ``gateway-state SOCKET SERVERS STATE_FILE``.

This file is a program of its own: it is copied to the gateway as it is, so it uses the standard library only. systemd runs
it before HAProxy is started, reloaded and stopped; HAProxy reads what it wrote (``server-state-file``).

A server that is the same before and after keeps its state, also when its backend has another name or it gets a further one.
One that is new, or has another address, begins as down: it gets requests when its checks have passed, not before. Drain and
maintenance stay in any case. Where HAProxy does not run, the last state counts for them, and every server begins as down.

Exit code 0 always when the file was written; a message and 1 otherwise, which is no reason not to reload.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import typing as t

#: Columns of format 1 as HAProxy 2.4 to 3.x write them (management guide, "show servers state").
HEADER = (
    "# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight "
    "srv_time_since_last_change srv_check_status srv_check_result srv_check_health srv_check_state srv_agent_state "
    "bk_f_forced_id srv_f_forced_id srv_fqdn srv_port srvrecord srv_use_ssl srv_check_port srv_check_addr srv_agent_addr "
    "srv_agent_port"
)
#: A server that has not passed a check yet. Its checks are initialised (1; with 0 none would ever begin), configured and
#: enabled (6).
UNPROVEN = {"srv_op_state": "0", "srv_check_status": "1", "srv_check_result": "0", "srv_check_health": "0"}
FRESH = dict(UNPROVEN, srv_uweight="1", srv_iweight="1", srv_check_state="6")
TEXTS = ("srv_fqdn", "srvrecord", "srv_check_addr", "srv_agent_addr", "srv_addr")
SOCKET_SECONDS = 5.0


def source() -> str:
    """The text of this file, also where it is imported from an archive."""
    spec = importlib.util.find_spec(__name__)
    loader: t.Any = spec.loader if spec else None
    text = loader.get_source(__name__) if loader else None
    if not text:
        raise RuntimeError("The source of %s is not available." % __name__)
    return str(text)


def ask(path: str, command: str) -> str:
    """Answer of HAProxy's runtime API."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(SOCKET_SECONDS)
        connection.connect(path)
        connection.sendall(command.encode("utf-8") + b"\n")
        # HAProxy's master would wait for a further command.
        connection.shutdown(socket.SHUT_WR)
        parts: list[bytes] = []
        while True:
            part = connection.recv(65536)
            if not part:
                return b"".join(parts).decode("utf-8", "replace")
            parts.append(part)


def rows(text: str) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a state in format 1; none of another format."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 2 or lines[0].strip() != "1" or not lines[1].startswith("# "):
        return HEADER[2:].split(), []
    columns = lines[1][2:].split()
    if not set(HEADER.split()[1:20]) <= set(columns):
        return HEADER[2:].split(), []
    found = [line.split() for line in lines[2:] if not line.startswith("#")]
    return columns, [dict(zip(columns, values)) for values in found if len(values) == len(columns)]


def _taken_out(row: t.Mapping[str, str]) -> int:
    """What an operator made of a server: bits 1 (maintenance) and 8 (drain). Other bits HAProxy finds out by itself."""
    bits = row["srv_admin_state"]
    return int(bits) & 9 if bits.isdecimal() else 0


def _is_at(row: t.Mapping[str, str], address: str, port: str) -> bool:
    return address in (row["srv_addr"], row["srv_fqdn"]) and row["srv_port"] == port


def merged(state: str, servers: str, running: bool) -> str:
    """The state to start with.

    Args:
        state: What HAProxy says, or what was kept when it does not run.
        servers: One server a line that is configured: backend, name, address, port.
        running: Whether ``state`` is what HAProxy says now.
    """
    columns, found = rows(state)
    chosen = []
    for line in servers.splitlines():
        backend, name, address, port = line.split()
        # Its own row, or that of the backend in which it is furthest out.
        known = [row for row in found if row["srv_name"] == name]
        known.sort(key=lambda row: (row["be_name"] != backend, -_taken_out(row)))
        row = next((row for row in known[:1] if _is_at(row, address, port)), None)
        if row is None:
            row = {column: "-" if column in TEXTS else "0" for column in columns}
            row.update(FRESH, srv_name=name, srv_port=port, srv_admin_state=str(_taken_out(known[0]) if known else 0))
            if ":" in address or address.replace(".", "").isdigit():
                row["srv_addr"] = address
            else:
                row["srv_fqdn"] = address
        elif not running:
            row = dict(row, **UNPROVEN)
        if row.get("be_name") != backend:
            # HAProxy finds rows by name where the numbers are not forced; they only must not be zero.
            row = dict(row, be_name=backend, be_id="1", srv_id="1")
        chosen.append(row)
    lines = ["1", "# " + " ".join(columns)]
    lines += [" ".join(row[column] for column in columns) for row in chosen]
    return "\n".join(lines) + "\n"


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except FileNotFoundError:
        return ""


def main(arguments: t.Sequence[str]) -> int:
    control, servers, state_file = arguments
    try:
        state, running = ask(control, "show servers state"), True
    except OSError:
        state, running = "", False
    try:
        text = merged(state if running else _read(state_file), _read(servers), running)
        temporary = state_file + ".new"
        with open(temporary, "w", encoding="utf-8") as stream:
            os.fchmod(stream.fileno(), 0o644)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, state_file)
    except (OSError, ValueError) as error:
        sys.stderr.write("gateway-state: the state of the servers is not kept: %s\n" % error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
