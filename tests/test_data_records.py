"""Sources and formats of records: all of them lead to the same conversations."""

import json
import logging
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from damaged_records import FORMATS, STYLES, good_record, make_world
from factories import tiny_processor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from hf_vtc.data import BadRecord, Conversation, RecordError, VtcCollator, load_records

TURNS = [("what is it?", "a box"), ("sure?", "yes")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def record(*images, style="llava", system=None):
    return STYLES[style](list(images), TURNS, system)


def texts(messages):
    """Roles and contents with everything as parts, since a string and one text part are the same."""
    parts = [
        [{"type": "text", "text": message["content"]}] if isinstance(message["content"], str) else message["content"]
        for message in messages
    ]
    return [(message["role"], part) for message, part in zip(messages, parts)]


# formats


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("images", [(), ("square.png",), ("square.png", "sub/wide.jpg")])
def test_formats_are_read_alike(images, system, world):
    loaded = load_records([record(*images, style=style, system=system) for style in FORMATS], world.folder)
    first = loaded[0]
    assert [picture.size for picture in first["images"]] == [(32, 32), (64, 32)][: len(images)]
    roles = ["user", "assistant"] * 2
    assert [message["role"] for message in first["messages"]] == (["system"] if system else []) + roles
    for idx in range(len(loaded)):
        assert texts(loaded[idx]["messages"]) == texts(first["messages"])
        assert all(
            np.array_equal(mine, other) for mine, other in zip(loaded[idx]["images"], first["images"], strict=True)
        )


@pytest.mark.parametrize(
    ("value", "images", "expected"),
    [
        ("<image>\nWhat?", 1, ["image", "What?"]),
        # as in LLaVA's own loader, for half of its data
        ("What?\n<image>", 1, ["image", "What?"]),
        ("<image>What?", 1, ["image", "What?"]),
        ("Is <image> red?", 1, ["Is ", "image", " red?"]),
        ("<image>\n<image>\nWhat?", 2, ["image", "image", "What?"]),
        ("First <image>\nthen <image>", 2, ["First ", "image", "then ", "image"]),
        ("<image>", 1, ["image"]),
        ("What?", 1, ["image", "What?"]),
    ],
)
def test_markers_say_where_images_stand(value, images, expected):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "Yes."}]
    conversation = Conversation.from_record({"conversations": turns, "image": ["x.png"] * images})
    content = conversation.messages[0]["content"]
    assert [part["text"] if part["type"] == "text" else "image" for part in content] == expected
    assert conversation.images == ["x.png"] * images


def test_images_of_parts_and_of_the_record_keep_their_order():
    parts = [{"type": "image", "path": "a.png"}, {"type": "image"}, {"type": "image", "base64": "QUJD"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "three"}]
    conversation = Conversation.from_record({"messages": messages, "images": ["b.png"]})
    assert conversation.images == ["a.png", "b.png", "data:image;base64,QUJD"]


_words = st.sampled_from(
    ["messages", "conversations", "role", "from", "content", "value", "user", "human", "gpt", "assistant", "system"]
    + [
        "images",
        "image",
        "file_name",
        "type",
        "text",
        "image_url",
        "url",
        "path",
        "<image>",
        "a <image> b",
        "",
        "\ud800",
    ]
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _words | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_words, inner, max_size=4),
    max_leaves=25,
)
_message = st.fixed_dictionaries(
    {},
    optional={
        "role": _words | _json,
        "from": _words,
        "content": _words | _json | st.lists(st.dictionaries(_words, _json, max_size=3), max_size=3),
        "value": _words,
    },
)
_records = _json | st.fixed_dictionaries(
    {"messages": st.lists(_message, max_size=4) | _json},
    optional={"images": _json, "image": _json, "system": _json, "conversations": st.none() | _json},
)


@given(_records)
def test_from_record_reads_anything_or_says_what_is_wrong(anything):
    try:
        conversation = Conversation.from_record(anything)
    except ValueError as error:
        assert str(error)
        return
    parts = [part for _, content in texts(conversation.messages) for part in content]
    assert sum(part["type"] == "image" for part in parts) == len(conversation.images)
    assert all(part["type"] == "image" or isinstance(part["text"], str) for part in parts)
    roles = [message["role"] for message in conversation.messages if message["role"] != "system"]
    assert "assistant" in roles and roles == (["user", "assistant"] * len(roles))[: len(roles)]


# sources


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content, indent=1).encode())
    return path


def _id_of(record):
    return ", id 'x'" if "id" in record else ""


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_files_of_lines(suffix, world, tmp_path):
    rng = np.random.default_rng(0)
    expected = [good_record(rng) for _ in range(5)]
    lines = [json.dumps(entry, ensure_ascii=False).encode() for entry in expected]
    # a byte order mark, blank lines, Windows line ends
    data = write(tmp_path / f"data{suffix}", b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))
    records = load_records(data, world.folder)
    assert [records[idx]["origin"] for idx in range(5)] == [
        f"data{suffix}, line {1 + 2 * idx} (record {idx}{_id_of(entry)})" for idx, entry in enumerate(expected)
    ]
    listed = load_records(expected, world.folder)
    for idx in range(5):
        assert records[idx]["messages"] == listed[idx]["messages"]


def test_json_lists_know_their_lines(world, tmp_path):
    entries = [record("square.png"), {"text": "bad"}, record(), 3]
    entries[0]["id"] = 17
    data = write(tmp_path / "data.json", entries)
    lines = data.read_text().splitlines()
    first_lines = [2, lines.index('  "text": "bad"'), None, len(lines) - 1]
    with pytest.raises(RecordError) as error:
        load_records(data, world.folder)
    assert f"data.json, line {first_lines[1]} (record 1): A record must have one of" in str(error.value)
    assert f"data.json, line {first_lines[3]} (record 3): A record must be a mapping" in str(error.value)
    records = load_records(data, world.folder, on_error="skip")
    assert len(records) == 2 and records[0]["origin"] == "data.json, line 2 (record 0, id 17)"
    refused = [f"data.json, line {first_lines[idx]} (record {idx})" for idx in (1, 3)]
    assert [error.origin for error in records.errors] == refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n {"a": ]', "line 2: the file is damaged"),
        (b'[{"a": 1}\n {"a": 2}]', "line 2: the file is damaged"),
        (b'[{"a": 1}, ]', "the file is damaged"),
        (b'[{"a": 1}]\n]', "line 1: the file is damaged .Extra data"),
        (b'[{"a": 1}', "the file is damaged"),
        (b"[", "the file is damaged"),
        (b"[" * 100_000, "cannot be parsed"),
    ],
)
def test_a_damaged_list_is_never_skipped(content, message, tmp_path):
    with pytest.raises(RecordError, match=message):
        load_records(write(tmp_path / "data.json", content), on_error="skip")


def test_bad_utf8_in_a_list_concerns_its_record(tmp_path):
    content = json.dumps([record(), record(system="PLACE"), record()]).encode().replace(b"PLACE", b"\xff\xfe")
    records = load_records(write(tmp_path / "data.json", content), on_error="skip")
    assert len(records) == 2 and "must be valid UTF-8" in records.errors[0].reason


def test_images_start_from_the_folder_of_the_data(world, tmp_path):
    (tmp_path / "square.png").write_bytes((world.folder / "square.png").read_bytes())
    data = write(tmp_path / "data.json", [record("square.png")])
    assert load_records(data)[0]["images"][0].size == (32, 32)
    with pytest.raises(RecordError, match="record 0 .*: Image 'square.png' is a path. Give `image_folder`"):
        load_records([record("square.png")])


def test_a_folder_holds_several_files_and_images(world, tmp_path):
    (tmp_path / "a.png").write_bytes((world.folder / "square.png").read_bytes())
    write(tmp_path / "b.json", [record("a.png")])
    # the layout of image folders on the Hub
    line = {"file_name": "a.png", "messages": record(style="hub")["messages"]}
    write(tmp_path / "metadata.jsonl", json.dumps(line).encode())
    write(tmp_path / "notes.txt", b"nothing")
    records = load_records(tmp_path)
    assert [records[idx]["origin"] for idx in range(2)] == [
        "b.json, line 2 (record 0, id 'x')",
        "metadata.jsonl, line 1 (record 0)",
    ]
    assert texts(records[1]["messages"])[0][1][0] == {"type": "image"}
    with pytest.raises(ValueError, match="must hold .json, .jsonl, .parquet files"):
        load_records(world.folder)


def png(name, world):
    return (world.folder / name).read_bytes()


def test_datasets_and_parquet(world, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is optional")
    rows = [record(*names, style="hub") for names in (["square.png"], [], ["square.png", "sub/wide.jpg"])]
    expected = load_records(rows, world.folder)
    for row in rows:
        row["images"] = [{"bytes": png(name, world), "path": name} for name in row["images"]]
    rows[1]["images"].append({"bytes": png("truncated.png", world), "path": "truncated.png"})
    rows[1]["messages"][0]["content"].insert(0, {"type": "image", "text": None})
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.Sequence(datasets.Image()))
    dataset.to_parquet(tmp_path / "data.parquet")
    for source, name in ((dataset, "row 1 of the data set"), (tmp_path / "data.parquet", "data.parquet, row 1")):
        # the header of a damaged image is fine: nothing was decoded
        assert len(load_records(source, check_images="header")) == 3
        with pytest.raises(RecordError, match="'truncated.png' cannot be read"):
            load_records(source)
        records = load_records(source, on_error="skip")
        (error,) = records.errors
        assert error.origin == name and "'truncated.png' cannot be read" in error.reason
        for idx, other in ((0, 0), (1, 2)):
            assert texts(records[idx]["messages"]) == texts(expected[other]["messages"])
            pairs = zip(records[idx]["images"], expected[other]["images"], strict=True)
            assert all(np.array_equal(*pair) for pair in pairs)


def test_a_dataset_of_json_columns(world):
    datasets = pytest.importorskip("datasets", reason="datasets is optional")
    if "Json" not in dir(datasets):
        pytest.skip("this version of datasets has no JSON columns")
    messages = record("square.png", style="openai")["messages"]
    features = datasets.Features(
        {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Json()})}
    )
    dataset = datasets.Dataset.from_dict({"messages": [messages]}, features=features)
    expected = load_records([{"messages": messages}], world.folder)[0]
    assert load_records(dataset, world.folder)[0]["messages"] == expected["messages"]


def test_a_damaged_parquet_file_is_never_skipped(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is optional")
    with pytest.raises(RecordError, match="not a readable parquet file"):
        load_records(write(tmp_path / "data.parquet", b"PAR1 and no more"), on_error="skip")


@pytest.mark.parametrize("source", [3, None, {"messages": []}, "nowhere.json", "setup.cfg", iter([])])
def test_other_sources_are_refused(source):
    with pytest.raises(ValueError, match="`source` must be|The data file must end in"):
        load_records(source)


# images


def test_images_come_upright_and_in_rgb(world):
    records = load_records([record("turned.jpg"), record("grey.png")], world.folder)
    assert records[0]["images"][0].size == (32, 64)
    assert {records[idx]["images"][0].mode for idx in range(2)} == {"RGB"}
    # and so they are counted, whichever check reads them
    processor = tiny_processor("vico", max_tiles=2, min_tiles=2)
    for check in ("header", "pixels"):
        load_records([record("turned.jpg")], world.folder, check_images=check, collator=VtcCollator(processor))


def test_images_in_memory_need_no_folder(world):
    picture = Image.open(world.folder / "sub" / "wide.jpg")
    kinds = [picture, png("sub/wide.jpg", world), {"bytes": png("sub/wide.jpg", world), "path": "/etc/passwd"}]
    records = load_records([record(kind) for kind in kinds], check_images="pixels")
    pictures = [np.asarray(records[idx]["images"][0]) for idx in range(3)]
    assert all(np.array_equal(pictures[0], other) for other in pictures[1:])
    # the caller's own image stays open
    assert picture.size == (64, 32) and picture.convert("L").getextrema()


def test_addresses_are_downloaded_if_allowed(world):
    handler = partial(SimpleHTTPRequestHandler, directory=world.folder)
    handler.func.log_message = lambda *args: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        good, missing = record(f"{address}/square.png"), record(f"{address}/nowhere.png")
        with pytest.raises(RecordError, match="Only `allow_urls=True` permits"):
            load_records([good])
        records = load_records([good, missing], allow_urls=True, check_images="header")
        assert np.array_equal(records[0]["images"][0], Image.open(world.folder / "square.png"))
        with pytest.raises(RecordError, match="record 1 .*: .*could not be downloaded"):
            records[1]
        records = load_records([good, missing], allow_urls=True, on_error="skip")
        assert len(records) == 1 and "could not be downloaded" in records.errors[0].reason
        server.shutdown()


def test_the_limit_of_pixels(world):
    assert len(load_records([record("large.png")], world.folder, max_image_pixels=120_000)) == 1
    with pytest.raises(RecordError, match="more than `max_image_pixels`"):
        load_records([record("large.png")], world.folder, max_image_pixels=119_999)


# policies


def test_what_is_left_out_is_reported(world, caplog):
    bad = [{"text": str(idx)} for idx in range(12)]
    with caplog.at_level(logging.WARNING, logger="hf_vtc"):
        records = load_records([record(), *bad, record("square.png")], world.folder, on_error="skip")
    assert len(records) == 2 and [records[idx]["origin"] for idx in range(2)] == [
        "record 0 (id 'x')",
        "record 13 (id 'x')",
    ]
    assert [error.origin for error in records.errors] == [f"record {idx}" for idx in range(1, 13)]
    assert isinstance(records.errors[0], BadRecord)
    assert "12 of 14 records cannot be used:\n  record 1: A record must have one of" in caplog.text
    assert "and 2 more" in caplog.text
    caplog.clear()
    load_records([record()])
    assert not caplog.text


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(RecordError, match="No usable record is left of 1"):
        load_records([{}], on_error="skip")
    with pytest.raises(RecordError, match="No usable record is left of 0"):
        load_records(write(tmp_path / "data.jsonl", b"\n\n"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "`on_error` must be one of raise, skip"),
        ({"check_images": "none"}, "`check_images` must be one of header, pixels"),
        ({"ignore_fields": "score"}, "`ignore_fields` must be a list of names"),
        ({"max_image_pixels": 0}, "`max_image_pixels` must be positive"),
        ({"image_folder": "nowhere"}, "`image_folder` must be an existing folder"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        load_records([record()], **options)


def test_records_feed_workers_of_every_kind(world):
    records = load_records([record("square.png"), record(), record("sub/wide.jpg", "grey.png")], world.folder)
    # workers that are not forked get a copy
    copy = pickle.loads(pickle.dumps(records))
    collator = VtcCollator(tiny_processor("vico"))
    (expected,) = DataLoader(records, batch_size=3, collate_fn=collator)
    (batch,) = DataLoader(copy, batch_size=3, collate_fn=collator, num_workers=1)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], value) for name, value in expected.items())
    assert records[-1]["origin"] == "record 2 (id 'x')"
    with pytest.raises(IndexError):
        records[3]
