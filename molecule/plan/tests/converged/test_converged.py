# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host that is as wanted costs one look; a service that is not ready is waited for; the page of the fleet."""

from __future__ import annotations

import html.parser
import json
import pathlib
import re

import pytest
from control import KEY_VALID
from fleet_testing import Fleet, Run

FLEET = Fleet("plan")
HOST = FLEET.host("gpu01")
LOGIN = FLEET.host("login01")
SECRETS = (KEY_VALID, "hf_plan-scenario-token")
CHECK = "Find all mistakes in the variables of all hosts"
LOOK = "Ask the host what would change"


def tasks(run: Run, name: str) -> list[str]:
    return [entry["task"] for entry in run.of(name) if entry["task"] != CHECK and entry["outcome"] != "skipped"]


@pytest.mark.parametrize("options", [(), ("--check",), ("--tags", "nim")])
def test_one_look_is_all_that_a_converged_host_costs(options: tuple[str, ...]) -> None:
    run = FLEET.site("-vvv", *options)
    assert run.changed() == []
    assert tasks(run, HOST.name) == [LOOK]
    assert run.executions(HOST) == 1
    # A host without a GPU is told so and left.
    assert tasks(run, LOGIN.name) == [LOOK, "Nothing to do on a host without an NVIDIA GPU"]
    assert run.executions(LOGIN) == 1
    assert "%s has no NVIDIA GPU on its PCI bus" % LOGIN.name in run.output
    for secret in SECRETS:
        assert secret not in run.output + json.dumps(run.results)


def test_the_plan_says_nothing(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "plan.json"
    run = FLEET.play("plan", "-vvv", "-e", "plan_fail_on_drift=true", "-e", "plan_output=%s" % output)
    assert run.executions(HOST) == run.executions(LOGIN) == 1
    assert "2 of 2 hosts are as wanted; 0 changes." in run.output
    assert [(row["host"], row["state"]) for row in json.loads(output.read_text())] == [
        (HOST.name, "as wanted"),
        (LOGIN.name, "no GPU"),
    ]
    run = FLEET.play("plan", "-e", "plan_format=json")
    printed = run.output[run.output.index("\n[\n") :]
    assert [row["state"] for row in json.JSONDecoder().raw_decode(printed.lstrip())[0]] == ["as wanted", "no GPU"]


@pytest.mark.parametrize(
    ("option", "task"),
    [("nim_image_pull=newer", "Images are on the host"), ("ngc_validate=always", "Docker is logged in")],
)
def test_what_only_the_run_can_find_out_is_found_out(option: str, task: str) -> None:
    run = FLEET.site("-e", option)
    assert run.changed() == []
    assert run.of(HOST.name, task)


def test_a_service_that_is_not_ready_is_waited_for(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "plan.json"
    # The stand-in begins when this file of its cache is there.
    inventory = FLEET.changed("gpu01", "llama", environment={"STANDIN_START_WHEN": "/opt/nim/.cache/go"})
    run = FLEET.site("--tags", "nim", "-e", "nim_wait=false", inventory=inventory)
    assert run.restarts(HOST.name) == {"nim-llama.service"}
    FLEET.play("plan", "-e", "plan_output=%s" % output, inventory=inventory)
    rows = [row for row in json.loads(output.read_text()) if row["host"] == HOST.name]
    assert [(row["resource"], row["what"], row["to"]) for row in rows] == [("nim_health", "nim-llama.service", "ready")]
    # As the model's own user: a file of root in its cache would be drift.
    HOST.run("systemd-run --quiet --on-active=3 install -o 1000 -g 1000 /dev/null /var/lib/nim/cache/llama/go")
    run = FLEET.site(inventory=inventory)
    assert run.changed() == []
    assert run.of(HOST.name, "Every model answers")
    assert HOST.ready(8000)
    assert tasks(FLEET.site(inventory=inventory), HOST.name) == [LOOK]
    assert FLEET.site().restarts(HOST.name) == {"nim-llama.service"}


def test_one_drift_is_one_row_and_one_repair() -> None:
    HOST.run("gpasswd --delete ops docker")
    run = FLEET.play("plan", "-e", "plan_fail_on_drift=true", succeeds=False)
    assert run.code == 2
    assert re.search(r"%s +none +docker_group +member ops" % HOST.name, run.output)
    # Another role's drift stays.
    run = FLEET.nim()
    assert run.changed() == []
    assert "TASK [gpu_fleet.nim.nim : " in run.output
    assert "TASK [gpu_fleet.nim.docker : Exactly" not in run.output
    run = FLEET.site()
    assert len(run.changed()) == 1
    assert "ops" in HOST.run("getent group docker")
    assert tasks(FLEET.site(), HOST.name) == [LOOK]


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _value in attrs}

    def handle_data(self, data: str) -> None:
        self.words += data.split()


def test_the_page_of_the_fleet(tmp_path: pathlib.Path) -> None:
    report = tmp_path / "fleet.html"
    run = FLEET.play("plan", "-e", "plan_report=%s" % report)
    text = report.read_text()
    page = Page(text)
    said = " ".join(page.words)
    for part in (
        HOST.name,
        LOGIN.name,
        "NVIDIA H200",
        "as wanted",
        "no GPU",
        "1 ready",
        "llama",
        "580.",
        "nvcr.io/nim/",
    ):
        assert part in said, part
    assert not page.tags & {"script", "link", "img", "iframe", "object", "a"}
    assert not page.names & {"src", "href", "xlink:href", "style"}
    assert "url(" not in text and "@import" not in text
    for secret in SECRETS:
        assert secret not in text + run.output
