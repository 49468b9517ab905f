"""Checkpoints of InternVL as published, official and of transformers, small enough for tests."""

import json
from pathlib import Path

import torch
from factories import tiny_tokenizer
from safetensors.torch import save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

IMAGE_TOKEN_ID = 60
VISION = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 2,
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
    "layer_norm_eps": 1e-6,
    "drop_path_rate": 0.1,
    "use_flash_attn": True,
}
TEXT = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
    "max_length": 20,
}
FLASH = {"flash_mode": True, "flash_relative_threshold": 0.3, "flash_absolute_threshold": 0.2}


def official_config(flash: bool = True, vision: dict | None = None, text: dict | None = None, **fields) -> dict:
    """Content of an official `config.json`."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "force_image_size": 16,
        "ps_version": "v2",
        "select_layer": -1,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
        "use_thumbnail": True,
        "dynamic_image_size": True,
        "torch_dtype": "float32",
        "vision_config": {**VISION, **(vision or {})},
        "llm_config": {**TEXT, **(text or {})},
        **(FLASH if flash else {}),
        **fields,
    }


def official_shapes(config: dict, flash: bool = True) -> dict[str, tuple[int, ...]]:
    """Official names and shapes, written down from the table of published keys, not from our map."""
    vision, text = config["vision_config"], config["llm_config"]
    width, dim, hidden = vision["hidden_size"], text["hidden_size"], vision["intermediate_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.position_embedding": (1, patches + 1, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, vision["patch_size"], vision["patch_size"]),
        "vision_model.embeddings.patch_embedding.bias": (width,),
    }
    with_bias = vision["norm_type"] == "layer_norm"
    for layer in range(vision["num_hidden_layers"]):
        base = f"vision_model.encoder.layers.{layer}"
        for layer_norm in ("norm1", "norm2"):
            shapes[f"{base}.{layer_norm}.weight"] = (width,)
            if with_bias:
                shapes[f"{base}.{layer_norm}.bias"] = (width,)
        shapes |= {f"{base}.ls1": (width,), f"{base}.ls2": (width,), f"{base}.attn.qkv.weight": (3 * width, width)}
        if vision["qkv_bias"]:
            shapes[f"{base}.attn.qkv.bias"] = (3 * width,)
        if vision["qk_normalization"]:
            shapes |= {f"{base}.attn.q_norm.weight": (width,), f"{base}.attn.k_norm.weight": (width,)}
        shapes |= linear(f"{base}.attn.proj", width, width)
        shapes |= linear(f"{base}.mlp.fc1", width, hidden) | linear(f"{base}.mlp.fc2", hidden, width)
    shapes |= {f"language_model.{name}": shape for name, shape in decoder_shapes(text).items()}
    shapes |= norm("mlp1.0", 4 * width) | linear("mlp1.1", 4 * width, dim) | linear("mlp1.3", dim, dim)
    return shapes | (flash_shapes(width, dim) if flash else {})


def flash_shapes(width: int, dim: int) -> dict[str, tuple[int, ...]]:
    shapes = norm("mlp2.0", 16 * width) | linear("mlp2.1", 16 * width, 2 * dim)
    shapes |= linear("mlp2.4", 2 * dim, 2 * dim) | linear("mlp2.7", 2 * dim, dim)
    shapes["pooling_before_gating.query_token"] = (1, width)
    for index in range(1, 5):
        pool, block = f"pooling_before_gating.attn{index}", f"gating.block{index}"
        shapes |= {f"{pool}.in_proj_weight": (3 * width, width), f"{pool}.in_proj_bias": (3 * width,)}
        shapes |= linear(f"{pool}.out_proj", width, width) | norm(f"pooling_before_gating.norm{index}", width)
        shapes |= linear(f"{block}.0", width, 4 * width) | linear(f"{block}.3", 4 * width, width)
        shapes |= norm(f"{block}.5", width)
    return shapes | norm("gating.gate.0", width) | linear("gating.gate.1", width, 2)


def decoder_shapes(text: dict) -> dict[str, tuple[int, ...]]:
    """Names of Qwen3 and Qwen3-MoE files, which hold one tensor per expert."""
    dim, heads, kv_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    head_dim, vocab = text["head_dim"], text["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,), "lm_head.weight": (vocab, dim)}
    for layer in range(text["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        shapes |= {
            f"{base}.input_layernorm.weight": (dim,),
            f"{base}.post_attention_layernorm.weight": (dim,),
            f"{base}.self_attn.q_proj.weight": (heads * head_dim, dim),
            f"{base}.self_attn.k_proj.weight": (kv_heads * head_dim, dim),
            f"{base}.self_attn.v_proj.weight": (kv_heads * head_dim, dim),
            f"{base}.self_attn.o_proj.weight": (dim, heads * head_dim),
            f"{base}.self_attn.q_norm.weight": (head_dim,),
            f"{base}.self_attn.k_norm.weight": (head_dim,),
        }
        mlps, inner = [f"{base}.mlp"], text["intermediate_size"]
        if "num_experts" in text:
            shapes[f"{base}.mlp.gate.weight"] = (text["num_experts"], dim)
            mlps = [f"{base}.mlp.experts.{expert}" for expert in range(text["num_experts"])]
            inner = text["moe_intermediate_size"]
        for mlp in mlps:
            shapes |= {f"{mlp}.gate_proj.weight": (inner, dim), f"{mlp}.up_proj.weight": (inner, dim)}
            shapes[f"{mlp}.down_proj.weight"] = (dim, inner)
    return shapes


def linear(name: str, fan_in: int, fan_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def official_state(config: dict, flash: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        name: (0.3 * torch.randn(shape) + (name.endswith("norm.weight"))).to(dtype)
        for name, shape in official_shapes(config, flash).items()
    }


def write_checkpoint(folder: Path, config: dict, state: dict[str, torch.Tensor], num_shards: int = 1) -> Path:
    """A checkpoint folder as published: one file, or shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(state)
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        weight_map |= dict.fromkeys(names[shard::num_shards], file_name)
        save_file({name: state[name] for name in names[shard::num_shards]}, folder / file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def stock_model(tied: bool = False, dtype: torch.dtype = torch.float32, **text) -> InternVLForConditionalGeneration:
    """The uncompressed model of transformers."""
    fields = {name: TEXT[name] for name in list(TEXT)[1:11]} | {"tie_word_embeddings": tied} | text
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [16, 16],
            "patch_size": [2, 2],
            "attention_bias": True,
        },
        text_config=fields,
        image_token_id=IMAGE_TOKEN_ID,
        image_seq_length=16,
        tie_word_embeddings=tied,
    )
    model = InternVLForConditionalGeneration(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape).to(dtype))
    return model


def prompt(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Two images of two tiles and one, with text around them."""
    ids = [1, 2, *[IMAGE_TOKEN_ID] * 32, 3, *[IMAGE_TOKEN_ID] * 16, 4, 5]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.randn(3, 3, 16, 16).to(dtype)}


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def files_of(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def with_tokenizer(folder: Path, text: dict | None = None) -> int:
    """Add a tokenizer to a checkpoint whose vocabulary is large enough; returns the placeholder's id."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = official_config(text={"vocab_size": len(tokenizer)} | (text or {}))
    write_checkpoint(folder, config, official_state(config))
    return tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
