# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""ansible-playbook with inventories that cannot work: nobody is connected to, which a connection plugin would tell."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import typing as t

import pytest
from ansible.parsing.vault import VaultLib, VaultSecret

ROOT = pathlib.Path(__file__).parents[2]
KEY = "nvapi-0123456789abcdefSECRET"
CONNECTION = """
import os
from ansible.plugins.connection import ConnectionBase
DOCUMENTATION = "name: loud\\nshort_description: tells\\ndescription: [tells]\\noptions: {}\\n"
class Connection(ConnectionBase):
    transport = "loud"
    has_pipelining = True
    def _connect(self):
        with open(os.environ["LOUD_FILE"], "a") as stream:
            stream.write("connected\\n")
        raise RuntimeError("somebody was connected to")
    def exec_command(self, *args, **kwargs):
        return self._connect()
    def put_file(self, *args):
        return self._connect()
    def fetch_file(self, *args):
        return self._connect()
    def close(self):
        pass
"""
HOSTS = """
gpu_hosts:
  vars:
    ansible_connection: loud
  hosts:
    gpu01: {ansible_host: 192.0.2.1}
    gpu02: {ansible_host: 192.0.2.2}
nim_gateways:
  vars:
    ansible_connection: loud
  hosts:
    gateway01: {ansible_host: 192.0.2.3}
"""
#: All but status, which shows what there is whatever the variables say, and what others import.
PLAYBOOKS = sorted(path.stem for path in (ROOT / "playbooks").glob("*.yml") if path.stem not in ("status", "rollout"))
SOUND = "nim_models: [{name: llama, image: 'nvcr.io/nim/meta/x:1', port: 8000}]\n"


def _vaulted(text: str) -> str:
    secret = VaultLib([("default", VaultSecret(b"password"))]).encrypt(text.encode()).decode()
    return "!vault |\n  " + "\n  ".join(secret.splitlines()) + "\n"


@pytest.fixture
def play(tmp_path: pathlib.Path) -> t.Callable[[str, str], tuple[int, str, bool]]:
    """Runs a playbook of the collection with group variables; exit status, output, and whether anybody was connected to."""
    (tmp_path / "connection").mkdir()
    (tmp_path / "connection" / "loud.py").write_text(CONNECTION)
    (tmp_path / "group_vars").mkdir()
    (tmp_path / "hosts.yml").write_text(HOSTS)
    (tmp_path / "password").write_text("password\n")
    told = tmp_path / "told"
    environment = dict(
        os.environ,
        ANSIBLE_CONNECTION_PLUGINS=str(tmp_path / "connection"),
        ANSIBLE_COLLECTIONS_PATH=str(ROOT / ".build"),
        ANSIBLE_HOME=str(tmp_path / "home"),
        ANSIBLE_VAULT_PASSWORD_FILE=str(tmp_path / "password"),
        LOUD_FILE=str(told),
        LC_ALL="C.UTF-8",
    )
    program = shutil.which("ansible-playbook", path=str(pathlib.Path(sys.executable).parent)) or "ansible-playbook"

    def run(playbook: str, variables: str) -> tuple[int, str, bool]:
        (tmp_path / "group_vars" / "gpu_hosts.yml").write_text(variables)
        done = subprocess.run(
            [program, "gpu_fleet.nim." + playbook, "-i", str(tmp_path / "hosts.yml")],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr, told.exists()

    return run


def test_a_sound_inventory_is_connected_to(play: t.Callable[[str, str], tuple[int, str, bool]]) -> None:
    """So that the others prove something."""
    code, output, connected = play("site", SOUND)
    assert connected
    assert code != 0
    assert "somebody was connected to" in output


def test_what_is_in_the_inventory_no_more_can_be_removed(play: t.Callable[[str, str], tuple[int, str, bool]]) -> None:
    dummy, output, connected = play("remove", "{}\n")
    assert connected, output


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_nobody_is_connected_to(play: t.Callable[[str, str], tuple[int, str, bool]], playbook: str) -> None:
    variables = (
        "nvidia_driver_brnach: '580'\n"
        "docker_users: alice\n"
        "nim_progress_interval: '{{ not_defined_anywhere }}'\n"
        "nim_state: !unsafe '{{ absent }}'\n"
        "docker_version: %s"
        "ngc_api_key: %s"
        "nim_models: [{name: llama, image: 'nvcr.io/nim/meta/x:1', port: '{{ 8000 * 10 }}'}]\n"
        % (_vaulted("newest"), _vaulted(KEY + "\n"))
    )
    code, output, connected = play(playbook, variables)
    assert not connected, output
    assert code != 0
    assert "no host was touched" in output
    for told in (
        "nvidia_driver_brnach = '580': ",
        "did you mean nvidia_driver_branch",
        "docker_users = 'alice': ",
        "nim_progress_interval: its template cannot be resolved",
        "nim_state = ",
        "docker_version = ",
        "leave it empty for the newest",
        "ngc_api_key = (not shown): ",
        "nim_models[0].port = ",
        "from 1 to 65535",
    ):
        assert told in output, told
    assert KEY not in output


def test_a_gateway_that_cannot_be_made_is_told_before_anything_is_touched(
    play: t.Callable[[str, str], tuple[int, str, bool]], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "group_vars" / "nim_gateways.yml").write_text(
        "nim_gateway_body_limit: 1GB\nnim_gateway_api_keys: {team: %s!}\nnim_gateway_prot: 443\n" % KEY[:9]
    )
    for playbook in ("site", "gateway"):
        code, output, connected = play(playbook, SOUND)
        assert not connected, output
        assert code != 0
        for told in (
            "gateway01: nim_gateway_body_limit = 1GB: is no size from 16KB to 64MB",
            "gateway01: nim_gateway_api_keys.team = (not shown): ",
            "gateway01: nim_gateway_prot = 443: no such variable; did you mean nim_gateway_port.",
        ):
            assert told in output, output
        assert KEY[:9] not in output
