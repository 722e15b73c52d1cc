#!/usr/bin/env bash
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Runs molecule scenarios, by name, on the shared sandbox: two at once (MOLECULE_JOBS), as half of the time they wait.
set -euo pipefail
cd "$(dirname "$0")/.."
export MOLECULE_GLOB='molecule/*/molecule.yml'
jobs_at_once=${MOLECULE_JOBS:-2}
# Begun first, so that nobody waits for one of them at the end.
longest='upgrade multi_model lifecycle'
# Breaks the registry for all hosts, so nothing else runs beside it.
alone='failures'

NGC_API_KEY=$(PYTHONPATH=tests/sandbox/world python -c 'import control; print(control.KEY_VALID)')
export NGC_API_KEY

python tests/sandbox/sandbox.py up -n 0
logs=.build/molecule
mkdir -p "$logs"
rm -f "$logs"/*.passed
# Jobs in the background do not hear of an interrupt.
trap 'trap - INT TERM; kill 0' INT TERM

run() {
  local scenario=$1 prefix=$2 started=$SECONDS
  printf '== molecule: %s\n' "$scenario"
  if molecule test --scenario-name "$scenario" --destroy always 2>&1 | tee "$logs/$scenario.log" | sed -u "s/^/$prefix/"; then
    touch "$logs/$scenario.passed"
  fi
  printf '== molecule: %s took %d s\n' "$scenario" $((SECONDS - started))
}

beside=()
for scenario in $longest "$@"; do
  if [[ " $* " == *" $scenario "* && " ${beside[*]} $alone " != *" $scenario "* ]]; then
    beside+=("$scenario")
  fi
done
for scenario in "${beside[@]}"; do
  while [ "$(jobs -rp | wc -l)" -ge "$jobs_at_once" ]; do
    wait -n
  done
  if [ ${#beside[@]} -gt 1 ]; then run "$scenario" "$scenario: "; else run "$scenario" ''; fi &
done
wait
for scenario in $alone; do
  if [[ " $* " == *" $scenario "* ]]; then
    run "$scenario" ''
  fi
done

passed=() failed=()
for scenario in "$@"; do
  if [ -e "$logs/$scenario.passed" ]; then passed+=("$scenario"); else failed+=("$scenario"); fi
done
# Once more at the end, where people look first: what failed, in a few lines.
for scenario in "${failed[@]}"; do
  printf '== %s failed (%s/%s.log)\n' "$scenario" "$logs" "$scenario"
  sed -E 's/\x1b\[[0-9;]*m//g; s/^ *│ *//' "$logs/$scenario.log" |
    grep -E '^(FAILED|ERROR|E  |fatal:|\[ERROR\]|CRITICAL)' | cut -c -240 | tail -n 12 || true
done
printf 'scenarios: %d passed, %d failed%s\n' "${#passed[@]}" "${#failed[@]}" "${failed:+ (${failed[*]})}"
[ "${#failed[@]}" -eq 0 ]
