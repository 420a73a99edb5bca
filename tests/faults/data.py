"""Data kept on disk that come back as others, are taken for others, or are held in memory after all."""

from __future__ import annotations

from fault import Fault

_FILE = "src/preftune/data/token_file.py"
_CACHE = "src/preftune/data/tokenised.py"
_DOCTOR = "src/preftune/data/doctor.py"
_COLUMNS = "src/preftune/data/columns.py"
_REFERENCE = "src/preftune/engine/reference_cache.py"
_OF_FILE = "tests/data/test_token_file.py"
_OF_CACHE = "tests/data/test_tokenised.py"

FAULTS = [
    Fault(
        "token file: chosen and rejected change places on their way back",
        _FILE,
        "zip(pairs[::2], pairs[1::2], strict=True)",
        "zip(pairs[1::2], pairs[::2], strict=True)",
        f"{_OF_FILE} -k come_back",
    ),
    Fault(
        "token file: numbers of rows that were left out stand for those that are left",
        _FILE,
        "else whole[self._row]",
        "else whole[: len(self._row)]",
        f"{_OF_FILE} -k come_back",
    ),
    Fault(
        "token file: every group that was written is kept in memory",
        _FILE,
        "        self._rows.clear()",
        "        self._held = [*getattr(self, '_held', []), *self._rows]\n        held.append(self._held)\n"
        "        self._rows.clear()\n\n\nheld: list[list[Entry]] = []\n\n\nclass _Rest:\n    pass",
        f"{_OF_FILE} -k few_bytes",
    ),
    Fault(
        "data: rows with equal short digests are copies",
        _DOCTOR,
        'first.setdefault(rows.value("content", row), row)',
        "first.setdefault(digest[row].tobytes(), row)",
        f"{_OF_FILE} -k short_digest",
    ),
    Fault(
        "data: a comparison and its opposite have unrelated digests",
        _DOCTOR,
        "prompt + min(better, worse) + max(better, worse)",
        "prompt + better + worse",
        "tests/data/test_doctor.py -k annotators",
    ),
    Fault(
        "data: opposites are looked for among copies that were left out",
        _DOCTOR,
        "    return [row for row in found if kept[row]]",
        "    return found",
        "tests/data/test_doctor.py -k contradicted_copy",
    ),
    Fault(
        "tokenised: a damaged file is believed",
        _CACHE,
        'if written != {"identity": identity, "files": _hashes(folder)}:',
        'if written["identity"] != identity:',
        f"{_OF_CACHE} -k damaged",
    ),
    Fault(
        "tokenised: pairs drawn from one seed are read under another",
        _CACHE,
        '"seed": [seed, source.seed] if drawn else [],',
        '"seed": [],',
        f"{_OF_CACHE} -k another_folder",
    ),
    Fault(
        "tokenised: what is held out does not matter",
        _CACHE,
        '"".join(sorted(held_out))',
        '""',
        f"{_OF_CACHE} -k another_folder",
    ),
    Fault(
        "tokenised: two processes write at once",
        _CACHE,
        "with _locked(folder, fcntl.LOCK_EX):",
        "with _locked(folder, fcntl.LOCK_SH):",
        f"{_OF_CACHE} -k two_processes",
    ),
    Fault(
        "plan: the token that is not fed is taken for a shared one",
        _COLUMNS,
        'np.minimum(shared, column(groups, "shortest") - 1), total - count',
        "shared, total - count",
        "tests/data/test_columns.py -k fed_tokens",
    ),
    Fault(
        "cache: half of a key is enough",
        _REFERENCE,
        'right = same & (self._records["key"][number, 1] == keys[going, 1])',
        "right = same",
        "tests/engine/test_reference_cache.py -k sorted_in",
    ),
    Fault(
        "layouts: a question in a column that nobody reads is left out in silence",
        "src/preftune/data/layouts.py",
        "                fields.refuse_lost(_texts(record))\n",
        "",
        "tests/data/test_formats.py -k words_of_the_prompt",
    ),
    Fault(
        "layouts: a question that the conversation repeats refuses the row",
        "src/preftune/data/fields.py",
        "any(value.strip() in text for text in read)",
        "value in read",
        "tests/data/test_formats.py -k metadata",
    ),
    Fault(
        "files: the header of a second table is a row to train on",
        "src/preftune/data/files.py",
        'if cells == header or cells[0].startswith("\\ufeff"):',
        'if cells[0].startswith("\\ufeff"):',
        "tests/data/test_files.py -k joined",
    ),
]
