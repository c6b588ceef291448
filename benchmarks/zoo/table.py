"""The records of the zoo as Markdown and as a page."""

from __future__ import annotations

import html
from collections import Counter, defaultdict
from typing import Any

from benchmarks.zoo.entries import entries
from benchmarks.zoo.rows import PRESETS
from benchmarks.zoo.verdict import is_sound, verdict

__all__ = ["is_sound", "line", "markdown", "page", "summary"]

Records = dict[str, dict[str, Any]]
HEADER = (
    "network", "preset", "result", "groups", "fused", "cut only", "error", "twin's", "duplicates", "permutation",
    "training step", "save, load", "ONNX", "s",
)  # fmt: skip
_FAULTS = ("CRASH", "FAULT", "WORSE")
_ABOUT = """\
# The zoo

Every classification network, detection backbone and segmentation network of torchvision, and some of timm and
transformers, pruned in each preset by half of the channels of every group (L1 order, torch-pruning's groups, the
layers that make the output left alone), on small inputs. Made by `python -m benchmarks.zoo --tables docs/zoo.md`; it
goes on where it was stopped, and `--page` writes a page that sorts.

The weights are **random**: this table says what can be pruned, saved and trained further, not how good a result is.
What an initialisation makes constant (gains, biases, layer scales) is drawn too, and the batch-norms' statistics, which
mean nothing before training, are those of one forward pass over random inputs.

* **result**: `better`: the output is as near to the dense network's as its discarded twin's, or nearer (the twin: the
  same channels chosen and cut, nothing fused). `worse`: it is not, and a warning says so. `refused`: an error with a
  reason, the network as it was. `no network`: torch-pruning makes a network that does not run, and a warning says so.
  `too large`: more than the row's time or memory. `CRASH`, `FAULT`, `WORSE` (without a word): defects.
* **error**, **twin's**: |output - dense output| / |dense output| on random inputs that the pruner has not seen. Under
  `discard` the twin is torch-pruning's own network; no number there: it does not run until its user has set the sizes
  that its forward pass reads, which our step does.
* **duplicates**: the same, when half of the channels are exact copies of others and the copies are pruned (in double
  precision; not under `discard` and `paper`, which promise nothing of the kind, nor where pruning took over 40 s).
  **permutation**: when channels change places within their groups.
* **cut only**: groups that a preset cannot fuse; why is listed below. **s**: processor seconds, one thread.
* ONNX is tried under `calibrated` only, which adds biases; `-` means not tried.

`paper` is the published method. Its sums grow with the depth: the coefficients of each channel sum to one, so that a
merged row is as large as its members together, and so are the columns that read it. Batch-norms with running statistics
do not take that back, and the error multiplies from layer to layer, up to 10^9 here, while the twin's stays near 1.
That is the method as published, not a defect; a warning gives both figures.
"""


def summary(records: Records) -> str:
    """How many networks of each result there are, by preset."""
    counts = {preset: Counter(verdict(r)[0] for r in records.values() if r["preset"] == preset) for preset in PRESETS}
    words = sorted({word for counter in counts.values() for word in counter}, key=lambda word: (word in _FAULTS, word))
    lines = ["| preset | " + " | ".join(words) + " |", "|---|" + "---:|" * len(words)]
    lines += [f"| {preset} | " + " | ".join(str(counts[preset][word] or "") for word in words) + " |"
              for preset in PRESETS]  # fmt: skip
    return "\n".join(lines)


def cells(record: dict[str, Any]) -> list[str]:
    """One line of the table."""
    errors = record.get("errors", {})
    runs = record.get("error") is not None
    return [
        record["model"].replace("torchvision:", ""), record["preset"], verdict(record)[0],
        *(str(record.get(key, "")) for key in ("groups", "fused", "cut")),
        _number(record.get("error")), _number(record.get("twin")), _number(record.get("duplicates")),
        _number(record.get("permutation")),
        _done(record.get("trained"), "training" in errors, runs),
        _done(record.get("saved"), "save and load" in errors, runs),
        _done("onnx" in record or None, "ONNX" in errors, runs), _number(record.get("seconds")),
    ]  # fmt: skip


def line(record: dict[str, Any]) -> str:
    """A record for the log, with the reason of its result."""
    return " | ".join([*cells(record), verdict(record)[1][:300]])


def markdown(records: Records) -> str:
    """The whole document."""
    rows = ["| " + " | ".join(HEADER) + " |", "|---|---|---|" + "---:|" * (len(HEADER) - 3)]
    rows += ["| " + " | ".join(cells(record)) + " |" for record in _in_order(records)]
    models = {record["model"] for record in records.values()}
    told = f"{len(records)} rows of {len(models)} networks have been measured, of {len(entries())} that are listed."
    parts = [_ABOUT, "## Results\n", told + "\n", summary(records), "", *_listed_reasons(records)]
    parts += ["## Every row\n", *rows, ""]
    return "\n".join(parts)


def page(records: Records) -> str:
    """The table as one HTML file that needs nothing else; a click on a heading sorts."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (*HEADER, "why"))
    body = []
    for record in _in_order(records):
        word, why = verdict(record)
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in (*cells(record), why))
        body.append(f'<tr class="{word.replace(" ", "-")}">{row}</tr>')
    return _PAGE.replace("HEAD", head).replace("BODY", "\n".join(body))


def _in_order(records: Records) -> list[dict[str, Any]]:
    """Networks in the order in which they were first measured, presets in ours."""
    first = {name: number for number, name in reversed(list(enumerate(r["model"] for r in records.values())))}
    return sorted(records.values(), key=lambda r: (first[r["model"]], PRESETS.index(r["preset"])))


def _listed_reasons(records: Records) -> list[str]:
    """Defects, refusals and groups that are only cut, each reason once with the networks that it is for."""
    parts = []
    for title, words in (
        ("Defects", _FAULTS), ("Worse than the twin, and says so", ("worse",)), ("Refused", ("refused",)),
        ("Not prunable by torch-pruning either", ("no network",)), ("Beyond the limits", ("too large", "skipped")),
    ):  # fmt: skip
        found: dict[str, list[str]] = defaultdict(list)
        for record in _in_order(records):
            word, why = verdict(record)
            name = record["model"].replace("torchvision:", "")
            if word in ("worse", "WORSE") and word in words:
                found[f"{record['preset']} {'' if word == 'worse' else 'without a word '}(error, twin's)"].append(
                    f"{name} ({_number(record['error'])}, {_number(record['twin'])})"
                )
            elif word in words:
                found[why[:400]].append(f"{name}/{record['preset']}")
        if found:
            parts += [f"### {title}\n", *(f"* {_plain(why)}: {', '.join(names)}" for why, names in found.items()), ""]
    reasons: dict[str, set[str]] = defaultdict(set)
    for record in records.values():
        for reason in record.get("why", {}):
            reasons[reason].add(record["model"].replace("torchvision:", ""))
    if reasons:
        parts += ["### Groups that are only cut\n"]
        parts += [f"* {_plain(reason[:300])}: {', '.join(sorted(names))}" for reason, names in sorted(reasons.items())]
        parts.append("")
    return parts


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return ""
    return (
        f"{value:.2g}"
        if value >= 10**5
        else f"{value:.0f}"
        if value >= 100
        else f"{value:.2g}"
        if value < 10
        else f"{value:.1f}"
    )


def _done(value: Any, failed: bool, tried: bool) -> str:
    return "FAILS" if failed or value is False else "yes" if value else "-" if tried else ""


_PAGE = """<!doctype html><meta charset="utf-8"><title>The zoo</title>
<style>body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}
td,th{padding:2px 8px;border-bottom:1px solid #ddd;text-align:left}
th{cursor:pointer;position:sticky;top:0;background:#fff}
td:nth-child(n+4):nth-child(-n+14){text-align:right}
.CRASH,.FAULT,.WORSE{background:#fdd}.worse,.refused{background:#fe9}.better{background:#efe}</style>
<h1>The zoo</h1><p><input placeholder="show rows that contain ..." oninput="show(this.value)"></p>
<table><thead><tr>HEAD</tr></thead><tbody>
BODY
</tbody></table>
<script>
const body = document.querySelector('tbody');
const show = text => { for (const row of body.rows) row.hidden = !row.textContent.includes(text); };
const number = text => text === '' || isNaN(text) ? null : +text;
document.querySelectorAll('th').forEach((heading, at) => heading.onclick = () => {
  const of = row => row.children[at].textContent;
  const order = (p, q) => {
    const [a, b] = [number(of(p)), number(of(q))];
    return a !== null && b !== null ? a - b : of(p).localeCompare(of(q));
  };
  body.append(...[...body.rows].sort(order));
});
</script>
"""
