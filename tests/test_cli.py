# ruff: noqa: E501
"""The command as a user meets it: exit codes, messages, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from intrafusion import cli
from tests.killing import kill_as_soon_as

QUICK = [
    "--set", "train.epochs=1", "--set", "data.test_images=100", "--set", "prune.ratios=0.5", "--set", "threads=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_timing: None) -> None:
    monkeypatch.setenv("INTRAFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_the_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "digits", *QUICK, "--output", "out"]) == cli.OK
    captured = capsys.readouterr()
    assert captured.out.startswith("digits_cnn on digits: dense ")
    assert captured.out.endswith("\nreport: out/report.md\n")
    assert "validation accuracy of the dense network" in captured.err
    assert (tmp_path / "out" / "report.md").exists()
    assert cli.main(["run", "out/recipe.yaml", "--quiet"]) == cli.OK
    again = capsys.readouterr()
    assert again.out == captured.out
    assert again.err == ""


def test_fresh_computes_again(tmp_path: Path) -> None:
    arguments = ["run", "digits", *QUICK, "--output", "out", "--quiet", "--set", "fusion=paper"]
    for extra, lines in (([], 3), ([], 3), (["--fresh"], 6)):
        assert cli.main([*arguments, *extra]) == cli.OK
        assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == lines


def test_a_bad_recipe_is_text_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("model: {name: digits_cnn}\ndata: {name: digits}\nprun: {}\n")
    assert cli.main(["run", "r.yaml", "--set", "train.lr=0"]) == cli.USAGE
    assert capsys.readouterr().err == (
        "intrafusion: error: 3 problems in the recipe:\n"
        "  r.yaml:3: prun: unknown key 'prun'; did you mean 'prune'? "
        "allowed: model, data, train, prune, fusion, finetune, split, sweep, output, keep, device, threads\n"
        "  --set train.lr=0: train.lr: expected number above 0, got 0\n"
        "  r.yaml:1: output: missing; expected text\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digit"], "no recipe at 'digit'. Did you mean the shipped recipe 'digits'? Shipped: cifar10"),
        (["run", "nowhere/digits.yaml"], "no recipe at 'nowhere/digits.yaml'. Did you mean the shipped recipe 'digits'?"),
        (["run", "digits", "--set", "prune"], "--set prune: expected --set section.key=value"),
        (["run", "cifar10_resnet20"], "data.root: missing; set it with --set data.root=FOLDER"),
        (["run", "digits", "--set", "data.name=image_folder", "--set", "data.root=."], "holds neither the folders train/ and"),
    ],
)  # fmt: skip
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert code == (cli.FAILED if "holds neither" in message else cli.USAGE)
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["walk"], ["run"], ["run", "digits", "--nonsense"]])
def test_wrong_usage_is_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == cli.USAGE
    assert "usage: intrafusion" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["run", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
        assert error.value.code == 0
    out = capsys.readouterr().out
    assert "intrafusion run cifar10_resnet20 --set data.root=/data/cifar10" in out
    assert f"shipped recipes: {', '.join(cli.shipped_recipes())}" in " ".join(out.split())
    assert out.splitlines()[-1].startswith("intrafusion 0.")
    assert cli.main([]) == cli.USAGE


def test_an_unexpected_error_is_one_line_unless_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from intrafusion.lab import run

    monkeypatch.setattr(run, "run", lambda *_, **__: 1 / 0)
    assert cli.main(["run", "digits"]) == cli.FAILED
    assert capsys.readouterr().err == (
        "intrafusion: error: ZeroDivisionError: division by zero (--debug shows where)\n"
    )
    assert cli.main(["run", "digits", "--debug"]) == cli.FAILED
    assert "Traceback" in capsys.readouterr().err


def test_interruption_has_its_own_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from intrafusion.lab import run

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    assert cli.main(["run", "digits"]) == cli.INTERRUPTED
    assert "give the same command again to continue" in capsys.readouterr().err


def test_warnings_are_sentences(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    from intrafusion.lab import run

    def warn(*_, **__):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning(UserWarning("two groups were only cut"), UserWarning, "f.py", 1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "run", warn)
    assert cli.main(["run", "digits"]) == cli.FAILED
    assert capsys.readouterr().err.splitlines() == [
        "warning: two groups were only cut", "intrafusion: error: [Errno 28] No space left on device",
    ]  # fmt: skip


def test_recipes_are_found_in_the_wheel_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "intrafusion"
    (package / "recipes").mkdir(parents=True)
    (package / "recipes" / "mine.yaml").touch()
    monkeypatch.setattr(cli, "__file__", str(package / "cli.py"))
    assert cli.shipped_recipes() == {"mine": package / "recipes" / "mine.yaml"}
    assert cli.find_recipe("mine.yaml") == package / "recipes" / "mine.yaml"


@pytest.mark.slow
def test_a_killed_process_resumes(tmp_path: Path) -> None:
    """SIGKILL in the middle, then the same command: finished cells stay as they are, the rest follows."""
    ratios = ",".join(str(round(0.02 * i, 2)) for i in range(1, 6))
    command = [sys.executable, "-m", "intrafusion.cli", "run", "digits", *QUICK, "--output", "out",
               "--set", f"prune.ratios={ratios}", "--set", "fusion=paper"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).resolve().parents[1])}
    results = tmp_path / "out" / "results.jsonl"
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    kill_as_soon_as(lambda: results.exists() and results.read_bytes().count(b"\n") >= 3, process)
    before = results.read_bytes()
    finished = before[: before.rfind(b"\n") + 1]
    assert 3 <= finished.count(b"\n") < 11
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    after = results.read_bytes()
    assert after.startswith(finished)
    assert len({json.loads(line)["key"] for line in after.splitlines()}) == 11 == after.count(b"\n")
    assert "report: out/report.md" in done.stdout


def test_inspect_as_text_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "digits", "--set", "prune.ratios=0.5"]) == cli.OK
    assert "features.3  64 -> 32  fused" in capsys.readouterr().out
    assert cli.main(["inspect", "digits", "--set", "prune.ratios=0.5", "--json"]) == cli.OK
    found = json.loads(capsys.readouterr().out)
    assert [group["after"] for group in found["cuts"][0]["groups"]] == [16, 32, 32]
    assert found["cuts"][0]["macs"] < found["macs"]
    assert not list(tmp_path.glob("runs*"))
    assert cli.main(["inspect", "digits", "--set", "prune.ratio=0.5"]) == cli.USAGE


def test_recipes_in_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == cli.OK
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(cli.shipped_recipes())
    assert all(line.split("  ", 1)[1].strip().endswith(".") for line in lines)
    assert cli.main(["recipes", "--json"]) == cli.OK
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found] == list(cli.shipped_recipes())
    assert all(Path(entry["path"]).is_file() for entry in found)


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["required"] == ["model", "data", "prune", "output"]


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5", ""])
def test_a_number_of_workers_that_is_none(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["sweep", "digits", f"--workers={count}"])
    assert f"argument --workers: '{count}' is not a whole number of 1 or more" in capsys.readouterr().err


def test_a_sweep_that_measured_nothing_has_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from intrafusion.lab import sweep

    swept = sweep.Swept(tmp_path, tmp_path / "report.md", "nothing is measured yet", 0, ("dense: too hot",))
    monkeypatch.setattr(sweep, "sweep", lambda *_, **__: swept)
    assert cli.main(["sweep", "digits"]) == cli.FAILED
    assert capsys.readouterr() == ("nothing is measured yet\n", "failed: dense: too hot\n")
    assert cli.main(["sweep", "digits", "--json"]) == cli.FAILED
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "folder": str(tmp_path), "report": None, "computed": 0, "failed": ["dense: too hot"], "rows": [],
    }  # fmt: skip
