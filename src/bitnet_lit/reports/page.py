"""report.html: one file with the table, the notes and plots that one can hover, zoom and switch. It loads nothing.

The page is made of page.html, page.css, page.js and the library plotly.js, which the package plotly brings. A content
security policy in the page forbids it to load anything, so a text in it that looks like code stays text.
"""

from __future__ import annotations

import html
import json
from datetime import datetime
from pathlib import Path

from bitnet_lit import __version__
from bitnet_lit.reports.comparison import Comparison
from bitnet_lit.reports.page_data import page_data
from bitnet_lit.reports.tables import explanation, reasons, table

_PARTS = Path(__file__).parent
_FEW_NOTES = 6


def _table(comparison: Comparison) -> str:
    """Return the table as HTML. page.js colours the marks of its rows."""
    names, rows = table(comparison)
    num_keys = max(len(comparison.by), 1)
    key = "".join(f"<th class=key>{html.escape(name)}</th>" for name in names[:num_keys])
    lines = [
        f"<thead><tr>{key}{''.join(f'<th>{html.escape(name)}</th>' for name in names[num_keys:])}</tr></thead><tbody>"
    ]
    for row, texts in zip(comparison.rows, rows, strict=True):
        first, *others = map(html.escape, texts)
        tags = [f"<th scope=row class=key><i class=mark></i>{first}</th>"]
        tags += [f"<td class=key>{text}</td>" for text in others[: num_keys - 1]]
        for name, text in zip(names[num_keys:], others[num_keys - 1 :], strict=True):
            is_best = row.is_best and name == comparison.metric
            tags.append(f"<td>{'<span class=tag>best</span>' if is_best else ''}{text}</td>")
        lines.append(f"<tr{' class=best' if row.is_best else ''}>{''.join(tags)}</tr>")
    return f"{''.join(lines)}</tbody>"


def _list(lines: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _notes(comparison: Comparison) -> str:
    lines = [*reasons(comparison), *comparison.notes]
    if len(lines) <= _FEW_NOTES:
        return _list(lines)
    return f"<details><summary>{len(lines)} notes</summary>{_list(lines)}</details>"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _summary(comparison: Comparison) -> str:
    counted = sum(len(row.counted) for row in comparison.rows)
    left_out = len(comparison.runs) - counted
    made = datetime.now().strftime("%Y-%m-%d %H:%M")
    runs = _count(counted, "run") + (f", {left_out} left out" if left_out else "")
    return html.escape(" · ".join([_count(len(comparison.rows), "row"), runs, made]))


def as_page(comparison: Comparison, title: str, plotly: str) -> str:
    """Return the text of report.html.

    Args:
        plotly: the source of plotly.js.
    """
    data = json.dumps(page_data(comparison), allow_nan=False, separators=(",", ":"))
    parts = {
        "title": html.escape(title),
        "summary": _summary(comparison),
        "table": _table(comparison),
        "notes": _notes(comparison),
        "explanation": _list(explanation(comparison)),
        "version": __version__,
        "style": (_PARTS / "page.css").read_text(encoding="utf-8"),
        "data": data.replace("<", "\\u003c"),  # "</script>" in a name would end the block
        "plotly": plotly,
        "script": (_PARTS / "page.js").read_text(encoding="utf-8"),
    }
    pieces = (_PARTS / "page.html").read_text(encoding="utf-8").split("@@")  # text, name, text, name, ..., text
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))
