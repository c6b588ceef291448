"""The rows as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import timm
import torch
import torch_pruning as tp

from benchmarks.imagenet.rows import DENSE, ON_DEMAND, REMOVALS, STEPS, Removal, Row, of

_NORMAL = 1.959964


def report(rows: Mapping[tuple[Removal, str], Row], command: str) -> str:
    """Top-1 and agreement of every method at every removal."""
    dense = rows[Removal("none", 0.0), DENSE]
    commits = sorted({row.commit for row in rows.values()})
    parts = [
        "# EfficientNet-Lite0 on ImageNet, pruned without fine-tuning",
        f"`{command}` (commit {', '.join(commits)}; torch {torch.__version__}, torch-pruning {tp.__version__}, "
        f"timm {timm.__version__})",
        "The published weights; 1,000 ImageNet images, one a class. Those of every second class, without labels, are "
        f"what GRAIL and `calibrated` look at; the other {len(dense.right)} judge. They are training images of the "
        f"network (dense top-1 {_percent(dense.right)}), so that the share on which a pruned network *agrees* with the "
        "dense one counts as much. L1 importance, one ratio for all groups, residual streams included unless it says "
        "*expanded widths*: then only the channels within inverted residual blocks. Every method keeps the channels of "
        "`discard`, its twin, but `paper`, whose importance sees the network with batch-norm folded in. In %; a figure "
        f"near 50 has a 95 % interval of ± {_half(len(dense.right)):.1f}, ± {_half(len(dense.right), 0.1):.1f} near 10 "
        f"or 90. Nothing was chosen on the images that judge. *descent*: {STEPS:,} steps of all layers together behind "
        "the last refit. Seconds of one thread of the processor, or on the clock where a GPU is named.",
        _lines(rows, dense),
    ]
    wanted = {removal: [method for method in of(removal) if method not in ON_DEMAND] for removal in REMOVALS}
    missing = [str(removal) for removal, methods in wanted.items() if any((removal, m) not in rows for m in methods)]
    if missing:
        parts.append(f"Not measured, or not with every method: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _lines(rows: Mapping[tuple[Removal, str], Row], dense: Row) -> str:
    lines = [
        "| removed | MACs left | parameters left | method | top-1 | agreement | seconds |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    order = sorted(REMOVALS, key=lambda removal: (removal.groups, removal.macs, abs(removal.amount - removal.macs)))
    for removal in order:
        found = [rows[removal, method] for method in of(removal) if (removal, method) in rows]
        best = max((row.right.sum() for row in found), default=0)
        before = ""
        for index, row in enumerate(found):
            sizes = f"{row.macs / dense.macs:.0%} | {row.params / dense.params:.0%}"
            ratio = f" ({row.ratio:.1%} of the channels)" if removal.macs else ""
            start = f"| {'' if index else f'{removal}{ratio}'} | {' | ' if sizes == before else sizes} |"
            before = sizes
            top1 = f"**{_percent(row.right)}**" if row.right.sum() == best else _percent(row.right)
            lines.append(f"{start} {_shown(row.method)} | {top1} | {_percent(row.agrees)} | {_seconds(row)} |")
    return "\n".join(lines)


def _shown(method: str) -> str:
    name, comma, rest = method.partition(", ")
    return f"`{name}`{comma}{rest}" if name in ("data-free", "calibrated") else method


def _seconds(row: Row) -> str:
    return f"{row.seconds:.0f} on {row.device}" if row.device else f"{row.processor:.0f}"


def _percent(hits: np.ndarray) -> str:
    return f"{100 * hits.mean():.1f}"


def _half(count: int, share: float = 0.5) -> float:
    """Half the width of the 95 % interval of a share, in points."""
    return 100 * _NORMAL * (share * (1 - share) / count) ** 0.5
