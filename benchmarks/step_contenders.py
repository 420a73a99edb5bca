"""The contenders of `step.py`, each run as a process of its own: `python step_contenders.py NAME FOLDER` prints JSON.

`preftune`     its recipe, as a user runs it
`trl-tuned`    TRL's DPOTrainer: cached reference, no activation checkpointing, grouped by length
`trl-default`  the same as it comes: reference in the loop, activation checkpointing
`padded`       a plain loop: padded rows, all logits, reference in the loop, no checkpointing
`gemm`         nothing but matrix products: the rate that the limit is divided by
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from limit import gemm_rate
from step_work import WARM, Work

CONTENDERS = ("preftune", "trl-tuned", "trl-default", "padded")


class Stopwatch:
    """CPU and wall seconds between the ends of optimizer steps; all passes over the pairs but the first WARM count."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.marks: list[tuple[float, float]] = []
        self.losses: list[float] = []

    def mark(self, loss: float | None = None) -> None:
        self.marks.append((time.process_time(), time.perf_counter()))
        if loss is not None:
            self.losses.append(loss)

    def result(self) -> dict[str, Any]:
        work, steps = self.work, self.work.pairs // self.work.batch
        assert len(self.marks) == work.passes * steps, f"{len(self.marks)} steps ran"
        first, last = self.marks[WARM * steps - 1], self.marks[-1]
        cpu, wall = (last[i] - first[i] for i in (0, 1))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        pairs = work.pairs * (work.passes - WARM)
        return {"pairs": pairs, "cpu_seconds": cpu, "wall_seconds": wall, "peak_gb": peak, "losses": self.losses}


def preftune(folder: Path, work: Work) -> dict[str, Any]:
    from preftune.engine.run import Run
    from preftune.recipes import dpo

    watch, after_step = Stopwatch(work), Run.after_step

    def timed(self: Run, step: int, metrics: dict[str, Any]) -> None:
        after_step(self, step, metrics)
        watch.mark(metrics["loss"])

    Run.after_step = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as out:
        dpo.main(
            dpo.DpoConfig(
                model=str(folder / "model"), data=str(folder / "pairs.jsonl"), out=out + "/run", dtype=work.dtype,
                lr=work.lr, schedule="constant", batch_size=work.batch, epochs=work.passes, shuffle=False,
                max_length=work.max_length, max_grad_norm=1.0, weight_decay=0.0,
            )
        )  # fmt: skip
    return watch.result()


def trl(folder: Path, work: Work, *, tuned: bool) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    watch = Stopwatch(work)

    class Mark(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            watch.mark()

    grouped = tuned and not work.sequential
    config = DPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=work.dtype == "bfloat16",
        per_device_train_batch_size=work.batch, num_train_epochs=work.passes, learning_rate=work.lr,
        lr_scheduler_type="constant", max_length=work.max_length, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_steps=1, seed=0, gradient_checkpointing=not tuned, precompute_ref_log_probs=tuned,
        train_sampling_strategy="group_by_length" if grouped else "sequential",
        remove_unused_columns=not grouped,  # or the column of lengths goes before the sampler reads it
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=config,
        train_dataset=load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Mark()],
    )
    if grouped:  # the sampler wants the lengths in a column, which the trainer does not make
        rows = trainer.train_dataset
        lengths = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
        trainer.train_dataset = rows.add_column("length", lengths)
    trainer.train()
    watch.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return watch.result()


def padded(folder: Path, work: Work) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def log_probs(model: Any, ids: Any, mask: Any, scored: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=work.dtype == "bfloat16"):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        tokens = torch.log_softmax(logits.float(), -1).gather(2, ids[:, 1:, None])[..., 0]
        return (tokens * scored[:, 1:]).sum(1)

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval() for _ in range(2)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=work.lr, weight_decay=0.0)
    watch = Stopwatch(work)
    for _ in range(work.passes):
        for at in range(0, work.pairs, work.batch):
            step = rows[at : at + work.batch]
            sequences = [(tokenizer(r["prompt"]).input_ids, [*tokenizer(r[side]).input_ids, tokenizer.eos_token_id])
                         for side in ("chosen", "rejected") for r in step]  # fmt: skip
            ids = torch.full((len(sequences), max(len(p) + len(a) for p, a in sequences)), tokenizer.pad_token_id)
            mask, scored = torch.zeros_like(ids), torch.zeros(ids.shape)
            for i, (prompt, answer) in enumerate(sequences):
                end = len(prompt) + len(answer)
                ids[i, :end], mask[i, :end], scored[i, len(prompt) : end] = torch.tensor(prompt + answer), 1, 1.0
            with torch.no_grad():
                theirs = log_probs(reference, ids, mask, scored)
            chosen, rejected = (log_probs(policy, ids, mask, scored) - theirs).chunk(2)
            loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            watch.mark(float(loss.detach()))
    return watch.result()


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    work, stdout = Work.read(folder), os.dup(1)
    os.dup2(2, 1)  # what the contenders print is no answer
    if name == "gemm":
        answer: dict[str, Any] = {"gemm_gflop_per_cpu_second": gemm_rate(work.dtype) / 1e9}
    elif name in ("trl-tuned", "trl-default"):
        answer = trl(folder, work, tuned=name == "trl-tuned")
    else:
        answer = {"preftune": preftune, "padded": padded}[name](folder, work)
    os.write(stdout, (json.dumps(answer) + "\n").encode())


if __name__ == "__main__":
    main()
