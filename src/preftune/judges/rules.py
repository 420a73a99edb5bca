"""Rules as judges: length, a regular expression, valid JSON, and functions of the user's own.

length             characters of the response: the longer one wins (the baseline every other judge is held against)
regex:PATTERN      1 where the pattern is found anywhere in the response (Python `re`), else 0
json               1 where the whole response is one valid JSON text (RFC 8259: no NaN, no Infinity), else 0
python:MODULE:F    F(prompt, response) of an importable module: code of the user's, run only when that is allowed
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from preftune.errors import ConfigError
from preftune.judges.scores import ScoreJudge, scorer
from preftune.records import Prompt

__all__ = ["json_rule", "length_rule", "python_rule", "regex_rule"]


def length_rule() -> ScoreJudge:
    """The response with more characters wins."""
    return ScoreJudge("rule:length", scorer(lambda prompt, text: float(len(text))))


def regex_rule(pattern: str) -> ScoreJudge:
    """A response in which the pattern is found wins over one in which it is not. Raises ConfigError on no pattern."""
    try:
        found = re.compile(pattern)
    except re.error as problem:
        raise ConfigError(f"rule:regex:{pattern}: no regular expression ({problem})") from None
    return ScoreJudge(f"rule:regex:{pattern}", scorer(lambda prompt, text: float(found.search(text) is not None)))


def json_rule() -> ScoreJudge:
    """A response that is valid JSON wins over one that is not."""
    return ScoreJudge("rule:json", scorer(lambda prompt, text: float(_is_json(text))))


def python_rule(place: str, *, allowed: bool) -> ScoreJudge:
    """The response with the larger `function(prompt, response)` wins; `place` is `module:function`.

    `prompt` is text or a tuple of messages, `response` is text. Raises ConfigError unless `allowed`, and when there is
    no such function.
    """
    name = f"rule:python:{place}"
    if not allowed:
        raise ConfigError(f"{name} runs code of your own; say so with --allow_python")
    module, colon, attribute = place.partition(":")
    if not (module and colon and attribute.isidentifier()):
        raise ConfigError(f"{name}: expected rule:python:MODULE:FUNCTION")
    try:
        function: Callable[[Prompt, str], Any] | None = vars(importlib.import_module(module)).get(attribute)
    except ImportError as problem:
        raise ConfigError(f"{name}: cannot import {module} ({problem}); install it or set PYTHONPATH") from problem
    if not callable(function):
        raise ConfigError(f"{name}: module {module} has no function {attribute}")
    return ScoreJudge(name, scorer(function))


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
