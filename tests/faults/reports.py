"""Reports that show something else than the files hold."""

from __future__ import annotations

from fault import Fault

_PLOTS, _READING, _COURSES, _TELLING, _COMPARISON, _STAGE = (
    "src/preftune/reports/plots.py",
    "src/preftune/reports/reading.py",
    "src/preftune/reports/courses.py",
    "src/preftune/reports/telling.py",
    "src/preftune/reports/comparison.py",
    "src/preftune/parts/ending.py",
)

FAULTS = [
    Fault(
        "report: the vertical axis is upside down",
        _PLOTS,
        "down = HEIGHT - BOTTOM - (HEIGHT",
        "down = TOP + (HEIGHT",
        "tests/reports/test_plots.py -k where_they_are",
    ),
    Fault(
        "report: a label is not escaped",
        _PLOTS,
        "    return html.escape(text)\n",
        "    return text\n",
        "tests/reports/test_plots.py -k escaped",
    ),
    Fault(
        "report: a torn line of metrics is not told",
        _READING,
        "    if torn:\n",
        "    if not torn:\n",
        "tests/reports/test_html.py -k torn_metric",
    ),
    Fault(
        "report: an interval of another number",
        _READING,
        'siblings.get(f"{name}_{end}")',
        'siblings.get(f"loss_{end}")',
        "tests/reports/test_comparison.py -k 'frontier or matrix or headlines'",
    ),
    Fault(
        "report: thinned training starts at the first step instead of ending at the last",
        _COURSES,
        'return [{"step": group[-1]["step"]',
        'return [{"step": group[0]["step"]',
        "tests/reports/test_comparison.py -k long_training",
    ),
    Fault(
        "report: the worst answers are the least bad ones",
        _TELLING,
        "key=lambda row: row.gain or 0)[:EXTREME]",
        "key=lambda row: row.gain or 0)[-EXTREME:]",
        "tests/reports/test_html.py -k chosen_by_the_rules",
    ),
    Fault(
        "report: the answers of the reference count as the gain",
        _TELLING,
        "    if second == reference:\n",
        "    if second != reference:\n",
        "tests/reports/test_comparison.py -k reference_first",
    ),
    Fault(
        "report: a study's points are those of its first step",
        _COMPARISON,
        "sum(passed[-1][key] for passed in seeds)",
        "sum(passed[0][key] for passed in seeds)",
        "tests/reports/test_comparison.py -k study",
    ),
    Fault(
        "report: a page that cannot be written fails the run",
        _STAGE,
        "    except Exception as problem:",
        "    except OSError as problem:",
        "tests/recipes/test_report_stage.py -k warning_in_the_card",
    ),
    Fault(
        "report: histograms of training drop the last steps",
        "src/preftune/reports/spreads.py",
        "size = -(-len(training) // AT_MOST)",
        "size = max(1, len(training) // AT_MOST)\n        training = training[: size * AT_MOST]",
        "tests/reports/test_spreads.py -k none_is_lost",
    ),
    Fault(
        "report: bins of a histogram are drawn from the middle",
        _PLOTS,
        "{x((row.first + i + 1) * row.width):.1f}",
        "{x((row.first + i + 0.5) * row.width):.1f}",
        "tests/reports/test_spreads.py -k where_they_are",
    ),
    Fault(
        "histogram: merging counts bins instead of values",
        "src/preftune/equations/histogram.py",
        "counts.get(place, 0) + int(count)",
        "counts.get(place, 0) + 1",
        "tests/equations/test_histogram.py -k counting_together",
    ),
    Fault(
        "report: a run that fails leaves none",
        _STAGE,
        'run.card.status in ("stopped", "failed")',
        'run.card.status == "stopped"',
        "tests/recipes/test_report_stage.py -k fails_leaves",
    ),
    Fault(
        "report: refused input leaves one",
        _STAGE,
        " and not isinstance(end, UserError)",
        "",
        "tests/recipes/test_report_stage.py -k refused_input",
    ),
    Fault(
        "samples: the page is of the whole file as if one command had written it",
        "src/preftune/parts/sampled.py",
        "        if line.content in contents:\n",
        "        if line.content:\n",
        "tests/recipes/test_sample_report.py -k of_its_own",
    ),
    Fault(
        "samples: a stopped run leaves no page",
        "src/preftune/recipes/sample.py",
        'page(out) if lines else ""',
        'page(out) if lines and status == "done" else ""',
        "tests/recipes/test_sample_report.py -k come_to_its_end",
    ),
    Fault(
        "samples: SIGTERM is not heard",
        _STAGE,
        "        signal.signal(number, signal.SIG_DFL)\n        raise Stopped(number)\n",
        "        return\n",
        "tests/recipes/test_sample_report.py -k 'come_to_its_end and SIGTERM'",
    ),
    Fault(
        "samples: the longest answer is looked for among the first four",
        _TELLING,
        "for i in range(len(line.responses))]",
        "for i in range(min(SIDES, len(line.responses)))]",
        "tests/reports/test_sampled_answers.py -k longest",
    ),
    Fault(
        "samples: answers of a continued line are numbered from one",
        _TELLING,
        "number = int(first) if first.isdecimal() else 0",
        "number = 0",
        "tests/reports/test_sampled_answers.py -k longest",
    ),
    Fault(
        "samples: every task of a server is a sampler of its own",
        _TELLING,
        'else {"tokens", "seed"}',
        'else {"tokens"}',
        "tests/reports/test_sampled_answers.py -k do_not_share",
    ),
    Fault(
        "samples: never seen is never",
        "src/preftune/parts/measuring.py",
        'found["repeated"] = mean_share(',
        'found["repeated"] = mean_interval(',
        "tests/recipes/test_sample_report.py -k never_seen",
    ),
]
