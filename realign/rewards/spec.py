"""Rewards by name: `clip:mini*0.7+format*0.3`.

A spec is terms joined by `+`; a term is KIND, perhaps `:TARGET`, perhaps `*WEIGHT` (if it is not 1):

    clip[:MODEL]               cosine of picture and caption; MODEL: mini, ViT-L-14:openai, a file or a folder
    image_similarity[:MODEL]   mean cosine of picture and references
    format                     whether the IC-CoT is well formed
    oracle[:parts|strict]      the procedural world's oracle
    function:MODULE:NAME       a Python function of a list of samples
    judge:URL?model=NAME       a model behind an OpenAI-compatible endpoint; &timeout=S&retries=N&...
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import torch

from realign.rewards.base import Reward, WeightedSum
from realign.rewards.clip import ClipEncoder, ClipReward, ImageSimilarityReward
from realign.rewards.format import FormatReward
from realign.rewards.function import FunctionReward
from realign.rewards.judge import JudgeOptions, JudgeReward
from realign.rewards.oracle import OracleReward

KINDS = ("clip", "image_similarity", "format", "oracle", "function", "judge")
NEEDS_TARGET = ("function", "judge")
TAKES_NO_TARGET = ("format",)
_JOINT = re.compile(r"\+(?=\s*(?:" + "|".join(KINDS) + r")\s*(?:[:*+]|$))")
_WEIGHT = re.compile(r"\*\s*([^*:/]+?)\s*$")


@dataclass(frozen=True)
class Term:
    """One reward of a sum: its kind, what comes after the colon (None: nothing), and its weight."""

    kind: str
    target: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"reward {self.kind!r} is not known: must be one of {', '.join(KINDS)}")
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"reward {self.kind}: weight is {self.weight}: must be a number other than 0")
        if self.kind in NEEDS_TARGET and not self.target:
            raise ValueError(f"reward {self.kind} needs a target: see {self.kind}:... in the help")
        if self.kind in TAKES_NO_TARGET and self.target is not None:
            raise ValueError(f"reward {self.kind} takes no target: it has {self.target!r}")
        if self.target == "":
            raise ValueError(f"reward {self.kind}: nothing follows the colon")

    def __str__(self) -> str:
        named = self.kind if self.target is None else f"{self.kind}:{self.target}"
        return named if self.weight == 1 else f"{named}*{self.weight:g}"


def parse_spec(spec: str) -> tuple[Term, ...]:
    """The terms of a spec. Raises ValueError that says what is wrong."""
    if not spec.strip():
        raise ValueError("the reward is empty: give one, such as clip:mini*0.7+format*0.3")
    return tuple(_parse_term(text.strip()) for text in _JOINT.split(spec))


def _parse_term(text: str) -> Term:
    weight = _WEIGHT.search(text)
    rest = text[: weight.start()] if weight else text
    kind, separator, target = rest.strip().partition(":")
    try:
        value = float(weight.group(1)) if weight else 1.0
    except ValueError:
        raise ValueError(f"reward {text!r}: {weight.group(1)!r} after * is not a number") from None
    return Term(kind.strip(), target.strip() if separator else None, value)


def build_reward(spec: str, device: torch.device | str | None = None) -> WeightedSum:
    """The reward that a spec names, its models loaded.

    Args:
        spec: see the head of this module.
        device: for models; None: cuda where there is one.

    Raises: ValueError for a spec that is wrong, or a model or function that is not there.
    """
    terms = parse_spec(spec)
    encoders: dict[str, ClipEncoder] = {}

    def encoder(name: str) -> ClipEncoder:
        if name not in encoders:
            encoders[name] = ClipEncoder(name, device)
        return encoders[name]

    return WeightedSum([(_build(term, encoder), term.weight) for term in terms])


def _build(term: Term, encoder: Callable[[str], ClipEncoder]) -> Reward:
    if term.kind == "format":
        return FormatReward()
    if term.kind == "oracle":
        return OracleReward(term.target or "parts")
    if term.kind == "function":
        return FunctionReward(term.target)
    if term.kind == "judge":
        return JudgeReward(parse_judge(term.target))
    model = term.target or "mini"
    kind = ClipReward if term.kind == "clip" else ImageSimilarityReward
    return kind(model, encoder=encoder(model))


def parse_judge(target: str) -> JudgeOptions:
    """`URL?model=NAME&timeout=60&retries=3&pause=1&parallel=8`. Raises ValueError."""
    parts = urlsplit(target)
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    kinds = {"model": str, "timeout": float, "retries": int, "pause": float, "parallel": int}
    unknown = sorted(given.keys() - kinds.keys())
    if unknown:
        raise ValueError(f"judge has no option {unknown[0]!r}: must be one of {', '.join(kinds)}")
    values = {}
    for name, text in given.items():
        try:
            values[name] = kinds[name](text)
        except ValueError:
            raise ValueError(f"judge {name} is {text!r}: must be a number") from None
    return JudgeOptions(urlunsplit(parts._replace(query="")), values.pop("model", ""), **values)
