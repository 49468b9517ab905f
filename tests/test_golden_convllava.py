"""Parity with the original ConvLLaVA code on a tiny checkpoint, in both published layouts."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from factories import tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_vtc.convert import convert, load_official
from hf_vtc.models.image_processing_vtc import VtcImageProcessor

# the full data, of which the repository holds a selection, can be named instead
FOLDER = Path(os.environ.get("HF_VTC_GOLDEN_CONVLLAVA", Path(__file__).parent / "golden" / "convllava"))
GOLDEN = json.loads((FOLDER / "golden.json").read_text())
TENSORS = load_file(FOLDER / "golden.safetensors")
# positions of the selection
STRIDE = GOLDEN.get("position_stride", 1)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SENTINEL = -200

CASES = sorted({name.partition(".")[0] for name in TENSORS if name.endswith(".input_ids")})
WITH_PIXELS = [case for case in CASES if f"{case}.pixel_values" in TENSORS]
# pixels of the photograph; the selection holds their digests
DIGESTS = GOLDEN.get("sha256", {})
RESIZED = [
    tiling
    for tiling in ("pad", "keep_aspect", "crop")
    if f"pixel_values_{tiling}" in DIGESTS or f"preprocess.pixel_values_{tiling}" in TENSORS
]


def unused_id() -> int:
    """An id that no prompt uses, to stand for an image."""
    used = {token for case in CASES for token in TENSORS[f"{case}.input_ids"].flatten().tolist()}
    return max(set(range(GOLDEN["llm"]["vocab_size"])) - used)


def single_file(folder: Path) -> Path:
    """The checkpoint with everything in one file; put together here where the data hold the two folders only."""
    if (FOLDER / "checkpoint" / "model.safetensors").is_file():
        return FOLDER / "checkpoint"
    folder.mkdir(exist_ok=True)
    shutil.copytree(FOLDER / "checkpoint" / "vision_tower", folder / "vision_tower")
    shutil.copy(FOLDER / "checkpoint_split_llm" / "config.json", folder)
    tower = load_file(folder / "vision_tower" / "model.safetensors")
    (folder / "vision_tower" / "model.safetensors").unlink()
    weights = load_file(FOLDER / "checkpoint_split_llm" / "model.safetensors")
    weights |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", params=("single file", "two folders"))
def model(request, tmp_path_factory):
    if request.param == "single file":
        return load_official(single_file(tmp_path_factory.mktemp("single")), image_token_id=unused_id())
    tower = FOLDER / "checkpoint" / "vision_tower"
    return load_official(FOLDER / "checkpoint_split_llm", image_token_id=unused_id(), vision_tower=tower)


def grid_of(case: str) -> list[int]:
    """(rows, columns) of a case's visual tokens."""
    return GOLDEN["grids"][case] if "grids" in GOLDEN else list(TENSORS[f"{case}.stage5"].shape[-2:])


def images_of(case: str) -> list[list[int]]:
    """For each row the indices of its images; a row without any takes one all the same."""
    rows, next_image = [], 0
    for row in TENSORS[f"{case}.input_ids"]:
        count = int((row == SENTINEL).sum())
        rows.append(list(range(next_image, next_image + count)))
        next_image += max(count, 1)
    return rows


def expanded(case: str, image_token_id: int) -> dict[str, torch.Tensor]:
    """Prompts with placeholders where the original has one sentinel per image, padded on the right."""
    ids, num_tokens = TENSORS[f"{case}.input_ids"], TENSORS[f"{case}.visual_tokens"].shape[1]
    mask = TENSORS.get(f"{case}.attention_mask", torch.ones_like(ids)).bool()
    labels = TENSORS.get(f"{case}.labels", torch.full_like(ids, -100))
    rows = []
    for row_ids, row_mask, row_labels in zip(ids, mask, labels):
        pairs = []
        for token, label in zip(row_ids[row_mask].tolist(), row_labels[row_mask].tolist()):
            pairs += [(image_token_id, -100)] * num_tokens if token == SENTINEL else [(token, label)]
        rows.append(pairs)
    length = max(map(len, rows))
    padded = torch.tensor([pairs + [(0, -100)] * (length - len(pairs)) for pairs in rows])
    attention_mask = torch.tensor([[1] * len(pairs) + [0] * (length - len(pairs)) for pairs in rows])
    return {"input_ids": padded[..., 0], "labels": padded[..., 1], "attention_mask": attention_mask}


def inputs_of(case: str, model) -> dict[str, torch.Tensor]:
    """Inputs of our model; from the original's features where the data hold no pixels."""
    inputs = expanded(case, model.config.image_token_id)
    used = [image for row in images_of(case) for image in row]
    if case in WITH_PIXELS:
        return inputs | {"pixel_values": TENSORS[f"{case}.pixel_values"][used]}
    features = TENSORS[f"{case}.visual_tokens"][used]
    sizes = torch.tensor([grid_of(case)] * len(used)) * model.config.token_stride
    return inputs | {"image_features": features.flatten(0, 1)[None], "image_sizes": sizes}


def logits_of(case: str) -> torch.Tensor:
    """Every `STRIDE`-th position, every 8th entry of the vocabulary; what lies under padding has no meaning."""
    name = f"{case}.logits_v8"
    return TENSORS[name] if name in TENSORS else TENSORS[f"{case}.logits"][..., ::8]


@pytest.mark.parametrize("case", CASES)
def test_forward_matches_the_original(model, case):
    inputs = inputs_of(case, model)
    real = inputs["attention_mask"].bool()
    if f"{case}.merged_attention_mask" in TENSORS:
        assert torch.equal(inputs["attention_mask"], TENSORS[f"{case}.merged_attention_mask"])
    if f"{case}.merged_labels" in TENSORS:
        assert torch.equal(inputs["labels"], TENSORS[f"{case}.merged_labels"])
    seen = []
    handle = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    )
    try:
        with torch.no_grad():
            out = model(**inputs)
    finally:
        handle.remove()
    shown = real[:, ::STRIDE]
    torch.testing.assert_close(seen[0][:, ::STRIDE][shown], TENSORS[f"{case}.inputs_embeds"][shown], **CLOSE)
    torch.testing.assert_close(out.logits[:, ::STRIDE, ::8][shown], logits_of(case)[shown], **CLOSE)
    rows, columns = grid_of(case)
    assert set(out.num_visual_tokens.tolist()) == {rows * columns}
    if f"{case}.loss" in TENSORS:
        torch.testing.assert_close(out.loss, TENSORS[f"{case}.loss"][0], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_projector_matches_the_original(model, case):
    with torch.no_grad():
        projected = model.model.multi_modal_projector(TENSORS[f"{case}.visual_tokens"])
    torch.testing.assert_close(projected, TENSORS[f"{case}.projected_tokens"], **CLOSE)


def stages_of(tower, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The maps of stem and stages under the names of the data."""
    maps = {}
    named = {"stem": tower.embeddings} | {f"stage{idx}": stage for idx, stage in enumerate(tower.encoder.stages, 1)}
    handles = [
        module.register_forward_hook(
            lambda _, args, output, name=name: maps.update({name: output[0] if isinstance(output, tuple) else output})
        )
        for name, module in named.items()
    ]
    try:
        with torch.no_grad():
            (last,) = tower(pixel_values)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(last, maps[f"stage{len(tower.encoder.stages)}"])
    return maps


def image_processor(tiling: str) -> VtcImageProcessor:
    settings = json.loads((FOLDER / "checkpoint" / "vision_tower" / "preprocessor_config.json").read_text())
    return VtcImageProcessor(
        tiling=tiling,
        size=settings["size"],
        image_mean=settings["image_mean"],
        image_std=settings["image_std"],
        token_stride=GOLDEN["vision"]["total_stride"],
    )


# the photograph stands for the paper's way to any aspect ratio, at a size that is no multiple of the stride
@pytest.mark.parametrize("case", [*WITH_PIXELS, "preprocess_keep_aspect"])
def test_tower_matches_the_original(model, case):
    if case in WITH_PIXELS:
        inputs = {"pixel_values": TENSORS[f"{case}.pixel_values"]}
    else:
        inputs = image_processor("keep_aspect")(TENSORS["preprocess.image_uint8"], return_tensors="pt")
    for name, maps in stages_of(model.model.vision_tower, inputs["pixel_values"]).items():
        if f"{case}.{name}" in TENSORS:
            torch.testing.assert_close(maps, TENSORS[f"{case}.{name}"], **CLOSE)
    with torch.no_grad():
        features = model.model.encode(inputs["pixel_values"])
        projected = torch.stack(model.get_image_features(**inputs).pooler_output)
    torch.testing.assert_close(features, TENSORS[f"{case}.visual_tokens"].flatten(0, 1)[None], **CLOSE)
    torch.testing.assert_close(projected, TENSORS[f"{case}.projected_tokens"], **CLOSE)


@pytest.mark.parametrize("tiling", RESIZED)
def test_preprocessing_matches_the_original_bit_for_bit(tiling):
    pixel_values = image_processor(tiling)(TENSORS["preprocess.image_uint8"], return_tensors="pt")["pixel_values"]
    if f"preprocess.pixel_values_{tiling}" in TENSORS:
        assert torch.equal(pixel_values, TENSORS[f"preprocess.pixel_values_{tiling}"])
    else:
        digest = hashlib.sha256(pixel_values.contiguous().numpy().tobytes()).hexdigest()
        assert digest == DIGESTS[f"pixel_values_{tiling}"]


def test_logits_beside_a_placeholder_beyond_the_vocabulary(tmp_path):
    """The official vocabulary has no placeholder, which lies beyond it and leaves all logits as they are."""
    source, tower = FOLDER / "checkpoint_split_llm", FOLDER / "checkpoint" / "vision_tower"
    report = convert(source, tmp_path / "converted", vision_tower=tower)
    assert not report.missing_keys and not report.unused_keys and not report.fresh_keys
    grown = load_official(source, vision_tower=tower)
    vocab_size = GOLDEN["llm"]["vocab_size"]
    assert grown.config.image_token_id == vocab_size and grown.lm_head.weight.shape[0] == vocab_size
    assert isinstance(grown.lm_head, nn.Linear)
    case = CASES[0]
    inputs = inputs_of(case, grown)
    with torch.no_grad():
        logits = grown(**inputs).logits[..., :vocab_size]
    shown = inputs["attention_mask"].bool()[:, ::STRIDE]
    torch.testing.assert_close(logits[:, ::STRIDE, ::8][shown], logits_of(case)[shown], **CLOSE)


def copied(folder: Path, **changes) -> Path:
    """The two published folders beside each other, with changes to the language model's config.json."""
    source = folder / "llm"
    shutil.copytree(FOLDER / "checkpoint_split_llm", source)
    shutil.copytree(FOLDER / "checkpoint" / "vision_tower", folder / "vision_tower")
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    return source


@pytest.mark.parametrize("ratio, tiling", (("pad", "pad"), ("square", "crop")))
def test_convert_writes_the_processor(tmp_path, ratio, tiling):
    source = copied(tmp_path, image_aspect_ratio=ratio)
    tiny_tokenizer().save_pretrained(source)
    # the tower is found beside the folder
    report = convert(source, tmp_path / "converted")
    assert report.has_processor and report.method == "convllava"
    processor = AutoProcessor.from_pretrained(tmp_path / "converted")
    stride, size = GOLDEN["vision"]["total_stride"], GOLDEN["vision"]["image_size"]
    images = processor.image_processor
    assert (images.tiling, images.size["height"], images.token_stride) == (tiling, size, stride)
    inputs = processor(
        images=TENSORS["preprocess.image_uint8"], text=f"{processor.image_token} what?", return_tensors="pt"
    )
    if f"preprocess.pixel_values_{tiling}" in TENSORS:
        assert torch.equal(inputs["pixel_values"], TENSORS[f"preprocess.pixel_values_{tiling}"])
    converted = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted")
    with torch.no_grad():
        assert converted(**inputs).num_visual_tokens.tolist() == [(size // stride) ** 2]


def test_bin_files_of_the_published_repositories(tmp_path):
    source = copied(tmp_path)
    for folder in (source, tmp_path / "vision_tower"):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    expected = load_official(single_file(tmp_path / "single"), image_token_id=unused_id()).state_dict()
    loaded = load_official(source, image_token_id=unused_id()).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())


def test_the_pooled_norm_is_left_out(tmp_path):
    """Towers saved by transformers itself have it."""
    source = copied(tmp_path)
    file = tmp_path / "vision_tower" / "model.safetensors"
    width = GOLDEN["vision"]["hidden_sizes"][-1]
    pooled = {"layernorm.weight": torch.ones(width), "layernorm.bias": torch.zeros(width)}
    save_file(load_file(file) | pooled, file)
    report = convert(source, tmp_path / "converted")
    assert {name.rpartition("vision_tower.")[2] for name in report.unused_keys} == pooled.keys()
    assert sum("reads no pooled vector" in note for note in report.notes) == 2


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"image_aspect_ratio": "anyres"}, "`image_aspect_ratio` 'anyres' does not work"),
        ({"mm_vision_select_layer": -2}, "`vision_feature_layer` must be -1"),
        ({"mm_projector_type": "linear"}, "`mm_projector_type` must be 'mlp2x_gelu'"),
    ),
    ids=str,
)
def test_settings_without_a_counterpart_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_official(copied(tmp_path, **changes))


def test_another_tower_is_refused(tmp_path):
    source = copied(tmp_path)
    file = tmp_path / "vision_tower" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "clip_vision_model"}))
    with pytest.raises(ValueError, match="must be a ConvNeXt, got `model_type` 'clip_vision_model'"):
        load_official(source)


def test_tower_config_is_that_of_the_published_folder(model):
    published = json.loads((FOLDER / "checkpoint" / "vision_tower" / "config.json").read_text())
    vision = model.config.vision_config
    for name in ("depths", "hidden_sizes", "num_stages", "patch_size", "image_size", "hidden_act"):
        assert getattr(vision, name) == published[name], name
    assert len(model.model.vision_tower.encoder.stages) == published["num_stages"]
    assert model.config.token_stride == GOLDEN["vision"]["total_stride"]
