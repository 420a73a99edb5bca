"""Rows that are cut, joined, numbered or ended wrongly, on the way from text to what the model is fed."""

from __future__ import annotations

from fault import Fault

_PACKING = "src/preftune/data/packing.py"
_TOKENS = "src/preftune/data/tokens.py"
_TRUNCATION = "src/preftune/data/truncation.py"
_DOCTOR = "src/preftune/data/doctor.py"
_RANKING = "src/preftune/data/ranking.py"
_ATTENTION = "src/preftune/models/attention.py"
_ROWS = "tests/data/test_packing.py"
_TEXTS = "tests/data/test_tokens.py"
_PAST = f"{_ROWS} -k own_past"

FAULTS = [
    Fault(
        "packing: all batches of a set are built at once",
        _PACKING,
        "return (pack(m, feed_last=feed_last) for m in members)",
        "return iter([pack(m, feed_last=feed_last) for m in members])",
        "tests/parts/test_few_batches_at_once.py",
    ),
    Fault(
        "packing: a rank takes more items than its turn",
        "src/preftune/engine/parallel.py",
        "        left = iter(items)\n",
        "        left = iter(list(items))\n",
        "tests/parts/test_few_batches_at_once.py -k turn",
    ),
    Fault(
        "packing: every token is predicted from itself, one position late",
        _PACKING,
        "scored += [(first + prompt - 1, shared)",
        "scored += [(first + prompt, shared)",
        _PAST,
    ),
    Fault(
        "packing: the first token of a further response is predicted from its neighbour's end",
        _PACKING,
        "shared, moved = min(prefix, last) - (prompt - 1)",
        "shared, moved = min(prompt, last) - (prompt - 1)",
        _PAST,
    ),
    Fault(
        "packing: positions of a further response start at zero",
        _PACKING,
        "fed.append((own_from, end - start))",
        "fed.append((0, end - start))",
        _PAST,
    ),
    Fault(
        "packing: positions run through the whole row",
        _PACKING,
        "fed.append((own_from, end - start))",
        "fed.append((start, end - start))",
        _PAST,
    ),
    Fault(
        "packing: a further response sees the first one",
        _PACKING,
        "Segment(start, end, first, first + prefix)",
        "Segment(start, end, first, start)",
        _PAST,
    ),
    Fault(
        "packing: a further response does not see its prompt",
        _PACKING,
        "Segment(start, end, first, first + prefix)",
        "Segment(start, end)",
        _PAST,
    ),
    Fault(
        "packing: responses are taken to share tokens after the first difference",
        "src/preftune/data/columns.py",
        "return n if same.all() else int(same.argmin())",
        "return int(same.sum())",
        _PAST,
    ),
    Fault(
        "padding: the last token of the prompt is scored too",
        _PACKING,
        "row * width + np.arange(p - 1, len(ids))",
        "row * width + np.arange(p - 2, len(ids))",
        f"{_ROWS} -k padded_rows",
    ),
    Fault(
        "padding: every token is predicted one position late",
        _PACKING,
        "row * width + np.arange(p - 1, len(ids))",
        "row * width + np.arange(p, len(ids) + 1)",
        f"{_ROWS} -k padded_rows",
    ),
    Fault(
        "steps: the short last step of an epoch is dropped",
        _PACKING,
        "int(self._pairs.sum() - self._pairs.max()) // batch_size + 1",
        "max(1, int(self._pairs.sum()) // batch_size)",
        f"{_ROWS} -k short_last_one",
    ),
    Fault(
        "steps: every epoch has the order of the first",
        _PACKING,
        "np.random.default_rng([self._seed, epoch])",
        "np.random.default_rng([self._seed, 0])",
        f"{_ROWS} -k epochs_and_seeds",
    ),
    Fault(
        "tokens: the end of sequence stands twice",
        _TOKENS,
        "ids = ids[: ids.index(end) + 1] if written else [*ids, end]",
        "ids = ids[: ids.index(end) + 1] if written else [*ids, end, end]",
        f"{_TEXTS} -k exactly_one_eos",
    ),
    Fault(
        "tokens: the end of sequence is missing, so a model never learns to stop",
        _TOKENS,
        "ids = ids[: ids.index(end) + 1] if written else [*ids, end]",
        "ids = ids[: ids.index(end) + 1] if written else ids",
        f"{_TEXTS} -k exactly_one_eos",
    ),
    Fault(
        "tokens: the chat template's end mark and one more",
        _TOKENS,
        "ids = ids[: ids.index(end) + 1] if written else [*ids, end]",
        "ids = [*ids, end]",
        "tests/data/test_conversations.py -k every_family",
    ),
    Fault(
        "tokens: the line break behind the end mark is trained",
        _TOKENS,
        "ids = ids[: ids.index(end) + 1] if written else [*ids, end]",
        "ids = ids if written else [*ids, end]",
        "tests/data/test_conversations.py -k line_break",
    ),
    Fault(
        "tokens: an unfinished response is ended",
        _TOKENS,
        "    if finished:\n        ids =",
        "    if True:\n        ids =",
        f"{_TEXTS} -k unfinished",
    ),
    Fault(
        "tokens: pad equal to the end of sequence masks the real end",
        _TOKENS,
        "(self._writer.eos, 0)",
        "(self._writer.eos, int(self._tokenizer.pad_token_id == self._writer.eos))",
        f"{_TEXTS} -k pad_token",
    ),
    Fault(
        "tokens: the beginning of sequence stands twice",
        _TOKENS,
        "if not row.chat and prompt[: len(self._head)] != self._head:",
        "if not row.chat:",
        f"{_TEXTS} -k bos_stands_once",
    ),
    Fault(
        "tokens: no beginning of sequence",
        _TOKENS,
        "if not row.chat and prompt[: len(self._head)] != self._head:",
        "if False:",
        f"{_TEXTS} -k bos_stands_once",
    ),
    Fault(
        "tokens: a merge across the border is cut by count",
        _TOKENS,
        "exact = all(whole[: len(prompt)] == prompt for whole in wholes)",
        "exact = True",
        f"{_TEXTS} -k merge_across",
    ),
    Fault(
        "tokens: prompt and response are always tokenised apart",
        _TOKENS,
        "exact = all(whole[: len(prompt)] == prompt for whole in wholes)",
        "exact = False",
        f"{_TEXTS} -k as_a_whole",
    ),
    Fault(
        "truncation: the prompt keeps its beginning and loses the question",
        _TRUNCATION,
        "group.prompt[len(group.prompt) - (room - head) :]",
        "group.prompt[head:room]",
        "tests/data/test_doctor.py -k right_end",
    ),
    Fault(
        "truncation: the room of a response does not depend on its prompt",
        _TRUNCATION,
        "room = max_length - len(group.prompt)",
        "room = max_length // 2",
        "tests/data/test_doctor.py -k truncat",
    ),
    Fault(
        "truncation: a row that is too long is trained on as it is",
        _TRUNCATION,
        "if prompt + response <= max_length:",
        "if response <= max_length:",
        "tests/data/test_doctor.py -k truncat",
    ),
    Fault(
        "data: prompts of the evaluation set are trained on",
        _DOCTOR,
        "if key in self.held_out:",
        "if False:",
        "tests/data/test_doctor.py -k evaluation",
    ),
    Fault(
        "data: identical responses are compared",
        _DOCTOR,
        "if np.array_equal(group.responses[chosen], group.responses[rejected]):",
        "if False:",
        "tests/data/test_doctor.py",
    ),
    Fault(
        "data: a copied row counts twice",
        _DOCTOR,
        "        if original != row:\n",
        "        if False:\n",
        "tests/data/test_doctor.py -k exact_copy",
    ),
    Fault(
        "data: one annotator may contradict himself",
        _DOCTOR,
        "if annotator == other:",
        "if False:",
        "tests/data/test_doctor.py -k annotators",
    ),
    Fault(
        "ranking: the smaller score wins",
        _RANKING,
        "enumerate(sorted(set(scores), reverse=True), start=1)",
        "enumerate(sorted(set(scores)), start=1)",
        "tests/data/test_ranking.py",
    ),
    Fault(
        "ranking: a tie is decided by the order in the file",
        _RANKING,
        "    return tuple(rank_of[score] for score in scores)",
        "    return tuple(rank_of[score] + scores[:i].count(score) for i, score in enumerate(scores))",
        "tests/data/test_ranking.py",
    ),
    Fault(
        "mismatched: a response may come from a group of the same prompt",
        "src/preftune/data/mismatched.py",
        "np.where(place < largest, largest + place % (n - largest), (place + largest) % n)",
        "(place + 1) % n",
        "tests/data/test_mismatched.py",
    ),
    Fault(
        "attention: a token sees the next one",
        _ATTENTION,
        "own = (self._segment[q] == self._segment[k]) & (k <= q)",
        "own = (self._segment[q] == self._segment[k]) & (k <= q + 1)",
        "tests/models/test_attention.py -k read_token_by_token",
    ),
    Fault(
        "attention: groups of a row see those before them",
        _ATTENTION,
        "(self._segment[q] == self._segment[k])",
        "(self._segment[q] >= self._segment[k])",
        "tests/models/test_attention.py -k read_token_by_token",
    ),
    Fault(
        "attention: a sliding window counts places in the row, not positions in the sequence",
        _ATTENTION,
        "(self._position[q] - self._position[k] < window)",
        "(q - k < window)",
        "tests/models/test_attention.py -k read_token_by_token",
    ),
]
