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
passed=() failed=()
for scenario in "$@"; do
  printf '== molecule: %s\n' "$scenario"
  started=$SECONDS
  if molecule test --scenario-name "$scenario" --destroy always; then
    passed+=("$scenario")
  else
    failed+=("$scenario")
  fi
  printf '== molecule: %s took %d s\n' "$scenario" $((SECONDS - started))
done
printf 'scenarios: %d passed, %d failed%s\n' "${#passed[@]}" "${#failed[@]}" "${failed:+ (${failed[*]})}"
[ "${#failed[@]}" -eq 0 ]
