"""The command ``intrafusion``."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
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
        return options.command(options)
    except KeyboardInterrupt:
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
    inspect = command(
        "inspect", _inspect, "Show what a recipe cuts and what it fuses, group by group.", _INSPECT_EXAMPLES + shipped
    )
    for added in (run, inspect):
        added.add_argument("recipe", metavar="RECIPE", help="path of a YAML file, or the name of a shipped recipe")
        added.add_argument(
            "--set", metavar="KEY=VALUE", action="append", default=[], dest="assignments",
            help="change a key of the recipe, as in prune.seed=1; may be given many times",
        )  # fmt: skip
    recipes = command("recipes", _recipes, "List the shipped recipes.")
    for added in (inspect, recipes):
        added.add_argument("--json", action="store_true", help="print JSON instead of text")
    command("schema", _schema, "Print the JSON schema of a recipe, for editors.", _SCHEMA_EXAMPLES)
    return parser


def _run(options: argparse.Namespace) -> int:
    path = find_recipe(options.recipe)
    from intrafusion.lab.recipe import load_recipe
    from intrafusion.lab.run import run

    assignments = list(options.assignments)
    if options.output is not None:
        assignments.append(f"output={options.output}")
    finished = run(load_recipe(path, assignments), fresh=options.fresh, progress=not options.quiet)
    print(finished.table)
    print(f"\nreport: {finished.report}")
    return OK


def _inspect(options: argparse.Namespace) -> int:
    path = find_recipe(options.recipe)
    from intrafusion.lab.inspection import inspect
    from intrafusion.lab.recipe import load_recipe

    found = inspect(load_recipe(path, options.assignments), progress=not options.json)
    print(json.dumps(asdict(found), indent=2) if options.json else found)
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


def _report_error(error: Exception, debug: bool) -> int:
    from intrafusion import FusionError
    from intrafusion.lab.errors import LabError, UsageError

    if debug:
        traceback.print_exc()
    known = isinstance(error, LabError | FusionError | OSError)
    text = str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)"
    print(f"intrafusion: error: {text}", file=sys.stderr)
    return USAGE if isinstance(error, UsageError) else FAILED


def _set_up_messages(quiet: bool) -> None:
    """Log lines and warnings go to stderr as plain sentences, above a progress bar if there is one."""
    handler = _Lines()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("intrafusion")
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
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
