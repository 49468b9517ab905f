"""The data of the tiny checkpoints: splits, pages, questions, tiling, tokenizer, files."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn", reason="digit_forms reads its handwriting from scikit-learn")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import digit_forms as forms  # noqa: E402

NUM_PAGES = 60


def page_of(index: int, split: str = "train", seed: int = 7) -> forms.Page:
    return forms.draw_page(forms.page_rng(seed, split, index), split)


@pytest.fixture(scope="module")
def pages() -> list[forms.Page]:
    return [page_of(index) for index in range(NUM_PAGES)]


def test_load_split_is_disjoint_complete_and_stratified():
    train, test = forms.split_indices("train"), forms.split_indices("test")
    assert not set(train) & set(test)
    assert sorted([*train, *test]) == list(range(1797))
    images, labels = forms.load_split("test")
    assert images.shape == (300, 8, 8) and images.dtype == np.float32
    assert images.min() == 0 and images.max() == 1
    assert np.bincount(labels).tolist() == [30] * 10


def test_load_split_shares_no_image():
    # the same bitmap under two sample numbers would be a leak that the indices hide
    seen = {image.tobytes() for image in forms.load_split("train")[0]}
    assert not seen & {image.tobytes() for image in forms.load_split("test")[0]}


@pytest.mark.parametrize("entry", [forms.load_split, lambda split: forms.PagePool(1, split)])
def test_unknown_split_is_refused(entry):
    with pytest.raises(ValueError, match="`split` must be one of"):
        entry("validation")


def test_draw_page_is_deterministic():
    first, second, other = page_of(3), page_of(3), page_of(4)
    assert first.image.tobytes() == second.image.tobytes()
    assert first.questions == second.questions and first.boxes == second.boxes
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("split", ["train", "test"])
def test_draw_page_writes_the_labelled_samples(split):
    _, labels = forms.load_split(split)
    for index in range(20):
        for box in page_of(index, split).boxes:
            assert "".join(str(labels[sample]) for sample in box.samples) == box.number


def test_draw_page_keeps_numbers_inside_their_frames(pages):
    for page in pages:
        pixels = np.asarray(page.image).astype(int)
        for box in page.boxes:
            left, top, right, bottom = box.frame
            field_left, field_top, field_right, field_bottom = page.field_rectangle(box.row, box.column)
            assert field_left < left < right < field_right and field_top < top < bottom < field_bottom
            x0, y0, x1, y1 = box.number_area
            assert left + 2 <= x0 < x1 <= right - 2 and top + 2 <= y0 < y1 <= bottom - 2
            for a, b, c, d in box.digit_areas:
                assert x0 <= a < c <= x1 and y0 <= b < d <= y1
                # ink is there, and it is darker than the paper
                assert pixels[b:d, a:c].sum(-1).min() < np.median(pixels.reshape(-1, 3), 0).sum() - 150


def test_draw_page_answers_agree_with_metadata(pages):
    for page in pages:
        answers = {}
        for question in page.questions:
            answers.setdefault(question.topic, []).append(question)
        assert [question.answer for question in answers["page_colour"]] == [page.colour]
        width, height = page.image.size
        assert answers["orientation"][0].answer == ("landscape" if width > height else "portrait")
        assert answers["count"][0].answer == str(len(page.boxes))
        assert len(answers["describe_field"]) == len(page.boxes) + 1
        for question in answers["describe_field"]:
            box = next(
                (box for box in page.boxes if f"row {box.row + 1}, column {box.column + 1}" in question.text), None
            )
            assert question.answer.endswith("empty" if box is None else box.colour)
        for topic, value in (("number", "number"), ("where", "place"), ("box_colour", "colour")):
            assert len(answers[topic]) == len(page.boxes)
            for box, question in zip(page.boxes, answers[topic], strict=True):
                place = f"row {box.row + 1}, column {box.column + 1}"
                assert question.answer == (place if value == "place" else getattr(box, value))
                assert f"{box.colour} {box.number}" in [q.answer for q in answers["read_box"]]
                assert f"{box.colour} {place}" in [q.answer for q in answers["find_box"]]
                assert (place if topic == "box_colour" else f"the {box.colour} box") in question.text
        taken = {f"row {box.row + 1}, column {box.column + 1}" for box in page.boxes}
        for question in answers["is_box"]:
            assert question.answer == ("yes" if any(place in question.text for place in taken) else "no")
        assert page.questions[-1].topic == "transcription"
        assert page.questions[-1].answer == ", ".join(f"{box.colour} {box.number}" for box in page.boxes)


def test_draw_page_has_unique_colours_and_few_boxes(pages):
    for page in pages:
        colours = [box.colour for box in page.boxes]
        assert len(set(colours)) == len(colours)
        assert 1 <= len(colours) <= 3
        places = {(box.row, box.column) for box in page.boxes}
        assert len(places) == len(colours) and not places & set(page.decorations)
        assert len(places) + len(page.decorations) == page.rows * page.columns
    share = np.mean([len(page.boxes) / (page.rows * page.columns + 1) for page in pages])
    assert 0.15 < share < 1 / 3


@pytest.mark.parametrize("max_tiles", [9, 12])
@pytest.mark.parametrize("rows, columns", forms.GRIDS)
def test_tile_grid_is_the_grid_of_the_form(rows, columns, max_tiles):
    size = (columns * forms.FIELD_SIZE, rows * forms.FIELD_SIZE)
    assert forms.tile_grid(*size, max_tiles=max_tiles) == (columns, rows)


def test_tile_page_cuts_fields_unscaled_and_ends_with_the_thumbnail(pages):
    for page in pages[:8]:
        tiles = forms.tile_page(page.image)
        assert tiles.shape == (page.rows * page.columns + 1, 32, 32, 3) and tiles.dtype == np.uint8
        for tile in range(page.rows * page.columns):
            crop = page.image.crop(page.field_rectangle(*divmod(tile, page.columns)))
            assert np.array_equal(tiles[tile], np.asarray(crop))
        thumbnail = page.image.resize((32, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(tiles[-1], np.asarray(thumbnail))


def test_patch_labels_name_digits_and_boxes(pages):
    colours = list(forms.BOX_COLOURS)
    for page in pages:
        labels = forms.patch_labels(page)
        assert set(labels) == set(forms.PATCH_LABELS)
        for name, values in labels.items():
            assert values.shape == (page.rows * page.columns + 1, 8, 8)
            assert values.max() < forms.PATCH_LABELS[name]
        digits, boxes = labels["digit"], labels["box_colour"]
        assert not digits[-1].any()
        assert ((labels["place"] > 0) == (digits > 0)).all()
        assert (labels["page_colour"] == list(forms.PAGE_COLOURS).index(page.colour)).all()
        for name, count in (("row", page.rows), ("column", page.columns)):
            assert (labels[name][:-1] == -100).all()
            assert set(np.unique(labels[name][-1])) == set(range(count))
        thumbnail = set(zip(*(labels[name][-1].ravel() for name in ("row", "column", "box_colour")), strict=True))
        assert thumbnail >= {(box.row, box.column, 1 + colours.index(box.colour)) for box in page.boxes}
        filled = {box.row * page.columns + box.column: box for box in page.boxes}
        for tile in range(page.rows * page.columns):
            if tile in filled:
                box = filled[tile]
                assert set(np.unique(digits[tile])) - {0} == {1 + int(digit) for digit in box.number}
                assert (boxes[tile] == 1 + colours.index(box.colour)).all()
            else:
                assert not digits[tile].any() and not boxes[tile].any()
        assert set(np.unique(boxes[-1])) - {0} == {1 + colours.index(box.colour) for box in page.boxes}


def test_page_pool_begins_alike_whatever_its_size():
    small, large = forms.PagePool(3, "train", seed=5), forms.PagePool(6, "train", seed=5)
    assert len(small) == 3 and len(large) == 6
    for index in range(3):
        assert np.array_equal(small.tiles[index], large.tiles[index])
        assert small.questions[index] == large.questions[index]
    assert not np.array_equal(forms.PagePool(1, "test", seed=5).tiles[0], small.tiles[0])


def test_evaluation_set_is_balanced_and_repeatable():
    items, again = forms.evaluation_set(90, seed=3), forms.evaluation_set(90, seed=3)
    for item, same in zip(items, again, strict=True):
        assert item[1:] == same[1:] and item.image.tobytes() == same.image.tobytes()
    kinds = [item.kind for item in items]
    assert {kind: kinds.count(kind) for kind in forms.EVALUATED_KINDS} == {"coarse": 30, "middling": 30, "fine": 30}
    assert all(
        item.answer.isdigit() and item.question.endswith("box?" if "?" in item.question else "box.")
        for item in items
        if item.kind == "fine"
    )


def test_score_counts_exact_answers():
    image = Image.new("RGB", (8, 8))
    items = [
        forms.EvaluationItem(image, "q", answer, kind)
        for answer, kind in (("pink", "coarse"), ("2", "middling"), ("47", "fine"), ("5", "fine"))
    ]
    accuracy = forms.score(items, ["pink ", "2", "4", "5"])
    assert accuracy == {"coarse": 1.0, "middling": 1.0, "fine": 0.5, "all": 0.75}
    with pytest.raises(ValueError, match="one entry per item, got 1 for 4"):
        forms.score(items, ["pink"])


def test_write_dataset_is_llava_json(tmp_path):
    path = forms.write_dataset(tmp_path, num_pages=3, split="test", seed=2)
    records = json.loads(path.read_text())
    assert len(records) == 3
    for index, record in enumerate(records):
        page = page_of(index, "test", seed=2)
        with Image.open(tmp_path / record["image"]) as image:
            assert image.tobytes() == page.image.tobytes()
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * len(page.questions)
        assert [turn["value"].startswith("<image>\n") for turn in turns] == [True] + [False] * (len(turns) - 1)
        asked = {
            turn["value"].removeprefix("<image>\n"): answer["value"] for turn, answer in zip(turns[::2], turns[1::2])
        }
        assert asked == {question.text: question.answer for question in page.questions}
        assert turns[-1]["value"] == page.questions[-1].answer


@pytest.fixture(scope="module")
def tokenizer():
    return forms.build_tokenizer()


def test_build_tokenizer_is_deterministic_and_small(tokenizer):
    again = forms.build_tokenizer()
    assert tokenizer.get_vocab() == again.get_vocab()
    assert len(tokenizer) == forms.VOCAB_SIZE
    assert tokenizer.convert_tokens_to_ids(list(forms.SPECIAL_TOKENS)) == list(range(6))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.padding_side == "left" and tokenizer.model_input_names == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    "text", ["Where is the red box?", "naïve café, 東京 🙂\n\ttabs", "4711 and 0", " two  spaces "]
)
def test_build_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(range(6))


def test_build_tokenizer_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = forms.format_prompt("What number is in the red box?", 2)
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded("row 2, column 1").input_ids) == "row 2, column 1"
    assert (loaded.padding_side, loaded.eos_token, loaded.pad_token) == ("left", "<|im_end|>", "<|endoftext|>")


def test_build_tokenizer_keeps_words_and_digits_whole(tokenizer):
    assert len(tokenizer("4711").input_ids) == 4
    for word in forms.BOX_COLOURS:
        assert len(tokenizer(f"What number is in the {word} box?").input_ids) == 8
    # a prompt and its answer tokenized apart give the ids of the whole: training and generation see the same
    prompt = forms.format_prompt("Where is the red box?", 7)
    for answer in ("row 2, column 1", "47", "pink"):
        assert tokenizer(prompt).input_ids + tokenizer(answer).input_ids == tokenizer(prompt + answer).input_ids
    context = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert tokenizer(prompt).input_ids.count(context) == 7 * forms.TOKENS_PER_TILE
