"""Our methods and their rivals: the same checkpoints, channels, images and sizes, no fine-tuning.

    INTRAFUSION_DATA=<folder> python -m benchmarks.rivals --quick         # ResNet-20, half of the channels: minutes
    INTRAFUSION_DATA=<folder> python -m benchmarks.rivals                 # everything: days on 2 cores; it resumes
    INTRAFUSION_DATA=<folder> python -m benchmarks.rivals --shard 1/2     # half of it; 2/2 in another process
    INTRAFUSION_DATA=<folder> python -m benchmarks.rivals --groups        # each group alone
    python -m benchmarks.rivals --model torchvision:resnet18 --weights pretrained --folder <folder> --size 224

A folder of your own holds train/<class>/* and val/<class>/* (or test/); labels are used for the accuracy, and for
Taylor importance. A finished cell is kept in --results and not computed again; the report covers all that is there.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import paper_parity
from benchmarks.rivals import cells, figure, rows, table
from benchmarks.rivals.cells import Network
from benchmarks.rivals.methods import METHODS
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.data.sources import image_folder
from intrafusion.lab.errors import LabError
from intrafusion.lab.files import write_atomic
from intrafusion.lab.models import build_model
from intrafusion.lab.pretrained import find_pretrained
from intrafusion.lab.weights import digest, load_weights_

DEFAULT_IMPORTANCES = tuple(name for name in cells.IMPORTANCES if name != cells.LIKE_L2)
_POOL = 5
"""Of one's own training images, so many times --images are read."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark as the arguments say, then write the report and the figure and print the report.

    Raises SystemExit with a message for arguments that do not fit together or to the data.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        if not arguments.report_only:
            _run(arguments)
        command = shlex.join(["python", "-m", "benchmarks.rivals", *(sys.argv[1:] if argv is None else argv)])
        _report(arguments, command)
    except LabError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rivals", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=os.environ.get("INTRAFUSION_DATA"), help="folder with CIFAR-10 and checkpoints")
    add("--network", choices=paper_parity.NETWORKS, action="append", help="only this one (may be repeated)")
    add("--importance", choices=cells.IMPORTANCES, action="append",
        help=f"only this one (may be repeated; default: all but {cells.LIKE_L2}, equal to L2 here)")  # fmt: skip
    add("--ratio", type=_ratio, action="append", help="only this share of channels (may be repeated)")
    add("--method", choices=METHODS, action="append", help="only this one (may be repeated)")
    add("--seeds", type=_positive, help="how many (default 3; 1 with --quick, --groups and --model)")
    add("--images", type=_positive, default=1000, help="how many training images (default %(default)s)")
    add("--quick", action="store_true", help="ResNet-20, L1, half of the channels, one seed")
    add("--groups", action="store_true", help="each group alone, discard against data-free, L1")
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help="the I-th of N parts of the cells")
    add("--report-only", action="store_true", help="compute nothing, only report on what is there")
    add("--results", type=Path, default=Path("runs/rivals"), help="folder (default %(default)s)")
    own = parser.add_argument_group("your own network (L1 and the ratios 0.3, 0.5, 0.7, unless you name others)")
    own.add_argument("--model", help="torchvision:NAME, timm:NAME or package.module:factory")
    own.add_argument("--weights", help="a safetensors file, or 'pretrained' (the library's, if they are in its cache)")
    own.add_argument("--folder", type=Path, help="folder with train/<class>/ and val/<class>/ or test/<class>/")
    own.add_argument("--size", type=_positive, help="side of the images in pixels; the files' own if not given")
    own.add_argument("--test-images", type=_positive, help="evaluate on so many of the images only")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    if (arguments.model is None) != (arguments.folder is None):
        raise LabError("--model and --folder go together")
    few = arguments.quick or arguments.groups or arguments.model is not None
    importances = arguments.importance or (["L1"] if few else DEFAULT_IMPORTANCES)
    ratios = arguments.ratio or ([0.5] if arguments.quick else cells.FEW_RATIOS if arguments.model else None)
    methods = arguments.method or (["discard", "data-free"] if arguments.groups else list(METHODS))
    networks = {network.name: network for network in _networks(arguments)}
    groups = {name: network.roots or [] for name, network in networks.items()} if arguments.groups else None
    if groups and not all(groups.values()):
        raise LabError("--groups knows the groups of the benchmark's own networks only")
    seeds = range(arguments.seeds or (1 if few else 3))
    index, count = arguments.shard
    target = arguments.results / f"cells-{index}-of-{count}.jsonl"
    wanted = cells.grid(list(networks), importances, ratios, methods, seeds, arguments.images, groups)
    done = rows.finished(rows.read(arguments.results).values())
    todo = [cell for cell in wanted if cells.in_shard(cell, index, count) and cell not in done]
    with cells.shared_inputs() as shared, tqdm(todo, unit="cell", disable=None) as bar:
        for cell in bar:
            bar.set_description(str(cell))
            start = time.perf_counter()
            row = cells.measure(networks[cell.network], cell, shared)
            rows.append(target, row)
            value = row.error or f"{100 * (1 - row.wrong.mean()):.2f} %"
            bar.write(f"{cell}: {value} ({row.seconds:.1f} s of {time.perf_counter() - start:.1f} s)")


def _report(arguments: argparse.Namespace, command: str) -> None:
    results = table.Results.of(rows.read(arguments.results).values(), arguments.images)
    text = table.report(results, command, arguments.images)
    for kind, content in (figure.draw(results) or {}).items():
        write_atomic(arguments.results / f"accuracy.{kind}", content)
    write_atomic(arguments.results / "report.md", text)
    print(text)


def _networks(arguments: argparse.Namespace) -> list[Network]:
    if arguments.model:
        return [_own_network(arguments)]
    if arguments.data is None:
        raise LabError("name the folder with the data: --data, or the variable INTRAFUSION_DATA")
    root = Path(arguments.data)
    data = paper_parity.images(root)
    names = arguments.network or (["ResNet-20"] if arguments.quick else list(paper_parity.NETWORKS))
    return [Network(name, *paper_parity.load(name, root), data) for name in names]


def _own_network(arguments: argparse.Namespace) -> Network:
    """The network and the images that the arguments name; its name holds a digest of the weights and test images.

    Raises LabError if they do not fit together.
    """
    data = image_folder(
        arguments.folder, size=arguments.size, test_images=arguments.test_images,
        train_images=_POOL * arguments.images,
    )  # fmt: skip
    classes = len(data.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(arguments.model, classes).eval()
    if arguments.weights == "pretrained":
        found = find_pretrained(arguments.model)
        model = found.load(found.classes)
    elif arguments.weights:
        try:
            load_weights_(model, Path(arguments.weights))
        except LabError as error:
            raise LabError(f"{error}\n({_class_hint(arguments.folder, classes)})") from None
    else:
        tqdm.write(f"{arguments.model} has random weights: name a file with --weights, or 'pretrained'")
    _check_fits(model, data, arguments)
    mark = digest(model)[:4] + data.digest("test")[:4]
    return Network(f"{arguments.model} ({mark})", model, None, data)


def _check_fits(model: torch.nn.Module, data: Dataset, arguments: argparse.Namespace) -> None:
    shape, size = "x".join(map(str, data.shape)), data.shape[-1]
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(1, *data.shape)).shape[-1]
    except RuntimeError as error:
        raise LabError(
            f"{arguments.model} does not accept images of {shape} ({error}): try --size {max(224, size)}"
        ) from None
    if outputs != len(data.classes):
        raise LabError(f"{arguments.model} has {outputs} outputs: {_class_hint(arguments.folder, len(data.classes))}")


def _class_hint(folder: Path, classes: int) -> str:
    return (
        f"{folder} has {classes} class folders, and the network needs one output for each, in alphabetical order: "
        "give a folder with all classes of the network, or --weights of a network that was trained on these"
    )


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError("must lie between 0 and 1")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError("must be I/N with 1 <= I <= N, such as 1/2")
    return index, count


if __name__ == "__main__":
    main()
