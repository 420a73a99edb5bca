"""The curves of every loss, by its own functions with its default knobs: its value, and how hard it pulls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plots import Line, Panel, svg
from preftune.equations.contract import BoundLoss, Inputs
from preftune.equations.losses import LOSSES
from preftune.tensors import LabelledLogps, ListLogps, PairLogps

POINTS = 181
Case = Callable[[Tensor], Inputs]
"""x [T], float64 -> T rows."""


@dataclass(frozen=True)
class Scene:
    """What is varied, from where to where, and what the rows look like then; one colour per case."""

    label: str
    low: float
    high: float
    cases: Mapping[str, Case]
    state: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Case -> what the loss remembers, where not its beginning."""


def pair_rows(a: Tensor, b: Tensor, *, n_w: float = 100, n_l: float = 100, reference: float = 0.0, **more: Any) -> Any:
    """T pairs with log-ratios a and b; `reference` is log pi_ref of every response; `more` as in `PairLogps`."""
    one = torch.ones_like(a)
    filled = {name: one * value for name, value in more.items()}
    return PairLogps(a + reference, b + reference, a, b, one * n_w, one * n_l, one, **filled)


def gap(reach: float, lower: float = 0.0, *, low: float | None = None) -> Scene:
    """The gap D, opened from both sides alike; `lower`: and once more with both log-ratios so many nats lower."""
    cases: dict[str, Case] = {"a = D/2, b = -D/2" * (lower > 0): lambda x: pair_rows(x / 2, -x / 2)}
    if lower:
        cases[f"both {lower:g} nats lower"] = lambda x: pair_rows(x / 2 - lower, -x / 2 - lower)
    return Scene("D, nats", -reach if low is None else low, reach, cases)


def gap_with(reach: float, cases: Mapping[str, Mapping[str, float]]) -> Scene:
    """The gap D for several values of what else the loss reads."""
    rows = {name: _with(more) for name, more in cases.items()}
    return Scene("D, nats", -reach, reach, rows)


def _with(more: Mapping[str, float]) -> Case:
    return lambda x: pair_rows(x / 2, -x / 2, **more)


def means(label: str, reach: float, *, low: float | None = None) -> Scene:
    """A gap between two means per token, responses of 50 and 100 tokens, as opened from -1.5 nats per token."""
    case: dict[str, Case] = {
        "n_w = 50, n_l = 100": lambda x: pair_rows(50 * x / 2, -100 * x / 2, n_w=50, n_l=100),
    }
    return Scene(label, -reach if low is None else low, reach, case)


def mean_logps(reach: float) -> Scene:
    def rows(x: Tensor) -> Any:
        return pair_rows(50 * (x / 2 - 1.5), 100 * (-x / 2 - 1.5), n_w=50, n_l=100)

    label = "p_w - p_l, nats per token"
    return Scene(label, -reach, reach, {"n_w = 50, n_l = 100, (p_w + p_l) / 2 = -1.5": rows})


def sums(reach: float, n: float = 100) -> Scene:
    def rows(x: Tensor) -> Any:
        return pair_rows(x / 2 - 1.5 * n, -x / 2 - 1.5 * n, n_w=n, n_l=n)

    return Scene("l_w - l_l, nats", -reach, reach, {f"n = {n:g}, (l_w + l_l) / 2 = {-1.5 * n:g}": rows})


def ranking(reach: float) -> Scene:
    """Three responses, scores 3, 2, 1; the best one's log-ratio varies, the others' are 0."""

    def rows(x: Tensor) -> ListLogps:
        zero, like = torch.zeros_like(x), torch.ones_like(x)[:, None]
        ratios = torch.stack([x, zero, zero], 1)
        rank, score = torch.tensor([1, 2, 3]), torch.tensor([3.0, 2.0, 1.0])
        return ListLogps(ratios, ratios, like * 100, (like * rank).long(), like * score, like[:, 0])

    return Scene("log-ratio of y_1, nats", -reach, reach, {"": rows})


def labelled(reach: float, other: str, changed: Mapping[str, float]) -> Scene:
    """A desirable and an undesirable response; `changed` is z0 of KTO or the shift of BCO, once more."""

    def rows(desirable: bool, z0: float = 0.0) -> Case:
        def build(x: Tensor) -> LabelledLogps:
            one = torch.ones_like(x)
            return LabelledLogps(x, x, one * 100, torch.full_like(x, desirable).bool(), one, one[:1] * z0)

        return build

    z0 = changed.get("z0", 0.0)
    cases = {"desirable": rows(True), "undesirable": rows(False), f"desirable, {other}": rows(True, z0)}
    state = {} if z0 else {f"desirable, {other}": changed}
    return Scene("log-ratio r, nats", -reach, reach, cases, state)


def among_others(others: Tensor, reference: Tensor) -> Case:
    """One pair with D = x in a step with four more: rows of all steps, each step five rows, the first one shown."""

    def build(x: Tensor) -> Any:
        a, b = torch.cat([x, others]), torch.zeros(1 + len(others), dtype=x.dtype)
        whole = pair_rows(a, b)
        chosen = torch.cat([torch.zeros_like(x), reference]) + a
        return PairLogps(chosen, b, a, b, whole.chosen_length, whole.rejected_length, whole.weight)

    return build


_OTHERS = torch.tensor([-200.0, -100.0, 100.0, 200.0], dtype=torch.float64)
_STATE = {"d = 0": 0.0, "d = 2": 2.0, "d = -2": -2.0}

SCENES: Mapping[str, Scene] = {
    **{name: gap(60.0) for name in ("dpo", "cdpo", "robust")},
    "ipo": gap(20.0, low=-10.0),
    "ipo_average": means("a/n_w - b/n_l, nats per token", 1.5, low=-0.5),
    "hinge": gap(60.0, low=-40.0),
    "exo": gap(120.0, low=-60.0),
    "discopop": gap(30.0),
    "rdpo": gap_with(60.0, {f"n_w - n_l = {d:g}": {"n_w": 100 + d} for d in (0, 40, -40)}),
    "odpo": gap_with(60.0, {f"g = {g:g}": {"score_gap": g} for g in (1, 10, 0.1)}),
    "margin_dpo": gap_with(60.0, {f"g = {g:g}": {"score_gap": g} for g in (0, 1, 3)}),
    "dpop": gap(8.0, 0.5, low=-2.0),
    "xpo": gap(60.0),
    "sppo": gap(1500.0, 250.0),
    "cal_dpo": gap(1000.0, 125.0),
    "nca": gap(600.0, 100.0),
    "apo_zero": gap(80.0, 20.0),
    "apo_down": gap(80.0, 20.0),
    "fdpo_forward_kl": gap(8.0, 1.0),
    "fdpo_js": gap(60.0, 5.0),
    "fdpo_alpha": gap(12.0, 2.0),
    "chipo": gap(8.0, 2.0),
    "ln_dpo": means("a/n_w - b/n_l, nats per token", 1.2),
    **{
        name: gap_with(
            60.0,
            {f"K_l - K_w = {k:g}": {"chosen_divergence": 20.0, "rejected_divergence": 20.0 + k} for k in (0, 20, -20)},
        )
        for name in ("tdpo1", "tdpo2")
    },
    "wpo": gap_with(
        600.0, {f"A_w + A_l = {s:g}": {"chosen_alignment": s / 2, "rejected_alignment": s / 2} for s in (0, -1, -3)}
    ),
    "ld_dpo": Scene(
        "D, nats",
        -60.0,
        60.0,
        {
            text: lambda x, share=share: pair_rows(
                x / 2, -x / 2, chosen_shared_log_ratio=share * x / 2, rejected_shared_log_ratio=-share * x / 2
            )
            for text, share in (("all of D on shared tokens", 1.0), ("half of it", 0.5), ("none", 0.0))
        },
    ),
    **{name: mean_logps(2.5) for name in ("simpo", "alphapo", "orpo", "nll")},
    **{name: sums(60.0) for name in ("cpo", "unlikelihood")},
    "slic_hf": sums(4.0, n=4),
    **{name: ranking(60.0) for name in ("plackett_luce", "exo_list")},
    "lipo": ranking(120.0),
    **{name: ranking(600.0) for name in ("infonca", "nca_list")},
    "aot": Scene(
        "D of one pair in a step of five, nats",
        -600.0,
        600.0,
        {
            "pi_ref has one gap": among_others(_OTHERS, torch.zeros_like(_OTHERS)),
            "pi_ref's gaps are -200 to 200": among_others(torch.zeros_like(_OTHERS), _OTHERS),
        },
    ),
    "aot_unpaired": Scene(
        "a of one response in a step of five pairs, nats",
        -600.0,
        600.0,
        {
            "all b = 0": among_others(_OTHERS, torch.zeros_like(_OTHERS)),
        },
    ),
    "beta_dpo": Scene(
        "D of every pair of the step, nats",
        -60.0,
        60.0,
        {name.replace("d =", "M_0 ="): lambda x: pair_rows(x / 2, -x / 2) for name in _STATE},
        {name.replace("d =", "M_0 ="): {"threshold": d, "spread": 1.0, "step": 1.0} for name, d in _STATE.items()},
    ),
    "bco_pair": Scene(
        "D, nats",
        -60.0,
        60.0,
        {name: lambda x: pair_rows(x / 2, -x / 2) for name in _STATE},
        {name: {"reward_sum": d, "reward_count": 1.0} for name, d in _STATE.items()},
    ),
    "kto": labelled(80.0, "z0 = 20", {"z0": 20.0}),
    "bco": labelled(80.0, "d = 2", {"reward_sum": 2.0, "reward_count": 1.0}),
}
"""One per loss."""


def figure(name: str) -> str:
    """The SVG of a loss."""
    scene, loss = SCENES[name], LOSSES[name].bind()
    x = torch.linspace(scene.low, scene.high, POINTS, dtype=torch.float64)
    values, weights, two_sided = [], [], False
    for colour, (case, rows) in enumerate(scene.cases.items()):
        value, pulls = evaluate(loss, rows, x, scene.state.get(case))
        values.append(Line(value.tolist(), colour))
        if loss.loss.reads is ListLogps:
            weights += [Line(pull.tolist(), i) for i, pull in enumerate(pulls)]
            continue
        weights.append(Line(pulls[0].tolist(), colour))
        if len(pulls) == 2 and not torch.equal(pulls[0], pulls[1]):
            two_sided = True
            weights.append(Line(pulls[1].tolist(), colour, dashed=True))
    about = "weight w_c, dashed w_r" if two_sided else "weight w_c = w_r"
    legend = [case for case in scene.cases if case]
    if loss.loss.reads is ListLogps:
        about, legend = "weight of each response", ["y_1, the best", "y_2", "y_3"]
    elif loss.loss.reads is LabelledLogps:
        about = "weight, > 0 pulls up"
    panels = [Panel("loss, nats", values), Panel(about, weights)]
    return svg(f"{name}: loss and gradient weights over {scene.label}", scene.label, x.tolist(), panels, legend)


def evaluate(
    loss: BoundLoss, rows: Case, x: Tensor, state: Mapping[str, float] | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(values [T], weights, each [T]) at every x; of a coupled loss one step per x, its first row."""
    if loss.loss.coupled and loss.loss.reads is PairLogps:
        steps = [rows(one) for one in x.split(1)]
        pulls = [loss.weights(step, state) for step in steps]
        value = torch.stack([loss.values(step, state)[0] for step in steps])
        return value, tuple(torch.stack([pull[side][0] for pull in pulls]) for side in (0, 1))
    inputs = rows(x)
    pulls = loss.weights(inputs, state)
    if isinstance(pulls, Tensor):
        pulls = tuple(pulls.T) if pulls.ndim == 2 else (pulls,)
    return loss.values(inputs, state), pulls
