#!/usr/bin/env bash
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
# ansible-test wants a real directory .../ansible_collections/gpu_fleet/nim: a copy of what git knows.
set -euo pipefail
cd "$(dirname "$0")/.."
tests/tools.sh shellcheck=shellcheck
copy=.build/sanity/ansible_collections/gpu_fleet/nim
rm -rf "$copy" && mkdir -p "$copy"
git ls-files -co --exclude-standard -z | while IFS= read -r -d '' name; do [ -e "$name" ] && printf '%s\0' "$name"; done |
  tar --null -T - -c | tar -x -C "$copy"
# Without a repository of its own the copy would count as ignored by the one around it.
git -C "$copy" init -q && git -C "$copy" add -A

# ansible-test bootstraps its virtual environments with a get-pip script of a fixed name that it downloads;
# where only a Python package index can be reached, ensurepip and that index do the same.
cache="$HOME/.ansible/test/cache"
mkdir -p "$cache"
if [ ! -e "$cache/get_pip_24_2.py" ]; then
  cat >"$cache/get_pip_24_2.py" <<'PY'
import ensurepip, os, subprocess, sys
ensurepip.bootstrap(default_pip=True)
os.environ.pop("PIP_CONFIG_FILE", None)
sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pip==24.2", "setuptools", "wheel"]))
PY
fi
cd "$copy"
exec ansible-test sanity --local --python "$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')" --color no "$@"
