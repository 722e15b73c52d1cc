#!/bin/sh
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Installs the stand-in GPU hardware into the root file system of a host image: install.sh ROOTFS
# The result depends on the kernel of this machine (uname -r): rebuild the image when that changes.
set -eu
root=${1:?usage: install.sh ROOTFS}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
archive=/usr/share/sandbox/kernel-archive

python3 "$here/archive.py" "$root$archive"
mkdir -p "$root/etc/apt/sources.list.d"
cat >"$root/etc/apt/sources.list.d/kernel-archive.sources" <<SOURCES
# The archive of the sandbox machine's kernel: its headers, and stand-ins for dkms, initramfs-tools and mokutil.
Types: deb
URIs: file:$archive
Suites: ./
Trusted: yes
SOURCES

# What a GPU server has before anything of NVIDIA's is installed. dkms and the headers are left to whoever needs them.
if ! chroot "$root" dpkg-query -W -f "\${Status}" kmod 2>/dev/null | grep -q 'install ok installed'; then
    chroot "$root" apt-get update
    chroot "$root" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends kmod
fi
chroot "$root" sh -c "DEBIAN_FRONTEND=noninteractive dpkg -i $archive/sandbox-hardware_*.deb $archive/mokutil_*.deb $archive/initramfs-tools_*.deb"
# So that the first apt-get install of the headers works without an update, as on a freshly installed server.
chroot "$root" apt-get update -o Dir::Etc::sourcelist=/etc/apt/sources.list.d/kernel-archive.sources \
    -o Dir::Etc::sourceparts=- -o APT::Get::List-Cleanup=0 >/dev/null
