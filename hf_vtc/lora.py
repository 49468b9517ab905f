"""LoRA for every method: which layers of the language model get adapters, and which compressor parts train whole.

What stands here are names. They are the same for models of the installed package and of remote code, so an adapter
that was trained on the one loads onto the other.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from .methods import record_of

_DECODER = "model.language_model."


def compressor_modules(config: PretrainedConfig) -> list[str]:
    """Names of the modules between pixels and language model that make a method what it is.

    Connectors and router, semantic tokens and grouping layer, and for ConvLLaVA the last stage of the tower.

    Args:
        config (`PretrainedConfig`): of a model of hf_vtc.

    Raises:
        ValueError: the model is none of ours, or the record of its method does not say.
    """
    return list(record_of(config).need("compressor", "`hf_vtc.lora`")(config))


def default_lora_config(
    model: PreTrainedModel,
    r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.05,
    target_modules: Sequence[str] | None = None,
    compressor: Sequence[str] | None = None,
    **kwargs: Any,
) -> LoraConfig:
    """LoRA on the language model, and the compressor trained whole and saved beside it.

    Adapters never reach the vision tower, connectors or router, whose layers often have the names of the decoder's.
    The bare parameter `image_newline` of AVG-LLaVA and LLaVolta stays as it is: PEFT trains modules.

    The loss of the language model has no gradient for the routers of ViCO and AVG-LLaVA. They are frozen, so that a
    step runs them only where they must choose; `VicoRouterTrainer` and `AvgLlavaRouterTrainer` teach them.

    Args:
        model (`PreTrainedModel`): with a language modelling head, from the installed package or remote code.
        r (`int`): rank of the adapters.
        lora_alpha (`int`): scale of the adapters, times `r`.
        lora_dropout (`float`): before the adapters, in training.
        target_modules (`Sequence[str]`, *optional*): last parts of the names of the language model's layers that get
            adapters, such as `["q_proj", "v_proj"]`. Default: all linear layers.
        compressor (`Sequence[str]`, *optional*): which of `compressor_modules(model.config)` train, `()` for none.
            Default: all but routers.
        kwargs: further fields of `LoraConfig`.

    Raises:
        ValueError: a name fits nothing in the model.
    """
    own = compressor_modules(model.config)
    untaught = record_of(model.config).untaught
    compressor = [name for name in own if name not in untaught] if compressor is None else list(compressor)
    if not set(compressor) <= set(own):
        raise ValueError(f"`compressor` must be some of {', '.join(own)}, got {', '.join(compressor)}.")
    layers = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name.startswith(_DECODER) and isinstance(module, nn.Linear)
    }
    if not layers:
        raise ValueError(f"`model` must have linear layers in `{_DECODER[:-1]}`: give the model with its head.")
    targets = layers if target_modules is None else set(target_modules)
    if not targets or not targets <= layers:
        raise ValueError(f"`target_modules` must be some of {', '.join(sorted(layers))}, got {target_modules}.")
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=rf"{re.escape(_DECODER)}.*\.(?:{'|'.join(map(re.escape, sorted(targets)))})",
        modules_to_save=compressor or None,
        # without it the adapter would remember the path of the model's source file
        task_type="CAUSAL_LM",
        **kwargs,
    )


def full_precision_modules(config: PretrainedConfig) -> list[str]:
    """Names of the modules that quantisation must leave alone: all but the decoder.

    Routers compare numbers that lie close together; the connectors are trained whole; the tower is a small part of the
    memory.
    """
    return ["model.vision_tower", *compressor_modules(config), "lm_head"]


def quantization_config(model_or_config: PreTrainedModel | PretrainedConfig, **kwargs: Any) -> BitsAndBytesConfig:
    """How to load a model for QLoRA: the decoder in 4 bits (NF4, double quantisation), the rest as it is.

    Pass it to `from_pretrained(..., quantization_config=...)`, which needs a GPU and `pip install bitsandbytes`.

    Args:
        model_or_config: of a model of hf_vtc, such as `AutoConfig.from_pretrained(path)` gives.
        kwargs: fields of `BitsAndBytesConfig` that replace those, such as `load_in_8bit=True`. Names in
            `llm_int8_skip_modules` are added to `full_precision_modules`.
    """
    is_model = isinstance(model_or_config, PreTrainedModel)
    config = model_or_config.config if is_model else model_or_config
    skipped = full_precision_modules(config) + list(kwargs.pop("llm_int8_skip_modules", None) or [])
    fields = (
        {}
        if kwargs.get("load_in_8bit")
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    )
    return BitsAndBytesConfig(llm_int8_skip_modules=skipped, **{**fields, **kwargs})
