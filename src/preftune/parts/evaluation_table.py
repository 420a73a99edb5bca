"""The results of an evaluation on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from preftune.config.comparison import EvaluateConfig
from preftune.records import RunCard

__all__ = ["show"]

WIDTH = 132  # columns of the table: a narrower terminal breaks its lines, no number is cut
ROWS = (
    ("reward", "reward"),
    ("reward_difference", "reward less that of the reference"),
    ("truth", "truth"),
    ("truth_difference", "truth less that of the reference"),
    ("kl", "KL(model || reference), nats"),
    ("kl_per_token", "the same per token"),
    ("k1", "the same by k1"),
    ("forward_kl", "KL(reference || model), nats"),
    ("chosen_log_ratio", "log-ratio of chosen, nats"),
    ("rejected_log_ratio", "log-ratio of rejected, nats"),
    ("implicit_accuracy", "pairs ranked as labelled"),
    ("tokens", "tokens"),
    ("characters", "characters"),
    ("finished", "finished"),
    ("distinct", "distinct runs of three words"),
    ("loop", "with a loop"),
    ("repeated", "said before"),
    ("said_elsewhere", "said to another prompt"),
)
"""Key of a model's results, and what it is called."""


def show(card: RunCard, cfg: EvaluateConfig) -> None:
    """Models, win rates and findings on standard output."""
    results = card.results
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, WIDTH)
    sampler = f"temperature {cfg.temperature:g}, top_p {cfg.top_p:g}, at most {cfg.max_tokens} tokens, seed {cfg.seed}"
    title = f"{results['prompts']} prompts, {cfg.n} responses each, {sampler}; 95 % intervals over prompts"
    models: Mapping[str, Any] = results["models"]
    heads = [f"{name} (reference)" if name == results["reference"] else name for name in models]
    table = Table("mean or share", *heads, title=title)
    for key, said in ROWS:
        if any(model.get(key) is not None for model in models.values()):
            table.add_row(said, *(interval(model.get(key)) for model in models.values()))
    console.print(table)
    if len(anchor := results.get("best_of_n", ())) > 1:
        for name in (name for name in ("reward", "truth") if name in anchor[0]):
            best = ", ".join(
                f"{one['n']}: {interval(one[name])} at KL <= {one['kl_at_most']:.3g} nats" for one in anchor
            )
            chosen = "" if name == "reward" else " when reward chooses"
            console.print(f"best of n of {results['reference']}, {name}{chosen}: {best}", soft_wrap=True)
    at_equal_length = {(one["one"], one["other"]): one for one in results.get("length_controlled", ())}
    for rate in results.get("win_rates", ()):
        console.print(
            f"{rate['one']} against {rate['other']}: {interval(rate['rate'])} won by {', '.join(rate['judges'])}; "
            f"{rate['wins']} wins, {rate['ties'] + rate['both_bad']} ties, {rate['losses']} losses, "
            f"{rate['skips']} without verdict",
            soft_wrap=True,
        )
        if controlled := at_equal_length.get((rate["one"], rate["other"])):
            warnings = "".join(f"; {warning}" for warning in controlled["warnings"])
            console.print(f"  at equal length {interval(controlled['rate'])}{warnings}", soft_wrap=True)
    for line in dict.fromkeys([*results.get("noise", ()), *results.get("needed", ())]):
        console.print(f"  {line}", soft_wrap=True)
    if board := results.get("leaderboard"):
        _show_board(console, board)
    if pairs := results.get("calibration", {}).get("pairs"):
        numbers = ", ".join(f"{name} {interval(pairs[name])}" for name in ("accuracy", "longest_wins", "brier", "ece"))
        console.print(f"{cfg.reward} on {pairs['pairs']} held-out pairs: {numbers}", soft_wrap=True)
    for finding in results.get("findings", ()):
        console.print(
            f"{finding['name']} ({finding['model']}): {finding['verdict']}. {finding['sentence']}", soft_wrap=True
        )

    for name, tasks in results.get("lm_eval", {}).items():
        for task, metrics in tasks.items():
            told = ", ".join(f"{metric} {interval(number)}" for metric, number in metrics.items())
            console.print(f"{name} on {task}: {told}", soft_wrap=True)


def _show_board(console: Console, board: Mapping[str, Any]) -> None:
    table = Table("model", "rating", "rank", "won", "verdicts", title=f"Bradley-Terry ratings, {board['anchor']} fixed")
    for standing in board["standings"]:
        rating, rank = interval(standing["rating"]), interval(standing["rank"])
        table.add_row(standing["model"], rating, rank, f"{standing['rate']:.2f}", str(standing["verdicts"]))
    console.print(table)
    for warning in board["warnings"]:
        console.print(warning, soft_wrap=True)


def interval(number: Mapping[str, Any] | None) -> str:
    """`0.52 [0.41, 0.63]`, `-` where there is none."""
    if number is None or number["n"] == 0:
        return "-"
    low, high = (float(number[end]) for end in ("low", "high"))
    return f"{float(number['estimate']):.4g} [{low:.4g}, {high:.4g}]"
