#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""NVIDIA Container Toolkit of a GPU host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nvidia_container_toolkit
short_description: Give containers GPUs, and prove it with one
version_added: "1.0.0"
author: "The gpu_fleet.nim authors (@gpu-fleet)"
description:
  - Installs the four packages of the NVIDIA Container Toolkit at one version and holds them; a version skew between them is
    mended.
  - Registers the runtime C(nvidia) in Docker by a merge of C(daemon.json) (never through C(nvidia-ctk runtime configure)) and
    tells the running daemon by a reload, which no container notices.
  - Sets the runtime's mode explicitly in C(config.toml), keeps the CDI specification in step with the loaded driver, and
    removes a stale one from C(/etc/cdi).
  - Runs C(nvidia-smi -L) in a container made of the host's own files, in the way the NIM containers ask for GPUs, and compares
    the UUIDs with the host's. It does so again only when driver, toolkit, Docker or mode have changed, or after a reboot;
    alone, that is no change.
  - >-
    The three causes of C(could not select device driver "" with capabilities: [[gpu]]) (toolkit absent, never registered,
    daemon not told) appear as such in the changes and are mended without restarting other containers.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
  - gpu_fleet.nim.progress
options:
  repository_url:
    description: Base of NVIDIA's repository or of a mirror of it, with the directory C(stable) and the file C(gpgkey).
    type: str
    default: https://nvidia.github.io/libnvidia-container
  version:
    description:
      - Exact version (V(1.20.0) or V(1.20.0-1)) or its leading components (V(1.20)).
      - Empty installs the newest 1.x, and afterwards keeps what is installed.
    type: str
    default: ""
  mode:
    description:
      - Mode of the runtime. It is written into C(config.toml) in any case, because its default has changed between releases.
      - V(auto) is V(jit-cdi) since toolkit 1.18 and V(legacy) before.
      - With V(legacy), C(systemctl daemon-reload) can take the GPUs away from running containers.
    type: str
    choices: [auto, legacy, cdi, jit-cdi, csv]
    default: auto
  default_runtime:
    description: Whether C(nvidia) becomes Docker's default runtime. False leaves the default alone.
    type: bool
    default: false
  cdi:
    description:
      - Whether to turn Docker's CDI feature on (Engine 25.0 and newer) and keep a specification ready. False leaves it alone.
      - Turning it on takes one restart of Docker, which is left out (see RV(blocked)) unless live-restore keeps containers going.
    type: bool
    default: false
  hold:
    description: Whether package upgrades leave the four packages alone.
    type: bool
    default: true
  smoke_test:
    description: Whether a GPU container must prove that all this works. Left out on hosts where no driver is loaded.
    type: bool
    default: true
  injection:
    description:
      - How the containers of this host ask for GPUs.
      - V(runtime) is C(--runtime=nvidia), V(cdi) is C(--device nvidia.com/gpu=…), V(gpus) is C(--gpus).
      - V(cdi) implies O(cdi=true). V(gpus) needs a Docker that was started after the toolkit was installed.
    type: str
    choices: [runtime, cdi, gpus]
    default: runtime
seealso:
  - module: gpu_fleet.nim.docker_daemon
  - name: NVIDIA Container Toolkit
    description: NVIDIA's documentation.
    link: https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/index.html
"""

EXAMPLES = r"""
- name: Toolkit, runtime and a GPU container as proof
  gpu_fleet.nim.nvidia_container_toolkit:

- name: One exact version on the whole fleet, from a mirror
  gpu_fleet.nim.nvidia_container_toolkit:
    repository_url: https://mirror.example.org/libnvidia-container
    version: 1.20.0

- name: Containers name their GPUs as CDI devices
  gpu_fleet.nim.nvidia_container_toolkit:
    injection: cdi
"""

RETURN = r"""
version:
  description: Version of the packages; empty when they are not installed (check mode).
  returned: success
  type: str
  sample: 1.20.0-1
mode:
  description: Mode in config.toml.
  returned: success
  type: str
  sample: auto
registered:
  description: Whether the running daemon knows the runtime.
  returned: success
  type: bool
smoke_test:
  description: C(passed) with the present driver, toolkit, Docker and mode, or C(not run) (no driver loaded, not asked for, blocked).
  returned: success
  type: str
  sample: passed
gpus:
  description: UUIDs that the smoke test's container saw.
  returned: success
  type: list
  elements: str
changes:
  description: What was changed (in check mode, what would be), with reason and disruption.
  returned: always
  type: list
  elements: dict
blocked:
  description: What should change but must not in this run, and what would allow it.
  returned: success
  type: list
  elements: dict
reason:
  description: Stable identifier of the failure.
  returned: failure
  type: str
  sample: driver_mismatch
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module_progress import (
    PROGRESS_OPTIONS,
    own_options,
    run_resource_with_progress,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_container_toolkit import NvidiaContainerToolkit
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_container_toolkit_planner import ToolkitState
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import RESOURCE_OPTIONS


def main() -> None:
    module = AnsibleModule(
        argument_spec={**RESOURCE_OPTIONS["nvidia_container_toolkit"], **PROGRESS_OPTIONS},
        supports_check_mode=True,
    )
    resources: list[NvidiaContainerToolkit] = []

    def build() -> NvidiaContainerToolkit:
        resources.append(NvidiaContainerToolkit(**own_options(module)))
        return resources[0]

    def result(state: ToolkitState) -> dict[str, t.Any]:
        passed = resources[0].validated(state)
        return {
            "version": state.version,
            "mode": state.mode or "",
            "registered": state.registered,
            "smoke_test": "passed" if passed else "not run",
            "gpus": list(state.validation.get("gpus", [])) if passed else [],
        }

    run_resource_with_progress(module, build, result)


if __name__ == "__main__":
    main()
