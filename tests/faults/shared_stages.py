"""Judging, evaluation and online DPO by several processes: work done twice, told wrongly, or lost with a machine."""

from __future__ import annotations

from fault import Fault

_PARALLEL = "src/preftune/engine/parallel.py"
_WATCH = "src/preftune/engine/watch.py"
_UNIT = "tests/engine/test_parallel.py -k"
_SHARED = 'tests/parallel/test_shared_stages.py -m "not slow" -x -k'

FAULTS = [
    Fault(
        "shared stages: every rank takes the first item of a round",
        _PARALLEL,
        "some[self.rank : self.rank + 1]]",
        "some[:1]]",
        f"{_UNIT} taken_in_turn",
    ),
    Fault(
        "shared stages: results come rank by rank, not in the order of the items",
        _PARALLEL,
        "        while some := list(islice(left, self.size)):\n            mine = [work(item) for item in "
        "some[self.rank : self.rank + 1]]\n",
        "        for _ in (0,):\n            mine = [work(item) for item in list(left)[self.rank :: self.size]]\n",
        f"{_UNIT} taken_in_turn",
    ),
    Fault(
        "shared stages: a rank that cannot tell the others says nothing",
        _WATCH,
        "        except RuntimeError:\n            return True\n",
        "        except RuntimeError:\n            return False\n",
        f"{_UNIT} cannot_tell",
    ),
    Fault(
        "shared stages: a lost rank is named without its machine",
        _WATCH,
        'f"{beats} {self._entered} {os.uname().nodename}"',
        'f"{beats} {self._entered}"',
        f"{_UNIT} without_a_beat",
    ),
    Fault(
        "shared stages: all processes write one file of answers",
        "src/preftune/judges/llm.py",
        'self._path = path.with_stem(f"{path.stem}-{rank}") if rank else path',
        "self._path = path",
        "tests/judges/test_llm.py -k file_of_its_own",
    ),
    Fault(
        "shared stages: what was shown is not told to the other ranks",
        "src/preftune/parts/judging.py",
        "Verdict(from_json(judgement), tuple(map(from_json, shown)))",
        "Verdict(from_json(judgement), ())",
        f'{_SHARED} "byte_for_byte"',
    ),
    Fault(
        "shared stages: every rank scores every response of an evaluation",
        "src/preftune/recipes/evaluate.py",
        "allow_code=cfg.allow_python, together=run.world",
        "allow_code=cfg.allow_python",
        f'{_SHARED} "done_twice"',
    ),
    Fault(
        "shared stages: every rank measures every divergence",
        "src/preftune/parts/online_round.py",
        "temperature=temperature, world=batching.world)",
        "temperature=temperature)",
        f'{_SHARED} "done_twice"',
    ),
    Fault(
        "shared stages: a study is started as often as there are processes",
        "src/preftune/cli.py",
        'ALONE.get(stage) or ALONE.get(stage.partition(" ")[0])',
        "ALONE.get(stage)",
        "tests/parallel/test_ends.py -k many_times",
    ),
]
