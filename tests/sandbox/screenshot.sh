#!/usr/bin/env bash
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
# The picture of the report in the documentation, of the demo's two hosts after somebody has been at one of them.
set -euo pipefail
cd "$(dirname "$0")/../.."
checkout=$PWD
command -v chromium >/dev/null || apt-get install -qy --no-install-recommends chromium fonts-inter

export ANSIBLE_CONFIG=$checkout/.sandbox/ansible.cfg
NGC_API_KEY=$(PYTHONPATH=tests/sandbox/world python -c 'import control; print(control.KEY_VALID)')
export NGC_API_KEY
profile=$(mktemp -d)
trap 'rm -rf "$profile"; cd "$checkout/.sandbox" && ansible-playbook gpu_fleet.nim.site -i inventory.yml' EXIT

python tests/sandbox/sandbox.py exec gpu02 -- gpasswd --delete ops docker
python tests/sandbox/sandbox.py exec gpu02 -- systemctl stop nim-nemotron
python tests/sandbox/sandbox.py exec gpu02 -- apt-mark unhold docker.io
cd .sandbox
ansible-playbook gpu_fleet.nim.plan -i inventory.yml -e plan_report="$profile/fleet.html"

mkdir -p "$checkout/docs/images"
if ! chromium --headless --no-sandbox --disable-gpu --disable-background-networking --user-data-dir="$profile" \
  --hide-scrollbars --force-device-scale-factor=1.5 --window-size=1200,"${HEIGHT:-1080}" \
  --screenshot="$checkout/docs/images/fleet-report.png" "file://$profile/fleet.html" >"$profile/said" 2>&1; then
  cat "$profile/said" && exit 1
fi
