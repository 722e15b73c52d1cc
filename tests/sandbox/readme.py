# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the README shows is what runs: its inventory, and its commands one after the other."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import yaml

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "tests/sandbox/world"))

import control  # noqa: E402 (lies below a directory that is no package)
from fleet_sandbox.inventory import full_name  # noqa: E402

README = CHECKOUT / "README.md"
#: What the sandbox makes the README's hosts of.
HARDWARE = {"gpu01": {"sandbox_image": "ubuntu2404", "sandbox_gpus": "NVIDIA H200:143771:2"}, "gpu02": {}}


def inventory_text() -> str:
    """The first YAML block of the README."""
    found = re.search(r"^```yaml\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    if not found:
        raise SystemExit("README.md has no YAML block")
    return found.group(1)


def inventory_of(scenario: str) -> dict[str, Any]:
    """The README's inventory with the names that the hosts have in a test scenario."""
    inventory: dict[str, Any] = yaml.safe_load(inventory_text())
    group = inventory["gpu_hosts"]
    group["hosts"] = {
        full_name(scenario, name): {**variables, **HARDWARE[name]} for name, variables in group["hosts"].items()
    }
    return inventory


def playbook_commands() -> list[str]:
    """The indented ansible-playbook commands of the README, without their comments, in order, each once."""
    lines = re.findall(r"^ {4}(ansible-playbook .*)$", README.read_text(), re.MULTILINE)
    return list(dict.fromkeys(" ".join(line.split("#")[0].split()) for line in lines))


def write_inventory(output: pathlib.Path) -> None:
    """The README's inventory as it stands, and beside it how the sandbox's hosts are reached."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "inventory.yml").write_text(inventory_text())
    hosts = list(yaml.safe_load(inventory_text())["gpu_hosts"]["hosts"])
    sandbox = [sys.executable, str(CHECKOUT / "tests/sandbox/sandbox.py"), "inventory", "--json", *hosts]
    group = json.loads(subprocess.run(sandbox, check=True, stdout=subprocess.PIPE).stdout)["gpu_hosts"]
    for folder in ("host_vars", "group_vars"):
        (output / folder).mkdir(exist_ok=True)
    for name, variables in group["hosts"].items():
        (output / "host_vars" / (name + ".yml")).write_text(yaml.safe_dump(variables))
    (output / "group_vars" / "gpu_hosts.yml").write_text(yaml.safe_dump(group["vars"]))


def run_commands(folder: pathlib.Path) -> int:
    """Run every command of the README in the folder of the inventory; report in pytest's words."""
    failed = []
    environment = dict(os.environ, NGC_API_KEY=control.KEY_VALID)
    commands = playbook_commands()
    for command in commands:
        print("\n== README: %s" % command, flush=True)
        started = time.monotonic()
        done = subprocess.run(command.split(), cwd=folder, env=environment, check=False)
        print(
            "== %s after %.0f s" % ("ok" if done.returncode == 0 else "FAILED", time.monotonic() - started), flush=True
        )
        if done.returncode:
            failed.append(command)
    print("README commands: %d passed, %d failed" % (len(commands) - len(failed), len(failed)))
    return 1 if failed or not commands else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["inventory", "commands"])
    parser.add_argument("--output", type=pathlib.Path, default=CHECKOUT / ".sandbox", help="folder of the inventory")
    options = parser.parse_args()
    if options.what == "inventory":
        write_inventory(options.output)
        return 0
    return run_commands(options.output)


if __name__ == "__main__":
    sys.exit(main())
