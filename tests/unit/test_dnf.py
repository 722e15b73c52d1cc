# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""rpm and dnf: packages, version locks, repositories, module streams."""

from __future__ import annotations

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._dnf import Dnf
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._packages import Repository
from fake_host import FakeHost
from package_fakes import REPOSITORY, changes


@pytest.fixture
def dnf(host: FakeHost) -> Dnf:
    host.dirs.add("/etc/yum.repos.d")
    return Dnf(host)


def test_dnf_installed_and_locked(host: FakeHost, dnf: Dnf) -> None:
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


def test_dnf5_lock_file(host: FakeHost, dnf: Dnf) -> None:
    host.commands["rpm -qa *"] = "nvidia-open\t3:580.95.05-1.fc44\tx86_64\n"
    host.files["/etc/dnf/versionlock.toml"] = (
        b'version = "1.0"\n[[packages]]\nname = "nvidia-open"\n[[packages.conditions]]\nkey = "evr"\n'
    )
    assert dnf.installed("nvidia-open")["nvidia-open"].held


def test_dnf_repository(host: FakeHost, dnf: Dnf) -> None:
    host.commands["dnf *"] = ""
    repository = Repository(
        "toolkit", "https://x/rpm/x86_64", "https://x/gpgkey", description="Toolkit", module_hotfixes=True
    )
    assert len(changes(dnf, repository)) == 1
    dnf.apply_repository(repository)
    assert host.files["/etc/yum.repos.d/toolkit.repo"].decode() == (
        "# Managed by gpu_fleet.nim.\n[toolkit]\nname=Toolkit\nbaseurl=https://x/rpm/x86_64\nenabled=1\ngpgcheck=1\n"
        "repo_gpgcheck=0\ngpgkey=https://x/gpgkey\nmodule_hotfixes=1\n"
    )
    assert changes(dnf, repository) == []


def test_dnf_unreachable_repository(host: FakeHost, dnf: Dnf) -> None:
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


def test_dnf_upgrade_and_downgrade(host: FakeHost, dnf: Dnf) -> None:
    host.commands.update({"rpm -qa *": "a\t2-1\tx86_64\nb\t1-1\tx86_64\n", "dnf *": ""})
    dnf.install({"a": "1-1", "b": "2-1", "c": None})
    calls = [" ".join(call) for call in host.calls if call[0] == "dnf"]
    assert calls == [
        "dnf -q -y install --disableplugin=versionlock b-2-1 c",
        "dnf -q -y downgrade --disableplugin=versionlock a-1-1",
    ]


def test_dnf_available(host: FakeHost, dnf: Dnf) -> None:
    host.commands["dnf -q -C repoquery *"] = "a\t0:1.9-1\trepo\na\t0:1.10-1\trepo\na\t3:0.1-1\trepo\n"
    assert [offer.version for offer in dnf.available("a")["a"]] == ["3:0.1-1", "1.10-1", "1.9-1"]


def test_dnf_hold_installs_the_plugin(host: FakeHost, dnf: Dnf) -> None:
    host.commands.update({"rpm -q *": (1, "", ""), "rpm -qa *": "", "dnf *": ""})
    dnf.hold("a")
    calls = [" ".join(call) for call in host.calls if call[0] == "dnf"]
    assert calls[0].endswith("python3-dnf-plugin-versionlock")
    assert calls[-1] == "dnf -q -y --setopt=*.metadata_expire=-1 versionlock add a"


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
def test_dnf_cause(host: FakeHost, dnf: Dnf, stderr: str, cause: str) -> None:
    host.commands.update({"rpm *": "", "dnf *": (1, "", stderr)})
    with pytest.raises(FleetError) as caught:
        dnf.install({"a": None})
    assert cause in caught.value.message


# -- downloads

TABLE = """\
Dependencies resolved.
================================================================================
 Package                   Arch     Version                 Repository     Size
================================================================================
Downgrading:
 libnvidia-ml              x86_64   3:580.95.05-1.el10      cuda-rhel10   6.0 k
 kmod-nvidia-a-name-that-is-too-long-for-a-column
                           noarch   3:580.95.05-1.el10      cuda-rhel10    71 M
Installing dependencies:
 egl                       x86_64   1.1-2                   baseos        812\x20
Removing:
 nvidia-old                x86_64   1-1                     @cuda-rhel10  6.0 k

Transaction Summary
================================================================================
"""


def _ran(host: FakeHost, text: str) -> list[str]:
    return [line for line in (" ".join(call) for call in host.calls) if text in line]


def test_a_download_that_lies_there_asks_nobody(host: FakeHost, dnf: Dnf) -> None:
    host.commands = {
        "rpm -qa *": "b\t2-1\tx86_64\n",
        "dnf -y -C install *": TABLE,
        "dnf -q -C repoquery *": "libnvidia-ml.x86_64\t100\nkmod-nvidia-a-name-that-is-too-long-for-a-column.noarch\t2000\n"
        "egl.x86_64\t30000\negl.x86_64\t30000\n",
        "dnf *": "",
    }
    assert dnf.download({"a": "1-1", "b": "2-1", "c": None}) == 32100
    assert _ran(host, "downloadonly") == [
        "dnf -y -C install --allowerasing a-1-1 c --downloadonly --setopt=keepcache=1 --disableplugin=versionlock"
    ]
    assert _ran(host, "repoquery")[0].endswith(
        " libnvidia-ml-3:580.95.05-1.el10.x86_64 kmod-nvidia-a-name-that-is-too-long-for-a-column-3:580.95.05-1.el10.noarch"
        " egl-1.1-2.x86_64"
    )
    # It is then installed with the lists that it was chosen by.
    dnf.install({"a": "1-1"})
    assert _ran(host, " install ")[-1] == (
        "dnf -q -y --setopt=*.metadata_expire=-1 install --disableplugin=versionlock a-1-1"
    )


def test_what_is_installed_is_downloaded_again_only_where_it_is_asked_for(host: FakeHost, dnf: Dnf) -> None:
    host.commands = {"rpm -qa *": "b\t2-1\tx86_64\n", "dnf *": ""}
    assert dnf.download({"b": "2-1"}) == 0 and not _ran(host, "downloadonly")
    dnf.download({"b": "2-1"}, again=True)
    assert [line.split()[3:5] for line in _ran(host, "downloadonly")] == [["reinstall", "b-2-1"]]


# dnf 4.23.0, word for word but for the names.
DAMAGED = (
    "[MIRROR] a.rpm: Downloading successful, but checksum doesn't match. Calculated: 36(sha256)  Expected: 58(sha256) \n"
    "[FAILED] a.rpm: No more mirrors to try - All mirrors were already tried without success\n"
)
NOT_HAD = "Error: Error downloading packages:\n  a-3:1-1.x86_64: Cannot download, all mirrors were already tried\n"


@pytest.mark.parametrize(
    ("stdout", "stderr", "reason", "said"),
    [
        (DAMAGED, NOT_HAD, "package_damaged", "a.rpm: Downloading successful, but checksum doesn't match"),
        ("[MIRROR] a.rpm: Status code: 404 for http://x/a.rpm (IP: 1.2.3.4)\n", NOT_HAD, "package_failed", "code: 404"),
        ("", "[Errno 28] No space left on device\n", "disk_full", "No space left"),
        (
            "",
            "Error: \n Problem: conflicting requests\n  - nothing provides x needed by y\n",
            "package_failed",
            "needed by y",
        ),
    ],
)
def test_a_download_says_why_it_failed(
    host: FakeHost, dnf: Dnf, stdout: str, stderr: str, reason: str, said: str
) -> None:
    host.commands = {"dnf * makecache *": "", "rpm *": "", "dnf *": (1, stdout, stderr)}
    with pytest.raises(FleetError) as caught:
        dnf.download({"a": "1-1"})
    assert caught.value.reason == reason and said in caught.value.message
    # What a full disk needs is not a newer list.
    assert bool(_ran(host, "makecache")) == (reason != "disk_full")


def test_a_download_from_a_repository_that_is_away(host: FakeHost, dnf: Dnf) -> None:
    host.commands = {
        "rpm *": "",
        "dnf *": (1, "", "Error: Failed to download metadata for repo 'x': Cannot download\n"),
    }
    with pytest.raises(FleetError) as caught:
        dnf.download({"a": "1-1"})
    assert caught.value.reason == "repository_unreachable"


def test_packages_of_another_stream_are_seen_without_enabling_it(host: FakeHost, dnf: Dnf) -> None:
    enabled = b"[nvidia-driver]\nname=nvidia-driver\nstream=570-open\nprofiles=\nstate=enabled\n"
    host.files["/etc/dnf/modules.d/nvidia-driver.module"] = enabled
    host.files["/etc/dnf/modules.d/nodejs.module"] = b"[nodejs]\nstream=20\nstate=enabled\n"
    host.files["/run/gpu_fleet/modules.d/gone.module"] = b"[gone]\nstream=1\nstate=enabled\n"
    seen: list[dict[str, bytes]] = []

    def look(host: FakeHost, argv: tuple[str, ...], *_rest: object) -> str:
        assert argv[:6] == (
            *("unshare", "--mount", "sh", "-c"),
            *('mount --bind "$0" /etc/dnf/modules.d && exec "$@"', "/run/gpu_fleet/modules.d"),
        )
        seen.append({path: text for path, text in host.files.items() if path.startswith("/run/gpu_fleet/modules.d/")})
        return "a\t3:580.95.05-1\tcuda\n"

    host.commands = {"unshare *": look, "dnf *": "", "rpm *": ""}
    with dnf.as_with_stream("nvidia-driver", "580-open"):
        assert dnf.available("a")["a"][0].version == "3:580.95.05-1"
        dnf.download({"a": "3:580.95.05-1"})
    assert seen[0] == {
        "/run/gpu_fleet/modules.d/nvidia-driver.module": enabled.replace(b"570", b"580"),
        "/run/gpu_fleet/modules.d/nodejs.module": b"[nodejs]\nstream=20\nstate=enabled\n",
    }
    assert len(seen) == 2 and not _ran(host, "module ")
    # And afterwards everything is as it was.
    assert host.files["/etc/dnf/modules.d/nvidia-driver.module"] == enabled
    assert not host.exists("/run/gpu_fleet/modules.d")
    assert dnf.available("a") == {}
    with dnf.as_with_stream("nvidia-driver", "570-open"):
        assert dnf.available("a") == {}
