#!/usr/bin/env bash
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Runs molecule scenarios, by name, one after the other, on the shared sandbox.
set -euo pipefail
cd "$(dirname "$0")/.."
export MOLECULE_GLOB='molecule/*/molecule.yml'

NGC_API_KEY=$(PYTHONPATH=tests/sandbox/world python -c 'import control; print(control.KEY_VALID)')
export NGC_API_KEY

python tests/sandbox/sandbox.py up -n 0
logs=.build/molecule
mkdir -p "$logs"
passed=() failed=()
for scenario in "$@"; do
  printf '== molecule: %s\n' "$scenario"
  started=$SECONDS
  if molecule test --scenario-name "$scenario" --destroy always 2>&1 | tee "$logs/$scenario.log"; then
    passed+=("$scenario")
  else
    failed+=("$scenario")
  fi
  printf '== molecule: %s took %d s\n' "$scenario" $((SECONDS - started))
done
# Once more at the end, where people look first: what failed, in a few lines.
for scenario in "${failed[@]}"; do
  printf '== %s failed (%s/%s.log)\n' "$scenario" "$logs" "$scenario"
  sed -E 's/\x1b\[[0-9;]*m//g; s/^ *│ *//' "$logs/$scenario.log" |
    grep -E '^(FAILED|ERROR|E  |fatal:|\[ERROR\]|CRITICAL)' | cut -c -240 | tail -n 12 || true
done
printf 'scenarios: %d passed, %d failed%s\n' "${#passed[@]}" "${#failed[@]}" "${failed:+ (${failed[*]})}"
[ "${#failed[@]}" -eq 0 ]
