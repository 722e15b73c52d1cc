#!/bin/sh
# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Run on a debian13 sandbox host: makes it a look-alike of Rocky Linux 9 with Debian's real dnf and rpm, and serves it a
# signed RPM repository with module streams of the driver at http://127.0.0.1:8300. Nothing but os-release is pretended
# of the distribution; the driver packages are empty but for a stand-in kernel module.
set -eu
kernel=$(uname -r)
export DEBIAN_FRONTEND=noninteractive
apt-get update -q >/dev/null
apt-get install -y -q --no-install-recommends dnf rpm createrepo-c dnf-plugins-core gpg gpg-agent >/dev/null

build=/tmp/rpm-build
repository=/srv/rpm/rhel9/x86_64
mkdir -p "$build" "$repository"
cd "$build"

module() { # version licence
    cat <<POST
%post
/usr/bin/python3 - <<PYTHON
import os, sys
sys.path.insert(0, "/usr/lib/sandbox-hardware")
from hardware import RELEASE, module_file, module_values
directory = "/lib/modules/" + RELEASE + "/updates/dkms"
os.makedirs(directory, exist_ok=True)
for name, depends in (("nvidia", ""), ("nvidia_uvm", "nvidia"), ("nvidia_modeset", "nvidia")):
    with open(directory + "/" + name.replace("_", "-") + ".ko", "wb") as out:
        out.write(module_file(module_values(name, "$1", "$2", RELEASE, depends)))
PYTHON
/usr/sbin/depmod -a $kernel
POST
}

package() { # name version epoch requires post provides
    cat >"$1.spec" <<SPEC
Name: $1
Epoch: $3
Version: $2
Release: 1.el9
Summary: stand-in of the gpu_fleet.nim sandbox
License: none
${4:+Requires: $4}
${6:+Provides: $6}
%description
Stand-in of the gpu_fleet.nim sandbox.
%files
$5
SPEC
    rpmbuild -bb --quiet --define "_topdir $build" --define "_rpmdir $repository" \
        --define "_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm" "$1.spec" >/dev/null 2>&1
}

artifacts() { # version kmod
    for name in "$2" nvidia-driver-cuda nvidia-driver-cuda-libs nvidia-persistenced; do
        echo "    - $name-3:$1-1.el9.x86_64"
    done
}

: >"$build/modules.yaml"
stream() { # stream context kmod versions...
    name=$1 context=$2 kmod=$3
    shift 3
    {
        printf -- '---\ndocument: modulemd\nversion: 2\ndata:\n  name: nvidia-driver\n  stream: %s\n' "$name"
        printf '  version: 20260101000000\n  context: %s\n  arch: x86_64\n  summary: driver\n  description: driver\n' "$context"
        printf '  license: {module: [none]}\n  profiles: {default: {rpms: [nvidia-driver-cuda]}}\n  artifacts:\n    rpms:\n'
        for version in "$@"; do artifacts "$version" "$kmod"; done
        printf '...\n'
    } >>"$build/modules.yaml"
}

for version in 535.183.06 580.65.06 580.95.05; do
    package kmod-nvidia-open-dkms $version 3 "" "$(module $version "Dual MIT/GPL")"
    package kmod-nvidia-latest-dkms $version 3 "" "$(module $version NVIDIA)"
    package nvidia-driver-cuda $version 3 "nvidia-driver-cuda-libs = 3:$version" ""
    package nvidia-driver-cuda-libs $version 3 "" ""
    package nvidia-persistenced $version 3 "" ""
done
# The shell is not an RPM here.
package dkms 3.2.2 0 "" "" /bin/sh
package "kernel-devel-$kernel" 1 0 "" ""
package python3-dnf-plugin-versionlock 4 0 "" ""
stream 535-dkms 53500000 kmod-nvidia-latest-dkms 535.183.06
stream 535-open 53500001 kmod-nvidia-open-dkms 535.183.06
stream 580-dkms 58000000 kmod-nvidia-latest-dkms 580.65.06 580.95.05
stream 580-open 58000001 kmod-nvidia-open-dkms 580.65.06 580.95.05

export GNUPGHOME="$build/gnupg"
mkdir -p -m 700 "$GNUPGHOME"
gpg --batch --quiet --passphrase '' --quick-gen-key 'Sandbox <sandbox@example.invalid>' rsa2048 sign never
cd "$repository"
gpg --armor --export >D42D0685.pub
rpmsign --define '_gpg_name Sandbox' --addsign ./*.rpm >/dev/null 2>&1
createrepo_c -q .
modifyrepo_c --mdtype=modules "$build/modules.yaml" repodata >/dev/null

# Debian's dnf brings plugins that need Fedora's surroundings.
for plugin in local system_upgrade; do
    printf '[main]\nenabled=0\n' >/etc/dnf/plugins/$plugin.conf
done
mkdir -p /etc/yum.repos.d /etc/dnf/vars "/lib/modules/$kernel/build"
echo 9 >/etc/dnf/vars/releasever
grep -q platform:el9 /etc/dnf/dnf.conf || echo 'module_platform_id=platform:el9' >>/etc/dnf/dnf.conf
rpm --initdb
rm -f /etc/os-release
cat >/etc/os-release <<'RELEASE'
ID=rocky
VERSION_ID=9.4
ID_LIKE="rhel centos fedora"
PRETTY_NAME="Rocky Linux 9.4 (look-alike, Debian underneath)"
PLATFORM_ID="platform:el9"
RELEASE
systemd-run --quiet --unit rpm-repository --collect python3 -m http.server 8300 --directory /srv/rpm --bind 127.0.0.1
