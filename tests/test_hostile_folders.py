"""200 and more folders of strangers: converted, loaded and exported, or refused by a sentence; no more happens."""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import factories
import pytest
import torch
from hostile_folders import NUMBER, SECRET, SEED, Hostile, hostile_folders
from internvl_checkpoints import official_config, official_state, write_checkpoint
from llava_checkpoints import stock_model, write_official

from hf_vtc import hub
from hf_vtc.convert import convert, load_official

pytestmark = pytest.mark.window

# far more than the slowest of them needs
SECONDS = 60
# what speaks to users; all else is a mistake of ours
REFUSALS = (ValueError, OSError, ImportError)


class TooLong(BaseException):
    """No refusal, whatever catches errors on the way."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, object]:
    """Every entry below a folder, with the content of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    """A sound folder of each kind: official ones to convert, one of a model of hf_vtc to export."""
    parent = tmp_path_factory.mktemp("sound")
    torch.manual_seed(0)
    tokenizer = factories.tiny_tokenizer()
    config = official_config(text={"vocab_size": len(tokenizer)})
    internvl = write_checkpoint(parent / "internvl", config, official_state(config))
    base = stock_model()
    base.resize_token_embeddings(len(tokenizer))
    llava = write_official(parent / "llava", base, vocab_size=len(tokenizer))
    for folder in (internvl, llava):
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.5}')
        (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "size": {"height": 32}}')
    ours = hub.export(factories.tiny_model("vico"), factories.tiny_processor("vico"), parent / "vico", check=False)
    return {"internvl": internvl, "llava": llava, "vico": ours}


def convert_it(folder: Path, target: Path, method: str | None) -> None:
    convert(folder, target, method)
    load_official(folder, method)


USES = {
    "internvl": lambda folder, target: convert_it(folder, target, None),
    "llava": lambda folder, target: convert_it(folder, target, "llavolta"),
    "vico": lambda folder, target: hub.export(folder, target, check=False),
}


@pytest.mark.parametrize("hostile", list(hostile_folders()), ids=lambda hostile: hostile.name)
def test_a_hostile_folder_is_used_or_refused(sound, tmp_path, hostile: Hostile):
    kind = tuple(sound)[int(hostile.name.split("_")[0]) // 9 % len(sound)]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text(SECRET)
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    (tmp_path / "a" / "outside").symlink_to(outside / "secret")
    folder = hostile.write(inside / "checkpoint", sound[kind])
    target = tmp_path / "target"
    before = contents(outside), contents(folder)
    try:
        with time_limit(SECONDS):
            USES[kind](folder, target)
    except REFUSALS as error:
        assert str(error) and not isinstance(error, UnicodeError), error
        assert not target.exists() or (target / "config.json").is_file()
    # nothing is left beside the results, nothing is changed, nothing has run, nothing was carried over
    assert {path.name for path in tmp_path.iterdir()} <= {"outside", "a", "target"}
    assert {path.name for path in inside.iterdir()} == {"checkpoint"}
    assert before == (contents(outside), contents(folder))
    if target.exists():
        assert not [name for name, content in contents(target).items() if SECRET.encode() in (content or b"")]
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_the_folders_are_the_same_every_time(sound, tmp_path):
    assert len(list(hostile_folders())) == NUMBER >= 200
    for number, hostile in enumerate(hostile_folders(SEED, 9)):
        if "_pickle" in hostile.name:
            continue
        first, second = (hostile.write(tmp_path / f"{number}{turn}", sound["internvl"]) for turn in "ab")
        assert contents(first) == contents(second), hostile.name
