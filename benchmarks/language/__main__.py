"""Language models pruned without fine-tuning: loss on held-out text, every method in one command.

    python -m benchmarks.language                                   # two small models, trained first, about an hour
    python -m benchmarks.language --model smollm2 --ratio 0.3 --kind feed_forward --calibrate 16 --length 512

Loss in nats a token (perplexity is its exponential), on text that no method sees; rows are JSON lines that a second
call goes on from.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.language.methods import METHODS, pruned
from benchmarks.language.models import MODELS, SMALL, Language, open_model
from benchmarks.language.table import table
from benchmarks.language.texts import TEXTS

KINDS = {
    "feed_forward": ("feed_forward",),
    "heads": ("heads",),
    "head_dim": ("head_dim",),
    "stream": ("stream",),
    "feed_forward+heads": ("feed_forward", "heads"),
    "all": ("feed_forward", "heads", "stream"),
}
_BY_DEFAULT = ("feed_forward", "heads", "head_dim", "stream", "all")


@torch.no_grad()
def losses(model: Any, sequences: Tensor, each: int) -> list[float]:
    """The mean loss of each sequence, in nats a token."""
    found: list[float] = []
    for batch in sequences.split(each):
        logits = model(batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
        found += loss.reshape(len(batch), -1).mean(dim=1).tolist()
    return found


def seconds(device: str) -> float:
    """Of the processor; on another device, where that one waits and is waited for, on the clock."""
    return time.process_time() if device == "cpu" else time.perf_counter()


@torch.no_grad()
def passed(model: Any, batches: list[Tensor], device: str) -> float:
    """Seconds of one forward pass over what the methods may see."""
    began = seconds(device)
    for batch in batches:
        model(batch)
    return seconds(device) - began


def row(language: Language, seed: int, name: str, kind: str, ratio: float, arguments: argparse.Namespace) -> dict:
    shown = language.sequences(language.text, "valid", arguments.calibrate, arguments.length)
    batches = list(shown.to(arguments.device).split(arguments.batch))
    found: dict[str, Any] = {"seconds": 0.0, "device": str(arguments.device)}
    gc.collect()  # what the last method held
    model = language.model
    if name != "dense":
        began = seconds(arguments.device)
        model, report = pruned(model, name, dict.fromkeys(KINDS[kind], ratio), batches)
        found["seconds"] = seconds(arguments.device) - began
        if arguments.passes:
            found["pass"] = passed(language.model, batches, arguments.device)
        found["parameters"] = sum(p.numel() for p in model.parameters())
        if arguments.report:
            print(report)
    for which in TEXTS if language.name not in SMALL else (language.text,):
        try:
            sequences = language.sequences(which, "test", arguments.judge).to(arguments.device)
        except FileNotFoundError as error:
            print(error)
            continue
        each = losses(model, sequences, arguments.batch)
        found[which] = sum(each) / len(each)
        found[f"{which}, each"] = [round(value, 4) for value in each]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: the small ones (may be repeated)")
    parser.add_argument("--method", choices=METHODS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="of width (may be repeated)")
    parser.add_argument("--ratio", type=float, action="append", help="default 0.1 0.3 0.5 (may be repeated)")
    parser.add_argument("--seeds", type=int, default=1, help="so many small models are trained")
    parser.add_argument("--calibrate", type=int, default=64, help="sequences that methods may see")
    parser.add_argument("--length", type=int, default=None, help="of those sequences, in tokens")
    parser.add_argument("--judge", type=int, default=96, help="sequences that are judged on")
    parser.add_argument("--batch", type=int, default=16, help="sequences that are run at once")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--results", type=Path, default=Path("runs/language.jsonl"))
    parser.add_argument("--table", choices=TEXTS, help="print what is in the results so far, measure nothing")
    parser.add_argument("--passes", action="store_true", help="tell the time in forward passes too")
    parser.add_argument("--report", action="store_true", help="print what was done to every group")
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.results.read_text().splitlines() if arguments.results.is_file() else []
    done = {json.loads(line)["row"]: json.loads(line) for line in lines if line.strip()}
    if arguments.table:
        print("\n".join(table(done.values(), arguments.table)))
        return
    for name in arguments.model or SMALL:
        for seed in range(arguments.seeds if name in SMALL else 1):
            language = open_model(name, arguments.results.parent / "language", seed)
            language.model.to(arguments.device)
            cells = [("dense", "-", 0.0)] + [
                (m, kind, ratio)
                for kind in arguments.kind or _BY_DEFAULT
                for ratio in arguments.ratio or (0.1, 0.3, 0.5)
                for m in arguments.method or METHODS
            ]
            for method, kind, ratio in cells:
                shown_to = f"{arguments.calibrate}x{arguments.length or language.length}"
                key = f"{name}-{seed}/{kind}/{ratio:g}/{method}/{shown_to}"
                if key not in done:
                    try:
                        found = row(language, seed, method, kind, ratio, arguments)
                    except Exception as error:  # one cell that fails is a result too
                        found = {"error": f"{type(error).__name__}: {error}"}
                    done[key] = {"row": key, **found}
                    with arguments.results.open("a") as file:
                        file.write(json.dumps(done[key]) + "\n")
                shown = done[key]
                told = ", ".join(f"{t} {shown[t]:.3f} ({math.exp(min(50, shown[t])):.1f})" for t in TEXTS if t in shown)
                cost = f"{shown.get('seconds', 0):.0f} s"
                cost += f", {shown['seconds'] / shown['pass']:.1f} passes" if "pass" in shown else ""
                print(f"{key}: {told or shown.get('error')}  [{cost}]", flush=True)


if __name__ == "__main__":
    main()
