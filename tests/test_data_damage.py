"""Ten thousand damaged records: each is refused for the right reason, and nothing outside of the folder is opened."""

import os
import re
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
from damaged_records import MAX_LENGTH, MAX_PIXELS, World, damages, good_record, line_of, make_world
from factories import tiny_processor
from torch.utils.data import DataLoader

from hf_vtc.data import RecordError, VtcCollator, load_records

NUM_DAMAGED = 10_000
NUM_GOOD = 400

# events that reach beyond this process
WATCHED = ("open", "socket.connect", "socket.getaddrinfo", "urllib.Request", "subprocess.Popen", "os.posix_spawn")
_log: int | None = None


def _watch(event: str, args: tuple) -> None:
    if _log is None or event not in WATCHED or isinstance(args[0], int):
        return
    # workers hand tensors over through local sockets, whose address is a path
    if event == "socket.connect" and not isinstance(args[1], tuple):
        return
    # written to a file, which workers share with this process
    subject = os.fsdecode(args[0]) if event == "open" else repr(args)
    os.write(_log, f"{event}\t{subject}\n".encode(errors="replace"))


# a hook stays for the life of the process: it is added once, and silent unless a test asks
sys.addaudithook(_watch)


@pytest.fixture
def watched(tmp_path):
    """What this process and its workers opened and asked for since the test began."""
    global _log
    file = tmp_path / "events"
    _log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        yield lambda: [line.split("\t", 1) for line in file.read_text().splitlines()]
    finally:
        os.close(_log)
        _log = None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


KINDS = damages(World(Path("images"), Path("outside")))
IN_PIXELS = [name for name, kind in KINDS.items() if kind.in_pixels]


def collator():
    return VtcCollator(tiny_processor("vico"), max_length=MAX_LENGTH)


def load(source, world, **options):
    return load_records(source, world.folder, max_image_pixels=MAX_PIXELS, **options)


def test_there_are_forty_kinds():
    assert len(KINDS) >= 40


@pytest.mark.slow
def test_load_records_refuses_every_kind_of_damage_for_its_reason(world, tmp_path, watched):
    kinds, rng = damages(world), np.random.default_rng(0)
    names = [*islice(cycle(KINDS), NUM_DAMAGED), *[None] * NUM_GOOD]
    rng.shuffle(names)
    lines = [line_of(good_record(rng) if name is None else kinds[name].make(rng)) for name in names]
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\n".join(lines) + b"\n")

    records = load(data, world, on_error="skip", collator=collator())
    assert len(records) == NUM_GOOD and len(records.errors) == NUM_DAMAGED
    refused = {int(re.search(r"line (\d+)", error.origin)[1]): error for error in records.errors}
    for line, name in enumerate(names, start=1):
        assert (line in refused) == (name is not None), (name, lines[line - 1])
        if name is not None:
            assert re.fullmatch(rf"data.jsonl, line {line} \(record {line - 1}(, id .*)?\)", refused[line].origin)
            assert re.search(kinds[name].reason, refused[line].reason), (name, refused[line].reason)

    loader = DataLoader(records, batch_size=16, num_workers=2, collate_fn=collator())
    assert sum(len(batch["labels"]) for batch in loader) == NUM_GOOD

    events = [event for event in watched() if not event[1].startswith(str(tmp_path / "events"))]
    assert {event for event, _ in events} == {"open"}
    opened = {os.path.realpath(path) for _, path in events}
    assert str(world.folder / "square.png") in opened
    # modules are read late, and workers speak to their parent through files of their own
    others = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), "/proc/", "/dev/", "/sys/")
    allowed = (str(world.folder) + os.sep, str(data), os.path.join(tempfile.gettempdir(), "pymp-"), *others)
    assert not {path for path in opened if not path.startswith(allowed)}
    # the watch does see what it looks for
    (world.outside / "decoy.png").read_bytes()
    assert ["open", str(world.outside / "decoy.png")] in watched()


@pytest.mark.parametrize("name", KINDS)
def test_load_records_names_line_and_reason(name, world, tmp_path):
    kind, rng = damages(world)[name], np.random.default_rng(1)
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\n".join(line_of(record) for record in (good_record(rng), kind.make(rng), good_record(rng))))
    options = {"collator": collator()} if kind.needs_collator else {}
    place = r"data.jsonl, line 2 \(record 1(, id '?\w+'?)?\)"
    with pytest.raises(RecordError, match=rf"(?s)1 of 3 records cannot be used:\n  {place}: .*{kind.reason}"):
        load(data, world, **options)
    assert len(load(data, world, on_error="skip", **options)) == 2


@pytest.mark.parametrize("name", IN_PIXELS)
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_damage_that_headers_hide_stops_a_worker_with_file_and_line(name, policy, world, tmp_path):
    kind, rng = damages(world)[name], np.random.default_rng(1)
    data = tmp_path / "data.jsonl"
    data.write_bytes(line_of(good_record(rng)) + b"\n" + line_of(kind.make(rng)) + b"\n")
    records = load(data, world, on_error=policy, check_images="header")
    assert len(records) == 2
    loader = DataLoader(records, batch_size=1, num_workers=1, collate_fn=collator())
    with pytest.raises(
        RecordError, match=rf"(?s)data.jsonl, line 2 \(record 1.*\): .*{kind.reason}.*check_images='pixels'"
    ):
        list(loader)


def test_damage_that_depends_on_the_model_stops_a_worker_with_file_and_line(world, tmp_path):
    kind, rng = damages(world)["images too long"], np.random.default_rng(1)
    data = tmp_path / "data.jsonl"
    data.write_bytes(line_of(kind.make(rng)))
    loader = DataLoader(load(data, world), batch_size=1, num_workers=1, collate_fn=collator())
    with pytest.raises(
        ValueError, match=r"Record 0 of the batch \(data.jsonl, line 1 \(record 0\)\): `max_length` must not cut"
    ):
        list(loader)


def test_an_image_that_is_exchanged_for_a_link_is_not_followed(world, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes((world.folder / "square.png").read_bytes())
    record = {"image": "a.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
    records = load_records([record], folder, check_images="pixels")
    assert records[0]["images"][0].size == (32, 32)
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to(world.outside / "secret.png")
    with pytest.raises(RecordError, match="record 0: .*leads out of it.*somebody changed it since"):
        records[0]
