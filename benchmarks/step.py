"""How much does one DPO step cost, in CPU seconds and peak memory: here, in TRL and in a plain padded loop?

    python benchmarks/step.py                                        # HH, preftune and TRL tuned, one round
    python benchmarks/step.py --profiles hh ultrafeedback tldr long --contenders all --rounds 3 --out DIR

Per length profile one model folder (64M-parameter Llama shape, random weights), one file of pairs, one dtype. Every
contender (`step_contenders.py`) runs in its own process, in turn, so that a slow spell of the machine hits everybody;
after two passes over the pairs the others are measured, medians over rounds are told. CPU seconds (`process_time`, all
threads) are compared, so that neighbours on the machine count little; peak memory is the process's largest resident
set. The share of the limit is `limit.py`'s arithmetic over the rate of plain matrix products, measured between the
contenders.

First all contenders train a small model in float32 on the same pairs: their losses must agree, or the run stops.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from limit import Lengths, limit_flops, unique_tokens
from step_contenders import CONTENDERS
from step_work import PROFILES, SHAPE, WARM, prepare

HERE = Path(__file__).resolve().parent
PARITY = 2e-4
"""Largest difference of two contenders' float32 losses at the same step, nats."""
COLUMNS = (
    ("contender", "{}"), ("pairs / CPU s", "{:.3g}"), ("CPU s / pair", "{:.3g}"), ("wall s / pair", "{:.3g}"),
    ("unique tokens / CPU s", "{:.0f}"), ("share of the limit", "{:.0%}"), ("peak memory, GB", "{:.2f}"),
    ("preftune is faster by", "x{:.1f}"), ("preftune's memory", "{:.2f}"),
)  # fmt: skip


def main() -> None:
    args = parse()
    names = CONTENDERS if args.contenders == ["all"] else tuple(args.contenders)
    profiles = {}
    for profile in args.profiles:
        with tempfile.TemporaryDirectory() as folder:
            profiles[profile] = measure(profile, names, Path(folder), args)
        report(profiles, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", nargs="+", default=["hh"], choices=list(PROFILES))
    parser.add_argument("--contenders", nargs="+", default=["preftune", "trl-tuned"], choices=[*CONTENDERS, "all"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--pairs", type=int, help="pairs measured, a multiple of the step's; default by profile")
    parser.add_argument("--passes", type=int, default=WARM + 1, help=f"over the pairs, the first {WARM} not measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--parity", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", default=str(HERE / "results"), help="folder of step-PROFILE.json and step.md")
    args = parser.parse_args()
    if args.passes <= WARM:
        parser.error(f"--passes {args.passes}: the first {WARM} are not measured, so at least {WARM + 1}")
    return args


def measure(profile: str, names: tuple[str, ...], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one profile, checked for parity first."""
    data, lengths = prepare(folder, profile, pairs=args.pairs, passes=args.passes, dtype=args.dtype)
    parity = check_parity(profile, names, folder / "parity", args) if args.parity else None
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in (*names, "gemm")}
    for _ in range(args.rounds):
        for name in rounds:
            rounds[name].append(run_child(name, folder / "timed", args))
            print(f"{profile:14} {name:12} {told(rounds[name][-1])}", file=sys.stderr, flush=True)
    gemm = statistics.median(r["gemm_gflop_per_cpu_second"] for r in rounds.pop("gemm"))
    rows = {name: summary(results, lengths, gemm * 1e9) for name, results in rounds.items()}
    return {"data": data, "parity": parity, "gemm_gflop_per_cpu_second": gemm, "contenders": rows, "rounds": rounds}


def run_child(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet |= {"HF_HOME": str(folder / "hub"), "PREFTUNE_CACHE": str(folder / "cache")}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": str(args.threads)}
    command = [sys.executable, str(HERE / "step_contenders.py"), name, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def told(result: dict[str, Any]) -> str:
    if "gemm_gflop_per_cpu_second" in result:
        return f"{result['gemm_gflop_per_cpu_second']:.0f} GFLOP / CPU s"
    return f"{result['pairs'] / result['cpu_seconds']:.3g} pairs / CPU s, {result['peak_gb']:.2f} GB"


def check_parity(profile: str, names: tuple[str, ...], folder: Path, args: argparse.Namespace) -> float | None:
    """Largest difference of losses over all steps and contenders, float32; the trajectory must have moved."""
    losses = {name: run_child(name, folder, args)["losses"] for name in names}
    by_step = list(zip(*losses.values(), strict=True))
    moved = max(max(own) - min(own) for own in losses.values())
    assert moved > 0.01, f"{profile}: the losses hardly move, {losses}: agreement means nothing"
    largest = max(max(step) - min(step) for step in by_step)
    assert largest <= PARITY, f"{profile}: losses differ by {largest:.2g}: {losses}"
    print(f"{profile:14} float32 losses agree to {largest:.1g} and move by {moved:.2g}", file=sys.stderr, flush=True)
    return largest


def summary(results: list[dict[str, Any]], lengths: list[Lengths], gemm: float) -> dict[str, float]:
    """Medians over the rounds; memory is the largest."""
    per_pair = statistics.median(r["cpu_seconds"] / r["pairs"] for r in results)
    return {
        "pairs_per_cpu_second": 1 / per_pair,
        "cpu_seconds_per_pair": per_pair,
        "wall_seconds_per_pair": statistics.median(r["wall_seconds"] / r["pairs"] for r in results),
        "unique_tokens_per_cpu_second": unique_tokens(lengths) / len(lengths) / per_pair,
        "share_of_limit": limit_flops(lengths, SHAPE) / len(lengths) / per_pair / gemm,
        "peak_gb": max(r["peak_gb"] for r in results),
    }


# The answer ----------------------------------------------------------------------------------------------------


def report(profiles: dict[str, Any], args: argparse.Namespace) -> None:
    """One JSON file per profile; `step.md` is the table of all that lie in the folder."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("preftune", "torch", "transformers", "trl")}
    for name, found in profiles.items():
        settings = {"dtype": args.dtype, "rounds": args.rounds, "passes": args.passes, "shape": asdict(SHAPE)}
        hardware = {"processor": processor(), "threads": args.threads, "load": round(os.getloadavg()[1], 1)}
        facts = {"versions": versions | {"python": platform.python_version()}, "hardware": hardware}
        facts |= {"settings": settings, **found}
        (out / f"step-{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    kept = {name: out / f"step-{name}.json" for name in PROFILES}
    text = markdown({name: json.loads(path.read_text()) for name, path in kept.items() if path.exists()})
    (out / "step.md").write_text(text)
    print(text)


def markdown(profiles: dict[str, Any]) -> str:
    lines = ["# One DPO step, per length profile", "", "Made by `benchmarks/step.py`, which says how.", ""]
    for name, facts in profiles.items():
        data, rows, versions, settings = (facts[key] for key in ("data", "contenders", "versions", "settings"))
        mean = data["mean_tokens"]
        own = rows.get("preftune")
        lines += [
            f"**{name}**: {data['pairs']} pairs, {data['batch']} a step, {mean['prompt']:g} prompt and "
            f"{mean['chosen']:g} / {mean['rejected']:g} answer tokens, {data['source']}. "
            f"{settings['dtype']}, {settings['rounds']} round(s) of {settings['passes']} passes, "
            f"{facts['hardware']['threads']} thread of {facts['hardware']['processor']} at load "
            f"{facts['hardware']['load']}, plain products {facts['gemm_gflop_per_cpu_second']:.0f} GFLOP per "
            f"CPU second; torch {versions['torch']}, transformers {versions['transformers']}, TRL {versions['trl']}.",
            "",
            "| " + " | ".join(title for title, _ in COLUMNS) + " |",
            "|" + "---|" * len(COLUMNS),
        ]
        for contender, row in rows.items():
            cells: list[Any] = [contender, *row.values()]
            if own:
                cells += [row["cpu_seconds_per_pair"] / own["cpu_seconds_per_pair"], own["peak_gb"] / row["peak_gb"]]
            shown = [form.format(cell) for (_, form), cell in zip(COLUMNS, cells, strict=False)]
            lines.append("| " + " | ".join(shown + [""] * (len(COLUMNS) - len(shown))) + " |")
        lines.append("")
    return "\n".join(lines)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
