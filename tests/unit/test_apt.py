# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""apt and dpkg: packages, holds, interrupted runs, repositories and their rivals."""

from __future__ import annotations

import re
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._apt import APT_KEYS, LOCK_TIMEOUT, Apt
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from fake_host import FakeHost
from package_fakes import ARMORED, FLAT, KEY, REPOSITORY, changes

DPKG = (
    "docker.io\t26.1.5+dfsg1-9\tamd64\tii \nlibc6\t2.41\ti386\tii \nlibc6\t2.41\tamd64\tii \nheld\t1\tamd64\thi \n"
    "gone\t1\tamd64\trc \nnever\t\t\tun \nhalf\t1\tall\tiU \nbroken\t1\tall\tiHR\nwaiting\t1\tall\tit \n"
)


@pytest.fixture
def apt(host: FakeHost) -> Apt:
    host.dirs |= {"/etc/apt/sources.list.d", "/etc/apt"}
    host.commands["dpkg-query -W *"] = ""
    return Apt(host, fetch=lambda url: ARMORED)


def test_installed(host: FakeHost, apt: Apt) -> None:
    host.commands["dpkg-query -W *"] = (1, DPKG, "dpkg-query: no packages found matching nothing")
    found = apt.installed("*")
    assert sorted(found) == ["broken", "docker.io", "half", "held", "libc6", "waiting"]
    assert found["libc6"].architecture == "amd64"
    assert found["held"].held
    assert not found["docker.io"].held
    assert [name for name, package in found.items() if not package.complete] == ["half", "broken", "waiting"]


def test_available_newest_first(host: FakeHost, apt: Apt) -> None:
    host.commands["apt-cache madison *"] = (
        " docker-ce | 5:9.1.1-1~x | https://a noble/stable amd64 Packages\n"
        " docker-ce | 5:28.3.3-1~x | https://a noble/stable amd64 Packages\n"
        " docker-ce | 5:28.3.3-1~x | https://b noble/stable amd64 Packages\n"
        " docker-ce | 5:28.3.3-1~x | https://b noble/stable Sources\n"
        "N: nothing\n"
    )
    (offers,) = apt.available("docker-ce", "other").values()
    assert [(offer.version, offer.origin) for offer in offers] == [
        ("5:28.3.3-1~x", "https://a"),
        ("5:9.1.1-1~x", "https://a"),
    ]
    assert apt.newest("docker-ce", "9.1") == "5:9.1.1-1~x"
    assert apt.newest("docker-ce", "7") is None


def test_install_never_removes_unasked(host: FakeHost, apt: Apt) -> None:
    host.commands["apt-get *"] = ""
    apt.install({"a": None, "b": "1.0"})
    apt.install({"a": None}, allow_removal=True)
    first, second = (call for call in host.calls if call[0] == "apt-get")
    assert first[-2:] == ("a", "b=1.0")
    assert "--no-remove" in first
    assert "--no-remove" not in second
    assert not apt.install({})


def _whole(host: FakeHost, *_: object) -> str:
    """A tool that finishes what was interrupted."""
    host.commands["dpkg-query -W *"] = "half\t1\tall\tii \n"
    return ""


def test_install_finishes_an_interrupted_run_first(host: FakeHost, apt: Apt) -> None:
    host.commands.update({"dpkg-query -W *": "half\t1\tall\tiU \n", "dpkg *": _whole, "apt-get *": ""})
    apt.install({"a": None})
    assert [call[0] for call in host.calls] == ["dpkg-query", "dpkg", "dpkg-query", "apt-get"]
    assert "a" in host.calls[-1]


def _interrupted(host: FakeHost, *packages: tuple[str, str, str]) -> None:
    """Packages as dpkg knows them: name, state, version. apt is not asked to put in place again what is unpacked."""

    def query(_host: FakeHost, argv: tuple[str, ...], *_: object) -> str:
        form = argv[2][3:].replace("\\t", "\t").replace("\\n", "\n").replace("${db:Status-Abbrev}", "${Status}")
        form = form.replace("${Architecture}", "all")
        fields = ("${Package}", "${Status}", "${Version}")
        lines = [form] * len(packages)
        for field, number in zip(fields, range(3)):
            lines = [line.replace(field, package[number]) for line, package in zip(lines, packages)]
        return "".join(lines)

    host.commands["dpkg-query -W *"] = query


def _offer(host: FakeHost, name: str, *versions: str) -> None:
    lines = "".join("%s | %s | http://x stable/main amd64 Packages\n" % (name, version) for version in versions)
    host.commands["apt-cache madison *"] = lines


def _fixes(host: FakeHost) -> list[tuple[str, ...]]:
    return [call for call in host.calls if call[0] == "apt-get"]


def test_what_was_cut_off_while_unpacking_is_unpacked_again(host: FakeHost, apt: Apt) -> None:
    _interrupted(host, ("half", "iHR", "1.5"), ("gone", "iHR", "0.9"))
    _offer(host, "half", "2.0", "1.5")
    host.commands.update({"dpkg *": "", "apt-get *": _whole})
    apt.repair()
    assert apt.interrupted() == []
    (fixed,) = _fixes(host)
    assert "--fix-broken" in fixed and "--no-remove" in fixed and "--reinstall" in fixed
    # Not the newest, and by name alone where that version is not offered any more.
    assert fixed[-2:] == ("half=1.5", "gone")


def test_what_depends_on_a_package_that_was_cut_off_is_not_the_fault(host: FakeHost, apt: Apt) -> None:
    """dpkg 1.22 ends with 1 over what depends on it, and of an upgrade it knows the version from before."""
    _interrupted(host, ("libnvidia", "iHR", "1.0"), ("nvidia", "iU ", "2.0"))
    _offer(host, "libnvidia", "3.0", "2.0", "1.0")
    said = "dpkg: error processing package nvidia (--configure):\n dependency problems - leaving unconfigured\n"
    host.commands.update({"dpkg *": (1, "", said), "apt-get *": _whole})
    apt.repair()
    # apt 2.x has no file name for what is unpacked and named again.
    (fixed,) = _fixes(host)
    assert fixed[-2:] == ("--allow-downgrades", "libnvidia=2.0")


def test_what_was_cut_off_is_tried_without_its_version_too(host: FakeHost, apt: Apt) -> None:
    _interrupted(host, ("half", "iHR", "1.0"), ("other", "iU ", "7"))
    _offer(host, "half", "2.0", "1.0")
    answers: list[object] = [(100, "", "E: Unmet dependencies."), _whole]

    def fix(*call: t.Any) -> t.Any:
        answer = answers.pop(0)
        return answer(*call) if callable(answer) else answer

    host.commands.update({"dpkg *": (1, "", "dpkg: error processing package other (--configure):"), "apt-get *": fix})
    apt.repair()
    assert [call[-1] for call in _fixes(host)] == ["half=1.0", "half"]
    answers = [(100, "", "E: Unmet dependencies.")] * 2
    _interrupted(host, ("half", "iHR", "1.0"), ("other", "iU ", "7"))
    with pytest.raises(FleetError, match="Unmet dependencies"):
        apt.repair()


def test_words_that_sound_like_a_lock_are_none(host: FakeHost, apt: Apt) -> None:
    _interrupted(host, ("half", "iF ", "1.0"))
    host.commands["dpkg *"] = (1, "", "dpkg: error processing package half (--configure): blocked by its own script")
    before = host.clock
    with pytest.raises(FleetError, match="blocked by its own script"):
        apt.repair()
    assert host.clock == before and not _fixes(host)


def test_repair_waits_for_another_tool(host: FakeHost, apt: Apt) -> None:
    host.commands["dpkg-query -W *"] = "half\t1\tall\tiU \n"
    answers = [(2, "", "dpkg: error: dpkg frontend lock was locked by another process with pid 7")] * 3
    host.commands["dpkg *"] = lambda *call: answers.pop(0) if answers else _whole(*call)
    before = host.clock
    apt.repair()
    assert host.clock - before == 6
    host.commands["dpkg-query -W *"] = "half\t1\tall\tiU \n"
    host.commands["dpkg *"] = (2, "", "dpkg: error: dpkg frontend lock was locked by another process with pid 7")
    with pytest.raises(FleetError) as caught:
        apt.repair()
    assert caught.value.reason == "package_lock"
    host.commands["dpkg *"] = (1, "", "dpkg: error processing package half (--configure): subprocess failed")
    with pytest.raises(FleetError, match="processing package half"):
        apt.repair()


LISTS = (
    "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (apt-get)\n"
    "E: Unable to lock directory /var/lib/apt/lists/\n"
)
ARCHIVES = LISTS.replace("/lib/apt/lists", "/cache/apt/archives")
FRONTEND = (
    "dpkg: error: dpkg frontend lock was locked by another process with pid 7\nNote: removing the lock file is always wrong\n"
    "E: Sub-process dpkg --set-selections returned an error code (2)\nE: Executing dpkg failed. Are you root?\n"
)
OTHERS = [
    ("apt-get *", LISTS, lambda apt: apt.refresh()),
    ("apt-get *", LISTS, lambda apt: apt.apply_repository(REPOSITORY)),
    ("apt-get *", ARCHIVES, lambda apt: apt.install({"a": None})),
    ("apt-get *", ARCHIVES, lambda apt: apt.remove("a", purge=True)),
    ("apt-mark hold a", FRONTEND, lambda apt: apt.hold("a")),
    ("apt-mark unhold a", FRONTEND, lambda apt: apt.unhold("a")),
]


@pytest.mark.parametrize(("command", "said", "act"), OTHERS)
def test_what_apt_itself_does_not_wait_for(
    host: FakeHost, apt: Apt, command: str, said: str, act: t.Callable[[Apt], None]
) -> None:
    """DPkg::Lock::Timeout is for dpkg's lock in apt-get alone."""
    host.commands["dpkg-query -W *"] = "a\t1\tall\tii \n"
    answers = [(100, "", said)] * 3
    host.commands[command] = lambda *_: answers.pop() if answers else ""
    before = host.clock
    act(apt)
    assert host.clock - before == 6 and not answers

    host.files.clear()
    host.commands[command] = (100, "", said)
    before = host.clock
    with pytest.raises(FleetError) as caught:
        act(apt)
    assert host.clock - before == LOCK_TIMEOUT
    assert caught.value.reason == "package_lock"
    assert re.search(r"process (with pid )?7", caught.value.message)
    assert "Another package tool is running on this host" in caught.value.message
    assert "URL, the proxy" not in caught.value.message
    # What was written for a repository is taken back.
    assert not host.files


@pytest.mark.parametrize(
    "said",
    [
        "E: Could not open lock file /var/lib/apt/lists/lock - open (13: Permission denied)",
        "E: Unable to acquire the dpkg frontend lock (/var/lib/dpkg/lock-frontend), are you root?",
    ],
)
def test_a_lock_that_nobody_has_is_not_waited_for(host: FakeHost, apt: Apt, said: str) -> None:
    host.commands["apt-get *"] = (100, "Waiting for cache lock: Could not get lock /x. It is held by process 7", said)
    before = host.clock
    with pytest.raises(FleetError, match="lock") as caught:
        apt.install({"a": None})
    assert caught.value.reason == "package_failed" and host.clock == before
    host.commands["apt-mark *"] = (100, "", "E: Executing dpkg failed. Are you root?")
    with pytest.raises(FleetError, match=r"Holding a failed: .*Are you root") as caught:
        apt.hold("a")
    assert caught.value.reason == "hold_failed"


def test_who_had_the_lock_when_apt_had_waited_itself(host: FakeHost, apt: Apt) -> None:
    waiting = (
        "Waiting for cache lock: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 7 (%s)...\n"
    )
    said = "E: Unable to acquire the dpkg frontend lock (/var/lib/dpkg/lock-frontend), is another process using it?\n"

    def wait(*_: t.Any) -> t.Any:
        host.sleep(LOCK_TIMEOUT)
        return (100, waiting % "apt-get" + waiting % "unattended-upgr", said)

    host.commands["apt-get *"] = wait
    with pytest.raises(FleetError, match=r"lock-frontend. It is held by process 7 \(unattended-upgr\)") as caught:
        apt.install({"a": None})
    assert caught.value.reason == "package_lock"
    assert len(_fixes(host)) == 1


def test_install_refreshes_stale_lists_once(host: FakeHost, apt: Apt) -> None:
    answers = [(100, "", "E: Unable to locate package a"), (0, "", ""), (0, "", "")]
    host.commands["apt-get *"] = lambda *_: answers.pop(0)
    apt.install({"a": None})
    assert [
        next(word for word in call if word in ("install", "update")) for call in host.calls if call[0] == "apt-get"
    ] == [
        "install",
        "update",
        "install",
    ]


@pytest.mark.parametrize(
    ("stderr", "reason", "text"),
    [
        (
            "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 7 (apt)",
            "package_lock",
            "process 7",
        ),
        (
            "dpkg: error processing archive x: No space left on device\nE: Sub-process /usr/bin/dpkg returned 1",
            "disk_full",
            "No space",
        ),
        (
            "a : Depends: b (= 2) but 1 is to be installed\nE: Unable to correct problems, you have held broken packages.",
            "package_failed",
            "Depends: b (= 2)",
        ),
        ("E: Sub-process /usr/bin/dpkg returned an error code (1)", "package_failed", "Sub-process"),
        (
            "dpkg: error processing package k (--configure):\n installed k package post-installation script subprocess "
            "returned error exit status 10\nE: Sub-process /usr/bin/dpkg returned an error code (1)",
            "package_failed",
            "package k (--configure): installed k package post-installation script",
        ),
    ],
)
def test_failures_of_apt(host: FakeHost, apt: Apt, stderr: str, reason: str, text: str) -> None:
    host.commands["apt-get *"] = (100, "", stderr)
    with pytest.raises(FleetError) as caught:
        apt.install({"a": "1"})
    assert caught.value.reason == reason
    assert "a 1" in caught.value.message
    assert text in caught.value.message


def test_remove_only_what_is_there(host: FakeHost, apt: Apt) -> None:
    apt.remove("a")
    host.commands.update({"dpkg-query -W *": "a\t1\tall\tii \n", "apt-get *": ""})
    apt.remove("a", "b")
    assert [call[-2:] for call in host.calls if call[0] == "apt-get"] == [("--allow-change-held-packages", "a")]


# -- repositories ---------------------------------------------------------------------------------


def test_repository_is_written_with_its_key(host: FakeHost, apt: Apt) -> None:
    host.commands["apt-get *"] = ""
    (change,) = changes(apt)
    assert change.before is None
    apt.apply_repository(REPOSITORY)
    assert host.files["/etc/apt/sources.list.d/docker.sources"].decode() == (
        "# Managed by gpu_fleet.nim.\nTypes: deb\nURIs: https://download.docker.com/linux/ubuntu\nSuites: noble\n"
        "Components: stable\nSigned-By: /etc/apt/keyrings/docker.gpg\n"
    )
    assert host.files["/etc/apt/keyrings/docker.gpg"] == KEY
    assert changes(apt) == []


def test_lost_key_is_a_change(host: FakeHost, apt: Apt) -> None:
    host.commands["apt-get *"] = ""
    apt.apply_repository(REPOSITORY)
    host.files["/etc/apt/keyrings/docker.gpg"] = b"<html>"
    (change,) = changes(apt)
    assert "key" in change.why
    apt.apply_repository(REPOSITORY)
    assert changes(apt) == []


@pytest.mark.parametrize("content", [b"\x99another key", KEY])
def test_another_key_and_one_that_apt_cannot_read_are_changes(host: FakeHost, apt: Apt, content: bytes) -> None:
    host.commands["apt-get *"] = ""
    apt.apply_repository(REPOSITORY)
    host.files["/etc/apt/keyrings/docker.gpg"] = content
    host.modes["/etc/apt/keyrings/docker.gpg"] = (0o600 if content == KEY else 0o644, 0, 0)
    (change,) = changes(apt)
    assert "another one, or the package tool cannot read it" in change.why
    apt.apply_repository(REPOSITORY)
    assert host.files["/etc/apt/keyrings/docker.gpg"] == KEY
    assert changes(apt) == []


def test_a_key_that_was_there_before_anybody_took_note_is_taken_as_it_is(host: FakeHost, apt: Apt) -> None:
    host.commands["apt-get *"] = ""
    apt.apply_repository(REPOSITORY)
    del host.files[APT_KEYS]
    host.files["/etc/apt/keyrings/docker.gpg"] = b"\x99another key"
    assert changes(apt) == []


@pytest.mark.parametrize("record", [b"", b"[]", b"broken", b"null", b'{"/etc/apt/keyrings/docker.gpg": 5}'])
def test_a_broken_record_of_keys_is_told_and_left(host: FakeHost, apt: Apt, record: bytes) -> None:
    host.commands["apt-get *"] = ""
    for there in (False, True):
        if there:
            del host.files[APT_KEYS]
            apt.apply_repository(REPOSITORY)
        host.files[APT_KEYS] = record
        before = dict(host.files)
        for ask in (lambda: changes(apt), lambda: apt.apply_repository(REPOSITORY)):
            with pytest.raises(FleetError) as caught:
                ask()
            assert caught.value.reason == "state_unreadable" and APT_KEYS in caught.value.message
        assert host.files == before


def test_unreachable_repository_leaves_nothing_behind(host: FakeHost, apt: Apt) -> None:
    """A definition that cannot be downloaded would break every later apt run of the host."""
    host.commands["apt-get *"] = (
        100,
        "Err:1 https://download.docker.com noble InRelease\n  404  Not Found",
        "E: Failed to fetch",
    )
    with pytest.raises(FleetError) as caught:
        apt.apply_repository(REPOSITORY)
    assert caught.value.reason == "repository_unreachable"
    assert REPOSITORY.url in caught.value.message
    assert not [name for name in host.files if "docker" in name]

    host.files["/etc/apt/sources.list.d/docker.sources"] = b"old"
    with pytest.raises(FleetError):
        apt.apply_repository(REPOSITORY)
    assert host.files["/etc/apt/sources.list.d/docker.sources"] == b"old"


def test_missing_key_stops_before_the_definition(host: FakeHost, apt: Apt) -> None:
    def fetch(url: str) -> bytes:
        raise FleetError("repository_unreachable", "Downloading %s failed." % url)

    apt.fetch = fetch
    with pytest.raises(FleetError, match="linux/ubuntu/gpg"):
        apt.apply_repository(REPOSITORY)
    assert not [path for path in host.files if "docker" in path]


LIST = "deb [arch=amd64 signed-by=/usr/share/keyrings/x.gpg] https://download.docker.com/linux/ubuntu noble stable\n"


@pytest.mark.parametrize(
    ("path", "text", "after"),
    [
        ("/etc/apt/sources.list.d/old.list", LIST, None),
        ("/etc/apt/sources.list.d/old.list", "# by hand\n" + LIST, None),
        ("/etc/apt/sources.list.d/old.list", LIST + "deb http://other x y\n", "deb http://other x y\n"),
        ("/etc/apt/sources.list", LIST, ""),
        (
            "/etc/apt/sources.list.d/old.sources",
            "Types: deb\nURIs: https://download.docker.com/linux/ubuntu/\nSuites: noble\nComponents: stable\n",
            None,
        ),
        (
            "/etc/apt/sources.list.d/old.sources",
            "Types: deb\nURIs: http://other\nSuites: x\n\nTypes: deb\nURIs: https://download.docker.com/linux/ubuntu\nSuites: noble\n",
            "Types: deb\nURIs: http://other\nSuites: x\n",
        ),
    ],
)
def test_rival_definitions_make_way(host: FakeHost, apt: Apt, path: str, text: str, after: str | None) -> None:
    host.commands["apt-get *"] = ""
    apt.apply_repository(REPOSITORY)
    host.files[path] = text.encode()
    (change,) = changes(apt)
    assert path in change.before
    assert "two definitions" in change.why
    apt.apply_repository(REPOSITORY)
    assert host.read_text(path) == (after or None)
    assert changes(apt) == []


@pytest.mark.parametrize(
    "text",
    [
        "# " + LIST,
        LIST.replace("noble", "jammy"),
        LIST.replace("/ubuntu", "/debian"),
        "deb http://mirror/download.docker.com/linux/ubuntu noble stable\n",
    ],
)
def test_other_definitions_are_no_rivals(host: FakeHost, apt: Apt, text: str) -> None:
    host.files["/etc/apt/sources.list.d/other.list"] = text.encode()
    assert apt.repository_state(REPOSITORY).rivals == ()


def test_disabled_stanza_is_no_rival(host: FakeHost, apt: Apt) -> None:
    host.files["/etc/apt/sources.list.d/o.sources"] = (
        b"Enabled: no\nTypes: deb\nURIs: https://download.docker.com/linux/ubuntu\nSuites: noble\n"
    )
    assert apt.repository_state(REPOSITORY).rivals == ()


def test_flat_repository_with_architecture_variable(host: FakeHost, apt: Apt) -> None:
    """NVIDIA's own instructions write $(ARCH) where the definition here has the architecture."""
    host.files["/etc/apt/sources.list.d/nvidia.list"] = (
        b"deb [signed-by=/k] https://nvidia.github.io/x/stable/deb/$(ARCH) /\n"
    )
    assert apt.repository_state(FLAT).rivals == ("/etc/apt/sources.list.d/nvidia.list",)


def test_indexed(host: FakeHost, apt: Apt) -> None:
    assert not apt.repository_state(FLAT).indexed
    host.files["/var/lib/apt/lists/nvidia.github.io_x_stable_deb_amd64_Packages"] = b""
    host.files["/var/lib/apt/lists/download.docker.com_linux_ubuntu_dists_noble_stable_binary-amd64_Packages"] = b""
    assert apt.repository_state(FLAT).indexed
    assert apt.repository_state(REPOSITORY).indexed


def test_whoever_asks_for_packages_asks_the_same(host: FakeHost, apt: Apt) -> None:
    host.commands["dpkg-query -W *"] = DPKG
    assert sorted(apt.installed("docker*", "held", "gone")) == ["docker.io", "held"]
    assert list(apt.installed("hal?")) == ["half"]
    assert apt.installed("docker") == {}
    assert apt.interrupted() == ["half", "broken", "waiting"]
    assert len(host.calls) == 4 and len(set(host.calls)) == 1
