"""What each mode reads, in which branches, and what becomes of the text that the model writes."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from realign.reasoning.programs import PROGRAMS, describe_untrained
from realign.reasoning.prompts import IC_COT, THINK
from realign.runtime.context import build_text_block, build_vae_blocks, build_vit_blocks, extend
from realign.runtime.engine import Engine
from realign.runtime.kv import Context
from realign.runtime.noise import NoiseKey
from realign.runtime.operations import Draw, Drawn, Read, Write
from realign.runtime.prepare import crop_picture
from realign.runtime.reader import Reading
from realign.runtime.request import ImagePart, Prompt, Request, TextPart, TextTurn
from realign.runtime.settings import GuidanceSettings, Settings, TextSettings
from realign.runtime.text import Written

FIRST, SECOND = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (24, 16), "blue")


def build_request(parts, mode="none", **settings):
    return Request("r", Prompt.build(parts), settings=Settings(16, 16, mode, num_timesteps=3, **settings))


def describe(parts):
    """A reading in short: texts, and the two pictures as 1 and 2."""
    names = {id(FIRST): 1, id(SECOND): 2}
    return [part.text if isinstance(part, TextPart) else names[id(part.image)] for part in parts]


@pytest.mark.parametrize(
    ("parts", "text_unconditional", "image_unconditional"),
    [
        ([FIRST, "go"], [1], ["go"]),
        ([FIRST, SECOND, "go"], [1, 2], ["go"]),
        (["this", FIRST, "and", SECOND, "go"], ["this", 1, "and", 2], ["this", "and", "go"]),
        ([FIRST, "go", "on"], [1, "go"], ["go", "on"]),
        (["go with", FIRST], ["go with", 1], ["go with"]),
    ],
)
@pytest.mark.parametrize(("mode", "system"), [("none", []), ("think", [THINK]), ("ic-cot", [IC_COT])])
def test_branches_are_bagels(parts, text_unconditional, image_unconditional, mode, system):
    reads = PROGRAMS[mode].read_by_branch(build_request(parts, mode))
    assert {name: describe(read) for name, read in reads.items()} == {
        "conditional": system + describe(Prompt.build(parts).parts),
        "text": system + text_unconditional,
        "image": system + image_unconditional,
    }


@pytest.mark.parametrize(
    ("parts", "guidance", "kinds"),
    [
        (["go"], GuidanceSettings(), ["conditional", "text"]),
        (["go"], GuidanceSettings(for_text_prompts=True), ["conditional", "text", "image"]),
        ([FIRST, "go"], GuidanceSettings(image_scale=1.0), ["conditional", "text"]),
        ([FIRST, "go"], GuidanceSettings(text_scale=1.0), ["conditional"]),
    ],
)
def test_only_branches_that_act_are_read(parts, guidance, kinds):
    assert list(PROGRAMS["none"].read_by_branch(build_request(parts, guidance=guidance))) == kinds


def play(mode, parts, written):
    """Run a program by hand: returns its operations and its sample."""
    program = PROGRAMS[mode](build_request(parts, mode))
    operation, operations = next(program), []
    try:
        while True:
            operations.append(operation)
            if isinstance(operation, Read):
                result = [Context(next_position=len(operations)) for _ in operation.readings]
            elif isinstance(operation, Write):
                context = Context(next_position=len(operations))
                result = Written(TextTurn((1,), written, True), context, ())
            else:
                result = Drawn(FIRST, NoiseKey(0, "r"), torch.zeros(1), ())
            operation = program.send(result)
    except StopIteration as end:
        return operations, end.value


def test_the_reasoning_is_a_turn_of_its_own_in_the_conditional_branch_alone():
    operations, _ = play("ic-cot", [FIRST, "go"], "<out_caption>a</out_caption>")
    _, write, draw = operations
    assert [type(operation) for operation in operations] == [Read, Write, Draw]
    assert write.context.next_position == 1
    assert [branch.kind for branch in draw.branches] == ["conditional", "text", "image"]
    assert [branch.context.next_position for branch in draw.branches] == [2, 1, 1]
    assert [branch.scale for branch in draw.branches] == [1.0, 4.0, 2.0]


def test_an_iccot_is_parsed_and_a_broken_one_is_recorded():
    good = "<out_caption>a star</out_caption><relation_1>the star is from image 1.</relation_1>"
    _, sample = play("ic-cot", [FIRST, "go"], good)
    assert (sample.reasoning.caption, sample.reasoning.relations) == (
        "a star",
        ("the star is from image 1.",),
    )
    assert sample.reasoning.error is None
    for text, complaint in (("gibberish", "outside its tags"), (good, "1 relations for 2 references")):
        _, sample = play("ic-cot", [FIRST, SECOND, "go"], text)
        assert complaint in sample.reasoning.error
        assert (sample.reasoning.text, sample.reasoning.caption, sample.reasoning.relations) == (
            text,
            None,
            (),
        )
        assert sample.image is FIRST


def test_thoughts_are_free_text_and_no_reasoning_is_none():
    _, sample = play("think", ["go"], "<think>hm</think>")
    assert (sample.reasoning.text, sample.reasoning.error) == ("<think>hm</think>", None)
    _, sample = play("none", ["go"], "")
    assert sample.reasoning is None
    assert sample.trajectory.text_turns == ()


def test_the_engine_reads_what_the_program_says(model):
    """A batch of readings, shared beginnings and all, against reading each alone, block by block."""
    readings = [[FIRST, "go"], ["go"], [FIRST, SECOND, "go", "on"], [FIRST], [SECOND, FIRST], ["go", FIRST]]
    seen = []

    def program(request):
        contexts = yield Read(tuple(Reading(request.prompt.parts[:cut]) for cut in (None, -1)))
        seen.append((request, contexts))
        return None

    requests = [
        Request(str(n), Prompt(tuple(map(_part, parts))), settings=Settings(16, 16))
        for n, parts in enumerate(readings)
    ]
    Engine(model, {"none": program}, prepare=crop_picture).run(requests)
    assert len(seen) == len(readings)
    for request, contexts in seen:
        for context, parts in zip(contexts, (request.prompt.parts, request.prompt.parts[:-1]), strict=True):
            check_context(model, context, parts)
    # What two readings share is one segment in memory.
    shared = {
        id(contexts[0].segments[0]) for request, contexts in seen if describe(request.prompt.parts)[0] == 1
    }
    assert len(shared) == 1


def _part(value):
    return TextPart(value) if isinstance(value, str) else ImagePart(value)


def check_context(model, context, parts):
    expected = Context()
    for part in parts:
        if isinstance(part, TextPart):
            blocks = [build_text_block(model, part.text)]
        else:
            prepared = crop_picture(part.image, model.config)
            blocks = [
                *build_vae_blocks(model, [prepared.vae_CHW]),
                *build_vit_blocks(model, [prepared.vit_CHW]),
            ]
        for block in blocks:
            (expected,) = extend(model, [expected], [block])
    assert (context.length, context.next_position) == (expected.length, expected.next_position)
    for layer in range(model.config.llm.num_hidden_layers if parts else 0):
        torch.testing.assert_close(context.key(layer), expected.key(layer), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(context.value(layer), expected.value(layer), rtol=1e-5, atol=1e-5)


def test_the_whole_way_with_a_broken_iccot_still_draws(model):
    engine = Engine(model, PROGRAMS, prepare=crop_picture)
    request = build_request([FIRST, "go"], "ic-cot", text=TextSettings(6))
    (sample,) = engine.run([request])
    assert sample.reasoning.error
    assert sample.image.size == (16, 16)
    assert sample.trajectory.text_turns[0].text == sample.reasoning.text


def test_untrained_modes_are_named(model):
    assert describe_untrained(model.config, "none") is None
    assert "bagel was not trained for reasoning 'ic-cot'" in describe_untrained(model.config, "ic-cot")
