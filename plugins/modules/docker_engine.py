#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Docker Engine of a GPU host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: docker_engine
short_description: Install a Docker Engine that can run NVIDIA NIM, and keep it running
version_added: "1.0.0"
author: "The gpu_fleet.nim authors (@gpu-fleet)"
description:
  - Installs Docker Engine from Docker's repository or from the distribution, holds the packages, and enables and starts
    C(docker.service).
  - Refuses engines that are too old for NIM, and 29.5.x, which cannot pull from nvcr.io.
  - Never swaps one source for the other, and never changes the engine under running containers unless live-restore carries
    them over; it says so instead (see RV(blocked)).
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
  - gpu_fleet.nim.progress
options:
  package_source:
    description:
      - C(docker) installs C(docker-ce) from O(repository_url).
      - C(distribution) installs the distribution's own engine (C(docker.io) on Debian and Ubuntu, C(moby-engine) on Fedora).
    type: str
    choices: [docker, distribution]
    default: docker
  repository_url:
    description: Base of Docker's repository or of a mirror of it, with the directories C(debian), C(ubuntu), C(centos), C(rhel).
    type: str
    default: https://download.docker.com/linux
  version:
    description:
      - Exact version (V(28.3.3) or the full package version) or its leading components (V(28.3)).
      - Empty installs the newest one that fits, and afterwards keeps what is installed as long as it fits.
    type: str
    default: ""
  minimum_version:
    description: Oldest engine that will do. NIM 1.x needs 23.0.1, NIM 2.x needs 24.0.
    type: str
    default: 23.0.1
  hold:
    description: Whether package upgrades leave the engine alone; an unattended upgrade would restart Docker.
    type: bool
    default: true
seealso:
  - module: gpu_fleet.nim.docker_daemon
  - module: gpu_fleet.nim.docker_group
"""

EXAMPLES = r"""
- name: Docker Engine from Docker's repository
  gpu_fleet.nim.docker_engine:

- name: The distribution's engine, new enough for NIM 2.x
  gpu_fleet.nim.docker_engine:
    package_source: distribution
    minimum_version: "24.0"

- name: An exact version from a mirror
  gpu_fleet.nim.docker_engine:
    repository_url: https://mirror.example.org/docker/linux
    version: 28.3.3
"""

RETURN = r"""
package:
  description: Name of the installed engine package; empty when none is installed (check mode).
  returned: success
  type: str
  sample: docker-ce
version:
  description: Its full package version.
  returned: success
  type: str
  sample: 5:28.3.3-1~debian.12~bookworm
running:
  description: Whether the daemon answers.
  returned: success
  type: bool
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
  sample: source_switch_refused
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_engine import DockerEngine
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_engine_planner import EngineState
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module_progress import (
    PROGRESS_OPTIONS,
    own_options,
    run_resource_with_progress,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import RESOURCE_OPTIONS


def result(state: EngineState) -> dict[str, t.Any]:
    engine = state.installed_engine()
    return {
        "package": engine.name if engine else "",
        "version": engine.version if engine else "",
        "running": state.daemon.answers,
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={**RESOURCE_OPTIONS["docker_engine"], **PROGRESS_OPTIONS},
        supports_check_mode=True,
    )
    run_resource_with_progress(module, lambda: DockerEngine(**own_options(module)), result)


if __name__ == "__main__":
    main()
