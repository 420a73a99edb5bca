"""The command line: `preftune STAGE [--config FILE.yaml] [--key value | --key=value | --switch]`.

Keys are those of the stage's config (`config/stages.py`), the same in the YAML file and as flags; flags win;
`-` and `_` are one. Exit codes: 0 done, 1 the run failed, 2 the input was refused, 130/143 stopped by a signal
after a checkpoint. An error is one line on stderr (refused rows add one line each); PREFTUNE_DEBUG=1 adds the
traceback. Stages started by torchrun share their work (`engine/parallel.py`), those of ALONE refuse. Nothing heavy
is imported before the configuration is accepted: `--help` and refusals are immediate.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from preftune import __version__
from preftune.engine import parallel
from preftune.errors import ConfigError, PreftuneError

if TYPE_CHECKING:
    from preftune.config.settings import Settings

__all__ = ["ALONE", "STAGES", "main", "parse"]

STAGES: Mapping[str, str] = {
    "quickstart": "the whole loop on the embedded world of film reviews; ends with report.html",
    "explain": "from the objective to the DPO loss, every line executed: a page with figures, or --text",
    "inspect": "examine a data set as training would see it: counts, lengths, refused rows, decoded examples",
    "plan": "memory and time of DPO on so many accelerators, from a configuration and lengths, before anything runs",
    "fresh": "a small untrained model, with a tokenizer learnt from data: where there is no hub, and for studies",
    "sft": "supervised fine-tuning on responses, or on the chosen side of pairs",
    "sample": "responses of a model, or of a server's, to prompts, with their log-probs; resumable, appendable",
    "label": "which of two sampled responses is better: people decide on a page, or --judge does",
    "label export": "labels of the page as pairs, unpaired rows, rankings or their whole history; agreement",
    "label import": "labels made elsewhere, into the store of a page",
    "dpo": "Direct Preference Optimization on preference pairs",
    "reward": "a reward model (Bradley-Terry or Plackett-Luce) on preference pairs or rankings",
    "ppo": "reinforcement learning from a reward, PPO or RLOO, on the policy's own responses to prompts",
    "merge": "an adapter merged into its base model: a plain folder for tools that know no adapters",
    "evaluate": "models against a reference on the same prompts: reward, KL, win rates, drift, each with its interval",
    "report": "one page about one or several runs: results, curves, answers, data, settings and their differences",
    "study frontier": "reward against KL of every method beside the exact frontier: figure, table, verdicts",
    "study tuning": "is supervised learning easier to tune: random hyper-parameters of DPO, PPO and RLOO",
    "study data": "does DPO depend on preference data: fewer pairs, flipped labels, prompts without labels",
    "study anchor": "is the reference an anchor: KL against beta, with certain labels, without a reference",
    "study shift": "does DPO generalise worse: reward and KL on other prompts and on longer ones",
    "study length": "does DPO write longer: answers at equal KL under three truths about length",
    "study gradient": "does sampling block the gradient: estimates from samples against the exact one",
    "study cost": "is DPO as easy as SFT, with only two models: weights, FLOPs, CPU time and peak memory of an update",
    "study weight": "does DPO's weight keep the policy whole: reward and KL in the course of training without it",
    "study ceiling": "has DPO a lower ceiling: most reward within a KL budget, against the exact frontier",
    "study start": "fine-tuning on chosen responses before DPO, or DPO straight from the base, at equal KL",
}
"""Stage -> what it does; its code is found by `_start`, its keys are `config.stages.CONFIGS[STAGE]`."""

ALONE: Mapping[str, str] = {
    "quickstart": "it is the whole loop in small, for any machine as it is",
    "explain": "it computes one page",
    "inspect": "it reads rows in their order and runs no model",
    "plan": "it computes one estimate",
    "fresh": "it draws weights once",
    "label": "a page has one server; with --judge the comparisons are shared",
    "label export": "it reads one store",
    "label import": "it writes one store",
    "merge": "it computes every weight once, and reading and writing them takes longer than that",
    "report": "it writes one page",
    "study": "it starts processes of its own, --processes of them",
}
"""What has nothing to share between processes, and why; all other stages do their work together."""

_ENV = "versions and hardware, for bug reports"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage; the return value is the exit code. --help and a run stopped by a signal leave by SystemExit."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except PreftuneError as problem:
        if os.environ.get("PREFTUNE_DEBUG"):
            traceback.print_exc()
        if parallel.failed(str(problem)):
            print(f"preftune: {parallel.named()}{problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:  # before or after the part of a run that turns signals into checkpoints
        if parallel.launched()[0] == 0:
            print("preftune: stopped", file=sys.stderr)
        return 130
    except SystemExit:  # stopped by a signal: every rank at the same step, all is written
        parallel.leave()
        raise
    except Exception as bug:
        parallel.failed(f"{type(bug).__name__}: {bug}")
        raise


def _run(argv: list[str]) -> int:
    first = argv[0] if argv else "--help"
    if first in ("-h", "--help", "help"):
        print(_overview())
    elif first == "--version":
        print(f"preftune {__version__}")
    elif first == "env":
        _print_environment(argv[1:])
    else:
        stage, config = parse(argv)
        _refuse_many_processes(stage, config)
        _start(stage, config)
        parallel.leave()
    return 0


def _refuse_many_processes(stage: str, config: Any) -> None:
    """Raise ConfigError where a launcher started a stage several times that would do the same as often."""
    why = ALONE.get(stage) or ALONE.get(stage.partition(" ")[0])
    if parallel.launched()[1] > 1 and why and not (stage == "label" and config.judge is not None):
        raise ConfigError(f"{stage} runs in one process: {why}; start it without torchrun")


def _start(stage: str, config: Any) -> None:
    """Hand over to the stage: `recipes/STAGE.py`, but the labelling page and its files are in `web/`."""
    if stage == "label" and config.judge is None:
        importlib.import_module("preftune.web.serve").main(config)
    elif stage in ("label export", "label import"):
        transfer = importlib.import_module("preftune.web.transfer")
        (transfer.export_labels if stage == "label export" else transfer.import_labels)(config)
    else:
        importlib.import_module(f"preftune.recipes.{stage.partition(' ')[0]}").main(config)


def parse(argv: Sequence[str]) -> tuple[str, Settings]:
    """The stage and its checked config. Raises ConfigError, with `file:line` for a key of the YAML file."""
    from preftune.config.settings import did_you_mean
    from preftune.config.stages import CONFIGS

    argv = [" ".join(argv[:2]), *argv[2:]] if " ".join(argv[:2]) in CONFIGS else argv
    stage = argv[0]
    if stage not in CONFIGS:
        hint = did_you_mean(stage, [*CONFIGS, "env"]) or f"; stages: {', '.join([*CONFIGS, 'env'])}"
        raise ConfigError(f"unknown stage {stage}{hint}")
    config = CONFIGS[stage]
    parser = _parser(stage, config)
    found, unknown = parser.parse_known_args([_underscored(argument) for argument in argv[1:]])
    flags: dict[str, Any] = vars(found)
    if config.arguments and (bare := tuple(argument for argument in unknown if not argument.startswith("-"))):
        key, shown = config.arguments
        if key in flags:
            raise ConfigError(f"{key} is given twice, as --{key} and as {' '.join(bare)}; name each {shown} once")
        flags[key], unknown = bare, [argument for argument in unknown if argument not in bare]
    if unknown:
        name = unknown[0].removeprefix("--").partition("=")[0]
        switch = name.removeprefix("no_")
        hint = f"; write --{switch} false" if switch in config.model_fields else did_you_mean(name, config.model_fields)
        what = "unknown option" if unknown[0].startswith("-") else "unexpected argument"
        raise ConfigError(f"{what} {unknown[0]}{hint or f'; see preftune {stage} --help'}")
    values, origins = _read_yaml(flags.pop("config")) if "config" in flags else ({}, {})
    context = {key: origin for key, origin in origins.items() if key not in flags}
    return stage, config.model_validate({**values, **flags}, context=context)


def _read_yaml(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The scalars of a flat YAML mapping, and where each key stands (`file:line`)."""
    import yaml

    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}:{root.start_mark.line + 1}: expected lines of `key: value`")
        for key_node, value_node in root.value if root else ():
            key, origin = str(key_node.value).replace("-", "_"), f"{path}:{key_node.start_mark.line + 1}"
            if not isinstance(value_node, yaml.ScalarNode):
                raise ConfigError(f"{origin}: {key} takes one value, not a list or a mapping")
            if key in values:
                raise ConfigError(f"{origin}: {key} is given twice, first at {origins[key]}")
            values[key], origins[key] = loader.construct_object(value_node), origin
    except OSError as problem:
        raise ConfigError(f"cannot read {path}: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read {path}: it is not UTF-8 text") from None
    except yaml.MarkedYAMLError as problem:
        line = f":{problem.problem_mark.line + 1}" if problem.problem_mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {problem.problem}") from None
    return values, origins


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _parser(stage: str, config: type[Settings]) -> argparse.ArgumentParser:
    """Flags from the config's fields, grouped by its sections; values stay text, the config converts them."""
    from preftune.config.stages import sections

    bare = f"{config.arguments[1]} [{config.arguments[1]} ...] " if config.arguments else ""
    parser = _Parser(
        prog=f"preftune {stage}",
        description=f"preftune {stage}: {STAGES[stage]}.",
        usage=f"preftune {stage} {bare}[--config FILE.yaml] [--key value | --key=value | --switch] ...",
        epilog="Keys are the same in the YAML file; flags win. A switch is --key, --key true or --key false.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=_width()),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below")
    for title, keys in sections(config).items():
        group = parser.add_argument_group(title)
        for key in keys:
            help_text = _help(config, key).replace("%", "%%")
            if config.model_fields[key].annotation is bool:
                group.add_argument(f"--{key}", nargs="?", const="true", metavar="BOOL", help=help_text)
            else:
                group.add_argument(f"--{key}", metavar=_metavar(config, key), help=help_text)
    return parser


def _help(config: type[Settings], key: str) -> str:
    """Description with unit, what may be chosen, the default."""
    names = config.choices(key)
    one_of = f"; one of {', '.join(names)}" if names else ""
    return f"{config.model_fields[key].description}{one_of} ({config.default_text(key)})"


def _metavar(config: type[Settings], key: str) -> str:
    annotation = config.model_fields[key].annotation
    if config.choices(key):
        return "NAME"
    return "N" if annotation in (int, int | None) else "X" if annotation in (float, float | None) else "TEXT"


def _underscored(argument: str) -> str:
    """`--eval-data=x-y` -> `--eval_data=x-y`: only the name of a long option is touched."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _width() -> int:
    """Columns of help: the terminal's, between 80 and 120."""
    import shutil

    return max(80, min(120, shutil.get_terminal_size().columns))


def _overview() -> str:
    import textwrap

    wide = max(map(len, STAGES)) + 4
    wrapped = textwrap.TextWrapper(_width(), subsequent_indent=" " * wide, break_on_hyphens=False)
    stages = "\n".join(wrapped.fill(f"  {name:<{wide - 2}}{text}") for name, text in [*STAGES.items(), ("env", _ENV)])
    return f"""preftune {__version__}: align causal language models with preferences

usage: preftune STAGE [--config FILE.yaml] [--key value ...]
       preftune STAGE --help      keys, units and defaults of one stage
       preftune --version

stages:
{stages}"""


def _print_environment(arguments: list[str]) -> None:
    """`preftune env`: one `name: value` per line."""
    if arguments:
        raise ConfigError(f"env takes no arguments, found {' '.join(arguments)}")
    from preftune.engine.host import describe

    found = describe()
    for name, value in (found["versions"] | found["host"] | {"git_commit": found["git_commit"]}).items():
        print(f"{name}: {value}")
