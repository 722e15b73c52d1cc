#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module nvidia_driver."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nvidia_driver
short_description: Install one NVIDIA driver, at one version, and hold it
version_added: "1.0.0"
author: "The gpu_fleet.nim authors (@gpu-fleet)"
description:
  - Brings the NVIDIA driver packages of a host to a branch or an exact version, with everything that must have the same
    version, keeps nouveau out, holds the packages and narrows unattended upgrades.
  - A host without an NVIDIA GPU on its PCI bus is left alone.
  - The packages are changed only while nobody uses a GPU; otherwise the module fails and names the processes, units and
    containers. The driver's own services are stopped for the change.
  - The module does not load the driver and does not reboot; M(gpu_fleet.nim.nvidia_driver_reload) loads it.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
  - gpu_fleet.nim.progress
options:
  source:
    description:
      - V(nvidia) takes the packages of NVIDIA's network repository or a mirror of it.
      - V(distribution) takes the distribution's own packages (Debian contrib and non-free, Ubuntu C(-server)).
    type: str
    choices: [nvidia, distribution]
    default: nvidia
  repository_url:
    description: Base of NVIDIA's repository, to which distribution and architecture are added; a mirror goes here.
    type: str
    default: https://developer.download.nvidia.com/compute/cuda/repos
  repository_architecture:
    description: Directory of the architecture in the repository; empty for C(x86_64), or C(sbsa) on ARM servers.
    type: str
    default: ""
  branch:
    description: Driver branch, for example V(580).
    type: str
    default: "580"
  version:
    description: Exact driver version inside the branch, for example V(580.95.05); empty for any of the branch.
    type: str
    default: ""
  flavour:
    description:
      - Kernel module flavour. V(auto) takes the one that the GPUs want (older than Turing proprietary, Grace Hopper and
        Blackwell open), and where both work the open one from branch 560 on.
    type: str
    choices: [auto, open, proprietary]
    default: auto
  fabric_manager:
    description: Fabric Manager and NSCQ; V(auto) installs them where NVSwitch devices are.
    type: str
    choices: [auto, present, absent]
    default: auto
  imex:
    description: The IMEX service; V(auto) installs it on Grace Blackwell.
    type: str
    choices: [auto, present, absent]
    default: auto
  persistenced:
    description: Install the persistence daemon.
    type: bool
    default: true
  hold:
    description: Hold all packages of the driver, and keep unattended upgrades away from them.
    type: bool
    default: true
  kernel_headers:
    description:
      - Install the headers of the running kernel, which building the module needs.
      - On Debian and Ubuntu also the metapackage of headers beside that of the kernel (C(linux-headers-amd64) beside
        C(linux-image-amd64)) where it is on offer, so that the module is built for the kernels that upgrades bring.
    type: bool
    default: true
  kernel_module:
    description:
      - Whether the kernel module is part of the job; V(false) where it comes from the machine's image. Then only user space is
        installed, at the version of the module that is there.
      - Not on EL, whose packages depend on a module package.
    type: bool
    default: true
  secure_boot:
    description:
      - V(check) refuses to install modules that Secure Boot would reject.
      - V(enrolled) takes the operator's word that the signing key is enrolled.
    type: str
    choices: [check, enrolled]
    default: check
  unload:
    description: Unload the old module before the packages change, where that is possible.
    type: bool
    default: true
"""

EXAMPLES = r"""
- name: Driver branch 580 from NVIDIA's repository
  gpu_fleet.nim.nvidia_driver:
    branch: "580"

- name: An exact version from a local mirror
  gpu_fleet.nim.nvidia_driver:
    repository_url: https://mirror.example.org/cuda/repos
    branch: "580"
    version: 580.95.05

- name: Ubuntu's own packages with signed modules
  gpu_fleet.nim.nvidia_driver:
    source: distribution
    branch: "570"
    flavour: open
"""

RETURN = r"""
message:
  description: One sentence about the state of the driver.
  type: str
  returned: always
  sample: "Driver 580.95.05: loaded = on disk = user space."
gpus:
  description: PCI addresses of the GPUs.
  type: list
  elements: str
  returned: always
branch:
  description: The wanted branch.
  type: str
  returned: always
cuda_version:
  description: CUDA version of the branch.
  type: str
  returned: always
flavour:
  description: The flavour that O(flavour) came down to on this host.
  type: str
  returned: always
loaded:
  description: Version of the module in memory; empty when none is loaded.
  type: str
  returned: always
on_disk:
  description: Version of the module for the running kernel; empty when there is none.
  type: str
  returned: always
user_space:
  description: Version of the libraries.
  type: str
  returned: always
secure_boot:
  description: Whether the firmware enforces signatures.
  type: bool
  returned: always
reload_required:
  description: Whether the module in memory is not the installed one.
  type: bool
  returned: always
packages:
  description: Installed driver packages and their versions.
  type: dict
  returned: always
changes:
  description: What was changed, or would be in check mode.
  type: list
  elements: dict
  returned: always
blocked:
  description: Changes that were left, with the cause of each.
  type: list
  elements: dict
  returned: always
reason:
  description: Stable identifier of the failure.
  type: str
  returned: failure
  sample: gpu_in_use
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module_progress import (
    PROGRESS_OPTIONS,
    own_options,
    run_resource_with_progress,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver import NvidiaDriver
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_state import DriverState
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import RESOURCE_OPTIONS


def main() -> None:
    """Shell around the resource."""
    module = AnsibleModule(
        argument_spec={**RESOURCE_OPTIONS["nvidia_driver"], **PROGRESS_OPTIONS},
        supports_check_mode=True,
    )
    built: list[NvidiaDriver] = []

    def build() -> NvidiaDriver:
        built.append(NvidiaDriver(**own_options(module)))
        return built[0]

    def result(state: DriverState) -> dict[str, t.Any]:
        return built[0].result(state)

    run_resource_with_progress(module, build, result)


if __name__ == "__main__":
    main()
