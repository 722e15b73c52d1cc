# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Who may talk to the Docker socket: the exact members of the group ``docker``, and nobody past the group.

Whoever may do so can mount the host's root file system into a container and is root in all but name (Docker's
documentation, "Docker daemon attack surface"). So a name that is off the list must be out of the group.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._host import FileStat, Host
from ._resource import Change, Resource
from ._systemd import unit_properties
from ._untrusted import is_digits

GROUP = "docker"
SOCKET = "/run/docker.sock"
_SOCKET_MODE = 0o660

#: useradd(8): letters, digits, underscore, hyphen and dot; at most 32 characters; a trailing $ for machine accounts.
_USER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,30}\$?\Z")


@dataclass(frozen=True)
class GroupState:
    """The group as the host has it.

    Attributes:
        gid: None when there is no such group.
        local: Whether it stands in /etc/group, where gpasswd can change it.
        members: Its supplementary members.
        primary: Users whose primary group it is; they are members whatever the list says.
        unknown_users: Wanted users that do not exist.
        socket: Owner and mode of Docker's socket; None when there is none, or where docker.socket itself asks for what it has.
    """

    gid: t.Optional[int] = None
    local: bool = True
    members: t.Tuple[str, ...] = ()
    primary: t.Tuple[str, ...] = ()
    unknown_users: t.Tuple[str, ...] = ()
    socket: t.Optional[FileStat] = None


def check_users(users: t.Sequence[str], option: str = "users") -> t.Tuple[str, ...]:
    """Wanted members, sorted.

    Raises:
        FleetError: ``invalid_option`` for what cannot be a user name.
    """
    for user in users:
        if not isinstance(user, str) or not _USER_NAME.match(user):
            raise FleetError(
                "invalid_option",
                "%s = %r: not a name of a user; write login names, one per list item." % (option, user),
                option=option,
            )
    repeated = sorted({user for user in users if list(users).count(user) > 1})
    if repeated:
        raise FleetError(
            "invalid_option", "%s = %s: named twice; name every user once." % (option, repeated[0]), option=option
        )
    return tuple(sorted(users))


class DockerGroup(Resource[GroupState]):
    """The exact list of members of the group ``docker``."""

    name = "docker_group"

    def __init__(self, users: t.Sequence[str]) -> None:
        self.users = check_users(users)

    def observe(self, host: Host) -> GroupState:
        entry = _entry(host.read_text("/etc/group") or "", GROUP)
        local = entry is not None
        if entry is None:
            # A directory service may know the group where the file does not.
            entry = _entry(host.run(["getent", "group", GROUP]).stdout, GROUP)
        accounts = [line.split(":") for line in (host.read_text("/etc/passwd") or "").splitlines()]
        known = {fields[0] for fields in accounts}
        unknown = tuple(
            user for user in self.users if user not in known and not host.run(["getent", "passwd", user]).ok
        )
        if entry is None:
            return GroupState(unknown_users=unknown, socket=_odd_socket(host, None))
        return GroupState(
            gid=int(entry[2]),
            local=local,
            members=tuple(sorted(name for name in entry[3].split(",") if name)),
            primary=tuple(sorted(fields[0] for fields in accounts if len(fields) > 3 and fields[3] == entry[2])),
            unknown_users=unknown,
            socket=_odd_socket(host, int(entry[2])),
        )

    def plan(self, state: GroupState) -> t.List[Change]:
        if state.unknown_users:
            raise FleetError(
                "unknown_user",
                "users = %s: there is no such user on this host; create the account first or take it off the list."
                % ", ".join(state.unknown_users),
                users=list(state.unknown_users),
            )
        stuck = [user for user in state.primary if user not in self.users]
        if stuck:
            raise FleetError(
                "primary_group",
                "Taking %s out of the group %s failed: it is the primary group of that account; give the account another "
                "one with 'usermod --gid', or put it on the list." % (", ".join(stuck), GROUP),
                users=stuck,
            )
        changes: t.List[Change] = []
        if state.gid is None:
            changes.append(
                Change(self.name, "group %s" % GROUP, None, GROUP, "its members may use Docker", action="create")
            )
        wanted = [user for user in self.users if user not in state.primary]
        for user in wanted:
            if user not in state.members:
                changes.append(
                    self._member(
                        user, False, True, "is on the list; may use Docker after the next log-in, and so is root"
                    )
                )
        for user in state.members:
            if user not in wanted and user not in state.primary:
                changes.append(self._member(user, True, False, "is not on the list"))
        socket = self._socket_changes(state)
        if changes and not state.local:
            raise FleetError(
                "remote_group",
                "Changing the group %s failed: it comes from a directory service, not from /etc/group; change its members "
                "there, or leave the list undefined." % GROUP,
            )
        return changes + socket

    def _socket_changes(self, state: GroupState) -> t.List[Change]:
        found = state.socket
        if found is None:
            return []
        open_to_all = bool(found.mode & 0o006)
        return [
            Change(
                self.name,
                SOCKET,
                "%04o group %d" % (found.mode, found.gid),
                "%04o group %s" % (_SOCKET_MODE, GROUP),
                "everybody may use Docker through it, and so is root" if open_to_all else "its members are to use it",
                action="socket",
            )
        ]

    def _member(self, user: str, before: bool, after: bool, why: str) -> Change:
        return Change(
            self.name,
            "member %s" % user,
            GROUP if before else None,
            GROUP if after else None,
            why,
            action="add" if after else "remove",
            data={"user": user},
        )

    def apply(self, host: Host, change: Change) -> None:
        state = self.observe(host)
        if change.action == "socket":
            for command in (["chgrp", GROUP, SOCKET], ["chmod", "%04o" % _SOCKET_MODE, SOCKET]):
                host.check(command, reason="group_failed", doing="%s %s" % (command[0], SOCKET))
            return
        if change.action == "create":
            if state.gid is None:
                host.check(
                    ["groupadd", "--system", GROUP], reason="group_failed", doing="Creating the group %s" % GROUP
                )
            return
        user = change.data["user"]
        if (user in state.members) == (change.action == "add"):
            return
        host.check(
            ["gpasswd", "-a" if change.action == "add" else "-d", user, GROUP],
            reason="group_failed",
            doing="%s the group %s"
            % ("Adding %s to" % user if change.action == "add" else "Taking %s out of" % user, GROUP),
        )


def _odd_socket(host: Host, gid: t.Optional[int]) -> t.Optional[FileStat]:
    """The socket, where others than the group's members may use it or they may not."""
    found = host.stat(SOCKET)
    if found is None or (found.gid == gid and found.mode == _SOCKET_MODE):
        return None
    asked = unit_properties(host, "docker.socket", "SocketGroup", "SocketMode")
    named = _entry(host.read_text("/etc/group") or "", asked.get("SocketGroup", ""))
    mode = asked.get("SocketMode", "")
    if named is not None and int(named[2]) == found.gid and mode.isdigit() and int(mode, 8) == found.mode:
        return None
    return found


def _entry(text: str, name: str) -> t.Optional[t.List[str]]:
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) == 4 and fields[0] == name and is_digits(fields[2]):
            return fields
    return None
