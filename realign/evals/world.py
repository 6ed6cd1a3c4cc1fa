"""The world benchmark: how often a model's pictures, and its reasoning, are right, as the world's oracle
reads them.

Every task is measured on the same drawn scenes with and without reasoning (paired: same prompt, same noise).
A picture is all-right if every object has every wanted attribute and place, every relation holds, nothing is
there that should not be, the background is right, and what had to stay stayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from realign.api import Generator
from realign.reasoning.schemas import ICCoT
from realign.runtime.request import Prompt, Request, Sample
from realign.runtime.settings import CachingSettings, GuidanceSettings, Settings, TextSettings
from realign.world.language import read_caption
from realign.world.oracle import Reading, Verdict, judge, judge_caption, read_pictures
from realign.world.render import SIZE
from realign.world.tasks import WorldSample, check_reasoning, num_readings, sample

MODES = {"t2i": ("none",), "in_context": ("none", "ic-cot"), "edit": ("none", "ic-cot")}
CHAIN_PROMPTS, CHAINS, CHAIN_READINGS = 8, 12, 24


@dataclass(frozen=True)
class WorldOptions:
    """What is measured: `num` scenes a task of `split` from `seed`; `reasoning` none, ic-cot or both."""

    split: str = "test"
    num: int = 512
    seed: int = 0
    steps: int = 25
    reasoning: str = "both"
    caching: CachingSettings = field(default_factory=CachingSettings)

    def settings(self, mode: str) -> Settings:
        """`realign generate`'s own, greedy reasoning included, but for the timesteps and step caching."""
        return Settings(SIZE, SIZE, mode, self.steps, text=TextSettings(256), caching=self.caching)


@dataclass(frozen=True)
class Outcome:
    """The oracle's verdict on a picture; of its reasoning, if it is correct and if the picture shows it."""

    verdict: Verdict
    reasoning_correct: bool | None
    shows_caption: bool | None


def evaluate(
    generator: Generator, options: WorldOptions, report: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Runs the benchmark; `report` gets a line as each part of it is done.

    Returns: `{"t2i": R, "in_context": {"none": R, "ic-cot": R}, "edit": {..}, "reasoning_correct": p,
        "distinct_chains": d, "margin": {task: {"all_right": p, "se": s}}}`, where R is `{"all_right", "se",
        "n", "objects", "background"}`, of edits "preserved" too, of reasoning "reasoning_correct" and
        "shows_caption". What was not asked for is absent.
    """
    wanted = ("none", "ic-cot") if options.reasoning == "both" else (options.reasoning,)
    result: dict[str, Any] = {}
    margins: dict[str, Any] = {}
    for task, modes in MODES.items():
        drawn = [sample(task, i, options.seed, options.split) for i in range(options.num)]
        outcomes = {}
        for mode in [mode for mode in modes if mode in wanted] or ["ic-cot"]:
            outcomes[mode] = _measure(generator, drawn, options, mode)
            row = _summarise(outcomes[mode])
            report(f"{task}, reasoning {mode}: {row['all_right']:.3f} of {row['n']} pictures are all-right")
        if task == "t2i":
            result[task] = _summarise(next(iter(outcomes.values())))
            continue
        result[task] = {mode: _summarise(found) for mode, found in outcomes.items()}
        if len(outcomes) == 2:
            margins[task] = _margin(outcomes["ic-cot"], outcomes["none"])
    if "ic-cot" in wanted:
        result["reasoning_correct"] = result["in_context"]["ic-cot"]["reasoning_correct"]
        result["distinct_chains"] = count_distinct_chains(generator, options)
    return result | ({"margin": margins} if margins else {})


def build_request(drawn: WorldSample, name: str, settings: Settings, seed: int) -> Request:
    """A world sample as a request: its references in order, then the instruction."""
    pictures = [Image.fromarray(reference.picture) for reference in drawn.references]
    return Request(name, Prompt.build([*pictures, drawn.text]), seed, settings)


def count_distinct_chains(generator: Generator, options: WorldOptions) -> float:
    """Mean number of different texts among 12 chains at temperature 1, over prompts that leave much open."""
    text = TextSettings(256, temperature=1.0)
    settings = replace(
        options.settings("ic-cot"), text=text, num_timesteps=2, guidance=GuidanceSettings(1.0, 1.0)
    )
    requests = []
    for number, drawn in enumerate(_open_prompts(options)):
        requests += [
            build_request(drawn, f"chains/{number}/{i}", settings, options.seed) for i in range(CHAINS)
        ]
    texts = [made.reasoning.text for made in _run(generator, requests)]
    groups = [texts[start : start + CHAINS] for start in range(0, len(texts), CHAINS)]
    return float(np.mean([len(set(group)) for group in groups]))


def _open_prompts(options: WorldOptions) -> Iterator[WorldSample]:
    """The first in-context prompts of the split that have at least `CHAIN_READINGS` valid captions."""
    found, index = 0, 0
    while found < CHAIN_PROMPTS:
        drawn = sample("in_context", index, options.seed, options.split)
        index += 1
        if num_readings(drawn.instruction, at_least=CHAIN_READINGS) >= CHAIN_READINGS:
            found += 1
            yield drawn


def _measure(
    generator: Generator, drawn: Sequence[WorldSample], options: WorldOptions, mode: str
) -> list[Outcome]:
    settings = options.settings(mode)
    requests = [build_request(d, f"{d.task}/{i}", settings, options.seed) for i, d in enumerate(drawn)]
    return judge_samples(drawn, _run(generator, requests))


def judge_samples(drawn: Sequence[WorldSample], made: Sequence[Sample]) -> list[Outcome]:
    """What a model made of drawn prompts, in their order; pictures of 64x64."""
    readings = read_pictures([np.asarray(m.image) for m in made])
    return [_judge(d, m, r) for d, m, r in zip(drawn, made, readings, strict=True)]


def _run(generator: Generator, requests: Sequence[Request]) -> list[Sample]:
    return generator.engine.run(requests)


def _judge(drawn: WorldSample, made: Sample, reading: Reading) -> Outcome:
    verdict = judge(reading, drawn.instruction)
    if made.reasoning is None:
        return Outcome(verdict, None, None)
    if made.reasoning.error is not None:
        return Outcome(verdict, False, False)
    iccot = ICCoT(made.reasoning.caption, made.reasoning.relations)
    return Outcome(verdict, _is_correct(iccot, drawn), _shows(reading, iccot.caption))


def _is_correct(iccot: ICCoT, drawn: WorldSample) -> bool:
    try:
        check_reasoning(iccot, drawn)
    except ValueError:
        return False
    return True


def _shows(reading: Reading, caption: str) -> bool:
    try:
        scene = read_caption(caption)
    except ValueError:
        return False
    return judge_caption(reading, scene).all_right


def _summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    n = len(outcomes)
    right = _share([o.verdict.all_right for o in outcomes])
    summary = {
        "all_right": right,
        "se": round(math.sqrt(right * (1 - right) / n), 4),
        "n": n,
        "objects": _share([o.verdict.objects for o in outcomes]),
        "background": _share([o.verdict.background for o in outcomes]),
    }
    if outcomes[0].verdict.preserved is not None:
        summary["preserved"] = _share([bool(o.verdict.preserved) for o in outcomes])
    if outcomes[0].reasoning_correct is not None:
        summary["reasoning_correct"] = _share([bool(o.reasoning_correct) for o in outcomes])
        summary["shows_caption"] = _share([bool(o.shows_caption) for o in outcomes])
    return summary


def _share(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def _margin(better: Sequence[Outcome], base: Sequence[Outcome]) -> dict[str, float]:
    """Mean and standard error of the paired difference in all-right."""
    pairs = zip(better, base, strict=True)
    gain = np.asarray([float(b.verdict.all_right) - float(a.verdict.all_right) for b, a in pairs])
    return {
        "all_right": round(float(gain.mean()), 4),
        "se": round(float(gain.std() / math.sqrt(len(gain))), 4),
    }


def format_table(result: dict[str, Any]) -> str:
    """The result for people: a line a task and mode, shares with their standard errors."""
    columns = ("objects", "background", "preserved", "reasoning_correct", "shows_caption")
    header = f"{'task':<12}{'reasoning':<11}{'n':>5}  {'all-right':<16}" + "".join(
        f"{c:>19}" for c in columns
    )
    lines = [header]
    for task in MODES:
        if task not in result:
            continue
        modes = {"none": result[task]} if "all_right" in result[task] else result[task]
        for mode, row in modes.items():
            cells = "".join(f"{row[c]:>19.3f}" if c in row else f"{'-':>19}" for c in columns)
            said = f"{row['all_right']:.3f} +- {row['se']:.3f}"
            lines.append(f"{task:<12}{mode:<11}{row['n']:>5}  {said:<16}{cells}")
    for task, margin in result.get("margin", {}).items():
        lines.append(f"{task}: reasoning adds {margin['all_right']:+.3f} +- {margin['se']:.3f} (paired)")
    if "distinct_chains" in result:
        lines.append(f"distinct chains among {CHAINS} at temperature 1: {result['distinct_chains']:.1f}")
    return "\n".join(lines)
