"""Memory and time of reading, tokenising and planning preference data, against the number of pairs.

    python benchmarks/data.py [--pairs 10000 100000] [--plan 1000000 10000000] [--repeat 10000000]  ->  data.json

Pairs are drawn from a fixed seed: pseudo-words, log-normal lengths with the means of single-turn HH. In processes of
their own, one after the other:

    first     read, tokenise, examine and keep on disk
    second    the same again: what a later run does
    plan      from what is on disk: the order of an epoch, its optimizer steps, the micro-batches of every step

and where tokenising would take hours the plan alone: for `--plan` from drawn lengths on disk, for `--repeat` from a
file of tokens as a run reads it, in which tokenised pairs are written again and again (10 million: 9 GB). Peak memory
is resident memory (mapped pages included) above that of the process after its imports, CPU time is of all threads.
Rows of other sizes and parts that data.json holds already are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from preftune.data.token_file import ROWS_AT_ONCE, TokenGroups

BATCH_SIZE, TOKENS_PER_BATCH = 64, 4096
MEAN = {"prompt": 16, "chosen": 43, "rejected": 33}
"""Words; about a token each."""
PIECE = 100_000
HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--plan", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--repeat", type=int, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=HERE / "data.json")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args.folder)))
        return
    from preftune.engine.host import host, versions

    found: dict[str, Any] = {"versions": versions(), "host": host(), "batch_size": BATCH_SIZE}
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    kept = {(row["part"], row["pairs"]): row for row in rows}
    jobs = [(n, write, ("first", "second", "plan")) for n in args.pairs]
    jobs += [(n, draw, ("drawn",)) for n in args.plan] + [(n, repeat, ("repeated",)) for n in args.repeat]
    with tempfile.TemporaryDirectory() as piece:
        if args.repeat:
            write(Path(piece), PIECE)
            in_process("first", Path(piece))
        for pairs, make, parts in jobs:
            name = piece if make is repeat else tempfile.mkdtemp(dir=piece)
            make(Path(name), pairs)
            for part in parts:
                row = {"pairs": pairs, "part": part} | in_process(part, Path(name))
                kept[part, pairs] = row
                print(row, flush=True)
    found["rows"] = sorted(kept.values(), key=lambda row: (row["part"] in ("drawn", "repeated"), row["pairs"]))
    args.out.write_text(json.dumps(found, indent=1) + "\n")


def in_process(part: str, folder: Path) -> dict[str, Any]:
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder)]
    done = subprocess.run(command, env=os.environ | quiet, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def write(folder: Path, pairs: int) -> None:
    """`pairs.jsonl` and `tokenizer/`."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    words = ["".join(rng.choice(letters, n)) for n in rng.integers(2, 9, 3000)]
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(pairs):
            sizes = lengths(rng, 1)[0]
            prompt, chosen, rejected = (" ".join(words[i] for i in rng.integers(0, 3000, n)) for n in sizes)
            row = {
                "prompt": f"Human: {number} {prompt}\n\nAssistant:",
                "chosen": f" {chosen}",
                "rejected": f" {rejected}",
            }
            file.write(json.dumps(row) + "\n")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([" ".join(words)] * 2, vocab_size=8192, special_tokens=["</s>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>").save_pretrained(folder / "tokenizer")


def lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """[count, 3] words of prompt, chosen and rejected response."""
    means = np.array(list(MEAN.values()))
    return np.minimum(rng.lognormal(np.log(means) - 0.32, 0.8, (count, 3)), 600).astype(np.int64) + 1


def draw(folder: Path, pairs: int) -> None:
    """The columns that a plan reads, as they would be on disk, of pairs with such lengths."""
    prompt, chosen, rejected = lengths(np.random.default_rng(0), pairs).T
    one = np.ones(pairs, np.int64)
    columns = {
        "prompt": prompt, "responses": 2 * one, "tokens": chosen + rejected, "shared": 0 * one, "pairs": one,
        "shortest": np.minimum(chosen, rejected),
    }  # fmt: skip
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", values)


def repeat(folder: Path, pairs: int) -> None:
    """`tokens.arrow` and `rows.npy` of so many pairs, from whole record batches of those that are tokenised there."""
    (piece,) = folder.glob("data/*/tokens.arrow")
    source = pyarrow.ipc.open_file(pyarrow.memory_map(str(piece)))
    whole = PIECE // ROWS_AT_ONCE
    with pyarrow.ipc.new_file(str(folder / "tokens.arrow"), source.schema) as file:
        for number, start in enumerate(range(0, pairs, ROWS_AT_ONCE)):
            file.write_batch(source.get_batch(number % whole).slice(0, pairs - start))
    np.save(folder / "rows.npy", np.arange(pairs))


class Drawn(Sequence[Any]):
    """Groups of which only the columns are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(np.load(self.folder / "pairs.npy", mmap_mode="r"))

    def __getitem__(self, at: Any) -> Any:
        raise AssertionError("a plan looks at no group")

    def column(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy")


def read(folder: Path) -> Any:
    from transformers import AutoTokenizer

    from preftune.data.sources import open_source
    from preftune.data.tokenised import tokenised
    from preftune.models.tokenizer import tokenizer_sha256

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer(["warm up"])
    measure = Measured()
    source = open_source(folder / "pairs.jsonl", kind="preferences")
    prepared = tokenised(
        source, tokenizer, tokenizer_sha256=tokenizer_sha256(tokenizer), root=folder, max_length=2048,
        truncation="refuse",
    )  # fmt: skip
    return prepared, measure


def reading(folder: Path) -> dict[str, Any]:
    prepared, measure = read(folder)
    found = measure.now()
    return found | {"tokens": prepared.report.tokens, "disk_mb": megabytes(folder / "data")}


def planning(folder: Path) -> dict[str, Any]:
    groups = read(folder)[0].groups
    return plan(lambda: groups)


def plan(opened: Callable[[], Any]) -> dict[str, Any]:
    from preftune.data.columns import fed
    from preftune.data.packing import StepPlan, best_fit

    measure = Measured()
    groups = opened()
    steps = StepPlan(groups, batch_size=BATCH_SIZE, seed=0, shuffle=True)
    sizes = fed(groups).astype(np.int32)
    batches = sum(
        len(best_fit(sizes[steps.positions_of(0, step)].tolist(), TOKENS_PER_BATCH))
        for step in range(steps.steps_per_epoch)
    )
    return measure.now() | {"steps": steps.steps_per_epoch, "micro_batches": batches}


class Measured:
    """From here on: the peak of resident memory above what there is, CPU seconds."""

    def __init__(self) -> None:
        import pyarrow  # noqa: F401
        import torch  # noqa: F401

        import preftune.data.packing
        import preftune.data.tokenised  # noqa: F401

        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        self.resident, self.began = _status("VmRSS"), time.process_time()

    def now(self) -> dict[str, float]:
        return {
            "peak_mb": round((_status("VmHWM") - self.resident) / 1e3, 1),
            "cpu_s": round(time.process_time() - self.began, 2),
        }


def _status(name: str) -> int:
    """kB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def megabytes(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 1)


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "first": reading,
    "second": reading,
    "plan": planning,
    "drawn": lambda folder: plan(lambda: Drawn(folder)),
    "repeated": lambda folder: plan(lambda: TokenGroups(folder / "tokens.arrow", folder / "rows.npy")),
}

if __name__ == "__main__":
    main()
