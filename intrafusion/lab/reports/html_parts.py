"""The parts that HTML reports are made of: the page around them, figures, tables, facts. All text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

LEGEND = (
    '<p class="legend"><span class="fused">fused</span> <span class="discard">discard</span> '
    '<span class="dense">dense</span></p>'
)
_KINDS = {"group": "name", "network": "name", "reason": "text", "kept channel": "name", "made of": "text"}


def document(title: str, parts: Iterable[str]) -> str:
    """A page of its own from its title, as text, and its parts, as HTML; empty parts are left out."""
    style = resources.files("intrafusion.lab.reports").joinpath("page.css").read_text(encoding="utf-8")
    title, body = escape(title), "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{title}: pruned with and without fusion</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def plain(text: str) -> str:
    """Escaped, without the backticks that Markdown has around code."""
    return escape(text).replace("`", "")


def figure(svg: str, caption: str) -> str:
    """A picture under its caption."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def fact_boxes(named: Mapping[str, str]) -> str:
    """Names with their values, in boxes side by side."""
    entries = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in named.items())
    return f'<dl class="facts">{entries}</dl>'


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in a box of its own, which scrolls where the page is too narrow."""
    kinds = [_KINDS.get(name, "number") for name in header]
    head = "".join(
        f'<th scope="col" class="{kind}">{escape(name)}</th>' for name, kind in zip(header, kinds, strict=True)
    )
    lines = "".join(
        "<tr>" + "".join(_cell(*entry) for entry in zip(header, kinds, row, strict=True)) + "</tr>" for row in rows
    )
    inside = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<div class="scroll" role="region" aria-label="{escape(header[0])} and more" tabindex="0">{inside}</div>'


def _cell(name: str, kind: str, text: str) -> str:
    tone = {"+": " win", "-": " loss"}.get(text[:1], "") if name == "gain" and float(text.split()[0]) else ""
    return f'<td class="{kind}{tone}">{escape(text.replace(" -> ", " → "))}</td>'
