"""Tools on models of LLaVA-OneVision: collator, budgets of prompts, estimate, bench, overlay, export, LoRA, fit."""

import copy
import json

import pytest
import torch
from contract_samples import GREEDY, batch_of
from factories import row_of, tiny_model, tiny_processor
from fit_samples import differing, small_request, weights_of, write_model, write_records
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor

from hf_vtc import bench, estimate
from hf_vtc.auto import REMOTE_CODE_FROM_FOLDER
from hf_vtc.data import Conversation, VtcCollator
from hf_vtc.evaluation.points import levels_of
from hf_vtc.evaluation.questions import Question
from hf_vtc.fit import fit
from hf_vtc.hub import export
from hf_vtc.lora import default_lora_config
from hf_vtc.methods import record_of
from hf_vtc.methods.drawing import Kept, token_map
from hf_vtc.plot import overlay

pytestmark = pytest.mark.window

METHODS = ("llavolta", "avg_llava", "cdpruner")
# scaled down to two tiles, of three and of two
LARGE, SMALL = (75, 80), (20, 30)


@pytest.fixture(scope="module", params=METHODS)
def pair(request):
    name = f"{request.param} on llava_onevision"
    model, processor = tiny_model(name), tiny_processor(name)
    processor.model_config = model.config
    return model, processor


def picture(size):
    return Image.effect_noise(size[::-1], 60).convert("RGB")


def record(*sizes):
    turns = [{"from": "human", "value": "<image>" * len(sizes) + "\nwhat?"}, {"from": "gpt", "value": "red"}]
    return {"images": [picture(size) for size in sizes], "conversations": turns}


def test_collated_records_are_what_the_processor_gives(pair):
    model, processor = pair
    records = [record(LARGE), record(SMALL, LARGE), record(SMALL)]
    collator = VtcCollator(processor, padding_side="left")
    batch = collator(records)
    chats = [Conversation.from_record(own).messages for own in records]
    texts = [processor.apply_chat_template(chat, tokenize=False) for chat in chats]
    expected = processor(images=[own["images"] for own in records], text=texts, return_tensors="pt")
    for name in ("input_ids", "num_tiles", "image_sizes", "pixel_values"):
        assert torch.equal(batch[name], expected[name]), name
    assert batch["num_tiles"].tolist()[1:3] == [1, 1] and batch["num_tiles"][0] > 1
    for chat, own in zip(chats, records):
        # sizes alone reserve as many, which `max_length` is held against
        collator.check(chat, [image.size[::-1] for image in own["images"]])
    model.train()(**batch).loss.backward()
    model.zero_grad()
    model.eval()


def test_prompts_reserve_what_enters_at_a_budget(pair):
    model, processor = pair
    rows = [[picture(LARGE)], [picture(SMALL), picture(LARGE)]]
    arguments = {"images": rows, "text": ["<IMG_CONTEXT>?", "<IMG_CONTEXT><IMG_CONTEXT>!"], "return_tensors": "pt"}
    whole, exact = processor(**arguments), processor(**arguments, vtc_budget=0.6)
    kept = model.count_visual_tokens(**whole, vtc_budget=0.6)
    with torch.no_grad():
        assert torch.equal(model(**exact, vtc_budget=0.6).num_visual_tokens, kept)
    written = int((exact["input_ids"] == processor.image_token_id).sum())
    # of LLaVolta images get shorter behind the embeddings
    entering = model.count_visual_tokens(**whole, vtc_budget="full" if "llavolta" in model.config.model_type else 0.6)
    assert written == int(entering.sum())
    # rows of questions are cut as prompts are
    fields = {"key": "", "origin": "", "record_idx": 0, "messages": [], "references": (), "choices": ()}
    fields |= {"kind": "", "metric": None, "image": ""}
    questions = [
        Question(**fields, num_images=len(row), image_sizes=tuple(each.size[::-1] for each in row)) for row in rows
    ]
    full = model.count_visual_tokens(**whole, vtc_budget="full").tolist()
    assert [counts[0] for counts in levels_of(processor, model.config, questions)] == full


def test_estimate_cuts_as_the_processor_does(pair):
    model, processor = pair
    found = estimate(model, image_size=LARGE, vtc_budget=0.6)
    inputs = processor(images=[picture(LARGE)], text=["<IMG_CONTEXT>?"], return_tensors="pt")
    assert (found.num_tiles, found.num_reserved) == (
        int(inputs["num_tiles"]),
        int(model.count_visual_tokens(**inputs, vtc_budget="full")),
    )
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.model.encode(inputs["pixel_values"])
    assert counter.get_total_flops() == found.tower_flops


def test_bench_and_overlay_reach(pair):
    model, processor = pair
    rows = [[picture(SMALL), picture(LARGE)]]
    inputs = processor(images=rows, text=["<IMG_CONTEXT>a<IMG_CONTEXT>?"], return_tensors="pt")
    report = bench(model, inputs, vtc_budget=0.6, repeats=1, warmup=0)
    assert report.num_kept == model.count_visual_tokens(**inputs, vtc_budget=0.6).tolist()
    if "cdpruner" not in model.config.model_type:
        with torch.no_grad():
            output = model(**inputs, vtc_budget=0.6)
        arguments = {"config": model.config, "processor": processor, "image_idx": 1}
        assert overlay(rows[0][1], output, num_tiles=inputs["num_tiles"], **arguments).width > 24
        with pytest.raises(ValueError, match="`num_tiles` must be given"):
            overlay(rows[0][1], output, **arguments)
    inputs = processor(images=rows[0][1], text="<IMG_CONTEXT>?", return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, vtc_budget=0.6)
    assert overlay(rows[0][1], output, config=model.config, processor=processor).width > 24
    layout = processor.image_processor.get_tile_layout(*LARGE)
    drawing = record_of(model.config).draw(Kept(layout, output, model.config, 0, None, None))
    drawn = {int(cell) for tile in drawing.tiles for cell in tile.cells.flatten() if cell >= 0}
    # newlines have no place
    assert len(drawn) <= int(output.num_visual_tokens)


def test_every_cell_of_a_scaled_map_has_its_nearest_token():
    _, processor = tiny_model("llavolta on llava_onevision"), tiny_processor("llavolta on llava_onevision")
    layout = processor.image_processor.get_tile_layout(54, 54)
    # a map of 6 x 6 cells, of which 2 tiles have room for 4 x 4
    places = token_map(layout, (3, 3), "true_aspect")
    assert len(places.order) == processor.reserved_tokens(54, 54) == 9 + 4 * 5
    cells = places.cells_of(places.order, torch.arange(len(places.order)))
    whole = [
        [int(cells[1 + row // 3 * 2 + column // 3][row % 3, column % 3]) - 9 for column in range(6)]
        for row in range(6)
    ]
    # by middles, of which some lie between two tokens; tokens of a row are five apart
    parts = [0, 1, 1, 2, 3, 3]
    assert whole == [[5 * row + column for column in parts] for row in parts]


def test_generate_with_one_batch_size_then_train_with_another(pair):
    model = copy.deepcopy(pair[0])
    batch = batch_of(model, 6, images_per_row=[1, 1, 2, 0])
    model.generate(**batch, **GREEDY)
    row = row_of(batch, 2)
    labels = row["input_ids"].masked_fill(row["input_ids"] == model.config.image_token_id, -100)
    fresh = copy.deepcopy(model)
    losses = []
    for each in (model, fresh):
        torch.manual_seed(0)
        # at a budget CDPruner may drop every newline
        losses.append(each.train()(**row, labels=labels, vtc_budget="full").loss)
    assert torch.equal(*losses)
    losses[0].backward()
    assert model.model.image_newline.grad.abs().sum() > 0
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_a_step_with_lora_moves_decoder_and_compressor(pair):
    from peft import get_peft_model

    model = pair[0]
    adapted = get_peft_model(copy.deepcopy(model), default_lora_config(model, r=2)).train()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    batch = batch_of(model, 10, images_per_row=[1, 2])
    optimizer = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], lr=0.5)
    for _ in range(2):
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved) and any("language_model" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)


@pytest.mark.skipif(not REMOTE_CODE_FROM_FOLDER, reason="remote code from a local folder needs transformers >= 5.11")
def test_exported_folders_compute_the_same_without_the_package(pair, tmp_path):
    """Model and processor, in a process that has no hf_vtc: the proof is that of `export`."""
    folder = export(*pair, tmp_path / "folder")
    assert json.loads((folder / "config.json").read_text())["max_map_tiles"] == 2
    assert AutoProcessor.from_pretrained(folder).image_processor.max_map_tiles == 2


def test_a_fit_with_lora_is_measured(tmp_path):
    data = write_records(tmp_path / "data")
    start = write_model("llavolta on llava_onevision", tmp_path / "start")
    request = small_request(start, data, tmp_path / "out", "llavolta", lora=True, budgets=("full", 0.5))
    measured = fit(request)
    moved = differing(weights_of(start), weights_of(tmp_path / "out"))
    assert any("language_model" in name for name in moved) and any("projector" in name for name in moved)
    tokens = {row["point"]: row["tokens"] for row in measured.after["rows"]}
    assert tokens["0.5"] < tokens["full"]
