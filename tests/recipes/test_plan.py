"""`preftune plan`: what it reads, says, writes and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, PreTrainedTokenizerFast

from preftune.errors import ArtifactError, ConfigError, DataError
from preftune.models.cost import Work
from preftune.parts.planning import USABLE, Range, sized, spoken
from preftune.recipes.plan import PlanConfig, _count, main

LENGTHS = {"prompt_tokens": 130.0, "chosen_tokens": 70.0, "rejected_tokens": 60.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A configuration and a tokenizer of whole words; no weights."""
    where = tmp_path / "model"
    LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    ).save_pretrained(where)  # fmt: skip
    words = Tokenizer(WordLevel({"</s>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(40)}}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>").save_pretrained(where)
    return where


def test_lengths_of_the_data_are_those_of_its_tokens(folder: Path, tmp_path: Path) -> None:
    """Work of a pair is the mean over the groups of the data, end marks counted, read without any weight."""
    data = tmp_path / "pairs.jsonl"
    rows = [("w1 w2 w3", "w4 w5", "w6"), ("w7", "w8 w9 w10", "w11 w12")]
    data.write_text("".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in rows))
    plan = main(PlanConfig(model=str(folder), data=str(data), batch_size=2))
    assert plan.job.pair == Work.total([Work.of(3, (3, 2)), Work.of(1, (4, 3))]).times(0.5)
    assert (plan.rows, plan.job.longest) == (2, 6)


def test_every_assumption_is_said_and_every_number_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page names the formulas, the assumed shares, the data sheet, and advises a setting."""
    main(PlanConfig(model=str(folder), gpus=16, rows=1000, lora_rank=4, **LENGTHS))
    said = capsys.readouterr().out
    for part in (
        "4 N U + 4 H C + 3.5 A X", "2 N U + 2 H C + A X", "25% to 70% of the FLOP rate", "40% to 80% of bandwidths",
        "16 x h100: 989 TFLOP/s, 80 GB", "400 GB/s between devices", "70% of memory", "an epoch", "advised: shard no",
    ):  # fmt: skip
        assert part in said


def test_own_machine_replaces_the_data_sheet(folder: Path) -> None:
    """Rate, memory and bandwidth as given; the rest as in the table."""
    plan = main(PlanConfig(model=str(folder), tflops=100, memory=24, bandwidth=25, gpus=2, **LENGTHS))
    on = plan.accelerator
    assert (on.tflops, on.memory, on.link, on.bandwidth(16), on.memory_bandwidth) == (100, 24, 25, 25, 3350)


def test_what_does_not_fit_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A device too small for anything gets no advice but a way out."""
    assert main(PlanConfig(model=str(folder), memory=0.0001, **LENGTHS)).advised is None
    assert "nothing fits" in capsys.readouterr().out


def test_nothing_that_is_held_or_sent_is_written_as_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of 0.2 million weights: its megabytes, kilobytes and times, in the table as in the advice, none 0."""
    plan = main(PlanConfig(model=str(folder), gpus=2, rows=10, **LENGTHS))
    said = capsys.readouterr().out
    assert sized(plan.settings[0].memory.total) in said and "MB" in said
    amounts = re.findall(r"[\d.]+(?= [TGMk]?B\b)", said)
    assert len(amounts) > 12 and all(float(amount) > 0 for amount in amounts)
    sizes = (0, 12, 9.996e5, 1.5e6, 32.96e9, 1.111e12)
    assert [sized(size) for size in sizes] == ["0 B", "12 B", "1000 kB", "1.5 MB", "33 GB", "1.11 TB"]


def test_times_and_counts_are_written_in_units_that_fit() -> None:
    """Milliseconds to days; thousands to billions; no exponents."""
    assert [spoken(Range(s / 2, s)) for s in (0.02, 0.5, 100, 400, 9000, 400000)] == [
        "10 to 20 ms", "0.25 to 0.5 s", "50 to 100 s", "3.3 to 6.7 min", "1.2 to 2.5 h", "2.3 to 4.6 days",
    ]  # fmt: skip
    assert [_count(n) for n in (260_032, 41_943_040, 8_030_261_248)] == ["260k", "41.9M", "8.03B"]


def test_shards_are_advised_with_the_best_of_replicas(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where only shards fit, the page says that replicas do not."""
    whole = main(PlanConfig(model=str(folder), gpus=8, **LENGTHS)).settings
    between = (whole[1].memory.total + whole[3].memory.total) / 2 / USABLE / 1e9
    assert main(PlanConfig(model=str(folder), gpus=8, memory=between, tokens_per_batch=32768, **LENGTHS)).advised
    assert "without --shard: nothing fits" in capsys.readouterr().out


def test_numbers_are_written_as_json(folder: Path, tmp_path: Path) -> None:
    """Every setting with its memory by parts, FLOPs and traffic."""
    main(PlanConfig(model=str(folder), gpus=8, rows=100, out=str(tmp_path / "plan.json"), **LENGTHS))
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [(one["shard"], one["activation_checkpointing"]) for one in found["settings"]] == [
        (False, False), (False, True), (True, False), (True, True),
    ]  # fmt: skip
    assert found["advised"] in found["settings"] and found["advised"]["memory"]["moments"] > 0
    assert found["reference"]["slow"] > found["reference"]["fast"] > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "lengths are missing: give --data, or all of prompt_tokens, chosen_tokens, rejected_tokens"),
        ({"data": "x", "prompt_tokens": 3.0}, "prompt_tokens stands beside data"),
        ({**LENGTHS, "max_length": 99}, "max_length is about data"),
        ({**LENGTHS, "gpu": "b9"}, "gpu must be one of a100, h100, h200"),
        ({"data": "x", "format": "csv"}, "format must be one of auto"),
        ({"data": "x", "tokens_per_batch": 512}, "must be at least max_length 1024"),
    ],
)
def test_contradictions_are_refused(keys: dict[str, object], message: str) -> None:
    """In one line, before anything is read."""
    with pytest.raises(ConfigError, match=message):
        PlanConfig(model="m", **keys)  # type: ignore[arg-type]


def test_missing_configuration_and_empty_data_are_refused(folder: Path, tmp_path: Path) -> None:
    """What was looked for is named."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="empty has no configuration that can be read"):
        main(PlanConfig(model=str(tmp_path / "empty"), **LENGTHS))
    data = tmp_path / "labels.jsonl"
    data.write_text(json.dumps({"prompt": "w1", "completion": "w2", "label": True}) + "\n")
    with pytest.raises(DataError, match="no pair is left to plan for"):
        main(PlanConfig(model=str(folder), data=str(data)))
