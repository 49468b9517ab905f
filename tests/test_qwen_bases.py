"""LLaVolta on Qwen3-VL and Qwen2.5-VL: positions, windows of grids and deeper rows by hand; training, LoRA."""

import copy
from functools import partial

import pytest
import torch
from contract_samples import GREEDY
from factories import (
    row_of,
    stock_inputs,
    tiny_config,
    tiny_model,
    uncompressed,
)
from peft import PeftModel, get_peft_model
from qwen_models import BASES, batch_of, model_of
from transformers import TrainingArguments

from hf_vtc.lora import compressor_modules, default_lora_config, full_precision_modules
from hf_vtc.models.grids_vtc import black_image, grid_positions
from hf_vtc.trainers import LlavoltaTrainer
from hf_vtc.trainers.schedule import Stage
from hf_vtc.trainers.sharding import with_black_tile

pytestmark = pytest.mark.window

LAYER_IDXS = (0, 1, 2, 3)


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return request.param


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
    videos = {"pixel_values_videos": batch["pixel_values"], "video_grid_thw": batch["image_grid_thw"]}
    for name, other in (("pixel_values_videos", "video_grid_thw"), ("video_grid_thw", "pixel_values_videos")):
        for call in (model, partial(model.generate, **GREEDY)):
            with pytest.raises(ValueError, match=other):
                call(**batch, **{name: videos[name]})
    tiles = tiny_model("llavolta")
    with pytest.raises(ValueError, match="of no use"):
        tiles(torch.tensor([[271] * 16]), pixel_values=torch.zeros(1, 3, 32, 32), image_grid_thw=torch.ones(1, 3))


def test_fields_without_a_meaning_are_refused(base):
    for fields, name in (
        ({"compress_layer_idx": -1}, "compress_layer_idx"),
        ({"compressor": "kmeans"}, "kmeans"),
        ({"compressor": "avgpool2d", "compress_stride": 8}, "square"),
        ({"downsample_ratio": 0.5}, "downsample_ratio"),
    ):
        with pytest.raises(ValueError, match=name):
            tiny_config(f"llavolta on {base}", **fields)


# training


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
