# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Steps of a change of the driver's packages that only need the host and the tool."""

from __future__ import annotations

import re
import typing as t

from ._apt import run_when_free
from ._dnf import LISTS_AS_THEY_ARE, Dnf
from ._errors import FleetError
from ._host import Host
from ._nvidia_driver_packages import PackagePlan, is_driver_package
from ._nvidia_driver_state import DriverState, headers_unavailable
from ._packages import PackageManager

#: Name of the driver's module on EL 8 and 9.
MODULE = "nvidia-driver"
_APT_ENVIRONMENT = {"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1"}


def finish_interrupted(host: Host, manager: PackageManager) -> None:
    """Finish an interrupted transaction. Driver packages that cannot be finished (their module does not build), and the
    headers of other kernels (which dkms builds it for) are removed: the wanted ones are installed right after."""
    try:
        manager.repair()
    except FleetError as error:
        broken = manager.interrupted()
        # Another tool may be about to finish what it has unpacked.
        removable = all(is_driver_package(name) or _of_other_kernel(host, name) for name in broken)
        if error.reason == "package_lock" or not broken or not removable:
            raise
        manager.remove(*broken, purge=True)


def _of_other_kernel(host: Host, package: str) -> bool:
    """Headers that the running kernel can do without."""
    return package.startswith("linux-headers-") and host.kernel_release() not in package


def guard_removal(host: Host, plan: PackagePlan, names: t.Sequence[str]) -> None:
    """Refuse when packages that are not the driver's would go with it."""
    if plan.manager != "apt":
        return
    result = host.run(["apt-get", "-s", "-q", "purge", "--allow-change-held-packages", *names], timeout=300)
    going = re.findall(r"^(?:Purg|Remv) (\S+)", result.stdout, re.MULTILINE)
    strangers = [
        name
        for name in going
        if not is_driver_package(name)
        and not re.match(r"(linux-(modules|objects|signatures)-nvidia|.*nvidia|libnvidia|libcuda)", name)
    ]
    if strangers:
        raise FleetError(
            "would_remove",
            "Replacing %s would remove %s as well, which the driver does not own; remove it yourself if it is not "
            "needed, and run again." % (", ".join(names[:4]), ", ".join(strangers[:8])),
            packages=strangers,
        )


def download_packages(host: Host, manager: PackageManager, wanted: t.Mapping[str, str]) -> None:
    """Have the packages on the host before anything stops."""
    if not wanted:
        return
    if isinstance(manager, Dnf):
        manager.download(wanted)
        return
    command = ["apt-get", "-q", "-y", "install", "--download-only", "--no-install-recommends"]
    command += ["--allow-downgrades", "--allow-change-held-packages", "-o", "DPkg::Lock::Timeout=600"]
    command += ["%s=%s" % item for item in wanted.items()]
    # The result is not judged: with the pinning package not yet there the resolver may say no to what works later,
    # and the installation itself names every cause better.
    run_when_free(host, command, env=_APT_ENVIRONMENT, timeout=3600)


def switch_stream(host: Host, stream: str) -> None:
    """EL 8 and 9: dnf refuses a second stream of a module until the first is reset.

    Raises:
        FleetError: ``stream_failed``.
    """
    reset_stream(host)
    _module_command(
        host,
        ["enable", "%s:%s" % (MODULE, stream)],
        "Check that NVIDIA's repository has this stream (dnf module list %s)." % MODULE,
    )


def reset_stream(host: Host) -> None:
    """EL 8 and 9: no stream of the driver's module is enabled any more.

    Raises:
        FleetError: ``stream_failed``.
    """
    _module_command(host, ["reset", MODULE], "Check that NVIDIA's repository can be reached.")


def _module_command(host: Host, arguments: t.Sequence[str], remedy: str) -> None:
    # With the lists that are there, for a repository that is away; with new ones where those do not have it.
    if host.run(["dnf", "-q", "-y", LISTS_AS_THEY_ARE, "module", *arguments], timeout=600).ok:
        return
    host.check(
        ["dnf", "-q", "-y", "module", *arguments],
        reason="stream_failed",
        doing="dnf module %s" % " ".join(arguments),
        remedy=remedy,
        timeout=600,
    )


def install_prerequisites(host: Host, manager: PackageManager, state: DriverState, plan: PackagePlan) -> None:
    if not plan.prerequisites or all(name in state.installed for name in plan.prerequisites):
        return
    if plan.extras and not manager.available(*plan.prerequisites):
        if state.os.id in ("rocky", "almalinux", "centos"):
            manager.install({"epel-release": None})
            host.run(["crb", "enable"], timeout=120)
            manager.refresh()
        else:
            raise FleetError(
                "dkms_unavailable",
                "No enabled repository has dkms, which builds the kernel module; enable EPEL and CodeReady Builder "
                "(subscription-manager repos --enable codeready-builder-for-rhel-%d-%s-rpms) and run again."
                % (state.os.major, state.machine),
            )
    manager.install(dict.fromkeys(plan.prerequisites))


def install_headers(host: Host, manager: PackageManager, package: str) -> None:
    try:
        if isinstance(manager, Dnf):
            # They lie ready where a host is out of service, and then the repository need not be there.
            manager.download({package: None})
        manager.install({package: None})
    except FleetError as error:
        raise headers_unavailable(host.kernel_release(), error.message.rstrip("."), error.facts) from error


def install_later_headers(host: Host, manager: PackageManager, package: str) -> None:
    """Headers of kernels that are yet to come are installed where they are on offer, and not missed elsewhere.

    They are not left half configured where the driver does not build for their kernel: dpkg would fail ever after.

    Raises:
        FleetError: As the package manager.
    """
    try:
        manager.install({package: None})
    except FleetError as error:
        broken = [name for name in manager.interrupted() if _of_other_kernel(host, name)]
        if broken:
            manager.remove(*broken, purge=True)
            error.message += (
                " It was taken away again. Where the driver does not build for the kernel that upgrades bring, choose a newer "
                "branch, or set nvidia_driver_kernel_headers to false and keep the kernel as it is."
            )
        elif error.reason != "package_failed":
            pass
        elif not manager.available(package):
            return
        else:
            error.message += " Or set nvidia_driver_kernel_headers to false when headers come from elsewhere."
        raise
