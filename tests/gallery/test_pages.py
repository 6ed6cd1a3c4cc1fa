"""The pages of a run: everything shown, everything escaped, nothing loaded from elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from realign.gallery.pages import build_pages, page_name

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}{% raw %}&amp;\u202e\0"
RUN = {"settings": {"reasoning": "ic-cot", "steps": 50, "seed": 0}, "model": {"name": "mini", "path": "/m"}}


def make_record(prompt_id: str, index: int = 0, **changes: object) -> dict:
    record = {
        "request": f"{prompt_id}/{index}",
        "id": prompt_id,
        "index": index,
        "file": f"images/{prompt_id}_{index}.png",
        "seed": 5,
        "height": 64,
        "width": 64,
        "prompt": [{"text": "a star"}],
        "reasoning": None,
    }
    return {**record, **changes}


def make_reasoning(**changes: object) -> dict:
    return {"mode": "ic-cot", "text": "raw", "caption": "cap", "relations": [], "error": None, **changes}


def make_reference(name: str) -> dict:
    return {"image": f"refs/{name}.png", "source": f"my {name}.png", "height": 32, "width": 32}


class Tags(HTMLParser):
    """Collects tags with their attributes, and the text between."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def render(*records: dict, run: dict = RUN) -> str:
    [(name, html)] = build_pages(run, records)
    assert name == "index.html"
    return html


def test_a_card_shows_prompt_reasoning_picture_and_seed() -> None:
    prompt = [{"text": "put"}, make_reference("a"), {"text": "on"}, make_reference("b"), {"text": "please"}]
    reasoning = make_reasoning(caption="a red star", relations=["the star is from 1.", "the ground from 2."])
    page = Tags(render(make_record("one", prompt=prompt, reasoning=reasoning)))
    assert re.search(r"put\s+1\s+on\s+2\s+please", page.text)
    assert "a red star" in page.text
    assert "the ground from 2." in page.text
    assert "seed 5" in page.text
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert pictures == ["refs/a.png", "refs/b.png", "images/one_0.png", "refs/a.png", "refs/b.png"]
    assert all(attributes["loading"] == "lazy" for tag, attributes in page.tags if tag == "img")


def test_what_did_not_parse_is_shown_raw_with_its_error() -> None:
    reasoning = make_reasoning(caption=None, text="<out_caption>half", error="not closed")
    page = Tags(
        render(make_record("one", reasoning=reasoning), make_record("two", reasoning=make_reasoning()))
    )
    assert "not parsed: not closed" in page.text
    assert "<out_caption>half" in page.text
    assert "reasoning not parsed in 1 of 2" in page.text


def test_everything_is_escaped() -> None:
    reference = {"image": f"refs/{HOSTILE}.png", "source": HOSTILE, "height": 8, "width": 8}
    reasonings = [
        make_reasoning(caption=HOSTILE, relations=[HOSTILE, HOSTILE]),
        make_reasoning(caption=None, text=HOSTILE, error=HOSTILE),
    ]
    records = [
        make_record(HOSTILE, index, prompt=[reference, {"text": HOSTILE}, reference], reasoning=reasoning)
        for index, reasoning in enumerate(reasonings)
    ]
    run = {"settings": {"seed": HOSTILE}, "model": {"name": HOSTILE}, HOSTILE: HOSTILE}
    page = Tags(render(*records, run=run))
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("alert(1)") >= 16
    assert "49" not in page.text


def test_nothing_comes_from_elsewhere() -> None:
    html = render(make_record("one"))
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert links
    assert not any(link.startswith(("http", "//", "/")) or ":" in link for link in links)
    assert "url(" not in html
    assert "@import" not in html
    assert "script-src 'none'" in html


def test_names_are_quoted_in_links() -> None:
    html = render(make_record("红 #1?%", file="images/红 #1?%.png"))
    assert 'src="images/%E7%BA%A2%20%231%3F%25.png"' in html


def test_the_pictures_of_a_prompt_share_a_card() -> None:
    page = Tags(render(*(make_record("one", index) for index in range(3)), make_record("two")))
    assert [tag for tag, _ in page.tags].count("article") == 2
    assert [tag for tag, _ in page.tags].count("figure") == 4
    assert "4 pictures of 2 prompts" in page.text


@pytest.mark.parametrize(
    ("num_prompts", "num_images", "counts"), [(3, 2, [4, 2]), (5, 1, [3, 2]), (3, 1, [3])]
)
def test_long_runs_have_pages(num_prompts: int, num_images: int, counts: list[int]) -> None:
    records = [
        make_record(f"p{number}", index) for number in range(num_prompts) for index in range(num_images)
    ]
    pages = dict(build_pages(RUN, records, page_size=3))
    assert list(pages) == [page_name(number) for number in range(1, len(counts) + 1)]
    assert [html.count("<figure>") for html in pages.values()] == counts
    for number, html in enumerate(pages.values(), start=1):
        others = {page_name(other) for other in range(1, len(counts) + 1)} - {page_name(number)}
        assert set(re.findall(r'href="(index[^"]*)"', html)) == others


def test_a_run_without_pictures_has_a_page() -> None:
    assert "0 pictures" in Tags(render()).text


def test_small_pictures_are_shown_enlarged() -> None:
    assert 'class="small"' in render(make_record("one"))
    assert 'class="small"' not in render(make_record("one", height=1024, width=1024))


def test_the_parts_of_the_page_are_in_the_package() -> None:
    folder = Path(__file__).parents[2] / "realign" / "gallery"
    assert {path.name for path in folder.iterdir()} >= {"page.html", "style.css", "pages.py"}


def test_scores_are_shown_and_escaped() -> None:
    html = render(make_record("a", scores={"clip:mini": 0.12345, HOSTILE: -1.0}), make_record("b"))
    assert "clip:mini <b>0.123</b>" in html
    assert "<b>-1.000</b>" in html
    assert "<script" not in html
    assert html.count('class="facts"') == 4, "one line of each picture, and one of each score"
