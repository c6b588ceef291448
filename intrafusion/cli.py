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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from intrafusion.cli_parser import make_parser

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
_SPEAKING = 1.0  # seconds that the first process of a machine has to say what is wrong
_log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; errors are text on stderr, never a traceback by default."""
    parser = make_parser(COMMANDS, shipped_recipes())
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


def _run(options: argparse.Namespace) -> int:
    path = find_recipe(options.recipe)
    from intrafusion.lab.recipe.loader import load_recipe
    from intrafusion.lab.run import run
    from intrafusion.lab.split.run import run_split
    from intrafusion.training.processes import open_processes

    recipe = load_recipe(path, _assignments(options))
    if recipe.split:
        return _finish(run_split(recipe, fresh=options.fresh, progress=not options.quiet), options)
    if recipe.sweep:
        _log.info("the grid of the section 'sweep' is for: intrafusion sweep %s", options.recipe)
    with open_processes(cpu=recipe.device == "cpu") as processes:
        finished = run(recipe, fresh=options.fresh, progress=not options.quiet, processes=processes)
        return _finish(finished, options) if processes.is_main else OK


def _sweep(options: argparse.Namespace) -> int:
    path = find_recipe(options.recipe)
    from intrafusion.lab.executors import make_executor
    from intrafusion.lab.recipe.grid import parse_grid
    from intrafusion.lab.recipe.loader import read_points, read_text
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
    from intrafusion.lab.recipe.loader import load_recipe

    found = inspect(load_recipe(path, options.assignments), progress=not options.json)
    print(json.dumps(asdict(found), indent=2) if options.json else found)
    return OK


def _landscape(options: argparse.Namespace) -> int:
    path = find_recipe(options.recipe)
    from intrafusion.lab.landscape.report import REPORT, LandscapeSettings, measure_landscape, write_landscape
    from intrafusion.lab.recipe.loader import load_recipe

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
    from intrafusion.lab.recipe.loader import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
    return OK


COMMANDS = {
    "run": _run,
    "sweep": _sweep,
    "report": _report,
    "inspect": _inspect,
    "landscape": _landscape,
    "recipes": _recipes,
    "schema": _schema,
}


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
    from intrafusion.training.processes import launch

    return launch()


def _report_error(error: Exception, debug: bool) -> int:
    from intrafusion import FusionError
    from intrafusion.lab.errors import LabError, UsageError
    from intrafusion.training.processes import ProcessError

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
