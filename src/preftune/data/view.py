"""Rows as the model will see them: decoded ids, and which of them are scored.

    prompt      dim, marked |      read, never scored
    chosen      green, marked +    scored, the end mark included
    rejected    red, marked -      scored
    both        yellow, marked *   chosen in one pair, rejected in another
    desirable   green, marked +    scored; undesirable like rejected
    mismatched  cyan, marked ~     scored, answers another prompt

Special tokens stand out in bold. The marks are there without colour too, so a log file shows the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.text import Text

from preftune.data.conversations import Tokenizer, special_tokens
from preftune.tensors import TokenGroup

__all__ = ["example"]

# What a terminal would obey instead of showing: everything that is not text, line break or tab.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def example(group: TokenGroup, tokenizer: Tokenizer) -> Text:
    """One group, decoded, with its mask in colour; rich drops the colour where there is no terminal."""
    special = special_tokens(tokenizer)
    head = _decode(tokenizer, group.prompt.tolist())
    text = Text()
    text.append(f"{group.origin}{_pairs(group)}\n", style="bold")
    _block(text, f"prompt: {len(group.prompt)} tokens, not scored", head, "|", "dim")
    for i, response in enumerate(group.responses):
        ids = response.tolist()
        whole = _decode(tokenizer, [*group.prompt.tolist(), *ids])  # apart, many tokenizers lose a leading space
        words = whole[len(head) :] if whole.startswith(head) else _decode(tokenizer, ids)
        name, mark, style = _role(group, i)
        end = f"ends with {special[ids[-1]]}" if ids[-1] in special else "no end mark"
        _block(text, f"{name}: {len(ids)} tokens, scored, {end}", words, mark, style)
    text.highlight_words(list(special.values()), style="bold reverse")
    return text


def _block(text: Text, title: str, words: str, mark: str, style: str) -> None:
    text.append(f"  {title}\n")
    for line in _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", words).split("\n"):
        text.append(f"    {mark} ")
        text.append(f"{line}\n", style=style)


def _role(group: TokenGroup, i: int) -> tuple[str, str, str]:
    """What response `i` is called, its mark and its style."""
    if i >= group.own:
        return "mismatched", "~", "cyan"
    if group.labels:
        return ("desirable", "+", "green") if group.labels[i] else ("undesirable", "-", "red")
    wins, losses = any(i == chosen for chosen, _ in group.pairs), any(i == rejected for _, rejected in group.pairs)
    mark, style = ("*", "yellow") if wins and losses else ("-", "red") if losses else ("+", "green")
    if group.own == 1:
        return "response", mark, style
    if group.own == 2:
        return ("chosen" if wins else "rejected"), mark, style
    return f"response {i}", mark, style


def _pairs(group: TokenGroup) -> str:
    if group.own < 3 or not group.pairs:
        return ""
    return ", pairs (chosen > rejected): " + ", ".join(f"{chosen} > {rejected}" for chosen, rejected in group.pairs)


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
