# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The support bundle: everything that helps, no secret, of a size that can be sent, and nothing left on the host."""

from __future__ import annotations

import base64
import io
import json
import pathlib
import re
import stat
import tarfile
import typing as t

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.gpu_fleet.nim.plugins.action.gpu_host_diagnosis import collection_version, write_private
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _support_bundle
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import Redactor, known_secrets
from ansible_collections.gpu_fleet.nim.plugins.module_utils._support_bundle import SupportBundle, unwrap, wrap
from fake_host import FakeHost

KEY = "legacy-key-Zm9vLWJhcg-0815-0816"
TOKEN = "db-token/with+odd=chars"


class Docker:
    def __init__(self, up: bool = True) -> None:
        self.up = up

    def _asked(self) -> None:
        if not self.up:
            raise FleetError("docker_unavailable", "Asking Docker failed: no daemon.")

    def info(self) -> dict[str, t.Any]:
        self._asked()
        return {"HttpProxy": "http://ops:proxy-password@proxy:3128", "CgroupDriver": "systemd"}

    def version(self) -> dict[str, t.Any]:
        self._asked()
        return {"Version": "26.1.5"}

    def container(self, name: str) -> dict[str, t.Any] | None:
        self._asked()
        if name != "nim-llama":
            return None
        return {
            "Config": {"Env": ["NGC_API_KEY=" + KEY, "NIM_X=1", "ODD=Xk29fjW0qLm42nPz"]},
            "Args": ["--token", "abcdefgh"],
        }


def log(_host: FakeHost, argv: tuple[str, ...], *_rest: t.Any) -> str:
    if "CONTAINER_NAME=nim-llama" not in argv:
        return "%s said nothing\n" % argv[-1]
    said = [
        KEY,
        base64.b64encode(("$oauthtoken:" + KEY).encode()).decode(),
        json.dumps({"message": "Bearer " + KEY}),
        KEY[::-1],
        KEY[:20],
        TOKEN,
        "Authorization: Bearer unknown-token-1234",
        "Loading model weights",
    ]
    return "\n".join("2026-11-20T21:00:00.000000+0000 gpu01 nim-llama[1]: " + text for text in said)


@pytest.fixture
def host() -> FakeHost:
    login = base64.b64encode(b"robot:registry-password").decode()
    return FakeHost(
        files={
            "/etc/nim/ngc.env": "NGC_API_KEY=%s\n" % KEY,
            "/etc/nim/llama.env": "# key 00\nDB_TOKEN=%s\n" % TOKEN,
            "/etc/nim/llama.json": json.dumps({"name": "llama", "create": ["--env=A=b"], "gpus": ["GPU-1"]}),
            "/root/.docker/config.json": json.dumps({"auths": {"other.example": {"auth": login}}}),
            "/etc/passwd": "root:x:0:0::/root:/bin/bash\n",
            "/etc/docker/daemon.json": '{"proxies": {"http-proxy": "http://ops:proxy-password@proxy:3128"}}',
            "/etc/os-release": "ID=ubuntu\n",
            "/var/lib/gpu_fleet/images.json": "{broken %s" % KEY,
        },
        commands={
            "nvidia-smi -q -x": "<nvidia_smi_log/>",
            "dpkg-query *": "ii  nvidia-utils 580\nii  vim 9\nii  docker-ce 5:29\n",
            "systemctl show nim-llama.service": 'LoadState=loaded\nEnvironment=HOME=/root MY_TOKEN=abc "DB_PASS=one two" TZ=UTC\n',
            "systemctl show docker.service": "LoadState=loaded\n",
            "systemctl show *": "LoadState=not-found\n",
            "systemctl cat *": "[Service]\nEnvironment=HTTPS_PROXY=http://ops:proxy-password@proxy:3128\n",
            "journalctl --dmesg *": "\n".join(
                json.dumps({"MESSAGE": text, "__REALTIME_TIMESTAMP": "5000000"})
                for text in ("NVRM: Xid (PCI:0000:01:00): 79, x", "usb 1-1: new device", "oom-kill: x")
            ),
            "journalctl *": log,
            "docker ps *": "nim-llama\n",
        },
    )


def unpacked(content: bytes) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        assert all(member.mode == 0o600 and member.isfile() for member in archive.getmembers())
        return {member.name: archive.extractfile(member).read().decode() for member in archive.getmembers()}  # type: ignore[union-attr]  # all are files


def test_content_without_any_secret(host: FakeHost) -> None:
    bundle = SupportBundle(host, known_secrets(host).redactor(), t.cast(t.Any, Docker()))
    bundle.add_data("plan.json", {"changes": [{"from": KEY}]})
    bundle.collect(["llama", "gone"])
    found = unpacked(bundle.archive("gpu01-now"))
    for name in (
        "gpu/nvidia-smi.xml",
        "docker/info.json",
        "files/etc/docker/daemon.json",
        "system/packages.txt",
        "system/kernel.log",
        "units/nim-llama.service.properties",
        "units/nim-llama.service.txt",
        "journal/nim-llama.service.log",
        "journal/docker.service.log",
        "containers/nim-llama.json",
        "containers/nim-llama.log",
        "containers/nim-gone.log",
        "nim/llama.json",
        "records/images.json",
        "plan.json",
        "manifest.json",
    ):
        assert "gpu01-now/" + name in found, name
    everything = "\n".join(found.values())
    for secret in (KEY, TOKEN, "registry-password", "proxy-password", "unknown-token", "Xk29fj", "abcdefgh"):
        raw = secret.encode()
        for form in (
            secret,
            secret[::-1],
            secret[:15],
            base64.b64encode(raw).decode()[:16],
            base64.b64encode(("$oauthtoken:" + secret).encode()).decode(),
        ):
            assert form not in everything, form
    text = found["gpu01-now/containers/nim-llama.log"]
    assert text.count("Loading model weights") == 1
    assert json.loads(found["gpu01-now/containers/nim-llama.json"]) == {
        "Config": {"Env": ["NGC_API_KEY=***", "NIM_X=1", "ODD=***"]},
        "Args": ["--token", "***"],
    }
    shown = found["gpu01-now/units/nim-llama.service.properties"]
    assert 'Environment=HOME=/root MY_TOKEN=*** "DB_PASS=***" TZ=UTC' in shown
    assert found["gpu01-now/system/packages.txt"].splitlines() == ["ii  docker-ce 5:29", "ii  nvidia-utils 580"]
    assert "usb" not in found["gpu01-now/system/kernel.log"]
    assert "Xid" in found["gpu01-now/system/kernel.log"]
    manifest = json.loads(found["gpu01-now/manifest.json"])
    assert manifest["masked"] > 10
    assert not any("containerd" in name for name in found)
    assert "nvidia-smi topo" not in everything
    assert "command not found" in found["gpu01-now/gpu/topology.txt"]


def test_nothing_is_written_on_the_host(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(host.files), set(host.dirs)
    bundle = SupportBundle(host, Redactor(()), t.cast(t.Any, Docker()))
    bundle.collect([])
    bundle.archive("x")
    assert (dict(host.files), set(host.dirs)) == before


def test_a_host_without_docker_still_gives_a_bundle(host: FakeHost) -> None:
    bundle = SupportBundle(host, known_secrets(host).redactor(), t.cast(t.Any, Docker(up=False)))
    bundle.collect(["llama"])
    found = unpacked(bundle.archive("x"))
    assert "no daemon" in found["x/docker/info.json"]
    assert "Loading model weights" in found["x/containers/nim-llama.log"]


def test_the_end_of_a_long_log_is_kept_and_the_cut_is_said(host: FakeHost) -> None:
    bundle = SupportBundle(host, Redactor(()), t.cast(t.Any, Docker()))
    bundle.add_text("a.log", "\n".join("line %d %s" % (number, "x" * 900) for number in range(5000)), log=True)
    text = bundle.entries["a.log"]
    assert len(text) <= _support_bundle.LOG_CHARACTERS
    assert "line 4999 " in text
    assert "line 0 " not in text
    assert len(bundle.left_out) == 1
    assert bundle.left_out[0].startswith("a.log: ")


def test_all_of_it_is_bounded(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_support_bundle, "ALL_CHARACTERS", 250_000)
    bundle = SupportBundle(host, Redactor(()), t.cast(t.Any, Docker()))
    for number in range(4):
        bundle.add_text("%d.log" % number, ("y" * 999 + "\n") * 100, log=True)
    assert [len(text) for text in bundle.entries.values()] == [100_000, 100_000, 50_000, 0]


def test_the_way_to_the_controller_survives_what_ansible_blanks_out() -> None:
    content = bytes(range(256)) * 40
    plain = base64.b64encode(content).decode()
    wrapped = wrap(content, {plain[:6], plain[100:105], "a", "", "no"})
    assert plain[:6] not in wrapped["content"]
    assert unwrap(wrapped) == content


def test_values_that_occur_in_everything_are_refused() -> None:
    blanked = {wrap(bytes([0]) * 60, ())["content"][:4]} | {
        base64.b64encode(bytes([salt]) * 60).decode()[:4] for salt in range(256)
    }
    with pytest.raises(FleetError) as caught:
        wrap(bytes([0]) * 60, blanked)
    assert caught.value.reason == "bundle_failed"


# -- on the controller ------------------------------------------------------------------------------


def test_the_file_is_private_and_whole(tmp_path: pathlib.Path) -> None:
    path = pathlib.Path(write_private(str(tmp_path / "new"), "gpu01.tar.gz", b"content"))
    assert path.read_bytes() == b"content"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["gpu01.tar.gz"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(AnsibleActionFail, match=r"Writing .* failed"):
        write_private(str(tmp_path / "file"), "gpu01.tar.gz", b"content")


def test_the_collection_knows_its_version(tmp_path: pathlib.Path) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", collection_version())
    (tmp_path / "MANIFEST.json").write_text('{"collection_info": {"version": "9.8.7"}}')
    assert collection_version(str(tmp_path)) == "9.8.7"
    assert collection_version(str(tmp_path / "none")) == ""
