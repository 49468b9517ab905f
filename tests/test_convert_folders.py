"""`hf_vtc.convert` from folder to folder: shards, dtypes, damage that is refused, failures that leave nothing."""

import json
from pathlib import Path

import pytest
import torch
from internvl_checkpoints import (
    IMAGE_TOKEN_ID,
    assert_same_weights,
    files_of,
    official_config,
    official_shapes,
    official_state,
    prompt,
    write_checkpoint,
)
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import hf_vtc
from hf_vtc import convert as conversion
from hf_vtc.convert import checkpoint, convert, load_official, shards


@pytest.fixture
def flash_folder(tmp_path: Path) -> Path:
    config = official_config()
    return write_checkpoint(tmp_path / "flash", config, official_state(config))


@pytest.mark.window
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_convert_equals_load_official(tmp_path, num_shards, max_shard_size):
    config = official_config()
    source = write_checkpoint(tmp_path / "src", config, official_state(config), num_shards)
    report = convert(source, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID, max_shard_size=max_shard_size)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    official = load_official(source, image_token_id=IMAGE_TOKEN_ID)
    assert_same_weights(loaded, official)
    assert (report.missing_keys, report.unused_keys, report.fresh_keys) == ([], [], [])
    assert report.num_copied == len(official_shapes(config))
    weights = list((tmp_path / "dst").glob("*.safetensors"))
    assert report.num_bytes == sum(tensor.nbytes for file in weights for tensor in load_file(file).values())
    # a shard of the source never shares a file with another one
    assert len(weights) > num_shards if max_shard_size == "20KB" else len(weights) == num_shards
    # readable by whoever may read the other files
    assert len({file.stat().st_mode for file in (tmp_path / "dst").iterdir()}) == 1
    inputs = prompt()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, official(**inputs).logits)


def test_convert_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    config = official_config()
    source = write_checkpoint(tmp_path / "src", config, official_state(config), num_shards=4)
    opened, written = [], []

    def opening(file, framework):
        opened.append(file.name)
        return safe_open(file, framework)

    def saving(tensors, file, metadata):
        written.append(sum(tensor.nbytes for tensor in tensors.values()))
        save(tensors, file, metadata=metadata)

    safe_open, save = shards.safe_open, shards.save_file
    monkeypatch.setattr(shards, "safe_open", opening)
    monkeypatch.setattr(shards, "save_file", saving)
    convert(source, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID, max_shard_size="50KB")
    # once for the headers of all shards, once for their tensors
    assert opened == 2 * sorted(set(opened)) and len(set(opened)) == 4
    largest = max(torch.Size(shape).numel() * 4 for shape in official_shapes(config).values())
    assert len(written) > 4 and max(written) <= max(50_000, largest)


def test_dtype(tmp_path, flash_folder):
    assert load_official(flash_folder, image_token_id=IMAGE_TOKEN_ID).dtype == torch.float32
    halved = load_official(flash_folder, image_token_id=IMAGE_TOKEN_ID, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}
    report = convert(flash_folder, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID, dtype="bfloat16")
    assert report.dtype == torch.bfloat16
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert_same_weights(loaded, halved)
    with pytest.raises(ValueError, match="`dtype` must be a floating dtype"):
        convert(flash_folder, tmp_path / "other", image_token_id=IMAGE_TOKEN_ID, dtype="int8")


def test_the_stored_dtype_is_kept(tmp_path):
    config = official_config()
    source = write_checkpoint(tmp_path / "src", config, official_state(config, dtype=torch.bfloat16))
    assert load_official(source, image_token_id=IMAGE_TOKEN_ID).dtype == torch.bfloat16
    assert convert(source, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID).dtype == torch.bfloat16
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_unused_tensors_are_reported(tmp_path):
    config = official_config()
    state = official_state(config) | {"language_model.model.rotary_emb.inv_freq": torch.ones(2)}
    state["vision_model.head.weight"] = torch.ones(2)
    source = write_checkpoint(tmp_path / "src", config, state)
    report = convert(source, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    assert sorted(report.unused_keys) == ["language_model.model.rotary_emb.inv_freq", "vision_model.head.weight"]
    assert "vision_model.head.weight" in report.summary()


def spoil_missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def spoil_truncated(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil_header(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"\xff" * 64)


def spoil_pointer(folder: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (folder / "model-00002-of-00003.safetensors").write_bytes(pointer)


def change_index(folder: Path, old: str, new: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(old, new))


def spoil_path_upwards(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    file.rename(folder.parent / file.name)
    change_index(folder, file.name, f"../{file.name}")


def spoil_absolute_path(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    file.rename(folder.parent / file.name)
    change_index(folder, file.name, str(folder.parent / file.name))


def spoil_index_of_other_names(folder: Path) -> None:
    change_index(folder, "mlp1.1.weight", "mlp1.1.weights")


def spoil_index_json(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {')


def spoil_lost_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def spoil_no_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def spoil_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["intermediate_size"] = 80
    (folder / "config.json").write_text(json.dumps(config))


def spoil_missing_tensor(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))


def spoil_config_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


FAILURES = [
    (spoil_missing_shard, FileNotFoundError, "lists 3 shards, of which 1 are missing: model-00002"),
    (spoil_truncated, ValueError, "truncated or corrupt.*Download it again"),
    (spoil_header, ValueError, "truncated or corrupt.*Download it again"),
    (spoil_pointer, ValueError, "Git LFS pointer"),
    (spoil_path_upwards, ValueError, r"must name files of that folder, got '\.\./model"),
    (spoil_absolute_path, ValueError, "must name files of that folder, got '/"),
    (spoil_index_of_other_names, ValueError, r"its shards do not hold: mlp1\.1\.weights"),
    (spoil_index_json, ValueError, "not valid JSON"),
    (spoil_lost_index, FileNotFoundError, r"3 \.safetensors files but no `model\.safetensors\.index\.json`"),
    (spoil_no_weights, FileNotFoundError, "has no weights"),
    (spoil_shape, ValueError, r"gate_proj\.weight \[96, 48\] gives .* the config asks for \[80, 48\]"),
    (spoil_missing_tensor, ValueError, r"lacks 11 tensors .*model\.language_model\.layers\.2\.mlp\.gate_proj\.weight"),
    (spoil_config_json, ValueError, "not valid JSON"),
    (spoil_no_config, FileNotFoundError, "has no config.json"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), FAILURES, ids=[failure[0].__name__ for failure in FAILURES])
def test_spoilt_checkpoints_are_refused_and_leave_nothing(tmp_path, spoil, error, message):
    config = official_config()
    source = write_checkpoint(tmp_path / "src", config, official_state(config), num_shards=3)
    spoil(source)
    before = files_of(tmp_path)
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "new" / "dst", image_token_id=IMAGE_TOKEN_ID)
    assert files_of(tmp_path) == before
    with pytest.raises(error, match=message):
        load_official(source, image_token_id=IMAGE_TOKEN_ID)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full")])
@pytest.mark.parametrize("place", ["ShardWriter.add", "ShardWriter.close", "write_json"])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, flash_folder, interruption, place):
    count = 0

    def interrupt(*args, **kwargs):
        nonlocal count
        count += 1
        if count == (40 if place == "ShardWriter.add" else 1):
            raise interruption
        return original(*args, **kwargs)

    if place == "write_json":
        original = checkpoint.write_json
        monkeypatch.setattr(checkpoint, "write_json", interrupt)
    else:
        original = getattr(shards.ShardWriter, place.partition(".")[2])
        monkeypatch.setattr(shards.ShardWriter, place.partition(".")[2], interrupt)
    expected = interruption if isinstance(interruption, type) else type(interruption)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    before = files_of(tmp_path)
    for destination in (tmp_path / "old", tmp_path / "new"):
        count = 0
        with pytest.raises(expected):
            convert(flash_folder, destination, image_token_id=IMAGE_TOKEN_ID, overwrite=True, max_shard_size="100KB")
        assert files_of(tmp_path) == before
        assert files_of(tmp_path / "old") == {"config.json"}


def test_an_existing_destination(tmp_path, flash_folder):
    destination = tmp_path / "dst"
    destination.mkdir()
    (destination / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="pass `overwrite=True`"):
        convert(flash_folder, destination, image_token_id=IMAGE_TOKEN_ID)
    with pytest.raises(FileExistsError, match="no model folder and is left alone"):
        convert(flash_folder, destination, image_token_id=IMAGE_TOKEN_ID, overwrite=True)
    assert files_of(destination) == {"notes.txt"}
    (destination / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds notes.txt, which is no part of a model"):
        convert(flash_folder, destination, image_token_id=IMAGE_TOKEN_ID, overwrite=True)
    (destination / "notes.txt").rename(destination / "model-00001-of-00002.safetensors")
    convert(flash_folder, destination, image_token_id=IMAGE_TOKEN_ID, overwrite=True)
    assert "model-00001-of-00002.safetensors" not in files_of(destination)
    assert files_of(tmp_path) == {"flash", "dst"}
    AutoModelForImageTextToText.from_pretrained(destination)


def test_a_source_is_not_overwritten_by_itself(flash_folder):
    before = files_of(flash_folder)
    with pytest.raises(ValueError, match="`src` and `dst` are both"):
        convert(flash_folder, flash_folder, image_token_id=IMAGE_TOKEN_ID, overwrite=True)
    assert files_of(flash_folder) == before


def test_unknown_layouts(tmp_path, flash_folder):
    source = write_checkpoint(tmp_path / "src", {"model_type": "llava", "architectures": ["X"]}, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="unknown layout: `model_type` 'llava'.*internvl_chat.*internvl"):
        load_official(source, image_token_id=1)
    convert(flash_folder, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    with pytest.raises(ValueError, match="a model of hf_vtc already"):
        load_official(tmp_path / "dst")
    with pytest.raises(ValueError, match="`method` must be one of vico"):
        load_official(flash_folder, method="avg_llava")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_official(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is no folder here, and the Hub did not deliver it"):
        load_official("nobody/nothing")


@pytest.mark.parametrize("num_shards", [1, 2])
def test_pickled_checkpoints(tmp_path, flash_folder, num_shards):
    state = load_file(flash_folder / "model.safetensors")
    names = list(state)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_text((flash_folder / "config.json").read_text())
    if num_shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        weight_map = {}
        for shard in range(num_shards):
            own = {name: state[name] for name in names[shard::num_shards]}
            torch.save(own, folder / f"part{shard}.bin")
            weight_map |= dict.fromkeys(own, f"part{shard}.bin")
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(folder, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    assert_same_weights(loaded, load_official(flash_folder, image_token_id=IMAGE_TOKEN_ID))


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("content", ["code", "truncated", "list"])
def test_unsafe_or_broken_pickles_are_refused(tmp_path, flash_folder, content):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_text((flash_folder / "config.json").read_text())
    file = folder / "pytorch_model.bin"
    torch.save([torch.ones(1)] if content == "list" else {"a": Evil(tmp_path / "ran")}, file)
    if content == "truncated":
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(
        ValueError, match="dict of tensors" if content == "list" else "cannot be read as plain tensors"
    ):
        convert(folder, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    assert files_of(tmp_path) == {"flash", "bin"}


@pytest.mark.parametrize("size", ["2 potatoes", "GB", 0, "-1MB", "big", "9" * 500 + "GB", "1e3GB", 2.5, None, [1]])
def test_shard_sizes(tmp_path, flash_folder, size):
    with pytest.raises(ValueError, match="`max_shard_size` must be"):
        convert(flash_folder, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID, max_shard_size=size)
    assert not (tmp_path / "dst").exists()


def test_the_package_offers_convert():
    assert hf_vtc.convert is conversion
