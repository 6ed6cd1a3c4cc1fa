"""`realign score DIR --reward SPEC`: score the pictures that generate made, and show it in the gallery."""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realign.cli.console import (
    RunError,
    UsageError,
    build_progress,
    print_error,
    print_refusal,
    print_warning,
)
from realign.cli.files import Staging
from realign.cli.folder import HIDDEN, load_records, load_run
from realign.cli.gallery import write_gallery
from realign.cli.locks import FolderLock
from realign.cli.processes import ALONE, current_process
from realign.cli.scores import append_scores, load_scores, settle_scores
from realign.data.images import load_picture

if TYPE_CHECKING:
    from realign.rewards.base import Scored, WeightedSum

BATCH_SIZE = 64
REWARDS = """rewards (terms joined by +, each with a weight after * if it is not 1):
  clip[:MODEL]              cosine of picture and caption in a CLIP; MODEL: mini, NAME:TAG of open_clip such
                            as ViT-L-14:openai, NAME:FILE, or a folder (open_clip's or transformers')
  image_similarity[:MODEL]  mean cosine of picture and reference pictures
  format                    1 where the IC-CoT is well formed, with a relation for each reference
  oracle[:parts|strict]     the procedural world's oracle, against the picture's own caption
  function:MODULE:NAME      a Python function of a list of realign.rewards.base.Scored, one number for each
  judge:URL?model=NAME      a model behind an OpenAI-compatible endpoint (&timeout=S&retries=N&parallel=N);
                            its key in REALIGN_JUDGE_KEY

example: realign score pictures --reward "clip:mini*0.7+format*0.3"
"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "score",
        help="score the pictures of a folder that generate made",
        description="Score every picture by a reward. The scores go to scores.jsonl in the folder and to its "
        "gallery; the same command again scores only what is new. Prints one JSON object.",
        epilog=REWARDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder of a generate run")
    parser.add_argument("--reward", required=True, metavar="SPEC", help="see below")
    parser.add_argument("--device", default="auto", help="of models: auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--again", action="store_true", help="score also what has a score by this reward")
    return parser


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from realign.rewards.base import RewardError

    try:
        summary = score_folder(args.folder, args.reward, args.device, args.again)
    except UsageError as error:
        print_refusal(error)
        return 2
    except (RunError, RewardError, OSError) as error:
        print_error(error)
        return 1
    print(json.dumps(summary, ensure_ascii=False))
    return 0


def score_folder(folder: Path, spec: str, device: str = "auto", again: bool = False) -> dict[str, Any]:
    """Score what has no score yet. Returns mean scores over all pictures: `{"reward", "n", "mean", "se",
    "parts": {name: mean}}`. Raises UsageError, RunError, RewardError.
    """
    if not current_process().is_alone:
        raise UsageError("score: runs in one process; start it without torchrun")
    load_run(folder)
    with FolderLock(folder, _make_hidden(folder) / "lock", ALONE).hold():
        records = load_records(folder)
        if not records:
            raise UsageError(f"{folder}: has no pictures yet; run realign generate first")
        reward = _build(spec, device)
        staging = Staging(folder / HIDDEN / "tmp")
        staging.clear()
        settle_scores(folder, list(records), staging)
        scored = {} if again else load_scores(folder)
        missing = [record for request, record in records.items() if (request, reward.name) not in scored]
        _score(folder, reward, missing, len(records) - len(missing))
        settle_scores(folder, list(records), staging)
        write_gallery(folder)
        return summarise(reward.name, load_scores(folder), list(records))


def _make_hidden(folder: Path) -> Path:
    try:
        (folder / HIDDEN).mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to ({error.strerror})") from error
    return folder / HIDDEN


def _build(spec: str, device: str) -> WeightedSum:
    from realign.cli.generate import resolve_device
    from realign.rewards.spec import build_reward

    try:
        return build_reward(spec, resolve_device(device, "auto")[0])
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--reward: {error}") from error


def _score(folder: Path, reward: WeightedSum, records: Sequence[Mapping[str, Any]], num_done: int) -> None:
    with build_progress(len(records) + num_done, num_done, "scoring") as progress:
        for start in range(0, len(records), BATCH_SIZE):
            batch = records[start : start + BATCH_SIZE]
            append_scores(folder, _score_batch(folder, reward, batch))
            progress.advance(len(batch))


def _score_batch(
    folder: Path, reward: WeightedSum, records: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    samples = [load_sample(folder, record) for record in records]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        parts = reward.score_parts(samples)
        scores = reward.combine(list(parts.values())).tolist()
    for warning in caught:
        print_warning(warning.message)
    columns = {name: values.tolist() for name, values in parts.items()}
    return [
        {
            "request": record["request"],
            "reward": reward.name,
            "score": scores[i],
            "parts": {name: values[i] for name, values in columns.items()},
        }
        for i, record in enumerate(records)
    ]


def load_sample(folder: Path, record: Mapping[str, Any]) -> Scored:
    """A record and its picture as rewards take them. Raises RunError for a picture that is not there."""
    from realign.rewards.base import Scored

    try:
        picture = load_picture(folder / record["file"]).image
        references = [load_picture(folder / p["image"]).image for p in record["prompt"] if "image" in p]
    except ValueError as error:
        raise RunError(error) from error
    reasoning = record.get("reasoning") or {}
    return Scored(
        name=record["request"],
        picture=picture,
        prompt=" ".join(part["text"] for part in record["prompt"] if "text" in part),
        reasoning=reasoning.get("text"),
        caption=reasoning.get("caption"),
        is_malformed=reasoning.get("error") is not None,
        references=references,
    )


def summarise(
    name: str, scores: Mapping[tuple[str, str], Mapping[str, Any]], requests: Sequence[str]
) -> dict[str, Any]:
    """Means of a reward over pictures, and the standard error of the mean."""
    rows = [scores[request, name] for request in requests]
    values = [row["score"] for row in rows]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    parts = {part: sum(row["parts"][part] for row in rows) / len(rows) for part in rows[0]["parts"]}
    se = math.sqrt(variance / len(values))
    return {"reward": name, "n": len(values), "mean": mean, "se": se, "parts": parts}
