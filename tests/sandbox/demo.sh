#!/usr/bin/env bash
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
# From bare hosts to answering models, with the inventory of the README.
set -euo pipefail
cd "$(dirname "$0")/../.."
started=$SECONDS
say() { printf '\n== %3d s  %s\n' $((SECONDS - started)) "$*"; }

say "sandbox: two bare GPU hosts and the outside world"
python tests/sandbox/sandbox.py up --hosts gpu01,gpu02

mkdir -p .sandbox/demo
# The README's inventory is what runs; the sandbox adds how its hosts are reached.
awk '/^```yaml$/ {inside = 1; next} /^```$/ {inside = 0} inside' README.md >.sandbox/demo/inventory.yml
export ANSIBLE_CONFIG=$PWD/.sandbox/ansible.cfg
NGC_API_KEY=$(python tests/sandbox/world/control.py --state .sandbox key)
export NGC_API_KEY
inventory=(-i .sandbox/demo/inventory.yml -i .sandbox/inventory.yml)

say "ansible-playbook gpu_fleet.nim.site"
ansible-playbook gpu_fleet.nim.site "${inventory[@]}"

say "ansible-playbook gpu_fleet.nim.status"
ansible-playbook gpu_fleet.nim.status "${inventory[@]}" -e status_output="$PWD/.sandbox/demo/status.json"

say "one streamed chat completion from every NIM, through its published port"
python tests/sandbox/chat.py --status .sandbox/demo/status.json --inventory .sandbox/inventory.yml

say "done; the sandbox stays up. Try:
   export ANSIBLE_CONFIG=$ANSIBLE_CONFIG ANSIBLE_COLLECTIONS_PATH=$ANSIBLE_COLLECTIONS_PATH NGC_API_KEY=$NGC_API_KEY PATH=$PWD/.venv/bin:\$PATH
   ansible-playbook gpu_fleet.nim.site ${inventory[*]}        # changes nothing
   python tests/sandbox/sandbox.py exec gpu01                     # a shell on a host
   make demo-down                                                 # remove every trace"
