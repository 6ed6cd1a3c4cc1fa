"""What a training sample is made of: by task and mode, and when guidance's conditions are dropped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from realign.data.packing import LatentTurn, TextTurn, Turn, ViTTurn
from realign.model.bagel import Bagel
from realign.reasoning.prompts import SYSTEM_TEXTS
from realign.reasoning.schemas import format_iccot
from realign.world.tasks import sample
from train.world_data import LatentPool, Mixture, WorldData, encode_pictures

COUNTS = {f"{task}/{mode}": 1 for task in ("t2i", "in_context", "edit") for mode in ("none", "ic-cot")}
MIXTURE = Mixture(COUNTS, text_dropout=0.0, image_dropout=0.0, num_scenes=12, timestep_shift=1.0)
SEED = 3


@pytest.fixture(scope="module")
def model(start_folder: Path) -> Bagel:
    return Bagel.from_pretrained(start_folder)


@pytest.fixture(scope="module")
def pool(model: Bagel, tmp_path_factory: pytest.TempPathFactory) -> LatentPool:
    return LatentPool(tmp_path_factory.mktemp("latents"), model, MIXTURE.num_scenes, SEED)


@pytest.fixture
def build(model: Bagel, pool: LatentPool):
    return lambda **changes: WorldData(model, replace(MIXTURE, **changes), pool, SEED)


def texts(model: Bagel, turns: list[Turn]) -> list[str]:
    return [model.tokenizer.decode(turn.ids) for turn in turns if isinstance(turn, TextTurn)]


def num_references(turns: list[Turn]) -> int:
    return sum(isinstance(turn, ViTTurn) for turn in turns)


def test_turns_are_prompt_reasoning_picture(model: Bagel, build) -> None:
    data = build()
    for slot, (task, mode) in enumerate(data.kinds):
        turns = data.turns(2, slot)
        drawn = sample(task, 2 * len(data.kinds) + slot, SEED, num_scenes=MIXTURE.num_scenes)
        expected = [drawn.text]
        if mode == "ic-cot":
            expected = [SYSTEM_TEXTS["ic-cot"], drawn.text, format_iccot(drawn.iccot)]
        assert texts(model, turns) == expected
        assert num_references(turns) == len(drawn.references)
        losses = [turn.has_loss for turn in turns if isinstance(turn, TextTurn)]
        assert losses == [False] * (len(expected) - (mode == "ic-cot")) + [True] * (mode == "ic-cot")
        noised = [isinstance(turn, LatentTurn) and turn.noise is not None for turn in turns]
        assert noised == [False] * (len(turns) - 1) + [True]
        encoded = encode_pictures(model, drawn.render_target()[None])[0]
        # The pool was encoded in bfloat16 and keeps float16.
        assert (turns[-1].latent - encoded).norm() < 0.05 * encoded.norm()


def test_dropped_conditions_take_the_reasoning_along(model: Bagel, build) -> None:
    without_text, without_pictures = build(text_dropout=1.0), build(image_dropout=1.0)
    for slot, (task, mode) in enumerate(MIXTURE.kinds()):
        whole, system = build().turns(0, slot), [SYSTEM_TEXTS[mode]] if mode == "ic-cot" else []
        turns = without_text.turns(0, slot)
        assert texts(model, turns) == system
        assert num_references(turns) == num_references(whole)
        turns = without_pictures.turns(0, slot)
        assert num_references(turns) == 0
        # Text-to-image has no pictures to drop: its sample stays as it is.
        kept = texts(model, whole)[: None if task == "t2i" else len(system) + 1]
        assert texts(model, turns) == kept


def test_conditions_are_dropped_at_their_rates(model: Bagel, build) -> None:
    data = build(text_dropout=0.3, image_dropout=0.2)
    slot = data.kinds.index(("in_context", "none"))
    drawn = [data.turns(step, slot) for step in range(300)]
    assert np.mean([not texts(model, turns) for turns in drawn]) == pytest.approx(0.3, abs=0.09)
    assert np.mean([not num_references(turns) for turns in drawn]) == pytest.approx(0.2, abs=0.08)


def test_processes_share_a_step(build) -> None:
    data = build()
    whole = data.step_samples(5, 0, 1)
    shared = [data.step_samples(5, rank, 2) for rank in range(2)]
    for slot, turns in enumerate(whole):
        other = shared[slot % 2][slot // 2]
        assert torch.equal(turns[-1].noise, other[-1].noise)
        assert turns[-1].timestep == other[-1].timestep
    assert len({turns[-1].timestep for turns in whole}) == len(whole)


def test_shift_moves_times_towards_noise(build) -> None:
    even, shifted = (build(timestep_shift=shift).turns(1, 0)[-1].timestep for shift in (1.0, 3.0))
    assert shifted == pytest.approx(3 * even / (1 + 2 * even))
