#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Own keys of daemon.json, and a live daemon that obeys them."""

from __future__ import annotations

DOCUMENTATION = r"""
module: docker_daemon
short_description: Merge keys into daemon.json and apply them without stopping containers
version_added: "1.0.0"
author: "The gpu_fleet.nim authors (@gpu-fleet)"
description:
  - Merges the given keys into C(daemon.json) and leaves every other key, the order and the indentation as they are.
  - Checks the result with C(dockerd --validate) where that exists (Engine 23.0 and newer), checks what that does not see, and
    replaces the file atomically.
  - Applies it with the smallest action that does it (C(SIGHUP) where that suffices, otherwise one restart) and reads the live
    daemon back. A key that the file has right but the daemon was never told counts as a change.
  - A restart never stops containers. Live-restore is switched on by a reload first; where it cannot work (switched off, swarm,
    a key that it does not carry over, an engine that removes C(--rm) containers, units that require C(docker.service)) the
    restart and the keys that need it are left out and appear in RV(blocked) with the reason.
  - A file that cannot be parsed is an error and stays as it is. A key that a command-line flag of dockerd sets as well is an
    error, because dockerd would not start.
extends_documentation_fragment:
  - gpu_fleet.nim.attributes
options:
  options:
    description:
      - Wanted keys of C(daemon.json). Mappings (C(features), C(runtimes), C(log-opts), …) are merged into what is there, other
        values replace it.
    type: dict
    default: {}
  absent:
    description:
      - Keys that must not be there, as V(key) or V(key.inner), for example V(runtimes.nvidia).
      - V(default-runtime) becomes V(runc), because a daemon keeps the last value of a key that is merely taken out.
    type: list
    elements: str
    default: []
  live_restore:
    description: Value of C(live-restore). Left alone when not given.
    type: bool
  config_file:
    description: The file to change. Not given, it is the one that dockerd was started with, normally C(/etc/docker/daemon.json).
    type: path
notes:
  - The file as it was before the last change is kept as C(/var/lib/gpu_fleet/daemon.json.before), readable for root only.
seealso:
  - name: dockerd reference
    description: All keys, and which of them a reload applies.
    link: https://docs.docker.com/reference/cli/dockerd/
"""

EXAMPLES = r"""
- name: Containers survive restarts of Docker; logs go to the journal
  gpu_fleet.nim.docker_daemon:
    live_restore: true
    options:
      log-driver: journald

- name: Forget a runtime that is no longer installed
  gpu_fleet.nim.docker_daemon:
    absent:
      - runtimes.kata
"""

RETURN = r"""
config_file:
  description: The file.
  returned: success
  type: str
  sample: /etc/docker/daemon.json
live:
  description: What the running daemon says of itself; empty when it does not run.
  returned: success
  type: dict
  contains:
    version:
      description: Engine version.
      type: str
    runtimes:
      description: Names of the registered runtimes.
      type: list
      elements: str
    default_runtime:
      description: Name of the default runtime.
      type: str
    live_restore:
      description: Whether containers survive a restart of the daemon.
      type: bool
    cgroup_driver:
      description: C(systemd) or C(cgroupfs).
      type: str
    cdi:
      description: Whether the CDI feature is on.
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
  sample: daemon_json_invalid
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_daemon import DockerDaemon
from ansible_collections.gpu_fleet.nim.plugins.module_utils._dockerd import DaemonState
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import run_resource
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import RESOURCE_OPTIONS


def result(state: DaemonState) -> dict[str, t.Any]:
    return {"config_file": state.path, "live": state.live()}


def main() -> None:
    module = AnsibleModule(
        argument_spec=RESOURCE_OPTIONS["docker_daemon"],
        supports_check_mode=True,
    )
    run_resource(module, lambda: DockerDaemon(**module.params), result)


if __name__ == "__main__":
    main()
