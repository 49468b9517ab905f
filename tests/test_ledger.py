"""The ledger's data: what is held out, how dense fields are, pages, questions, labels, tiling, files."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="ledger reads handwriting and photographs from scikit-learn")
pytest.importorskip("matplotlib", reason="ledger reads fonts and a photograph from matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import ledger  # noqa: E402
from digit_forms import load_split, page_rng  # noqa: E402
from ledger.base import NAMES  # noqa: E402
from ledger.dataset import write_dataset  # noqa: E402
from ledger.fonts import SHAPES, Shape, fonts_of, printed_digit  # noqa: E402
from ledger.pages import GRIDS, MAX_TILES  # noqa: E402
from ledger.photos import SUBJECTS, photo_crop, regions_of  # noqa: E402
from ledger.stages import Conversations, build_processor  # noqa: E402
from ledger.text import build_tokenizer  # noqa: E402

NUM_PAGES = 60


def page_of(index: int, split: str = "train", seed: int = 7) -> ledger.Page:
    return ledger.draw_page(page_rng(seed, split, index), split)


@pytest.fixture(scope="module")
def pages() -> list[ledger.Page]:
    return [page_of(index, split) for index in range(NUM_PAGES // 2) for split in ("train", "test")]


def test_fonts_of_hold_out_whole_files_that_look_otherwise():
    train, test = fonts_of("train"), fonts_of("test")
    assert not set(train) & set(test) and len(train) >= 3 * len(test) >= 12
    for digit in "0123456789":
        drawn = {font: printed_digit(font, 12, digit) for font in (*train, *test)}
        assert all(mask.max() > 0.5 for mask in drawn.values())
        # the same bitmaps under another name would be a leak that names hide
        seen = {drawn[font].tobytes() for font in train}
        assert sum(drawn[font].tobytes() in seen for font in test) == 0, digit


def test_digits_of_training_differ_in_shape_and_those_of_the_test_are_their_fonts():
    assert SHAPES["test"] == (Shape(),)
    plain = printed_digit("DejaVuSans", 40, "7")
    drawn = [printed_digit("DejaVuSans", 40, "7", shape) for shape in SHAPES["train"]]
    assert (drawn[0] == plain).all() and len({mask.tobytes() for mask in drawn}) == len(drawn) >= 20
    ink = {weight: printed_digit("DejaVuSans", 40, "7", Shape(weight=weight)).sum() for weight in (0, 1)}
    assert ink[1] > 1.05 * ink[0]
    wide = printed_digit("DejaVuSans", 40, "7", Shape(stretch=1.2))
    assert wide.shape[1] == pytest.approx(1.2 * plain.shape[1], abs=1.5) and wide.shape[0] == plain.shape[0]
    slanted = printed_digit("DejaVuSans", 40, "0", Shape(shear=0.25))
    rows = np.arange(slanted.shape[1]) @ slanted.T / slanted.sum(1)
    assert rows[:4].mean() - rows[-4:].mean() == pytest.approx(0.25 * (len(rows) - 4), abs=1)


@pytest.mark.parametrize("split", ["train", "test"])
def test_draw_page_uses_its_split_alone(split):
    other = "train" if split == "test" else "test"
    num_samples, fonts, prints, written = len(load_split(split)[1]), set(fonts_of(other)), 0, 0
    for index in range(3 * NUM_PAGES):
        for field in page_of(index, split).fields:
            for source in field.sources if field.kind in ("table", "box") else ():
                prints, written = prints + isinstance(source, str), written + isinstance(source, int)
                assert source not in fonts
                assert isinstance(source, str) or source < num_samples
    assert prints > NUM_PAGES and written > 5


@pytest.mark.parametrize("subject", SUBJECTS)
def test_regions_of_share_no_pixel(subject):
    train, test = regions_of(subject, "train"), regions_of(subject, "test")
    assert all(right <= start or left >= end for left, right in train for start, end in test)
    assert len(train) == 2 * len(test) == 4


@pytest.mark.parametrize("subject", SUBJECTS)
def test_photo_crop_stays_in_its_regions(subject, monkeypatch):
    from ledger import photos
    from PIL import Image

    # a photograph whose red says which column a pixel is from
    original = photos._photo(subject)
    columns = np.zeros((original.height, original.width, 3), np.uint8)
    columns[..., 0] = np.arange(original.width) * 250 // original.width
    monkeypatch.setattr(photos, "_photo", lambda name: Image.fromarray(columns))
    for split in ("train", "test"):
        allowed = [
            (250 * left / original.width, 250 * right / original.width) for left, right in regions_of(subject, split)
        ]
        for seed in range(20):
            red = photo_crop(np.random.default_rng(seed), subject, split, 42)[..., 0]
            assert any(red.min() >= low - 1.5 and red.max() <= high + 1.5 for low, high in allowed)


def test_unknown_split_is_refused():
    for entry in (
        fonts_of,
        lambda split: ledger.draw_page(page_rng(0, "train", 0), split),
        lambda split: ledger.evaluation_set(1, split=split),
    ):
        with pytest.raises(ValueError, match="`split` must be one of"):
            entry("validation")


def test_draw_page_is_deterministic_and_pools_do_not_depend_on_workers():
    assert page_of(3).image.tobytes() == page_of(3).image.tobytes() != page_of(4).image.tobytes()
    alone, shared = ledger.PagePool(5, "train", 7), ledger.PagePool(5, "train", 7, workers=2)
    for index in range(5):
        assert (alone.tiles[index] == shared.tiles[index]).all() and alone.questions[index] == shared.questions[index]
        assert (alone.tiles[index] == ledger.tile_page(page_of(index))).all()


def test_field_bits_are_those_of_the_contents_that_are_drawn():
    # by hand: one of 6 colours and 16 digits; one of 6 colours and a digit
    assert (
        ledger.field_bits("table") == pytest.approx(math.log2(6) + 16 * math.log2(10)) == pytest.approx(55.7, abs=0.1)
    )
    assert ledger.field_bits("box") == pytest.approx(math.log2(60))
    drawn = [field for index in range(1500) for field in page_of(index).fields]
    for kind, count, tolerance in (("table", 16, 0.01), ("box", 1, 0.03)):
        texts = [field.text for field in drawn if field.kind == kind]
        assert {len(text) for text in texts} == {count}
        digits = np.array([int(digit) for text in texts for digit in text])
        assert np.bincount(digits) / len(digits) == pytest.approx(np.full(10, 0.1), abs=tolerance)


def test_densities_lie_on_both_sides_of_the_knee():
    # tokens per tile at full and at compressed length, as the base cuts them
    full, small = 16, 4
    assert ledger.field_bits("table") / full < 3.6
    assert ledger.field_bits("table") / small > 5
    assert ledger.field_bits("box") / small < 2.5


def test_questions_have_one_answer(pages):
    for page in pages:
        texts = [question.text for question in page.questions]
        assert len(set(texts)) == len(texts)
        colours = [field.colour for field in page.fields if field.colour]
        assert len(set(colours)) == len(colours)
        for question in page.questions:
            if question.topic == "digit":
                field = page.fields[question.tile]
                word = question.text.rstrip("?").split()[1]
                colour, cell = word[:-1], word[-1]
                assert field.colour == colour and field.kind == "table"
                assert question.answer == field.text["ABCDEFGHIJKLMNOP".index(cell)]
            elif question.topic == "tables":
                assert question.answer == str(page.num_tables)
            elif question.topic == "number":
                assert page.fields[question.tile].kind == "box" and question.answer == page.fields[question.tile].text


@pytest.mark.parametrize("patch_size", [6, 12])
def test_patch_labels_say_what_is_drawn(pages, patch_size):
    # patches of a quarter of a tile's side, which a digit of a table fills
    step = 12 // patch_size
    for page in pages[:20]:
        labels = ledger.patch_labels(page, patch_size)
        for tile, field in enumerate(page.fields):
            read = labels["digit"][tile]
            if field.kind == "table":
                assert (read[::step, ::step].flatten() - 1).tolist() == [int(digit) for digit in field.text]
                assert (read[::step, ::step] == read[step - 1 :: step, step - 1 :: step]).all()
            elif field.kind == "box":
                assert set(read[read > 0] - 1) == {int(field.text)}
            else:
                assert not read.any()


def test_processor_cuts_a_page_into_its_fields(tmp_path, pages):
    build_tokenizer().save_pretrained(tmp_path)
    processor = build_processor(tmp_path)
    for page in pages[:4]:
        cut = processor.image_processor([page.image], return_tensors="pt")
        pixels = cut["pixel_values"].permute(0, 2, 3, 1).numpy()
        mean, std = np.float32(processor.image_processor.image_mean), np.float32(processor.image_processor.image_std)
        assert np.abs((pixels * std + mean) * 255 - ledger.tile_page(page)).max() < 1e-2
        assert processor.reserved_tokens(page.image.height, page.image.width) == 16 * len(page.fields)


@pytest.mark.parametrize(("grid", "kinds"), [((1, 1), {"table", "box"}), ((2, 1), set(ledger.dataset.KINDS))])
def test_draw_page_of_few_fields_leaves_out_what_does_not_fit(grid, kinds):
    drawn = [ledger.draw_page(page_rng(0, "train", index), "train", grids=(grid,)) for index in range(40)]
    assert all((page.rows, page.columns) == grid and len(page.fields) == grid[0] * grid[1] for page in drawn)
    assert {field.kind for page in drawn for field in page.fields} == kinds
    # about two thirds of the pages have a table, which comes first
    assert 15 <= sum(page.num_tables > 0 for page in drawn) <= 38


def test_draw_page_has_the_fields_that_are_asked_for():
    for num_tables, num_boxes, grids in (
        (1, 0, ((1, 1),)),
        (2, 0, ((1, 2),)),
        (0, MAX_TILES, GRIDS),
    ):
        page = ledger.draw_page(page_rng(0, "train", 1), "train", num_tables, grids, num_boxes)
        assert [field.kind for field in page.fields] == ["table"] * num_tables + ["box"] * num_boxes


def test_words_of_questions_are_one_token():
    tokenizer = build_tokenizer()
    for words in NAMES.values():
        assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words)


def test_evaluation_set_is_balanced_and_new():
    items = ledger.evaluation_set(300, seed=5)
    assert [sum(item.kind == kind for item in items) for kind in ledger.EVALUATED_KINDS] == [100] * 3
    tables = np.bincount([item.fields.count("table") for item in items])
    assert len(tables) == 3 and tables.min() > 70
    assert all("table" in item.fields for item in items if item.kind == "dense")
    assert len({item.image.tobytes() for item in items}) == len(items)
    again = ledger.evaluation_set(6, seed=5)
    assert [item[1:] for item in again] == [item[1:] for item in items[:6]]


def test_conversations_ask_what_they_should():
    kinds = [len(Conversations(3, 5, 1)[index]["messages"]) for index in range(3)]
    assert kinds == [2, 2, 2]
    assert "table" in Conversations(3, 5, 1)[2]["messages"][0]["content"].lower()
    assert max(len(Conversations(20, 5)[index]["messages"]) for index in range(20)) == 20


def test_write_dataset_is_read_by_the_loader(tmp_path):
    from hf_vtc.evaluation import read_questions, records_to_ask

    path = write_dataset(tmp_path, 6)
    assert len(json.loads(path.read_text())) == 6
    questions = read_questions(records_to_ask(str(path), str(tmp_path), "kind"), "exact", "kind", "last")
    assert [question.kind for question in questions] == ["coarse", "sparse", "dense"] * 2
