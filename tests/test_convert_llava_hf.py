"""LLaVA and LLaVA-NeXT of transformers as bases: names, towers, decoders, equal models."""

import pytest
import torch
from factories import tiny_tokenizer
from llava_checkpoints import next_prompt, prompt, stock_model
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from hf_vtc.convert import convert, from_base, llava_hf


@pytest.mark.window
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_from_base_equals_llava_bit_for_bit(tmp_path, tied, dtype):
    stock_model(tied=tied, dtype=dtype).save_pretrained(tmp_path / "hf")
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    report = convert(tmp_path / "hf", tmp_path / "dst", "llavolta", compress_layer_idx=1, compress_stride=4)
    assert not report.fresh_keys and not report.unused_keys and not report.missing_keys
    inputs = prompt(dtype)
    for model in (
        from_base(base, "llavolta", compress_layer_idx=1, compress_stride=4),
        from_base(tmp_path / "hf", "llavolta", compress_layer_idx=1, compress_stride=4),
        AutoModelForImageTextToText.from_pretrained(tmp_path / "dst", dtype="auto"),
    ):
        assert model.dtype == dtype and not model.training
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert (model.config.compress_layer_idx, model.config.compress_stride) == (1, 4)
        with torch.no_grad():
            assert torch.equal(model(**inputs, vtc_budget="full").logits, base(**inputs).logits)
            assert model(**inputs).num_visual_tokens.tolist() == [4, 4]


@pytest.mark.window
@pytest.mark.parametrize("tower", ("clip", "siglip"))
@pytest.mark.parametrize("text_type", ("llama", "mistral", "qwen2", "qwen3"))
def test_towers_and_decoders(tower, text_type):
    base = stock_model(tower=tower, text_type=text_type)
    inputs = prompt()
    with torch.no_grad():
        model = from_base(base, "llavolta", compress_layer_idx=1, compress_stride=4)
        assert torch.equal(model(**inputs, vtc_budget="full").logits, base(**inputs).logits)


@pytest.mark.window
@pytest.mark.parametrize("layer", (-1, -2, 2))
@pytest.mark.parametrize("tower", ("clip", "siglip"))
@pytest.mark.parametrize("kind", ("llava", "llava_next"))
def test_towers_are_read_as_transformers_reads_them(kind, tower, layer):
    """The output of an encoder layer, without the norm behind the last one."""
    base = stock_model(kind, tower, vision_feature_layer=layer)
    theirs, ours = next_prompt(base) if kind == "llava_next" else (prompt(),) * 2
    model = from_base(base, "llavolta", compress_layer_idx=1, compress_stride=4)
    with torch.no_grad():
        assert torch.equal(model(**ours, vtc_budget="full").logits, base(**theirs).logits)


@pytest.mark.window
def test_from_base_equals_llava_next_bit_for_bit(tmp_path):
    base = stock_model("llava_next")
    base.save_pretrained(tmp_path / "hf")
    theirs, ours = next_prompt(base)
    for model in (
        from_base(base, "llavolta", compress_layer_idx=1, compress_stride=4),
        from_base(tmp_path / "hf", "llavolta", compress_layer_idx=1, compress_stride=4),
    ):
        with torch.no_grad():
            expected = base(**theirs).logits
            assert torch.equal(model(**ours, vtc_budget="full").logits, expected)
            full = model.count_visual_tokens(**ours, vtc_budget="full")
            assert model.count_visual_tokens(**ours).tolist() == (full // 4).tolist()
            assert not torch.allclose(model(**ours).logits, expected, atol=1e-3)


def test_llava_next_needs_what_the_processor_says():
    base = stock_model("llava_next")
    model = from_base(base, "llavolta", compress_layer_idx=1, compress_stride=4)
    _, ours = next_prompt(base)
    with pytest.raises(ValueError, match="image_sizes"):
        model(**{name: value for name, value in ours.items() if name != "image_sizes"})
    with pytest.raises(ValueError, match="2 x 2 tiles"):
        # of another shape than its tiles
        model(**{**ours, "image_sizes": torch.tensor([[50, 41], [50, 41]])})


def test_text_batches_of_llava_next_reach_the_newline():
    base = stock_model("llava_next")
    model = from_base(base, "llavolta", compress_layer_idx=1, compress_stride=4).train()
    ids = torch.tensor([[1, 2, 3, 4]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.image_newline.grad is not None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        (
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
            "model.vision_tower.encoder.layers.0.mlp.fc1.bias",
        ),
        ("model.vision_tower.embeddings.class_embedding", "model.vision_tower.embeddings.class_embedding"),
        ("multi_modal_projector.linear_1.weight", "model.multi_modal_projector.linear_1.weight"),
        ("image_newline", "model.image_newline"),
        ("model.image_newline", "model.image_newline"),
    ],
)
def test_names_of_transformers(name, expected):
    assert llava_hf.rename(name).names == (expected,)
    assert llava_hf.rename("model.qformer.weight") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"vision_feature_layer": [-2, -1]}, "must be one layer"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
    ),
    ids=str,
)
def test_settings_of_transformers_without_a_counterpart(fields, message):
    base = stock_model()
    for name, value in fields.items():
        setattr(base.config, name, value)
    with pytest.raises(ValueError, match=message):
        from_base(base, "llavolta")


def test_the_processor_of_llava(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    base = stock_model()
    base.resize_token_embeddings(len(tokenizer))
    base.config.image_token_index = base.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    base.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    (tmp_path / "hf" / "chat_template.json").write_text('{"chat_template": "Q{{ messages[0].role }}"}')
    report = convert(tmp_path / "hf", tmp_path / "dst", "llavolta", compress_layer_idx=1, compress_stride=4)
    assert report.has_processor and any("padded to squares" in note for note in report.notes)
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    assert processor.image_processor.tiling == "pad" and processor.image_processor.image_mean == [0.5] * 3
    assert processor.image_seq_length == 16 and processor.image_token == "<image>"
    assert processor.chat_template == "Q{{ messages[0].role }}"


def test_a_tower_that_is_not_needed_is_refused(tmp_path):
    base = stock_model()
    base.save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="`vision_tower` is of no use"):
        convert(tmp_path / "hf", tmp_path / "dst", "llavolta", vision_tower=tmp_path / "hf")
    for source in (base, tmp_path / "hf"):
        with pytest.raises(ValueError, match="`vision_tower` is of no use"):
            from_base(source, "llavolta", vision_tower=tmp_path / "hf")
