#!/usr/bin/python
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation only: the action plugin of the same name does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_status
short_description: Show the state of all hosts of the play as one table
version_added: "1.0.0"
description:
  - Makes a table (host, GPUs, driver, engine, toolkit, NIM, image digest, state, seconds to ready) out of what
    M(gpu_fleet.nim.gpu_host_info) returned on every host, and prints it on standard output.
  - Models that the inventory wants and that a host does not have are rows too.
author:
  - The gpu_fleet.nim authors (@gpu-fleet)
extends_documentation_fragment:
  - gpu_fleet.nim.fleet_table
  - gpu_fleet.nim.attributes.info
seealso:
  - module: gpu_fleet.nim.gpu_host_info
"""

EXAMPLES = r"""
- name: Look at the hosts
  gpu_fleet.nim.gpu_host_info:
  become: true
  register: look

- name: Show them
  gpu_fleet.nim.fleet_status:
    variable: look
    output: status.json
"""

RETURN = r"""
rows:
  description: One entry a service, or a host without one.
  returned: success
  type: list
  elements: dict
  contains:
    host:
      description: Name in the inventory.
      type: str
    address:
      description: Where clients reach it.
      type: str
    gpus:
      description: Its GPUs, counted.
      type: str
    driver:
      description: Version of the loaded driver.
      type: str
    engine:
      description: Version of Docker Engine.
      type: str
    toolkit:
      description: Version of the NVIDIA Container Toolkit.
      type: str
    nim:
      description: Name of the model.
      type: str
    image:
      description: Its image as the inventory names it.
      type: str
    digest:
      description: The digest that it runs.
      type: str
    state:
      description: Whether it is ready, or in which state it is.
      type: str
    seconds_to_ready:
      description: Seconds from the start of the container until it was ready.
      type: float
    port:
      description: Its TCP port.
      type: int
    url:
      description: Where clients reach it.
      type: str
    model_id:
      description: Name of the model in the API.
      type: str
    message:
      description: What is wrong, as a sentence.
      type: str
"""
