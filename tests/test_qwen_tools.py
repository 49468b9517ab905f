"""Tools on models of Qwen3-VL and Qwen2.5-VL: collator, budgets of prompts, estimate, bench, overlay, export, fit."""

import math

import pytest
import torch
from factories import tiny_pair, tiny_processor
from fit_samples import differing, small_request, weights_of, write_model, write_records
from PIL import Image
from qwen_models import BASES, model_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor

from hf_vtc import bench, estimate
from hf_vtc.auto import REMOTE_CODE_FROM_FOLDER
from hf_vtc.data import Conversation, VtcCollator
from hf_vtc.fit import fit
from hf_vtc.hub import export, proof
from hf_vtc.methods import record_of
from hf_vtc.methods.costs import config_dict, tower_of
from hf_vtc.methods.drawing import Kept
from hf_vtc.models.grids_vtc import black_image
from hf_vtc.plot import overlay

pytestmark = pytest.mark.window


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return request.param


def processor_of(base):
    return tiny_processor(f"llavolta on {base}")


def record(size=(40, 24)):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    return {"image": Image.new("RGB", size, "red"), "conversations": turns}


def test_collated_records_are_what_the_processor_gives(base):
    model, processor = model_of(base), processor_of(base)
    records = [record(), record((17, 50))]
    batch = VtcCollator(processor, padding_side="left")(records)
    for row, (own, labels) in enumerate(zip(records, batch["labels"])):
        chat = Conversation.from_record(own).messages
        texts = processor.apply_chat_template(chat, tokenize=False)
        alone = processor(images=[own["image"]], text=[texts], return_tensors="pt")
        real = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row, real], alone["input_ids"][0])
        assert torch.equal(batch["image_grid_thw"][row], alone["image_grid_thw"][0])
        assert processor.tokenizer.decode(labels[labels >= 0]).startswith("red")
    full = model.count_visual_tokens(**{n: v for n, v in batch.items() if n != "labels"}, vtc_budget="full")
    assert full.tolist() == [processor.reserved_tokens(24, 40), processor.reserved_tokens(50, 17)]
    model.train()(**batch).loss.backward()
    with pytest.raises(ValueError, match="200 times as long as wide"):
        VtcCollator(processor)([record((1, 201))])


def test_prompts_reserve_what_enters_at_a_budget(base):
    model, processor = model_of(base, layer_idx=0), processor_of(base)
    processor.model_config = model.config
    inputs = {"images": [record()["image"]], "text": ["<IMG_CONTEXT>?"], "return_tensors": "pt"}
    exact, whole = processor(**inputs, vtc_budget=0.5), processor(**inputs)
    # images get shorter behind the embeddings
    assert torch.equal(exact["input_ids"], whole["input_ids"])
    kept = model.count_visual_tokens(**whole, vtc_budget=0.5)
    with torch.no_grad():
        assert model(**exact, vtc_budget=0.5).num_visual_tokens.tolist() == kept.tolist()
    with pytest.raises(ValueError, match="smallest admissible"):
        processor(**inputs, vtc_budget=1)


def test_estimate_counts_what_the_tower_does(base):
    model, images = model_of(base), processor_of(base).image_processor
    tower = tower_of(config_dict(model), (40, 56))
    pixels = black_image(model.config)["pixel_values"]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.model.vision_tower(pixels.new_zeros(140, pixels.shape[1]), grid_thw=torch.tensor([[1, 10, 14]]))
    assert counter.get_total_flops() == tower.flops() + tower.connector_flops(tower.num_patches)
    found = estimate(model, image_size=(40, 56), vtc_budget=0.5, image_processor=images)
    assert (found.num_tiles, found.num_reserved) == (1, math.prod(images.get_tile_layout(40, 56).token_grid))
    seen = images.get_tile_layout(40, 56).resized_size
    assert found.tower_flops == tower_of(config_dict(model), seen).flops()
    # the limits of published checkpoints
    assert estimate(model, image_size=(80, 80)).num_reserved == {"qwen3_vl": 1024, "qwen2_5_vl": 100}[base]
    with pytest.raises(ValueError, match="num_tiles"):
        estimate(model, num_tiles=2)


def test_bench_and_overlay_reach(base):
    model, processor = model_of(base), processor_of(base)
    picture = record()["image"]
    inputs = processor(images=[picture, picture], text=["<IMG_CONTEXT>a<IMG_CONTEXT>?"], return_tensors="pt")
    report = bench(model, inputs, vtc_budget=0.5, repeats=1, warmup=0)
    assert report.num_tiles == 2 and report.num_kept == model.count_visual_tokens(**inputs, vtc_budget=0.5).tolist()
    for compressor in ("avgpool1d", "avgpool2d", "uniform"):
        model = model_of(base, compressor=compressor)
        with torch.no_grad():
            output = model(**inputs)
        drawing = record_of(model.config).draw(
            Kept(processor.image_processor.get_tile_layout(24, 40), output, model.config, 1, None, None)
        )
        cells = drawing.tiles[0].cells
        assert cells.shape == (3, 5) and len(set(cells[cells >= 0])) == int(output.num_visual_tokens[1])
        assert overlay(picture, output, config=model.config, processor=processor, image_idx=1).width > 24


@pytest.mark.skipif(not REMOTE_CODE_FROM_FOLDER, reason="remote code from a local folder needs transformers >= 5.11")
def test_exported_folders_compute_the_same_without_the_package(base, tmp_path):
    """Model and processor, in a process that has no hf_vtc: the proof is that of `export`."""
    folder = export(*tiny_pair(f"llavolta on {base}"), tmp_path / "folder")
    assert "video_grid_thw" in proof._probe(str(folder), trust_remote_code=False)
    assert "image_grid_thw" in AutoProcessor.from_pretrained(folder).image_processor.model_input_names
    assert "visual tokens" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_fit_with_lora_is_measured(tmp_path):
    data = write_records(tmp_path / "data")
    start = write_model("llavolta on qwen3_vl", tmp_path / "start")
    request = small_request(start, data, tmp_path / "out", "llavolta", lora=True, budgets=("full", 0.5))
    measured = fit(request)
    moved = differing(weights_of(start), weights_of(tmp_path / "out"))
    assert any("language_model" in name for name in moved) and any("merger" in name for name in moved)
    assert all("language_model" in name or "merger" in name or "lm_head" in name for name in moved)
    tokens = {row["point"]: row["tokens"] for row in measured.after["rows"]}
    assert tokens["0.5"] < tokens["full"]
