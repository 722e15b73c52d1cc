# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How mistakes are collected and told; the mistakes themselves are in test_bad_inventories."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import typing as t

import pytest
from ansible.errors import AnsibleError
from ansible_collections.gpu_fleet.nim.plugins.action import validate_inventory as action
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _inventory
from ansible_collections.gpu_fleet.nim.plugins.module_utils._inventory import Problem, Unresolved, report, validate
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils import _plain

ROOT = pathlib.Path(__file__).parents[2]
SPECS: dict[str, t.Any] = {"r": {"nim_models": {"type": "list"}, "ngc_api_key": {"type": "str", "no_log": True}}}


def test_hosts_with_the_same_mistake_share_a_line() -> None:
    same = Problem("a", "a = 1: bad; mend it.")
    other = Problem("b", "b = 2: bad; mend it.")
    assert report({"h1": [same], "h2": [other, same], "h3": [same, same]}) == [
        "h1, h2, h3: a = 1: bad; mend it.",
        "h2: b = 2: bad; mend it.",
    ]
    assert report({"h%d" % at: [same] for at in range(9)}) == ["h0, h1, h2, h3, h4 and 4 more: a = 1: bad; mend it."]


def test_unresolved_template() -> None:
    [problem] = validate({"nim_models": Unresolved("'x' is undefined")}, SPECS)
    assert problem.message == (
        "nim_models: its template cannot be resolved ('x' is undefined); correct the template or set what it needs."
    )
    [problem] = validate({"ngc_api_key": Unresolved("nvapi-abcdefghijkl")}, SPECS)
    assert "nvapi" not in problem.message


def test_certificates_have_lines_and_keys_of_gateways_are_not_shown() -> None:
    specs = action.load_specs()
    pem = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
    sound = {
        "nim_gateway_certificate": pem,
        "nim_gateway_private_key": pem.replace("CERTIFICATE", "PRIVATE KEY"),
        "nim_gateway_api_keys": {"team-a": "sk-0123456789abcdef"},
    }
    assert validate(sound, specs) == []
    for name in sound:
        (problem,) = validate({**sound, name: ["sk-0123456789"]}, {"nim_gateway": specs["nim_gateway"]})[:1]
        assert problem.variable == name
        assert "(not shown)" in problem.message
        assert "sk-0123456789" not in problem.message


def test_secrets_inside_other_values_are_masked() -> None:
    [problem] = validate({"nim_model": "nvapi-abcdefghijklmnop"}, SPECS)
    assert problem.message == "nim_model = '***': no such variable; did you mean nim_models."


def test_plain_and_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(dict):  # type: ignore[type-arg]  # stands for a mapping of Ansible's
        def __getitem__(self, key: str) -> t.Any:
            if key == "nim_broken":
                raise AnsibleError("'x' is undefined")
            return super().__getitem__(key)

    found = action.resolve(Lazy({"nim_models": ({"a": 1},), "other": 1, "nim_broken": 0, "ngc_x": None}))
    assert found["nim_models"] == [{"a": 1}]
    assert found["ngc_x"] is None
    assert isinstance(found["nim_broken"], Unresolved)
    assert set(found) == {"nim_models", "nim_broken", "ngc_x"}
    for error, why in (
        (ZeroDivisionError("division by zero"), "division by zero"),
        (RecursionError(), "RecursionError"),
        (
            AnsibleError("template error while templating string: end of template.. String: {{ hf_secret"),
            "end of template",
        ),
        (
            AnsibleError("An exception occurred while templating '[{'T': 'hf_secret'}]'. Error was a <class X>, y"),
            "Error was a <class X>, y",
        ),
    ):

        class Failing(dict):  # type: ignore[type-arg]  # as above
            def __getitem__(self, key: str) -> t.Any:
                raise error  # noqa: B023  # used within this round of the loop

        value = action.resolve(Failing({"nim_models": 0}))["nim_models"]
        assert isinstance(value, Unresolved)
        assert why in value.why
        assert "hf_secret" not in value.why
    monkeypatch.setattr(_plain, "BEFORE_2_19", True)
    assert isinstance(action.resolve({"nim_models": ["{{ x }}"]})["nim_models"], Unresolved)


def test_unsafe_text_is_no_template(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsafe(str):
        """As ansible-core 2.18 reads ``!unsafe``."""

        __UNSAFE__ = True

    monkeypatch.setattr(_plain, "BEFORE_2_19", True)
    options = {"log-opts": {"tag": Unsafe("{{.Name}}")}}
    assert action.resolve({"docker_daemon_options": options}) == {"docker_daemon_options": options}


def test_every_special_check_is_about_a_variable_that_a_role_has() -> None:
    known = {name for options in action.load_specs().values() for name in options}
    source = pathlib.Path(_inventory.__file__).read_text()
    for prefix in ("nvidia_driver_", "nvidia_container_toolkit_", "ngc_", "nim_", "docker_"):
        assert any(name.startswith(prefix) for name in known), prefix
    for name in sorted(known):
        if name.endswith(("_url", "_api_key", "nim_models", "_branch")):
            assert '"%s"' % name in source, name


def play(tmp_path: pathlib.Path, inventory: dict[str, t.Any], task: str = "") -> subprocess.CompletedProcess[str]:
    """Run the action in a real play against hosts that do not exist."""
    (tmp_path / "inventory.json").write_text(json.dumps(inventory))
    (tmp_path / "play.yml").write_text(
        "- hosts: gpu_hosts\n  gather_facts: false\n  any_errors_fatal: true\n  tasks:\n"
        "    - gpu_fleet.nim.validate_inventory:\n%s"
        "    - ansible.builtin.debug:\n        msg: reached\n" % task
    )
    environment = dict(
        os.environ, ANSIBLE_COLLECTIONS_PATH=str(ROOT / ".build"), ANSIBLE_LOCALHOST_WARNING="0", ANSIBLE_NOCOLOR="1"
    )
    environment.pop("NGC_API_KEY", None)
    return subprocess.run(
        [
            str(pathlib.Path(sys.executable).parent / "ansible-playbook"),
            "-i",
            str(tmp_path / "inventory.json"),
            str(tmp_path / "play.yml"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )


def inventory_of(hosts: dict[str, t.Any], variables: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
    return {"all": {"children": {"gpu_hosts": {"hosts": hosts, "vars": variables or {}}}}}


def test_all_hosts_in_one_message_and_no_host_is_contacted(tmp_path: pathlib.Path) -> None:
    done = play(
        tmp_path,
        inventory_of(
            {
                "gpu01": {"ansible_host": "192.0.2.1"},
                "gpu02": {"ansible_host": "192.0.2.2", "ngc_registry": "https://x"},
            },
            {"ngc_api_key": "nvapi-verysecret\nx", "ngc_state": "{{ undefined_thing }}"},
        ),
    )
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "gpu01, gpu02: ngc_api_key = (not shown): there is a line break in the key" in output
    assert "gpu02: ngc_registry = 'https://x': a registry has no scheme; leave https out." in output
    assert "gpu01, gpu02: ngc_state: its template cannot be resolved" in output
    assert "verysecret" not in output
    assert "reached" not in output
    assert "UNREACHABLE" not in output


def test_sound_inventory_goes_on(tmp_path: pathlib.Path) -> None:
    done = play(tmp_path, inventory_of({"gpu01": {"ansible_connection": "local", "ngc_registry": "nvcr.io"}}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reached" in done.stdout


def test_no_role_specification_has_no_log() -> None:
    """With no_log in it, ansible-core 2.18 fails on a value that is encrypted with Vault: Unknown parameter type."""
    specs = pathlib.Path(__file__).resolve().parents[2].glob("roles/*/meta/argument_specs.yml")
    assert not [path for path in specs if "no_log: " in path.read_text()]


def test_a_missing_vault_password_is_named() -> None:
    [problem] = validate({"ngc_api_key": Unresolved("Attempting to decrypt but no vault secrets found.")}, SPECS)
    assert "Vault cannot decrypt it" in problem.message


def test_messages_name_variables_that_there_are() -> None:
    """What an operator is told to set is an option of a role, or of the module that says so."""
    known = {name for options in action.load_specs().values() for name in options}
    names = "nvidia_driver|nvidia_container_toolkit|docker|ngc|nim"
    told = {
        (path.name, word)
        for path in (ROOT / "plugins").rglob("*.py")
        for word in re.findall(r"\b(?:[Ss]et|choose|check|use) ((?:%s)_\w+)\b" % names, path.read_text())
    }
    assert len(told) > 10
    assert {(path, word) for path, word in told if word not in known} == set()
