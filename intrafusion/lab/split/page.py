"""The HTML report of a run with a section ``split``: one file, for a screen of any width, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from intrafusion.lab.recipe.loader import to_yaml
from intrafusion.lab.reports.contents import command
from intrafusion.lab.reports.html_parts import document, figure, html_table
from intrafusion.lab.reports.svg import Point, accuracy_chart
from intrafusion.lab.split.study import OF_WHOLE, SplitStudy
from intrafusion.lab.split.tables import (
    FROM_PARTS,
    SHOWN,
    STEPS,
    TIMES,
    Curves,
    curves,
    mean_accuracy,
    networks_table,
    of,
    schedules_table,
    settings_of,
    shown_epochs,
    times_table,
)
from intrafusion.lab.split.verdicts import summary, verdicts

_CLASS = {"whole fused": "fused", "whole discard": "discard", "paf": "paf", "fap": "fap"}


def to_html(study: SplitStudy, folder: Path) -> str:
    """The whole page; every text from outside is escaped, and nothing is fetched."""
    found = curves(study)
    kept = (
        "<h2>The networks</h2><p>The pruned networks are in networks/ as safetensors: intrafusion.load(FILE) gives one "
        "back anywhere.</p>"
    )
    parts = [
        f"<p>{escape(summary(study))}</p>",
        *(f"<p>{escape(line)}</p>" for line in verdicts(study)),
        *_charts(found),
        *_gains(found),
        *_networks(study),
        *_times(study),
        kept if found and study.recipe.kept_methods else "",
        "<h2>What was run</h2>",
        f"<p>{escape(study.environment['device'])}, threads: {escape(study.environment['threads'])}.</p>",
        "<details><summary>The recipe with every setting</summary>"
        f"<pre>{escape(to_yaml(study.recipe))}</pre></details>",
        f"<h2>Again</h2><pre>{escape(command(folder))}</pre>",
        "<p>Every number is in <code>results.jsonl</code> and <code>results.csv</code>.</p>",
    ]
    return document(f"{study.recipe.title}, trained in {len(study.parts)} parts", parts)


def _charts(found: Sequence[Curves]) -> list[str]:
    if not found:
        return []
    names = {method: SHOWN[method] for each in found for method in each.lines}
    legend = " ".join(f'<span class="{_CLASS[method]}">{escape(name)}</span>' for method, name in names.items())
    parts = ["<h2>Accuracy, in % of the test images</h2>", f'<p class="legend">{legend}</p>', '<div class="figures">']
    for each in found:
        lines = {
            _CLASS[method]: [
                Point(100 * ratio, value, f"{SHOWN[method]}, {ratio:.0%} removed: {value:.2f} %")
                for ratio, value in line.items()
            ]
            for method, line in each.lines.items()
        }
        alt = f"Accuracy of every schedule, {each.label}. The figures are in the table below"
        chart = accuracy_chart(lines, None, alt=alt, x_label="channels removed (%)", x_top=100, joined=True)
        parts.append(figure(chart, f"Against channels removed: {each.label}"))
    return [*parts, "</div>"]


def _gains(found: Sequence[Curves]) -> list[str]:
    """Every setting, with what training in parts won or lost."""
    parts = []
    for each in found:
        methods = [name for name in (*FROM_PARTS, *OF_WHOLE) if name in each.lines]
        ratios = sorted({ratio for line in each.lines.values() for ratio in line if ratio})
        rows, gains = [], []
        for ratio in ratios:
            values = {name: each.lines[name][ratio] for name in methods if ratio in each.lines[name]}
            ours, theirs = ([values[name] for name in names if name in values] for names in (FROM_PARTS, OF_WHOLE))
            gains += [f"{max(ours) - max(theirs):+.2f}"] if ours and theirs else []
            rows.append([f"{ratio:.4g}", *(f"{values[name]:.2f}" if name in values else "" for name in methods)])
        header = ["removed", *(SHOWN[name].replace("whole, ", "") for name in methods)]
        if len(gains) == len(rows):
            header, rows = [*header, "gain"], [[*row, gain] for row, gain in zip(rows, gains, strict=True)]
        parts += [f"<h3>{escape(each.label.capitalize())}</h3>", html_table(header, rows)]
    if not parts:
        return []
    note = (
        "<p>Means over the seeds; fused and discard are of the network that saw all images. The gain, in points, is of "
        "the better of PaF and FaP over the better of those two.</p>"
    )
    return ["<h2>Every setting</h2>", note, *parts]


def _networks(study: SplitStudy) -> list[str]:
    header, rows = networks_table(study)
    if not rows:
        return []
    inits = list(dict.fromkeys(row[0] for row in rows if row[0]))
    names = list(dict.fromkeys(row[1] for row in rows))
    means: dict[tuple[str, str], str] = {(row[0], row[1]): row[-1] for row in rows}
    shown = [[name, *(means.get((init, name), means.get(("", name), "")) for init in inits or [""])] for name in names]
    columns = [f"{init} init" for init in inits] or ["accuracy"]
    return [
        "<h2>Before pruning</h2>",
        "<p>The networks of the parts, their averages and ensemble, and the one that saw all images; accuracy in %"
        f"{', mean over the seeds' if len(study.recipe.split.seeds if study.recipe.split else ()) > 1 else ''}.</p>",
        html_table(["network", *columns], shown),
        f"<details><summary>Every seed</summary>{html_table(header, rows)}</details>" if len(header) > 3 else "",
    ]


def _times(study: SplitStudy) -> list[str]:
    """The steps of every schedule at the middle ratio as bars, and all ratios as a table."""
    ratios = sorted({ratio for _, ratio, _ in settings_of(study)})
    if not ratios:
        return []
    middle = ratios[len(ratios) // 2]
    bars: list[tuple[str, list[float], str]] = []
    for init, ratio, epochs in settings_of(study):
        whole = of(study, "whole fused", init, ratio, epochs)
        for name in ("whole fused", *FROM_PARTS) if ratio == middle else ():
            if own := of(study, name, init, ratio, epochs):
                seconds = [fmean(r.seconds.get(step, 0.0) for r in own.values()) for step in STEPS]
                ahead = fmean(r.total_seconds for r in whole.values()) / sum(seconds) if whole else None
                where = ", ".join([SHOWN[name], *([f"{init} init"] if init else []), shown_epochs(epochs)])
                accuracy = f"{mean_accuracy(own):.2f} %"
                shown = f"{sum(seconds):.4g} s" + ("" if ahead is None else f", {ahead:.2f}x")
                bars.append((f"{where}: {accuracy}", seconds, shown))
    longest = max(sum(seconds) for _, seconds, _ in bars)
    items = "".join(
        f'<li><span class="name">{escape(name)}</span><span class="track steps">'
        + "".join(
            f'<span class="bar {step}" style="width:{value / longest:.2%}"></span>'
            for step, value in zip(STEPS, seconds, strict=True)
        )
        + f'</span><span class="value">{shown}</span></li>'
        for name, seconds, shown in bars
    )
    legend = " ".join(f'<span class="{step}">{step}</span>' for step in STEPS)
    return [
        f"<h2>Seconds of each step, {middle:.4g} removed</h2>",
        f"<p>{escape(TIMES)}</p>",
        f'<p class="legend">{legend}</p>',
        f'<ul class="bars">{items}</ul>',
        f"<details><summary>Every setting</summary>{html_table(*times_table(study))}"
        f"{html_table(*schedules_table(study))}</details>",
    ]
