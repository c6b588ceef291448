"""The HTML report of a run: one file that needs nothing else, for a screen of any width, light or dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from intrafusion.lab.measure import LATENCY_BATCHES
from intrafusion.lab.pruning import ALL
from intrafusion.lab.recipe.loader import to_yaml
from intrafusion.lab.reports.contents import (
    command,
    measurements,
    networks_note,
    published_note,
    rounding_note,
    shown_skipped,
    si,
    table,
    timing_note,
    verdict,
)
from intrafusion.lab.reports.finetuned import METHODS, finetuned, finetuned_noise, finetuned_note, finetuned_table
from intrafusion.lab.reports.html_parts import LEGEND, document, fact_boxes, figure, html_table, plain
from intrafusion.lab.reports.svg import Point, accuracy_chart, plan_picture
from intrafusion.lab.results import Result
from intrafusion.lab.study import Pair, Study
from intrafusion.lab.training_record import noise_note, noise_table

_DRAWN_WIDTH = 64


def to_html(study: Study, folder: Path) -> str:
    """The whole page; every text from outside is escaped, and nothing is fetched."""
    parts = [
        f"<p>{escape(verdict(study))}</p>",
        *_what_was_run(study),
        *_dense(study),
        *_curves(study),
        *_finetuned(study),
        *_training(study),
        *_groups(study, folder),
        *_plan(study),
        *_only_selected(study),
        *_rows(study),
        *_skipped(study),
        f"<h2>The networks</h2><p>{plain(networks_note(study))}</p>" if networks_note(study) else "",
        f"<h2>Again</h2><pre>{escape(command(folder))}</pre>",
        "<p>Every number with its cell is in <code>results.jsonl</code> and <code>results.csv</code>.</p>",
    ]
    return document(study.recipe.title, parts)


def _what_was_run(study: Study) -> list[str]:
    recipe, versions = study.recipe, dict(study.environment)
    facts = {
        "importance": recipe.prune.importance,
        "fusion": recipe.fusion_text(),
        "channels removed": ", ".join(f"{ratio:.4g}" for ratio in dict.fromkeys(pair.ratio for pair in study.pairs)),
        "groups": "all at once" if recipe.prune.groups == "all" else "each alone",
    }
    facts |= {name: versions.pop(name) for name in ("device", "threads") if name in versions}
    return [
        "<h2>What was run</h2>",
        "<p>Channels are ranked by the importance; <em>discard</em> and <em>fused</em> keep the same ones, have the "
        f"same shapes and are not fine-tuned{', but for the section on it' if recipe.finetune else ''}.</p>",
        fact_boxes(facts),
        f"<details><summary>The recipe with every setting</summary><pre>{escape(to_yaml(recipe))}</pre></details>",
        f"<details><summary>Versions</summary>{fact_boxes(versions)}</details>" if versions else "",
    ]


def _dense(study: Study) -> list[str]:
    dense = study.dense
    facts = {"accuracy": f"{dense.accuracy} ({dense.correct:,} of {dense.total:,})"}
    if dense.top5_accuracy is not None:
        facts["top 5"] = f"{dense.top5_accuracy} ({dense.top5:,} of {dense.total:,})"
    facts |= {"parameters": f"{dense.params:,}", "MACs": si(dense.macs), **measurements(dense)}
    return ["<h2>The dense network</h2>", fact_boxes(facts)]


def _curves(study: Study) -> list[str]:
    if not study.pairs:
        return []
    groups = list(dict.fromkeys(pair.group for pair in study.pairs))
    size = "figures large" if groups == [ALL] else "figures"
    parts = ["<h2>Accuracy, in % of the test images</h2>", LEGEND, f'<div class="{size}">']
    for group in groups:
        name = "Against channels removed" + ("" if group == ALL else f": {group}")
        parts.append(against_ratio(study.dense, [pair for pair in study.pairs if pair.group == group], name))
    costs = [study.dense, *(pair.fused for pair in study.pairs)]
    work = {result: (result.macs / 1e6, 0.0) for result in costs}
    parts.append(_against(study, work, "MACs (millions)", "Against multiply-accumulates of one image"))
    for batch in LATENCY_BATCHES:
        timed = {result: t for result in costs for t in result.latency if t.batch == batch}
        if len(timed) < len(costs):
            continue
        images = "one image" if batch == 1 else f"{batch} images"
        where = sorted({f"{t.device}, {t.threads} thread{'s' if t.threads > 1 else ''}" for t in timed.values()})
        caption = f"Against the latency of {images}: median and interquartile range on {' and '.join(where)}"
        times = {result: (1e3 * t.median, 1e3 * t.iqr) for result, t in timed.items()}
        parts.append(_against(study, times, f"milliseconds for {images}", caption))
    parts.append("</div>")
    parts.append(f'<p class="soft">{plain(timing_note(study))}</p>')
    return parts


def against_ratio(dense: Result, pairs: Sequence[Pair], name: str) -> str:
    """Accuracy of one group's, or the whole network's, pairs over the share of channels removed."""
    start = Point(0.0, dense.accuracy.percent, f"dense {dense.accuracy}")
    lines = {
        "discard": [_point(100 * pair.ratio, pair.discard) for pair in pairs],
        "fused": [_point(100 * pair.ratio, pair.fused) for pair in pairs],
    }
    told = "; ".join(f"{pair.ratio:.0%}: {pair.fused.accuracy} and {pair.discard.accuracy}" for pair in pairs)
    alt = f"Accuracy of the fused and the discarded network. {name}. {told}"
    chart = accuracy_chart(lines, start, alt=alt, x_label="channels removed (%)", x_top=100, joined=True)
    return figure(chart, name)


def _against(study: Study, costs: Mapping[Result, tuple[float, float]], label: str, caption: str) -> str:
    """Accuracy over what the dense and the fused networks cost, with its spread; a discarded one costs the same."""
    lines: dict[str, list[Point]] = {"discard": [], "fused": []}
    for pair in study.pairs:
        lines["discard"].append(_point(costs[pair.fused][0], pair.discard, costs[pair.fused][1]))
        lines["fused"].append(_point(costs[pair.fused][0], pair.fused, costs[pair.fused][1]))
    dense = study.dense
    start = Point(costs[dense][0], dense.accuracy.percent, f"dense {dense.accuracy}", costs[dense][1])
    alt = f"Accuracy of the fused and the discarded networks. {caption}. The figures are in the table of every row"
    joined = all(pair.group == ALL for pair in study.pairs)
    return figure(accuracy_chart(lines, start, alt=alt, x_label=label, joined=joined), caption)


def _finetuned(study: Study) -> list[str]:
    found = finetuned(study)
    if not found:
        return []
    parts = ["<h2>After fine-tuning</h2>", f"<p>{escape(finetuned_note(study))}</p>"]
    parts += [html_table(*finetuned_table(study)), LEGEND, '<div class="figures">']
    for tuned in found:
        curves = {method: list(enumerate(tuned.validation(method)))[1:] for method in METHODS}
        lines = {
            method: [Point(epoch, value, f"{method}, epoch {epoch}: {value:.2f} %") for epoch, value in curve]
            for method, curve in curves.items()
        }
        name = f"Validation accuracy, in %, over the epochs: {tuned.pair.label}"
        ends = ", ".join(f"{method} {curve[-1][1]:.2f} %" for method, curve in curves.items())
        chart = accuracy_chart(lines, None, alt=f"{name}. At the end: {ends}", x_label="epochs", joined=True)
        parts.append(figure(chart, name))
    note, rows = finetuned_noise(study)
    return [*parts, "</div>", *([f"<p>{escape(note)}</p>", html_table(*rows)] if note else [])]


def _training(study: Study) -> list[str]:
    noise = study.training and study.training.noise
    if not noise:
        return []
    heading = "<h2>Training of the dense network</h2>"
    return [heading, f"<p>{escape(noise_note(noise))}</p>", html_table(*noise_table({"": [noise]}))]


def _groups(study: Study, folder: Path) -> list[str]:
    at = f"{study.middle:.4g} removed"
    if study.recipe.prune.groups == "each":
        pairs = [pair for pair in study.pairs if pair.ratio == study.middle]
        bars = [_accuracy_bars(pair, study.dense.accuracy.percent) for pair in pairs]
        note = '<p class="soft">The dashed line is the dense network.</p>'
        return [f"<h2>Each group alone, {at}</h2>", LEGEND, note, _bars(bars)] if bars else []
    lines = study.middle_groups
    widest = max((line.before for line in lines), default=1)
    bars = [
        f'<li><span class="name"><code>{escape(line.name)}</code></span>'
        f"{_track('fused', line.after / widest, line.before / widest)}"
        f'<span class="value">{line.before} → {line.after} channels</span></li>'
        for line in lines
    ]
    note = '<p class="soft">The bar is what stays, the dashed line the width before.</p>'
    rounding = f"<p>{plain(rounding_note(study, folder))}</p>"
    return [f"<h2>Widths, {at}</h2>", note, _bars(bars), rounding] if bars else []


def _accuracy_bars(pair: Pair, dense: float) -> str:
    tracks = "".join(
        f'{_track(method, accuracy.percent / 100, dense / 100)}<span class="value">{accuracy}{gain}</span>'
        for method, accuracy, gain in (
            ("discard", pair.discard.accuracy, ""),
            ("fused", pair.fused.accuracy, f" ({pair.gain:+.2f})"),
        )
    )
    widths = [f"{line.before} → {line.after}" for line in pair.fused.groups if line.name == pair.group]
    width = f' <span class="soft">{widths[0]} channels</span>' if widths else ""
    return f'<li><span class="name"><code>{escape(pair.group)}</code>{width}</span>{tracks}</li>'


def _track(method: str, share: float, level: float) -> str:
    return (
        f'<span class="track"><span class="bar {method}" style="width:{share:.2%}"></span>'
        f'<span class="level" style="left:{level:.2%}"></span></span>'
    )


def _bars(rows: Iterable[str]) -> str:
    return f'<ul class="bars">{"".join(rows)}</ul>'


def _plan(study: Study) -> list[str]:
    """One group's plan: the one of the middle ratio whose width suits a picture best."""
    lines = [line for line in study.middle_groups if any(t != c for c, (t, _) in enumerate(line.plan))]
    if not lines:
        return []
    line = min(lines, key=lambda line: abs(line.before - _DRAWN_WIDTH))
    made: dict[int, list[str]] = {}
    for channel, (target, share) in enumerate(line.plan):
        if target != channel:
            made.setdefault(target, []).append(f"{channel}" + ("" if share > 0.995 else f" ({share:.0%})"))
    rows = [
        [str(target) if target >= 0 else "none", f"{target}, {', '.join(m)}" if target >= 0 else ", ".join(m)]
        for target, m in sorted(made.items())
    ]
    corrected = study.recipe.fusion.correct != "none"
    start = " The correction starts from this plan, then moves the weights of the merge to rebuild the group best."
    alt = f"Transport plan of {line.name}: {line.before} channels to {line.after}; the same as a table below"
    return [
        "<h2>Who is merged into whom</h2>",
        f"<p>The plan of <code>{escape(line.name)}</code> at {study.middle:.4g} removed: {line.before} channels, "
        f"{line.after} of which stay. A curve goes from each channel to the kept one that the plan gives most of it "
        f"to; grey where a channel stays itself, paler for a smaller part.{start if corrected else ''}</p>",
        figure(plan_picture(line.plan, alt), f"{line.name}, plan cost {line.cost:.4g}"),
        f"<details><summary>The same as a table</summary>{html_table(['kept channel', 'made of'], rows)}</details>",
    ]


def _only_selected(study: Study) -> list[str]:
    """Groups that fusion left to plain cutting, or fused with a remark."""
    if not study.pairs:
        return []
    none = study.recipe.fusion.merge == "selection"
    otherwise = (
        "Everything: the recipe asks for no fusion." if none else "Nothing: every group that was pruned was fused."
    )
    cut = _reasons(study, fused=False) or f"<p>{otherwise}</p>"
    remarks = _reasons(study, fused=True)
    return [
        "<h2>What was only selected, and why</h2>",
        cut,
        "<h3>Fused, with a remark</h3>" + remarks if remarks else "",
    ]


def _reasons(study: Study, *, fused: bool) -> str:
    """One row per group and reason, with the ratios at which it was given."""
    found: dict[tuple[str, str], list[str]] = {}
    for pair in study.pairs:
        for line in pair.fused.groups:
            if line.reason and fused == (line.merged not in ("selection", "untouched")):
                found.setdefault((line.name, line.reason), []).append(f"{pair.ratio:.4g}")
    rows = [[name, reason, ", ".join(dict.fromkeys(at))] for (name, reason), at in found.items()]
    return html_table(["group", "reason", "removed"], rows) if rows else ""


def _rows(study: Study) -> list[str]:
    header, rows = table(study, measured=True)
    note = published_note(study)
    return [
        "<h2>Every row</h2>",
        "<p>Each fused network beside the discarded one that keeps the same channels; gains are in points of "
        "accuracy.</p>",
        f"<p>{escape(note)}</p>" if note else "",
        html_table(header, rows),
    ]


def _skipped(study: Study) -> list[str]:
    if not study.skipped:
        return []
    entries = "".join(f"<li>{escape(entry)}</li>" for entry in shown_skipped(study))
    return [f"<h2>Test images left out</h2><ul>{entries}</ul>"]


def _point(x: float, result: Result, spread: float = 0.0) -> Point:
    at = (
        f"{result.cell.ratio:.0%} removed"
        if result.cell.group == ALL
        else f"{result.cell.group}, {result.cell.ratio:.0%}"
    )
    return Point(x, result.accuracy.percent, f"{result.cell.method}, {at}: {result.accuracy}", spread)
