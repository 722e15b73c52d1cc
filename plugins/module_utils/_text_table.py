# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Tables of plain text."""

from __future__ import annotations

import json
import typing as t

#: Characters of a cell, and of one in the last column, which pushes nothing aside.
_WIDTH = 120
_LAST_WIDTH = 4000


def text_table(headings: t.Sequence[str], lines: t.Sequence[t.Sequence[str]], *, group: int = 0) -> list[str]:
    """Lines of a table with columns as wide as their widest cell; a cell is one line, whatever is in it.

    Args:
        group: This many first cells of a line are left empty where the line above begins with the same cell.
    """
    shown: list[t.Sequence[str]] = [headings]
    previous: t.Sequence[str] = ()
    for line in lines:
        same = previous[:1] == line[:1]
        last = len(line) - 1
        shown.append(
            [
                "" if same and column < group else shorten(cell, _LAST_WIDTH if column == last else _WIDTH)
                for column, cell in enumerate(line)
            ]
        )
        previous = line
    widths = [max(len(line[column]) for line in shown) for column in range(len(headings))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in shown]


def one_line(text: str) -> str:
    """A text without line ends, so that nothing in it looks like a line of its own."""
    return " ".join(text.split())


def value_text(value: t.Any) -> str:
    """A value as people read it in a cell; a dash for nothing."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def shorten(text: str, width: int) -> str:
    """One line of at most ``width`` characters."""
    text = one_line(text)
    return text if len(text) <= width else text[: width - 1] + "…"
