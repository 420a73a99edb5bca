"""What the numbers of run folders mean: names, units, how they are printed, and what is drawn with what."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["COURSES", "MEANINGS", "Course", "Meaning", "meaning_of", "number"]


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """A number in words."""

    label: str
    meaning: str = ""
    unit: str = ""
    signed: bool = False
    percent: bool = False


MEANINGS: Mapping[str, Meaning] = {
    "reward_gain": Meaning(label="Reward gain", meaning="after minus before, paired by prompt", signed=True),
    "reward_before": Meaning(label="Reward before", meaning="mean true reward of the starting policy's answers"),
    "reward_after": Meaning(label="Reward after", meaning="mean true reward of the trained policy's answers"),
    "reward": Meaning(label="Reward", meaning="mean over answers"),
    "reward_difference": Meaning(label="Reward, less the reference's", meaning="paired by prompt", signed=True),
    "win_rate": Meaning(
        label="Win rate",
        meaning="held-out prompts where the answer after has more reward; a tie counts half",
        percent=True,
    ),
    "rate": Meaning(label="Win rate", meaning="a tie counts half", percent=True),
    "kl": Meaning(
        label="KL from the start",
        meaning="KL(policy || reference) per answer, from the policy's own answers",
        unit="nats",
    ),
    "accuracy": Meaning(
        label="Accuracy", meaning="held-out pairs whose chosen response has the larger reward", percent=True
    ),
    "reward_margin": Meaning(label="Margin", meaning="reward, chosen minus rejected, held-out pairs", signed=True),
    "loss": Meaning(label="Loss", meaning="on held-out data", unit="nats"),
    "perplexity": Meaning(label="Perplexity", meaning="per completion token, on held-out data"),
    "length_before": Meaning(label="Length before", meaning="mean length of the answers", unit="words"),
    "length_after": Meaning(label="Length after", meaning="mean length of the answers", unit="words"),
    "truth": Meaning(label="Truth", meaning="mean of the second scorer over answers"),
    "truth_difference": Meaning(label="Truth, less the reference's", meaning="paired by prompt", signed=True),
    "kl_per_token": Meaning(label="KL per token", unit="nats"),
    "k1": Meaning(label="KL by its log-ratio (k1)", unit="nats"),
    "forward_kl": Meaning(label="KL(reference || model)", unit="nats"),
    "forward_k1": Meaning(label="KL(reference || model), k1", unit="nats"),
    "kl_at_most": Meaning(label="KL at most", meaning="log n - (n - 1)/n", unit="nats"),
    "chosen_log_ratio": Meaning(label="Log-ratio of chosen", unit="nats", signed=True),
    "rejected_log_ratio": Meaning(label="Log-ratio of rejected", unit="nats", signed=True),
    "implicit_accuracy": Meaning(label="Pairs ranked as labelled", percent=True),
    "finished": Meaning(label="Finished", meaning="answers that ended by themselves", percent=True),
    "tokens": Meaning(label="Length", meaning="tokens per answer", unit="tokens"),
    "distinct": Meaning(label="Different runs of three words", meaning="of all in an answer", percent=True),
    "loop": Meaning(label="With a loop", meaning="a piece three times in a row", percent=True),
    "repeated": Meaning(label="Said before", meaning="to the same prompt, word for word", percent=True),
    "said_elsewhere": Meaning(label="Said to another prompt", meaning="word for word", percent=True),
    "ece": Meaning(label="Calibration error", meaning="of the chance that the better scored response wins"),
    "brier": Meaning(
        label="Brier score", meaning="mean squared error of the chance of what was said; 1/4 is ignorance"
    ),
    "longest_wins": Meaning(
        label="Longest wins", meaning="accuracy of always preferring the longer response", percent=True
    ),
}
"""Key of a result -> what it means; those known come first, in this order."""


SHARES = (
    "bootstrap",
    "confidence",
    "raw",
    "when_first",
    "when_second",
    "wilson",
)
"""Shares without a meaning of their own."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """A panel over steps: metrics drawn together, key -> label, and the levels to compare with."""

    title: str
    keys: Mapping[str, str]
    lines: Mapping[str, float] = field(default_factory=dict)
    about: str = ""


COURSES: tuple[Course, ...] = (
    Course(title="reward per answer", keys={"reward": "reward"}),
    Course(title="KL(policy || reference) per answer, nats", keys={"kl": "KL"}, lines={"start": 0.0}),
    Course(title="loss, nats", keys={"loss": "loss"}),
    Course(title="accuracy: chosen above rejected", keys={"accuracy": "accuracy"}, lines={"chance": 0.5}),
    Course(title="margin: reward of chosen less rejected", keys={"reward_margin": "margin"}, lines={"none": 0.0}),
    Course(
        title="displacement: log-prob, change from the reference, nats",
        keys={"logp_chosen_change": "chosen", "logp_rejected_change": "rejected"},
        lines={"reference": 0.0},
        about="Both may fall while their difference grows; what falls is given to answers that are in no pair.",
    ),
    Course(title="reward of both sides", keys={"reward_chosen": "chosen", "reward_rejected": "rejected"}),
    Course(
        title="reward of labelled answers", keys={"reward_desirable": "desirable", "reward_undesirable": "undesirable"}
    ),
    Course(title="length of answers, tokens", keys={"length": "length"}),
    Course(title="length of both sides, tokens", keys={"length_chosen": "chosen", "length_rejected": "rejected"}),
    Course(
        title="fall of the log-prob of all responses, nats",
        keys={"kl_from_data": "fall"},
        about="Estimates KL(reference || policy) where the reference itself wrote the responses.",
    ),
    Course(
        title="accuracy by the size of the margin",
        keys={
            f"accuracy_margin_{i}": f"{name} quarter" for i, name in enumerate(("1st", "2nd", "3rd", "4th"), start=1)
        },
        lines={"chance": 0.5},
        about="Quarters of the absolute margin, the least decided pairs first.",
    ),
    Course(
        title="accuracy by length",
        keys={
            "accuracy_chosen_longer": "chosen longer",
            "accuracy_chosen_shorter": "chosen shorter",
            "accuracy_same_length": "equal",
        },
        lines={"chance": 0.5},
    ),
    Course(title="gradient weight", keys={"gradient_weight": "weight"}),
    Course(title="gradient norm before clipping", keys={"grad_norm": "norm"}),
    Course(title="learning rate", keys={"lr": "lr"}),
)
"""The panels of a stage in their order; metrics that stand in none get one of their own after them."""


def meaning_of(key: str) -> Meaning:
    """Of a result by the last part of its key; what is unknown is called by its key."""
    known = MEANINGS.get(key.rpartition(".")[2])
    above = key.rpartition(".")[0]
    if known is None:
        label = re.sub(r"\b(kl|ece)\b", lambda found: found[0].upper(), key.replace("_", " ").replace(".", ", "))
        share = key in SHARES or key.startswith("accuracy")
        return Meaning(label=label[:1].upper() + label[1:], percent=share)
    return known if not above else Meaning(**{**vars(known), "label": f"{above.replace('.', ', ')}: {known.label}"})


def number(value: float, meaning: Meaning | None = None) -> str:
    """Three significant digits, thousands with commas, no exponent for everyday sizes."""
    if meaning is not None and meaning.percent and not isinstance(value, int):  # a whole number is a count
        return f"{100 * value:.1f} %"
    if isinstance(value, int):
        text = f"{value:,}"
    elif value == 0 or not math.isfinite(value) or not 1e-4 <= abs(value) < 1e6:
        text = f"{value:.3g}"
    else:
        text = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return f"+{text}" if meaning is not None and meaning.signed and value > 0 else text
