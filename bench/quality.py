"""`python -m bench.quality`: what each faster way to draw costs, as `realign compare` measures it.

Of mini on text-to-image prompts of its world, whose oracle reads the pictures; of BAGEL-7B's configuration
with random weights on one workload (its pictures are noise: the velocities and the seconds are what tells).
fp8 is calibrated on other prompts, or for random weights on the same. Appends to `results/quality.jsonl`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.generate.models import MODELS, load_model
from bench.generate.report import name_machine, name_whole_commit
from bench.generate.workloads import build_workloads
from bench.rows import RESULTS, append_rows
from realign.evals.quality import compare
from realign.evals.world import build_request
from realign.model.bagel import Bagel
from realign.model.fp8 import Fp8Scales, recording_inputs, use_fp8
from realign.reasoning.programs import PROGRAMS
from realign.runtime.engine import Engine
from realign.runtime.request import Request
from realign.runtime.settings import CachingSettings, Settings
from realign.world.oracle import judge, read_pictures
from realign.world.render import SIZE
from realign.world.tasks import sample

NUM_CALIBRATION = 16


@dataclass(frozen=True)
class Way:
    """A faster way to draw."""

    caching: CachingSettings = field(default_factory=CachingSettings)
    fp8: bool = False


WAYS = {
    "every 3rd step": Way(CachingSettings(interval=3)),
    "every 3rd step, order 6": Way(CachingSettings(interval=3, order=6)),
    "every 5th step": Way(CachingSettings(interval=5)),
    "guidance reused below .6": Way(CachingSettings(reuse_guidance_below=0.6)),
    "every 3rd step, guidance reused below .6": Way(CachingSettings(interval=3, reuse_guidance_below=0.6)),
    "fp8": Way(fp8=True),
    "fp8, every 3rd step": Way(CachingSettings(interval=3), fp8=True),
}


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """One way on one model; errors as `realign.evals.quality.compare` defines them.

    Attributes:
        all_right: share of pictures that the world's oracle finds all-right, of the plain and the fast way;
            None for random weights.
        seconds: of the plain and the fast way, in turns; on a CPU fp8 is dequantised, and slower.
    """

    way: str
    model: str
    dtype: str
    pictures: int
    timesteps: int
    psnr_mean: float
    psnr_worst: float
    velocity_error_mean: float
    velocity_error_worst: float
    velocity_error_by_step: list[float]
    latent_error_mean: float
    all_right: tuple[float, float] | None
    seconds: tuple[float, float]
    machine: str
    threads: int
    torch: str
    commit: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(options.model, device, dtype)
    is_mini = options.model == "mini"
    requests, others = draw_world(options.num) if is_mini else draw_random(model, options.num)
    fast = None
    if any(WAYS[name].fp8 for name in options.way):
        fast = load_model(options.model, device, dtype)
        use_fp8(fast, calibrate(model, others))
    for name in options.way:
        result = measure(WAYS[name], model, fast, requests, judge_world if is_mini else None)
        row = make_row(name, options.model, model, requests, result)
        append_rows([row], options.out)
        print(f"{name}: PSNR {row.psnr_mean} (worst {row.psnr_worst}) dB, velocity {row.velocity_error_mean}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m bench.quality`."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="mini")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--num", type=int, default=32, help="pictures (32)")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS), help=", ".join(WAYS))
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.jsonl", help="where rows are appended")
    return parser


def draw_world(num: int) -> tuple[list[Request], list[Request]]:
    """Requests of the world's test split, named by their numbers; and of another split, to calibrate on."""
    settings = Settings(SIZE, SIZE)

    def draw(split: str, count: int) -> list[Request]:
        drawn = [sample("t2i", index, split=split) for index in range(count)]
        return [build_request(one, str(index), settings, 0) for index, one in enumerate(drawn)]

    return draw("test", num), draw("val", NUM_CALIBRATION)


def draw_random(model: Bagel, num: int) -> tuple[list[Request], list[Request]]:
    """The first of W1, so many times."""
    first = build_workloads(model.config, "W1")[0].requests[0]
    requests = [replace(first, id=f"{first.id}/{index}") for index in range(num)]
    return requests, requests[:1]


def calibrate(model: Bagel, requests: Sequence[Request]) -> Fp8Scales:
    with recording_inputs(model) as find_scales:
        Engine(model, PROGRAMS).run(requests)
        return Fp8Scales("", find_scales())


def measure(
    way: Way, model: Bagel, fast: Bagel | None, requests: Sequence[Request], score: Callable | None
) -> dict:
    """The comparison of a way with the plain one."""
    plain = Engine(model, PROGRAMS)
    other = Engine(fast, PROGRAMS) if way.fp8 else plain
    faster = [replace(one, settings=replace(one.settings, caching=way.caching)) for one in requests]
    return compare(plain, other, faster, score=score)


def judge_world(images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
    """1 for each picture that is all-right, by the test prompt whose text it has."""
    readings = read_pictures([np.asarray(image) for image in images])
    instructions = find_instructions(texts)
    pairs = zip(readings, instructions, strict=True)
    return [float(judge(reading, instruction).all_right) for reading, instruction in pairs]


def find_instructions(texts: Sequence[str]) -> list:
    """What the test prompts of these texts ask for."""
    wanted, found, index = set(texts), {}, 0
    while wanted - found.keys():
        drawn = sample("t2i", index, split="test")
        found[drawn.text] = drawn.instruction
        index += 1
    return [found[text] for text in texts]


def make_row(way: str, name: str, model: Bagel, requests: Sequence[Request], result: dict) -> QualityRow:
    """The row of a comparison."""
    score = result.get("score")
    return QualityRow(
        way=way,
        model=name,
        dtype=str(model.dtype).removeprefix("torch."),
        pictures=result["pictures"],
        timesteps=requests[0].settings.num_timesteps,
        psnr_mean=result["psnr"]["mean"],
        psnr_worst=result["psnr"]["worst"],
        velocity_error_mean=round(result["velocity_error"]["mean"], 5),
        velocity_error_worst=round(result["velocity_error"]["worst"], 5),
        velocity_error_by_step=[round(error, 5) for error in result["velocity_error"]["by_step"]],
        latent_error_mean=round(result["latent_error"]["mean"], 5),
        all_right=None if score is None else (score["plain"], score["fast"]),
        seconds=tuple(result["seconds"].values()),
        machine=name_machine(model.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        commit=name_whole_commit(),
    )


if __name__ == "__main__":
    sys.exit(main())
