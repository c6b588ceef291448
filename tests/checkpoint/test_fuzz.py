"""Ten thousand damaged and forged files: an error or a network, never a crash, foreign code or half a change."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import intrafusion
from intrafusion import CheckpointError
from intrafusion.groups.snapshot import copy_state, restore_state
from tests.checkpoint.forgery import forge, parts, signed
from tests.checkpoint.networks import Tied, dense, pruned, same, state

pytestmark = pytest.mark.slow
DAMAGED, RESIGNED, FORGED = 3_000, 3_000, 5_000
NETWORKS = {"plain": (lambda: pruned("plain"), lambda: dense("plain")), "tied": (lambda: Tied(6), lambda: Tied(8))}
CODE = ("exec", "compile", "import", "pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "socket.connect")

_watched: list[str] | None = None


def _audit(event: str, arguments: tuple) -> None:
    if _watched is not None and event in CODE:
        _watched.append(f"{event} {arguments!r:.100}")


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What Python reports of code that is compiled, imported, unpickled or started meanwhile."""
    global _watched
    _watched = found = []
    try:
        yield found
    finally:
        _watched = None


class Target:
    """A dense network that damaged files are loaded into, over and over."""

    def __init__(self, name: str, folder) -> None:
        save, build = NETWORKS[name]
        self.path = folder / "fuzz.safetensors"
        intrafusion.save(save(), self.path, recipe={"a": [1, None, "x"]})
        self.content = self.path.read_bytes()
        self.model = build()
        self.before = state(self.model)
        self._reset = [(vars(m), copy_state(vars(m))) for m in self.model.modules()]
        self.loaded, self.longest = 0, 0
        self.load(self.content)
        assert self.loaded == 1  # and what is imported on first use is imported

    def load(self, content: bytes) -> None:
        self.path.write_bytes(content)
        try:
            with watched() as code:
                intrafusion.load(self.path, self.model)
        except CheckpointError as error:
            self.longest = max(self.longest, len(str(error)))
        else:
            self.loaded += 1
            for attributes, saved in self._reset:
                restore_state(attributes, saved)
        assert code == []
        assert same(state(self.model), self.before)


@pytest.fixture(params=NETWORKS)
def target(request, tmp_path) -> Target:
    return Target(request.param, tmp_path)


def test_code_would_be_noticed():
    with watched() as code:
        exec("1 + 1")
    assert code


def each(count: int) -> Iterator[random.Random]:
    """Half of `count` generators: both networks get a share."""
    return (random.Random(seed) for seed in range(count // len(NETWORKS)))


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def splice(content: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(content)) for _ in range(2))
    c, d = sorted(rng.randrange(len(content)) for _ in range(2))
    return content[:a] + content[c:d] + content[b:]


def insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + rng.randbytes(rng.choice((1, 3, 64))) + content[at:]


def lie_about_the_length(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    wrong = rng.choice((0, 1, 2, length - 8, length + 8, len(content), 2**32, 2**63, 2**64 - 1, rng.randrange(2**64)))
    return wrong.to_bytes(8, "little") + content[8:]


BYTES = (flip, truncate, splice, insert, lie_about_the_length)


def test_damaged_bytes(target):
    for rng in each(DAMAGED):
        target.load(rng.choice(BYTES)(target.content, rng))


def test_damaged_headers_with_a_valid_checksum(target):
    length = int.from_bytes(target.content[:8], "little")
    header, data = target.content[8 : 8 + length], target.content[8 + length :]
    for rng in each(RESIGNED):
        if rng.random() < 0.1:
            target.load(signed(header, rng.choice(BYTES[:4])(data, rng)))
        else:
            target.load(signed(rng.choice(BYTES[:4])(header, rng), data))


DEEP = "\0deep\0"
VALUES: tuple[Callable[[random.Random], Any], ...] = (
    lambda rng: rng.choice((None, True, False, "", "x", "\ud800", "__class__", "../../x", "float32", "parameter")),
    lambda rng: rng.choice((0, 1, -1, 2, 3, 5, 8, 2**31, 2**53, 10**12, 2**63, 2**64, 10**400)),
    lambda rng: rng.choice((0.0, -0.0, 0.5, 1e308, float("nan"), float("inf"), float("-inf"), 1e-320)),
    lambda rng: rng.choice(([], {}, [[]], [1], [0], [-1], [True], [1.5], [10**12], [10**9] * 9, {"": 1}, [0] * 500)),
    lambda rng: rng.choice((DEEP, "a" * 10_000, {"type": "Linear"}, {"model": "os:system", "num_classes": 1})),
)


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        places(value[key], found)
    return found


def edit(document: Any, rng: random.Random) -> None:
    found = places(document, [])
    container, key = rng.choice(found)
    action = rng.choice(("replace", "replace", "replace", "near", "delete", "rename", "copy", "swap"))
    if action == "replace":
        container[key] = rng.choice(VALUES)(rng)
    elif action == "near" and isinstance(container[key], int):
        container[key] += rng.choice((-1, 1, 2))
    elif action == "delete":
        del container[key]
    elif action == "rename" and isinstance(container, dict):
        container[rng.choice(("x", "", "weight", "0", key + "x", "bn1.bias"))] = container.pop(key)
    else:
        other, place = rng.choice(found)
        if action == "swap":
            container[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(container[key])
        else:
            container[key] = copy.deepcopy(other[place])


def forged(content: bytes, rng: random.Random) -> bytes:
    header, document, data = parts(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        try:
            edit(document if rng.random() < 0.9 else header, rng)
        except (KeyError, IndexError, TypeError):  # two edits of one place
            continue
    if not isinstance(document.get("sha256"), str) or rng.random() < 0.9:
        document = {"sha256": "0" * 64, **{key: value for key, value in document.items() if key != "sha256"}}
    text = json.dumps(document, separators=(",", ":"))
    text = text.replace(json.dumps(DEEP), rng.choice(("[" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 5_000)))
    if rng.random() < 0.1:
        name = rng.choice(["version", "tensors", "modules", "conv1", "training", "format"])
        text = text.replace(f'"{name}":', f'"{name}":1,"{name}":', 1)
    return forge(header, text, data)


def test_forged_documents_with_a_valid_checksum(target):
    for rng in each(FORGED):
        target.load(forged(target.content, rng))
    assert target.loaded > 10  # or the forgeries would never get past the checksum
    assert target.longest < 4_000
