# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""apt and dnf behind one interface."""

from __future__ import annotations

import base64
import shutil
import subprocess
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _packages as pk
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._os_release import OsRelease
from fake_host import FakeHost

KEY = b"\x99\x01\x0d" + bytes(range(200))
ARMORED = (
    b"-----BEGIN PGP PUBLIC KEY BLOCK-----\nVersion: GnuPG v2\n\n%s\n=ab12\n-----END PGP PUBLIC KEY BLOCK-----\n"
    % b"\n".join(base64.b64encode(KEY)[index : index + 64] for index in range(0, len(base64.b64encode(KEY)), 64))
)
REPOSITORY = pk.Repository(
    name="docker",
    url="https://download.docker.com/linux/ubuntu",
    key_url="https://download.docker.com/linux/ubuntu/gpg",
    suite="noble",
    components=("stable",),
)
FLAT = pk.Repository(
    name="toolkit", url="https://nvidia.github.io/x/stable/deb/amd64", key_url="https://nvidia.github.io/gpgkey"
)


# -- versions -------------------------------------------------------------------------------------

VERSIONS = [
    "1.0~rc1", "1.0", "1.0-1", "1.0-1+b1", "1.0a", "1.17.4-1", "1.20.0-1", "20.10.24+dfsg1-1+deb12u1+b6", "26.1.5+dfsg1-9",
    "580.95.05-0ubuntu1", "580.159.04-1", "1:0.5", "5:28.3.3-1~debian.12~bookworm", "5:28.3.3-1~debian.13~trixie", "5:29.5.1-1",
]  # fmt: skip


def test_debian_order_is_total_and_as_listed() -> None:
    for left, one in enumerate(VERSIONS):
        for right, two in enumerate(VERSIONS):
            assert pk.compare_debian(one, two) == (left > right) - (left < right), (one, two)


@pytest.mark.skipif(shutil.which("dpkg") is None, reason="no dpkg on this machine")
def test_debian_order_is_that_of_dpkg() -> None:
    for one, two in zip(VERSIONS, VERSIONS[1:]):
        assert subprocess.run(["dpkg", "--compare-versions", one, "lt", two], check=False).returncode == 0


@pytest.mark.parametrize(
    ("left", "right", "order"),
    [
        # rpm's own test cases (tests/rpmvercmp.at)
        ("1.0", "1.0", 0),
        ("1.0", "2.0", -1),
        ("2.0.1", "2.0.1a", -1),
        ("5.5p1", "5.5p10", -1),
        ("10xyz", "10.1xyz", -1),
        ("xyz10", "xyz10.1", -1),
        ("xyz.4", "8", -1),
        ("1.0~rc1", "1.0", -1),
        ("1.0~rc1", "1.0~rc2", -1),
        ("1.0^", "1.0", 1),
        ("1.0^git1", "1.01", -1),
        ("1.0^git1", "1.0^git2", -1),
        ("20101121", "20101122", -1),
        ("3:580.95.05-1.el9", "3:580.126.09-1.el9", -1),
        ("580.95.05", "3:580.95.05", -1),
        ("580.95.05-1.el9", "580.95.05", 0),
    ],
)
def test_rpm_order(left: str, right: str, order: int) -> None:
    assert pk.compare_rpm(left, right) == order


def test_rpm_order_both_ways() -> None:
    assert pk.compare_rpm("580.126.09-1.el9", "580.95.05-1.el9") == 1
    assert pk.compare_rpm("580.95.05-1.el9", "580.126.09-1.el9") == -1


@pytest.mark.parametrize(
    ("version", "wanted", "answer"),
    [
        ("1.17.4-1", "", True),
        ("1.17.4-1", "1.17.4-1", True),
        ("1.17.4-1", "1.17.4", True),
        ("1.17.4-1", "1.17", True),
        ("1.17.4-1", "1.1", False),
        ("5:28.3.3-1~debian.12~bookworm", "28.3.3", True),
        ("5:28.3.3-1~debian.12~bookworm", "28.3.3-1~debian.12~bookworm", True),
        ("580.95.05-0ubuntu1", "580.95", True),
        ("580.95.05-0ubuntu1", "58", False),
    ],
)
def test_matches_version(version: str, wanted: str, answer: bool) -> None:
    assert pk.matches_version(version, wanted) is answer


# -- keys and URLs --------------------------------------------------------------------------------


def test_key_is_stored_binary_whatever_came() -> None:
    assert pk.dearmor(KEY) == KEY
    assert pk.dearmor(ARMORED) == KEY
    assert pk.dearmor(ARMORED + ARMORED) == KEY + KEY
    assert pk.dearmor(ARMORED.replace(b"Version: GnuPG v2\n", b"").replace(b"\n", b"\r\n")) == KEY


@pytest.mark.parametrize(
    "content", [b"", b"<html>log in</html>", ARMORED.replace(b"BEGIN PGP PUBLIC", b"BEGIN PGP PRIVATE"), ARMORED[:40]]
)
def test_what_is_no_key(content: bytes) -> None:
    with pytest.raises(FleetError) as caught:
        pk.dearmor(content, "https://x/gpg")
    assert caught.value.reason == "invalid_key"
    assert "https://x/gpg" in caught.value.message


@pytest.mark.parametrize(
    "url", ["mirror.example.org/x", "", "ftp://x/y", "https://", "https://a b/c", "file:///x", "https://[::1/x"]
)
def test_what_is_no_repository_url(url: str) -> None:
    with pytest.raises(FleetError, match="repository_url = "):
        pk.check_url("repository_url", url)


def test_credentials_in_a_url_are_refused_and_not_shown() -> None:
    with pytest.raises(FleetError, match="user name or password") as caught:
        pk.check_url("repository_url", "https://ops:hunter2@mirror.example.org/x")
    assert "hunter2" not in caught.value.message


def test_url_loses_its_last_slash() -> None:
    assert pk.check_url("x", " https://mirror.example.org/a/ ") == "https://mirror.example.org/a"


# -- apt: packages --------------------------------------------------------------------------------

DPKG = (
    "docker.io\t26.1.5+dfsg1-9\tamd64\tii \nlibc6\t2.41\ti386\tii \nlibc6\t2.41\tamd64\tii \nheld\t1\tamd64\thi \n"
    "gone\t1\tamd64\trc \nnever\t\t\tun \nhalf\t1\tall\tiU \nbroken\t1\tall\tiHR\nwaiting\t1\tall\tit \n"
)


@pytest.fixture
def apt(host: FakeHost) -> pk.Apt:
    host.dirs |= {"/etc/apt/sources.list.d", "/etc/apt"}
    host.commands["dpkg-query -W *"] = ""
    return pk.Apt(host, fetch=lambda url: ARMORED)


def test_installed(host: FakeHost, apt: pk.Apt) -> None:
    host.commands["dpkg-query -W *"] = (1, DPKG, "dpkg-query: no packages found matching nothing")
    found = apt.installed("*")
    assert sorted(found) == ["broken", "docker.io", "half", "held", "libc6", "waiting"]
    assert found["libc6"].architecture == "amd64"
    assert found["held"].held
    assert not found["docker.io"].held
    assert [name for name, package in found.items() if not package.complete] == ["half", "broken", "waiting"]


def test_available_newest_first(host: FakeHost, apt: pk.Apt) -> None:
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


def test_install_never_removes_unasked(host: FakeHost, apt: pk.Apt) -> None:
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
    host.commands["dpkg-query -W *"] = "half\tii \n"
    return ""


def test_install_finishes_an_interrupted_run_first(host: FakeHost, apt: pk.Apt) -> None:
    host.commands.update({"dpkg-query -W *": "half\tiU \n", "dpkg *": _whole, "apt-get *": ""})
    apt.install({"a": None})
    assert [call[0] for call in host.calls] == ["dpkg-query", "dpkg", "dpkg-query", "apt-get"]
    assert "a" in host.calls[-1]


def test_what_was_cut_off_while_unpacking_is_unpacked_again(host: FakeHost, apt: pk.Apt) -> None:
    host.commands.update({"dpkg-query -W *": "half\tiHR\n", "dpkg *": "", "apt-get *": _whole})
    apt.repair()
    assert apt.interrupted() == []
    (fixed,) = (call for call in host.calls if call[0] == "apt-get")
    assert "--fix-broken" in fixed and "--no-remove" in fixed


def test_repair_waits_for_another_tool(host: FakeHost, apt: pk.Apt) -> None:
    host.commands["dpkg-query -W *"] = "half\tiU \n"
    answers = [(2, "", "dpkg: error: dpkg frontend lock was locked by another process with pid 7")] * 3
    host.commands["dpkg *"] = lambda *call: answers.pop(0) if answers else _whole(*call)
    before = host.clock
    apt.repair()
    assert host.clock - before == 6
    host.commands["dpkg-query -W *"] = "half\tiU \n"
    host.commands["dpkg *"] = (2, "", "dpkg: error: dpkg frontend lock was locked by another process with pid 7")
    with pytest.raises(FleetError) as caught:
        apt.repair()
    assert caught.value.reason == "package_lock"
    host.commands["dpkg *"] = (1, "", "dpkg: error processing package half (--configure): subprocess failed")
    with pytest.raises(FleetError, match="processing package half"):
        apt.repair()


def test_install_refreshes_stale_lists_once(host: FakeHost, apt: pk.Apt) -> None:
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
def test_failures_of_apt(host: FakeHost, apt: pk.Apt, stderr: str, reason: str, text: str) -> None:
    host.commands["apt-get *"] = (100, "", stderr)
    with pytest.raises(FleetError) as caught:
        apt.install({"a": "1"})
    assert caught.value.reason == reason
    assert "a 1" in caught.value.message
    assert text in caught.value.message


def test_remove_only_what_is_there(host: FakeHost, apt: pk.Apt) -> None:
    apt.remove("a")
    host.commands.update({"dpkg-query -W *": "a\t1\tall\tii \n", "apt-get *": ""})
    apt.remove("a", "b")
    assert [call[-2:] for call in host.calls if call[0] == "apt-get"] == [("--allow-change-held-packages", "a")]


# -- apt: repositories ----------------------------------------------------------------------------


def changes(manager: pk.PackageManager, repository: pk.Repository = REPOSITORY) -> list[t.Any]:
    return manager.plan_repository("r", repository, manager.repository_state(repository))


def test_repository_is_written_with_its_key(host: FakeHost, apt: pk.Apt) -> None:
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


def test_lost_key_is_a_change(host: FakeHost, apt: pk.Apt) -> None:
    host.commands["apt-get *"] = ""
    apt.apply_repository(REPOSITORY)
    host.files["/etc/apt/keyrings/docker.gpg"] = b"<html>"
    (change,) = changes(apt)
    assert "key" in change.why
    apt.apply_repository(REPOSITORY)
    assert changes(apt) == []


def test_unreachable_repository_leaves_nothing_behind(host: FakeHost, apt: pk.Apt) -> None:
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


def test_missing_key_stops_before_the_definition(host: FakeHost, apt: pk.Apt) -> None:
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
def test_rival_definitions_make_way(host: FakeHost, apt: pk.Apt, path: str, text: str, after: str | None) -> None:
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
def test_other_definitions_are_no_rivals(host: FakeHost, apt: pk.Apt, text: str) -> None:
    host.files["/etc/apt/sources.list.d/other.list"] = text.encode()
    assert apt.repository_state(REPOSITORY).rivals == ()


def test_disabled_stanza_is_no_rival(host: FakeHost, apt: pk.Apt) -> None:
    host.files["/etc/apt/sources.list.d/o.sources"] = (
        b"Enabled: no\nTypes: deb\nURIs: https://download.docker.com/linux/ubuntu\nSuites: noble\n"
    )
    assert apt.repository_state(REPOSITORY).rivals == ()


def test_flat_repository_with_architecture_variable(host: FakeHost, apt: pk.Apt) -> None:
    """NVIDIA's own instructions write $(ARCH) where the definition here has the architecture."""
    host.files["/etc/apt/sources.list.d/nvidia.list"] = (
        b"deb [signed-by=/k] https://nvidia.github.io/x/stable/deb/$(ARCH) /\n"
    )
    assert apt.repository_state(FLAT).rivals == ("/etc/apt/sources.list.d/nvidia.list",)


def test_indexed(host: FakeHost, apt: pk.Apt) -> None:
    assert not apt.repository_state(FLAT).indexed
    host.files["/var/lib/apt/lists/nvidia.github.io_x_stable_deb_amd64_Packages"] = b""
    host.files["/var/lib/apt/lists/download.docker.com_linux_ubuntu_dists_noble_stable_binary-amd64_Packages"] = b""
    assert apt.repository_state(FLAT).indexed
    assert apt.repository_state(REPOSITORY).indexed


# -- dnf ------------------------------------------------------------------------------------------


@pytest.fixture
def dnf(host: FakeHost) -> pk.Dnf:
    host.dirs.add("/etc/yum.repos.d")
    return pk.Dnf(host)


def test_dnf_installed_and_locked(host: FakeHost, dnf: pk.Dnf) -> None:
    host.commands["rpm -qa *"] = (
        "nvidia-open\t3:580.95.05-1.el9\tx86_64\nlibx\t1-1\ti686\nlibx\t1-2\tx86_64\nkernel\t5-1\tx86_64\nkernel\t5-2\tx86_64\n"
    )
    host.files["/etc/dnf/plugins/versionlock.list"] = (
        b"# c\nnvidia-open-3:580.95.05-1.el9.*\nkernel-0:5-1.*\n!libx-0:1-2.*\n"
    )
    found = dnf.installed("*")
    assert found["nvidia-open"].held
    assert found["libx"].version == "1-2"
    assert not found["libx"].held
    assert found["kernel"].version == "5-2"
    assert not found["kernel"].held


def test_dnf5_lock_file(host: FakeHost, dnf: pk.Dnf) -> None:
    host.commands["rpm -qa *"] = "nvidia-open\t3:580.95.05-1.fc44\tx86_64\n"
    host.files["/etc/dnf/versionlock.toml"] = (
        b'version = "1.0"\n[[packages]]\nname = "nvidia-open"\n[[packages.conditions]]\nkey = "evr"\n'
    )
    assert dnf.installed("nvidia-open")["nvidia-open"].held


def test_dnf_repository(host: FakeHost, dnf: pk.Dnf) -> None:
    host.commands["dnf *"] = ""
    repository = pk.Repository(
        "toolkit", "https://x/rpm/x86_64", "https://x/gpgkey", description="Toolkit", module_hotfixes=True
    )
    assert len(changes(dnf, repository)) == 1
    dnf.apply_repository(repository)
    assert host.files["/etc/yum.repos.d/toolkit.repo"].decode() == (
        "# Managed by gpu_fleet.nim.\n[toolkit]\nname=Toolkit\nbaseurl=https://x/rpm/x86_64\nenabled=1\ngpgcheck=1\n"
        "repo_gpgcheck=0\ngpgkey=https://x/gpgkey\nmodule_hotfixes=1\n"
    )
    assert changes(dnf, repository) == []


def test_dnf_unreachable_repository(host: FakeHost, dnf: pk.Dnf) -> None:
    host.commands["dnf *"] = (
        1,
        "",
        "Errors during downloading metadata for repository 'docker':\n  - Status code: 404\n"
        "Error: Failed to download metadata for repo 'docker': Cannot download repomd.xml",
    )
    with pytest.raises(FleetError) as caught:
        dnf.apply_repository(REPOSITORY)
    assert caught.value.reason == "repository_unreachable"
    assert "Cannot download repomd.xml" in caught.value.message
    assert not host.files


def test_dnf_upgrade_and_downgrade(host: FakeHost, dnf: pk.Dnf) -> None:
    host.commands.update({"rpm -qa *": "a\t2-1\tx86_64\nb\t1-1\tx86_64\n", "dnf *": ""})
    dnf.install({"a": "1-1", "b": "2-1", "c": None})
    calls = [" ".join(call) for call in host.calls if call[0] == "dnf"]
    assert calls == [
        "dnf -q -y install --disableplugin=versionlock b-2-1 c",
        "dnf -q -y downgrade --disableplugin=versionlock a-1-1",
    ]


def test_dnf_available(host: FakeHost, dnf: pk.Dnf) -> None:
    host.commands["dnf -q -C repoquery *"] = "a\t0:1.9-1\trepo\na\t0:1.10-1\trepo\na\t3:0.1-1\trepo\n"
    assert [offer.version for offer in dnf.available("a")["a"]] == ["3:0.1-1", "1.10-1", "1.9-1"]


def test_dnf_hold_installs_the_plugin(host: FakeHost, dnf: pk.Dnf) -> None:
    host.commands.update({"rpm -q *": (1, "", ""), "rpm -qa *": "", "dnf *": ""})
    dnf.hold("a")
    calls = [" ".join(call) for call in host.calls if call[0] == "dnf"]
    assert calls[0].endswith("python3-dnf-plugin-versionlock")
    assert calls[-1] == "dnf -q -y versionlock add a"


@pytest.mark.parametrize(
    ("stderr", "cause"),
    [
        # dnf 4.14.0 and 4.23.0, word for word.
        (
            "Error: \n Problem: conflicting requests\n  - nothing provides /usr/bin/python3 needed by dkms-3.2.2-1.el10.noarch "
            "from cuda-rhel10\n",
            "Problem: conflicting requests (nothing provides /usr/bin/python3 needed by dkms-3.2.2-1.el10.noarch from "
            "cuda-rhel10).",
        ),
        ("Error: Unable to find a match: no-such-package\n", "Error: Unable to find a match: no-such-package."),
        (
            "Package a-1-1.el10.x86_64.rpm is not signed\nError: GPG check FAILED\n",
            "Package a-1-1.el10.x86_64.rpm is not signed.",
        ),
        ("Killed\n", "Killed."),
    ],
)
def test_dnf_cause(host: FakeHost, dnf: pk.Dnf, stderr: str, cause: str) -> None:
    host.commands.update({"rpm *": "", "dnf *": (1, "", stderr)})
    with pytest.raises(FleetError) as caught:
        dnf.install({"a": None})
    assert cause in caught.value.message


def test_module_stream_switch(host: FakeHost, dnf: pk.Dnf) -> None:
    host.commands["dnf *"] = ""
    host.files["/etc/dnf/modules.d/nvidia-driver.module"] = (
        b"[nvidia-driver]\nname=nvidia-driver\nstream=570-open\nprofiles=\nstate=enabled\n"
    )
    dnf.switch_stream("nvidia-driver", "570-open")
    assert host.calls == []
    dnf.switch_stream("nvidia-driver", "580-open")
    assert [call[3:] for call in host.calls] == [
        ("module", "reset", "nvidia-driver"),
        ("module", "enable", "nvidia-driver:580-open"),
    ]


# -- choice ---------------------------------------------------------------------------------------


def test_choice_of_the_tool(host: FakeHost) -> None:
    assert isinstance(pk.package_manager(host, OsRelease("ubuntu")), pk.Apt)
    assert isinstance(pk.package_manager(host, OsRelease("rocky")), pk.Dnf)
    with pytest.raises(FleetError, match="is not supported"):
        pk.package_manager(host, OsRelease("arch"))
