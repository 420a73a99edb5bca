"""The results of an evaluation on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from preftune.recipes.comparison_configs import EvaluateConfig
from preftune.records import RunCard

__all__ = ["show"]

WIDTH = 132  # columns of the table: a narrower terminal breaks its lines, no number is cut
MODELS = (
    ("reward", "reward"), ("reward_difference", "less reference"), ("kl", "KL to reference"), ("k1", "k1"),
    ("forward_kl", "KL from reference"), ("tokens", "tokens"), ("finished", "finished"), ("loop", "loops"),
)  # fmt: skip


def show(card: RunCard, cfg: EvaluateConfig) -> None:
    """Models, win rates and findings on standard output."""
    results = card.results
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, WIDTH)
    sampler = f"temperature {cfg.temperature:g}, top_p {cfg.top_p:g}, at most {cfg.max_tokens} tokens, seed {cfg.seed}"
    title = f"{results['prompts']} prompts, {cfg.n} responses each, {sampler}; 95 % intervals over prompts"
    columns = [(key, head) for key, head in MODELS if any(key in model for model in results["models"].values())]
    table = Table("model", *(head for _, head in columns), title=title)
    for name, model in results["models"].items():
        reference = " (reference)" if name == results["reference"] else ""
        table.add_row(f"{name}{reference}", *(interval(model.get(key)) for key, _ in columns))
    console.print(table)
    for rate in results.get("win_rates", ()):
        console.print(
            f"{rate['one']} against {rate['other']}: {interval(rate['rate'])} won by {', '.join(rate['judges'])}; "
            f"{rate['wins']} wins, {rate['ties'] + rate['both_bad']} ties, {rate['losses']} losses, "
            f"{rate['skips']} without verdict",
            soft_wrap=True,
        )


def interval(number: Mapping[str, Any] | None) -> str:
    """`0.52 [0.41, 0.63]`, `-` where there is none."""
    if number is None or number["n"] == 0:
        return "-"
    low, high = (float(number[end]) for end in ("low", "high"))
    return f"{float(number['estimate']):.3g} [{low:.3g}, {high:.3g}]"
