# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What would keep a host from being upgraded, and the packages on its disk, before it is taken out of service."""

from __future__ import annotations

import contextlib
import re
import typing as t
from dataclasses import dataclass, replace

from ._apt import apt_cause, lock_held, run_when_free
from ._disk_space import Need, check_space, file_systems
from ._dnf import Dnf
from ._docker_api import DockerApi
from ._driver_branches import cuda_of_branch, upstream_version
from ._driver_transaction import install_prerequisites
from ._errors import FleetError
from ._gpu_inventory import observe_gpus
from ._host import Host
from ._next_kernel import next_kernel
from ._nim_image import environment_of, requirements_off
from ._nvidia_driver import NvidiaDriver
from ._nvidia_driver_packages import PackagePlan, apt_preferences, is_driver_package
from ._nvidia_driver_state import DriverState, headers_offered, headers_unavailable
from ._os_release import read_os_release
from ._packages import Package, PackageManager, package_manager, transaction_failed
from ._requirements import check as check_verdict
from ._requirements import evaluate
from ._rollout_services import Service, strangers
from ._verdict import OK, REFUSED, UNKNOWN, WARNING, Verdict, refusal

#: Bytes that building a kernel module takes besides the packages: sources and objects below /var/lib/dkms.
BUILD_SPACE = 1024**3
_DIRECTORY = "/run/gpu_fleet/prestage"
_STATUS = "/var/lib/dpkg/status"
_TIMEOUT = 3600
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Prestaged:
    """What lies ready on a host.

    Attributes:
        version: The driver that will be installed.
        packages: Name -> exact package version.
    """

    version: str
    packages: t.Mapping[str, str]


def precheck(
    host: Host,
    api: DockerApi,
    driver: NvidiaDriver,
    state: DriverState,
    services: t.Sequence[Service],
    *,
    version: str = "",
) -> list[Verdict]:
    """Verdicts on an upgrade of this host; changes nothing.

    Args:
        version: The driver that it will get; empty when only its branch is known.
    """
    found: list[Verdict] = []
    if not driver.kernel_module:
        text = "The kernel module of this host comes with its image (nvidia_driver_kernel_module is false)."
        remedy = "renew the image, and run the role nvidia_driver for the rest"
        found.append(Verdict("driver", REFUSED, text, remedy, "foreign_module"))
    try:
        driver.plan(state)
        plan = driver.package_plan(state)
        if not (state.headers or state.headers_offered or plan.headers in state.installed):
            raise headers_unavailable(state.kernel, "the package lists of the host do not have %s" % plan.headers)
        found.append(Verdict("driver", OK, "The driver can be installed."))
    except FleetError as error:
        found.append(refusal("driver", error))
    others = strangers(host, api, services)
    if others:
        text = "The GPUs are used by what this collection does not manage: %s." % "; ".join(others[:8])
        found.append(Verdict("gpu_in_use", REFUSED, text, "stop it, or move it to another host", "gpu_in_use"))
    else:
        found.append(Verdict("gpu_in_use", OK, "Nothing else uses the GPUs."))
    return found + _requirements(host, api, driver, services, version)


def check_next_kernel(host: Host, driver: NvidiaDriver, state: DriverState) -> list[Verdict]:
    """Whether the driver can be had for the kernel that a reboot would bring; one verdict where it cannot."""
    try:
        kernel, needed = _for_next_kernel(host, driver, state)
    except FleetError:
        # No driver for this host at all, which :func:`precheck` says.
        return []
    manager = package_manager(host, state.os)
    missing = [name for name in needed if not headers_offered(manager, name)]
    if not missing:
        return []
    text = (
        "A reboot would bring kernel %s, which is installed, and no repository has %s for it: it would be without driver."
        % (
            kernel,
            " and ".join(missing),
        )
    )
    remedy = "remove that kernel, or boot it and upgrade then, or set driver_upgrade_reboot to never"
    return [Verdict("next_kernel", REFUSED, text, remedy, "kernel_headers_unavailable", subject=kernel)]


def _for_next_kernel(host: Host, driver: NvidiaDriver, state: DriverState) -> tuple[str, list[str]]:
    """The kernel of the next boot if it is another one, and the packages that the driver then needs and that are missing.

    Raises:
        FleetError: As :meth:`NvidiaDriver.package_plan`.
    """
    kernel = next_kernel(host)
    if not kernel or not driver.kernel_module:
        return "", []
    now = driver.package_plan(state)
    then = driver.package_plan(replace(state, kernel=kernel))
    needed = [then.headers] if then.headers and not host.exists("/lib/modules/%s/build" % kernel) else []
    # Prebuilt modules have the kernel in their name.
    needed += [choice.names[0] for choice in then.choices if choice not in now.choices]
    return kernel, [name for name in needed if name not in state.installed]


def _requirements(
    host: Host, api: DockerApi, driver: NvidiaDriver, services: t.Sequence[Service], version: str
) -> list[Verdict]:
    """Whether the images of the services run with the new driver, and are on the host to be started again."""
    found = []
    off = requirements_off(host)
    inventory = observe_gpus(host)
    # The newest release of a branch satisfies what any of them does.
    expected = version or driver.version or driver.branch + ".999"
    words = "this host is to get driver %s" % (version or driver.version or "branch " + driver.branch)
    for service in services:
        if not service.active:
            continue
        name = service.image or service.reference
        try:
            image = api.image(service.reference)
            if image is None:
                text = "The image %s of service %s is not on the host, so it could not be started again." % (
                    name,
                    service.name,
                )
                found.append(Verdict("image", REFUSED, text, "run site first", "image_missing", subject=name))
                continue
            if off:
                continue
            verdict = evaluate(
                environment_of(image),
                expected,
                cuda_of_branch(driver.branch),
                [(gpu.brand, None) for gpu in inventory.gpus],
                architectures=[gpu.architecture for gpu in inventory.gpus or inventory.pci],
                image=name,
                runs=words,
            )
            check_verdict(verdict, image=name)
        except FleetError as error:
            if error.reason.startswith("docker_"):
                text = "What %s requires of the driver is not known: %s" % (name, error.message)
                found.append(Verdict("requirement", UNKNOWN, text, "", error.reason, subject=name))
            else:
                found.append(refusal("requirement", error, name))
            continue
        found.append(Verdict("requirement", OK, "%s runs with the new driver." % name, subject=name))
    return found


# -- downloads ------------------------------------------------------------------------------------


def way_back(host: Host, make: t.Callable[[], NvidiaDriver | None]) -> Verdict:
    """The packages of the driver that is there, for a rollback that then needs no repository.

    Args:
        make: Gives that driver at its exact version; None when there is none.
    """
    try:
        old = make()
        if old is None:
            return Verdict("way_back", WARNING, "There is no driver now that could be put back.", "", "no_old_driver")
        state = old.observe(host)
        manager = package_manager(host, read_os_release(host))
        plan = old.package_plan(state)
        with _packages_of(manager, plan):
            resolved = old.resolve(manager, plan, {})
            if isinstance(manager, Dnf):
                _download_installed(manager, old.version, resolved, state.installed)
            else:
                _download_apt(host, manager, old, old.version, resolved)
        return Verdict("way_back", OK, "Driver %s can be put back." % old.version)
    except FleetError as error:
        text = "The driver that is there now could not be put back: %s" % error.message
        return Verdict("way_back", WARNING, text, "", error.reason)


def _packages_of(manager: PackageManager, plan: PackagePlan) -> t.ContextManager[None]:
    """Where a module stream has the packages of a plan (EL 8 and 9), they are seen in it; what is enabled stays so."""
    return (
        manager.as_with_stream("nvidia-driver", plan.stream) if isinstance(manager, Dnf) else contextlib.nullcontext()
    )


def _download_installed(
    manager: Dnf, version: str, resolved: t.Mapping[str, str], installed: t.Mapping[str, Package]
) -> None:
    """Download the driver that is there: of an installed package dnf does not look at what it depends on."""
    parts = {
        name: package.version
        for name, package in installed.items()
        if is_driver_package(name) and upstream_version(package.version) == version
    }
    offers = manager.available(*parts)
    gone = [name for name in parts if all(offer.version != parts[name] for offer in offers.get(name, []))]
    if gone:
        raise FleetError(
            "version_not_available",
            "No repository offers %s at version %s any more." % (", ".join(gone[:8]), version),
        )
    manager.download({**resolved, **parts}, again=True)


def prestage(host: Host, driver: NvidiaDriver, *, reboot: bool = False) -> tuple[Prestaged, list[Verdict]]:
    """Download everything that the change of the driver installs, and look whether it fits.

    Nothing of the driver is installed; on EL what builds and locks it is, where it is missing.

    Args:
        reboot: Whether the host may be rebooted, and have another kernel then.

    Raises:
        FleetError: ``repository_unreachable``, ``version_not_available``, ``package_failed``, ``disk_full``, ….
    """
    state = driver.observe(host)
    manager = package_manager(host, read_os_release(host))
    plan = driver.package_plan(state)
    for change in driver.plan(state):
        # Without it nothing of the branch is on offer; the installed packages keep their versions.
        if change.action == "repository":
            manager.apply_repository(change.data["repository"])
        elif change.action == "components":
            driver.apply(host, change)
    if isinstance(manager, Dnf):
        install_prerequisites(host, manager, state, plan)
        if driver.hold:
            manager.install_lock_plugin()
    with _packages_of(manager, plan):
        return _prestage(host, manager, driver, plan, state, reboot)


def _prestage(
    host: Host, manager: PackageManager, driver: NvidiaDriver, plan: PackagePlan, state: DriverState, reboot: bool
) -> tuple[Prestaged, list[Verdict]]:
    resolved = driver.resolve(manager, plan, state.installed)
    version = next(
        (
            upstream_version(resolved[name])
            for choice in plan.choices
            if choice.versioned and not choice.optional
            for name in choice.names
            if name in resolved
        ),
        driver.version or state.user_space,
    )
    wanted: dict[str, str | None] = dict(resolved)
    if plan.headers and not state.headers and plan.headers not in state.installed and manager.available(plan.headers):
        wanted[plan.headers] = None
    wanted.update((name, None) for name in state.later_headers if not state.lists_silent)
    if reboot:
        wanted.update((name, None) for name in _for_next_kernel(host, driver, state)[1] if manager.available(name))
    verdicts = [Verdict("packages", OK, "Driver %s is on offer with all its parts at that version." % version)]
    if isinstance(manager, Dnf):
        size, images = manager.download(wanted), 0
    else:
        size, images = _download_apt(host, manager, driver, version, wanted)
    needs = [Need("/usr", size, "packages"), Need("/var/lib/dkms", BUILD_SPACE, "the build")]
    if images:
        needs.append(Need("/boot", images, "the initial RAM disk"))
    check_space(file_systems(host, needs))
    verdicts.append(Verdict("download", OK, "All packages of driver %s are on the disk." % version))
    verdicts.append(Verdict("disk", OK, "There is room for the packages and for building the module."))
    return Prestaged(version, resolved), verdicts


def _download_apt(
    host: Host, manager: PackageManager, driver: NvidiaDriver, version: str, wanted: t.Mapping[str, str | None]
) -> tuple[int, int]:
    """Download as if there were no driver, and with the preferences that will be in force.

    Parts of the old one would conflict with those of the new one or hold them back, although they go before these come.

    Returns:
        Bytes that it takes unpacked, and that the initial RAM disk does.
    """
    host.make_dir(_DIRECTORY, mode=0o700)
    host.write_file(_DIRECTORY + "/preferences", apt_preferences(driver.branch, version), mode=0o644)
    host.write_file(_DIRECTORY + "/status", without_driver(host.read_text(_STATUS) or ""), mode=0o644)
    command = ["apt-get", "-q", "-y", "install", "--download-only", "--no-install-recommends"]
    for option in (
        "DPkg::Lock::Timeout=600",
        "Dir::Etc::preferences=%s/preferences" % _DIRECTORY,
        "Dir::Etc::preferencesparts=/dev/null",
        "Dir::State::status=%s/status" % _DIRECTORY,
        # What is worked out from that status must not be kept.
        "Dir::Cache::pkgcache=",
        "Dir::Cache::srcpkgcache=",
    ):
        command += ["-o", option]
    command += [name if exact is None else "%s=%s" % (name, exact) for name, exact in wanted.items()]
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        result = run_when_free(host, command, env=environment, timeout=_TIMEOUT)
        if not result.ok and not lock_held(result):
            # Lists older than the repository name files that are gone.
            manager.refresh()
            result = run_when_free(host, command, env=environment, timeout=_TIMEOUT)
        if not result.ok:
            raise transaction_failed("Downloading driver %s" % version, result, apt_cause(result))
    finally:
        host.remove(_DIRECTORY)
    # The driver's packages have it made anew, and the old one goes only when the new one is there.
    image = host.stat("/boot/initrd.img-%s" % host.kernel_release())
    return installed_size(result.stdout), image.size if image is not None else 0


def without_driver(status: str) -> str:
    """dpkg's status file (deb822, dpkg(1)) without the packages of the driver."""
    kept = []
    for block in status.split("\n\n"):
        found = re.search(r"(?m)^Package: *(\S+)", block)
        if found and not is_driver_package(found.group(1)):
            kept.append(block.strip("\n"))
    return "\n\n".join([*kept, ""])


def installed_size(output: str) -> int:
    """Bytes that apt says a transaction takes when it is unpacked; 0 when it frees some or does not say."""
    found = re.search(r"After this operation, ([0-9.,]+) (B|kB|MB|GB) of additional disk space", output)
    return int(float(found.group(1).replace(",", "")) * _UNITS[found.group(2)]) if found else 0
