#!/bin/sh
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Starts dockerd in a cgroup and a mount namespace of its own: engine.sh start CGROUP dockerd ARGUMENTS...
set -eu

if [ "$1" = start ]; then
  echo $$ > "$2/cgroup.procs"
  shift 2
  exec unshare --cgroup --mount "$0" inside "$@"
fi
shift

# A pure cgroup2 for everything below, also on machines whose controllers are in cgroup v1.
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
# Controllers can be handed to containers only by a group that has no process itself.
mkdir -p /sys/fs/cgroup/engine
echo $$ > /sys/fs/cgroup/engine/cgroup.procs
read -r controllers < /sys/fs/cgroup/cgroup.controllers || controllers=""  # empty: none to hand on
for controller in $controllers; do
  echo "+$controller" > /sys/fs/cgroup/cgroup.subtree_control || true
done

# dockerd and containerd write to a few fixed places; in their view of the machine these are empty and their own.
for place in /run /opt /etc/docker; do
  if [ -d "$place" ]; then mount -t tmpfs none "$place"; fi
done
exec "$@"
