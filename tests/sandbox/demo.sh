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

# The README's inventory is what runs; the sandbox adds, beside it, how its hosts are reached.
python tests/sandbox/readme.py inventory --output .sandbox
export ANSIBLE_CONFIG=$PWD/.sandbox/ansible.cfg
NGC_API_KEY=$(PYTHONPATH=tests/sandbox/world python -c 'import control; print(control.KEY_VALID)')
export NGC_API_KEY
cd .sandbox

say "ansible-playbook gpu_fleet.nim.site -i inventory.yml"
ansible-playbook gpu_fleet.nim.site -i inventory.yml

say "ansible-playbook gpu_fleet.nim.status -i inventory.yml"
ansible-playbook gpu_fleet.nim.status -i inventory.yml -e status_output="$PWD/status.json"

say "one streamed chat completion from every NIM, through its published port"
python ../tests/sandbox/chat.py status.json

say "done. The sandbox stays up:"
cat <<TEXT
   cd $PWD
   export ANSIBLE_CONFIG=$ANSIBLE_CONFIG
   export ANSIBLE_COLLECTIONS_PATH=$ANSIBLE_COLLECTIONS_PATH
   export NGC_API_KEY=$NGC_API_KEY PATH=$(dirname "$(command -v python)"):\$PATH
   ansible-playbook gpu_fleet.nim.site -i inventory.yml       # changes nothing
   python ../tests/sandbox/sandbox.py exec gpu01              # a shell on a host
   make -C .. demo-down                                       # removes every trace
TEXT
