# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Which packages of which repository make a driver: a pure function for every supported distribution and branch.

Names and their changes between branches are NVIDIA's and the distributions'; see the installation guides of the
branches, the version-locking chapter, and the data in the unit tests, whose README says which are extracts of an index.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ._driver_branches import BRANCHLESS_FROM, OPEN, OPEN_BY_DEFAULT_FROM, branch_of_version, upstream_version
from ._errors import FleetError
from ._os_release import OsRelease
from ._packages import Package, Repository

#: Distributions that NVIDIA's repository serves and this collection installs.
SUPPORTED = ("ubuntu2204", "ubuntu2404", "debian12", "debian13", "rhel8", "rhel9", "rhel10")

#: What Debian's own archive has: distribution -> branch -> infix of its package names.
DEBIAN_BRANCHES: dict[str, dict[str, str]] = {
    "debian12": {"535": ""},
    "debian13": {"550": "", "535": "tesla-535-"},
}

#: Installed packages that can be part of a driver, as shell-style patterns for the package database.
QUERY_PATTERNS = (
    "*nvidia*",
    "cuda-drivers*",
    "libcuda1*",
    "libnvsdm*",
    "libxnvctrl*",
    "nvlsm",
    "dkms",
    "linux-headers-*",
    "linux-image-*",
    "kernel-devel*",
    "unattended-upgrades",
    "dnf-automatic",
)

_DRIVER = re.compile(
    r"^(cuda-drivers|nvidia-|libnvidia-|xserver-xorg-video-nvidia|libcuda1|libnvsdm|libxnvctrl|kmod-nvidia"
    r"|xorg-x11-nvidia|firmware-nvidia-gsp|libegl-nvidia|libgl1?x?-?.*nvidia|libgles.*nvidia|libglx-nvidia)"
)
# Not of the driver although the names look like it: they follow the toolkit, the kernel or CUDA.
_NOT_DRIVER = re.compile(
    r"^(nvidia-container|libnvidia-container|nvidia-docker|nvidia-cuda|nvidia-nsight|nvidia-gds|nvidia-fs"
    r"|nvidia-visual-profiler|nvidia-installer-cleanup|nvidia-support"
    r"|libnvidia-egl-(wayland|gbm))"
)


def is_driver_package(name: str) -> bool:
    """Whether a package belongs to the driver (and is held with it). Prebuilt modules follow the kernel: they do not."""
    return bool(_DRIVER.match(name)) and not _NOT_DRIVER.match(name)


@dataclass(frozen=True)
class Wish:
    """What is wanted, after ``auto`` was resolved against the host.

    Attributes:
        source: ``nvidia`` or ``distribution``.
        repository_url: Base of NVIDIA's repository or of a mirror of it, without trailing slash.
        repository_architecture: Directory below the distribution; empty = NVIDIA's for the machine.
        version: Exact driver version, or empty for any of the branch.
        flavour: ``open`` or ``proprietary``.
        signed_modules: Use the distribution's prebuilt signed modules where there are any (Secure Boot).
        kernel_headers: Install the headers of the running kernel, and of those that upgrades bring.
        kernel_module: Install the kernel module; False leaves it to somebody else where the packages allow that.
    """

    source: str
    repository_url: str
    branch: str
    version: str
    flavour: str
    fabric_manager: bool = False
    nvlink5: bool = False
    imex: bool = False
    persistenced: bool = True
    hold: bool = True
    repository_architecture: str = ""
    signed_modules: bool = False
    kernel_headers: bool = True
    kernel_module: bool = True


@dataclass(frozen=True)
class Choice:
    """One package that must be there.

    Attributes:
        names: The same thing under the names of different releases; the first that is on offer at the right
            version is installed.
        accepts: Pattern of installed packages that do as well.
        versioned: Whether its version must be the driver's.
        optional: Installed with the others where it is on offer, but not missed.
    """

    names: tuple[str, ...]
    accepts: str = ""
    versioned: bool = True
    optional: bool = False

    def installed_as(self, installed: t.Mapping[str, Package]) -> Package | None:
        """The installed package that fulfils this choice, whatever its version."""
        for name in self.names:
            if name in installed and installed[name].complete:
                return installed[name]
        if self.accepts:
            for name in sorted(installed):
                if re.fullmatch(self.accepts, name) and installed[name].complete:
                    return installed[name]
        return None


@dataclass(frozen=True)
class PackagePlan:
    """Everything a package tool has to be told.

    Attributes:
        manager: ``apt`` or ``dnf``.
        repository: Repository to configure, or None when the distribution's own serve.
        components: Components that Debian's own repository must have enabled.
        preferences: Text of an apt preferences file that keeps the resolver inside branch or version; empty for none.
        pinning: Pinning package to install before all others (apt, from branch 590 on); empty for none.
        stream: Module stream to enable (EL 8 and 9); empty for none.
        choices: Packages of the driver and its companions.
        prerequisites: Packages that must be there first, whatever their version.
        headers: Package with the headers of the running kernel; empty for none.
        extras: True where EPEL and CodeReady Builder must be enabled (dkms on EL).
        foreign: Pattern of installed packages that belong to another branch, source or flavour and must go first.
        branch_in_names: True where every part carries the branch in its name, so that a part without it belongs to
            another branch.
    """

    manager: str
    repository: Repository | None = None
    components: tuple[str, ...] = ()
    preferences: str = ""
    pinning: str = ""
    stream: str = ""
    choices: tuple[Choice, ...] = ()
    prerequisites: tuple[str, ...] = ()
    headers: str = ""
    extras: bool = False
    foreign: str = ""
    branch_in_names: bool = False


def check_architecture(name: str) -> str:
    """A directory of a repository: one component of a path.

    Raises:
        FleetError: ``invalid_option``.
    """
    if name and not re.match(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z", name):
        raise FleetError(
            "invalid_option",
            "nvidia_driver_repository_architecture = %r: is no name of a directory; write x86_64, sbsa, or leave it empty."
            % name,
        )
    return name


def repository_directory(os_release: OsRelease, machine: str, override: str = "") -> str:
    """``ubuntu2404/x86_64``: where NVIDIA's repository keeps a distribution.

    Raises:
        FleetError: ``unsupported_os`` for a distribution that this collection does not install the driver on.
    """
    distribution = os_release.repository_distribution
    if distribution not in SUPPORTED:
        raise FleetError(
            "unsupported_os",
            "The driver cannot be installed on %s: supported are Ubuntu 22.04 and 24.04, Debian 12 and 13, and "
            "RHEL, Rocky and Alma 8, 9 and 10; install it yourself and leave the role out (--skip-tags nvidia_driver)."
            % (os_release.pretty or distribution),
        )
    return "%s/%s" % (distribution, override or {"aarch64": "sbsa"}.get(machine, machine))


def apt_preferences(branch: str, version: str) -> str:
    """apt preferences that keep every driver package of NVIDIA's repository in one branch or version.

    Metapackages depend on their parts with >=, so without it the resolver takes a newer point release, or on Debian
    (whose part names carry no branch) even a newer branch. Only versions of the driver's form match, which leaves the
    container toolkit alone.
    """
    return (
        "# Managed by gpu_fleet.nim.\n"
        "Explanation: keeps all parts of the NVIDIA driver at one %s\n"
        "Package: cuda-drivers* nvidia-* libnvidia-* libcuda1* libnvsdm* libxnvctrl* xserver-xorg-video-nvidia* firmware-nvidia-gsp*\n"
        "Pin: version %s\n"
        "Pin-Priority: 1000\n" % ("version" if version else "branch", version + "-*" if version else branch + ".*")
    )


def _with_suffix(base: str, branch: str, branchless_from: int) -> tuple[str, ...]:
    """Names of a companion package around the branch where its name lost the branch."""
    if int(branch) >= BRANCHLESS_FROM:
        return (base,)
    if int(branch) >= branchless_from:
        return (base, "%s-%s" % (base, branch))
    return ("%s-%s" % (base, branch),)


def _apt_companions(wish: Wish) -> list[Choice]:
    choices = []
    if wish.fabric_manager:
        choices.append(Choice(_with_suffix("nvidia-fabricmanager", wish.branch, 580)))
        choices.append(Choice(_with_suffix("libnvidia-nscq", wish.branch, 580)))
    if wish.nvlink5:
        # Versioned independently of the driver.
        choices.append(Choice(("nvlsm",), versioned=False))
        choices.append(Choice(("infiniband-diags",), versioned=False))
    if wish.imex:
        choices.append(Choice(_with_suffix("nvidia-imex", wish.branch, 580)))
    return choices


def _apt_user_space(os_release: OsRelease, wish: Wish) -> list[Choice]:
    """The driver without a kernel module, which comes from elsewhere; whole drivers of the branch do as well."""
    if os_release.id == "debian":
        return [Choice((name,)) for name in ("libcuda1", "libnvidia-ml1", "nvidia-smi")]
    branch = "" if int(wish.branch) >= BRANCHLESS_FROM else "-%s" % wish.branch
    flavour = "-open" if wish.flavour == OPEN else ""
    return [
        Choice(
            ("nvidia-headless-no-dkms%s%s" % (branch, flavour),),
            r"(nvidia-(driver|headless|headless-no-dkms)%s(-open)?|nvidia-open%s|cuda-drivers%s)" % ((branch,) * 3),
        ),
        Choice(("nvidia-utils%s" % branch,)),
    ]


def _apt_nvidia(os_release: OsRelease, machine: str, kernel: str, wish: Wish) -> PackagePlan:
    """Ubuntu and Debian from NVIDIA's repository."""
    url = "%s/%s" % (wish.repository_url, repository_directory(os_release, machine, wish.repository_architecture))
    repository = Repository("nvidia-cuda", url, url + "/3bf863cc.pub", description="NVIDIA CUDA and driver packages")
    branch = wish.branch
    is_open = wish.flavour == OPEN
    if int(branch) >= BRANCHLESS_FROM:
        main = Choice(
            ("nvidia-open",) if is_open else ("cuda-drivers",),
            r"nvidia-driver-open|nvidia-headless-open" if is_open else r"nvidia-driver|nvidia-headless",
        )
        foreign = r".*-\d{3}(-server)?(-open)?$"
        pinning, preferences = "nvidia-driver-pinning-%s" % (wish.version or branch), ""
        foreign += r"|nvidia-driver-pinning-.*|.*nvidia-tesla-.*"
    else:
        if is_open:
            # The open metapackage exists only in younger branches; before, the driver package itself is asked for.
            names = ("nvidia-open-%s" % branch, "nvidia-driver-%s-open" % branch)
            if os_release.id == "debian":
                names = ("nvidia-open-%s" % branch, "nvidia-open")
            accepts = r"nvidia-(driver|headless)-%s-open" % branch
        else:
            names = ("cuda-drivers-%s" % branch, "nvidia-driver-%s" % branch)
            if os_release.id == "debian":
                names = ("cuda-drivers-%s" % branch, "cuda-drivers")
            accepts = r"nvidia-(driver|headless)-%s" % branch
        main = Choice(names, accepts)
        foreign = r".*-(?!%s\b)\d{3}(-server)?(-open)?$|.*-%s-server(-open)?$|nvidia-driver-pinning-.*" % (
            branch,
            branch,
        )
        pinning, preferences = "", apt_preferences(branch, wish.version)
        foreign += r"|.*nvidia-tesla-.*"
    # The other flavour's modules cannot be installed beside ours; without a module of ours they disturb nobody.
    others = (
        r"|cuda-drivers(-\d{3})?$|nvidia-(dkms|driver|headless|headless-no-dkms|kernel-source)(-\d{3})?$|nvidia-kernel-dkms$"
        if is_open
        else r"|nvidia-open(-\d{3})?$|nvidia-(dkms|driver|headless|headless-no-dkms|kernel-source)(-\d{3})?-open$"
        r"|nvidia-kernel-open-dkms$"
    )
    if is_open:
        # nvidia-driver (without suffix) is a part of the open stack too on Debian.
        others = others.replace("(dkms|driver|", "(dkms|") if os_release.id == "debian" else others
    choices = [main, *_apt_companions(wish)]
    if wish.kernel_module:
        foreign += others
    else:
        choices[:1] = _apt_user_space(os_release, wish)
    if wish.kernel_module and is_open and os_release.id == "debian" and int(branch) < OPEN_BY_DEFAULT_FROM:
        # Without an open metapackage: the open modules, and the rest from the proprietary one, which takes either.
        choices[0] = Choice(("nvidia-kernel-open-dkms",))
        choices.insert(1, Choice(("cuda-drivers-%s" % branch, "cuda-drivers"), r"nvidia-driver"))
    if wish.persistenced and (os_release.id == "debian" or int(branch) >= BRANCHLESS_FROM):
        # Before 590 Ubuntu ships the daemon in nvidia-compute-utils, which the metapackage brings.
        choices.append(Choice(("nvidia-persistenced",), optional=True))
    return PackagePlan(
        manager="apt",
        repository=repository,
        preferences=preferences,
        pinning=pinning,
        choices=tuple(choices),
        headers="linux-headers-%s" % kernel if wish.kernel_headers else "",
        foreign=foreign,
        branch_in_names=os_release.id == "ubuntu" and int(branch) < BRANCHLESS_FROM,
    )


def _apt_ubuntu(kernel: str, wish: Wish) -> PackagePlan:
    """Ubuntu's own archive: the -server packages."""
    branch, suffix = wish.branch, "-open" if wish.flavour == OPEN else ""
    utils = Choice(("nvidia-utils-%s-server" % branch,))
    if not wish.kernel_module:
        choices = [
            Choice(
                ("nvidia-headless-no-dkms-%s-server%s" % (branch, suffix),),
                r"nvidia-(driver|headless|headless-no-dkms)-%s-server(-open)?" % branch,
            ),
            utils,
        ]
    elif wish.signed_modules:
        choices = [
            Choice(("linux-modules-nvidia-%s-server%s-%s" % (branch, suffix, kernel),), versioned=False),
            Choice(("nvidia-headless-no-dkms-%s-server%s" % (branch, suffix),)),
            utils,
        ]
    else:
        main = "nvidia-headless-%s-server%s" % (branch, suffix)
        choices = [Choice((main,), r"nvidia-driver-%s-server%s" % (branch, suffix)), utils]
    if wish.persistenced:
        choices.append(Choice(("nvidia-compute-utils-%s-server" % branch,)))
    if wish.fabric_manager:
        choices.append(Choice(("nvidia-fabricmanager-%s" % branch,)))
        choices.append(Choice(("libnvidia-nscq-%s" % branch,)))
    if wish.imex:
        choices.append(Choice(("nvidia-imex-%s" % branch, "nvidia-imex")))
    foreign = (
        r".*-(?!%s\b)\d{3}(-server)?(-open)?$|nvidia-open(-\d{3})?$|cuda-drivers(-\d{3})?$|nvidia-driver-pinning-.*"
        % branch
    )
    foreign += r"|nvidia-(driver|dkms|headless|headless-no-dkms|utils|compute-utils)-%s(-open)?$" % branch
    other = "" if suffix else "-open"
    if wish.kernel_module:
        foreign += r"|nvidia-(headless|headless-no-dkms|dkms|driver|kernel-source)-%s-server%s$" % (branch, other)
    return PackagePlan(
        manager="apt",
        choices=tuple(choices),
        # Prebuilt modules need no compiler and no headers.
        headers="linux-headers-%s" % kernel if wish.kernel_headers and not wish.signed_modules else "",
        foreign=foreign,
        branch_in_names=True,
    )


def _apt_debian(os_release: OsRelease, kernel: str, wish: Wish) -> PackagePlan:
    """Debian's own archive (contrib, non-free, non-free-firmware)."""
    branches = DEBIAN_BRANCHES[os_release.repository_distribution]
    if wish.branch not in branches:
        raise FleetError(
            "invalid_option",
            "nvidia_driver_branch = %r: %s itself has branch %s only; choose that, or set nvidia_driver_source to nvidia."
            % (wish.branch, os_release.pretty or "Debian", " and ".join(sorted(branches))),
        )
    infix = branches[wish.branch]
    if infix:
        if wish.flavour == OPEN:
            raise FleetError(
                "invalid_option",
                "nvidia_driver_flavour = 'open': %s has branch %s with proprietary modules only; choose proprietary, "
                "or set nvidia_driver_source to nvidia." % (os_release.pretty or "Debian", wish.branch),
            )
        names = ["nvidia-%skernel-dkms" % infix, "nvidia-%sdriver-bin" % infix, "nvidia-%ssmi" % infix]
        names.append("libnvidia-%scuda1" % infix)
        names.append("libnvidia-%sml1" % infix)
        module = Choice((names[0],))
        foreign = r"nvidia-(driver|kernel-dkms|open-kernel-dkms|smi|open(-\d{3})?)$|libcuda1$|cuda-drivers(-\d{3})?$"
    else:
        module = Choice(("nvidia-open-kernel-dkms" if wish.flavour == OPEN else "nvidia-kernel-dkms",))
        names = ["", "nvidia-driver-bin", "nvidia-smi", "libcuda1", "libnvidia-ml1", "libnvidia-ptxjitcompiler1"]
        foreign = r"nvidia-tesla-.*|libnvidia-tesla-.*|cuda-drivers(-\d{3})?$|nvidia-open(-\d{3})?$"
        if wish.kernel_module:
            foreign += r"|nvidia-kernel-dkms$" if wish.flavour == OPEN else r"|nvidia-open-kernel-dkms$"
    foreign += r"|nvidia-driver-pinning-.*"
    choices = [Choice((name,)) for name in names[1:]]
    if wish.kernel_module:
        choices.insert(0, module)
    # Device nodes are made by nvidia-modprobe; its version in contrib may lag behind the driver's.
    choices.append(Choice(("nvidia-modprobe",), versioned=False))
    if wish.persistenced:
        choices.append(Choice(("nvidia-persistenced",), versioned=False))
    if wish.fabric_manager or wish.imex:
        raise FleetError(
            "invalid_option",
            "nvidia_driver_source = 'distribution': this host needs Fabric Manager or IMEX, which Debian does not have; "
            "set nvidia_driver_source to nvidia.",
        )
    return PackagePlan(
        manager="apt",
        components=("contrib", "non-free", "non-free-firmware"),
        choices=tuple(choices),
        headers="linux-headers-%s" % kernel if wish.kernel_headers else "",
        foreign=foreign,
    )


def _dnf_nvidia(os_release: OsRelease, machine: str, kernel: str, wish: Wish) -> PackagePlan:
    """RHEL and its rebuilds from NVIDIA's repository: module streams on 8 and 9, version lock on all."""
    if not wish.kernel_module:
        # nvidia-driver-cuda requires nvidia-kmod-common, which requires nvidia-kmod: dnf would choose some module.
        raise FleetError(
            "invalid_option",
            "nvidia_driver_kernel_module = false: NVIDIA's packages for %s depend on a kernel module package and cannot be "
            "installed without one; leave it true." % (os_release.pretty or os_release.id),
        )
    url = "%s/%s" % (wish.repository_url, repository_directory(os_release, machine, wish.repository_architecture))
    distribution = os_release.repository_distribution
    repository = Repository(
        "cuda-" + distribution, url, url + "/D42D0685.pub", description="NVIDIA CUDA " + distribution
    )
    is_open = wish.flavour == OPEN
    choices = [
        Choice(("kmod-nvidia-open-dkms" if is_open else "kmod-nvidia-latest-dkms",)),
        Choice(("nvidia-driver-cuda",)),
    ]
    if wish.persistenced:
        choices.append(Choice(("nvidia-persistenced",)))
    if wish.fabric_manager:
        names = ("nvidia-fabricmanager",) if int(wish.branch) >= 580 else ("nvidia-fabric-manager",)
        choices.append(Choice(names))
        choices.append(Choice(_with_suffix("libnvidia-nscq", wish.branch, 580)))
    if wish.nvlink5:
        choices.append(Choice(("nvlsm",), versioned=False))
        choices.append(Choice(("infiniband-diags",), versioned=False))
    if wish.imex:
        choices.append(Choice(_with_suffix("nvidia-imex", wish.branch, 580)))
    modular = os_release.major < 10
    return PackagePlan(
        manager="dnf",
        repository=repository,
        stream="%s-%s" % (wish.branch, "open" if is_open else "dkms") if modular else "",
        choices=tuple(choices),
        prerequisites=("dkms",),
        headers="kernel-devel-%s" % kernel if wish.kernel_headers else "",
        extras=True,
        foreign=(
            r"kmod-nvidia-latest-dkms|kmod-nvidia-\d{3}.*|cuda-drivers.*"
            if is_open
            else r"kmod-nvidia-open-dkms|kmod-nvidia-\d{3}.*|nvidia-open"
        )
        # Companions under the names of other branches.
        + r"|(libnvidia-nscq|nvidia-imex)-\d{3}|nvidia-fabric-?manager"
        + ("" if int(wish.branch) >= 580 else r"|(libnvidia-nscq|nvidia-imex)$"),
    )


#: Oldest branch with nvidia-imex in NVIDIA's repositories (NVIDIA/gpu-driver-container, install.sh).
IMEX_FROM = 550


def package_plan(os_release: OsRelease, machine: str, kernel: str, wish: Wish) -> PackagePlan:
    """The packages for one host.

    Args:
        machine: ``x86_64`` or ``aarch64``.
        kernel: Release of the running kernel, as ``uname -r`` prints it.

    Raises:
        FleetError: ``unsupported_os`` or ``invalid_option`` when there are none.
    """
    repository_directory(os_release, machine)  # raises for distributions that are not supported
    if wish.source == "nvidia":
        if wish.imex and int(wish.branch) < IMEX_FROM:
            raise FleetError(
                "invalid_option",
                "nvidia_driver_branch = '%s': has no nvidia-imex, which this host needs or nvidia_driver_imex asks for; "
                "choose branch %d or newer, or set nvidia_driver_imex to absent." % (wish.branch, IMEX_FROM),
            )
        build = _apt_nvidia if os_release.family == "debian" else _dnf_nvidia
        return build(os_release, machine, kernel, wish)
    if os_release.family != "debian":
        raise FleetError(
            "invalid_option",
            "nvidia_driver_source = 'distribution': %s has no NVIDIA driver packages of its own; "
            "set nvidia_driver_source to nvidia." % (os_release.pretty or os_release.id),
        )
    if os_release.id == "ubuntu":
        return _apt_ubuntu(kernel, wish)
    return _apt_debian(os_release, kernel, wish)


# -- reading what is installed --------------------------------------------------------------------

#: Headers of one kernel of Debian or Ubuntu: version, ABI where there is one, flavour.
_HEADERS_OF_KERNEL = re.compile(r"linux-headers-\d[^-]*(?:-\d[^-]*)?-(.+)")


def later_headers(plan: PackagePlan, installed: t.Mapping[str, Package]) -> list[str]:
    """Metapackages of headers that are missing beside those that bring newer kernels of the running one's flavour, sorted.

    With the headers of the running kernel alone dkms builds nothing for the kernel that an unattended upgrade brings. EL
    needs none: dnf puts newer kernel-devel beside the one that is there, as it does with kernels.
    """
    found = _HEADERS_OF_KERNEL.fullmatch(plan.headers)
    if found is None:
        return []
    # Ubuntu's kernel of virtual machines is the generic one with fewer modules.
    flavour = "(?:generic|virtual)" if found.group(1) == "generic" else re.escape(found.group(1))
    image = re.compile(r"linux-image-(%s(?:-(?:hwe|lts)-\d\d\.\d\d(?:-edge)?)?)" % flavour)
    wanted = {"linux-headers-" + match.group(1) for match in map(image.fullmatch, installed) if match}
    return sorted(name for name in wanted if name not in installed or not installed[name].complete)


_USER_SPACE = re.compile(
    r"^(libnvidia-compute(-\d{3}.*)?|libcuda1|libnvidia-tesla-\d{3}-cuda1|nvidia-driver-cuda-libs|libnvidia-ml1?"
    r"|nvidia-utils(-\d{3}.*)?|nvidia-smi|nvidia-driver-cuda)$"
)


def user_space_version(installed: t.Mapping[str, Package]) -> str:
    """Version of the user-space driver by the package database; empty when none is installed.

    Parts of different versions are a broken driver: the first in the order library, tools is what programs load.
    """
    candidates = sorted(
        (0 if name.startswith("lib") or name.endswith("libs") else 1, name)
        for name, package in installed.items()
        if _USER_SPACE.match(name) and package.complete and branch_of_version(package.version)
    )
    return upstream_version(installed[candidates[0][1]].version) if candidates else ""


def source_of(installed: t.Iterable[str]) -> str:
    """``distribution`` where the names of installed packages are the distribution's alone; empty otherwise."""
    ours = re.compile(r"(nvidia|libnvidia).*-\d{3}-server(-open)?$|(lib)?nvidia-tesla-")
    return "distribution" if any(ours.match(name) for name in installed) else ""


# Tools that work with any branch and that distributions ship at versions of their own.
_INDEPENDENT = re.compile(r"^(nvidia-(settings|modprobe|xconfig|persistenced|prime)|libxnvctrl|libnvidia-egl-)")


def to_hold(installed: t.Mapping[str, Package]) -> list[str]:
    """Installed packages that must not move without the driver, sorted."""
    branch = branch_of_version(user_space_version(installed))
    return sorted(
        name
        for name, package in installed.items()
        if is_driver_package(name)
        and package.complete
        and (branch_of_version(package.version) or name.startswith("nvidia-driver-pinning-"))
        # The distribution's own nvidia-settings or libxnvctrl0 is no part of this driver.
        and (not _INDEPENDENT.match(name) or branch_of_version(package.version) == branch)
    )


def foreign_packages(plan: PackagePlan, installed: t.Mapping[str, Package], branch: str) -> list[str]:
    """Installed driver packages that must go before the wanted ones can come, sorted.

    These have another branch, flavour or source in the name, or are parts without a branch in the name (590 and
    later) where the wanted branch has it there.
    """
    wanted = {name for choice in plan.choices for name in choice.names} | {plan.pinning}
    pattern = re.compile(plan.foreign) if plan.foreign else None
    return sorted(
        name
        for name, package in installed.items()
        if name not in wanted
        and is_driver_package(name)
        and not _INDEPENDENT.match(name)
        and (
            (pattern is not None and pattern.match(name))
            or (plan.branch_in_names and branch_of_version(package.version) not in ("", branch))
        )
    )
