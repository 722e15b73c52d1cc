# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What is wanted of the NVIDIA driver as packages, and how a host differs from it."""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ._apt_sources import apt_components
from ._driver_branches import (
    branch_of_version,
    check_branch,
    check_flavour,
    check_version,
    choose_flavour,
    cuda_of_branch,
    upstream_version,
)
from ._driver_clients import foreign_holders, in_use_error, in_use_message
from ._errors import FleetError, check_choice
from ._gpu_holders import driver_holders
from ._gpu_inventory import GpuInventory, observe_gpus
from ._host import Host
from ._loaded_driver import flavours_differ, loaded_modules
from ._nouveau import BLACKLIST, BLACKLIST_CONTENT
from ._nvidia_driver_packages import (
    QUERY_PATTERNS,
    Choice,
    PackagePlan,
    Wish,
    check_architecture,
    foreign_packages,
    is_driver_package,
    later_headers,
    package_plan,
    to_hold,
    user_space_version,
)
from ._nvidia_driver_state import (
    LOCKED,
    NON_FREE,
    PREFERENCES,
    UNATTENDED,
    DriverState,
    boot_states,
    headers_offered,
    headers_on_offer,
    headers_unavailable,
    module_on_disk,
)
from ._options import DRIVER_REPOSITORY
from ._os_release import OsRelease, read_os_release
from ._packages import Package, check_url, package_manager
from ._resource import Change, Disruption, FileDiff, Planner
from ._secure_boot import MODULE_KEYS, module_key_enrolled, secure_boot_enabled

_MODULE_STREAM = "/etc/dnf/modules.d/nvidia-driver.module"
UNATTENDED_CONTENT = """\
// Managed by gpu_fleet.nim. A driver that is upgraded behind running containers takes the GPUs away from the next
// one that starts; all other unattended upgrades go on.
Unattended-Upgrade::Package-Blacklist {
  "^nvidia-(?!container)";
  "^libnvidia-(?!container)";
  "^cuda-drivers";
  "^libcuda1$";
  "^libnvsdm";
  "^xserver-xorg-video-nvidia";
  "^firmware-nvidia-gsp";
};
"""


class DriverPlanner(Planner[DriverState]):
    """The driver that is wanted on a host. Options are those of the module of the same name.

    Raises:
        FleetError: ``invalid_option`` for options that are wrong on every host.
    """

    name = "nvidia_driver"

    def __init__(
        self,
        *,
        source: str = "nvidia",
        repository_url: str = DRIVER_REPOSITORY,
        repository_architecture: str = "",
        branch: str = "580",
        version: str = "",
        flavour: str = "auto",
        hold: bool = True,
        fabric_manager: str = "auto",
        imex: str = "auto",
        persistenced: bool = True,
        kernel_headers: bool = True,
        kernel_module: bool = True,
        secure_boot: str = "check",
        unload: bool = True,
    ) -> None:
        for option, value, allowed in (
            ("nvidia_driver_source", source, ("nvidia", "distribution")),
            ("nvidia_driver_flavour", flavour, ("auto", "open", "proprietary")),
            ("nvidia_driver_fabric_manager", fabric_manager, ("auto", "present", "absent")),
            ("nvidia_driver_imex", imex, ("auto", "present", "absent")),
            ("nvidia_driver_secure_boot", secure_boot, ("check", "enrolled")),
        ):
            check_choice(option, value, allowed)
        self.source = source
        self.repository_url = check_url("nvidia_driver_repository_url", repository_url)
        self.repository_architecture = check_architecture(repository_architecture)
        self.branch = check_branch(str(branch)).name
        self.version = version
        if version:
            check_version(version, self.branch)
        if flavour != "auto":
            check_flavour(flavour, self.branch)
        self.flavour = flavour
        self.hold = hold
        self.fabric_manager = fabric_manager
        self.imex = imex
        self.persistenced = persistenced
        self.kernel_headers = kernel_headers and kernel_module
        self.kernel_module = kernel_module
        self.secure_boot = secure_boot
        self.unload = unload

    # -- what is wanted on this host

    def wish(self, os_release: OsRelease, inventory: GpuInventory, secure_boot: bool) -> Wish:
        """The options with every ``auto`` resolved against the hardware."""
        fabric = self.fabric_manager == "present" or (self.fabric_manager == "auto" and inventory.needs_fabric_manager)
        return Wish(
            source=self.source,
            repository_url=self.repository_url,
            repository_architecture=self.repository_architecture,
            branch=self.branch,
            version=self.version,
            flavour=choose_flavour(self.flavour, self.branch, inventory.architectures),
            fabric_manager=fabric,
            nvlink5=fabric and inventory.nvlink5,
            imex=self.imex == "present" or (self.imex == "auto" and inventory.imex),
            persistenced=self.persistenced,
            hold=self.hold,
            signed_modules=secure_boot and self.source == "distribution" and os_release.id == "ubuntu",
            kernel_headers=self.kernel_headers,
            kernel_module=self.kernel_module,
        )

    def package_plan(self, state: DriverState) -> PackagePlan:
        wish = self.wish(state.os, state.inventory, state.secure_boot)
        return package_plan(state.os, state.machine, state.kernel, wish)

    # -- observe

    def observe(self, host: Host) -> DriverState:
        inventory = observe_gpus(host, with_smi=False)
        os_release = read_os_release(host)
        kernel = host.kernel_release()
        secure_boot = secure_boot_enabled(host)
        if not inventory.pci:
            # Nothing else matters, and an unknown distribution is no reason to fail on a host without a GPU.
            return DriverState(
                os_release, host.machine(), kernel, inventory, {}, (), {}, {}, frozenset(), "", "", secure_boot,
                False, False, False, False, (),
            )  # fmt: skip
        manager = package_manager(host, os_release)
        wish = self.wish(os_release, inventory, secure_boot)
        plan = package_plan(os_release, host.machine(), kernel, wish)
        installed = manager.installed(*QUERY_PATTERNS)
        files = {path: host.read_text(path) for path in (PREFERENCES, BLACKLIST, UNATTENDED, NON_FREE, LOCKED)}
        repositories = {}
        if plan.repository is not None:
            repositories[plan.repository.name] = manager.repository_state(plan.repository)
        stream = ""
        if plan.stream:
            text = host.read_text(_MODULE_STREAM) or ""
            if re.search(r"(?m)^state\s*=\s*enabled", text):
                match = re.search(r"(?m)^stream\s*=\s*(\S+)", text)
                stream = match.group(1) if match else ""
        module = module_on_disk(host, kernel)
        dkms = ""
        if not module.version and host.which("dkms"):
            dkms = host.run(["dkms", "status"], timeout=60).stdout.strip()
        headers = host.exists("/lib/modules/%s/build" % kernel)
        later, silent = headers_on_offer(manager, later_headers(plan, installed))
        boot = boot_states(host, wish)
        return DriverState(
            os=os_release,
            machine=host.machine(),
            kernel=kernel,
            inventory=inventory,
            installed=installed,
            interrupted=tuple(manager.interrupted()),
            files=files,
            repositories=repositories,
            components=apt_components(host, os_release) if plan.components else frozenset(),
            stream=stream,
            on_disk=module.version,
            on_disk_flavour=module.flavour,
            secure_boot=secure_boot,
            key_enrolled=module_key_enrolled(host) if secure_boot else False,
            headers=headers,
            headers_offered=headers or not plan.headers or headers_offered(manager, plan.headers),
            later_headers=later,
            lists_silent=silent,
            nouveau_loaded="nouveau" in loaded_modules(host),
            runfile=host.exists("/usr/bin/nvidia-uninstall") and not user_space_version(installed),
            holders=foreign_holders(driver_holders(host)) if inventory.driver else (),
            dkms=dkms,
            disabled_units=tuple(unit for unit, state in boot.items() if state == "disabled"),
            masked_units=tuple(unit for unit, state in boot.items() if state.startswith("masked")),
        )

    # -- plan

    def _main(self, plan: PackagePlan, installed: t.Mapping[str, Package]) -> str:
        """Version of the installed driver as the plan's first versioned package tells it, if it is in the branch."""
        for choice in plan.choices:
            if choice.versioned and not choice.optional:
                found = choice.installed_as(installed)
                version = upstream_version(found.version) if found else ""
                return version if branch_of_version(version) == self.branch else ""
        return ""

    def target(self, plan: PackagePlan, installed: t.Mapping[str, Package], module: str = "") -> str:
        """The version that the packages come to; empty for the newest of the branch.

        Args:
            module: Version of the kernel module, when somebody else brings it.
        """
        return self.version or module or self._main(plan, installed)

    def unloads(self, state: DriverState) -> bool:
        """Whether the module in memory is taken out before other packages are put in."""
        loaded = state.inventory.driver
        return loaded is not None and loaded.can_unload and self.unload and self.kernel_module

    def keeps_module(self, state: DriverState) -> bool:
        """Whether the module in memory is the one that will be on the disk when the packages are as wanted."""
        target = self.target(self.package_plan(state), state.installed, self._foreign_module(state))
        loaded = state.inventory.driver
        if loaded is None or not target or loaded.version != target:
            return False
        wish = self.wish(state.os, state.inventory, state.secure_boot)
        return not (self.kernel_module and flavours_differ(loaded.flavour, wish.flavour))

    def _foreign_module(self, state: DriverState) -> str:
        """Version of the kernel module that somebody else brings; empty when it is ours or there is none.

        Raises:
            FleetError: ``driver_mismatch`` when the wanted user space does not work with it.
        """
        module = "" if self.kernel_module else state.loaded_version or state.on_disk
        if (module and module != (self.version or module)) or branch_of_version(module) not in ("", self.branch):
            raise FleetError(
                "driver_mismatch",
                "The kernel module of this host, which nvidia_driver_kernel_module = false leaves to somebody else, is %s, and "
                "user space works with a module of its own version only, so %s is not installed; choose branch %s and no "
                "other version, or renew the module."
                % (module, self.version or "branch " + self.branch, branch_of_version(module)),
            )
        return module

    def differing(
        self, plan: PackagePlan, installed: t.Mapping[str, Package], module: str = ""
    ) -> list[tuple[Choice, str | None]]:
        """Choices that are not fulfilled, with the version that is there in their place.

        Args:
            module: Version of the kernel module, when somebody else brings it.
        """
        target = self.target(plan, installed, module)
        different: list[tuple[Choice, str | None]] = []
        for choice in plan.choices:
            found = choice.installed_as(installed)
            if found is None:
                if not choice.optional:
                    different.append((choice, None))
            elif choice.versioned and (
                upstream_version(found.version) != target if target else branch_of_version(found.version) != self.branch
            ):
                different.append((choice, found.version))
        return different

    def plan(self, state: DriverState) -> list[Change]:
        if not state.inventory.pci:
            return []
        plan = self.package_plan(state)
        if state.runfile:
            raise FleetError(
                "runfile_driver",
                "The driver on this host was put there by NVIDIA's .run installer, which packages cannot replace; "
                "run /usr/bin/nvidia-uninstall on it first.",
            )
        if state.masked_units:
            raise FleetError(
                "unit_masked",
                "%s is masked, so somebody does not want it to run; 'systemctl unmask %s' allows it, and "
                "nvidia_driver_persistenced and nvidia_driver_fabric_manager say that it is not wanted."
                % (" and ".join(state.masked_units), " ".join(state.masked_units)),
            )
        changes: list[Change] = []
        if state.interrupted:
            changes.append(
                Change(
                    self.name,
                    "interrupted package installation",
                    ", ".join(state.interrupted[:6]),
                    "configured",
                    "an earlier transaction was cut off",
                    action="repair",
                )
            )
        packages = self._plan_packages(plan, state)
        if packages is not None:
            self._guard_secure_boot(state)
        # Before everything else: without them nothing of the rest is of use.
        if plan.headers and not state.headers and plan.headers not in state.installed:
            changes.append(
                Change(
                    self.name,
                    "package %s" % plan.headers,
                    None,
                    "installed",
                    "the kernel module is built for the running kernel",
                    action="headers",
                    data={"package": plan.headers},
                )
            )
        sources = self._plan_sources(plan, state)
        # Lists that say nothing may be made new by any of these, and then a second look would find more to do.
        later_headers = not state.lists_silent or packages is not None or bool(sources or changes)
        changes += sources
        changes += self._plan_file(
            state, BLACKLIST, BLACKLIST_CONTENT, "nouveau and the NVIDIA driver exclude each other", "blacklist"
        )
        if packages is not None:
            changes.append(packages)
        elif self.kernel_module and not state.on_disk:
            self._guard_secure_boot(state)
            changes.append(
                Change(
                    self.name,
                    "kernel module nvidia",
                    None,
                    state.user_space,
                    "there is none for the running kernel %s" % state.kernel,
                    action="build",
                )
            )
        if state.disabled_units and packages is None:
            changes.append(
                Change(
                    self.name,
                    "services of the driver",
                    "disabled: %s" % ", ".join(state.disabled_units),
                    "enabled",
                    "this hardware needs them after every boot",
                    action="enable",
                )
            )
        changes += self._plan_holds(plan, state, packages is not None)
        if later_headers:
            # Last: an older driver may not build for those kernels, and the wanted one must not wait for them.
            changes += [
                Change(
                    self.name,
                    "package %s" % name,
                    None,
                    "installed",
                    "the kernel module is built for the kernels that upgrades bring, too",
                    action="later_headers",
                    data={"package": name},
                )
                for name in state.later_headers
            ]
        if packages is not None and state.holders and not packages.data["adds"]:
            # Nobody's GPU is pulled away, and nothing is half done either: the whole plan waits.
            blocked = in_use_message(state.holders, "Changing the driver packages")
            return [dataclasses.replace(change, blocked=blocked) for change in changes]
        return changes

    def _guard_secure_boot(self, state: DriverState) -> None:
        wish = self.wish(state.os, state.inventory, state.secure_boot)
        if (
            not state.secure_boot
            or not self.kernel_module
            or self.secure_boot == "enrolled"
            or state.key_enrolled
            or wish.signed_modules
        ):
            return
        remedy = (
            "enrol the host's module key (mokutil --import %s, then confirm at the console during the next boot)"
            % (MODULE_KEYS[1] if state.os.id == "ubuntu" else MODULE_KEYS[0])
        )
        if state.os.id == "ubuntu":
            remedy += ", or set nvidia_driver_source to distribution, whose modules are signed"
        raise FleetError(
            "secure_boot_key_not_enrolled",
            "Secure Boot is on and no key is enrolled that modules built on this host are signed with, so the kernel would "
            "refuse the driver; nothing was installed. Turn Secure Boot off, or %s; when the key is enrolled in another "
            "way, set nvidia_driver_secure_boot to enrolled." % remedy,
        )

    def _plan_file(self, state: DriverState, path: str, content: str | None, why: str, action: str) -> list[Change]:
        before = state.files.get(path)
        if before == content:
            return []
        return [
            Change(
                self.name,
                path,
                None if before is None else "present",
                None if content is None else "present",
                why,
                action=action,
                data={"path": path, "content": content},
                diff=FileDiff(path, before or "", content or ""),
            )
        ]

    def _plan_sources(self, plan: PackagePlan, state: DriverState) -> list[Change]:
        changes: list[Change] = []
        if plan.repository is not None:
            # Pure although it is a method of the tool: it only compares.
            tool = package_manager(Host(), state.os)
            changes += tool.plan_repository(self.name, plan.repository, state.repositories[plan.repository.name])
        missing = [name for name in plan.components if name not in state.components]
        if missing:
            changes.append(
                Change(
                    self.name,
                    "components of Debian",
                    " ".join(sorted(state.components)),
                    " ".join(plan.components),
                    "the driver is in them",
                    action="components",
                    data={"components": missing},
                )
            )
        if plan.manager == "apt":
            changes += self._plan_file(
                state,
                PREFERENCES,
                plan.preferences or None,
                "all parts of the driver stay at one version"
                if plan.preferences
                else "the packages of this branch need no preferences",
                "file",
            )
        if plan.stream and plan.stream != state.stream:
            changes.append(
                Change(
                    self.name,
                    "module stream nvidia-driver",
                    state.stream or None,
                    plan.stream,
                    "it carries the wanted branch and flavour",
                    action="stream",
                    data={"stream": plan.stream},
                )
            )
        return changes

    def _only_adds(self, plan: PackagePlan, state: DriverState) -> bool:
        """Whether all that is to be done is to put packages of the loaded version back, which disturbs nobody."""
        different = self.differing(plan, state.installed, self._foreign_module(state))
        return (
            self.keeps_module(state)
            and all(present is None for _choice, present in different)
            and not foreign_packages(plan, state.installed, self.branch)
        )

    def _plan_packages(self, plan: PackagePlan, state: DriverState) -> Change | None:
        different = self.differing(plan, state.installed, self._foreign_module(state))
        foreign = foreign_packages(plan, state.installed, self.branch)
        pinned = not plan.pinning or plan.pinning in state.installed
        if not different and not foreign and pinned:
            return None
        present = state.user_space
        adds = self._only_adds(plan, state)
        wish = self.wish(state.os, state.inventory, state.secure_boot)
        if adds and different:
            why = "%s is missing" % ", ".join(choice.names[0] for choice, _version in different[:4])
        elif not present:
            why = "no driver is installed"
        elif branch_of_version(present) != self.branch:
            why = "another branch is installed"
        elif different and different[0][1] is not None:
            why = "another version is installed"
        elif foreign:
            why = "%s cannot stay beside the wanted packages" % ", ".join(foreign[:4])
        elif different:
            why = "%s is missing" % ", ".join(choice.names[0] for choice, _version in different[:4])
        else:
            why = "%s keeps the branch" % plan.pinning
        return Change(
            self.name,
            "driver packages",
            present or None,
            "%s (%s, %s)" % (self.version or "branch " + self.branch, wish.flavour, self.source),
            why,
            disruption=Disruption.UNLOAD_DRIVER if self.unloads(state) and not adds else Disruption.NONE,
            action="packages",
            data={"adds": adds},
        )

    def _plan_holds(self, plan: PackagePlan, state: DriverState, packages_change: bool) -> list[Change]:
        changes: list[Change] = []
        loose = [name for name in to_hold(state.installed) if not state.installed[name].held]
        # Half installed now, and complete once the interrupted transaction is finished.
        coming = [
            name
            for name, package in state.installed.items()
            if is_driver_package(name) and not package.complete and not package.held
        ]
        if self.hold and (loose or coming or packages_change):
            changes.append(
                Change(
                    self.name,
                    "package holds",
                    "not held: %s" % ", ".join(loose[:6]) if loose and not packages_change else None,
                    "held",
                    "an upgrade behind running containers takes their GPUs away at the next start",
                    action="hold",
                )
            )
        # A file of ours is the sign that the holds are ours too; those of somebody else are left.
        ours = state.files.get(UNATTENDED if plan.manager == "apt" else LOCKED) is not None
        if ours and not self.hold:
            changes.append(
                Change(self.name, "package holds", "held", "not held", "nvidia_driver_hold is false", action="unhold")
            )
        if plan.manager == "apt":
            changes += self._plan_file(
                state,
                UNATTENDED,
                UNATTENDED_CONTENT if self.hold else None,
                "unattended upgrades leave the driver alone" if self.hold else "nvidia_driver_hold is false",
                "file",
            )
        return changes

    # -- answer

    def result(self, state: DriverState) -> dict[str, t.Any]:
        """Return values of the module.

        Raises:
            FleetError: ``gpu_in_use`` when the packages must change and somebody uses a GPU (in check mode too: it says
                what the run would say).
        """
        answer: dict[str, t.Any] = {
            "gpus": [gpu.bdf for gpu in state.inventory.pci],
            "branch": self.branch,
            "cuda_version": cuda_of_branch(self.branch) or "",
            "flavour": "",
            "loaded": state.loaded_version,
            "on_disk": state.on_disk,
            "user_space": state.user_space,
            "secure_boot": state.secure_boot,
            "reload_required": False,
            "packages": {name: state.installed[name].version for name in to_hold(state.installed)},
        }
        if not state.inventory.pci:
            answer["message"] = "This host has no NVIDIA GPU on its PCI bus; it was left alone."
            return answer
        plan = self.package_plan(state)
        answer["flavour"] = self.wish(state.os, state.inventory, state.secure_boot).flavour
        pending = self._plan_packages(plan, state)
        if pending and state.holders and not pending.data["adds"]:
            raise in_use_error(state.holders, "Changing the driver packages")
        if not (state.headers or state.headers_offered or plan.headers in state.installed):
            # Check mode only: a run has installed them or said the same.
            raise headers_unavailable(state.kernel, "the package lists of the host do not have %s" % plan.headers)
        if pending:
            answer["message"] = "The driver of branch %s is not installed yet." % self.branch
            return answer
        answer["reload_required"] = self.kernel_module and not state.current
        if answer["reload_required"]:
            loaded, installed = state.modules
            answer["message"] = "Driver %s is installed; %s." % (
                # There may be no module yet.
                installed if installed != state.on_disk else state.user_space,
                "%s is still loaded" % loaded if loaded else "its module is not loaded yet",
            )
        else:
            answer["message"] = "Driver %s: loaded = on disk = user space." % state.user_space
        if not self.kernel_module:
            answer["message"] = "Driver %s is installed without a kernel module, which comes from elsewhere: %s." % (
                state.user_space,
                "%s is loaded" % state.loaded_version if state.loaded_version else "none is loaded",
            )
        return answer
