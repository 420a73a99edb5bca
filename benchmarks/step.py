"""How much does one DPO step cost, in CPU seconds and peak memory, here and in TRL?

    python benchmarks/step.py                       # all contenders, two interleaved rounds, table + JSON
    python benchmarks/step.py --contenders preftune trl-tuned --rounds 1

Same model folder (64M-parameter Llama shape, random weights on the bfloat16 grid), same preference pairs, same step
(8 pairs), bfloat16 compute. Every contender runs in its own process through its own front door: preftune's recipe and
TRL's `DPOTrainer`. The data are passed twice; the first pass warms up, the second is measured. CPU seconds
(`process_time`, all threads) are compared, so that neighbours on the machine count little; peak memory is the process's
largest resident set.

`trl-default`  reference in the loop, activation checkpointing (what a user gets)
`trl-tuned`    cached reference, no checkpointing (grouping by length is refused by its data format)
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONTENDERS = ("preftune", "trl-default", "trl-tuned")
BATCH, PAIRS, PASSES, MAX_LENGTH, LR = 8, 40, 2, 1024, 1e-6


def main() -> None:
    args = parse()
    if args.child:
        print(json.dumps(CHILDREN[args.child](Path(args.work), args.dtype)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = prepare(work, args.data)
        rounds = {name: [run_child(name, work, args) for _ in range(1)] for name in args.contenders}
        for _ in range(args.rounds - 1):  # interleaved, so that a slow spell of the machine hits everybody
            for name in args.contenders:
                rounds[name].append(run_child(name, work, args))
    report(rounds, data, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--data", help="HH transcripts (jsonl.gz); default: $PREFTUNE_SHARED or ../shared, else drawn")
    parser.add_argument("--out", default=str(HERE / "step.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_child(name: str, work: Path, args: argparse.Namespace) -> dict:
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": str(args.threads), "PREFTUNE_CACHE": str(work / "cache")}
    command = [sys.executable, __file__, "--child", name, "--work", str(work), "--dtype", args.dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{name:12} {result['pairs_per_cpu_second']:.3f} pairs/CPU s  {result['peak_gb']:.2f} GB", file=sys.stderr)
    return result


# The work: one model folder and one file of pairs --------------------------------------------------------------


def prepare(work: Path, data: str | None) -> dict:
    """Write `model/` and `pairs.jsonl`; say what the pairs are."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows, source = transcripts(data)
    bpe = ByteLevelBPETokenizer()
    texts = [row["prompt"] + row["chosen"] + row["rejected"] for row in rows]
    bpe.train_from_iterator(texts, vocab_size=16384, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=MAX_LENGTH,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")

    fitting = [row for row in rows if len(tokenizer(row["prompt"] + row["chosen"]).input_ids) < MAX_LENGTH // 2]
    pairs = fitting[:PAIRS]
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    lengths = {key: [len(tokenizer(row[key]).input_ids) for row in pairs] for key in ("prompt", "chosen", "rejected")}
    means = {key: round(statistics.mean(values), 1) for key, values in lengths.items()}
    return {"source": source, "pairs": len(pairs), "mean_tokens": means}


def transcripts(data: str | None) -> tuple[list[dict], str]:
    """HH pairs as prompt/chosen/rejected; without the data, words drawn to the same length profile."""
    shared = Path(os.environ.get("PREFTUNE_SHARED", HERE.parents[1] / "shared"))
    path = Path(data) if data else shared / "data/hh_multi_turn/harmless-base.test.jsonl.gz"
    if not path.is_file():
        return drawn(), "words drawn to HH's length profile (seed 0)"
    rows, mark = [], "\n\nAssistant:"
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        row = json.loads(line)
        cut = row["chosen"].rfind(mark) + len(mark)
        if row["chosen"][:cut] == row["rejected"][:cut] and row["chosen"] != row["rejected"]:
            prompt, chosen, rejected = row["chosen"][:cut], row["chosen"][cut:], row["rejected"][cut:]
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return [row for row in rows if row["chosen"].strip() and row["rejected"].strip()], f"HH {path.name}"


def drawn() -> list[dict]:
    import numpy as np

    rng = np.random.default_rng(0)
    words = ["w" + "".join(rng.choice(list("abcdefghij"), 4)) for _ in range(3000)]

    def text(mean: float) -> str:
        return " " + " ".join(rng.choice(words, max(3, int(rng.lognormal(np.log(mean) - 0.25, 0.7)))))

    return [{"prompt": text(110), "chosen": text(38), "rejected": text(48)} for _ in range(2000)]


# The contenders ------------------------------------------------------------------------------------------------


class Stopwatch:
    """CPU seconds between the ends of optimizer steps; the second pass over the data counts."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.losses: list[float] = []

    def mark(self, loss: float | None = None) -> None:
        self.marks.append(time.process_time())
        if loss is not None:
            self.losses.append(loss)

    def result(self) -> dict:
        steps = PAIRS // BATCH
        seconds = self.marks[-1] - self.marks[steps - 1]
        assert len(self.marks) == PASSES * steps, f"{len(self.marks)} steps ran"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rate = PAIRS * (PASSES - 1) / seconds
        return {"pairs_per_cpu_second": rate, "cpu_seconds": seconds, "peak_gb": peak, "losses": self.losses}


def preftune(work: Path, dtype: str) -> dict:
    from preftune.engine.run import Run
    from preftune.recipes import dpo

    watch, after_step = Stopwatch(), Run.after_step

    def timed(self: Run, step: int, metrics: dict) -> None:
        after_step(self, step, metrics)
        watch.mark(metrics["loss"])

    Run.after_step = timed
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as nowhere:
        sys.stdout, stdout = nowhere, sys.stdout
        dpo.main(
            dpo.DpoConfig(
                model=str(work / "model"), data=str(work / "pairs.jsonl"), out=out + "/run", dtype=dtype, lr=LR,
                schedule="constant", batch_size=BATCH, epochs=PASSES, shuffle=False, max_length=MAX_LENGTH,
                max_grad_norm=1.0, weight_decay=0.0,
            )
        )  # fmt: skip
        sys.stdout = stdout
    return watch.result()


def trl(work: Path, dtype: str, *, tuned: bool) -> dict:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    watch = Stopwatch()

    class Mark(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            watch.mark()

    config = DPOConfig(
        output_dir=str(work / "trl"), use_cpu=True, bf16=dtype == "bfloat16", per_device_train_batch_size=BATCH,
        num_train_epochs=PASSES, learning_rate=LR, lr_scheduler_type="constant", max_length=MAX_LENGTH, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_steps=1, seed=0, gradient_checkpointing=not tuned,
        precompute_ref_log_probs=tuned, train_sampling_strategy="sequential",
    )  # fmt: skip
    stdout, sys.stdout = sys.stdout, sys.stderr
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32),
        args=config,
        train_dataset=load_dataset("json", data_files=str(work / "pairs.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
        callbacks=[Mark()],
    )
    trainer.train()
    sys.stdout = stdout
    watch.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return watch.result()


CHILDREN = {
    "preftune": preftune,
    "trl-default": lambda work, dtype: trl(work, dtype, tuned=False),
    "trl-tuned": lambda work, dtype: trl(work, dtype, tuned=True),
}


# The answer ----------------------------------------------------------------------------------------------------


def report(rounds: dict[str, list[dict]], data: dict, args: argparse.Namespace) -> None:
    table = {
        name: {
            "pairs_per_cpu_second": statistics.median(r["pairs_per_cpu_second"] for r in results),
            "peak_gb": max(r["peak_gb"] for r in results),
            "rounds": results,
        }
        for name, results in rounds.items()
    }
    print(f"\n{data['pairs']} pairs from {data['source']}, mean tokens {data['mean_tokens']}, {args.dtype}\n")
    print(f"| {'contender':12} | pairs / CPU second | peak memory, GB |\n|---|---|---|")
    for name, row in table.items():
        print(f"| {name:12} | {row['pairs_per_cpu_second']:.3f} | {row['peak_gb']:.2f} |")
    if "preftune" in table and "trl-tuned" in table:
        speed = table["preftune"]["pairs_per_cpu_second"] / table["trl-tuned"]["pairs_per_cpu_second"]
        memory = table["preftune"]["peak_gb"] / table["trl-tuned"]["peak_gb"]
        print(f"\npreftune / trl-tuned: x{speed:.1f} in pairs per CPU second, x{memory:.2f} in peak memory")
    versions = {name: version(name) for name in ("preftune", "torch", "transformers", "trl")}
    facts = {
        "command": f"python benchmarks/step.py --rounds {args.rounds} --threads {args.threads} --dtype {args.dtype}",
        "versions": versions | {"python": platform.python_version()},
        "hardware": {"processor": processor(), "threads": args.threads},
        "settings": {"batch": BATCH, "dtype": args.dtype, "model": "Llama 64M: d 576, 10 layers, 9/3 heads, V 49152"},
        "data": data,
        "results": table,
    }
    Path(args.out).write_text(json.dumps(facts, indent=1) + "\n")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
