"""Arithmetic and memory of a vision tower and of a decoder, from a config alone.

2 FLOP per multiply-accumulate, gated feed-forward (three matrices) in the language model and a plain one in the tower,
causal attention (half of the square; torch's `FlopCounterMode` counts all of it). Left out: embeddings, `lm_head`,
norms, launch and host time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..models.host_vtc import grid_base_of
from ..models.tiling_vtc import ImageSizes, TileLayout


@dataclass(frozen=True)
class DecoderShape:
    """What a decoder's costs depend on.

    `query_width` = heads x head_dim, `kv_width` = key/value heads x head_dim, `ffn_width` of one expert where there
    are experts.
    """

    width: int
    num_layers: int
    query_width: int
    kv_width: int
    ffn_width: int
    vocab_size: int
    num_experts: int = 1
    experts_per_token: int = 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DecoderShape":
        """Read a `text_config` as a dictionary; Llama, Qwen, Mistral and their mixtures of experts share the names."""
        if "linear_attention" in (config.get("layer_types") or ()):
            return RecurrentShape.from_config(config)
        heads = _field(config, "num_attention_heads")
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        experts = config.get("num_experts") or config.get("num_local_experts") or 1
        return DecoderShape(
            width=_field(config, "hidden_size"),
            num_layers=_field(config, "num_hidden_layers"),
            query_width=heads * head_dim,
            kv_width=(config.get("num_key_value_heads") or heads) * head_dim,
            ffn_width=(experts > 1 and config.get("moe_intermediate_size")) or _field(config, "intermediate_size"),
            vocab_size=_field(config, "vocab_size"),
            num_experts=experts,
            experts_per_token=config.get("num_experts_per_tok") or 1,
        )

    def layer_params(self, num_experts: float) -> float:
        """Weights of one layer of which `num_experts` experts are counted."""
        attention = 2 * self.width * (self.query_width + self.kv_width)
        return attention + 3 * self.width * self.ffn_width * num_experts

    @property
    def params(self) -> int:
        """Weights without embeddings and `lm_head`."""
        return round(self.num_layers * self.layer_params(self.num_experts))

    def prefill_flops(self, num_tokens: int) -> float:
        """FLOPs of one prompt."""
        linear = 2 * self.layer_params(self.experts_per_token) * num_tokens
        return self.num_layers * (linear + 2 * num_tokens**2 * self.query_width)

    def kv_cache_bytes(self, num_tokens: int, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values of `num_tokens` positions, all layers."""
        return 2 * self.kv_width * self.num_layers * num_tokens * bytes_per_value

    def weight_bytes(self, num_tokens: int, bytes_per_value: int = 2) -> float:
        """Bytes of weights that a step over `num_tokens` tokens reads; with experts, those expected to be hit."""
        missed = (1 - self.experts_per_token / self.num_experts) ** num_tokens
        layers = self.num_layers * self.layer_params(self.num_experts * (1 - missed))
        return bytes_per_value * (layers + self.vocab_size * self.width)


@dataclass(frozen=True)
class RecurrentShape(DecoderShape):
    """A decoder such as Qwen3.5's: `num_recurrent` of its layers are gated delta rules, the attention of the others
    has a gate as wide as its queries.

    A recurrent layer keeps a matrix of `key_dim` x `value_dim` for each of `num_heads` heads, and the last inputs of a
    convolution over `conv_width` channels. Its rule is counted as it decodes: three products with that matrix a token.
    """

    num_recurrent: int = 0
    num_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    conv_width: int = 0
    conv_kernel: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "RecurrentShape":
        plain = DecoderShape.from_config({**config, "layer_types": None})
        heads, key_dim, value_dim = (
            _field(config, f"linear_{name}") for name in ("num_value_heads", "key_head_dim", "value_head_dim")
        )
        return cls(
            **vars(plain),
            num_recurrent=config["layer_types"].count("linear_attention"),
            num_heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            conv_width=2 * _field(config, "linear_num_key_heads") * key_dim + heads * value_dim,
            conv_kernel=_field(config, "linear_conv_kernel_dim"),
        )

    @property
    def share(self) -> float:
        """Recurrent layers among all."""
        return self.num_recurrent / self.num_layers

    def layer_params(self, num_experts: float) -> float:
        """Weights of a layer, on average over both kinds."""
        full = super().layer_params(num_experts) + self.width * self.query_width
        # queries, keys and values; gate and output; two numbers for each head
        inner = self.conv_width + 2 * self.num_heads * self.value_dim + 2 * self.num_heads
        recurrent = self.width * inner + self.conv_width * self.conv_kernel
        recurrent += 3 * self.width * self.ffn_width * num_experts
        return (1 - self.share) * full + self.share * recurrent

    def prefill_flops(self, num_tokens: int) -> float:
        linear = self.num_layers * 2 * self.layer_params(self.experts_per_token) * num_tokens
        full = (self.num_layers - self.num_recurrent) * 2 * num_tokens**2 * self.query_width
        return linear + full + self.num_recurrent * 6 * self.num_heads * self.key_dim * self.value_dim * num_tokens

    def kv_cache_bytes(self, num_tokens: int, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values of `num_tokens` positions, and of the states of recurrent layers, in float32."""
        keys = 2 * self.kv_width * (self.num_layers - self.num_recurrent) * num_tokens * bytes_per_value
        state = 4 * self.num_heads * self.key_dim * self.value_dim
        return keys + self.num_recurrent * (state + bytes_per_value * self.conv_width * self.conv_kernel)


@dataclass(frozen=True)
class TowerShape:
    """What a plain ViT's costs depend on.

    `num_layers` up to the one whose features are read, `patch_values` = colours x pixels of a patch.
    """

    width: int
    num_layers: int
    ffn_width: int
    num_patches: int
    patch_values: int
    num_class_tokens: int = 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any], feature_layer: int = -1) -> "TowerShape":
        """Read a `vision_config` as a dictionary; `feature_layer` as in `VtcConfig.vision_feature_layer`."""
        layers = _field(config, "num_hidden_layers")
        read = layers if feature_layer == -1 else feature_layer % (layers + 1)
        patch = side_of(_field(config, "patch_size"))
        return cls(
            width=_field(config, "hidden_size"),
            num_layers=read,
            ffn_width=_field(config, "intermediate_size"),
            num_patches=(side_of(_field(config, "image_size")) // patch) ** 2,
            patch_values=(config.get("num_channels") or 3) * patch**2,
            num_class_tokens=int(config.get("model_type") != "siglip_vision_model"),
        )

    def flops(self) -> float:
        """FLOPs of one tile, its class token and the embedding of its patches included."""
        num_tokens = self.num_patches + self.num_class_tokens
        params = 4 * self.width**2 + 2 * self.width * self.ffn_width
        layers = self.num_layers * (2 * params * num_tokens + 4 * num_tokens**2 * self.width)
        return layers + linear_flops(self.num_patches, self.patch_values, self.width)


@dataclass(frozen=True)
class ConvTowerShape:
    """What a ConvNeXt's costs depend on; `image_size` is the (height, width) in pixels that it sees."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    patch_size: int
    image_size: tuple[int, int]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], image_size: tuple[int, int] | None = None) -> "ConvTowerShape":
        """Read a `vision_config` as a dictionary; without `image_size` the square that it names."""
        if image_size is None:
            image_size = (side_of(_field(config, "image_size")),) * 2
        stages = zip(_field(config, "depths"), _field(config, "hidden_sizes"), strict=True)
        depths, widths = zip(*stages)
        return cls(depths, widths, _field(config, "patch_size"), image_size)

    @property
    def width(self) -> int:
        return self.widths[-1]

    def _grid(self, stage: int) -> int:
        """Pixels of the map of a stage; what does not fill a window is dropped."""
        height, width = (side // (self.patch_size << stage) for side in self.image_size)
        return height * width

    @property
    def num_patches(self) -> int:
        """Features of an image: pixels of the last map."""
        return self._grid(len(self.depths) - 1)

    def flops(self) -> float:
        """FLOPs of one image: stem, downsampling by 2 x 2, and blocks of a 7 x 7 depthwise and two linear layers."""
        total = self._grid(0) * 3 * self.patch_size**2 * self.widths[0]
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths)):
            if stage > 0:
                total += self._grid(stage) * 4 * self.widths[stage - 1] * width
            total += self._grid(stage) * depth * (49 * width + 8 * width**2)
        return 2.0 * total


@dataclass(frozen=True)
class GridTowerShape:
    """What the costs of a tower of Qwen2.5-VL or Qwen3-VL depend on, its connectors included.

    `ffn_matrices` of a layer; `num_full` of its layers attend over the whole image, the others within windows of
    `window` x `window` visual tokens; `num_connectors` that fold `merge` x `merge` patches into one visual token of
    `token_width`; `grid` is (rows, columns) of visual tokens.
    """

    width: int
    num_layers: int
    ffn_width: int
    ffn_matrices: int
    num_full: int
    window: int
    merge: int
    patch_values: int
    token_width: int
    num_connectors: int
    grid: tuple[int, int]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], image_size: tuple[int, int] | None = None) -> "GridTowerShape":
        """Read a `vision_config` as a dictionary; without the `image_size` that the tower sees, of one token."""
        patch, merge, layers = (_field(config, name) for name in ("patch_size", "spatial_merge_size", "depth"))
        stride = patch * merge
        height, width = image_size or (stride, stride)
        windowed = config.get("window_size") is not None
        return cls(
            width=_field(config, "hidden_size"),
            num_layers=layers,
            ffn_width=_field(config, "intermediate_size"),
            # only the tower with windows has a gate
            ffn_matrices=3 if windowed else 2,
            num_full=len(config["fullatt_block_indexes"]) if windowed else layers,
            window=config["window_size"] // stride if windowed else 1,
            merge=merge,
            patch_values=(config.get("in_channels") or 3) * _field(config, "temporal_patch_size") * patch**2,
            token_width=_field(config, "out_hidden_size"),
            num_connectors=1 + len(config.get("deepstack_visual_indexes") or ()),
            grid=(height // stride, width // stride),
        )

    @property
    def num_patches(self) -> int:
        """Features of an image: its visual tokens."""
        return self.grid[0] * self.grid[1]

    def flops(self) -> float:
        """FLOPs of one image up to its connectors, the embedding of its patches included."""
        num_tokens = self.num_patches * self.merge**2
        params = 4 * self.width**2 + self.ffn_matrices * self.width * self.ffn_width
        rows, columns = (sum(len(part) ** 2 for part in _cut(side, self.window)) for side in self.grid)
        pairs = self.num_full * num_tokens**2
        pairs += (self.num_layers - self.num_full) * rows * columns * self.merge**4
        linear = self.num_layers * 2 * params * num_tokens
        return linear + 4 * pairs * self.width + linear_flops(num_tokens, self.patch_values, self.width)

    def connector_flops(self, num_tokens: int) -> float:
        """FLOPs of all connectors for this many visual tokens."""
        folded = self.merge**2 * self.width
        return self.num_connectors * linear_flops(num_tokens, folded, folded, self.token_width)


def _cut(length: int, size: int) -> list[range]:
    return [range(length)[start : start + size] for start in range(0, length, size)]


@dataclass(frozen=True)
class Workload:
    """One image and the model that sees it: what counts and costs depend on.

    Args:
        config (`VtcConfig` or another config): of the model; of a model of another package as it is.
        image_size (`tuple[int, int]`): (height, width) in pixels.
        seen_size (`tuple[int, int]`): the same as a tower without a fixed size sees it.
        num_tiles (`int`): tiles of the image, the thumbnail included.
        layout (`TileLayout`, *optional*): how it is cut; None where only `num_tiles` is known.
        wants_all (`bool`): whether a word such as `"full"` says that every token stays, so that nothing that chooses
            or groups runs.
    """

    config: Any
    text: DecoderShape
    tower: TowerShape | ConvTowerShape | GridTowerShape
    image_size: tuple[int, int]
    seen_size: tuple[int, int]
    num_tiles: int
    layout: TileLayout | None = None
    wants_all: bool = False

    @property
    def num_features(self) -> int:
        """Features of all tiles behind the connector's pixel shuffle: visual tokens but for newlines of a map."""
        if isinstance(self.tower, GridTowerShape):
            return self.tower.num_patches
        return self.num_tiles * self.config.image_seq_length

    def sizes(self) -> ImageSizes:
        """The image as a config of ours counts its tokens.

        Raises:
            ValueError: it is not known how the image is cut.
        """
        if not self.config.sees_tiles:
            return self.config.sizes_of(None, torch.tensor([self.seen_size]))
        num_tiles = torch.tensor([self.num_tiles])
        if self.config.mm_patch_merge_type == "flat":
            return ImageSizes(num_tiles, None, None)
        if self.layout is None:
            raise ValueError(
                "`num_tiles` alone does not tell the token count of a model that joins tiles to a map. Give "
                "`image_size`, and `image_processor` if it cuts images otherwise than the config says."
            )
        return self.config.joined_sizes(num_tiles, torch.tensor([self.layout.image_size]))

    def projector_flops(self, num_tokens: int) -> float:
        """FLOPs of the two linear layers of LLaVA and InternVL, or of a tower's connectors, for a number of tokens."""
        if isinstance(self.tower, GridTowerShape):
            return self.tower.connector_flops(num_tokens)
        fold = self.config.shuffle_factor**2
        return linear_flops(num_tokens, fold * self.tower.width, self.text.width, self.text.width)


def tower_of(
    config: Mapping[str, Any], image_size: tuple[int, int] | None = None
) -> TowerShape | ConvTowerShape | GridTowerShape:
    """The tower of a model; `image_size` is what a tower without a fixed size sees of an image."""
    vision = sub_config(config, "vision_config")
    if grid_base_of(str(vision.get("model_type"))) is not None:
        return GridTowerShape.from_config(vision, image_size)
    if "depths" in vision:
        return ConvTowerShape.from_config(vision, image_size)
    layer = config.get("vision_feature_layer", config.get("select_layer", -1))
    if isinstance(layer, int):
        return TowerShape.from_config(vision, layer)
    # of several, counted from either end, the tower runs to the last one
    towers = [TowerShape.from_config(vision, each) for each in layer]
    return max(towers, key=lambda tower: tower.num_layers)


def decoder_of(config: Mapping[str, Any]) -> DecoderShape:
    """The decoder of a model."""
    return DecoderShape.from_config(sub_config(config, "text_config", "llm_config"))


def linear_flops(num_tokens: int, *widths: int) -> float:
    """FLOPs of a stack of linear layers of these widths, the input's first."""
    return 2.0 * num_tokens * sum(fan_in * fan_out for fan_in, fan_out in zip(widths, widths[1:]))


PRINTED_CONVENTIONS = {"fastv": 2, "pyramiddrop": 3}
"""Matrices of a feed-forward that papers on token pruning count in a prefill, by the paper that began it.

All count multiply-accumulates, attention as a whole square. FastV (arXiv 2403.06764), which DivPrune, HoliTom and
DyCoke follow: `4 n d^2 + 2 n^2 d + 2 n d m` per layer, two matrices although Llama has three. PyramidDrop (arXiv
2410.17247) and papers after it: `4 n d^2 + 2 n^2 d + 3 n d m`.
"""


def printed_flops(shape: DecoderShape, num_tokens: int, convention: str = "fastv") -> float:
    """What papers on token pruning print as FLOPs of a prefill.

    Args:
        convention (`str`): one of `PRINTED_CONVENTIONS`.

    Raises:
        ValueError: there is no convention of that name.
    """
    if convention not in PRINTED_CONVENTIONS:
        raise ValueError(f"`convention` must be one of {', '.join(PRINTED_CONVENTIONS)}, got {convention!r}.")
    width, matrices = shape.width, PRINTED_CONVENTIONS[convention]
    feed_forward = matrices * num_tokens * width * shape.ffn_width
    return shape.num_layers * (4 * num_tokens * width**2 + 2 * num_tokens**2 * width + feed_forward)


def config_dict(source: PreTrainedModel | PretrainedConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `config.json` from whatever holds one."""
    if isinstance(source, PreTrainedModel):
        source = source.config
    if isinstance(source, PretrainedConfig):
        return source.to_dict()
    if isinstance(source, Mapping):
        return dict(source)
    raise ValueError(
        f"`model_or_config` must be a model, a config or a dictionary, got {type(source).__name__}. Load a path by "
        "`AutoConfig.from_pretrained`."
    )


def sub_config(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The first of these sub-configs that is there."""
    for name in names:
        if config.get(name):
            return config[name]
    raise ValueError(
        f"The config needs {' or '.join(f'`{name}`' for name in names)}, got {sorted(config)[:12]}. Give the config "
        "of a vision-language model."
    )


def side_of(size: int | Sequence[int]) -> int:
    """The side of a square in pixels, which configs write as a number or as a pair."""
    return size if isinstance(size, int) else int(size[0])


def _field(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise ValueError(
            f"The sub-config of type {config.get('model_type')!r} has no `{name}`, so its costs are unknown. Only "
            "plain ViTs, ConvNeXts and decoders of the Llama, Qwen and Mistral families can be estimated."
        )
    return config[name]
