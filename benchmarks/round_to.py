"""Do widths that are multiples of 4, 8, 16 or 32 pay? Latency of pruned networks, with `round_to` and without.

    python -m benchmarks.round_to               # about half an hour on one core; writes benchmarks/results/round_to.*
    python -m benchmarks.round_to --network cifar_resnet20

`round_to` takes more channels away, so a rounded network is faster in any case. It is therefore compared with two
networks of any widths: the one of the same ratio, and its twin, pruned by the ratio that leaves as many
multiply-accumulates. All networks of a ratio are timed in turns, the twins one after the other, and the ratio of
their times is taken within a turn. On a CPU it is the processor time of one thread, which does not count the pauses
that other programs cause; on a GPU it is the time on the clock. Weights are random: latency does not depend on them.
Rows of an interrupted call stay in round_to.jsonl and are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer as default_timer
from tqdm import tqdm

from intrafusion.lab.measure import count_macs, device_name
from intrafusion.lab.models import build_model
from intrafusion.lab.pruning import ignored_layers
from intrafusion.lab.reports.tables import markdown_table

RESULTS = Path(__file__).parent / "results"
NETWORKS = {
    "cifar_resnet20": (32, ("conv1", "layer*.conv2", "linear")),
    "cifar_vgg11_bn": (32, ("classifier",)),
    "torchvision:mobilenet_v2": (224, ("classifier.1",)),
    "torchvision:resnet50": (224, ("fc",)),
}
"""Names with the side of their images and the layers that are left alone."""
RATIOS, MULTIPLES, BATCHES = (0.3, 0.45, 0.6), (4, 8, 16, 32), (1, 64)
FORMATS = {
    "fp32": (torch.float32, torch.contiguous_format),
    "bf16, channels last": (torch.bfloat16, torch.channels_last),
}
_GRID = 100  # ratios that a twin is looked for at
_BLOCK = 0.05  # seconds that one time is measured for, at least
Key = tuple[int, bool]
"""The multiple (0: any widths), and whether it is the twin of the network with it."""


@dataclass(frozen=True)
class Row:
    """A network pruned by a ratio with `round_to`, against those of any widths.

    Attributes:
        odd: share of the layers' widths that are no multiples without rounding.
        macs: of the rounded network, as a share of those of the same ratio.
        twin_macs: the same for the network that it is compared with at equal size.
        times, twin_times: its latency as a share of that of the same ratio, and of the twin's; one for each turn.
        milliseconds: median latency of the network of the same ratio.
    """

    device: str
    network: str
    format: str
    batch: int
    ratio: float
    round_to: int
    odd: float
    macs: float
    twin_macs: float
    times: tuple[float, ...]
    twin_times: tuple[float, ...]
    milliseconds: float


class Cuts:
    """Pruned copies of one network, and how large they are."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.dense = build_model(name, 10).eval()
        side, self.ignored = NETWORKS[name]
        self.image = torch.zeros(1, 3, side, side, device="meta")
        self.macs = cache(lambda ratio, round_to=None: count_macs(self.prune(ratio, round_to).to("meta"), self.image))

    def prune(self, ratio: float, round_to: int | None = None) -> nn.Module:
        """By torch-pruning, whose widths are ours; a small image is enough to find the groups."""
        model = copy.deepcopy(self.dense)
        ignored, small = ignored_layers(model, self.ignored), torch.zeros(1, 3, 32, 32)
        importance = tp.importance.GroupMagnitudeImportance(p=1)
        pruner = tp.pruner.BasePruner(
            model, small, importance, pruning_ratio=ratio, round_to=round_to, ignored_layers=ignored
        )
        pruner.step()
        return model.eval()

    def twin(self, macs: int) -> float:
        """The ratio that leaves as many multiply-accumulates, of any widths."""
        after = bisect_left(range(_GRID), -macs, key=lambda step: -self.macs(step / _GRID))
        near = (max(after - 1, 0) / _GRID, min(after, _GRID - 1) / _GRID)
        return min(near, key=lambda ratio: abs(self.macs(ratio) - macs))


def measure(cuts: Cuts, name: str, ratio: float, format: str, batch: int, turns: int) -> Iterator[Row]:
    """One row for each multiple that changes the network; all are timed in the same turns."""
    free = cuts.prune(ratio)
    rounded = {multiple: cuts.prune(ratio, multiple) for multiple in MULTIPLES}
    changed = {multiple: model for multiple, model in rounded.items() if widths(model) != widths(free)}
    twins = {multiple: cuts.twin(cuts.macs(ratio, multiple)) for multiple in changed}
    networks: dict[Key, nn.Module] = {(0, False): free}
    for multiple, model in changed.items():
        networks |= {(multiple, False): model, (multiple, True): cuts.prune(twins[multiple])}
    dtype, memory = FORMATS[format]
    images = torch.randn(batch, *cuts.image.shape[1:]).to(device=_device(), dtype=dtype, memory_format=memory)
    for model in networks.values():
        model.to(device=_device(), dtype=dtype, memory_format=memory)
    times = in_turns({key: timing(model, images) for key, model in networks.items()}, turns)
    for multiple in changed:
        own, twin, plain = (times[key] for key in ((multiple, False), (multiple, True), (0, False)))
        yield Row(
            device_name(images.device), name, format, batch, ratio, multiple,
            odd=statistics.fmean(width % multiple > 0 for width in widths(free)),
            macs=cuts.macs(ratio, multiple) / cuts.macs(ratio),
            twin_macs=cuts.macs(twins[multiple]) / cuts.macs(ratio),
            times=tuple(a / b for a, b in zip(own, plain, strict=True)),
            twin_times=tuple(a / b for a, b in zip(own, twin, strict=True)),
            milliseconds=1e3 * statistics.median(plain),
        )  # fmt: skip


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def widths(model: nn.Module) -> list[int]:
    """Of every convolution and linear layer but the last."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return [module.weight.shape[0] for module in layers[:-1]]


def timing(model: nn.Module, images: Tensor) -> Callable[[], float]:
    """What gives the seconds of one forward pass, from as many as take a twentieth of a second."""
    clock = default_timer if images.is_cuda else time.process_time
    timer = Timer("model(images)", timer=clock, globals={"model": model, "images": images}, num_threads=1)
    with torch.inference_mode():
        timer.timeit(1)  # the first pass makes what later ones reuse
        number = math.ceil(_BLOCK / max(timer.timeit(1).mean, 1e-6))

    def seconds() -> float:
        with torch.inference_mode():
            return timer.timeit(number).mean

    return seconds


def in_turns(timings: Mapping[Key, Callable[[], float]], turns: int) -> dict[Key, list[float]]:
    """Every timing once a turn; the order is reversed from turn to turn, so that a drift favours none."""
    times = {key: [] for key in timings}
    for turn in range(turns):
        for key in list(timings)[:: -1 if turn % 2 else 1]:
            times[key].append(timings[key]())
    return times


def spread(values: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def overview(rows: Sequence[Row]) -> str:
    """Time against the twin of the same size: the median over the ratios and turns, and their quartiles."""
    header = ["network", "format", "batch", *(f"round_to {multiple}" for multiple in MULTIPLES)]
    lines = []
    for place in dict.fromkeys((row.network, row.format, row.batch) for row in rows):
        own = [row for row in rows if (row.network, row.format, row.batch) == place]
        found = [[time for row in own if row.round_to == multiple for time in row.twin_times] for multiple in MULTIPLES]
        lines.append([*map(str, place), *(spread(times) if len(times) > 1 else "" for times in found)])
    return markdown_table(header, lines, "lrr" + "r" * len(MULTIPLES))


def every_row(rows: Sequence[Row]) -> str:
    """Every row, with the sizes."""
    header = ["network", "format", "batch", "removed", "round_to", "odd widths", "latency", "MACs", "time",
              "MACs against twin", "time against twin"]  # fmt: skip
    lines = [
        [
            row.network, row.format, str(row.batch), f"{row.ratio:.0%}", str(row.round_to), f"{row.odd:.0%}",
            f"{row.milliseconds:.3g} ms", f"{row.macs:.2f}", spread(row.times), f"{row.macs / row.twin_macs:.2f}",
            spread(row.twin_times),
        ]
        for row in rows
    ]  # fmt: skip
    return markdown_table(header, lines, "l" + "r" * (len(header) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--batch", type=int, choices=BATCHES, action="append", help="only this one")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    device = device_name(_device())
    chosen.output.mkdir(parents=True, exist_ok=True)
    kept = chosen.output / "round_to.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    done = {(row.device, row.network, row.format, row.batch, row.ratio) for row in rows}
    for name in chosen.network or NETWORKS:
        cuts = Cuts(name)
        for place in tqdm(list(product(FORMATS, chosen.batch or BATCHES, RATIOS)), desc=name):
            format, batch, ratio = place
            if (device, name, *place) in done:
                continue
            found = list(measure(cuts, name, ratio, format, batch, chosen.turns))
            rows += found
            with kept.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(row)) + "\n" for row in found)
    order = [list(places) for places in (NETWORKS, FORMATS)]
    rows.sort(key=lambda row: (order[0].index(row.network), order[1].index(row.format), row.batch, row.ratio))
    parts = ["# Latency of pruned networks with `round_to` and without", "`python -m benchmarks.round_to`: " + _NOTE]
    for device in dict.fromkeys(row.device for row in rows):
        own = [row for row in rows if row.device == device]
        parts += [
            f"## {device}: time against the twin of the same size",
            overview(own),
            "### Every row",
            every_row(own),
        ]
    (chosen.output / "round_to.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(overview(rows))


_NOTE = (
    "L1 importance, every group but the classifier, random weights, one thread. `time` and `MACs` are those of the "
    "rounded network as a share of the network of the same ratio without `round_to`, whose latency is given; "
    "`against twin`: as a share of the network without `round_to` that has as many multiply-accumulates, so below 1 "
    "the widths themselves pay. Median of the turns, quartiles in brackets; odd widths: the share of layers whose "
    f"width is no multiple without rounding. torch {torch.__version__}."
)


if __name__ == "__main__":
    main()
