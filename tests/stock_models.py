"""Uncompressed models of transformers with the weights of ours, which tests hold every method against."""

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

# an id that no random text has; before an image of Qwen's bases, which find images by it on 4.57
VISION_START = 300


def stock_internvl(model):
    """`InternVLForConditionalGeneration` with the weights that ViCO shares with it."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        vision_config=model.config.vision_config.to_dict(),
        text_config=model.config.text_config.to_dict(),
        image_token_id=model.config.image_token_id,
        image_seq_length=model.config.image_seq_length,
        downsample_ratio=model.config.downsample_ratio,
        tie_word_embeddings=model.config.tie_word_embeddings,
    )
    stock = InternVLForConditionalGeneration(config).eval()
    loaded = stock.load_state_dict(model.state_dict(), strict=False)
    assert not loaded.missing_keys
    return stock


def stock_llava(model):
    """`LlavaForConditionalGeneration` with the weights that a model of LLaVA's shape shares with it."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    ours = model.config
    config = LlavaConfig(
        vision_config=ours.vision_config.to_dict(),
        text_config=ours.text_config.to_dict(),
        image_token_index=ours.image_token_id,
        image_seq_length=ours.image_seq_length,
        vision_feature_layer=ours.vision_feature_layer,
        vision_feature_select_strategy=ours.vision_feature_select_strategy,
        projector_hidden_act=ours.projector_hidden_act,
        tie_word_embeddings=ours.tie_word_embeddings,
    )
    return _with_weights_of(model, LlavaForConditionalGeneration(config).eval())


def stock_llava_next(model):
    """`LlavaNextForConditionalGeneration` with the weights that AVG-LLaVA shares with it."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    ours = model.config
    config = LlavaNextConfig(
        vision_config=ours.vision_config.to_dict(),
        text_config=ours.text_config.to_dict(),
        image_token_index=ours.image_token_id,
        image_seq_length=ours.image_seq_length,
        image_grid_pinpoints=ours.image_grid_pinpoints,
        vision_feature_layer=ours.vision_feature_layer,
        vision_feature_select_strategy=ours.vision_feature_select_strategy,
        projector_hidden_act=ours.projector_hidden_act,
        tie_word_embeddings=ours.tie_word_embeddings,
    )
    return _with_weights_of(model, LlavaNextForConditionalGeneration(config).eval())


def _with_weights_of(model, stock):
    # CLIP and SigLIP of transformers 4.57 hold the tower in another module
    inner = "model.vision_tower.vision_model."
    nested = any(name.startswith(inner) for name in stock.state_dict())
    state = {
        name.replace("model.vision_tower.", inner) if nested else name: tensor
        for name, tensor in model.state_dict().items()
    }
    assert not stock.load_state_dict(state, strict=False).missing_keys
    return stock


def stock_onevision(model):
    """`LlavaOnevisionForConditionalGeneration` with the weights that a model of its shape shares with it."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    ours = model.config
    config = LlavaOnevisionConfig(
        vision_config=ours.vision_config.to_dict(),
        text_config=ours.text_config.to_dict(),
        image_token_index=ours.image_token_id,
        # no token of a text
        video_token_index=ours.text_config.vocab_size - 1,
        image_grid_pinpoints=ours.image_grid_pinpoints,
        vision_aspect_ratio=f"anyres_max_{ours.max_map_tiles}",
        vision_feature_layer=ours.vision_feature_layer,
        vision_feature_select_strategy=ours.vision_feature_select_strategy,
        projector_hidden_act=ours.projector_hidden_act,
        tie_word_embeddings=ours.tie_word_embeddings,
    )
    return _with_weights_of(model, LlavaOnevisionForConditionalGeneration(config).eval())


def stock_qwen(model):
    """The stock model of a Qwen base with all weights, whose tower has another name there."""
    ours = model.config
    videos = {} if ours.video_token_id is None else {"video_token_id": ours.video_token_id}
    config = CONFIG_MAPPING[ours.grid_base](
        vision_config=ours.vision_config.to_dict(),
        text_config=ours.text_config.to_dict(),
        image_token_id=ours.image_token_id,
        **videos,
        vision_start_token_id=VISION_START,
        tie_word_embeddings=ours.tie_word_embeddings,
    )
    stock = AutoModelForImageTextToText.from_config(config).eval()
    state = {
        name.replace("model.vision_tower.", "model.visual."): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("model.router.")
    }
    stock.load_state_dict(state)
    return stock


class PlainConvllava(nn.Module):
    """`ConvNextModel` on one image after the other, LLaVA's projector, and the stock language model, put together."""

    def __init__(self, model):
        super().__init__()
        self.image_token_id = model.config.image_token_id
        self.tower = AutoModel.from_config(model.config.vision_config)
        missing = self.tower.load_state_dict(model.model.vision_tower.state_dict(), strict=False).missing_keys
        # of the pooled vector, which nobody reads
        assert missing == ["layernorm.weight", "layernorm.bias"]
        connector = model.model.multi_modal_projector
        self.projector = nn.Sequential(connector.linear_1, nn.GELU(), connector.linear_2)
        self.language_model = AutoModelForCausalLM.from_config(model.config.text_config)
        decoder = model.model.language_model.state_dict(prefix="model.")
        self.language_model.load_state_dict(decoder | model.lm_head.state_dict(prefix="lm_head."))

    def _embeds(self, input_ids, pixel_values, image_sizes):
        embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        features = []
        for pixels, (height, width) in zip(pixel_values, image_sizes.tolist()):
            maps = self.tower(pixels[None, :, :height, :width].contiguous()).last_hidden_state
            features.append(maps[0].flatten(1).T)
        embeds[input_ids == self.image_token_id] = self.projector(torch.cat(features))
        return embeds

    def forward(self, input_ids, attention_mask, pixel_values, image_sizes):
        embeds = self._embeds(input_ids, pixel_values, image_sizes)
        return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, pixel_values, image_sizes, **kwargs):
        embeds = self._embeds(input_ids, pixel_values, image_sizes)
        new = self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
        return torch.cat([input_ids, new], dim=1)
