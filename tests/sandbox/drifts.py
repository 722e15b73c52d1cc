# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ways to break a converged host: what somebody does to it, what the plan must say then, and what a repair may touch.

The host has two H200 with a model each, ``llama`` on port 8000 and ``mistral`` on port 8001, and what ``VARIABLES`` asks for.
"""

from __future__ import annotations

import dataclasses
import textwrap

from fleet_testing import Json

#: Variables of the host; it is told to want as much as possible, so that as much as possible can be taken from it.
VARIABLES: Json = {
    "nvidia_driver_branch": "580",
    "nvidia_driver_version": "580.95.05",
    "docker_users": ["ops"],
    "docker_daemon_options": {"log-opts": {"max-size": "10m"}, "shutdown-timeout": 30},
    "nvidia_container_toolkit_version": "1.20.0",
    "nvidia_container_toolkit_default_runtime": True,
    "nvidia_container_toolkit_cdi": True,
    "ngc_api_key": "{{ lookup('ansible.builtin.env', 'NGC_API_KEY') }}",
    "nim_models": [
        {
            "name": "llama",
            "image": "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4",
            "gpus": 1,
            "port": 8000,
            "environment": {"NIM_LOG_LEVEL": "INFO"},
            "secret_environment": {"HF_TOKEN": "hf_notARealTokenOfAnybody"},
        },
        {
            "name": "mistral",
            "image": "nvcr.io/nim/mistralai/mistral-7b-instruct-v0.3:1.12.2",
            "gpus": 1,
            "port": 8001,
        },
    ],
}
LLAMA = VARIABLES["nim_models"][0]["image"]
MISTRAL = VARIABLES["nim_models"][1]["image"]

#: Shell commands that leave a docker-proxy of no container on llama's port, and its process id in /tmp/proxy.
LEFTOVER_PROXY = (
    "setsid docker-proxy -proto tcp -host-ip 0.0.0.0 -host-port 8000 -container-ip 172.17.0.250 -container-port 8000 "
    "3>/dev/null </dev/null >/dev/null 2>&1 &\n"
    "echo $! > /tmp/proxy; sleep 1; kill -0 $(cat /tmp/proxy)"
)

DAEMON_JSON = "/etc/docker/daemon.json"
CONFIG_TOML = "/etc/nvidia-container-runtime/config.toml"


@dataclasses.dataclass(frozen=True)
class Drift:
    """One line of the table.

    Attributes:
        name: What has happened to the host, in a few words.
        breaks: Shell commands that do it.
        plan: All changes that the plan must show, each as "resource, part of what, disruption"; ``later`` before the
            disruption, the worst that it may come to, where it must say that it waits for another resource, and ``error``
            in the place of it where it must give the reason.
        restarts: Who may be another process when all is over: ``docker``, ``persistenced``, ``driver`` (loaded anew),
            names of models. Everybody else must be the same as before.
        refused: The run must refuse to repair it, with the plan's own words, and change nothing; ``undo`` ends it then.
        undo: Shell commands.
        leaves: What is other on the host than before when all is over, as beginnings of what ``Host.snapshot`` names; with
            the reason beside it in the table.
        notes: What the plan must say besides.
        first: Belongs to the few that are tried with every change of the collection.
    """

    name: str
    breaks: str
    plan: tuple[str, ...] = ()
    restarts: frozenset[str] = frozenset()
    refused: bool = False
    undo: str = ""
    leaves: tuple[str, ...] = ()
    notes: str = ""
    first: bool = False

    def __str__(self) -> str:
        return self.name


def _json(path: str, code: str) -> str:
    """Shell command that edits a JSON file as ``d``, in place."""
    program = "import json, sys\nd = json.load(open(%r))\n%s\njson.dump(d, open(%r, 'w'), indent=2)\n" % (
        path,
        textwrap.dedent(code),
        path,
    )
    return "python3 - <<'END'\n%sEND\n" % program


def _drift(
    name: str,
    breaks: str,
    *plan: str,
    restarts: str = "",
    refused: bool = False,
    undo: str = "",
    leaves: str = "",
    notes: str = "",
    first: bool = False,
) -> Drift:
    return Drift(name, breaks, plan, frozenset(restarts.split()), refused, undo, tuple(leaves.split()), notes, first)


#: What heals by itself has done so when the command ends; an end soon after another one is forgotten, too.
_READY = (
    "\nsleep 1; for each in $(seq 300); do curl -fs http://127.0.0.1:8000/v1/health/ready >/dev/null "
    '&& grep -q \'"ready".*"unsteady": 0\' /run/nim/llama.json && exit 0; sleep 0.2; done; exit 1'
)
#: A reload that the daemon has finished when the command ends.
_RELOAD = "systemctl reload docker; sleep 1\n"

_DRIVER = (
    _drift(
        "driver's repository gone",
        "rm /etc/apt/sources.list.d/nvidia-cuda.sources",
        "nvidia_driver, repository nvidia-cuda, none",
    ),
    _drift(
        "driver's repository switched off",
        "sed -i '1i Enabled: no' /etc/apt/sources.list.d/nvidia-cuda.sources",
        "nvidia_driver, repository nvidia-cuda, none",
    ),
    _drift(
        "driver's repository at another address",
        "sed -i 's|^URIs: .*|URIs: https://mirror.example/cuda|' /etc/apt/sources.list.d/nvidia-cuda.sources",
        "nvidia_driver, repository nvidia-cuda, none",
    ),
    _drift(
        "driver's keyring gone", "rm /etc/apt/keyrings/nvidia-cuda.gpg", "nvidia_driver, repository nvidia-cuda, none"
    ),
    _drift(
        "driver's keyring holds another key",
        "cp /usr/share/keyrings/debian-archive-keyring.gpg /etc/apt/keyrings/nvidia-cuda.gpg",
        "nvidia_driver, repository nvidia-cuda, none",
    ),
    _drift(
        "driver's keyring readable for root alone",
        "chmod 0600 /etc/apt/keyrings/nvidia-cuda.gpg",
        "nvidia_driver, repository nvidia-cuda, none",
    ),
    _drift(
        "driver's repository defined twice",
        'echo "deb [signed-by=/usr/share/keyrings/x.gpg] '
        "$(sed -n 's/^URIs: //p' /etc/apt/sources.list.d/nvidia-cuda.sources) /\" > /etc/apt/sources.list.d/cuda.list",
        "nvidia_driver, repository nvidia-cuda, none",
    ),
    _drift(
        "preferences of the driver gone",
        "rm /etc/apt/preferences.d/gpu-fleet-nvidia-driver",
        "nvidia_driver, /etc/apt/preferences.d/gpu-fleet-nvidia-driver, none",
    ),
    _drift(
        "preferences of the driver edited",
        "sed -i 's/1000/100/' /etc/apt/preferences.d/gpu-fleet-nvidia-driver",
        "nvidia_driver, /etc/apt/preferences.d/gpu-fleet-nvidia-driver, none",
    ),
    _drift(
        "nouveau no longer kept out",
        "rm /etc/modprobe.d/gpu-fleet-nouveau.conf",
        "nvidia_driver, /etc/modprobe.d/gpu-fleet-nouveau.conf, none",
    ),
    _drift(
        "nouveau's blacklist edited",
        "sed -i 's/^blacklist/# &/' /etc/modprobe.d/gpu-fleet-nouveau.conf",
        "nvidia_driver, /etc/modprobe.d/gpu-fleet-nouveau.conf, none",
    ),
    _drift(
        "unattended upgrades take the driver again",
        "rm /etc/apt/apt.conf.d/52gpu-fleet-nvidia",
        "nvidia_driver, /etc/apt/apt.conf.d/52gpu-fleet-nvidia, none",
    ),
    _drift(
        "unattended upgrades: one pattern taken out",
        "sed -i '/cuda-drivers/d' /etc/apt/apt.conf.d/52gpu-fleet-nvidia",
        "nvidia_driver, /etc/apt/apt.conf.d/52gpu-fleet-nvidia, none",
    ),
    _drift(
        "a driver package not held",
        "apt-mark unhold libnvidia-compute-580",
        "nvidia_driver, package holds, none",
    ),
    _drift(
        "all holds of the driver gone",
        "apt-mark unhold $(dpkg-query -W -f '${Package}\\n' | grep -E '^(lib)?nvidia-.*580')",
        "nvidia_driver, package holds, none",
    ),
    _drift(
        "packages of the driver removed",
        "apt-get -qq remove --allow-change-held-packages nvidia-open-580 nvidia-driver-580-open",
        "nvidia_driver, driver packages, none",
        "nvidia_driver, package holds, none",
    ),
    _drift(
        "an installation of packages cut off",
        "dpkg --unpack --force-all $(cd /tmp && apt-get -qq download libnvidia-encode-580=580.95.05-0ubuntu1 && "
        "echo /tmp/libnvidia-encode-580_*.deb)",
        "nvidia_driver, interrupted package installation, none",
        "nvidia_driver, package holds, none",
    ),
    _drift(
        "module of the running kernel gone",
        "dkms remove nvidia/580.95.05 -k $(uname -r) || dkms uninstall nvidia/580.95.05 -k $(uname -r)",
        "nvidia_driver, kernel module nvidia, none",
    ),
    _drift(
        "nvidia-persistenced stopped",
        "systemctl stop nvidia-persistenced",
        "nvidia_driver_reload, services of the driver, none",
        restarts="persistenced",
        first=True,
    ),
    _drift(
        "nvidia-persistenced not started at boot",
        "systemctl disable nvidia-persistenced",
        "nvidia_driver, services of the driver, none",
    ),
    _drift(
        "nvidia-persistenced stopped and not started at boot",
        "systemctl disable --now nvidia-persistenced",
        "nvidia_driver, services of the driver, none",
        restarts="persistenced",
    ),
    _drift(
        "nvidia-persistenced masked",
        "systemctl mask nvidia-persistenced",
        "nvidia_driver, unit_masked, error",
        refused=True,
        undo="systemctl unmask nvidia-persistenced; systemctl enable nvidia-persistenced",
    ),
    _drift(
        "driver not loaded",
        "systemctl stop nim.target nvidia-persistenced\n"
        "for each in nvidia_uvm nvidia_drm nvidia_modeset nvidia; do rmmod $each 2>/dev/null || true; done\n"
        "test ! -e /sys/module/nvidia",
        "nvidia_driver_reload, kernel module nvidia, none",
        "nim_service, nim-llama.service, later none",
        "nim_service, nim-mistral.service, later none",
        restarts="driver persistenced llama mistral",
    ),
    _drift(
        "another version of the module loaded than the packages have",
        "systemctl stop nim.target nvidia-persistenced\n"
        "for each in nvidia_uvm nvidia_drm nvidia_modeset nvidia; do rmmod $each 2>/dev/null || true; done\n"
        "cp -a /lib/modules/$(uname -r)/updates/dkms /tmp/modules\n"
        "sed -i s/580[.]95[.]05/580.65.06/ /lib/modules/$(uname -r)/updates/dkms/nvidia*.ko\n"
        "modprobe nvidia; modprobe nvidia-uvm\n"
        "cp -a /tmp/modules/. /lib/modules/$(uname -r)/updates/dkms; rm -r /tmp/modules\n"
        "grep -q 580.65.06 /proc/driver/nvidia/version",
        "nvidia_driver_reload, kernel module nvidia, unload_driver",
        "nim_service, nim-llama.service, none",
        "nim_service, nim-mistral.service, none",
        "nim_service, nim.target, none",
        restarts="driver persistenced llama mistral",
    ),
    _drift(
        "another driver installed behind the running one",
        # Else how often it fails meanwhile is a matter of speed.
        "systemctl stop nvidia-cdi-refresh.path\n"
        "apt-get -qq install --allow-change-held-packages --allow-downgrades -o Dir::Etc::preferencesparts=/nowhere "
        "$(dpkg-query -W -f '${Package} ${Version}\\n' | awk '$2 ~ /^580.95.05-0/ {print $1 \"=580.65.06-0ubuntu1\"}')\n"
        "systemctl start nvidia-cdi-refresh.path",
        "nvidia_driver, driver packages, unload_driver",
        "nvidia_driver, package holds, none",
        "nvidia_driver_reload, kernel module nvidia, later unload_driver",
        refused=True,
        undo="systemctl stop nim.target",
        restarts="driver persistenced llama mistral",
    ),
)

_DOCKER = (
    _drift(
        "docker.service stopped",
        "systemctl stop docker.service docker.socket",
        "docker_engine, docker.service, none",
        "nim_image, image %s, later none" % LLAMA,
        "nim_image, image %s, later none" % MISTRAL,
        "nim_service, nim-llama.service, later restart_nim",
        "nim_service, nim-mistral.service, later restart_nim",
        restarts="docker",
    ),
    _drift(
        "docker.service stopped, its socket open",
        "systemctl stop docker.service; systemctl start docker.socket; docker version >/dev/null",
        restarts="docker",
    ),
    _drift("docker.service not started at boot", "systemctl disable docker.service", "docker_engine, at boot, none"),
    _drift(
        "docker.service masked",
        "systemctl mask docker.service",
        "docker_engine, unit_masked, error",
        refused=True,
        undo="systemctl unmask docker.service",
    ),
    _drift(
        "docker.socket masked",
        "systemctl mask docker.socket",
        "docker_engine, unit_masked, error",
        refused=True,
        undo="systemctl unmask docker.socket",
    ),
    # docker.service, which is started at boot, requires the one and wants the other.
    _drift("docker.socket not enabled", "systemctl disable docker.socket", undo="systemctl enable docker.socket"),
    _drift("containerd stopped", "systemctl stop containerd", "docker_engine, containerd.service, none"),
    _drift("containerd not enabled", "systemctl disable containerd", undo="systemctl enable containerd"),
    _drift(
        "containerd masked",
        "systemctl mask containerd",
        "docker_engine, unit_masked, error",
        refused=True,
        undo="systemctl unmask containerd",
    ),
    _drift(
        "Docker's socket open to everybody",
        "chmod 0666 /run/docker.sock",
        "docker_group, /run/docker.sock, none",
        first=True,
    ),
    _drift("Docker's socket of another group", "chgrp ops /run/docker.sock", "docker_group, /run/docker.sock, none"),
    _drift(
        "Docker's repository gone",
        "rm /etc/apt/sources.list.d/docker.sources",
        "docker_engine, repository docker, none",
    ),
    _drift(
        "Docker's repository at another address",
        "sed -i 's|^URIs: .*|URIs: https://mirror.example/docker|' /etc/apt/sources.list.d/docker.sources",
        "docker_engine, repository docker, none",
    ),
    _drift("Docker's keyring broken", "echo > /etc/apt/keyrings/docker.gpg", "docker_engine, repository docker, none"),
    _drift("Docker not held", "apt-mark unhold docker-ce containerd.io", "docker_engine, hold of, none"),
    _drift(
        "a stranger in the group docker",
        "gpasswd -a nobody docker",
        "docker_group, member nobody, none",
    ),
    _drift("a user taken out of the group docker", "gpasswd -d ops docker", "docker_group, member ops, none"),
    _drift(
        "group docker gone",
        "groupdel docker",
        "docker_group, group docker, none",
        "docker_group, member ops, none",
        "docker_group, /run/docker.sock, none",
    ),
    _drift(
        "daemon.json gone",
        "rm " + DAEMON_JSON,
        "docker_daemon, %s, reload" % DAEMON_JSON,
        "docker_daemon, running daemon, restart_docker",
        restarts="docker",
    ),
    _drift(
        "daemon.json broken",
        "echo '{' > " + DAEMON_JSON,
        "docker_daemon, daemon_json_invalid, error",
        "nvidia_container_toolkit, daemon_json_invalid, error",
        refused=True,
        undo="cp /var/lib/gpu_fleet/daemon.json.good " + DAEMON_JSON,
    ),
    _drift(
        "daemon.json is a directory",
        "rm %s; mkdir %s" % (DAEMON_JSON, DAEMON_JSON),
        "docker_daemon, daemon_json_invalid, error",
        "nvidia_container_toolkit, daemon_json_invalid, error",
        refused=True,
        undo="rmdir %s; cp /var/lib/gpu_fleet/daemon.json.good %s" % (DAEMON_JSON, DAEMON_JSON),
    ),
    _drift(
        "daemon.json: live-restore off, daemon not told",
        _json(DAEMON_JSON, "d['live-restore'] = False"),
        "docker_daemon, %s, reload" % DAEMON_JSON,
    ),
    _drift(
        "live-restore off, in the file and live",
        _json(DAEMON_JSON, "d['live-restore'] = False") + _RELOAD,
        "docker_daemon, %s, reload" % DAEMON_JSON,
        first=True,
    ),
    _drift(
        "live-restore off in the live daemon alone",
        "cp -p {0} /tmp/d\n{1}{2}cp -p /tmp/d {0}".format(
            DAEMON_JSON, _json(DAEMON_JSON, "d['live-restore'] = False"), _RELOAD
        ),
        "docker_daemon, running daemon, reload",
    ),
    _drift(
        "daemon.json: an own key gone that takes a restart",
        _json(DAEMON_JSON, "del d['log-opts']"),
        "docker_daemon, %s, none" % DAEMON_JSON,
        "docker_daemon, running daemon, restart_docker",
        restarts="docker",
    ),
    _drift(
        "daemon.json: another value of an own key",
        _json(DAEMON_JSON, "d['shutdown-timeout'] = 15"),
        "docker_daemon, %s, reload" % DAEMON_JSON,
    ),
    _drift(
        "daemon.json: somebody's own key",
        _json(DAEMON_JSON, "d['max-concurrent-uploads'] = 2"),
        undo=_json(DAEMON_JSON, "del d['max-concurrent-uploads']"),
    ),
    _drift(
        "docker.service with a flag that contradicts",
        "mkdir -p /etc/systemd/system/docker.service.d\n"
        "printf '[Service]\\nExecStart=\\nExecStart=/usr/bin/dockerd -H fd:// --shutdown-timeout=5\\n' "
        "> /etc/systemd/system/docker.service.d/flag.conf\n"
        "cp -p {0} /tmp/d\n{1}systemctl daemon-reload; systemctl restart docker; cp -p /tmp/d {0}".format(
            DAEMON_JSON, _json(DAEMON_JSON, "del d['shutdown-timeout']")
        ),
        "docker_daemon, daemon_flag_conflict, error",
        refused=True,
        restarts="docker",
        undo="rm -r /etc/systemd/system/docker.service.d; systemctl daemon-reload; systemctl restart docker",
    ),
)

_TOOLKIT = (
    _drift(
        "daemon.json: runtime nvidia gone, in the file and live",
        _json(DAEMON_JSON, "d['runtimes'] = {}; d['default-runtime'] = 'runc'") + _RELOAD,
        "nvidia_container_toolkit, %s, reload" % DAEMON_JSON,
        "nim_service, nim-llama.service, later restart_nim",
        "nim_service, nim-mistral.service, later restart_nim",
    ),
    _drift(
        "daemon.json: runtime nvidia is another program",
        _json(DAEMON_JSON, "d['runtimes']['nvidia']['path'] = '/usr/bin/runc'"),
        "nvidia_container_toolkit, %s, reload" % DAEMON_JSON,
    ),
    _drift(
        "daemon.json: default runtime is runc",
        _json(DAEMON_JSON, "d['default-runtime'] = 'runc'") + _RELOAD,
        "nvidia_container_toolkit, %s, reload" % DAEMON_JSON,
    ),
    _drift(
        "default runtime is runc in the live daemon alone",
        "cp -p {0} /tmp/d\n{1}{2}cp -p /tmp/d {0}".format(
            DAEMON_JSON, _json(DAEMON_JSON, "d['default-runtime'] = 'runc'"), _RELOAD
        ),
        "nvidia_container_toolkit, running daemon, reload",
    ),
    _drift(
        "runtime nvidia is unknown to the live daemon alone",
        "cp -p {0} /tmp/d\n{1}{2}cp -p /tmp/d {0}".format(
            DAEMON_JSON, _json(DAEMON_JSON, "d['runtimes'] = {}; d['default-runtime'] = 'runc'"), _RELOAD
        ),
        "nvidia_container_toolkit, running daemon, reload",
        "nim_service, nim-llama.service, later restart_nim",
        "nim_service, nim-mistral.service, later restart_nim",
    ),
    _drift(
        "daemon.json: CDI off, daemon not told",
        _json(DAEMON_JSON, "d['features']['cdi'] = False"),
        "nvidia_container_toolkit, %s, none" % DAEMON_JSON,
    ),
    _drift(
        "toolkit's repository gone",
        "rm /etc/apt/sources.list.d/nvidia-container-toolkit.sources",
        "nvidia_container_toolkit, repository nvidia-container-toolkit, none",
    ),
    _drift(
        "toolkit's repository switched off",
        "sed -i '1i Enabled: no' /etc/apt/sources.list.d/nvidia-container-toolkit.sources",
        "nvidia_container_toolkit, repository nvidia-container-toolkit, none",
    ),
    _drift(
        "toolkit's keyring holds another key",
        "cp /usr/share/keyrings/debian-archive-keyring.gpg /etc/apt/keyrings/nvidia-container-toolkit.gpg",
        "nvidia_container_toolkit, repository nvidia-container-toolkit, none",
    ),
    _drift(
        "toolkit's keyring gone",
        "rm /etc/apt/keyrings/nvidia-container-toolkit.gpg",
        "nvidia_container_toolkit, repository nvidia-container-toolkit, none",
    ),
    _drift(
        "toolkit not held",
        "apt-mark unhold libnvidia-container1",
        "nvidia_container_toolkit, hold of libnvidia-container1, none",
    ),
    _drift(
        "another version of the toolkit",
        "apt-get -qq install --allow-change-held-packages --allow-downgrades nvidia-container-toolkit=1.17.8-1 "
        "nvidia-container-toolkit-base=1.17.8-1 libnvidia-container-tools=1.17.8-1 libnvidia-container1=1.17.8-1",
        "nvidia_container_toolkit, package nvidia-container-toolkit, none",
        "nvidia_container_toolkit, package nvidia-container-toolkit-base, none",
        "nvidia_container_toolkit, package libnvidia-container-tools, none",
        "nvidia_container_toolkit, package libnvidia-container1, none",
        "nvidia_container_toolkit, hold of, none",
    ),
    _drift(
        "one package of the toolkit removed",
        "apt-get -qq remove --allow-change-held-packages nvidia-container-toolkit",
        "nvidia_container_toolkit, package nvidia-container-toolkit, none",
        "nvidia_container_toolkit, hold of, none",
    ),
    _drift(
        "toolkit removed",
        "apt-get -qq remove --allow-change-held-packages nvidia-container-toolkit "
        "nvidia-container-toolkit-base libnvidia-container-tools libnvidia-container1",
        "nvidia_container_toolkit, package nvidia-container-toolkit, none",
        "nvidia_container_toolkit, package nvidia-container-toolkit-base, none",
        "nvidia_container_toolkit, package libnvidia-container-tools, none",
        "nvidia_container_toolkit, package libnvidia-container1, none",
        "nvidia_container_toolkit, hold of, none",
    ),
    _drift(
        "toolkit's program deleted",
        "rm /usr/bin/nvidia-container-runtime",
        "nvidia_container_toolkit, package nvidia-container-toolkit-base, none",
    ),
    _drift(
        "mode of the runtime edited",
        "nvidia-ctk config --in-place --set nvidia-container-runtime.mode=legacy",
        "nvidia_container_toolkit, config.toml: mode, none",
    ),
    _drift(
        "mode of the runtime taken out",
        "sed -i '/^ *mode *=/d' " + CONFIG_TOML,
        "nvidia_container_toolkit, config.toml: mode, none",
        # nvidia-ctk puts a key that is missing at another place of its section.
        leaves=CONFIG_TOML,
    ),
    _drift(
        "CDI specification gone",
        "rm /var/run/cdi/nvidia.yaml",
        "nvidia_container_toolkit, nvidia.yaml, none",
    ),
    _drift(
        "CDI specification of another driver",
        "sed -i 's/580.95.05/580.65.06/g' /var/run/cdi/nvidia.yaml",
        "nvidia_container_toolkit, nvidia.yaml, none",
    ),
    _drift(
        "CDI specification made by hand",
        "mkdir -p /etc/cdi; cp /var/run/cdi/nvidia.yaml /etc/cdi/nvidia.yaml",
        "nvidia_container_toolkit, /etc/cdi/nvidia.yaml, none",
        # The directory that the drift has made; and nothing that somebody wrote is lost.
        leaves="/etc/cdi /var/lib/gpu_fleet/cdi-nvidia.yaml.before",
    ),
    _drift(
        "nvidia-cdi-refresh.path stopped",
        "systemctl stop nvidia-cdi-refresh.path",
        "nvidia_container_toolkit, nvidia-cdi-refresh.path, none",
    ),
    _drift(
        "nvidia-cdi-refresh.path not started at boot",
        "systemctl disable nvidia-cdi-refresh.path",
        "nvidia_container_toolkit, nvidia-cdi-refresh.path, none",
    ),
    _drift(
        "nvidia-cdi-refresh.path masked",
        "mv /etc/systemd/system/nvidia-cdi-refresh.path /tmp; systemctl mask --now nvidia-cdi-refresh.path",
        "nvidia_container_toolkit, unit_masked, error",
        refused=True,
        undo="systemctl unmask nvidia-cdi-refresh.path; mv /tmp/nvidia-cdi-refresh.path /etc/systemd/system\n"
        "systemctl daemon-reload; systemctl enable --now nvidia-cdi-refresh.path",
    ),
    _drift(
        "nvidia-cdi-refresh.service not started at boot",
        "systemctl disable nvidia-cdi-refresh.service",
        "nvidia_container_toolkit, nvidia-cdi-refresh.service, none",
    ),
    _drift(
        "nvidia-cdi-refresh.service masked",
        "mv /etc/systemd/system/nvidia-cdi-refresh.service /tmp; systemctl mask nvidia-cdi-refresh.service",
        "nvidia_container_toolkit, unit_masked, error",
        refused=True,
        undo="systemctl unmask nvidia-cdi-refresh.service\n"
        "mv /tmp/nvidia-cdi-refresh.service /etc/systemd/system\n"
        "systemctl daemon-reload; systemctl enable nvidia-cdi-refresh.service",
    ),
    _drift("record of the last proof gone", "rm -r /run/gpu_fleet/validations"),
)

_CONFIG_JSON = "/root/.docker/config.json"
_LOGIN = (
    _drift("login gone", "rm " + _CONFIG_JSON, "ngc_login, login of root at nvcr.io, none", first=True),
    _drift(
        "login with another key",
        _json(_CONFIG_JSON, "d['auths']['nvcr.io'] = {'auth': 'JG9hdXRodG9rZW46bnZhcGktb3RoZXI='}"),
        "ngc_login, login of root at nvcr.io, none",
    ),
    _drift("login readable for all", "chmod 0644 " + _CONFIG_JSON, "ngc_login, permissions of, none"),
    _drift("login of another owner", "chown nobody " + _CONFIG_JSON, "ngc_login, permissions of, none"),
    _drift("directory of the login open", "chmod 0755 /root/.docker", "ngc_login, permissions of /root/.docker, none"),
    _drift(
        "a credential helper in the way",
        "cp {0} /tmp/c; {1}".format(_CONFIG_JSON, _json(_CONFIG_JSON, "d['credsStore'] = 'nobody'")),
        "ngc_login, credential_helper, error",
        refused=True,
        undo="cat /tmp/c > %s; rm /tmp/c" % _CONFIG_JSON,
    ),
    _drift(
        # A memory and no wish: what is not known to be stored by the collection is taken for somebody else's.
        "record of our logins edited",
        "cp -p /var/lib/gpu_fleet/logins /tmp/logins; sed -i 's/root nvcr.io/nobody nvcr.io/' /var/lib/gpu_fleet/logins",
        undo="mv /tmp/logins /var/lib/gpu_fleet/logins",
    ),
    _drift(
        "somebody's login elsewhere",
        _json(_CONFIG_JSON, "d['auths']['registry.example'] = {'auth': 'YTpi'}"),
        undo=_json(_CONFIG_JSON, "del d['auths']['registry.example']"),
    ),
)

_UNIT = "/etc/systemd/system/nim-llama.service"
_SHOW = "docker inspect --format '{{index .Config.Labels \"io.gpu-fleet.nim.spec\"}}' nim-llama"
#: As a user interface does it that "recreates" a container: the same name, image, labels; other options. It need not serve.
_RECREATE = (
    "id=$(docker inspect --format '{{{{.Config.Image}}}}' nim-llama); label=$(%s)\n"
    "uuid=$(docker inspect --format '{{{{json .Config.Env}}}}' nim-llama | grep -o 'GPU-[0-9a-f-]*')\n"
    "systemctl stop nim-llama; docker rm nim-llama\n"
    "docker run -d --init --name nim-llama --label io.gpu-fleet.nim.spec={label} {options} --entrypoint sleep $id 1000\n"
    "systemctl start nim-llama; sleep 2"
) % _SHOW.replace("{", "{{").replace("}", "}}")

_MODELS = (
    _drift("wrapper gone", "rm /usr/local/libexec/nim/nim-unit", "nim_service, /usr/local/libexec/nim/nim-unit, none"),
    _drift(
        "wrapper edited",
        "echo '# edited' >> /usr/local/libexec/nim/nim-unit",
        "nim_service, /usr/local/libexec/nim/nim-unit, none",
    ),
    _drift(
        "wrapper not executable",
        "chmod 0644 /usr/local/libexec/nim/nim-unit",
        "nim_service, /usr/local/libexec/nim/nim-unit, none",
    ),
    _drift(
        "a model's file edited",
        _json("/etc/nim/llama.json", "d['port'] = 9000"),
        "nim_service, /etc/nim/llama.json, none",
    ),
    _drift("a model's file gone", "rm /etc/nim/llama.json", "nim_service, /etc/nim/llama.json, none"),
    _drift(
        "a model's file writable for all",
        "chmod 0666 /etc/nim/llama.json",
        "nim_service, /etc/nim/llama.json, none",
    ),
    _drift(
        "a unit edited",
        "sed -i s/RestartSec=.*/RestartSec=60/ %s; systemctl daemon-reload" % _UNIT,
        "nim_service, %s, none" % _UNIT,
        "nim_service, systemd, reload",
    ),
    _drift(
        "a unit edited, systemd not told",
        "sed -i s/RestartSec=.*/RestartSec=60/ %s" % _UNIT,
        "nim_service, %s, none" % _UNIT,
        "nim_service, systemd, reload",
    ),
    _drift(
        "a unit's file gone",
        "rm %s" % _UNIT,
        "nim_service, %s, none" % _UNIT,
        "nim_service, systemd, reload",
    ),
    _drift(
        "a unit writable for all",
        "chmod 0666 " + _UNIT,
        "nim_service, %s, none" % _UNIT,
        "nim_service, systemd, reload",
    ),
    _drift(
        "nim.target edited",
        "sed -i s/Description=.*/Description=x/ /etc/systemd/system/nim.target",
        "nim_service, /etc/systemd/system/nim.target, none",
        "nim_service, systemd, reload",
    ),
    _drift(
        "nim.slice edited",
        "echo MemoryMax=1G >> /etc/systemd/system/nim.slice",
        "nim_service, /etc/systemd/system/nim.slice, none",
        "nim_service, systemd, reload",
    ),
    _drift(
        "nim.slice gone",
        "rm /etc/systemd/system/nim.slice",
        "nim_service, /etc/systemd/system/nim.slice, none",
        "nim_service, systemd, reload",
    ),
    _drift(
        "nim.target not started at boot",
        "systemctl disable nim.target",
        "nim_service, nim.target, none",
        "nim_service, systemd, reload",
    ),
    _drift(
        "nim.target stopped",
        "systemctl stop nim.target",
        "nim_service, nim-llama.service, none",
        "nim_service, nim-mistral.service, none",
        "nim_service, nim.target, none",
        restarts="llama mistral",
    ),
    _drift(
        "nim.target masked",
        "mv /etc/systemd/system/nim.target /tmp; systemctl mask nim.target",
        "nim_service, unit_masked, error",
        refused=True,
        undo="systemctl unmask nim.target; mv /tmp/nim.target /etc/systemd/system; systemctl daemon-reload",
    ),
    _drift(
        "a service not started at boot",
        "systemctl disable nim-llama",
        "nim_service, nim-llama.service, none",
        "nim_service, systemd, reload",
    ),
    _drift(
        "a service stopped",
        "systemctl stop nim-llama",
        "nim_service, nim-llama.service, none",
        restarts="llama",
        first=True,
    ),
    _drift(
        "a service stopped and not started at boot",
        "systemctl disable --now nim-llama",
        "nim_service, nim-llama.service, none",
        "nim_service, nim-llama.service, none",
        "nim_service, systemd, reload",
        restarts="llama",
    ),
    _drift(
        "a service masked",
        "mv %s /tmp; systemctl mask nim-llama" % _UNIT,
        "nim_service, unit_masked, error",
        refused=True,
        undo="systemctl unmask nim-llama; mv /tmp/nim-llama.service /etc/systemd/system; systemctl daemon-reload",
    ),
    _drift(
        "a service given up by systemd",
        "systemctl stop nim-llama; chmod -x /usr/local/libexec/nim/nim-unit; systemctl start nim-llama || true\n"
        "sleep 3; chmod +x /usr/local/libexec/nim/nim-unit; systemctl is-failed nim-llama",
        "nim_service, nim-llama.service, none",
        restarts="llama",
    ),
    _drift("a wrapper killed", "systemctl kill -s KILL --kill-whom=main nim-llama" + _READY, restarts="llama.unit"),
    _drift("a container killed", "docker kill nim-llama" + _READY, restarts="llama"),
    _drift("a container removed", "docker rm -f nim-llama" + _READY, restarts="llama"),
    _drift(
        "a container killed, its wrapper hangs",
        "systemctl kill -s STOP --kill-whom=main nim-llama; docker kill nim-llama",
        "nim_service, nim-llama.service, none",
        restarts="llama",
    ),
    _drift(
        "a container removed, its wrapper hangs",
        "systemctl kill -s STOP --kill-whom=main nim-llama; docker rm -f nim-llama",
        "nim_service, nim-llama.service, none",
        restarts="llama",
    ),
    _drift("a container paused", "docker pause nim-llama", "nim_service, nim-llama.service, none"),
    _drift(
        "a container made by hand, without label",
        "systemctl stop nim-llama; docker rm nim-llama >/dev/null\n"
        "docker run -d --init --name nim-llama --entrypoint sleep %s 1000" % LLAMA,
        "nim_service, nim-llama.service, restart_nim",
        restarts="llama",
    ),
    _drift(
        "a container made again with another environment",
        _RECREATE.format(
            label="$label",
            options="-p 8000:8000 --runtime=nvidia --env NVIDIA_VISIBLE_DEVICES=$uuid --env NIM_LOG_LEVEL=DEBUG",
        ),
        "nim_service, nim-llama.service, restart_nim",
        restarts="llama",
        first=True,
    ),
    _drift(
        "a container made again with all GPUs",
        _RECREATE.format(
            label="$label",
            options="-p 8000:8000 --runtime=nvidia --env NVIDIA_VISIBLE_DEVICES=all --env NIM_LOG_LEVEL=INFO",
        ),
        "nim_service, nim-llama.service, restart_nim",
        restarts="llama",
    ),
    _drift(
        "a container made again as root",
        _RECREATE.format(
            label="$label",
            options="-p 8000:8000 --runtime=nvidia --env NVIDIA_VISIBLE_DEVICES=$uuid --env NIM_LOG_LEVEL=INFO --user 0",
        ),
        "nim_service, nim-llama.service, restart_nim",
        restarts="llama",
    ),
    _drift(
        "a container that Docker restarts too",
        "docker update --restart=always nim-llama",
        "nim_service, restart policy of container nim-llama, none",
    ),
    _drift(
        "a container under another name",
        "docker rename nim-llama my-llama",
        "nim_service, port_in_use, error",
        refused=True,
        undo="docker rename my-llama nim-llama",
    ),
    _drift(
        "a docker-proxy that has outlived its container",
        "systemctl stop nim-llama\n" + LEFTOVER_PROXY,
        "nim_service, port_in_use, error",
        refused=True,
        undo="kill $(cat /tmp/proxy)",
        restarts="llama",
    ),
    _drift(
        "a NIM that hangs",
        "kill -STOP $(docker inspect --format '{{.State.Pid}}' nim-llama)",
        "nim_service, nim-llama.service, restart_nim",
        restarts="llama",
    ),
    _drift("an image gone while it runs", "docker rmi --force %s" % LLAMA, "nim_image, image %s, none" % LLAMA),
    _drift(
        "an image gone",
        "systemctl stop nim-llama; docker rm nim-llama\n"
        "docker rmi --force $(docker image inspect --format '{{.Id}}' %s)" % LLAMA,
        "nim_image, image %s, none" % LLAMA,
        "nim_service, nim-llama.service, later none",
        restarts="llama",
    ),
    _drift(
        "a tag that stands for another image",
        "docker tag %s %s" % (MISTRAL, LLAMA),
        "nim_image, tag %s, none" % LLAMA,
    ),
    _drift(
        "pins of the images gone",
        "rm /var/lib/gpu_fleet/images.json",
        "nim_image, image %s, none" % LLAMA,
        "nim_image, image %s, none" % MISTRAL,
    ),
    _drift(
        "pins of the images unreadable",
        "cp -p /var/lib/gpu_fleet/images.json /tmp; echo x > /var/lib/gpu_fleet/images.json",
        "nim_image, state_unreadable, error",
        "nim_service, state_unreadable, error",
        refused=True,
        undo="mv /tmp/images.json /var/lib/gpu_fleet/images.json",
    ),
    _drift("key file gone", "rm /etc/nim/ngc.env", "nim_service, /etc/nim/ngc.env, none"),
    _drift("another key", "echo NGC_API_KEY=nvapi-other > /etc/nim/ngc.env", "nim_service, /etc/nim/ngc.env, none"),
    _drift("key readable for all", "chmod 0644 /etc/nim/ngc.env", "nim_service, /etc/nim/ngc.env, none"),
    _drift(
        "secret variables edited",
        "sed -i s/HF_TOKEN=.*/HF_TOKEN=other/ /etc/nim/llama.env",
        "nim_service, /etc/nim/llama.env, none",
    ),
    _drift(
        "secret variables gone",
        "rm /etc/nim/llama.env",
        "nim_service, /etc/nim/llama.env, none",
        # The key of its fingerprints is made anew.
        leaves="/etc/nim/llama.env",
    ),
    _drift(
        "secret variables readable for all", "chmod 0644 /etc/nim/llama.env", "nim_service, /etc/nim/llama.env, none"
    ),
    _drift(
        "cache of another owner",
        "chown root:root /var/lib/nim/cache/llama",
        "nim_service, directory /var/lib/nim/cache/llama, none",
    ),
    _drift(
        "all of a cache of another owner",
        "chown -R root:root /var/lib/nim/cache/llama",
        "nim_service, directory /var/lib/nim/cache/llama, none",
        first=True,
    ),
    _drift(
        "a file in a cache of another owner",
        "chown root:root $(find /var/lib/nim/cache/llama -type f | head -1)",
        "nim_service, directory /var/lib/nim/cache/llama, none",
    ),
    _drift(
        "cache closed to the container",
        "chmod 0500 /var/lib/nim/cache/llama",
        "nim_service, directory /var/lib/nim/cache/llama, none",
        # Here and below only as much is changed as must be: who else may read a cache is the operator's business.
        leaves="/var/lib/nim/cache/llama",
    ),
    _drift(
        "cache writable for all",
        "chmod 0777 /var/lib/nim/cache/llama",
        "nim_service, directory /var/lib/nim/cache/llama, none",
        leaves="/var/lib/nim/cache/llama",
    ),
    _drift("/etc/nim writable for all", "chmod 0777 /etc/nim", "nim_service, directory /etc/nim, none"),
    _drift(
        "words of the wrapper gone",
        "mv /run/nim/llama.json /tmp/words.json",
        undo="mv /tmp/words.json /run/nim/llama.json",
    ),
    _drift(
        "record of a download gone",
        "rm /var/lib/nim/state/llama.download.json",
        # Written again when something is fetched.
        leaves="/var/lib/nim/state/llama.download.json",
    ),
    _drift(
        "host under maintenance",
        "touch /var/lib/nim/maintenance",
        notes="/var/lib/nim/maintenance exists",
        undo="rm /var/lib/nim/maintenance",
    ),
    _drift(
        "a service stopped under maintenance",
        "touch /var/lib/nim/maintenance; systemctl stop nim-llama",
        "nim_service, nim-llama.service, none",
        undo="rm /var/lib/nim/maintenance; systemctl start nim-llama" + _READY,
        restarts="llama",
    ),
)

#: On a host with NVSwitches, where the driver brings the Fabric Manager along.
FABRIC: tuple[Drift, ...] = (
    _drift(
        "nvidia-fabricmanager stopped",
        "systemctl stop nvidia-fabricmanager",
        "nvidia_driver_reload, services of the driver, none",
    ),
    _drift(
        "nvidia-fabricmanager not started at boot",
        "systemctl disable nvidia-fabricmanager",
        "nvidia_driver, services of the driver, none",
    ),
    _drift(
        "nvidia-fabricmanager masked",
        "systemctl mask nvidia-fabricmanager",
        "nvidia_driver, unit_masked, error",
        refused=True,
        undo="systemctl unmask nvidia-fabricmanager; systemctl enable nvidia-fabricmanager",
    ),
)

DRIFTS: tuple[Drift, ...] = (*_DRIVER, *_DOCKER, *_TOOLKIT, *_LOGIN, *_MODELS)
