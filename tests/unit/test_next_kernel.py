# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The kernel of the next boot, and what an upgrade of the driver does about it."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._next_kernel import next_kernel
from driver_world import KERNEL
from fake_host import FakeHost
from upgrade_world import UpgradeWorld, call, install_fakes, roll

NEW = "6.8.0-100-generic"


def install_kernel(host: FakeHost, release: str) -> None:
    host.files["/lib/modules/%s/modules.order" % release] = b""
    host.files["/boot/vmlinuz-%s" % release] = b""


@pytest.mark.parametrize(
    ("running", "installed", "found"),
    [
        ("6.8.0-45-generic", ["6.8.0-45-generic"], ""),
        ("6.8.0-45-generic", ["6.8.0-9-generic", "6.8.0-45-generic", "6.8.0-100-generic"], "6.8.0-100-generic"),
        ("6.8.0-45-generic", ["6.8.0-100-lowlatency", "6.8.0-1029-aws"], ""),
        ("6.12.43+deb13-amd64", ["6.12.9+deb13-amd64", "6.12.57+deb13-amd64"], "6.12.57+deb13-amd64"),
        ("6.1.0-18-cloud-amd64", ["6.1.0-40-amd64"], ""),
        (
            "5.14.0-570.12.1.el9_6.x86_64",
            ["5.14.0-570.9.1.el9_6.x86_64", "5.14.0-570.21.1.el9_6.x86_64", "5.14.0-611.1.1.el9_7.x86_64+debug"],
            "5.14.0-570.21.1.el9_6.x86_64",
        ),
        ("5.14.0-570.12.1.el9_6.aarch64+64k", ["5.14.0-570.21.1.el9_6.aarch64"], ""),
    ],
)
def test_the_newest_of_the_same_kind(host: FakeHost, running: str, installed: list[str], found: str) -> None:
    host.release = running
    for release in installed:
        install_kernel(host, release)
    assert next_kernel(host) == found


def test_what_is_left_of_a_kernel_is_none(host: FakeHost) -> None:
    host.release = KERNEL
    host.files["/lib/modules/%s/updates/dkms/nvidia.ko" % NEW] = b""
    assert next_kernel(host) == ""
    # Without an image nothing boots it; EL has a copy beside the modules.
    host.files["/lib/modules/%s/modules.order" % NEW] = b""
    assert next_kernel(host) == ""
    host.files["/lib/modules/%s/vmlinuz" % NEW] = b""
    assert next_kernel(host) == NEW


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> UpgradeWorld:
    world = UpgradeWorld()
    install_fakes(monkeypatch, world)
    install_kernel(world, NEW)
    return world


def offer(world: UpgradeWorld, *names: str) -> None:
    madison = world.commands["apt-cache madison *"]
    assert callable(madison)
    ask: t.Callable[..., str] = madison

    def answer(host: t.Any, argv: tuple[str, ...], *rest: t.Any) -> str:
        return ask(host, argv, *rest) + "".join(
            "%s | 6.8.0 | http://u Packages\n" % name for name in argv if name in names
        )

    world.commands["apt-cache madison *"] = answer


def test_headers_of_the_kernel_that_a_reboot_would_bring_are_downloaded(world: UpgradeWorld) -> None:
    offer(world, "linux-headers-generic", "linux-headers-" + NEW)
    call(world, "prestaged")
    assert world.ran(r"--download-only .* linux-headers-%s( |$)" % NEW)
    roll(world)
    assert world.serves() and world.loaded == "580.95.05"


def test_headers_of_kernels_that_upgrades_bring_are_downloaded(world: UpgradeWorld) -> None:
    world.packages["linux-image-generic"] = ["6.8.0-45.45", "ii"]
    offer(world, "linux-headers-generic", "linux-headers-" + NEW)
    call(world, "prestaged")
    assert world.ran(r"--download-only .* linux-headers-generic( |$)")
    roll(world)
    assert world.serves() and world.packages["linux-headers-generic"][1] == "ii"


def test_a_kernel_without_headers_is_refused_before_anything_is_stopped(world: UpgradeWorld) -> None:
    offer(world, "linux-headers-generic")
    with pytest.raises(FleetError, match="kernel %s, which is installed.*linux-headers-%s" % (NEW, NEW)) as caught:
        call(world, "prestaged")
    assert caught.value.reason == "kernel_headers_unavailable" and world.serves()
    assert not world.ran("--download-only")
    # Where there is no reboot there is no other kernel.
    call(world, "prestaged", reboot="never")
    assert not world.ran("--download-only .*linux-headers-")


@pytest.mark.parametrize("there", ["package", "build"])
def test_headers_that_are_there_are_enough(world: UpgradeWorld, there: str) -> None:
    offer(world, "linux-headers-generic")
    if there == "package":
        world.packages["linux-headers-" + NEW] = ["6.8.0", "ii"]
    else:
        world.dirs.add("/lib/modules/%s/build" % NEW)
    call(world, "prestaged")
    assert not world.ran("--download-only .*linux-headers-")


def test_a_host_that_is_out_already_is_not_kept_from_coming_back(world: UpgradeWorld) -> None:
    offer(world, "linux-headers-generic", "linux-headers-" + NEW)
    call(world, "prestaged")
    call(world, "drained")
    world.without("linux-headers-" + NEW)
    roll(world)
    assert world.serves() and world.loaded == "580.95.05"
