#!/usr/bin/env bash
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Verify the collection on a real GPU server, without touching what runs there: see README.md.
#
#   tests/real_gpu/run.sh [--tools TREE_OR_TAR] [--wheels DIRECTORY] [--output DIRECTORY]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
output=$PWD/real_gpu
tools='' wheels=''
while (($#)); do
    case $1 in
        --tools) tools=$(realpath "$2") ;;
        --wheels) wheels=$(realpath "$2") ;;
        --output) output=$2 ;;
        *) sed -n '/^# Verify/,/^set/{/^#/s/^# \?//p}' "$0" >&2; exit 2 ;;
    esac
    shift 2
done
((EUID == 0)) || { echo "real_gpu: must be root" >&2; exit 2; }
command -v nvidia-smi >/dev/null || { echo "real_gpu: no nvidia-smi in PATH" >&2; exit 2; }
mkdir -p "$output"
output=$(realpath "$output")

work=$(mktemp -d /tmp/real_gpu.XXXXXX)
# Where the collection and Docker write; empty and in memory in there.
own="/var/lib/docker /var/lib/nim /var/lib/gpu_fleet /etc/nim /etc/systemd/system /usr/local/libexec"
made=()
cleanup() {
    # Only what was made here and is still empty: the contents were in memory.
    for directory in "${made[@]}"; do rmdir --ignore-fail-on-non-empty "$directory"; done
    rm -rf "$work"
}
trap cleanup EXIT
for directory in $own; do
    test -d "$directory" || { mkdir -p "$directory"; made+=("$directory"); }
done

# The collection under the name that Python and Ansible expect.
mkdir -p "$work/collections/ansible_collections/gpu_fleet"
ln -s "$(realpath "$here/../..")" "$work/collections/ansible_collections/gpu_fleet/nim"
export PYTHONPATH=$work/collections${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
export ANSIBLE_COLLECTIONS_PATH=$work/collections ANSIBLE_HOME=$work/ansible LC_ALL=C.UTF-8
if test -n "$wheels"; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$work/wheels" "$wheels"/*.whl
    export PYTHONPATH=$PYTHONPATH:$work/wheels
fi
if test -n "$tools"; then
    if test -f "$tools"; then
        # Not every machine has xz.
        mkdir "$work/tools" && python3 -m tarfile -e "$tools" "$work/tools" 2>/dev/null && tools=$work/tools
    fi
    export PATH=$tools/usr/sbin:$tools/usr/bin:$PATH XTABLES_LIBDIR=$tools/usr/lib/x86_64-linux-gnu/xtables
    export LD_LIBRARY_PATH=$tools/usr/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi

# Own mounts and an own network: the host's Docker, its NIMs, its units and its firewall are out of sight from here on.
OWN="/run $own" unshare --mount --net bash -s "$here/check.py" --work "$work" --output "$output" <<'INSIDE'
set -e
mount --make-rprivate /
for directory in $OWN; do mount -t tmpfs -o mode=0755 none "$directory"; done
exec python3 "$@" </dev/null
INSIDE
