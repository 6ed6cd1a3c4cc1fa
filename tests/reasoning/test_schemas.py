"""IC-CoT: both forms are read, the tag form is written, and what is wrong is said."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realign.reasoning.schemas import TAG, ICCoT, format_iccot, parse_iccot

TEASER = {
    "out_caption": "A man and a woman on a sofa, in a sketch style.",
    "relations": [{"relation_1": "The man is from image_1."}, {"relation_2": "The woman is from image_2."}],
}
TAGGED = (
    "<out_caption>A man and a woman on a sofa, in a sketch style.</out_caption>"
    "<relation_1>The man is from image_1.</relation_1><relation_2>The woman is from image_2.</relation_2>"
)
EXPECTED = ICCoT(TEASER["out_caption"], ("The man is from image_1.", "The woman is from image_2."))
plain_text = st.text(min_size=1).map(str.strip).filter(lambda text: text and not TAG.search(text))


@pytest.mark.parametrize(
    "text",
    [
        TAGGED,
        f"\n {TAGGED.replace('><', '>' + chr(10) + ' <')}\n",
        json.dumps(TEASER),
        json.dumps(TEASER, indent=2),
        f"```json\n{json.dumps(TEASER)}\n```",
        json.dumps({**TEASER, "relations": TEASER["relations"][::-1]}),
    ],
)
def test_both_forms_are_read(text):
    assert parse_iccot(text, 2) == EXPECTED == parse_iccot(text)


def test_a_caption_alone_serves_a_prompt_without_pictures():
    assert parse_iccot("<out_caption>a star</out_caption>", 0) == ICCoT("a star")
    assert parse_iccot('{"out_caption": "a star"}', 0) == ICCoT("a star")
    assert parse_iccot('{"out_caption": "a star", "relations": []}', 0) == ICCoT("a star")


@given(caption=plain_text, relations=st.lists(plain_text, max_size=12))
def test_what_is_written_is_read_back(caption, relations):
    iccot = ICCoT(caption, tuple(relations))
    assert parse_iccot(format_iccot(iccot), len(relations)) == iccot


def test_tags_are_the_documented_string():
    assert format_iccot(EXPECTED) == TAGGED


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no out_caption"),
        ("a picture of a star", "outside its tags: 'a picture"),
        ("<out_caption>a</out_caption> and so", "outside its tags: 'and so'"),
        ("Sure! <out_caption>a</out_caption>", "outside its tags: 'Sure!'"),
        ("<out_caption>a", "not closed by </out_caption>: the end follows"),
        ("</out_caption>", "is not closed"),
        (
            "<out_caption>a<relation_1>b</relation_1></out_caption>",
            "not closed by </out_caption>: <relation_1> follows",
        ),
        ("<out_caption>a</relation_1>", "not closed by </out_caption>: </relation_1> follows"),
        ("<out_caption>a</out_caption><out_caption>b</out_caption>", "<out_caption> twice"),
        ("<out_caption> </out_caption>", "out_caption is empty"),
        ("<relation_1>b</relation_1>", "no out_caption"),
        ("<out_caption>a</out_caption><relation_2>b</relation_2>", "no relation_1"),
        ("<out_caption>a</out_caption><relation_01>b</relation_01>", "unknown relation 'relation_01'"),
        ("<out_caption>a</out_caption><relation_1></relation_1>", "relation_1 is empty"),
        (
            "<out_caption>a</out_caption><relation_1>b</relation_1><relation_2>c</relation_2>",
            "2 relations for 1 references",
        ),
        ("<out_caption>a</out_caption>", "0 relations for 1 references"),
        ('{"out_caption": "a"', "broken JSON at column"),
        ('{"out_caption": "a"} x', "broken JSON at column"),
        ('{"out_caption": "a", "out_caption": "b"}', "'out_caption' twice"),
        ('{"out_caption": 3}', "out_caption is 3: must be text"),
        ('{"out_caption": "a", "relations": ["b"]}', "must be a list such as"),
        ('{"out_caption": "a", "relations": {"relation_1": "b"}}', "must be a list such as"),
        (
            '{"out_caption": "a", "relations": [{"relation_1": "b"}, {"relation_1": "c"}]}',
            "'relation_1' twice",
        ),
        ('{"out_caption": "a", "relations": [{"out_caption": "c"}]}', "'out_caption' twice"),
        ('{"out_caption": "a", "extra": 1}', "unknown field 'extra'"),
        ("{" * 100_000, "broken JSON"),
    ],
)
def test_what_is_wrong_is_said(text, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        parse_iccot(text, 1)
