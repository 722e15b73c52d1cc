# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What HAProxy knows of its servers, as it is handed over a reload; test_gateway_haproxy.py has HAProxy read it."""

from __future__ import annotations

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_state import HEADER, merged, rows


def test_what_is_known_of_a_server_is_kept_only_when_it_is_the_same() -> None:
    rest = "1 1 60 15 3 3 6 0 0 0"
    state = "\n".join(
        [
            "1",
            HEADER,
            "4 a 1 gpu01:m 10.0.0.1 2 8 %s - 8000 - 0 0 - - 0" % rest,
            "4 a 2 gpu02:m 10.0.0.2 2 0 %s gpu02.example.org 8000 - 0 0 - - 0" % rest,
            "4 a 3 gpu03:m 10.0.0.3 2 1 %s - 8000 - 0 0 - - 0" % rest,
            "4 a 4 gone:m 10.0.0.4 2 0 %s - 8000 - 0 0 - - 0" % rest,
        ]
    )
    servers = (
        "a gpu01:m 10.0.0.1 8000\na gpu02:m gpu02.example.org 8000\na gpu03:m 10.0.0.3 8001\na new:m fe80::1 8000\n"
    )
    found = {row["srv_name"]: row for row in rows(merged(state, servers, True))[1]}
    assert list(found) == ["gpu01:m", "gpu02:m", "gpu03:m", "new:m"]
    assert (found["gpu01:m"]["srv_op_state"], found["gpu01:m"]["srv_admin_state"]) == ("2", "8")
    assert found["gpu02:m"]["srv_op_state"] == "2"
    # Elsewhere now: to be proved, and still in maintenance.
    assert (found["gpu03:m"]["srv_op_state"], found["gpu03:m"]["srv_admin_state"]) == ("0", "1")
    assert found["new:m"]["srv_admin_state"] == "0"
    assert (found["new:m"]["srv_addr"], found["new:m"]["srv_check_status"]) == ("fe80::1", "1")
    # After a stop, what was up must prove it again, and what was drained stays so.
    kept = {row["srv_name"]: row for row in rows(merged(state, servers, False))[1]}
    assert (kept["gpu01:m"]["srv_op_state"], kept["gpu01:m"]["srv_admin_state"]) == ("0", "8")
    assert kept["gpu02:m"]["srv_op_state"] == "0"


def test_a_server_in_another_backend_is_the_same_server() -> None:
    rest = "1 1 60 15 3 3 6 0 0 0"
    state = "\n".join(
        [
            "1",
            HEADER,
            "4 a 1 gpu01:m 10.0.0.1 2 0 %s - 8000 - 0 0 - - 0" % rest,
            "5 b 1 gpu01:m 10.0.0.1 0 1 %s - 8000 - 0 0 - - 0" % rest,
            "6 c 1 gpu01:m 10.0.0.1 2 x %s - 8000 - 0 0 - - 0" % rest,
        ]
    )
    found = rows(
        merged(state, "a gpu01:m 10.0.0.1 8000\nnew gpu01:m 10.0.0.1 8000\nmoved gpu01:m 10.0.0.2 8000\n", True)
    )
    assert [(row["be_name"], row["srv_op_state"], row["srv_admin_state"]) for row in found[1]] == [
        ("a", "2", "0"),
        # As where it is furthest out.
        ("new", "0", "1"),
        ("moved", "0", "1"),
    ]


@pytest.mark.parametrize("state", ["", "2\n# x\n", "1\n", "nonsense", "1\n# be_name srv_name\na\n"])
def test_a_state_of_another_form_is_no_state(state: str) -> None:
    found = rows(merged(state, "a gpu01:m 10.0.0.1 8000\n", True))[1]
    assert [(row["srv_name"], row["srv_op_state"]) for row in found] == [("gpu01:m", "0")]
