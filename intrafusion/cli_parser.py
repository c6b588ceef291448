"""The options of the command ``intrafusion``, and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

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


def make_parser(commands: Mapping[str, Command], recipes: Iterable[str]) -> argparse.ArgumentParser:
    """The parser of ``intrafusion``: the options of a command have it as ``command``; ``recipes`` are shipped."""
    from intrafusion import __version__

    parser = argparse.ArgumentParser(
        prog="intrafusion",
        description="Prune networks and keep their accuracy: channels are fused, not discarded.",
        epilog=_EXAMPLES + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"intrafusion {__version__}")
    added_to = parser.add_subparsers(title="commands", metavar="COMMAND")
    shipped = f"\nshipped recipes: {', '.join(recipes) or 'none'}\n"

    def command(name: str, description: str, examples: str = "") -> argparse.ArgumentParser:
        added = added_to.add_parser(
            name,
            help=description[0].lower() + description[1:].rstrip("."),
            description=description,
            epilog=examples + _EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--debug", action="store_true", help="show where in the code an error comes from")
        added.set_defaults(command=commands[name], quiet=False)
        return added

    run = command("run", "Do what a recipe says and write a report.", _EXAMPLES + shipped)
    run.add_argument("--output", metavar="DIR", help="folder of the run, instead of the recipe's")
    run.add_argument("--fresh", action="store_true", help="compute everything again, even what is finished")
    run.add_argument("--quiet", action="store_true", help="no progress, only the table")
    sweep = command("sweep", "Run a recipe for every combination of a grid, side by side.", _SWEEP_EXAMPLES + shipped)
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
    report = command("report", "Write the report of a run or a sweep again from its folder.", _REPORT_EXAMPLES)
    report.add_argument("folder", metavar="DIR", type=Path, help="folder of a run or a sweep")
    inspect = command(
        "inspect", "Show what a recipe cuts and what it fuses, group by group.", _INSPECT_EXAMPLES + shipped
    )
    landscape = command(
        "landscape", "Measure and draw the loss between trained networks.", _LANDSCAPE_EXAMPLES + shipped
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
    listing = command("recipes", "List the shipped recipes.")
    for added in (run, sweep, report, inspect, landscape, listing):
        added.add_argument("--json", action="store_true", help="print JSON instead of text")
    command("schema", "Print the JSON schema of a recipe, for editors.", _SCHEMA_EXAMPLES)
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of {least} or more")
        return int(text)

    return count


_images, _count, _points = map(_at_least, (0, 1, 2))
