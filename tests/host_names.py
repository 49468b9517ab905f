"""What this package leans on in the inside of its hosts, beyond what an import statement would miss loudly.

A name stands here with the one file, or the few, that may use it, and with the versions of the host on which it was
seen. `test_host_names.py` looks each up in what is installed, and reads the source for private names that are missing
here. Names of older hosts say with `until` in which release they were last needed.
"""

from typing import NamedTuple

WINDOW = "transformers 4.57.6 to 5.24.0"


class HostName(NamedTuple):
    """An attribute or parameter: `"module:Class.attribute"`, `"module:function(parameter)"`, or a path below one of
    the tiny models of the test, such as `"decoder:layers.0.self_attn"`."""

    name: str
    files: tuple[str, ...]
    seen: str = WINDOW
    until: tuple[int, int] | None = None
    since: tuple[int, int] | None = None


def _rows(files: str, *names: str, **given) -> list[HostName]:
    return [HostName(name, tuple(f"hf_vtc/{file}" for file in files.split()), **given) for name in names]


_PRETRAINED = "transformers:PreTrainedModel."
_GENERATION = "transformers:GenerationMixin."
_TRAINER = "transformers:Trainer."
_PROCESSOR = "transformers:ProcessorMixin."
# have parameters that are not part of a standard layer, and modules that do not split
_METHODS_WITH_PARTS = " ".join(f"models/modeling_{name}.py" for name in ("vico", "avg_llava", "convllava", "vistog"))

HOST_NAMES = [
    # flags and hooks that a model states, and that the host would overlook under another name
    *_rows(
        "models/vision_vtc.py",
        f"{_PRETRAINED}_skip_keys_device_placement",
        f"{_PRETRAINED}_supports_sdpa",
        f"{_PRETRAINED}_supports_flash_attn",
        f"{_PRETRAINED}_supports_flex_attn",
        f"{_PRETRAINED}_supports_attention_backend",
        f"{_PRETRAINED}_can_compile_fullgraph",
    ),
    *_rows(
        "models/vision_vtc.py",
        f"{_PRETRAINED}_can_set_attn_implementation",
        seen="transformers 5.0 to 5.24.0",
        since=(5, 0),
    ),
    *_rows(f"models/vision_vtc.py {_METHODS_WITH_PARTS}", f"{_PRETRAINED}_no_split_modules"),
    *_rows(f"models/vision_vtc.py models/head_vtc.py {_METHODS_WITH_PARTS}", f"{_PRETRAINED}_init_weights"),
    *_rows("models/head_vtc.py", f"{_PRETRAINED}_tied_weights_keys"),
    *_rows("models/host_vtc.py", "transformers:LlamaForCausalLM._tp_plan"),
    *_rows("models/modeling_convllava.py", "encoder:_gradient_checkpointing_func"),
    # generation
    *_rows(
        "models/generation_vtc.py",
        f"{_GENERATION}prepare_inputs_for_generation(inputs_embeds)",
        f"{_GENERATION}prepare_inputs_for_generation(attention_mask)",
        "transformers:GenerationConfig().prefill_chunk_size",
        "transformers:GenerationConfig().max_length",
        "transformers:GenerationConfig().max_new_tokens",
        "transformers.generation.streamers:BaseStreamer.put",
        "transformers.generation.streamers:BaseStreamer.end",
    ),
    *_rows(
        "models/generation_vtc.py",
        f"{_GENERATION}prepare_inputs_for_generation(is_first_iteration)",
        seen="transformers 5.0 to 5.24.0",
        since=(5, 0),
    ),
    *_rows("models/generation_vtc.py", f"{_GENERATION}prepare_inputs_for_generation(cache_position)", until=(4, 57)),
    # decoders, layer by layer
    *_rows(
        "models/host_decoder_vtc.py report/measured.py",
        "decoder:layers.0",
        "decoder:norm",
    ),
    *_rows(
        "models/host_decoder_vtc.py",
        "decoder:rotary_emb",
        "decoder:gradient_checkpointing",
        "layered_decoder:config.layer_types",
        "decoder:layers.0.self_attn.q_proj",
        "decoder:layers.0.self_attn.k_proj",
        "decoder:layers.0.self_attn.head_dim",
        "decoder:layers.0.self_attn.scaling",
        "decoder:layers.0.self_attn.num_key_value_groups",
        "transformers:DynamicCache().layers",
        "transformers:DynamicCache().is_compileable",
        "transformers.cache_utils:DynamicLayer.crop",
        "transformers.cache_utils:DynamicLayer.get_seq_length",
    ),
    *_rows(
        "models/host_decoder_vtc.py",
        "transformers.masking_utils:create_masks_for_generate(config)",
        "transformers.masking_utils:create_masks_for_generate(attention_mask)",
    ),
    # towers, part by part
    *_rows("models/host_tower_vtc.py", "tower:embeddings"),
    *_rows("models/host_tower_vtc.py", "tower:encoder", "clip_tower:pre_layrnorm", "clip_tower:post_layernorm"),
    *_rows("models/host_tower_vtc.py", "siglip_tower:post_layernorm", "internvl_tower:layernorm"),
    *_rows(
        "models/host_tower_vtc.py",
        "internvl_layer:lambda_1",
        "internvl_layer:lambda_2",
        "internvl_layer:layernorm_before",
        "internvl_layer:layernorm_after",
        "internvl_layer:attention",
        "clip_layer:layer_norm1",
        "clip_layer:layer_norm2",
        "clip_layer:self_attn",
        "clip_layer:mlp",
        "siglip_layer:layer_norm1",
        "siglip_layer:self_attn",
        "internvl_layer:attention.scale",
        "internvl_layer:attention.config._attn_implementation",
        "clip_layer:self_attn.scale",
        "clip_layer:self_attn.config._attn_implementation",
        "siglip_layer:self_attn.scale",
        "siglip_layer:self_attn.config._attn_implementation",
        "transformers.models.clip.modeling_clip:eager_attention_forward(scaling)",
        "transformers.models.siglip.modeling_siglip:eager_attention_forward(scaling)",
        "transformers.models.internvl.modeling_internvl:eager_attention_forward(scaling)",
        "clip_layer:gradient_checkpointing",
    ),
    *_rows("models/host_tower_vtc.py", "encoder:_gradient_checkpointing_func"),
    *_rows(
        "models/host_tower_vtc.py",
        "hooked_module:_hf_hook.pre_forward",
        "hooked_module:_hf_hook.post_forward",
        seen="accelerate 1.1 to 1.15",
    ),
    # processors: what the backports for older versions call
    *_rows("models/host_processor_vtc.py", f"{_PROCESSOR}_merge_kwargs", f"{_PROCESSOR}_check_special_mm_tokens"),
    *_rows("models/host_processor_vtc.py", f"{_PROCESSOR}attributes", until=(4, 57)),
    *_rows(
        "models/processing_vtc.py",
        f"{_PROCESSOR}prepare_inputs_layout",
        f"{_PROCESSOR}validate_inputs",
        seen="transformers 5.10 to 5.24.0",
        since=(5, 10),
    ),
    *_rows(
        "models/host_processor_vtc.py",
        f"{_PROCESSOR}_process_images",
        seen="transformers 5.10 to 5.24.0",
        since=(5, 10),
    ),
    # auto classes
    *_rows("auto.py", "transformers:AutoModelForImageTextToText._model_mapping"),
    *_rows(
        "methods/record.py",
        "transformers.models.auto.image_processing_auto:AutoImageProcessor.register(slow_image_processor_class)",
    ),
    # training
    *_rows("trainers/sharding.py trainers/avg_llava.py", f"{_TRAINER}_prepare_inputs"),
    *_rows(
        "trainers/sharding.py",
        "accelerate:FullyShardedDataParallelPlugin.__init__(transformer_cls_names_to_wrap)",
    ),
    *_rows(
        "trainers/checkpoints.py",
        f"{_TRAINER}_save_checkpoint",
        f"{_TRAINER}_get_output_dir",
        f"{_TRAINER}save_model(_internal_call)",
    ),
    *_rows(
        "trainers/avg_llava.py",
        "accelerate.state:GradientState._set_sync_gradients",
        seen="accelerate 1.1 to 1.15",
    ),
    # conversion
    *_rows("convert/__init__.py", "transformers:PreTrainedModel.from_pretrained(config)"),
    *_rows("convert/__init__.py convert/plan.py report/measured.py models/host_vtc.py", "config:_attn_implementation"),
    # torch
    *_rows(
        "models/modeling_vico.py",
        "torch.nn:Module._load_from_state_dict(strict)",
        "torch.nn:Module()._buffers",
        seen="torch 2.10 to 2.13",
    ),
    *_rows("models/padding_vtc.py", "torch:_C.DisableTorchFunctionSubclass", seen="torch 2.10 to 2.13"),
    *_rows(
        "models/kernels_vtc.py",
        "torch:_C._dispatch_has_kernel_for_dispatch_key",
        "torch:ops.aten._softmax_backward_data",
        seen="torch 2.10 to 2.13",
    ),
]

# private words that are not attributes of a host: names of ours in text, and keys of files that a host has written
OWN_OR_IN_FILES = {
    "_replace": "of named tuples, public in spite of its name",
    "_attn_implementation_autoset": "a key of old config files",
    "_vision": "how names of towers end in transformers 5",
    "_name_or_path": "a key of config files",
    "_id": "a field of records",
    "_from_model_config": "a key of generation_config.json",
}
