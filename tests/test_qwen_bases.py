"""Qwen3-VL and Qwen2.5-VL as bases: positions, windows of grids, deeper rows; conversion, processor, LoRA, tools."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from contract_samples import GREEDY
from factories import (
    METHODS,
    TINY,
    random_batch,
    row_of,
    stock_inputs,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
    uncompressed,
)
from llava_checkpoints import stock_model
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    TrainingArguments,
)

from hf_vtc import bench, estimate
from hf_vtc.auto import REMOTE_CODE_FROM_FOLDER
from hf_vtc.convert import convert, from_base
from hf_vtc.convert.refused import REFUSED_BASES
from hf_vtc.data import VtcCollator
from hf_vtc.hub import export
from hf_vtc.lora import compressor_modules, default_lora_config, full_precision_modules
from hf_vtc.methods import RECORDS, record_named
from hf_vtc.models.grids_vtc import black_image, grid_positions
from hf_vtc.models.host_vtc import GRID_BASES
from hf_vtc.plot import overlay
from hf_vtc.trainers import LlavoltaTrainer
from hf_vtc.trainers.schedule import Stage
from hf_vtc.trainers.sharding import with_black_tile

pytestmark = pytest.mark.window

LAYER_IDXS = (0, 1, 2, 3)
NUM_LAYERS = 3
BASES = tuple(GRID_BASES)


def refused_by(method):
    return record_named(method).config.refused_bases


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return request.param


def model_of(base, layer_idx=1, compressor="avgpool1d", stride=4):
    name = f"llavolta on {base}"
    return tiny_model(name, compress_layer_idx=layer_idx, compressor=compressor, compress_stride=stride)


def batch_of(model, seed, **kwargs):
    return random_batch(model.config, torch.Generator().manual_seed(seed), **kwargs)


# positions


def test_positions_by_hand():
    """Two images of 2 x 3 and 3 x 1 tokens, the second at the very end, and padding on both sides."""
    v, _ = True, False
    placeholders = torch.tensor([[_, _, v, v, v, v, v, v, _, _, v, v, v]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    positions = grid_positions(placeholders, mask, torch.tensor([[2, 3], [3, 1]]))[:, 0].tolist()
    # text at 0, the image from 1 on, its longer side is 3; text at 4 and 5, the other image from 6 on
    assert positions == [
        [0, 0, 1, 1, 1, 1, 1, 1, 4, 5, 6, 6, 6],
        [0, 0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7, 8],
        [0, 0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 6, 6],
    ]


@pytest.mark.parametrize("padding_side", ("left", "right"))
def test_positions_are_those_of_the_stock_model(base, padding_side):
    model = model_of(base)
    batch = batch_of(model, 1, images_per_row=[2, 0, 1], padding_side=padding_side)
    stock = uncompressed(model)
    types = {name: each for name, each in stock_inputs(stock, batch).items() if name == "mm_token_type_ids"}
    expected, _ = stock.model.get_rope_index(
        batch["input_ids"], image_grid_thw=batch["image_grid_thw"], attention_mask=batch["attention_mask"], **types
    )
    placeholders = batch["input_ids"] == model.config.image_token_id
    grids = batch["image_grid_thw"][:, 1:] // model.config.vision_config.spatial_merge_size
    positions, real = grid_positions(placeholders, batch["attention_mask"], grids), batch["attention_mask"].bool()
    assert torch.equal(positions[:, real], expected[:, real])


# images that get shorter, by hand


def windows_by_hand(grid, compressor, stride):
    """Members of each window of a grid (rows, columns), cut at its edges."""
    rows, columns = grid
    high, wide = (1, stride) if compressor == "avgpool1d" else (round(stride**0.5),) * 2
    return [
        [
            row * columns + column
            for row in range(top, min(top + high, rows))
            for column in range(left, min(left + wide, columns))
        ]
        for top in range(0, rows, high)
        for left in range(0, columns, wide)
    ]


def groups_by_hand(model, row):
    """Columns of a row of one prompt that become one each."""
    merge, groups = model.config.vision_config.spatial_merge_size, []
    grids = (row["image_grid_thw"][:, 1:] // merge).tolist() if "image_grid_thw" in row else []
    column, ids = 0, row["input_ids"][0].tolist()
    while column < len(ids):
        if ids[column] != model.config.image_token_id:
            groups.append([column])
            column += 1
            continue
        grid = grids.pop(0)
        own = windows_by_hand(grid, model.config.compressor, model.config.compress_stride)
        groups += [[column + member for member in members] for members in own]
        column += grid[0] * grid[1]
    return groups


@torch.no_grad()
def logits_by_hand(model, row):
    """Logits `(K, V)` of a row without padding: layer by layer, pooled before one of them, rows added behind."""
    own, merge = model.model, model.config.vision_config.spatial_merge_size
    placeholders = row["input_ids"] == model.config.image_token_id
    states = own.get_input_embeddings()(row["input_ids"])
    rows = torch.zeros(0, *states.shape)
    grids = torch.zeros(0, 2, dtype=torch.long)
    if "image_grid_thw" in row:
        features = uncompressed(model).model.get_image_features(row["pixel_values"], row["image_grid_thw"])
        features = (
            features if isinstance(features, tuple) else (features.pooler_output, features.get("deepstack_features"))
        )
        tokens, deeper = features if isinstance(features[0], tuple) else (features, None)
        states[placeholders] = torch.cat(tokens)
        deeper = [torch.cat(each) if isinstance(each, tuple) else each for each in deeper or ()]
        rows = torch.zeros(len(deeper), *states.shape)
        for each, values in zip(rows, deeper):
            each[placeholders] = values
        grids = row["image_grid_thw"][:, 1:] // merge
    positions = grid_positions(placeholders, torch.ones_like(row["input_ids"]), grids)
    decoder = own.language_model
    for idx, layer in enumerate(decoder.layers):
        if idx == model.config.compress_layer_idx:
            groups = groups_by_hand(model, row)
            states = torch.stack([states[:, members].mean(1) for members in groups], dim=1)
            rows = torch.stack([rows[:, :, members].mean(2) for members in groups], dim=2)
            positions = torch.stack([positions[..., members].sum(-1) // len(members) for members in groups], dim=-1)
        rotary = decoder.rotary_emb(states, positions)
        states = layer(states, attention_mask=None, position_embeddings=rotary)
        states = states[0] if isinstance(states, tuple) else states
        if idx < len(rows):
            states = states + rows[idx]
    return model.lm_head(decoder.norm(states))[0]


@pytest.mark.parametrize("compressor", ("avgpool1d", "avgpool2d"))
@pytest.mark.parametrize("layer_idx", LAYER_IDXS)
def test_shortened_rows_equal_a_row_by_hand(base, layer_idx, compressor):
    model = model_of(base, layer_idx, compressor)
    for seed, side in ((2, "left"), (3, "right")):
        batch = batch_of(model, seed, images_per_row=[2, 0, 1], padding_side=side)
        with torch.no_grad():
            out = model(**batch)
        for row in range(3):
            expected = logits_by_hand(model, row_of(batch, row))
            torch.testing.assert_close(out.logits[row, out.kept_mask[row]], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("layer_idx", LAYER_IDXS[:-1])
def test_generate_continues_rows_by_hand(base, layer_idx):
    model = model_of(base, layer_idx, "avgpool2d")
    batch = batch_of(model, 4, images_per_row=[1, 0, 2])
    out = model.generate(**batch, **GREEDY)
    uncached = model.generate(**batch, **GREEDY, use_cache=False)
    assert torch.equal(out, uncached)
    for row in range(3):
        inputs = row_of(batch, row)
        for token in out[row, batch["input_ids"].shape[1] :].tolist():
            assert token == int(logits_by_hand(model, inputs)[-1].argmax())
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize("compressor", ("uniform", "random"))
def test_other_compressors_keep_coordinates(base, compressor):
    model = model_of(base, 1, compressor, stride=2)
    batch = batch_of(model, 5, images_per_row=[1, 2])
    with torch.no_grad():
        out = model(**batch)
    full = model.count_visual_tokens(**batch, vtc_budget="full")
    assert out.num_visual_tokens.tolist() == (full // 2).tolist()
    row = row_of(batch, 0)
    with torch.no_grad():
        alone = model(**row)
    # the draw of "random" follows from the layout
    torch.testing.assert_close(out.logits[0, out.kept_mask[0]], alone.logits[0, alone.kept_mask[0]], rtol=0, atol=1e-4)


def test_a_stride_beyond_an_image_leaves_one_token_of_each_row_or_image(base):
    for compressor, stride, left in (("avgpool1d", 50, 3), ("avgpool2d", 64, 1)):
        model = model_of(base, 1, compressor, stride)
        grid = torch.tensor([[1, 6, 8]])
        pixels = torch.zeros(48, black_image(model.config)["pixel_values"].shape[1])
        ids = torch.tensor([[5, 300] + [model.config.image_token_id] * 12 + [6]])
        inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid}
        assert model.count_visual_tokens(**inputs).tolist() == [left]
        with torch.no_grad():
            assert model(**inputs).num_visual_tokens.tolist() == [left]


def test_generate_with_one_batch_size_then_train_with_another(base):
    model = model_of(base)
    batch = batch_of(model, 6, images_per_row=[1, 1, 2, 0])
    model.generate(**batch, **GREEDY)
    row = row_of(batch, 2)
    labels = row["input_ids"].masked_fill(row["input_ids"] == model.config.image_token_id, -100)
    fresh = copy.deepcopy(model).train()
    loss = model.train()(**row, labels=labels).loss
    assert torch.equal(loss, fresh(**row, labels=labels).loss)
    loss.backward()
    names = ["merger"] + ["deepstack_merger_list.0"] * (base == "qwen3_vl")
    for name in names:
        part = model.model.vision_tower.get_submodule(name)
        assert all(parameter.grad.abs().sum() > 0 for parameter in part.parameters() if parameter.ndim > 1)


# what is refused


def test_wrong_grids_are_refused(base):
    model = model_of(base)
    batch = dict(row_of(batch_of(model, 7, images_per_row=[1]), 0))
    with pytest.raises(ValueError, match="image_grid_thw"):
        model(**{name: value for name, value in batch.items() if name != "image_grid_thw"})
    with pytest.raises(ValueError, match="row for each patch"):
        model(**batch | {"pixel_values": batch["pixel_values"][:-1]})
    with pytest.raises(ValueError, match="videos are not supported"):
        model(**batch | {"image_grid_thw": batch["image_grid_thw"] * torch.tensor([2, 1, 1])})
    with pytest.raises(ValueError, match="num_tiles"):
        model(**batch, num_tiles=torch.tensor([1]))
    for name in ("pixel_values_videos", "video_grid_thw"):
        with pytest.raises(TypeError, match=name):
            model(**batch, **{name: batch["pixel_values"]})
    tiles = tiny_model("llavolta")
    with pytest.raises(ValueError, match="of no use"):
        tiles(torch.tensor([[271] * 16]), pixel_values=torch.zeros(1, 3, 32, 32), image_grid_thw=torch.ones(1, 3))


@pytest.mark.parametrize("method", [record.name for record in RECORDS.values() if record.config.refused_bases])
def test_methods_that_do_not_fit_are_refused_by_name(base, method, tmp_path):
    fields = TINY[f"llavolta on {base}"].config
    parts = {name: fields[name] for name in ("vision_config", "text_config")}
    if method != "convllava":
        with pytest.raises(ValueError, match=f"vtc_{method} does not fit {base}"):
            record_named(method).config(**parts)
    with pytest.raises(ValueError, match=f"{method} does not fit {base}"):
        from_base(uncompressed(model_of(base)), method)


def test_fields_without_a_meaning_are_refused(base):
    for fields, name in (
        ({"compress_layer_idx": -1}, "compress_layer_idx"),
        ({"compressor": "kmeans"}, "kmeans"),
        ({"compressor": "avgpool2d", "compress_stride": 8}, "square"),
        ({"downsample_ratio": 0.5}, "downsample_ratio"),
    ):
        with pytest.raises(ValueError, match=name):
            tiny_config(f"llavolta on {base}", **fields)


# checkpoints


def stock_folder(base, folder):
    stock = uncompressed(model_of(base))
    stock.generation_config = GenerationConfig(pad_token_id=0)
    stock.save_pretrained(folder)
    return stock


def with_older_names(folder):
    """The names that files of Qwen2.5-VL on the Hub have, and its decoder's fields beside the others."""
    weights = load_file(folder / "model.safetensors")
    names = {
        name: name.replace("model.visual.", "visual.").replace("model.language_model.", "model.") for name in weights
    }
    save_file(
        {names[name]: tensor for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def test_from_base_equals_the_stock_model_bit_for_bit(base, tmp_path):
    stock = stock_folder(base, tmp_path / "hf")
    fields = {"compress_layer_idx": 1, "compress_stride": 4}
    report = convert(tmp_path / "hf", tmp_path / "dst", "llavolta", **fields)
    assert not report.fresh_keys and not report.unused_keys and not report.missing_keys
    sources = [stock, tmp_path / "hf"]
    models = [from_base(source, "llavolta", **fields) for source in sources]
    models.append(AutoModelForImageTextToText.from_pretrained(tmp_path / "dst"))
    with_older_names(tmp_path / "hf")
    models.append(from_base(tmp_path / "hf", "llavolta", **fields))
    for model in models:
        assert (model.config.model_type, model.config.grid_base) == ("vtc_llavolta", base)
        batch = batch_of(model, 8, images_per_row=[2, 1], padding_side="left")
        with torch.no_grad():
            expected = stock(**stock_inputs(stock, batch)).logits
            assert torch.equal(model(**batch, vtc_budget="full").logits, expected)
            assert torch.equal(model(**batch).logits, models[0](**batch).logits)


@pytest.mark.skipif(not REMOTE_CODE_FROM_FOLDER, reason="remote code from a local folder needs transformers >= 5.11")
def test_remote_code_gives_the_same_logits(base, tmp_path, run_python):
    model = model_of(base)
    model.save_pretrained(tmp_path / "model")
    batch = dict(batch_of(model, 9, images_per_row=[1, 2]))
    with torch.no_grad():
        torch.save({"batch": batch, "logits": model(**batch).logits}, tmp_path / "expected.pt")
    script = """
import sys, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
saved = torch.load(sys.argv[2])
with torch.no_grad():
    print(torch.equal(model(**saved["batch"]).logits, saved["logits"]), type(model).__module__.split(".")[0])
"""
    assert run_python(script, tmp_path / "model", tmp_path / "expected.pt").split() == ["True", "transformers_modules"]


def test_lora_trains_decoder_and_mergers_and_loads_again(base, tmp_path):
    model = model_of(base)
    mergers = ["merger", *["deepstack_merger_list.0", "deepstack_merger_list.1"] * (base == "qwen3_vl")]
    assert compressor_modules(model.config) == [f"model.vision_tower.{name}" for name in mergers]
    assert set(compressor_modules(model.config)) < {*full_precision_modules(model.config)}
    adapted = get_peft_model(copy.deepcopy(model), default_lora_config(model, r=2)).train()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    batch = batch_of(model, 10, images_per_row=[1, 1])
    optimizer = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], lr=0.5)
    for _ in range(2):
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    assert any("merger" in name for name in moved) and any("language_model" in name for name in moved)
    assert not any("lora_" in name and "vision_tower" in name for name in moved)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, adapted.eval()(**batch).logits, rtol=0, atol=0)


def qwen_tokenizer():
    """The tiny tokenizer, whose placeholder is spelt as Qwen spells it."""
    backend = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str().replace("<IMG_CONTEXT>", "<|image_pad|>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>")


@pytest.mark.parametrize("named", (False, True))
def test_the_processor_of_the_base_is_kept(base, tmp_path, named):
    stock = stock_folder(base, tmp_path / "hf")
    qwen_tokenizer().save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        convert(tmp_path / "hf", tmp_path / "dst", "llavolta")
    vision = stock.config.vision_config
    images = Qwen2VLImageProcessor(patch_size=vision.patch_size, merge_size=2, min_pixels=64, max_pixels=4096)
    images.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    wanted = {"qwen3_vl": "Qwen3VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}[base]
    if named:
        file.write_text(json.dumps(settings | {"processor_class": "SomeProcessor"}))
    convert(tmp_path / "hf", tmp_path / "dst", "llavolta")
    kept = json.loads((tmp_path / "dst" / "preprocessor_config.json").read_text())
    assert kept == settings | {"processor_class": "SomeProcessor" if named else wanted}

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    inputs = AutoImageProcessor.from_pretrained(tmp_path / "dst")(
        [Image.new("RGB", (40, 24), "red"), Image.new("RGB", (17, 50))], return_tensors="pt"
    )
    counts = (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dst")
    ids = tokenizer("x".join("<|image_pad|>" * count for count in counts) + "x", return_tensors="pt")["input_ids"]
    assert model.count_visual_tokens(ids, **inputs, vtc_budget="full").tolist() == counts
    assert model.generate(ids, **inputs, **GREEDY).shape[1] == ids.shape[1] + GREEDY["max_new_tokens"]

    file.write_text(json.dumps(settings | {"auto_map": {"AutoImageProcessor": "x.Y"}}))
    with pytest.raises(ValueError, match="auto_map"):
        convert(tmp_path / "hf", tmp_path / "other", "llavolta")


# tools


def test_the_trainer_takes_ready_batches_and_trains_the_mergers(base, tmp_path):
    model = model_of(base)
    samples = []
    for seed in range(4):
        row = dict(row_of(batch_of(model, 20 + seed, images_per_row=[1]), 0))
        samples.append(row | {"labels": row["input_ids"].clone()})
    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = LlavoltaTrainer(
        model,
        arguments,
        stages=[Stage(1, 4, 0.5), Stage(3, 1, 0.5)],
        train_dataset=samples,
        data_collator=lambda batch: batch[0],
    )
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    in_tower = {name for name in moved if "vision_tower" in name}
    assert in_tower and all("merger" in name for name in in_tower) and any("language_model" in name for name in moved)


def test_black_images_reach_every_part(base):
    model = model_of(base).train()
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    inputs = with_black_tile(model, text)
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, model(**text).loss, rtol=1e-6, atol=1e-6)


def test_tools_that_do_not_reach_refuse_by_name(base, tmp_path):
    model = model_of(base)
    batch = batch_of(model, 30, images_per_row=[1])
    with pytest.raises(ValueError, match=f"tower of {base}"):
        estimate(model, image_size=(24, 24), vtc_budget=0.5)
    with pytest.raises(ValueError, match=f"tower of {base}"):
        bench(model, dict(batch), vtc_budget=0.5)
    with pytest.raises(ValueError, match=f"overlay.*{base}"):
        overlay(Image.new("RGB", (24, 24)), model(**batch), config=model.config)
    with pytest.raises(ValueError, match=f"hub.*{base}"):
        export(model, tiny_processor(), tmp_path / "folder")

    class Stock:
        image_processor = Qwen2VLImageProcessor()

    with pytest.raises(ValueError, match="`processor` must be a `VtcProcessor`, got Stock"):
        VtcCollator(Stock())


def test_a_base_that_the_host_lacks_is_refused_with_the_version_it_needs(base, monkeypatch):
    from hf_vtc.convert import qwen_hf

    stock = uncompressed(model_of(base))
    monkeypatch.setattr(qwen_hf, "CONFIG_MAPPING", {})
    with pytest.raises(ImportError, match=f"{base} needs transformers >= {re.escape(GRID_BASES[base])}"):
        from_base(stock, "llavolta")


@pytest.mark.parametrize("model_type", sorted(REFUSED_BASES))
def test_other_bases_are_refused_by_name(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=f"'{model_type}', which no method fits yet: "):
        from_base(tmp_path, "llavolta")


TILED = ("internvl", "llava", "llava_next")
CASES = [(kind, name) for kind in TILED for name in ("vico", "vistog", "convllava") if kind in refused_by(name)]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_bases_of_tiles_are_refused_with_the_reason(kind, method, tmp_path):
    stock = uncompressed(tiny_model("vico")) if kind == "internvl" else stock_model(kind)
    with pytest.raises(ValueError, match=f"{method} does not fit {kind}: {re.escape(refused_by(method)[kind])}"):
        from_base(stock, method)


def test_the_table_of_bases_has_no_blank():
    table = (Path(__file__).parents[1] / "docs" / "bases.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 12
    for name, *cells in rows:
        assert len(cells) == len(METHODS), name
        assert all(cell.strip().startswith(("proven", "refused: ")) for cell in cells), name
