"""The tiny checkpoint of the golden fixture."""

from __future__ import annotations

from pathlib import Path

import pytest

from realign.model.bagel import Bagel

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "bagel-tiny" / "checkpoint"


@pytest.fixture(scope="session")
def model() -> Bagel:
    return Bagel.from_pretrained(CHECKPOINT)
