"""What a record says, in a word and a sentence."""

from __future__ import annotations

from typing import Any

WORSE = 1.02
"""A result is no worse than its twin's up to this factor."""
EXACT = 1e-3
"""Relative error up to which an output counts as unchanged by a permutation."""
TRACE = 1e-2
"""The same when duplicates have been pruned and layers refitted by ridge regressions."""
_WORSE = "worse than plain cutting"
"""Words by which a warning says that the plain cut does better."""
_HALFWAY, _ADVICE = "FusionError: while ", "does not run with its new widths"
"""How an error begins that nobody foresaw (the network is put back); and the one kind of them that says what to do."""

Record = dict[str, Any]


def verdict(record: Record) -> tuple[str, str]:
    """(one word, why). The words:

    better (or as good as its twin), worse (and it says so), refused (with a reason), nothing (that torch-pruning could
    cut), no network (torch-pruning makes none that runs, and we say so), too large (for the row's limits), skipped (not
    tried here), and the faults: WORSE (and says nothing), CRASH (an error that is not meant for users, or that nobody
    foresaw), FAULT (the result cannot be used as promised).
    """
    errors = record.get("errors", {})
    if record.get("skipped"):
        return "skipped", record["skipped"]
    if record.get("stopped") and record.get("error") is None:
        return "too large", record["stopped"]
    if "build" in errors:
        return _kind(errors["build"], "skipped"), f"it cannot be built: {errors['build']}"
    if "prune" in errors:
        halfway = errors["prune"].startswith(_HALFWAY) and _ADVICE not in errors["prune"]
        crash = halfway or "prune" in record.get("raw", ())
        return _kind(errors["prune"], "CRASH" if crash else "refused"), errors["prune"]
    if "forward" in errors:
        said = [warning for warning in record.get("warnings", []) if "does not run" in warning]
        if said and ("torch-pruning" in errors or "the twin runs" in errors):
            return "no network", said[0]
        return "FAULT", f"it does not run{', and says so' if said else ''}: {errors['forward']}"
    broken = faults(record)
    if broken:
        return "FAULT", "; ".join(broken)
    if not record.get("groups"):
        return "nothing", "torch-pruning finds nothing in it that it could cut"
    error, twin = record.get("error"), record.get("twin")
    if error is None or twin is None or error <= WORSE * twin + EXACT:
        return "better", ""
    said = any(_WORSE in warning for warning in record.get("warnings", []))
    return "worse" if said else "WORSE", f"{error:.3g}, its twin {twin:.3g}"


def faults(record: Record) -> list[str]:
    """What a network that runs cannot do as promised."""
    errors = record.get("errors", {})
    found = [f"{stage}: {errors[stage]}" for stage in ("save and load", "training", "ONNX", "duplicates", "permute")
             if stage in errors]  # fmt: skip
    if record.get("saved") is False:
        found.append("what is loaded is another network")
    if record.get("as torch-pruning") is False:
        found.append("not what torch-pruning gives")
    if (record.get("duplicates") or 0) > TRACE and not record.get("duplicates cut only"):
        found.append(f"duplicates left a trace of {record['duplicates']:.2g}")
    if (record.get("permutation") or 0) > EXACT:
        found.append(f"a permutation changes the output by {record['permutation']:.2g}")
    return found


def is_sound(record: Record) -> bool:
    """Is there nothing in it to mend, and nothing to try again?"""
    return verdict(record)[0] in ("better", "worse", "nothing")


def _kind(error: str, otherwise: str) -> str:
    return "too large" if "not enough memory" in error or "MemoryError" in error else otherwise
