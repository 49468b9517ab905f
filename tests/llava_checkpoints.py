"""Checkpoints of LLaVA and LLaVA-NeXT, official and of transformers, small enough for tests."""

import json

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SiglipVisionConfig,
)

IMAGE_TOKEN_ID = 60
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}


def stock_model(kind="llava", tower="clip", text_type="llama", tied=False, dtype=torch.float32, **fields):
    """An uncompressed model of transformers with weights that matter."""
    vision = CLIPVisionConfig(**VISION) if tower == "clip" else SiglipVisionConfig(**VISION, vision_use_head=False)
    common = {
        "vision_config": vision,
        "text_config": {"model_type": text_type, **TEXT, "tie_word_embeddings": tied},
        "image_token_index": IMAGE_TOKEN_ID,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
        "tie_word_embeddings": tied,
        **fields,
    }
    if kind == "llava":
        model = LlavaForConditionalGeneration(LlavaConfig(**common, image_seq_length=16))
    else:
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**common, image_grid_pinpoints=PINPOINTS))
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape).to(dtype))
    return model


def prompt(dtype=torch.float32):
    """Two images, with text around them."""
    ids = [1, 2, *[IMAGE_TOKEN_ID] * 16, 3, *[IMAGE_TOKEN_ID] * 16, 4, 5]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.randn(2, 3, 32, 32).to(dtype)}


def next_prompt(model):
    """Two images of other shapes for LLaVA-NeXT: the wide one on a canvas of 1 x 3 tiles, the other on 2 x 2."""
    sizes, tiles = torch.tensor([[40, 100], [50, 41]]), torch.tensor([4, 5])
    pixels = torch.randn(9, 3, 32, 32)
    padded = torch.zeros(2, 5, 3, 32, 32)
    padded[0, :4], padded[1] = pixels[:4], pixels[4:]
    with torch.no_grad():
        features = model.get_image_features(padded, sizes, vision_feature_layer=model.config.vision_feature_layer)
    features = features if isinstance(features, (list, tuple)) else features.pooler_output
    counts = [len(image) for image in features]
    ids = [1, *[IMAGE_TOKEN_ID] * counts[0], 3, *[IMAGE_TOKEN_ID] * counts[1], 4]
    ids = torch.tensor([ids])
    theirs = {"input_ids": ids, "pixel_values": padded, "image_sizes": sizes}
    return theirs, {"input_ids": ids, "pixel_values": pixels, "num_tiles": tiles, "image_sizes": sizes}


def official_config(**fields):
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "hidden_act": "silu",
        **TEXT,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tower",
        "temperature": 0.9,
        "torch_dtype": "float32",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        **fields,
    }


def official_state(base):
    """The weights of a stock model under their official names."""
    state = {}
    for name, tensor in base.state_dict().items():
        name = name.replace("model.language_model.", "model.").replace("vision_tower.vision_model.", "vision_tower.")
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
        state[name.replace("multi_modal_projector.linear_2", "mm_projector.2")] = tensor.clone()
    return state


def write_official(folder, base, tower="inside", **fields):
    """An official folder whose tower is part of it, or lies in another one, with its second half or alone."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(official_config(**fields)))
    state = official_state(base)
    tower_folder = folder / "tower" if tower == "inside" else folder.parent / "tower"
    tower_folder.mkdir()
    config = base.config.vision_config.to_dict()
    preprocessor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0], "size": {"shortest_edge": 32}}
    (tower_folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    if tower != "inside":
        prefix = "model.vision_tower.vision_tower."
        own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        if tower == "whole CLIP":
            config = {"model_type": "clip", "vision_config": config}
            own["logit_scale"] = torch.ones(())
        save_file(own, tower_folder / "model.safetensors", metadata={"format": "pt"})
    (tower_folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
