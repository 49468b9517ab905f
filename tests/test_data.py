"""Batches for training: what is supervised, and that the tokens are those of generation."""

import base64
import io

import numpy as np
import pytest
import torch
from factories import tiny_processor
from PIL import Image

from hf_vtc.data import Conversation, VtcCollator


def image(width=40, height=32, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_uri(picture):
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


IMAGE = {"type": "image"}
ONE_IMAGE = {"messages": [user(IMAGE, "How many?"), assistant("Three.")], "images": [image()]}
TEXT_ONLY = {"messages": [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi there"}]}
TWO_TURNS = {
    "messages": [user(IMAGE, "and", IMAGE, "?"), assistant("first"), user("more", IMAGE), assistant("second\n\nline")],
    "images": [image(64, 32, 1), image(32, 32, 2), image(32, 90, 3)],
}


def supervised_text(processor, batch, row):
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels != -100])


@pytest.mark.window
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_collator_supervises_the_assistant_and_its_end_token(padding_side):
    processor = tiny_processor("vico")
    batch = VtcCollator(processor, padding_side)([ONE_IMAGE, TEXT_ONLY, TWO_TURNS])
    assert supervised_text(processor, batch, 0) == "Three.<|im_end|>"
    assert supervised_text(processor, batch, 1) == "hi there<|im_end|>"
    assert supervised_text(processor, batch, 2) == "first<|im_end|>second\n\nline<|im_end|>"
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])
    padding = batch["attention_mask"] == 0
    assert (batch["labels"][padding] == -100).all()
    assert (batch["input_ids"][padding] == processor.tokenizer.pad_token_id).all()
    edge = 0 if padding_side == "left" else -1
    assert padding[:2, edge].all() and not padding[2].any()


@pytest.mark.window
def test_collator_makes_the_inputs_of_the_processor():
    processor = tiny_processor("vico", return_layout=True)
    records = [ONE_IMAGE, TEXT_ONLY, TWO_TURNS]
    batch = VtcCollator(processor, padding_side="left")(records)
    conversations = [Conversation.from_record(record) for record in records]
    texts = [processor.apply_chat_template(conversation.messages, tokenize=False) for conversation in conversations]
    images = [conversation.images for conversation in conversations]
    expected = processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert set(batch) == {*expected, "labels"}
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name
    assert batch["num_tiles"].tolist() == processor.image_processor(sum(images, []))["num_tiles"].tolist()
    reserved = (batch["input_ids"] == processor.image_token_id).sum()
    assert reserved == processor.image_seq_length * len(batch["pixel_values"])


@pytest.mark.window
def test_collator_prompt_is_the_prompt_of_generation():
    processor = tiny_processor("vico")
    batch = VtcCollator(processor)([ONE_IMAGE])
    prompt = processor.apply_chat_template(
        [user({"type": "image", "image": image()}, "How many?")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )["input_ids"][0]
    first_answer = int((batch["labels"][0] != -100).nonzero()[0])
    assert torch.equal(batch["input_ids"][0, :first_answer], prompt)


def test_collator_text_only_batch_has_no_vision_inputs():
    batch = VtcCollator(tiny_processor("vico"))([TEXT_ONLY, TEXT_ONLY])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [user({"type": "image", "image": image()}, "How many?"), assistant("Three.")]},
        {
            "messages": [
                user({"type": "image_url", "image_url": {"url": data_uri(image())}}, "How many?"),
                assistant("Three."),
            ]
        },
        {"messages": [{"role": "user", "content": "How many?"}, assistant("Three.")], "images": [image()]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None, "image": None},
                        {"type": "text", "text": "How many?", "image": None},
                    ],
                },
                {"role": "assistant", "content": "Three."},
            ],
            "images": [image()],
        },
    ],
    ids=["hf_part", "openai_part", "images_without_parts", "table_with_none"],
)
def test_collator_formats_are_equal(record):
    collator = VtcCollator(tiny_processor("vico"))
    expected, batch = collator([ONE_IMAGE]), collator([record])
    assert set(batch) == set(expected)
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


def test_collator_leaves_its_records_alone():
    record = {"messages": [{"role": "user", "content": "How many?"}, assistant("Three.")], "images": [image()]}
    VtcCollator(tiny_processor("vico"))([record])
    assert record["messages"][0] == {"role": "user", "content": "How many?"}


def test_collator_leaves_a_last_question_unsupervised():
    processor = tiny_processor("vico")
    record = {"messages": [*TEXT_ONLY["messages"], {"role": "user", "content": "and now?"}]}
    batch = VtcCollator(processor)([record])
    assert supervised_text(processor, batch, 0) == "hi there<|im_end|>"
    assert processor.tokenizer.decode(batch["input_ids"][0]).endswith("and now?<|im_end|>\n")


def test_collator_needs_a_template_that_only_appends():
    processor = tiny_processor("vico")
    processor.chat_template = "{{ messages | length }}" + processor.chat_template
    with pytest.raises(ValueError, match="Record 0 of the batch: The chat template must only append"):
        VtcCollator(processor)([TWO_TURNS])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [user(IMAGE, "?"), assistant("!")]}, "has no image"),
        ({"messages": [user(IMAGE, "?"), assistant("!")], "images": [image(), image()]}, "1 of 2 are left over"),
        ({"messages": [user("?")]}, "nothing to learn"),
        (["no mapping"], "must be a mapping"),
        ({"messages": [user({"type": "video"}), assistant("!")]}, "got 'video'"),
        ({"messages": [user("<IMG_CONTEXT>"), assistant("!")]}, "holds '<IMG_CONTEXT>', which stands for"),
        ({"messages": [user("<|im_end|>"), assistant("!")]}, r"Message 0: the text holds '<\|im_end\|>', which is a"),
        ({"messages": [assistant("!")], "images": [image()]}, "nothing to learn"),
    ],
)
def test_collator_names_the_record(record, message):
    with pytest.raises(ValueError, match=f"Record 1 of the batch: .*{message}"):
        VtcCollator(tiny_processor("vico"))([TEXT_ONLY, record])


def test_collator_checks_the_padding_side():
    with pytest.raises(ValueError, match="`padding_side`"):
        VtcCollator(tiny_processor("vico"), padding_side="middle")


def numbers(text, count):
    return " ".join([text] * count)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_collator_cuts_text_from_the_end(padding_side):
    processor = tiny_processor("vico")
    long = {"messages": [user(IMAGE, "How many?"), assistant(numbers("three", 40))], "images": [image()]}
    (whole,) = VtcCollator(processor)([long])["input_ids"]
    limit = len(whole) - 30
    batch = VtcCollator(processor, padding_side, max_length=limit)([long, TEXT_ONLY])
    assert batch["input_ids"].shape[1] == limit
    assert torch.equal(batch["input_ids"][0], whole[:limit])
    assert batch["labels"][0, -1] == whole[limit - 1]
    # a row that is short enough stays whole
    assert supervised_text(processor, batch, 1) == "hi there<|im_end|>"
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16 * len(batch["pixel_values"])


def test_collator_never_cuts_an_image():
    """For every limit: the row keeps all of its images whole, or is an error that says where the last one ends."""
    processor = tiny_processor("vico")
    (ids,) = VtcCollator(processor)([TWO_TURNS])["input_ids"].tolist()
    last_end = max(idx for idx, token in enumerate(ids) if token == processor.image_token_id) + 2
    assert processor.tokenizer.convert_ids_to_tokens(ids[last_end - 1]) == processor.image_end_token
    for limit in range(1, len(ids) + 2):
        collator = VtcCollator(processor, max_length=limit)
        if limit < last_end:
            with pytest.raises(ValueError, match=f"the last one ends at token {last_end}, after the limit of {limit}"):
                collator([TWO_TURNS])
        else:
            batch = collator([TWO_TURNS])
            assert batch["input_ids"].tolist() == [ids[:limit]]
            assert ids[:limit].count(processor.image_token_id) == 16 * len(batch["pixel_values"])


def test_collator_wants_something_to_learn():
    processor = tiny_processor("vico")
    (labels,) = VtcCollator(processor)([TEXT_ONLY])["labels"]
    first = int((labels != -100).nonzero()[0])
    with pytest.raises(ValueError, match=f"first answer begins after {first} tokens, the limit is {first}"):
        VtcCollator(processor, max_length=first)([TEXT_ONLY])
    assert (VtcCollator(processor, max_length=first + 1)([TEXT_ONLY])["labels"] != -100).sum() == 1
    with pytest.raises(ValueError, match="`max_length` counts tokens"):
        VtcCollator(processor, max_length=0)


@pytest.mark.window
def test_collator_check_counts_as_batches_do(method):
    processor, generator = tiny_processor(method), np.random.default_rng(0)
    for _ in range(20):
        height, width = (int(side) for side in generator.integers(20, 100, size=2))
        record = {"messages": [user("see", IMAGE), assistant("yes")], "images": [image(width, height)]}
        conversation = Conversation.from_record(record)
        length = VtcCollator(processor)([record])["input_ids"].shape[1]
        VtcCollator(processor, max_length=length).check(conversation.messages, [(height, width)])
        # the error says where the image ends
        short = VtcCollator(processor, max_length=5)
        with pytest.raises(ValueError) as by_check:
            short.check(conversation.messages, [(height, width)])
        with pytest.raises(ValueError) as by_call:
            short([record])
        assert str(by_call.value) == f"Record 0 of the batch: {by_check.value}"
