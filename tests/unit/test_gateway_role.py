# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""From an inventory through the role's templates, as Ansible renders them, to the options of the gateway's module."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import typing as t

import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gateway_settings import hash_keys
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_gateway import NimGateway
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_gateway_planner import GATEWAY_OPTIONS

ROOT = pathlib.Path(__file__).parents[2]
ROLE = ROOT / "roles" / "nim_gateway"
INVENTORY = {
    "gpu_hosts": {
        "vars": {
            "nim_models": [
                {
                    "name": "llama",
                    "image": "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4",
                    "port": "{{ 8000 + 1 }}",
                    # Not known where the gateway is made.
                    "secret_environment": {"HF_TOKEN": "{{ vault_of_somebody_else }}"},
                }
            ]
        },
        "hosts": {
            "gpu01": {"ansible_host": "10.0.0.1"},
            "gpu02": {"ansible_host": "10.0.0.2", "nim_gateway_address": "10.1.0.2"},
            "gpu03": {},
            "idle": {"nim_models": []},
        },
    },
    "nim_gateways": {
        "hosts": {"gateway01": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}}
    },
}


def rendered(tmp_path: pathlib.Path, **variables: t.Any) -> dict[str, t.Any]:
    """What the module is given, null for what is left out."""
    (task,) = yaml.safe_load((ROLE / "tasks" / "main.yml").read_text())
    given = {
        name: value.replace("default(omit, true)", "default(none, true)") if isinstance(value, str) else value
        for name, value in task["gpu_fleet.nim.nim_gateway"].items()
    }
    (playbooks_task,) = [
        entry
        for entry in yaml.safe_load((ROOT / "playbooks" / "gateway.yml").read_text())[0]["tasks"]
        if "ansible.builtin.include_role" in entry
    ]
    play = {
        "hosts": "nim_gateways",
        "gather_facts": False,
        "vars_files": [str(ROLE / part / "main.yml") for part in ("defaults", "vars")],
        "tasks": [
            {
                "ansible.builtin.copy": {"content": "{{ given | to_json }}", "dest": str(tmp_path / "given.json")},
                "vars": {"given": given, **playbooks_task["vars"]},
            }
        ],
    }
    for name, content in (("hosts.yml", INVENTORY), ("play.yml", [play]), ("more.yml", variables)):
        (tmp_path / name).write_text(yaml.safe_dump(content))
    (tmp_path / "password").write_text("password\n")
    program = shutil.which("ansible-playbook", path=str(pathlib.Path(sys.executable).parent)) or "ansible-playbook"
    subprocess.run(
        [program, "-i", str(tmp_path / "hosts.yml"), "-e", "@%s" % (tmp_path / "more.yml"), str(tmp_path / "play.yml")],
        env=dict(
            os.environ,
            ANSIBLE_COLLECTIONS_PATH=str(ROOT / ".build"),
            ANSIBLE_HOME=str(tmp_path / "home"),
            ANSIBLE_VAULT_PASSWORD_FILE=str(tmp_path / "password"),
            LC_ALL="C.UTF-8",
        ),
        cwd=tmp_path,
        timeout=120,
        check=True,
    )
    return dict(json.loads((tmp_path / "given.json").read_text()))


def test_the_gateway_gets_what_the_inventory_says(tmp_path: pathlib.Path) -> None:
    keys = tmp_path / "keys.yml"
    text = b"team-a: of-the-file-0123456789\nteam-b: of-the-file-9876543210\n"
    keys.write_bytes(VaultLib([("default", VaultSecret(b"password"))]).encrypt(text))
    given = rendered(
        tmp_path,
        nim_gateway_port="{{ 8000 + 443 }}",
        nim_gateway_model_names={"llama": ["chat", "meta/llama"]},
        nim_gateway_api_keys={"team-a": "of-the-inventory-0123456789"},
        nim_gateway_api_keys_file=str(keys),
    )
    assert set(given) == set(GATEWAY_OPTIONS)
    assert {name for name, value in given.items() if value is None} == {
        "certificate",
        "private_key",
        "certificate_file",
    }
    validated = ArgumentSpecValidator(GATEWAY_OPTIONS).validate(
        {name: value for name, value in given.items() if value is not None}
    )
    assert not validated.error_messages
    settings = NimGateway(**validated.validated_parameters).settings
    assert settings.port == 8443
    assert settings.keys == hash_keys({"team-a": "of-the-inventory-0123456789", "team-b": "of-the-file-9876543210"})
    (backend,) = settings.backends
    assert backend.served == ("chat", "meta/llama")
    assert [(server.name, server.address, server.port) for server in backend.servers] == [
        ("gpu01:llama", "10.0.0.1", 8001),
        ("gpu02:llama", "10.1.0.2", 8001),
        ("gpu03:llama", "gpu03", 8001),
    ]
