"""Claims about several processes as far as one process can see them: shares, the environment, who is named."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from preftune.engine import parallel
from preftune.engine import watch as watching
from preftune.engine.parallel import ALONE, World, launched
from preftune.engine.watch import Watch
from preftune.errors import ConfigError, RunError

ENVIRON = r"os\.environ(?:\.get\(|\.setdefault\(|\[)['\"](\w+)"
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node", "MASTER_PORT": "29500"}


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_shares_are_a_partition_in_order_and_equal_in_cost(costs: list[int], size: int) -> None:
    """Every item has one owner, each share keeps the order, and two shares differ by one item's cost at most."""
    items = list(enumerate(costs))
    shares = [World(rank, size).share(items, lambda item: item[1]) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == items
    assert all(share == sorted(share) for share in shares)
    loads = [sum(cost for _, cost in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_shares_are_equal_in_cost_and_not_in_number() -> None:
    """One long group weighs as much as ten short ones: a partition by number would let one rank wait."""
    costs = [1, 1, 1, 1, 10, 1, 1, 1, 1, 1, 1]
    assert [sum(World(rank, 2).share(costs, lambda cost: cost)) for rank in range(2)] == [10, 10]


def test_alone_every_function_is_the_identity() -> None:
    """In one process nothing is asked of torch.distributed and nothing changes."""
    tensor = torch.tensor([1.0, 2.0])
    ALONE.add_up([tensor], "a test")
    ALONE.same(object(), "a test")
    assert tensor.tolist() == [1.0, 2.0]
    assert ALONE.gather("x", "a test") == ["x"] and ALONE.largest(-3, "a test") == -3
    assert ALONE.share("cab", lambda letter: 1) == ["c", "a", "b"] and ALONE.device("cuda:3") == "cuda:3"
    assert not dist.is_initialized()


def test_the_launcher_says_who_this_is() -> None:
    """Rank, size and local rank are those of the environment; without it, or with one process, there is one rank."""
    assert launched({}) == launched({"WORLD_SIZE": "1", "RANK": "0"}) == (0, 1, 0)
    assert launched(TORCHRUN) == (1, 4, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_PORT": ""}, "WORLD_SIZE is 4 but MASTER_PORT is not set; start with `torchrun"),
        ({"RANK": "4"}, "RANK 4 is not one of 4 ranks, 0 to 3"),
    ],
)
def test_half_an_environment_is_refused(change: dict[str, str], message: str) -> None:
    """A size without a place or an address is no launcher's: it must not become one silent process."""
    with pytest.raises(ConfigError, match=message):
        launched(TORCHRUN | change)


def test_any_launcher_that_sets_these_five_variables_will_do() -> None:
    """Nothing else of torchrun's environment is read, so `accelerate launch`, whose own variables are more, is one."""

    class Noted(dict[str, str]):
        read: ClassVar[set[str]] = set()

        def __getitem__(self, name: str) -> str:
            self.read.add(name)
            return super().__getitem__(name)

        def get(self, name: str, default: Any = None) -> Any:
            self.read.add(name)
            return super().get(name, default)

    more = {"LOCAL_WORLD_SIZE": "9", "GROUP_RANK": "9", "ACCELERATE_MIXED_PRECISION": "fp16", "FSDP_VERSION": "2"}
    assert launched(Noted(TORCHRUN | more)) == launched(TORCHRUN)
    assert Noted.read == {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} == set(TORCHRUN)
    root = Path(parallel.__file__).parents[1]
    named = {name for file in root.rglob("*.py") for name in re.findall(ENVIRON, file.read_text())}
    own = {"PREFTUNE_CACHE", "PREFTUNE_DEBUG", "PREFTUNE_TIMEOUT"}
    told = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY", "KINETO_LOG_LEVEL"}
    assert named == own | told | {"MASTER_ADDR", "OMP_NUM_THREADS", "TERM", "DISPLAY", "WAYLAND_DISPLAY"}


def test_items_are_taken_in_turn_and_all_hear_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, seven items: rank i mod 3 works on item i, and every rank gets all results in their order."""
    told: dict[int, list[list[str]]] = {0: [], 1: [], 2: []}

    def gather(world: World, value: list[str], what: str) -> list[list[str]]:
        told[world.rank].append(value)
        done = len(told[world.rank])
        return [[str(item)] for item in range(7)[3 * done - 3 : 3 * done]] + [[]]

    monkeypatch.setattr(World, "gather", gather)
    for rank in range(3):
        assert list(World(rank, 3).in_turn(range(7), int, "a test", tell=str, hear=int)) == list(range(7))
    assert told == {0: [["0"], ["3"], ["6"]], 1: [["1"], ["4"], []], 2: [["2"], ["5"], []]}
    assert list(ALONE.in_turn("abc", str.upper, "a test", tell=ord, hear=chr)) == ["A", "B", "C"]


@pytest.mark.parametrize("said", ["soon", "0", "nan", "-3"])
def test_a_time_limit_is_a_number_of_seconds(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PREFTUNE_TIMEOUT is taken as it stands or refused."""
    monkeypatch.setenv("PREFTUNE_TIMEOUT", "90")
    assert parallel.time_limit() == 90
    monkeypatch.setenv("PREFTUNE_TIMEOUT", said)
    with pytest.raises(ConfigError, match=f"PREFTUNE_TIMEOUT is '{said}'"):
        parallel.time_limit()


def test_every_rank_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda` is the local rank's; one device for all, or fewer devices than processes, is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert World(9, 16, 1).device("auto") == World(9, 16, 1).device("cuda") == "cuda:1"
    assert World(9, 16, 1).device("cpu") == "cpu" and ALONE.device("auto") == "cuda"
    with pytest.raises(ConfigError, match="device cuda:0 cannot be that of 16 processes"):
        World(9, 16, 1).device("cuda:0")
    with pytest.raises(ConfigError, match="process 5 of this machine has no accelerator: 4 are there"):
        World(13, 16, 5).device("auto")


def watches(size: int, limit: float = 100.0) -> list[Any]:
    store = dist.HashStore()
    return [Watch(store, rank, size, limit) for rank in range(size)]


def test_the_first_failure_is_everybodys_reason() -> None:
    """Of several failures the first counts; every rank hears it with the rank that it happened on."""
    zero, one, two = watches(3)
    assert zero._failure() == ""
    assert two.report("the disk is full") and not one.report("connection lost")
    assert zero._failure() == one._failure() == "rank 2 failed: the disk is full"


def test_a_rank_without_a_beat_is_named_to_all() -> None:
    """Rank 0 listens to every rank; the one that beats no more is named with its machine, and rank 1 hears it."""
    zero, one, two = watches(3)
    assert zero._suspect(0.2) == ""
    time.sleep(0.3)
    zero._beat(1)
    one._beat(1)
    assert zero._suspect(0.2).startswith(f"rank 2 on {platform.node()} gave no sign of life")
    assert one._failure().startswith(f"rank 2 on {platform.node()} gave no sign of life")
    assert two._suspect(0.2) == ""


def test_a_rank_that_does_not_come_is_named() -> None:
    """Alive but absent: after the time limit the rank that has begun fewer collectives is named, and the place."""
    zero, one, two = watches(3, limit=0.2)
    with zero.waiting("the gradients of step 7"), one.waiting("the gradients of step 7"):
        for watch in (zero, one, two):
            watch._beat(1)
        assert zero._suspect(100) == ""
        time.sleep(0.3)
        told = f"rank 2 on {platform.node()} did not come to the gradients of step 7 within 0.2 seconds"
        assert zero._suspect(100) == f"{told} (PREFTUNE_TIMEOUT)"
        assert one._failure() == f"{told} (PREFTUNE_TIMEOUT)"


def test_who_is_gone_is_named_though_rank_0_noticed_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 lost its connection to rank 2 and rank 0 waits, long patient, for rank 1: then rank 0 judges at once."""
    for name, seconds in (("BEAT", 0.02), ("LOST_AFTER", 1.0), ("DEAD_AFTER", 100.0)):
        monkeypatch.setattr(watching, name, seconds)
    zero, one, _ = watches(3)
    zero.start(), one.start()
    try:
        told = one.who_is_gone("the gradients of step 3", RuntimeError("connection reset by peer"))
    finally:
        zero.stop(), one.stop()
    assert told.startswith(f"rank 2 on {platform.node()} gave no sign of life")


def test_who_cannot_tell_the_others_tells_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the machine of rank 0 its store is lost: a rank that finds it gone names it, and speaks for itself."""
    monkeypatch.setenv("MASTER_ADDR", "node0")
    _, one = watches(2)
    monkeypatch.setattr(one, "_store", LostStore())
    told = one.who_is_gone("the norm", RuntimeError())
    assert told == "rank 0 or the launcher on node0 is gone; rank 1 waited at the norm"
    assert one.report("the norm: rank 0 is gone")


class LostStore:
    """A store whose machine is gone."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("connection reset by peer")


def test_a_difference_between_ranks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that should agree and do not are an error that names the first one that differs."""
    monkeypatch.setattr(World, "gather", lambda self, value, what: [value, value, "b"])
    with pytest.raises(RunError, match="settings: rank 2 has 'b', rank 0 has 'a'"):
        World(0, 3).same("a", "settings")
