"""Pages that stand alone: one HTML file, its style and pictures in it, that reads on a screen and in print."""

import base64
import html
from collections.abc import Iterable, Sequence

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c22; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e8; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; } img { max-width: 100%; height: auto; display: block; }
.verdict { font-size: 1.15rem; padding: .6rem .9rem; border-left: .4rem solid #0072b2; background: #f3f6f9; }
.off { color: #a33c00; font-weight: 600; } .off::after { content: " !"; }
.note { color: #55555f; font-size: .9rem; } figure { margin: 1rem 0; } figcaption { margin-bottom: .3rem; }
@media print { body { margin: 0; max-width: none; } h2, figure, table { break-inside: avoid; } }
"""


def page(title: str, heading: str, verdict: str, sections: Iterable[tuple[str, str]]) -> str:
    """Return a page.

    Args:
        title: of the window, plain text.
        heading: plain text.
        verdict: the sentence that leads, HTML.
        sections: heading and content of each, HTML.
    """
    body = "".join(f"<h2>{heading}</h2>\n{content}\n" for heading, content in sections)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(heading)}</h1>
<p class="verdict">{verdict}</p>
{body}</body></html>
"""


def number(value: float | None, decimals: int, off: bool = False) -> str:
    """Return a number as it is shown, a dash for None; marked where it is off what is good."""
    shown = "–" if value is None else f"{value:.{decimals}f}"
    return f'<span class="off">{shown}</span>' if off else shown


def with_interval(value: float | None, interval: Sequence[float | None], decimals: int | None = None) -> str:
    """Return a number and its interval, as "0.912 (0.880 to 0.940)"; to three digits where no decimals are given."""
    shown = [
        "–" if end is None else f"{end:.3g}" if decimals is None else f"{end:.{decimals}f}"
        for end in (value, *interval)
    ]
    return shown[0] if "–" in shown else f"{shown[0]} ({shown[1]} to {shown[2]})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the first cell of each row is plain text, the others HTML."""
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{_rows(rows)}</table>"


def grouped_table(groups: Sequence[str], columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns come once under each of the groups' names; see `table`."""
    upper = "".join(f"<th colspan={len(columns)}>{html.escape(group)}</th>" for group in groups)
    lower = "".join(f"<th>{html.escape(column)}</th>" for _ in groups for column in columns)
    return f"<table><tr><th></th>{upper}</tr><tr><th></th>{lower}</tr>{_rows(rows)}</table>"


def picture(png: bytes, description: str) -> str:
    """Return a PNG within the page; its description is plain text."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def captioned(png: bytes, caption: str) -> str:
    """Return a PNG under its caption, plain text."""
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{picture(png, caption)}</figure>"


def notes(sentences: Iterable[str]) -> str:
    """Return small print, a plain sentence a line."""
    return "<ul class=note>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _rows(rows: Iterable[Sequence[str]]) -> str:
    return "".join(
        f"<tr><td>{html.escape(first)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"
        for first, *cells in rows
    )
