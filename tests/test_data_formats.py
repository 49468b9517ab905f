"""Formats of records as their own guides publish them, which answers are learned, and fields that may not be lost."""

import json

import numpy as np
import pytest
from damaged_records import make_world
from factories import tiny_processor
from PIL import Image

from hf_vtc.data import Conversation, RecordError, VtcCollator, load_records
from hf_vtc.data.formats import HARMLESS_FIELDS


def picture(height=40, width=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def shown(record):
    """Each message as its role and its content in one string, images as `[]`."""
    conversation = Conversation.from_record(record)
    texts = []
    for message in conversation.messages:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        texts.append((message["role"], "".join("[]" if part["type"] == "image" else part["text"] for part in parts)))
    return texts, conversation.images


def learned(record):
    """What a collator supervises, as text."""
    processor = tiny_processor("vico")
    labels = VtcCollator(processor)([load_records([record])[0]])["labels"][0]
    return processor.tokenizer.decode(labels[labels != -100]).split("<|im_end|>")[:-1]


QUESTION, ANSWER = ("user", "[]what?"), ("assistant", "a box")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        # OpenAI's guide to vision fine-tuning
        (
            {
                "messages": [
                    said("system", "be brief"),
                    said("user", "what?"),
                    said("user", [{"type": "image_url", "image_url": {"url": "a.png"}}]),
                    said("assistant", "a box"),
                ]
            },
            [("system", "be brief"), ("user", "what?\n[]"), ANSWER],
        ),
        (
            {"messages": [said("developer", "be brief"), said("user", "<image>what?"), said("assistant", "a box")]},
            [("system", "be brief"), QUESTION, ANSWER],
        ),
        ({"conversations": [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "what?"}]}, None),
        (
            {
                "conversations": [
                    {"from": "gpt", "value": "hello"},
                    {"from": "human", "value": "what?"},
                    {"from": "gpt", "value": "a box"},
                    {"from": "gpt", "value": "of wood"},
                ],
                "image": "a.png",
            },
            [QUESTION, ("assistant", "a box\nof wood")],
        ),
        (
            {"image": "", "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a box"}]},
            [("user", "what?"), ANSWER],
        ),
        (
            {"prompt": [said("user", "what?")], "completion": [said("assistant", "a box")], "images": ["a.png"]},
            [QUESTION, ANSWER],
        ),
        (
            {
                "texts": [
                    {"user": "what?", "assistant": "a box", "source": "x"},
                    {"user": "sure?", "assistant": "yes", "source": "y"},
                ],
                "images": ["a.png"],
            },
            [QUESTION, ANSWER, ("user", "sure?"), ("assistant", "yes")],
        ),
        (
            {
                "instruction": "<image>what?",
                "input": "be brief",
                "output": "a box",
                "images": ["a.png"],
                "system": "s",
            },
            [("system", "s"), ("user", "[]what?\nbe brief"), ANSWER],
        ),
        (
            {"query": "sure?", "response": "yes", "history": [["<image>what?", "a box"]], "images": ["a.png"]},
            [QUESTION, ANSWER, ("user", "sure?"), ("assistant", "yes")],
        ),
        # a marker in a part is one in a string
        (
            {"messages": [said("user", [{"type": "text", "text": "<image>\nwhat?"}]), said("assistant", "a box")]},
            [QUESTION, ANSWER],
        ),
    ],
    ids=[
        "openai_vision",
        "developer",
        "answer_to_nothing",
        "leading_answer",
        "empty_image",
        "prompt_completion",
        "texts",
        "alpaca",
        "query_response",
        "marker_in_a_part",
    ],
)
def test_formats_are_read_as_their_guides_publish_them(record, expected):
    if "<image>" in json.dumps(record) and "images" not in record:
        record = {**record, "images": ["a.png"]}
    if expected is None:
        with pytest.raises(ValueError, match="nothing to learn"):
            Conversation.from_record(record)
        return
    texts, images = shown(record)
    assert texts == expected
    assert images == ["a.png"] * sum(text.count("[]") for _, text in expected)
    # what was read is read again as the same
    again = Conversation.from_record({"messages": Conversation.from_record(record).messages, "images": images})
    assert again == Conversation.from_record(record)


TURNS = [said("user", "one"), said("assistant", "first"), said("user", "two"), said("assistant", "second")]


def marked(*marks):
    """The turns, with fields for each answer."""
    return [{**turn, **marks[idx // 2]} if idx % 2 else turn for idx, turn in enumerate(TURNS)]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": TURNS}, ["first", "second"]),
        ({"messages": marked({"weight": 0}, {"weight": 1})}, ["second"]),
        ({"messages": marked({"weight": 1}, {"weight": 0.0})}, ["first"]),
        ({"messages": marked({"loss": False}, {})}, ["second"]),
        ({"messages": marked({"loss_mask": 0}, {"loss_mask": 1})}, ["second"]),
        ({"messages": marked({"weight": None}, {"loss": None})}, ["first", "second"]),
        ({"messages": TURNS, "mask_history": True}, ["second"]),
        ({"messages": TURNS, "mask_history": False}, ["first", "second"]),
        ({"messages": [{**TURNS[0], "loss": False}, *TURNS[1:]]}, ["first", "second"]),
        ({"prompt": TURNS[:3], "completion": TURNS[3:]}, ["second"]),
        ({"query": "two", "response": "second", "history": [["one", "first"]]}, ["first", "second"]),
    ],
    ids=str,
)
def test_what_is_learned_of_a_record(record, expected):
    assert learned(record) == expected


def test_weights_reach_trl(tmp_path):
    pytest.importorskip("datasets", reason="datasets is optional", exc_type=ImportError)
    processor = tiny_processor("vico")
    records = load_records([{"messages": marked({"weight": 0}, {})}])
    labels = VtcCollator(processor)([records.to_dataset()[0]])["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == "second<|im_end|>"


@pytest.mark.parametrize("field", ["score", "video", "tools", "chosen", "a new field"])
def test_fields_are_refused_by_name_unless_told_otherwise(field):
    record = {"messages": TURNS, field: "something"}
    with pytest.raises(RecordError, match=f"record 0: The record has a field '{field}', which is neither read nor"):
        load_records([record])
    assert len(load_records([record], ignore_fields=[field])) == 1
    # empty ones say that there is nothing
    for nothing in (None, "", [], {}):
        assert len(load_records([{"messages": TURNS, field: nothing}])) == 1


def test_harmless_fields_are_read_over():
    assert len(load_records([{"messages": TURNS} | dict.fromkeys(HARMLESS_FIELDS, "x")])) == 1


def test_a_field_that_another_format_needs_is_no_metadata():
    record = {"messages": TURNS, "prompt": "one"}
    with pytest.raises(RecordError, match="got both `messages` and `prompt`.*ignore_fields"):
        load_records([record])
    assert len(load_records([record], ignore_fields=["prompt"])) == 1


@pytest.mark.parametrize(
    "text",
    [
        "<video>\nwhat?",
        "what? <audio>",
        "<img> what?",
        "see <image_1>",
        "<|image_pad|>",
        "<IMG_CONTEXT>",
        "<|image_1|>",
    ]
    + ["<|vision_start|>", "[IMG]", "<Image>", "<image>./</image>", "<image_placeholder>", "<video_pad>", "<bbox>"],
)
def test_placeholders_of_others_are_refused(text):
    record = {"messages": [said("user", text), said("assistant", "red")], "images": ["a.png"]}
    with pytest.raises(
        ValueError, match="Message 0: The text holds '.*', which stands for an image or another medium"
    ):
        Conversation.from_record(record)


@pytest.mark.parametrize(
    "text",
    ["how do I write <video> in HTML?", "is <b>this</b> bold?", "a < image > b", "[image]", "see [IMG]a.png[/IMG]"],
)
def test_prose_is_no_placeholder(text):
    assert shown({"messages": [said("user", text), said("assistant", "<video> so")]})[0][0] == ("user", text)


# names and sizes


def test_errors_name_the_record_of_a_file_of_one_line(tmp_path):
    entries = [{"id": f"x_{idx}", "messages": TURNS} for idx in range(3)]
    entries[2]["messages"] = []
    file = tmp_path / "data.json"
    file.write_text(json.dumps(entries))
    with pytest.raises(RecordError, match=r"data.json, line 1 \(record 2, id 'x_2'\): `messages` must be a list"):
        load_records(file)
    collator = VtcCollator(tiny_processor("vico"))
    with pytest.raises(ValueError, match=r"Record 1 of the batch \(id 'x_2'\): `messages` must be a list"):
        collator(entries[1:])
    damaged = {"id": 7, "messages": TURNS, "images": [str(tmp_path / "nowhere.png")]}
    with pytest.raises(ValueError, match=r"Record 1 of the batch \(id 7\): .*nowhere.png"):
        collator([entries[0], damaged])


def test_images_are_decoded_before_training_unless_told_otherwise(tmp_path, monkeypatch):
    world = make_world(tmp_path)
    record = {"messages": TURNS, "images": ["truncated.jpg"]}
    descriptions = []
    import hf_vtc.data.records as module

    tqdm = module.logging.tqdm
    monkeypatch.setattr(module.logging, "tqdm", lambda **kwargs: descriptions.append(kwargs["desc"]) or tqdm(**kwargs))
    with pytest.raises(RecordError, match="'truncated.jpg' cannot be read"):
        load_records([record], world.folder)
    assert len(load_records([record], world.folder, check_images="header")) == 1
    assert "check_images='header'" in descriptions[0] and "decoding" not in descriptions[1]


def long_and_thin(height, width, name):
    return {"id": name, "messages": TURNS, "images": [picture(height, width)]}


@pytest.mark.parametrize("check", ["header", "pixels"])
def test_images_that_no_batch_can_hold_are_found_before_training(check, monkeypatch):
    """Two images of ConvLLaVA, each harmless, that would be padded to a square of their long sides."""
    collator = VtcCollator(tiny_processor("convllava"))
    records = [long_and_thin(4, 1250, "wide"), long_and_thin(30, 40, "usual"), long_and_thin(1200, 4, "tall")]
    assert len(load_records(records[:2], collator=collator, check_images=check)) == 2
    assert len(load_records(records[1:], collator=collator, check_images=check)) == 2
    reason = (
        r"It cannot share a batch with record 2 \(id 'tall'\): Images that share a call are padded to .*14400 x 15000"
    )
    with pytest.raises(RecordError, match=rf"1 of 3 records cannot be used:\n  record 0 \(id 'wide'\): {reason}"):
        load_records(records, collator=collator, check_images=check)
    kept = load_records(records, collator=collator, check_images=check, on_error="skip")
    assert [kept[idx]["origin"] for idx in range(2)] == ["record 1 (id 'usual')", "record 2 (id 'tall')"]
    # the two images of one record share a call whatever its batch
    both = {**records[0], "images": [records[0]["images"][0], records[2]["images"][0]]}
    with pytest.raises(RecordError, match="record 0 .*: Images that share a call are padded to the largest sides"):
        load_records([both], collator=collator, check_images=check)
    # other methods cut them into tiles of one size
    assert len(load_records(records, collator=VtcCollator(tiny_processor("vico")), check_images=check)) == 3


def test_batches_refuse_what_was_not_checked():
    collator = VtcCollator(tiny_processor("convllava"))
    records = [long_and_thin(4, 1200, "wide"), long_and_thin(1200, 4, "tall")]
    with pytest.raises(ValueError, match="Images that share a call are padded to the largest sides"):
        collator(records)
    with pytest.raises(ValueError, match=r"Record 0 of the batch \(id 'line'\): `tiling='keep_aspect'` would resize"):
        collator([long_and_thin(1, 100_000, "line")])
