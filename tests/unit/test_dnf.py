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
def test_dnf_cause(host: FakeHost, dnf: Dnf, stderr: str, cause: str) -> None:
    host.commands.update({"rpm *": "", "dnf *": (1, "", stderr)})
    with pytest.raises(FleetError) as caught:
        dnf.install({"a": None})
    assert cause in caught.value.message


def test_module_stream_switch(host: FakeHost, dnf: Dnf) -> None:
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
