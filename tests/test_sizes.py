"""Published models at their real size, on the meta device: every official tensor has exactly one place, none is left.

The names and shapes below are written from the published files, not from the code that they judge. Sources:
InternVL3.5-8B-Flash: InternLM/lmdeploy@1263d5c `lmdeploy/pytorch/models/internvl.py` (router, second connector),
OpenGVLab/InternVL@2410d1d (tower), config.json of `Qwen/Qwen3-8B`; AVG-LLaVA: DeepLearnXMU/AVG-LLaVA@3685bc8 and
config.json of `zhibinlan/AVG-LLaVA`; LLaVA-1.5-7B: haotian-liu/LLaVA@c121f04, config.json of `lmsys/vicuna-7b-v1.5`
and of `openai/clip-vit-large-patch14-336`; ConvLLaVA: alibaba/conv-llava@3e7ae57 and config.json of
`ConvLLaVA/ConvLLaVA-ConvNeXt-{768,1024,1536}`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForImageTextToText

import hf_vtc  # noqa: F401  registers the classes
from hf_vtc.convert import LAYOUTS
from hf_vtc.convert.plan import Source, match
from hf_vtc.report import default_budget, estimate

Shapes = dict[str, tuple[int, ...]]

VICUNA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
LLAVA = {
    **VICUNA_7B,
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_vision_select_feature": "patch",
}
LLAVA_15_7B = {
    **LLAVA,
    "image_aspect_ratio": "pad",
    "mm_hidden_size": 1024,
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
}
AVG_LLAVA_7B = {
    **LLAVA_15_7B,
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": "[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]",
    "mm_patch_merge_type": "spatial_unpad",
    "router_select": True,
    "vis_token_granularity": [36, 72, 144, 288, 576],
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
INTERNVIT_300M = {
    "architectures": ["InternVisionModel"],
    "image_size": 448,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
}
FLASH_8B = {
    "model_type": "internvl_chat",
    "llm_config": QWEN3_8B,
    "vision_config": INTERNVIT_300M,
    "force_image_size": 448,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "select_layer": -1,
    "flash_mode": True,
    # no published file was seen; any pair gives the same tensors
    "flash_relative_threshold": 0.5,
    "flash_absolute_threshold": 0.5,
}


def convllava_7b(size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of a language model and of its tower, for tiles of `size` pixels."""
    model = {
        **LLAVA,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 3072,
        "mm_vision_select_layer": -1,
        "mm_vision_tower": f"ConvLLaVA/ConvLLaVA-ConvNeXt-{size}",
        "tune_entire_model": False,
    }
    tower = {
        "model_type": "convnext",
        "num_stages": 5,
        "depths": [3, 3, 27, 3, 6],
        "hidden_sizes": [192, 384, 768, 1536, 3072],
        "patch_size": 4,
        "layer_norm_eps": 1e-12,
        "layer_scale_init_value": 1e-6,
        "image_size": size,
    }
    return model, tower


def with_bias(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def llama_tensors(
    width: int, ffn: int, layers: int, vocab: int, prefix: str = "", key_value: int | None = None
) -> Shapes:
    """Llama; Qwen3 if `prefix` is that of InternVL, which has norms of queries and keys besides."""
    key_value = key_value or width
    tensors = {f"{prefix}model.embed_tokens.weight": (vocab, width), f"{prefix}lm_head.weight": (vocab, width)}
    tensors[f"{prefix}model.norm.weight"] = (width,)
    for layer in range(layers):
        base = f"{prefix}model.layers.{layer}"
        tensors |= {
            f"{base}.self_attn.q_proj.weight": (width, width),
            f"{base}.self_attn.k_proj.weight": (key_value, width),
            f"{base}.self_attn.v_proj.weight": (key_value, width),
            f"{base}.self_attn.o_proj.weight": (width, width),
            f"{base}.mlp.gate_proj.weight": (ffn, width),
            f"{base}.mlp.up_proj.weight": (ffn, width),
            f"{base}.mlp.down_proj.weight": (width, ffn),
            f"{base}.input_layernorm.weight": (width,),
            f"{base}.post_attention_layernorm.weight": (width,),
        }
        if prefix:
            tensors |= {f"{base}.self_attn.{part}_norm.weight": (128,) for part in "qk"}
    return tensors


def vicuna_tensors() -> Shapes:
    return llama_tensors(4096, 11008, 32, 32000)


def clip_tensors() -> Shapes:
    """CLIP ViT-L/14 at 336 pixels, with the class token and both outer norms."""
    base = "model.vision_tower.vision_tower.vision_model"
    tensors = {
        f"{base}.embeddings.class_embedding": (1024,),
        f"{base}.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        f"{base}.embeddings.position_embedding.weight": (577, 1024),
        **with_bias(f"{base}.pre_layrnorm", 1024),
        **with_bias(f"{base}.post_layernorm", 1024),
    }
    for layer in range(24):
        part = f"{base}.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= with_bias(f"{part}.self_attn.{name}", 1024, 1024)
        tensors |= with_bias(f"{part}.layer_norm1", 1024) | with_bias(f"{part}.layer_norm2", 1024)
        tensors |= with_bias(f"{part}.mlp.fc1", 4096, 1024) | with_bias(f"{part}.mlp.fc2", 1024, 4096)
    return tensors


def projector_tensors(width: int) -> Shapes:
    return with_bias("model.mm_projector.0", 4096, width) | with_bias("model.mm_projector.2", 4096, 4096)


def avg_llava_router_tensors() -> Shapes:
    base, merger = "model.router", "model.router.merger"
    return {
        f"{base}.voter": (36 + 72 + 144 + 288 + 576 + 32, 1),
        **with_bias(f"{base}.router.0", 4096, 4096),
        **with_bias(f"{base}.router.2", 5, 4096),
        **with_bias(f"{base}.norm", 5),
        f"{merger}.self_attn.in_proj_weight": (12288, 4096),
        f"{merger}.self_attn.in_proj_bias": (12288,),
        **with_bias(f"{merger}.self_attn.out_proj", 4096, 4096),
        **with_bias(f"{merger}.linear1", 4096, 4096),
        **with_bias(f"{merger}.linear2", 4096, 4096),
        **with_bias(f"{merger}.norm1", 4096),
        **with_bias(f"{merger}.norm2", 4096),
    }


def convnext_tensors(prefix: str = "model.vision_tower.vision_tower.") -> Shapes:
    widths, depths = (192, 384, 768, 1536, 3072), (3, 3, 27, 3, 6)
    tensors = with_bias(f"{prefix}embeddings.patch_embeddings", 192, 3, 4, 4)
    tensors |= with_bias(f"{prefix}embeddings.layernorm", 192)
    for stage, (width, depth) in enumerate(zip(widths, depths)):
        base = f"{prefix}encoder.stages.{stage}"
        if stage:
            tensors |= with_bias(f"{base}.downsampling_layer.0", widths[stage - 1])
            tensors |= with_bias(f"{base}.downsampling_layer.1", width, widths[stage - 1], 2, 2)
        for layer in range(depth):
            part = f"{base}.layers.{layer}"
            tensors |= with_bias(f"{part}.dwconv", width, 1, 7, 7) | with_bias(f"{part}.layernorm", width)
            tensors |= with_bias(f"{part}.pwconv1", 4 * width, width) | with_bias(f"{part}.pwconv2", width, 4 * width)
            tensors[f"{part}.layer_scale_parameter"] = (width,)
    return tensors


def internvit_tensors() -> Shapes:
    tensors = {
        "vision_model.embeddings.class_embedding": (1, 1, 1024),
        **with_bias("vision_model.embeddings.patch_embedding", 1024, 3, 14, 14),
        "vision_model.embeddings.position_embedding": (1, 1025, 1024),
    }
    for layer in range(24):
        base = f"vision_model.encoder.layers.{layer}"
        tensors |= with_bias(f"{base}.norm1", 1024) | with_bias(f"{base}.norm2", 1024)
        tensors |= with_bias(f"{base}.attn.qkv", 3072, 1024) | with_bias(f"{base}.attn.proj", 1024, 1024)
        tensors |= with_bias(f"{base}.mlp.fc1", 4096, 1024) | with_bias(f"{base}.mlp.fc2", 1024, 4096)
        tensors |= {f"{base}.ls1": (1024,), f"{base}.ls2": (1024,)}
    return tensors


def flash_tensors() -> Shapes:
    """What a Flash checkpoint has beside tower, first connector and decoder."""
    tensors = with_bias("mlp2.0", 16384) | with_bias("mlp2.1", 8192, 16384)
    tensors |= with_bias("mlp2.4", 8192, 8192) | with_bias("mlp2.7", 4096, 8192)
    tensors["pooling_before_gating.query_token"] = (1, 1024)
    for index in range(1, 5):
        attention = f"pooling_before_gating.attn{index}"
        tensors |= {f"{attention}.in_proj_weight": (3072, 1024), f"{attention}.in_proj_bias": (3072,)}
        tensors |= with_bias(f"{attention}.out_proj", 1024, 1024)
        tensors |= with_bias(f"pooling_before_gating.norm{index}", 1024)
        block = f"gating.block{index}"
        tensors |= with_bias(f"{block}.0", 4096, 1024) | with_bias(f"{block}.3", 1024, 4096)
        tensors |= with_bias(f"{block}.5", 1024)
    return tensors | with_bias("gating.gate.0", 1024) | with_bias("gating.gate.1", 2, 1024)


def internvl_tensors() -> Shapes:
    connector = with_bias("mlp1.0", 4096) | with_bias("mlp1.1", 4096, 4096) | with_bias("mlp1.3", 4096, 4096)
    decoder = llama_tensors(4096, 12288, 36, 151936, prefix="language_model.", key_value=8 * 128)
    return internvit_tensors() | connector | decoder


class Published(NamedTuple):
    """A checkpoint, and what becomes of it.

    Args:
        config (`Mapping`): its config.json.
        tensors (`Shapes`): its official names and shapes.
        method (`str`): what it becomes.
        tower (`Mapping`): config.json of a tower in a folder of its own.
        fresh (`tuple[str, ...]`): submodules that it lacks.
    """

    config: Mapping[str, Any]
    tensors: Shapes
    method: str
    tower: Mapping[str, Any] = {}
    fresh: tuple[str, ...] = ()


LLAVA_TENSORS = vicuna_tensors() | clip_tensors() | projector_tensors(1024)
NEXT_TENSORS = LLAVA_TENSORS | {"model.image_newline": (4096,)}
PUBLISHED = {
    "InternVL3_5-8B-Flash": Published(FLASH_8B, internvl_tensors() | flash_tensors(), "vico"),
    "AVG-LLaVA": Published(AVG_LLAVA_7B, NEXT_TENSORS | avg_llava_router_tensors(), "avg_llava"),
    "AVG-LLaVA-Stage3": Published(AVG_LLAVA_7B, NEXT_TENSORS, "avg_llava", fresh=("model.router",)),
    "LLaVolta": Published(LLAVA_15_7B, LLAVA_TENSORS, "llavolta"),
    "LLaVA-1.5 for AVG-LLaVA": Published(LLAVA_15_7B, LLAVA_TENSORS, "avg_llava", fresh=("model.router",)),
    "LLaVA-1.5 for VisToG": Published(
        LLAVA_15_7B, LLAVA_TENSORS, "vistog", fresh=("model.semantic_tokens", "model.grouping")
    ),
}
for side in (768, 1024, 1536):
    language, encoder = convllava_7b(side)
    tensors = vicuna_tensors() | convnext_tensors() | projector_tensors(3072)
    PUBLISHED[f"ConvLLaVA-{side}"] = Published(language, tensors, "convllava", encoder)


@pytest.fixture(scope="module", params=PUBLISHED, ids=str)
def published(request) -> Published:
    return PUBLISHED[request.param]


@pytest.fixture(scope="module")
def layout(published):
    return next(layout for layout in LAYOUTS if layout.matches(published.config))


@pytest.fixture(scope="module")
def plan(published, layout):
    target = layout.methods(published.config, published.tensors)[published.method]
    token_id = layout.vocab_size(published.config)
    # beyond the vocabulary where the original has no placeholder; InternVL's tokenizer has <IMG_CONTEXT>
    source = Source(
        published.config,
        published.tensors,
        151671 if token_id is None else token_id,
        equal=lambda first, second: False,
        tower=published.tower,
    )
    return layout.plan(source, target, {})


@pytest.fixture(scope="module")
def model(plan):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(plan.config)


def count(shapes: Shapes, *prefixes: str) -> int:
    """Numbers in the tensors whose names begin with one of `prefixes`."""
    return sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith(prefixes))


def test_the_shapes_are_those_that_were_published():
    # number of tensors and of parameters, as the papers, the files and the official code give them
    assert len(vicuna_tensors()) == 291 and len(clip_tensors()) == 391
    assert len(avg_llava_router_tensors()) == 19 and len(PUBLISHED["AVG-LLaVA"].tensors) == 706
    assert round(count(PUBLISHED["AVG-LLaVA"].tensors, "") / 1e9, 2) == 7.18
    assert round(count(PUBLISHED["AVG-LLaVA-Stage3"].tensors, "") / 1e9, 2) == 7.06
    assert round(count(avg_llava_router_tensors(), "") / 1e6, 1) == 117.5
    assert len(convnext_tensors()) == 398 and count(convnext_tensors(), "") == 669_161_664
    assert count(projector_tensors(3072), "") == 29_368_320
    assert round(count(flash_tensors(), "mlp2.") / 1e6, 1) == 234.9
    assert round(count(flash_tensors(), "pooling_before_gating.") / 1e6, 1) == 16.8
    assert round(count(flash_tensors(), "gating.") / 1e6, 1) == 33.6


def test_every_official_tensor_has_one_place(published, plan, model):
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    taken: dict[str, str] = {}
    for name, shape in published.tensors.items():
        renamed = plan.rename(name)
        assert renamed is not None, f"{name} is left over"
        parts = renamed.transform(torch.empty(shape, device="meta"))
        assert len(parts) == len(renamed.names)
        for new, part in zip(renamed.names, parts):
            assert new in ours, f"{name} -> {new}, which the model does not have"
            assert tuple(part.shape) == ours[new], name
            assert new not in taken, f"{name} and {taken[new]} both mean {new}"
            taken[new] = name
    without = {name for name in ours if name not in taken}
    assert all(name.startswith(published.fresh) for name in without) if published.fresh else not without
    assert not published.fresh or without


def test_conversion_agrees(published, plan):
    matched = match(plan, published.tensors, "published")
    assert set(matched.used) == set(published.tensors) and not matched.unused and not matched.missing
    assert bool(matched.fresh) == bool(published.fresh)


def test_a_tensor_of_another_shape_or_name_is_noticed(published, plan):
    name = next(name for name in published.tensors if name.endswith("lm_head.weight"))
    with pytest.raises(ValueError, match="lm_head"):
        match(plan, {**published.tensors, name: (7, 4096)}, "published")
    assert match(plan, {**published.tensors, "model.extra": (1,)}, "published").unused == ["model.extra"]
    with pytest.raises(ValueError, match="lacks 1 tensors"):
        match(plan, {key: shape for key, shape in published.tensors.items() if key != name}, "published")


def test_size_of_the_model(published, model):
    stored = count(published.tensors, "")
    assert all(parameter.is_meta for parameter in model.parameters())
    # a Flash checkpoint has weights that nothing reads: buffers here, so that no optimizer holds them
    total = sum(tensor.numel() for tensor in model.state_dict().values())
    fresh = sum(
        p.numel() for name, p in model.named_parameters() if published.fresh and name.startswith(published.fresh)
    )
    assert total == stored + fresh


@pytest.mark.parametrize("side, tokens", [(768, 144), (1024, 256), (1536, 576)])
def test_tokens_of_convllava(side, tokens):
    config, tower = convllava_7b(side)
    layout = next(layout for layout in LAYOUTS if layout.matches(config))
    published = PUBLISHED[f"ConvLLaVA-{side}"]
    source = Source(config, published.tensors, 32000, equal=lambda first, second: False, tower=tower)
    plan = layout.plan(source, layout.methods(config, published.tensors)["convllava"], {})
    assert plan.config.image_seq_length == tokens
    assert plan.processor.images["size"] == side and plan.processor.images["token_stride"] == 64


def test_costs_are_known_at_this_size(published, plan):
    costs = estimate(plan.config, (672, 672), vtc_budget=default_budget(plan.config))
    assert 0 < costs.num_kept <= costs.num_reserved
    # two FLOPs per weight and token, embeddings left out, is the order of any decoder's prefill
    weights = count(published.tensors, "model.layers.", "language_model.model.layers.")
    assert costs.full_prefill_flops > 2 * weights * costs.num_reserved
    assert costs.full_prefill_flops < 3 * weights * (costs.num_reserved + costs.num_text_tokens)
