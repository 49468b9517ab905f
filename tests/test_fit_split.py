"""What is kept aside: whole images by their pixels, chosen by a seed, and written down as data."""

import json

import pytest
from fit_samples import NUM_PICTURES, write_records
from PIL import Image

from hf_vtc.data import load_records
from hf_vtc.evaluation.questions import FIELDS, read_questions, records_to_ask, refuse_training_images
from hf_vtc.fit.split import Split, check_held_out, image_digest, split_records, write_held_out
from hf_vtc.fit.stage import Data


def turns(text="what?", answer="this"):
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, shade, shade))


def shown(*shades: int, **fields) -> dict:
    return {"images": [picture(shade) for shade in shades], "conversations": turns(), **fields}


def aside(records, held_out, seed=0) -> set[str]:
    return set(split_records(load_records(records), held_out, seed).held_out)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(("held_out", "number"), [(0.25, 10), (10, 10), (0, 0), (0.001, 1), (39, 39), (1000, 39)])
def test_so_many_records_are_kept_aside(held_out, number):
    records = [shown(shade) for shade in range(40)]
    assert len(aside(records, held_out)) == number


def test_a_tenth_is_kept_aside_unless_a_number_is_given():
    assert len(aside([shown(shade) for shade in range(40)], None)) == 4
    # one in ten thousand pictures would be many questions: the number has a limit
    from hf_vtc.fit.split import _number

    assert _number(None, 10**6) == 1000 and _number(None, 3) == 1


def test_the_seed_decides_and_the_order_does_not():
    records = [shown(shade, id=f"r{shade}") for shade in range(40)]
    chosen = aside(records, 10)
    assert chosen == aside(records, 10) and chosen != aside(records, 10, seed=1)

    def names(origins):
        return {origin.partition("id ")[2] for origin in origins}

    assert names(aside(records[::-1], 10)) == names(chosen)
    # a choice for each image by itself: more data moves few of the others
    more = names(aside(records + [shown(shade, id=f"r{shade}") for shade in range(40, 48)], 12))
    assert len(more & names(chosen)) >= 7


@pytest.mark.parametrize("seed", range(6))
def test_records_that_share_an_image_stay_together(seed):
    # 0-1-2 are linked by records of two images, 3 is shown twice
    records = [shown(0), shown(0, 1), shown(2, 1), shown(3), shown(3), *(shown(shade) for shade in range(10, 20))]
    chosen = aside(records, 0.3, seed)
    linked = {f"record {idx}" for idx in range(3)}
    assert linked <= chosen or not linked & chosen
    assert {"record 3", "record 4"} <= chosen or not {"record 3", "record 4"} & chosen


def test_images_are_known_by_their_pixels(data):
    folder = data.parent
    assert (folder / "0.png").read_bytes() != (folder / "again.bmp").read_bytes()
    first, again, other = (Image.open(folder / name).convert("RGB") for name in ("0.png", "again.bmp", "1.png"))
    assert image_digest(first) == image_digest(again) != image_digest(other)
    # as many bytes in another shape
    assert image_digest(Image.new("RGB", (2, 8))) != image_digest(Image.new("RGB", (8, 2)))


def test_text_alone_always_trains():
    records = [shown(0), shown(1), *({"conversations": turns(str(idx))} for idx in range(20))]
    for seed in range(5):
        assert aside(records, 0.5, seed) < {"record 0", "record 1"}


@pytest.mark.parametrize(
    "records", [[{"conversations": turns()}] * 4, [shown(0), shown(0)], [shown(0), {"conversations": turns()}]]
)
def test_what_cannot_be_parted_is_refused(records):
    with pytest.raises(ValueError, match="no two that could be parted"):
        aside(records, 0.5)
    assert aside(records, 0) == set()


@pytest.mark.parametrize("held_out", [-1, 1.5, -0.1, float("nan")])
def test_what_is_no_share_and_no_number_is_refused(held_out):
    with pytest.raises(ValueError, match="`held_out` must be a share"):
        check_held_out(held_out)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_kept_aside_never_trains(data, tmp_path, seed):
    records = load_records(data, ignore_fields=FIELDS)
    split = split_records(records, 0.4, seed)
    split.save(tmp_path / "split.json")
    write_held_out(records, split, tmp_path / "held_out.jsonl")
    assert Split.load(tmp_path / "split.json") == split

    training = Data(str(data), data.parent, split).training_records(takes_videos=False)
    trained = {image_digest(image) for idx in range(len(training)) for image in training[idx]["images"]}
    asked = load_records(tmp_path / "held_out.jsonl", data.parent, ignore_fields=FIELDS)
    held = {image_digest(image) for idx in range(len(asked)) for image in asked[idx]["images"]}
    assert held == set(split.images) and not held & trained and len(held | trained) == NUM_PICTURES
    assert len(training) + len(asked) == len(records)
    # by the evaluation's own eyes too, which would find a record that is on both sides
    questions = read_questions(records_to_ask(asked))
    pictures = [training[idx] for idx in range(len(training))]
    refuse_training_images(asked, questions, load_records(pictures))
    with pytest.raises(ValueError, match="show images of the training data"):
        refuse_training_images(asked, questions, load_records([*pictures, asked[0]]))


def test_what_is_kept_aside_is_data_with_all_its_fields(data, tmp_path):
    records = load_records(data, ignore_fields=FIELDS)
    split = split_records(records, 4, 0)
    write_held_out(records, split, tmp_path / "held_out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line in json.loads(data.read_text()) for line in lines)
    assert {line["kind"] for line in lines} <= {"even", "odd"}


def test_images_of_tables_are_written_into_the_data(data, tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"image": {"bytes": (data.parent / f"{idx}.png").read_bytes(), "path": None}, "conversations": turns()}
        for idx in range(4)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    records = load_records(tmp_path / "rows.parquet")
    split = split_records(records, 2, 0)
    write_held_out(records, split, tmp_path / "held_out.jsonl")
    asked = load_records(tmp_path / "held_out.jsonl")
    assert {image_digest(asked[idx]["images"][0]) for idx in range(2)} == set(split.images)


def test_data_that_was_changed_is_refused(data, tmp_path):
    split = split_records(load_records(data, ignore_fields=FIELDS), 2, 0)
    records = json.loads(data.read_text())
    (tmp_path / "records.json").write_text(json.dumps(records[:-1], indent=1))
    with pytest.raises(RuntimeError, match="when it was split"):
        Data(str(tmp_path / "records.json"), data.parent, split).training_records(takes_videos=False)
