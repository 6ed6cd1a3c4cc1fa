"""The pages of a run's evaluations, under out/evaluations: one of pictures each, and one over the steps.

Every file is whole or absent; an evaluation's page is written after all that it shows, and the page over the
steps after those.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from realign.cli.files import Staging, dump_line, load_lines
from realign.cli.pngs import save_png
from realign.gallery.evaluations import build_index, name_folder
from realign.gallery.pages import build_pages
from realign.runtime.request import ImagePart, Part, Reasoning
from train.evaluation import Evaluation, Judged, Shown

FOLDER, REFERENCES, RECORDS, RUN = "evaluations", "references", "records.jsonl", "run.json"
REFERENCE_PIXELS = 1024


class Pages:
    """Writes the pages of a run.

    Args:
        out: the run's folder.
        run: what all evaluations have in common, as `realign.gallery.pages.build_pages` takes it. Its
            `settings` say what is measured, and must be those of the evaluations that are there.

    Raises: ValueError where there are evaluations by other settings.
    """

    def __init__(self, out: Path, run: Mapping[str, Any]) -> None:
        self.folder, self.run = out / FOLDER, json.loads(json.dumps(run))
        self.staging = Staging(self.folder / ".staging")
        self.staging.clear()
        self._check_settings()
        self.staging.write_text(self.folder / RUN, json.dumps(self.run, indent=2, ensure_ascii=False))

    def _check_settings(self) -> None:
        path = self.folder / RUN
        if not path.exists():
            return
        there, wanted = json.loads(path.read_text())["settings"], self.run["settings"]
        names = sorted(there.keys() | wanted.keys())
        differing = [name for name in names if there.get(name) != wanted.get(name)]
        if differing:
            said = "; ".join(f"{name} was {there.get(name)}, is {wanted.get(name)}" for name in differing)
            what = f"{self.folder} holds evaluations by other settings ({said})"
            raise ValueError(f"{what}: take the same, or move that folder and evaluations.jsonl away")

    def load_rewards(self, step: int) -> list[float] | None:
        """The rewards of an evaluation's samples, in order; None where it is not there."""
        path = self.folder / name_folder(step) / RECORDS
        return [record["scores"]["reward"] for record in load_lines(path)] if path.exists() else None

    def write(self, evaluation: Evaluation, row: Mapping[str, Any]) -> None:
        """An evaluation's folder: pictures, records of all samples, the page."""
        folder = self.folder / name_folder(row["step"])
        records = [self._write_sample(folder, evaluation, judged) for judged in evaluation.judged]
        self.staging.write_text(folder / RECORDS, "".join(map(dump_line, records)))
        facts = {"step": str(row["step"]), "reward": f"{row['reward']:.4f} ± {row['se']:.4f} of {row['n']}"}
        if "gain" in row:
            facts["since the start"] = f"{row['gain']:+.4f} ± {row['gain_se']:.4f}"
        run = {**self.run, "facts": facts, "links": {"all evaluations": "../index.html"}}
        for name, html in build_pages(run, [record for record in records if "file" in record]):
            self.staging.write_text(folder / name, html)

    def write_index(self, rows: Sequence[Mapping[str, Any]], training: Sequence[Mapping[str, Any]]) -> None:
        """The page over the steps. `rows`: of evaluations; `training`: of training by the same reward."""
        records = {row["step"]: self._load_shown(row["step"]) for row in rows}
        shown = {step: found for step, found in records.items() if found}
        facts = {"start": self.run["model"]["name"], "reward": self.run["settings"]["reward"]}
        points = [(row["step"], row["reward"]) for row in training]
        html = build_index(rows, shown, points, {**facts, "samples": str(rows[-1]["n"])})
        self.staging.write_text(self.folder / "index.html", html)

    def _load_shown(self, step: int) -> list[dict[str, Any]]:
        records = load_lines(self.folder / name_folder(step) / RECORDS)
        return [record for record in records if "file" in record]

    def _write_sample(self, folder: Path, evaluation: Evaluation, judged: Judged) -> dict[str, Any]:
        """Saves what is shown of a sample; its record, as `realign generate` has them, with its scores."""
        name, index = evaluation.name(judged)
        scores = {"reward": evaluation.find_reward(judged)}
        if len(evaluation.names) > 1:
            scores |= dict(zip(evaluation.names, judged.scores, strict=True))
        record = {
            "request": f"{name}/{index}",
            "id": name,
            "index": index,
            "seed": self.run["settings"]["seed"],
            "scores": scores,
            "reasoning": _describe_reasoning(judged.reasoning),
        }
        if judged.shown is not None:
            record |= self._write_picture(folder, f"images/{name}_{index}.png", judged.shown, scores)
        return record

    def _write_picture(
        self, folder: Path, name: str, shown: Shown, scores: Mapping[str, float]
    ) -> dict[str, Any]:
        self.staging.write(folder / name, lambda file: save_png(shown.picture, file, {"scores": scores}))
        width, height = shown.picture.size
        parts = [self._describe_part(part) for part in shown.prompt.parts]
        return {"file": name, "height": height, "width": width, "prompt": parts}

    def _describe_part(self, part: Part) -> dict[str, Any]:
        if not isinstance(part, ImagePart):
            return {"text": part.text}
        width, height = part.image.size
        name = self._write_reference(part.image)
        return {"image": f"../{name}", "source": Path(name).name, "height": height, "width": width}

    def _write_reference(self, image: Image.Image) -> str:
        """Once for all evaluations, at most `REFERENCE_PIXELS` a side; its name in their folder."""
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        name = f"{REFERENCES}/{digest[:16]}.png"
        if not (self.folder / name).exists():
            small = image.copy()
            small.thumbnail((REFERENCE_PIXELS, REFERENCE_PIXELS))
            self.staging.write(self.folder / name, lambda file: small.save(file, format="PNG"))
        return name


def _describe_reasoning(reasoning: Reasoning | None) -> dict[str, Any] | None:
    if reasoning is None:
        return None
    names = ("mode", "text", "caption", "error")
    return {name: getattr(reasoning, name) for name in names} | {"relations": list(reasoning.relations)}
