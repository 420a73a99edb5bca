"""Studies that flatter a method: points where none were reached, exchanged sides, results of another setting."""

from __future__ import annotations

from fault import Fault

_FRONTIER = "src/preftune/evaluation/frontier.py"
_STUDY = "src/preftune/recipes/study.py"
_WORLD = "src/preftune/studies/world.py"
_RL = "src/preftune/studies/rl.py"
_METHODS = "src/preftune/studies/frontier.py"
_LAW = "src/preftune/theory/enumerable.py"
_CLAIMS = "tests/evaluation/test_frontier.py"


def _study(test: str) -> str:
    return f"tests/recipes/test_study.py -k {test}"


FAULTS = [
    Fault(
        "envelope: a line through the points, hollows included",
        _FRONTIER,
        "        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], (x, y)):\n"
        "            hull.pop()\n",
        "",
        _CLAIMS,
    ),
    Fault(
        "envelope: more KL for less reward counts as progress",
        _FRONTIER,
        "            continue  # costs more and brings no more\n",
        "            pass\n",
        _CLAIMS,
    ),
    Fault(
        "dominance: better in one of the two is enough",
        _FRONTIER,
        "kl <= k and reward >= r",
        "kl <= k or reward >= r",
        _CLAIMS,
    ),
    Fault(
        "verdict: one KL where A is ahead confirms it",
        _FRONTIER,
        "if all(difference.low > 0",
        "if any(difference.low > 0",
        _CLAIMS,
    ),
    Fault(
        "verdict: each interval at its own level",
        _FRONTIER,
        "differences(ours, theirs, at, 1 - (1 - level) / len(at))",
        "differences(ours, theirs, at, level)",
        _CLAIMS,
    ),
    Fault(
        "study: lines of another setting are kept",
        _STUDY,
        'same = known.get(key) == line["identity"]',
        "same = key in known",
        _study("another_study"),
    ),
    Fault(
        "study: the reward model's best of n is the truth's",
        _METHODS,
        "best_of_n(start.law.logps, rewards, n)",
        "best_of_n(start.law.logps, start.rewards, n)",
        _study("best_of_n"),
    ),
    Fault(
        "study: chosen and rejected exchanged",
        _WORLD,
        "(answers[w], answers[l])",
        "(answers[l], answers[w])",
        _study("draws_of_the_reference"),
    ),
    Fault(
        "study: the target KL is not pursued",
        _RL,
        '        if "target_kl" in knobs:\n',
        '        if "target" in knobs:\n',
        _study("target_kl"),
    ),
    Fault(
        "enumeration: last letters in the order of the first",
        _LAW,
        "symbols.repeat(len(logits[-1]))",
        "symbols.repeat_interleave(len(logits[-1]))",
        "tests/theory/test_enumerable.py",
    ),
    Fault(
        "study: one that was stopped leaves no page",
        "src/preftune/recipes/study.py",
        '            leave(out, card, {"runs": len(jobs), "runs_done": number}, display)\n',
        "",
        "tests/recipes/test_study.py -k 'its_page and stopped'",
    ),
]
