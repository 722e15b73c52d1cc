#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: nim_deploy
short_description: Change the models of a host that serves, step by step, with a way back
version_added: "1.0.0"
description:
  - "Takes a host from NIM services that run what was wanted before to services that are ready with what is wanted now: another image,
    another digest behind the same tag, other settings."
  - What is changed is what M(gpu_fleet.nim.nim_service) would change. The files of before are kept until every service is ready; when
    one does not become ready they are put back, and the services run again as they did, by the digest of before.
  - Every step is looked for on the host before it is taken and written down after it, in C(/var/lib/gpu_fleet/nim-deploy.json).
    An interrupted deployment goes on where it was, from any controller. A host whose models run as wanted is not touched.
  - Images must be there before, see M(gpu_fleet.nim.nim_image); nothing is pulled here.
  - Whoever calls it takes the host out of the load balancer between O(state=drained) and O(state=ready). The role
    P(gpu_fleet.nim.nim_deploy#role) does both.
  - The change runs as a job on the host, which a lost connection does not stop.
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
  - gpu_fleet.nim.progress
  - gpu_fleet.nim.rollout
options:
  state:
    description:
      - V(prestaged), everything is checked that can be while the host serves. What cannot work is refused here.
      - V(drained), that, and the host is on record as about to be taken out of service.
      - V(ready), all steps until the services are ready with what is wanted.
      - V(returned), the host has been given back and the record is closed.
      - V(restored), the deployment is given up, which is possible as long as nothing was changed and nobody has put the host under
        maintenance.
    type: str
    choices: [prestaged, drained, ready, returned, restored]
    default: ready
  nim_service:
    description:
      - The services that are wanted, as the options of M(gpu_fleet.nim.nim_service).
      - When it is not given, they come from the variables of the role P(gpu_fleet.nim.nim#role).
    type: dict
seealso:
  - module: gpu_fleet.nim.nim_image
  - module: gpu_fleet.nim.nim_service
  - module: gpu_fleet.nim.fleet_rollout
"""

EXAMPLES = r"""
- name: Everything that can be checked while the host serves
  gpu_fleet.nim.nim_deploy:
    state: prestaged
  become: true

- name: The new version, when the host is out of the load balancer
  gpu_fleet.nim.nim_deploy:
    state: ready
    nim_service:
      models:
        - name: llama
          image: nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.5
          gpus: 1
  become: true
"""

RETURN = r"""
message:
  description: One sentence about the host.
  returned: success
  type: str
gpu:
  description: Always true; a host without GPUs has no models.
  returned: success
  type: bool
due:
  description: Whether a model does not run what is wanted, or the host was not given back yet.
  returned: success
  type: bool
target:
  description: What is wanted, in words.
  returned: success
  type: str
  sample: llama 1.8.5, qwen 1.2.0
runs:
  description: What runs, in words.
  returned: success
  type: str
  sample: llama 1.8.4, qwen 1.2.0
digest:
  description: Name of the target; a host that has reached it is not touched.
  returned: success
  type: str
step:
  description: The last step that was finished; empty when there was none.
  returned: success
  type: str
outcome:
  description:
    - How the deployment on record has ended, V(updated), V(restored) (nothing was changed), V(rolled_back) (what ran before was put
      back) or V(stranded) (the host stays out); empty while it is under way.
    - After a failure it says where the host is. It is missing when nothing had been begun.
  returned: always
  type: str
open:
  description: Whether the host was taken out of service by a deployment and not given back.
  returned: success
  type: bool
held:
  description: Why the host is left alone, for example because somebody has it under maintenance; empty when it is not.
  returned: success
  type: str
wanted:
  description: Services that are to be ready in the end.
  returned: success
  type: list
  elements: str
models:
  description: Services that are to be ready in the end, or ran before the deployment.
  returned: success
  type: list
  elements: str
serving:
  description: Those that are ready now; looked for with O(state=prestaged) only, and told where that is refused, too.
  returned: success and refusal
  type: list
  elements: str
way_back:
  description: Why what runs now could not be put back; empty when it can. Looked for with O(state=prestaged) only.
  returned: success
  type: str
steps:
  description: The steps that are left until the host is given back, as changes.
  returned: success
  type: list
  elements: dict
record:
  description: What is on record on the host; empty when its models never were changed this way.
  returned: success
  type: dict
changes:
  description: Steps that were taken, or would be in check mode.
  returned: always
  type: list
  elements: dict
blocked:
  description: Steps that were left, with the cause of each.
  returned: success
  type: list
  elements: dict
reason:
  description: Stable identifier of the failure.
  returned: failure
  type: str
  sample: start_timeout
claim:
  description: Who is at the host, when O(run) was refused.
  returned: failure
  type: dict
"""

import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._module_progress import (
    PROGRESS_OPTIONS,
    run_resource_with_progress,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_deploy import NimDeploy
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_deploy_planner import DeployState
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resources_module import ResourcesModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout_record import ROLLOUT_OPTIONS


def main() -> None:
    """Shell around the resource."""
    module = ResourcesModule(
        ["nim_service"],
        {
            **ROLLOUT_OPTIONS,
            **PROGRESS_OPTIONS,
        },
    )
    built: list[NimDeploy] = []

    def build() -> NimDeploy:
        built.append(
            NimDeploy(
                services=module.resources()["nim_service"],
                goal=module.params["state"],
                **{name: module.params[name] for name in ("run", "take_over", "lease")},
            )
        )
        return built[0]

    def result(state: DeployState) -> dict[str, t.Any]:
        return built[0].result(state)

    run_resource_with_progress(module, build, result)


if __name__ == "__main__":
    main()
