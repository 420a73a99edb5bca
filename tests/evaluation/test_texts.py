"""What is measured of a text: loops, repeated runs, copies among samples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.evaluation.texts import COPIES, distinct_ngrams, longest_loop, repeated, said_elsewhere, shape, units


@pytest.mark.parametrize(
    ("text", "piece", "covered"),
    [
        ("when when when", ("when",), 3),
        ("so he went when when when when home", ("when",), 4),
        ("a b a b a b a", ("a", "b"), 7),  # three copies and the beginning of a fourth
        ("the end the end", (), 0),  # twice is no loop
        ("very very good", (), 0),
        ("x y z x y z x y z and a a a", ("x", "y", "z"), 9),  # the longest, not the first or the shortest
        ("hahahaha", ("h", "a"), 8),  # one word: its characters
        ("", (), 0),
    ],
)
def test_a_loop_is_a_piece_said_three_times_in_a_row(text: str, piece: tuple[str, ...], covered: int) -> None:
    """The piece, and all units that its copies cover, a cut last copy included."""
    found = shape(text)
    assert (found.loop.piece, found.loop.units) == (piece, covered)
    assert found.loops == (covered > 0)


@given(st.lists(st.sampled_from("ab"), max_size=14))
def test_the_longest_loop_is_the_one_that_brute_force_finds(parts: list[str]) -> None:
    """Against every stretch and every period, by definition."""
    best = 0
    for start in range(len(parts)):
        for end in range(start + 1, len(parts) + 1):
            piece = parts[start:end]
            for period in range(1, len(piece) // COPIES + 1):
                if all(piece[i] == piece[i - period] for i in range(period, len(piece))):
                    best = max(best, len(piece))
    assert longest_loop(parts).units == best


def test_distinct_runs_are_counted_by_definition() -> None:
    """a b a b a: three runs of three, two of them equal; runs longer than the text leave nothing to repeat."""
    assert distinct_ngrams(["a", "b", "a", "b", "a"]) == pytest.approx(2 / 3)
    assert distinct_ngrams(["a", "b", "a", "b", "a"], n=1) == pytest.approx(2 / 5)
    assert distinct_ngrams(["a", "b"]) == 1.0
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        distinct_ngrams(["a"], n=0)


def test_lengths_are_those_of_the_text() -> None:
    """Characters of everything, words between white space; a text of one word is cut into characters."""
    found = shape(" two  words\n")
    assert (found.characters, found.words) == (12, 2)
    assert list(units(" two  words")) == ["two", "words"] and list(units("ab")) == ["a", "b"]


def test_copies_among_samples_are_a_share() -> None:
    """Of four samples two said something that had been said; none of no sample."""
    assert repeated(["a", "b", "a", "a"]) == 0.5
    assert repeated(["a", "b"]) == repeated([]) == 0.0


def test_an_answer_given_to_another_prompt_is_counted_and_one_repeated_to_the_same_is_not() -> None:
    """One text goes to two prompts, another twice to one."""
    assert said_elsewhere([["sorry", "a"], ["b", "b"], ["sorry", "sorry"], []]) == [0.5, 0.0, 1.0, 0.0]
