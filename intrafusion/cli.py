"""The command ``intrafusion``."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

_EXAMPLES = """\
examples:
  intrafusion run digits
      trains a small network on scikit-learn's digits, prunes it with and without fusion;
      under a minute, nothing is downloaded
  intrafusion run cifar10_resnet20 --set data.root=/data/cifar10
      the same on CIFAR-10 images and a trained ResNet-20
  intrafusion run my_recipe.yaml --set prune.ratios=0.3,0.5 --set fusion.merge=barycentre --output runs/mine

An interrupted run continues where it stopped when the same command is given again.
Exit codes: 0 done, 1 failed, 2 the recipe or the command line is wrong, 130 interrupted.
"""


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
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"intrafusion {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="do what a recipe says and write a report",
        description="Train or load a network, prune it with and without fusion, measure both, write a report.",
        epilog=_EXAMPLES + f"\nshipped recipes: {', '.join(shipped_recipes()) or 'none'}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("recipe", metavar="RECIPE", help="path of a YAML file, or the name of a shipped recipe")
    run.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="assignments",
        help="change a key of the recipe, as in prune.seed=1; may be given many times",
    )  # fmt: skip
    run.add_argument("--output", metavar="DIR", help="folder of the run, instead of the recipe's")
    run.add_argument("--fresh", action="store_true", help="compute everything again, even what is finished")
    run.add_argument("--quiet", action="store_true", help="no progress, only the table")
    run.add_argument("--debug", action="store_true", help="show where in the code an error comes from")
    run.set_defaults(command=_run)
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
