"""`judge:URL?model=NAME`: a model behind an OpenAI-compatible endpoint (vLLM, SGLang, a hosted one).

It is shown the references and the picture with the prompt, and answers with a number of 0 to 10.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from torch import Tensor

from realign.rewards.base import Reward, RewardError, Scored
from realign.rewards.pictures import to_array

QUESTION = (
    "You see {references} and, last, a picture that was made for this request:\n{prompt}\n"
    "How well does the last picture do what the request asks for, and keep what it takes from the others? "
    "Answer with one line: SCORE: and a number from 0 (not at all) to 10 (perfectly)."
)
ANSWER = re.compile(r"SCORE:\s*(\d+(?:\.\d+)?)", re.IGNORECASE)
MAX_SCORE = 10.0
# The server may do better the next time: it was busy, or is starting.
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
KEY_VARIABLE = "REALIGN_JUDGE_KEY"


@dataclass(frozen=True)
class JudgeOptions:
    """How a judge is asked.

    Attributes:
        url: of the API, such as http://127.0.0.1:8000/v1.
        model: the name that the server knows it by.
        timeout: seconds that one try may take.
        retries: tries after the first, where the server was busy, not there, or its answer has no score.
        pause: seconds before the second try, doubled each time.
        parallel: requests at a time.
    """

    url: str
    model: str
    timeout: float = 60.0
    retries: int = 3
    pause: float = 1.0
    parallel: int = 8

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(
                f"judge url is {self.url!r}: must be http(s)://HOST..., such as http://127.0.0.1:8000/v1"
            )
        if not self.model:
            raise ValueError(f"judge {self.url}: no model; add ?model=NAME")
        for name, least in (("timeout", 0.001), ("retries", 0), ("pause", 0), ("parallel", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"judge {name} is {getattr(self, name)}: must be at least {least}")


class JudgeError(Exception):
    """One try has failed; `may_pass`: another may not."""

    def __init__(self, what: str, may_pass: bool) -> None:
        super().__init__(what)
        self.may_pass = may_pass


class JudgeReward(Reward):
    """Asks for each sample; the score is the answer's number / 10, so 0 to 1.

    A key, where the server wants one, is taken from the environment variable REALIGN_JUDGE_KEY.
    """

    def __init__(self, options: JudgeOptions) -> None:
        self.options = options
        self.name = f"judge:{options.url}?model={options.model}"

    def score(self, samples: Sequence[Scored]) -> Tensor:
        """Scores; the first sample whose tries all fail ends it with a RewardError."""
        with ThreadPoolExecutor(self.options.parallel) as pool:
            tries = [pool.submit(self._score, sample) for sample in samples]
            try:
                return self.gather([one.result() for one in tries], samples)
            except RewardError:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _score(self, sample: Scored) -> float:
        body = json.dumps(build_question(sample, self.options.model)).encode()
        pause = self.options.pause
        for number in range(self.options.retries + 1):
            try:
                return self._ask(body)
            except JudgeError as error:
                if not error.may_pass or number == self.options.retries:
                    tries = "a try" if number == 0 else f"{number + 1} tries"
                    raise self.fail(sample, f"{error} (after {tries}); {self._mend(error)}") from error
            time.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")

    def _mend(self, error: JudgeError) -> str:
        return "see that the server runs" if error.may_pass else f"correct url, model or {KEY_VARIABLE}"

    def _ask(self, body: bytes) -> float:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.options.url.rstrip('/')}/chat/completions", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.options.timeout) as response:
                return read_answer(response.read())
        except urllib.error.HTTPError as error:
            with error:
                told = " ".join(error.read(300).decode("utf-8", "replace").split())
            name = HTTPStatus(error.code).phrase if error.code in list(HTTPStatus) else ""
            raise JudgeError(
                f"the judge answers {error.code} {name}: {told}", error.code in PASSING
            ) from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise JudgeError(
                f"the judge cannot be reached ({reason or type(error).__name__})", True
            ) from error


def build_question(sample: Scored, model: str) -> dict[str, Any]:
    """The request's body: pictures as PNG in the message, the references first."""
    count = len(sample.references)
    references = f"{count} reference picture{'s' * (count != 1)}" if count else "no reference pictures"
    question = QUESTION.format(references=references, prompt=sample.prompt)
    pictures = [to_data_url(picture) for picture in (*sample.references, sample.picture)]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    return {"model": model, "messages": [message], "temperature": 0, "max_tokens": 64}


def to_data_url(picture: Image.Image | Tensor) -> str:
    """A picture as a PNG in a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(to_array(picture)).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_answer(body: bytes) -> float:
    """The score, 0 to 1, in a chat completion. Raises JudgeError."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise JudgeError("the judge's answer is no chat completion", False) from error
    found = ANSWER.findall(text) if isinstance(text, str) else []
    if not found or not 0 <= float(found[-1]) <= MAX_SCORE:
        raise JudgeError(f"the judge's answer has no score of 0 to 10: {str(text)[:80]!r}", True)
    return float(found[-1]) / MAX_SCORE
