# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The exact members of the group docker."""

from __future__ import annotations

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_group import DockerGroup, GroupState
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Outcome, converge
from fake_host import FakeHost

PASSWD = "root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/h:/bin/sh\nbob:x:1001:1001::/h:/bin/sh\neve:x:1002:1002::/h:/bin/sh\n"


def group_host(members: str | None) -> FakeHost:
    host = FakeHost({"/etc/passwd": PASSWD, "/etc/group": "root:x:0:\n"})

    def entry(names: set[str]) -> bytes:
        return ("root:x:0:\ndocker:x:999:%s\n" % ",".join(sorted(names))).encode()

    def present() -> set[str]:
        text = host.files["/etc/group"].decode()
        return {name for name in text.rpartition("docker:x:999:")[2].strip().split(",") if name and ":" not in name}

    def gpasswd(fake: FakeHost, argv: tuple[str, ...], *_: object) -> str:
        names = present()
        (names.add if argv[1] == "-a" else names.remove)(argv[2])
        fake.files["/etc/group"] = entry(names)
        return ""

    def groupadd(fake: FakeHost, *_: object) -> str:
        fake.files["/etc/group"] = entry(set())
        return ""

    if members is not None:
        host.files["/etc/group"] = entry({name for name in members.split(",") if name})
    host.commands = {"gpasswd *": gpasswd, "groupadd --system docker": groupadd, "getent *": (2, "", "")}
    return host


def run(host: FakeHost, *users: str, check: bool = False) -> Outcome[GroupState]:
    return converge(host, DockerGroup(users), check_mode=check)


@pytest.mark.parametrize(
    ("members", "wanted", "changes"),
    [
        ("", ("alice",), 1),
        ("alice", ("alice",), 0),
        ("alice,eve", ("alice", "bob"), 2),
        ("alice,eve", (), 2),
        (None, ("alice",), 2),
        (None, (), 1),
    ],
)
def test_exact_list(members: str | None, wanted: tuple[str, ...], changes: int) -> None:
    host = group_host(members)
    before = dict(host.files)
    assert len(run(host, *wanted, check=True).changes) == changes
    assert host.files == before
    outcome = run(host, *wanted)
    assert len(outcome.changes) == changes
    assert outcome.state.members == tuple(sorted(wanted))
    assert not run(host, *wanted).changed
    assert not run(host, *wanted, check=True).changed


def test_user_off_the_list_is_named_in_the_plan() -> None:
    (change,) = run(group_host("alice,eve"), "alice", check=True).changes
    assert (change.what, change.before, change.after) == ("member eve", "docker", None)


def test_account_that_was_deleted_but_is_still_a_member() -> None:
    host = group_host("alice,ghost")
    assert [change.what for change in run(host, "alice").changes] == ["member ghost"]


def test_unknown_user() -> None:
    with pytest.raises(FleetError) as caught:
        run(group_host(""), "mallory")
    assert caught.value.reason == "unknown_user"
    assert "mallory" in caught.value.message


def test_user_of_a_directory_service_is_known() -> None:
    host = group_host("")
    host.commands = {"getent passwd ldap-user": "ldap-user:x:5000:5000::/h:/bin/sh\n", **host.commands}
    assert run(host, "ldap-user").state.members == ("ldap-user",)


def test_primary_group() -> None:
    host = group_host("")
    host.files["/etc/passwd"] += b"dock:x:1003:999::/h:/bin/sh\n"
    assert not run(host, "dock").changed
    with pytest.raises(FleetError, match="primary group"):
        run(host)


def test_group_of_a_directory_service() -> None:
    host = group_host(None)
    host.commands = {"getent group docker": "docker:*:999:eve\n", **host.commands}
    with pytest.raises(FleetError) as caught:
        run(host, "alice")
    assert caught.value.reason == "remote_group"
    assert not run(host, "eve", check=True).changed


def socket_host(mode: int, gid: int, unit: str = "SocketGroup=docker\nSocketMode=0660\n") -> FakeHost:
    host = group_host("alice")
    host.files["/run/docker.sock"] = b""
    host.modes["/run/docker.sock"] = (mode, 0, gid)

    def change(fake: FakeHost, argv: tuple[str, ...], *_: object) -> str:
        old_mode, uid, old_gid = fake.modes["/run/docker.sock"]
        new = (old_mode, uid, 999) if argv[0] == "chgrp" else (int(argv[1], 8), uid, old_gid)
        fake.modes["/run/docker.sock"] = new
        return ""

    host.commands = {"systemctl show *": unit, "chgrp docker *": change, "chmod *": change, **host.commands}
    return host


@pytest.mark.parametrize(("mode", "gid"), [(0o666, 999), (0o660, 0), (0o600, 999), (0o777, 1000)])
def test_a_socket_past_the_group(mode: int, gid: int) -> None:
    host = socket_host(mode, gid)
    (change,) = run(host, "alice").changes
    assert (change.what, change.before) == ("/run/docker.sock", "%04o group %d" % (mode, gid))
    assert host.modes["/run/docker.sock"] == (0o660, 0, 999)
    assert not run(host, "alice").changed


def test_a_socket_as_its_unit_asks_for() -> None:
    assert not run(socket_host(0o660, 999), "alice").changed
    assert not run(socket_host(0o600, 0, "SocketGroup=root\nSocketMode=0600\n"), "alice").changed


def test_a_new_group_gets_the_socket_in_the_same_run() -> None:
    host = socket_host(0o660, 998)
    host.files["/etc/group"] = b"root:x:0:\n"
    assert [change.what for change in run(host, "alice").changes] == [
        "group docker",
        "member alice",
        "/run/docker.sock",
    ]


@pytest.mark.parametrize("users", [["a b"], [""], ["-x"], ["a:b"], ["alice", "alice"], ["a\nb"], [5]])
def test_bad_names(users: list[str]) -> None:
    with pytest.raises(FleetError) as caught:
        DockerGroup(users)
    assert caught.value.reason == "invalid_option"
    assert "users = " in caught.value.message
