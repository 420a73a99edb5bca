"""What the contenders of `gpu_step.py` share, and its peers: a plain padded loop, and TRL's trainer.

A contender takes a `Job` and returns the seconds of its steps and how it went about them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["BETA", "WARM", "Answer", "Job", "Pair", "free", "padded", "sgd", "trl"]

BETA, LR, WARM = 0.1, 1e-6, 1
Pair = tuple[np.ndarray, np.ndarray, np.ndarray]
Answer = tuple[list[float], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """What a contender is given."""

    model: Any
    steps: list[list[Pair]]
    args: argparse.Namespace
    per_pass: int
    """Pairs of a forward, for those who count in pairs."""
    tuned: bool
    folder: str

    def timed(self, step: Callable[[list[Pair]], Any]) -> list[float]:
        """Seconds of each step, the first of which warms up; fewer steps when time is over."""
        found: list[float] = []
        for pairs in self.steps:
            if len(found) > WARM and sum(found) > self.args.seconds:
                break
            wait(self.model.device)
            start = time.perf_counter()
            step(pairs)
            wait(self.model.device)
            found.append(time.perf_counter() - start)
        return found

    def fitted(self, work: Callable[[int], list[float]]) -> tuple[list[float], int]:
        """What `work` makes of the most pairs per pass that fit, halved as a user would; raises when one does not."""
        per_pass = self.per_pass
        while True:
            try:
                return work(per_pass), per_pass
            except torch.OutOfMemoryError:
                if per_pass == 1:
                    raise
            per_pass //= 2  # outside of `except`, whose traceback holds the activations
            self.model.zero_grad()
            free(self.model.device)


def sgd(model: Any) -> None:
    """Plain bfloat16 SGD: not a way to train, the cheapest step there is, and the same for everybody."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-LR)
                parameter.grad = None


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    """Give back what nobody holds, and forget the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def padded(job: Job) -> Answer:
    """A plain loop: padded rows and all logits; `tuned` caches the reference and checkpoints nothing."""
    model, tuned, device = job.model, job.tuned, job.model.device

    def responses(policy: Any, pairs: list[Pair]) -> torch.Tensor:
        sequences = [(p, a) for i in (1, 2) for p, a in ((pair[0], pair[i]) for pair in pairs)]
        ids = torch.full((len(sequences), max(len(p) + len(a) for p, a in sequences)), 2)
        mask, scored = torch.zeros_like(ids), torch.zeros(ids.shape)
        for i, (p, a) in enumerate(sequences):
            end = len(p) + len(a)
            ids[i, :end], mask[i, :end], scored[i, len(p) : end] = torch.from_numpy(np.concatenate((p, a))), 1, 1.0
        ids, mask, scored = (t.to(device) for t in (ids, mask, scored))
        logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        tokens = torch.log_softmax(logits.float(), -1).gather(2, ids[:, 1:, None])[..., 0]
        return (tokens * scored[:, 1:]).sum(1)

    if not tuned:
        reference = copy.deepcopy(model).requires_grad_(False)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()

    def run(per_pass: int) -> list[float]:
        def passes(pairs: list[Pair]) -> list[list[Pair]]:
            return [pairs[i : i + per_pass] for i in range(0, len(pairs), per_pass)]

        kept = {}
        if tuned:
            with torch.no_grad():
                kept = {id(pairs): [responses(model, part) for part in passes(pairs)] for pairs in job.steps}

        def step(pairs: list[Pair]) -> None:
            for i, part in enumerate(passes(pairs)):
                with torch.no_grad():
                    theirs = kept[id(pairs)][i] if tuned else responses(reference, part)
                chosen, rejected = (responses(model, part) - theirs).chunk(2)
                (-F.logsigmoid(BETA * (chosen - rejected)).sum() / len(pairs)).backward()
            sgd(model)

        return job.timed(step)

    return told(job, run)


def told(job: Job, run: Callable[[int], list[float]]) -> Answer:
    """What a peer made of the most pairs per pass that fit, and how."""
    attention = job.model.config._attn_implementation
    seconds, per_pass = job.fitted(run)
    reference, checkpointing = ("cached", "none") if job.tuned else ("in the loop", "full")
    return seconds, {
        "attention": attention, "reference": reference, "checkpointing": checkpointing, "pairs_per_pass": per_pass
    }  # fmt: skip


def trl(job: Job) -> Answer:
    """TRL's DPOTrainer; seconds between the ends of optimizer steps. Its rows are text: one word, one token id."""
    return told(job, partial(_trl, job))


def _trl(job: Job, per_pass: int) -> list[float]:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    model, tuned, pairs = job.model, job.tuned, [pair for step in job.steps for pair in step]
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w9"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "w0", "eos_token": "w1", "pad_token": "w2", "unk_token": "w9"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    text = [[" ".join(f"w{i}" for i in ids) + " " * (k == 0) for k, ids in enumerate(pair)] for pair in pairs]
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in text]
    device, marks, batch = model.device, [], len(job.steps[0])

    class Mark(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            wait(device)
            marks.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            wait(device)
            marks.append(time.perf_counter())
            if len(marks) > WARM + 1 and marks[-1] - marks[0] > job.args.seconds:
                control.should_training_stop = True

    config = DPOConfig(
        output_dir=job.folder, use_cpu=device.type == "cpu", bf16=False, per_device_train_batch_size=per_pass,
        gradient_accumulation_steps=batch // per_pass, num_train_epochs=1, learning_rate=LR, optim="sgd",
        lr_scheduler_type="constant", max_length=None, report_to=[], save_strategy="no", disable_tqdm=True,
        seed=0, gradient_checkpointing=not tuned, precompute_ref_log_probs=tuned, max_grad_norm=0.0,
        train_sampling_strategy="sequential", logging_strategy="no",
    )  # fmt: skip
    DPOTrainer(
        model=model, ref_model=None if tuned else copy.deepcopy(model), args=config,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Mark()],
    ).train()  # fmt: skip
    return [later - earlier for earlier, later in pairwise(marks)]
