"""The judge reward, against a server process."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from realign.rewards.base import RewardError
from realign.rewards.judge import JudgeOptions, JudgeReward
from realign.rewards.spec import build_reward
from tests.rewards.conftest import draw_picture, make_sample

SERVER = Path(__file__).with_name("judge_server.py")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, SERVER], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as server:
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        finally:
            server.kill()


def read_log(url: str) -> list[dict]:
    with urllib.request.urlopen(f"{url}/log") as response:
        return json.loads(response.read())


def judge(url: str, **options: object) -> JudgeReward:
    return JudgeReward(JudgeOptions(url, "m", **{"pause": 0.01, "timeout": 5.0, **options}))


def test_the_answers_become_scores_in_order(url):
    samples = [make_sample(i, prompt=f"sleep={0.3 - i / 10} score={i * 2.5}") for i in range(4)]
    score = build_reward(f"judge:{url}?model=m&parallel=4", "cpu").score(samples)
    assert score.tolist() == [0.0, 0.25, 0.5, 0.75]


def test_what_the_server_is_asked(url, monkeypatch):
    monkeypatch.setenv("REALIGN_JUDGE_KEY", "secret")
    array = torch.from_numpy(np.array(draw_picture(5)))
    sample = make_sample(5, prompt="a lamp, score=10", picture=array, references=[draw_picture(6)])
    assert judge(f"{url}/").score([sample]).tolist() == [1.0]
    asked = read_log(url)[-1]
    assert (asked["path"], asked["key"]) == ("/v1/chat/completions", "Bearer secret")
    assert (asked["body"]["model"], asked["body"]["temperature"]) == ("m", 0)
    *pictures, text = asked["body"]["messages"][0]["content"]
    assert "a lamp" in text["text"]
    assert "1 reference picture " in text["text"]
    for part, seed in zip(pictures, (6, 5), strict=True):
        kind, data = part["image_url"]["url"].split(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(draw_picture(seed)))


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again(url, code):
    assert judge(url).score([make_sample(prompt=f"fail={code}x2 score=5")]).tolist() == [0.5]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("fail=503x9 score=1", "503 Service Unavailable: .*told.*after 3 tries.*see that the server runs"),
        ("fail=401x9 score=1", "401 Unauthorized.*after a try.*correct url, model or REALIGN_JUDGE_KEY"),
        ("fail=404x9 score=2", "404 Not Found"),
        ("say=no idea", "no score of 0 to 10: 'no idea'"),
        ("say=SCORE: 11", "no score of 0 to 10"),
        ("say=nothing", "no chat completion"),
        ("hang up", "cannot be reached"),
    ],
)
def test_a_failure_names_reward_sample_and_mend(url, prompt, said):
    tries = 0 if "401" in prompt else 2
    with pytest.raises(RewardError, match=r"^reward judge:http[^\n]*: sample 'bad': [^\n]*$") as error:
        judge(url, retries=tries).score(
            [make_sample(0, prompt="score=1"), make_sample(1, name="bad", prompt=prompt)]
        )
    assert error.match(said)


def test_failures_that_will_not_pass_are_not_tried_again(url):
    before = len(read_log(url))
    with pytest.raises(RewardError):
        judge(url, retries=5).score([make_sample(prompt="fail=400x9 score=3")])
    assert len(read_log(url)) == before + 1


def test_a_slow_server_is_given_up(url):
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"cannot be reached \(.*timed out.*after 2 tries"):
        judge(url, timeout=0.2, retries=1).score([make_sample(prompt="sleep=3 score=1")])
    assert time.monotonic() - start < 2.5


def test_no_server():
    with pytest.raises(RewardError, match=r"cannot be reached.*refused"):
        judge("http://127.0.0.1:9/v1", retries=0).score([make_sample()])
