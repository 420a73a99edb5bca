"""Seeded faults of the evaluation: KL, texts, calibration, findings, the stage."""

from __future__ import annotations

from fault import Fault

_KL = "src/preftune/evaluation/divergence.py"
_DRIFT = "src/preftune/evaluation/drift.py"
_PAIRS = "src/preftune/evaluation/calibration.py"
_TEXTS = "src/preftune/evaluation/texts.py"
_MEASURE = "src/preftune/parts/measuring.py"
_ASK = "src/preftune/parts/contestants.py"
_OF_KL = "tests/evaluation/test_divergence.py"
_OF_DRIFT = "tests/evaluation/test_drift.py"
_OF_STAGE = "tests/recipes/test_evaluate.py"

FAULTS = [
    Fault(
        "divergence: the other direction on the writer's responses",
        _KL,
        "score_tokens(other, batch, reference_model=writer, divergence=True, temperature=temperature)",
        "score_tokens(writer, batch, reference_model=other, divergence=True, temperature=temperature)",
        tests=_OF_KL,
    ),
    Fault(
        "divergence: laws at temperature 1 whatever the sampler's was",
        _KL,
        "divergence=True, temperature=temperature)",
        "divergence=True)",
        tests=_OF_KL,
    ),
    Fault(
        "divergence: groups in the order of the batches",
        "src/preftune/data/packing.py",
        "return [found[id(group)] for group in groups]\n",
        "return list(found.values())\n",
        tests=_OF_KL,
    ),
    Fault(
        "token scores: the temperature of a softcapped model divides only inside the cap",
        "src/preftune/models/logprobs.py",
        "softcap = None if softcap is None else softcap / temperature",
        "softcap = None if softcap is None else softcap",
        tests="tests/models/test_token_scores.py -k temperature",
    ),
    Fault(
        "paths: every model is on one path, whatever its method",
        "src/preftune/evaluation/paths.py",
        "return json.dumps([card.stage, config, weights, data], sort_keys=True)",
        'return ""',
        tests="tests/evaluation/test_paths.py",
    ),
    Fault(
        "paths: another start is the same path",
        "src/preftune/evaluation/paths.py",
        "return json.dumps([card.stage, config, weights, data], sort_keys=True)",
        "return json.dumps([card.stage, config, data], sort_keys=True)",
        tests="tests/evaluation/test_paths.py",
    ),
    Fault(
        "findings: the reference begins every path",
        "src/preftune/parts/diagnosing.py",
        "yield over_optimisation([begin] * begins + ",
        "yield over_optimisation([begin] + ",
        tests="tests/recipes/test_evaluate_paths.py -k one_method",
    ),
    Fault(
        "findings: a smaller part of the gain is said not to be there",
        _DRIFT,
        "minor = explained.high < equal.low",
        "minor = equal.low > 0",
        tests=_OF_DRIFT,
    ),
    Fault(
        "findings: shorter is said with the interval of longer",
        _DRIFT,
        "Interval(-difference.estimate, -difference.high, -difference.low, difference.n)",
        "Interval(-difference.estimate, -difference.low, -difference.high, difference.n)",
        tests=_OF_DRIFT,
    ),
    Fault(
        "texts: two copies make a loop",
        _TEXTS,
        "run + period >= COPIES * period",
        "run + period >= 2 * period",
        tests="tests/evaluation/test_texts.py",
    ),
    Fault(
        "calibration: a tie is no win",
        _PAIRS,
        "np.heaviside(np.asarray(differences, np.float64), 0.5)",
        "np.heaviside(np.asarray(differences, np.float64), 0.0)",
        tests="tests/evaluation/test_pair_calibration.py",
    ),
    Fault(
        "drift: the identity forgotten, every fall is displacement",
        _DRIFT,
        "verdict = SEEN if excess.high < 0 else",
        "verdict = SEEN if chosen.high < 0 else",
        tests=_OF_DRIFT,
    ),
    Fault(
        "drift: the peak chosen by looking, its intervals not",
        _DRIFT,
        "1 - (1 - level) / pairs",
        "level",
        tests=_OF_DRIFT,
    ),
    Fault(
        "drift: a gain at equal length taken for length",
        _DRIFT,
        "return (slope_R, slope_R * x_R, y_R - slope_R * x_R)[statistic]",
        "return (slope_R, y_R, y_R - slope_R * x_R)[statistic]",
        tests=_OF_DRIFT,
    ),
    Fault(
        "evaluate: a response without reward counts as zero",
        _MEASURE,
        "return value if math.isfinite(value) else None",
        "return value if math.isfinite(value) else 0.0",
        tests=_OF_STAGE,
    ),
    Fault(
        "evaluate: under top_p the whole law's log-probs instead of the sampler's",
        _MEASURE,
        "k1=response.logp - found.other_logp",
        "k1=found.k1",
        tests=_OF_STAGE,
    ),
    Fault(
        "evaluate: all models draw from one stream, so that equal ones answer alike",
        _ASK,
        'f"{seed} {name}"',
        'f"{seed}"',
        tests=_OF_STAGE,
    ),
    Fault(
        "collapse: the reference's own repetitions are not taken off",
        "src/preftune/evaluation/drift.py",
        "more = gap(ours, share(reference_elsewhere))",
        "more = ours",
        tests="tests/evaluation/test_drift.py -k one_answer",
    ),
    Fault(
        "collapse: repetitions to one prompt count as answers to others",
        "src/preftune/evaluation/texts.py",
        "for texts in texts_P for text in set(texts))",
        "for texts in texts_P for text in texts)",
        tests="tests/evaluation/test_texts.py -k another_prompt",
    ),
    Fault(
        "evaluation: pairs that no model can read end the run after everything was drawn",
        "src/preftune/parts/room.py",
        "            if tokens > one.positions:\n                reason",
        "            if False:\n                reason",
        "tests/recipes/test_evaluate_pairs.py -k named",
    ),
    Fault(
        "evaluation: allow_refused is not read for pairs",
        "src/preftune/parts/diagnosing.py",
        "len(unfit)) > cfg.allow_refused",
        "len(unfit)) > 0",
        "tests/recipes/test_evaluate_pairs.py -k done_without",
    ),
]
