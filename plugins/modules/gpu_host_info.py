#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module gpu_host_info."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_host_info
short_description: One look at a GPU host, whatever is installed on it
version_added: "1.0.0"
author: "The gpu_fleet.nim authors (@gpu-fleet)"
description:
  - Returns the operating system, Secure Boot, the GPUs on the PCI bus, the driver in memory, on disk and in user space, what
    the driver says of every GPU, the NVLink fabric, MIG, who uses the GPUs, Docker Engine, the container toolkit, free disk
    space, listening ports, and the NIM services.
  - Works on a host without driver, without Docker and without GPU. Changes nothing and loads nothing; C(nvidia-smi) is asked
    only while the driver is loaded.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes.info
options:
  sections:
    description:
      - Parts of the answer to look for; all when empty.
      - V(system), V(pci), V(driver), V(gpus), V(holders), V(docker), V(container_toolkit), V(space), V(ports), V(nim).
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Look at the host
  gpu_fleet.nim.gpu_host_info:
  register: host

- name: Show the driver
  ansible.builtin.debug:
    msg: "{{ host.driver.loaded }} is loaded, {{ host.driver.on_disk }} is installed"
"""

RETURN = r"""
os:
  description: Operating system.
  type: dict
  returned: always
  sample: {"id": "ubuntu", "version": "24.04", "family": "debian", "name": "Ubuntu 24.04.3 LTS"}
kernel:
  description: Release of the running kernel.
  type: str
  returned: always
machine:
  description: Machine hardware name.
  type: str
  returned: always
secure_boot:
  description: Whether the firmware enforces signatures.
  type: bool
  returned: always
pci_gpus:
  description: GPUs on the PCI bus with address, device id, architecture and the kernel driver bound to each.
  type: list
  elements: dict
  returned: always
nouveau:
  description: Whether nouveau is loaded, and whether it is blacklisted by this collection.
  type: dict
  returned: always
driver:
  description: The driver in memory, on disk for the running kernel, in user space, its flavour, and what dkms says.
  type: dict
  returned: always
gpus:
  description: What the driver says of every GPU; memory in MiB. Empty while no driver is loaded.
  type: list
  elements: dict
  returned: always
cuda_version:
  description: CUDA version of the user-space driver; empty when nvidia-smi did not answer.
  type: str
  returned: always
fabric:
  description: NVSwitch devices, whether Fabric Manager is needed, and the fabric state of each GPU that has one.
  type: dict
  returned: always
mig:
  description: Whether any GPU is in MIG mode, and the MIG devices by GPU.
  type: dict
  returned: always
holders:
  description: Processes that have NVIDIA device files open, with unit and container.
  type: list
  elements: dict
  returned: always
docker:
  description: Docker Engine as it runs (version, runtimes, live-restore, cgroup driver, CDI, …), or why it does not answer.
  type: dict
  returned: always
container_toolkit:
  description: Version, packages and configured mode of the NVIDIA Container Toolkit.
  type: dict
  returned: always
free_bytes:
  description: Free bytes on the file systems of images and models.
  type: dict
  returned: always
ports:
  description: TCP ports on which somebody listens.
  type: list
  elements: dict
  returned: always
nim:
  description:
    - NIM services that this collection has put on the host, with C(name), C(image), C(digest), C(gpus), C(port), C(ready),
      C(state), C(phase), C(seconds_to_ready), C(restarts), C(failures), C(model_id), C(version), C(url), C(reason) and
      C(message).
  type: list
  elements: dict
  returned: always
errors:
  description: Parts that could not be looked at, with the cause of each.
  type: dict
  returned: always
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_host_info import SECTIONS, gather
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import masked


def main() -> None:
    """Shell around the look."""
    module = AnsibleModule(
        argument_spec={"sections": {"type": "list", "elements": "str", "default": []}}, supports_check_mode=True
    )
    names = [name for name, _look in SECTIONS]
    unknown = [name for name in module.params["sections"] if name not in names]
    if unknown:
        module.fail_json(
            msg="sections = %s: no such section; choose from %s." % (", ".join(unknown), ", ".join(names)),
            reason="invalid_option",
        )
    found = gather(Host(), module.params["sections"])
    module.exit_json(changed=False, **dict(found, **masked({"errors": found["errors"]})))


if __name__ == "__main__":
    main()
