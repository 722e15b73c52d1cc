# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The page of the fleet: what stands on it, that it loads nothing, that nothing of a host becomes markup."""

from __future__ import annotations

import html.parser
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._fleet_report import render_report
from report_fleet import FLEET

VOID = {"meta", "br"}


class Page(html.parser.HTMLParser):
    """Every tag closed in order, all attributes, all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data.split()


def page_of(fleet: t.Any) -> tuple[Page, str]:
    text = render_report(fleet, "2026-11-20 at 21:40 UTC")
    page = Page(text)
    return page, " ".join(page.text)


def test_what_stands_on_the_page() -> None:
    _page, text = page_of(FLEET)
    for part in (
        "as it was on 2026-11-20 at 21:40 UTC",
        "4 as wanted 2 with drift 1 without an answer 1 without a GPU",
        "GPU 0 119 / 140 GiB NVIDIA H200 llama",
        "5 ready 1 on the way 2 failed",
        "580.95.05 open",
        "no driver loaded",
        "Failed to connect to the host via ssh",
        "restart of a NIM nim_service nim-mixtral.service",
        "left out: 1 container would stop",
        "unknown docker_daemon cannot be planned",
        "nim_image: pull is newer",
        "https://[fd00::8]:8000",
    ):
        assert part in text, part


def test_every_disruption_has_a_colour() -> None:
    page, text = page_of(FLEET)
    styles = text[: text.index("GPU fleet as it was")]
    for disruption in Disruption:
        assert "--%s:" % disruption in styles
        assert ".badge.%s {" % disruption in styles.replace(", ", " ").replace(".dot.%s " % disruption, "")
    assert page.tags >= {"svg", "rect", "table", "article"}


def test_it_loads_nothing() -> None:
    page, text = page_of(FLEET)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "base", "form", "a", "image", "use"}
    assert {name for _tag, name, _value in page.attributes} & {"src", "href", "xlink:href", "style", "onload"} == set()
    styles = text[: text.index("GPU fleet as it was")]
    assert "url(" not in styles
    assert "@import" not in styles


def test_nothing_of_a_host_becomes_markup() -> None:
    evil = "<script>alert(1)</script>\"'><b onload=x>"
    change = dict.fromkeys(("what", "from", "to", "why", "blocked", "resource"), evil)
    plan = {"gpu": True, "changes": [{**change, "disruption": "none"}], "errors": [], "notes": [evil]}
    facts = {
        "os": {"name": evil},
        "kernel": evil,
        "driver": {"loaded": evil, "flavour": evil},
        "gpus": [{"index": evil, "uuid": "GPU-1", "name": evil, "memory_total_mib": 10, "memory_used_mib": 5}],
        "nim": [{"name": evil, "image": evil, "digest": evil, "state": evil, "message": evil, "gpus": ["GPU-1"]}],
    }
    page, _text = page_of([(evil, evil, plan, facts), (evil, evil, {"unreachable": True, "msg": evil}, None)])
    assert "script" not in page.tags
    assert not [name for _tag, name, _value in page.attributes if name.startswith("on")]


@pytest.mark.parametrize(
    "fleet",
    [
        [],
        [("a", "a", None, None)],
        [("a", "a", {"gpu": False, "changes": [], "errors": []}, {"failed": True, "msg": "x"})],
        [("a", "a", {"gpu": True, "changes": [], "errors": []}, {"gpus": [{"memory_total_mib": 0}], "nim": [{}]})],
    ],
)
def test_what_is_not_known_is_left_out(fleet: t.Any) -> None:
    _page, text = page_of(fleet)
    assert "Every host that could be looked at is as wanted." in text
