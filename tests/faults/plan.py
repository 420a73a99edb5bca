"""A cost model that forgets, doubles or misplaces something, and a plan that promises what it must not."""

from __future__ import annotations

from fault import Fault

_COST = "src/preftune/models/cost.py"
_PLANNING = "src/preftune/parts/planning.py"
_PLAN = "src/preftune/recipes/plan.py"
_RECOMPUTING = "src/preftune/parts/recomputing.py"
_CHOICE = "tests/parts/test_recomputing.py"
_COSTS = "tests/models/test_cost.py"
_PLANS = "tests/parts/test_planning.py"
_STAGE = "tests/recipes/test_plan.py"

FAULTS = [
    Fault(
        "cost: the last token of a response is counted as fed",
        _COST,
        "sum(length - 1 for length in responses)",
        "sum(length for length in responses)",
        f"{_COSTS} -k torch_counts",
    ),
    Fault(
        "cost: the head counts as a layer of the decoder",
        _COST,
        "if m is not head for w in _weights(m)]",
        "for w in _weights(m)] + [head.weight]",
        f"{_COSTS} -k torch_counts",
    ),
    Fault(
        "cost: frozen weights get a weight gradient",
        _COST,
        "trains = 4 if rank else 6",
        "trains = 6",
        f"{_COSTS} -k torch_counts",
    ),
    Fault(
        "cost: attention's backward costs as much as its forward",
        _COST,
        "(3.5 + again) * 4",
        "(2 + again) * 4",
        f"{_COSTS} -k literature",
    ),
    Fault(
        "cost: activation checkpointing recomputes the head too",
        _COST,
        "trains * shape.head * work.scored + (",
        "(trains + 2 * again) * shape.head * work.scored + (",
        f"{_COSTS} -k checkpointing_reference",
    ),
    Fault(
        "cost: a tensor that two operations keep is counted twice",
        _COST,
        "storages[storage._cdata] = storage",
        "storages[len(storages)] = storage",
        f"{_COSTS} -k autograd_keeps",
    ),
    Fault(
        "cost: of what is gathered outside of layers only the head counts",
        _COST,
        "shape.outside * size) if shards",
        "shape.head * size) if shards",
        "tests/parallel/test_gathered.py",
    ),
    Fault(
        "cost: probabilities kept on a CPU take no room",
        _COST,
        'if device == "cpu":',
        'if device == "":',
        f"{_COSTS} -k is_foreseen",
    ),
    Fault(
        "cost: gradients outside of layers are in parts at once",
        _COST,
        "ending = (4 * size if shape.tied else size + 4) * shape.outside",
        "ending = size * shape.outside",
        f"{_COSTS} -k fsdp_holds",
    ),
    Fault(
        "cost: a reference in parts leaves nothing gathered",
        _COST,
        "size / shards + outside if reference_in_loop",
        "size / shards if reference_in_loop",
        "tests/parallel/test_gathered.py",
    ),
    Fault(
        "cost: a reference in parts travels for nothing",
        _COST,
        " + (shape.body if reference_in_loop else 0)",
        "",
        f"{_PLANS} -k in_the_loop",
    ),
    Fault(
        "cost: an adapter carries the moments of the base",
        _COST,
        "moments=4 * moments * trained / shards",
        "moments=4 * moments * shape.parameters / shards",
        f"{_COSTS} -k adapter_holds",
    ),
    Fault(
        "cost: an all-reduce sends what a reduce-scatter sends",
        _COST,
        "(micro_batches if shard else 2)",
        "(micro_batches if shard else 1)",
        f"{_COSTS} -k shards_divide",
    ),
    Fault(
        "cost: the model asked about is given another attention",
        _COST,
        "config = deepcopy(config)  #",
        "pass  #",
        f"{_COSTS} -k left_as_it_was",
    ),
    Fault(
        "plan: the mean device sets the pace",
        _PLANNING,
        "return math.ceil(self.batch_size / self.devices)",
        "return max(1, self.batch_size // self.devices)",
        f"{_PLANS} -k busiest",
    ),
    Fault(
        "plan: the smallest budget that fits is taken",
        _PLANNING,
        "return powers[::-1] or",
        "return powers or",
        f"{_PLANS} -k largest_that_fits",
    ),
    Fault(
        "plan: all of the memory may be planned with",
        _PLANNING,
        "fits=held.total <= USABLE * on.memory * 1e9",
        "fits=held.total <= on.memory * 1e10",
        f"{_PLANS} -k advice_fits",
    ),
    Fault(
        "plan: sending is hidden at the slow end too",
        _PLANNING,
        "(max(compute, sending) if end else compute + sending)",
        "max(compute, sending)",
        f"{_PLANS} -k network_shown",
    ),
    Fault(
        "plan: shards for a hundredth",
        _PLANNING,
        "(1.1 if one.shard else 1.0)",
        "(1.0 if one.shard else 1.0)",
        f"{_PLANS} -k replicas_do",
    ),
    Fault(
        "plan: work per row instead of per pair",
        _PLAN,
        ".times(1 / pairs)",
        ".times(1)",
        f"{_STAGE} -k lengths_of_the_data",
    ),
    Fault(
        "recomputing: all that is free is planned with",
        _RECOMPUTING,
        "<= USABLE * free",
        "<= free",
        f"{_CHOICE} -k first_that_fits",
    ),
    Fault(
        "recomputing: before fewer tokens are computed at once",
        _RECOMPUTING,
        "for what in get_args(Recomputed) for size in sizes",
        "for size in sizes for what in get_args(Recomputed)",
        f"{_CHOICE} -k first_that_fits",
    ),
    Fault(
        "recomputing: a micro-batch has no room for the longest row",
        _RECOMPUTING,
        ">= max(longest, LEAST)",
        ">= LEAST",
        f"{_CHOICE} -k longest_row",
    ),
    Fault(
        "recomputing: weights that are loaded are counted again",
        _RECOMPUTING,
        "(parts.weights if shards == 1 else 0)",
        "0",
        f"{_CHOICE} -k changes_no_number",
    ),
    Fault(
        "recomputing: what is chosen is not done",
        "src/preftune/parts/common.py",
        "        what, tokens = recomputation(",
        "        tokens = recomputation(",
        f"{_CHOICE} -k changes_no_number",
    ),
    Fault(
        "cost: selective recomputation holds half of what linear layers write",
        _COST,
        "(self.written + self.attention if",
        "(self.written // 2 + self.attention if",
        f"{_CHOICE} -k foreseen_for_each",
    ),
    Fault(
        "cost: full recomputation holds no input of a layer",
        _COST,
        "held = self.layers * self.hidden + (",
        "held = self.hidden + (",
        f"{_CHOICE} -k foreseen_for_each",
    ),
    Fault(
        "memory: a container's limit is not asked for",
        "src/preftune/engine/memory.py",
        "free = min(free, int(",
        "free = max(free, int(",
        f"{_CHOICE} -k containers_limit",
    ),
]
