"""Claims about the command line: what it reads, what it says, how it exits, how fast it answers."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preftune import __version__
from preftune.cli import STAGES, main, parse
from preftune.config.stages import CONFIGS, DpoConfig, sections
from preftune.engine.run import Stopped
from preftune.errors import ConfigError, DataError, NotFinite

NEEDED = ["--model", "m", "--data", "d", "--out", "o"]
Recipe = Callable[[Any], object]


def dpo(*arguments: str) -> DpoConfig:
    stage, config = parse(["dpo", *NEEDED, *arguments])
    assert stage == "dpo" and isinstance(config, DpoConfig)
    return config


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], None]:
    """Puts a function in the place of recipes/dpo.py, so that only the command line is tested."""

    def install(function: Recipe) -> None:
        monkeypatch.setitem(sys.modules, "preftune.recipes.dpo", SimpleNamespace(main=function))  # type: ignore[misc]

    return install


def failing(error: BaseException) -> Recipe:
    def run(config: Any) -> object:
        raise error

    return run


def test_flags_have_the_names_of_the_keys() -> None:
    """`--key value`, `--key=value`, a dash for an underscore: one setting."""
    for spelling in (["--eval_data", "x-y"], ["--eval-data", "x-y"], ["--eval-data=x-y"], ["--eval_data=x-y"]):
        assert dpo(*spelling).eval_data == "x-y"


def test_a_value_may_hold_anything() -> None:
    """Only the name of an option is normalised; equal signs and dashes of its value stay."""
    assert dpo("--eval-data=--a-b=c").eval_data == "--a-b=c"


@pytest.mark.parametrize(
    ("flags", "shuffle"),
    [([], True), (["--shuffle"], True), (["--shuffle", "false"], False), (["--shuffle=no"], False)],
)
def test_a_switch_takes_a_value_or_none(flags: list[str], shuffle: bool) -> None:
    """A bare switch means true; false has to be said."""
    assert dpo(*flags).shuffle is shuffle


def test_the_yaml_file_has_the_same_keys(tmp_path: Path) -> None:
    """Numbers in scientific notation are numbers, dashes are underscores, an empty file is no setting."""
    path = tmp_path / "dpo.yaml"
    path.write_text("# a comment\nlr: 5e-7\neval-data: e\nshuffle: no\nmax_steps: 7\n", encoding="utf-8")
    config = dpo("--config", str(path))
    assert (config.lr, config.eval_data, config.shuffle, config.max_steps) == (5e-7, "e", False, 7)
    path.write_text("", encoding="utf-8")
    assert dpo("--config", str(path)) == dpo()


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    """The flag's value counts, and a complaint about it does not point at the file."""
    path = tmp_path / "dpo.yaml"
    path.write_text("beta: 0.5\nlr: 1e-5\n", encoding="utf-8")
    config = dpo("--config", str(path), "--beta", "0.2")
    assert (config.beta, config.lr) == (0.2, 1e-5)
    with pytest.raises(ConfigError, match=r"^loss dpo: beta must be a number > 0, not -1.0$"):
        dpo("--config", str(path), "--beta", "-1")


REFUSED_FILES = [
    ("lr: 1e-6\nlearning-rate: 1", ":2: unknown key learning_rate; did you mean lr?"),
    ("\nbeta: strong", ":2: beta must be a number, not 'strong'"),
    ("loss: ipo\nbeta: 0.1", ":2: loss ipo has no knob beta; its knobs: tau"),
    ("lr: 1\n\nlr: 2", ":3: lr is given twice, first at {path}:1"),
    ("data:\n  train: x", ":1: data takes one value, not a list or a mapping"),
    ("- lr", ":1: expected lines of `key: value`"),
    ("lr: 1\nbeta: 'x", ":2: not YAML: found unexpected end of stream"),
    ("lr: !!python/object/apply:os.getcwd []", ":1: lr takes one value"),
    ("lr: !!python/name:os.getcwd x", ":1: not YAML: could not determine a constructor"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED_FILES)
def test_a_problem_in_the_file_is_one_line_with_its_place(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`file:line: what`, exit code 2."""
    path = tmp_path / "dpo.yaml"
    path.write_text(text, encoding="utf-8")
    assert main(["dpo", *NEEDED, "--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"preftune: {path}{message.format(path=path)}")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing, a folder, not text: each said in one line."""
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("none", "No such file"), ("", "Is a directory"), ("bytes", "it is not UTF-8 text")):
        assert main(["dpo", "--config", str(tmp_path / name)]) == 2
        assert reason in capsys.readouterr().err


REFUSED_ARGUMENTS = [
    (["dpoo"], "unknown stage dpoo; did you mean dpo?"),
    (["train"], f"unknown stage train; stages: {', '.join([*CONFIGS, 'env'])}"),
    (["dpo", "--learning-rate", "1"], "unknown option --learning_rate; did you mean lr?"),
    (["dpo", "--bta=1"], "unknown option --bta=1; did you mean beta?"),
    (["dpo", "--no-shuffle"], "unknown option --no_shuffle; write --shuffle false"),
    (["dpo", "--xyzzy", "1"], "unknown option --xyzzy; see preftune dpo --help"),
    (["dpo", "-b", "1"], "unknown option -b; see preftune dpo --help"),
    (["dpo", "train.jsonl"], "unexpected argument train.jsonl; see preftune dpo --help"),
    (["dpo", "--beta"], "--beta: expected one argument"),
    (["dpo", "--model", "m"], "missing data, out: give --data VALUE, or the key in the YAML file"),
    (["dpo", *NEEDED, "--loss", "ipo", "--beta", "1"], "loss ipo has no knob beta; its knobs: tau"),
    (["dpo", *NEEDED, "--resume", "maybe"], "resume must be true or false, not 'maybe'"),
    (["env", "--all"], "env takes no arguments, found --all"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED_ARGUMENTS, ids=lambda v: "-".join(v)[:30])
def test_what_is_not_understood_exits_2_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No usage dump, no traceback: what was found and what to do."""
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", f"preftune: {message}\n")


def test_a_stage_may_take_arguments_without_a_name(tmp_path: Path) -> None:
    """`preftune report RUN RUN`, before or after options, equals `--runs RUN,RUN` and the key of a YAML file."""
    path = tmp_path / "report.yaml"
    path.write_text("runs: a, b/c\nout: r.html\n", encoding="utf-8")
    spellings = [
        ["a", "b/c", "--out", "r.html"],
        ["--out=r.html", "a", "b/c"],
        ["a", "--out", "r.html", "b/c"],
        ["--runs", "a,b/c", "--out", "r.html"],
        ["--config", str(path)],
    ]
    for arguments in spellings:
        stage, config = parse(["report", *arguments])
        assert (stage, config.model_dump()) == ("report", {"runs": ("a", "b/c"), "out": "r.html"})
    assert parse(["report", "a,b", "c d"])[1].model_dump()["runs"] == ("a,b", "c d"), "a name is taken as it is"
    assert parse(["report", "x", "--config", str(path)])[1].model_dump()["runs"] == ("x",), (
        "arguments win over the file"
    )


REFUSED_REPORTS = [
    ([], "missing runs: give --runs VALUE, or the key in the YAML file"),
    (["a", "--runs", "b"], "runs is given twice, as --runs and as a; name each RUN once"),
    (["a", "b/../b", "b/../b"], "b/../b is given twice; name each run once"),
    (["a", "--outt", "x"], "unknown option --outt; did you mean out?"),
    (["--runs", ","], "runs holds no name, or an empty one; name folders of runs"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED_REPORTS, ids=lambda v: "-".join(v)[:30])
def test_arguments_that_are_not_understood_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """None, twice, or beside an option that does not exist."""
    assert main(["report", *arguments]) == 2
    assert capsys.readouterr() == ("", f"preftune: {message}\n")


def test_an_option_may_not_be_abbreviated() -> None:
    """`--max` could become ambiguous with the next option; it is refused today."""
    with pytest.raises(ConfigError, match="unknown option --eval_dat; did you mean eval_data"):
        dpo("--eval_dat", "x")


def test_the_stage_receives_its_config(recipe: Callable[[Recipe], None]) -> None:
    """A run that ends well exits 0."""
    received: list[DpoConfig] = []
    recipe(received.append)
    assert main(["dpo", *NEEDED, "--lr", "1e-6"]) == 0
    assert [config.lr for config in received] == [1e-6]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            DataError("2 rows are refused:\n  a:3: x\n  a:4: y"),
            2,
            "preftune: 2 rows are refused:\n  a:3: x\n  a:4: y\n",
        ),
        (NotFinite("loss is NaN at step 3"), 1, "preftune: loss is NaN at step 3\n"),
        (KeyboardInterrupt(), 130, "preftune: stopped\n"),
    ],
)
def test_an_error_is_its_message_and_its_exit_code(
    error: BaseException, code: int, line: str, recipe: Callable[[Recipe], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """2 for the user's input, 1 for the run, 130 for Ctrl-C outside the part that saves."""
    recipe(failing(error))
    assert main(["dpo", *NEEDED]) == code
    assert capsys.readouterr() == ("", line)


def test_a_traceback_can_be_asked_for(
    recipe: Callable[[Recipe], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PREFTUNE_DEBUG=1 puts it above the line; the exit code stays."""
    monkeypatch.setenv("PREFTUNE_DEBUG", "1")
    recipe(failing(NotFinite("loss is NaN")))
    assert main(["dpo", *NEEDED]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last)") and error.endswith("preftune: loss is NaN\n")


@pytest.mark.parametrize("signal_number", [2, 15])
def test_a_run_stopped_by_a_signal_exits_128_plus_it(signal_number: int, recipe: Callable[[Recipe], None]) -> None:
    """130 for Ctrl-C and 143 for SIGTERM reach the shell."""
    recipe(failing(Stopped(signal_number)))
    with pytest.raises(SystemExit) as caught:
        main(["dpo", *NEEDED])
    assert caught.value.code == 128 + signal_number


def test_a_fault_of_ours_keeps_its_traceback(recipe: Callable[[Recipe], None]) -> None:
    """What nobody foresaw is not dressed up as the user's mistake."""
    recipe(failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["dpo", *NEEDED])


@pytest.mark.parametrize("columns", [80, 120])
def test_the_overview_names_every_stage(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without arguments, or asked for help: every stage once, what it does in one column, no line past the terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert set(STAGES) == set(CONFIGS)
    assert main([]) == main(["--help"]) == 0
    _, _, stages = capsys.readouterr().out.rpartition("stages:\n")
    start = 2 + max(map(len, STAGES)) + 2
    shown: list[list[str]] = []
    for line in stages.splitlines():
        assert len(line) <= columns and line[start - 1] == " " != line[start]
        if name := line[:start].strip():
            shown.append([name, line[start:]])
        else:
            shown[-1][1] += f" {line[start:]}"
    assert shown[:-1] == [[*stage] for stage in STAGES.items()] and shown[-1][0] == "env"
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"preftune {__version__}\n"


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_every_key_with_its_default(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every key with its heading, its description and its default, on at most two screens."""
    with pytest.raises(SystemExit) as caught:
        main([stage, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for title, keys in sections(CONFIGS[stage]).items():
        assert f"{title}:" in text
        for key in keys:
            assert f"--{key} " in text and f"({CONFIGS[stage].default_text(key)})" in text
            assert str(CONFIGS[stage].model_fields[key].description) in text


def test_env_shows_versions_and_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    """What a bug report needs, one `name: value` per line."""
    assert main(["env"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["preftune"] == __version__ and {"python", "torch", "transformers", "cores"} <= set(lines)


@pytest.mark.parametrize(("arguments", "seconds"), [(["--help"], 0.3), (["dpo", "--help"], 0.5), (["dpo", "--x"], 0.5)])
def test_help_and_refusals_take_no_time(arguments: list[str], seconds: float) -> None:
    """Processor time of the whole process, the best of three: a busy machine is not the program's fault."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def once() -> float:
        before = spent()
        subprocess.run([sys.executable, "-m", "preftune", *arguments], capture_output=True, check=False)
        return spent() - before

    assert min(once() for _ in range(3)) < seconds
