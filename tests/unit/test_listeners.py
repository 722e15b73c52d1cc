# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Listeners and addresses out of /proc/net."""

from __future__ import annotations

from ansible_collections.gpu_fleet.nim.plugins.module_utils._listeners import listening_sockets, own_addresses
from nim_machine import FIB_TRIE, IF_INET6


def test_addresses_of_the_host() -> None:
    assert own_addresses(FIB_TRIE, IF_INET6) == ("127.0.0.1", "172.30.2.2", "fe80::1", "::1")
    assert own_addresses("", "") == ()


def test_listening_sockets() -> None:
    header = "  sl  local_address ...\n"
    four = (
        header
        + "   0: 0100007F:1F40 00000000:0000 0A 0:0 00:0 0 0 0 77 1\n   1: 0100007F:1F41 00000000:0000 01 0:0 00:0 0 0 0 78 1\n"
    )
    assert listening_sockets(four, False) == [("127.0.0.1", 8000, "77")]
    six = header + "   0: %s:1F40 %s:0000 0A 0:0 00:0 0 0 0 79 1\n"
    assert listening_sockets(six % ("0" * 32, "0" * 32), True) == [("::", 8000, "79")]
    mapped = "0000000000000000FFFF00000100007F"
    assert listening_sockets(six % (mapped, "0" * 32), True) == [("127.0.0.1", 8000, "79")]
    assert listening_sockets(header + "garbage\n", False) == []
