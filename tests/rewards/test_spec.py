"""Specs: what they build, what they refuse; sums; and that a failure is never a number."""

from __future__ import annotations

import math

import pytest
import torch

from realign.rewards.base import Reward, RewardError, WeightedSum
from realign.rewards.judge import JudgeOptions
from realign.rewards.spec import Term, build_reward, parse_judge, parse_spec
from tests.rewards.conftest import make_sample


class Fixed(Reward):
    def __init__(self, name: str, values: list[float]) -> None:
        self.name, self._values = name, values

    def score(self, samples):
        return self.gather(self._values, samples)


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("clip", [Term("clip")]),
        ("clip:mini*0.7+format*0.3", [Term("clip", "mini", 0.7), Term("format", None, 0.3)]),
        (" oracle:strict * 2 + format ", [Term("oracle", "strict", 2.0), Term("format")]),
        ("clip:ViT-L-14:openai*1e-1", [Term("clip", "ViT-L-14:openai", 0.1)]),
        ("clip:ViT-H-14:/a/b+c/d.safetensors", [Term("clip", "ViT-H-14:/a/b+c/d.safetensors")]),
        ("function:m.n:f*-1+oracle", [Term("function", "m.n:f", -1.0), Term("oracle")]),
        ("judge:http://h:1/v1?model=q&timeout=5*.5", [Term("judge", "http://h:1/v1?model=q&timeout=5", 0.5)]),
    ],
)
def test_terms(spec, terms):
    assert list(parse_spec(spec)) == terms
    assert parse_spec("+".join(map(str, terms))) == tuple(terms)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "empty"),
        ("nope", "'nope' is not known"),
        ("clip+nope", "'clip+nope' is not known"),
        ("clip*x", "'x' after * is not a number"),
        ("clip*nan", "weight is nan"),
        ("clip*0", "other than 0"),
        ("clip:", "nothing follows the colon"),
        ("format:x", "takes no target"),
        ("function", "needs a target"),
        ("judge", "needs a target"),
        ("oracle:maybe", "parts, strict"),
        ("function:math", "MODULE:NAME"),
        ("function:no.such.module:f", "cannot be imported"),
        ("function:math:no", "has no function 'no'"),
        ("function:math:pi", "has no function 'pi'"),
        ("judge:ftp://h?model=q", "must be http"),
        ("judge:http://h", "no model"),
        ("judge:http://h?model=q&timeout=soon", "timeout is 'soon'"),
        ("judge:http://h?model=q&timeout=0", "must be at least"),
        ("judge:http://h?model=q&colour=red", "no option 'colour'"),
        ("clip:nowhere", "must be 'mini', a folder"),
        ("clip:NoSuchModel:openai", "no model 'NoSuchModel'"),
        ("clip:ViT-B-32:no_such_tag", "neither a file nor a tag"),
        ("format*0.5+oracle+format*0.5", "format is named twice"),
    ],
)
def test_what_is_refused_in_one_line(spec, said):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        build_reward(spec, "cpu")
    assert said in str(error.value)


def test_judge_options():
    assert parse_judge("http://h:1/v1?model=a%2Bb&retries=0&parallel=2") == JudgeOptions(
        "http://h:1/v1", "a+b", retries=0, parallel=2
    )


def test_a_weighted_sum():
    samples = [make_sample(0), make_sample(1)]
    reward = WeightedSum(
        [(Fixed("a", [1.0, 2.0]), 0.5), (Fixed("b", [4.0, -4.0]), 0.25), (Fixed("c", [0, 1]), 1)]
    )
    torch.testing.assert_close(reward.score(samples), torch.tensor([1.5, 1.0]))
    assert reward.name == "a*0.5+b*0.25+c"
    parts = reward.score_parts(samples)
    assert {name: part.tolist() for name, part in parts.items()} == {"a": [1, 2], "b": [4, -4], "c": [0, 1]}
    torch.testing.assert_close(reward.combine(list(parts.values())), reward.score(samples))


def test_an_empty_sum_is_refused():
    with pytest.raises(ValueError, match="no terms"):
        WeightedSum([])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_names_reward_and_sample(value):
    with pytest.raises(RewardError, match="reward a: sample 's1': the score is"):
        Fixed("a", [1.0, value]).score([make_sample(0), make_sample(1)])


def test_a_wrong_number_of_scores_is_an_error():
    with pytest.raises(RewardError, match="one number each"):
        Fixed("a", [1.0]).score([make_sample(0), make_sample(1)])
