"""The page over a run's evaluations, and its curves."""

import re
from xml.etree import ElementTree

import pytest

from realign.gallery.curve import Curve, choose_ticks, draw_curves
from realign.gallery.evaluations import build_index, choose_steps
from tests.gallery.test_pages import HOSTILE, Tags, make_record, make_reference


def make_row(step: int, reward: float, **changes: object) -> dict:
    return {"step": step, "reward": reward, "se": 0.01, "seconds": 2.0, **changes}


def make_shown(reward: float, **changes: object) -> dict:
    return make_record("000", file="images/000_0.png", scores={"reward": reward}, **changes)


def test_the_curve_goes_through_the_rewards() -> None:
    svg = ElementTree.fromstring(draw_curves([Curve("held-out", [(0, 0.2), (10, 0.6)], [0.1, 0.1])], "r"))
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")]
    labels = {e.text: (float(e.get("x")), float(e.get("y"))) for e in svg.iter("text")}
    assert [x for x, _ in dots] == [labels["0"][0], labels["10"][0]]
    middle = sum(y for _, y in dots) / 2
    assert middle == pytest.approx(labels["0.4"][1] - 4, abs=0.02)
    assert dots[0][1] > dots[1][1], "higher is better, and up"
    assert [t.text for t in svg.iter("title")] == [
        "held-out", "held-out, step 0: 0.2000 ± 0.1000", "held-out, step 10: 0.6000 ± 0.1000",
    ]  # fmt: skip


@pytest.mark.parametrize("values", [[0.5], [0.0], [-3.0, -3.0], [1e-9, 2e-9], [-1e6, 1e6]])
def test_any_finite_values_have_a_curve(values: list[float]) -> None:
    svg = ElementTree.fromstring(draw_curves([Curve("a", list(enumerate(values)))], "a"))
    numbers = re.findall(r"-?[\d.]+", " ".join(e.get("points", "") for e in svg.iter()))
    assert len(numbers) == 2 * len(values)
    assert all(0 <= float(number) <= 1100 for number in numbers)


def test_no_points_no_curve_and_no_number_is_refused() -> None:
    assert draw_curves([Curve("a", [])], "a") == ""
    with pytest.raises(ValueError, match="must be finite"):
        draw_curves([Curve("a", [(0, float("nan"))])], "a")


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.013, 0.021), (3.0, 1000.0), (0.9991, 0.9993)])
def test_ticks_are_few_round_numbers_within(low: float, high: float) -> None:
    ticks = choose_ticks(low, high, 5)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    leading = float(f"{ticks[1] - ticks[0]:.6e}".partition("e")[0])
    assert leading in (1.0, 2.0, 5.0)


def test_columns_are_the_first_the_last_and_between() -> None:
    assert choose_steps([0, 5, 10], 10) == [0, 5, 10]
    chosen = choose_steps(list(range(0, 101, 2)), 10)
    assert (len(chosen), chosen[0], chosen[-1]) == (10, 0, 100)


def test_the_page_has_rewards_terms_and_the_same_prompt_over_the_steps() -> None:
    rows = [
        make_row(0, 0.25, rewards={"clip": 0.125, "format": 1.0}, failures=0.5),
        make_row(5, 0.5, gain=0.25, gain_se=0.02, rewards={"clip": 0.375, "format": 1.0}, failures=0.0),
    ]
    records = {0: [make_shown(0.2)], 5: [make_shown(0.7)]}
    page = Tags(build_index(rows, records, [(1, 0.3), (2, 0.4)], {"reward": "clip+format"}))
    assert "held-out reward 0.5000 ± 0.0100 at step 5, +0.2500 ± 0.0200 since step 0" in page.text
    for text in ("clip+format", "0.3750", "50.0%", "0.200", "0.700", "a star", "training, with noise"):
        assert text in page.text
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert pictures == ["step-00000000/images/000_0.png", "step-00000005/images/000_0.png"]
    assert len([tag for tag, _ in page.tags if tag == "polyline"]) == 2


def test_one_evaluation_without_pictures_has_a_page() -> None:
    html = build_index([make_row(0, 0.25)], {})
    assert "img" not in {tag for tag, _ in Tags(html).tags}
    assert "since step 0: " not in html


def test_texts_are_escaped() -> None:
    row = make_row(0, 0.25, rewards={HOSTILE: 0.125})
    prompt = [make_reference(HOSTILE), {"text": HOSTILE}]
    html = build_index([row], {0: [make_shown(0.2, prompt=prompt)]}, facts={"start": HOSTILE})
    page = Tags(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert all("onerror" not in attributes for _, attributes in page.tags)
