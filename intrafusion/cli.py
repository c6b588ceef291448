"""The command ``intrafusion``."""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
_SPEAKING = 1.0  # seconds that the first process of a machine has to say what is wrong
_log = logging.getLogger(__name__)
Command = Callable[[argparse.Namespace], int]

_EXAMPLES = """\
examples:
  intrafusion run digits
      trains a small network on scikit-learn's digits, prunes it with and without fusion;
      under a minute, nothing is downloaded
  intrafusion run cifar10_resnet20 --set data.root=/data/cifar10
      the same on CIFAR-10 images and a trained ResNet-20
  intrafusion run my_recipe.yaml --set prune.ratios=0.3,0.5 --set fusion.merge=barycentre --output runs/mine
  intrafusion run digits --set prune.ratios=null --set prune.target.macs=0.4
      as many channels go as leave 40 % of the multiply-accumulates
  accelerate launch -m intrafusion.cli run imagenet_resnet50 --set data.root=/data/imagenet
      every network is trained and evaluated by several GPUs together

An interrupted run continues where it stopped when the same command is given again.
"""
_INSPECT_EXAMPLES = """\
examples:
  intrafusion inspect digits
  intrafusion inspect cifar10_resnet20 --set data.root=/data/cifar10 --set prune.target.macs=0.5 --set prune.ratios=null
  intrafusion inspect digits --json | jq '.cuts[].groups[] | select(.outcome != "fused")'

Nothing is trained and nothing is written: where the recipe has no weights file, the weights are random, which changes
no width unless prune.global is on. Layers are not refitted.
"""
_SWEEP_EXAMPLES = """\
examples:
  intrafusion sweep digits --grid fusion=paper,data-free --grid prune.importance=l1,l2,random
      six runs, their cells computed side by side in processes of this machine
  intrafusion sweep cifar10_vgg11_bn_groups --set data.root=/data/cifar10
      the grid of the recipe's own section `sweep`: the paper's table, on our weights
  intrafusion sweep digits --grid prune.ratios=[0.5],[0.7] --executor ray
      on a Ray cluster (RAY_ADDRESS), which must see the same files; one is started here if there is none

Every point of the grid has a folder of its own inside the output folder. A sweep that is interrupted, or in which
something failed, continues where it stopped when the same command is given again. Each cell is computed on `threads`
threads of the recipe, 1 if it names none, so that the numbers do not depend on the workers.
"""
_LANDSCAPE_EXAMPLES = """\
examples:
  intrafusion landscape first.safetensors second.safetensors digits --output runs/landscape
  intrafusion landscape a.safetensors b.safetensors cifar10_resnet20 --set data.root=/data/cifar10 \\
      --third c.safetensors --split test --output runs/landscape
      with a picture of the plane through the three

The files are state dicts of the recipe's network (dense.safetensors of a run is one); its own weights are not used and
nothing is trained. B, and C, are aligned to A: their channels are put in its order.
"""
_REPORT_EXAMPLES = """\
examples:
  intrafusion report runs/demo
  intrafusion report runs/sweep      while the sweep is still going on, or copied from another machine

Nothing is computed: neither the network nor the images are needed.
"""
_SCHEMA_EXAMPLES = """\
example:
  intrafusion schema > recipe.schema.json
      and in the first line of a recipe: # yaml-language-server: $schema=recipe.schema.json
"""
_EXIT_CODES = "\nexit codes: 0 done, 1 failed, 2 the recipe or the command line is wrong, 130 interrupted\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; errors are text on stderr, never a traceback by default."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "command"):
        parser.print_help()
        return USAGE
    _set_up_messages(options.quiet)
    try:
        _check_launch(options)
        return options.command(options)
    except KeyboardInterrupt:
        if _launch()[0] == 0:
            print("\ninterrupted; give the same command again to continue", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        return _report_error(error, options.debug)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package by name, from the wheel or from the checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "recipes", here.parent / "recipes"):
        found = sorted(folder.glob("*.yaml"))
        if found:
            return {path.stem: path for path in found}
    return {}


def find_recipe(name: str) -> Path:
    """A recipe by path, or by the bare name of a shipped one (``digits`` or ``digits.yaml``).

    Raises:
        UsageError: there is neither; the message lists the shipped ones.
    """
    from intrafusion.lab.errors import UsageError

    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    bare = path.name.removesuffix(".yaml")
    if str(path.parent) == "." and bare in shipped:
        return shipped[bare]
    close = difflib.get_close_matches(bare, shipped, n=1)
    hint = f" Did you mean the shipped recipe '{close[0]}'?" if close else ""
    raise UsageError(f"no recipe at '{name}'.{hint} Shipped: {', '.join(shipped) or 'none'}")


def _parser() -> argparse.ArgumentParser:
    from intrafusion import __version__

    parser = argparse.ArgumentParser(
        prog="intrafusion",
        description="Prune networks and keep their accuracy: channels are fused, not discarded.",
        epilog=_EXAMPLES + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"intrafusion {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    shipped = f"\nshipped recipes: {', '.join(shipped_recipes()) or 'none'}\n"

    def command(name: str, function: Command, description: str, examples: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=description[0].lower() + description[1:].rstrip("."),
            description=description,
            epilog=examples + _EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--debug", action="store_true", help="show where in the code an error comes from")
        added.set_defaults(command=function, quiet=False)
        return added

    run = command("run", _run, "Do what a recipe says and write a report.", _EXAMPLES + shipped)
    run.add_argument("--output", metavar="DIR", help="folder of the run, instead of the recipe's")
    run.add_argument("--fresh", action="store_true", help="compute everything again, even what is finished")
    run.add_argument("--quiet", action="store_true", help="no progress, only the table")
    sweep = command(
        "sweep", _sweep, "Run a recipe for every combination of a grid, side by side.", _SWEEP_EXAMPLES + shipped
    )
    sweep.add_argument("--output", metavar="DIR", help="folder of the sweep, instead of the recipe's")
    sweep.add_argument(
        "--grid", metavar="KEY=VALUE,VALUE", action="append", default=[],
        help="values of a key, instead of the recipe's section `sweep`; may be given many times",
    )  # fmt: skip
    sweep.add_argument("--executor", choices=("local", "ray"), default="local", help="where cells are computed")
    sweep.add_argument(
        "--workers", type=_count, metavar="N", help="how many at a time; default: one for each GPU or core"
    )
    sweep.add_argument("--fresh", action="store_true", help="compute everything again, even what is finished")
    sweep.add_argument("--quiet", action="store_true", help="no progress, only the table")
    report = command("report", _report, "Write the report of a run or a sweep again from its folder.", _REPORT_EXAMPLES)
    report.add_argument("folder", metavar="DIR", type=Path, help="folder of a run or a sweep")
    inspect = command(
        "inspect", _inspect, "Show what a recipe cuts and what it fuses, group by group.", _INSPECT_EXAMPLES + shipped
    )
    landscape = command(
        "landscape", _landscape, "Measure and draw the loss between trained networks.", _LANDSCAPE_EXAMPLES + shipped
    )
    landscape.add_argument("first", metavar="A", type=Path, help="safetensors file of a network")
    landscape.add_argument("second", metavar="B", type=Path, help="safetensors file of another")
    landscape.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of figures and numbers")
    landscape.add_argument("--third", metavar="C", type=Path, help="a third one: draw the plane through all of them")
    landscape.add_argument(
        "--split", choices=("validation", "test"), default="validation", help="whose images score the networks"
    )
    landscape.add_argument("--steps", type=_points, default=11, metavar="N", help="points along each line")
    landscape.add_argument(
        "--resolution", type=_points, default=11, metavar="N", help="points along a side of the plane"
    )
    landscape.add_argument(
        "--images", type=_images, default=250, metavar="N",
        help="training images that batch-norm statistics are re-estimated on, for a third line and the plane; 0: never",
    )  # fmt: skip
    for added in (run, sweep, inspect, landscape):
        added.add_argument("recipe", metavar="RECIPE", help="path of a YAML file, or the name of a shipped recipe")
        added.add_argument(
            "--set", metavar="KEY=VALUE", action="append", default=[], dest="assignments",
            help="change a key of the recipe, as in prune.seed=1; may be given many times",
        )  # fmt: skip
    recipes = command("recipes", _recipes, "List the shipped recipes.")
    for added in (run, sweep, report, inspect, landscape, recipes):
        added.add_argument("--json", action="store_true", help="print JSON instead of text")
    command("schema", _schema, "Print the JSON schema of a recipe, for editors.", _SCHEMA_EXAMPLES)
    return parser


def _run(options: argparse.Namespace) -> int:
    path = find_recipe(options.recipe)
    from intrafusion.lab.recipe import load_recipe
    from intrafusion.lab.run import run
    from intrafusion.processes import open_processes

    recipe = load_recipe(path, _assignments(options))
    if recipe.sweep:
        _log.info("the grid of the section 'sweep' is for: intrafusion sweep %s", options.recipe)
    with open_processes(cpu=recipe.device == "cpu") as processes:
        finished = run(recipe, fresh=options.fresh, progress=not options.quiet, processes=processes)
        return _finish(finished, options) if processes.is_main else OK


def _sweep(options: argparse.Namespace) -> int:
    path = find_recipe(options.recipe)
    from intrafusion.lab.executors import make_executor
    from intrafusion.lab.grid import parse_grid
    from intrafusion.lab.recipe import read_points, read_text
    from intrafusion.lab.sweep import sweep

    points = read_points(read_text(path), str(path), _assignments(options), parse_grid(options.grid))
    executor = make_executor(options.executor, [point.recipe for point in points], options.workers)
    swept = sweep(points, executor, fresh=options.fresh, progress=not options.quiet)
    for failure in swept.failed:
        print(f"failed: {failure}", file=sys.stderr)
    return _finish(swept, options) or (FAILED if swept.failed else OK)


def _report(options: argparse.Namespace) -> int:
    from intrafusion.lab.sweep import report_again

    return _finish(report_again(options.folder), options)


def _assignments(options: argparse.Namespace) -> list[str]:
    output = [] if options.output is None else [f"output={options.output}"]
    return [*options.assignments, *output]


def _finish(finished: Any, options: argparse.Namespace) -> int:
    report = str(finished.report) if finished.report.is_file() else None  # none of a sweep that measured nothing
    if options.json:
        rows = []
        if report is not None:
            with (finished.folder / "results.csv").open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        facts = {"folder": str(finished.folder), "report": report, "computed": finished.computed}
        print(json.dumps({**facts, "failed": getattr(finished, "failed", ()), "rows": rows}, indent=2))
    else:
        print(finished.table if report is None else f"{finished.table}\n\nreport: {report}")
    return OK


def _inspect(options: argparse.Namespace) -> int:
    path = find_recipe(options.recipe)
    from intrafusion.lab.inspection import inspect
    from intrafusion.lab.recipe import load_recipe

    found = inspect(load_recipe(path, options.assignments), progress=not options.json)
    print(json.dumps(asdict(found), indent=2) if options.json else found)
    return OK


def _landscape(options: argparse.Namespace) -> int:
    path = find_recipe(options.recipe)
    from intrafusion.lab.landscape_report import REPORT, LandscapeSettings, measure_landscape, write_landscape
    from intrafusion.lab.recipe import load_recipe

    recipe = load_recipe(path, options.assignments)
    files = tuple(file for file in (options.first, options.second, options.third) if file is not None)
    settings = LandscapeSettings(
        split=options.split, steps=options.steps, resolution=options.resolution, images=options.images
    )
    found = measure_landscape(recipe, files, settings, progress=not options.json)
    write_landscape(found, options.output)
    print(json.dumps(found.plain(), indent=2) if options.json else f"{found}\n\nreport: {options.output / REPORT}")
    return OK


def _recipes(options: argparse.Namespace) -> int:
    shipped = shipped_recipes()
    found = [{"name": name, "summary": _summary(path), "path": str(path)} for name, path in shipped.items()]
    width = max((len(name) for name in shipped), default=0)
    lines = [f"{entry['name']:{width}}  {entry['summary']}" for entry in found]
    print(json.dumps(found, indent=2) if options.json else "\n".join(lines))
    return OK


def _summary(path: Path) -> str:
    """The first comment of a recipe."""
    return path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")


def _schema(_: argparse.Namespace) -> int:
    from intrafusion.lab.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
    return OK


def _at_least(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of {least} or more")
        return int(text)

    return count


_images, _count, _points = map(_at_least, (0, 1, 2))


def _check_launch(options: argparse.Namespace) -> None:
    from intrafusion.lab.errors import UsageError

    if _launch()[1] == 1 or options.command is _run:
        return
    if options.command is _sweep:
        raise UsageError("a sweep runs its own processes: start it without accelerate launch or torchrun")
    raise UsageError("only a run uses several processes: start this without accelerate launch or torchrun")


def _launch() -> tuple[int, int]:
    """Which process this is of how many that were launched together; the usual case does not wait for torch."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    from intrafusion.processes import launch

    return launch()


def _report_error(error: Exception, debug: bool) -> int:
    from intrafusion import FusionError
    from intrafusion.lab.errors import LabError, UsageError
    from intrafusion.processes import ProcessError

    if debug:
        traceback.print_exc()
    known = isinstance(error, LabError | FusionError | ProcessError | OSError)
    text = str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)"
    process, count = _launch()
    if known and process and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_SPEAKING)  # when the first of its processes ends, a launcher ends the others
    else:
        where = f"process {process} of {count}: " if process else ""
        print(f"intrafusion: error: {where}{text}", file=sys.stderr)
    return USAGE if isinstance(error, UsageError) else FAILED


def _set_up_messages(quiet: bool) -> None:
    """Log lines and warnings go to stderr as plain sentences, above a progress bar if there is one."""
    handler = _Lines()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("intrafusion")
    logger.handlers = [handler]
    logger.setLevel(logging.ERROR if _launch()[0] else logging.WARNING if quiet else logging.INFO)
    logger.propagate = False

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        logger.warning("warning: %s", message)

    warnings.showwarning = show


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
