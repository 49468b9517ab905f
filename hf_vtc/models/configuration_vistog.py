"""Configuration of VisToG (visual token grouping)."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from .configuration_vtc import VtcConfig
from .host_vtc import GRID_BASES
from .tiling_vtc import ImageSizes

# towers whose layers the semantic tokens can run beside
TOWER_TYPES = ("clip_vision_model", "siglip_vision_model", "internvl_vision")


class VistogConfig(VtcConfig):
    """Semantic tokens that run beside the tower, and a grouping layer that merges patches into them.

    The paper's code and numbers are not public: every default below is ours.

    Args:
        num_semantic_tokens (`int`): G, visual tokens of a grouped tile; below the number of patches of a tile.
        semantic_init (`str`): `"normal"`: semantic tokens start as N(0, 0.02^2). `"cls"`: they are the tower's class
            token plus learned offsets that start so; not for towers without one (SigLIP).
        semantic_self_attention (`bool`): whether semantic tokens attend to each other, or each to the image and
            itself alone.
        similarity (`str`): of semantic token and patch. `"dot"`: scaled dot product of projections. `"cosine"`: cosine
            of the projections times a learned factor.
        hard (`bool`): `True`: each patch joins one group (straight-through gradient). `False`: it is shared out by the
            softmax over groups.
        gumbel_noise (`bool`): add Gumbel(0, 1) noise to the similarities in training.
        tau (`float`): temperature of the softmax over groups, above 0.
        assign_eps (`float`): added to the size of a group when its patches are averaged; 1.0 is GroupViT's value.
        empty_assign_eps (`float`): the same for a group without patches, whose mean is 0 with any value; but the
            straight-through gradient of its similarities is divided by it, and explodes with a small one.
        merge (`str`): `"projected"`: semantic token plus projected mean of projected patches. `"mean"`: mean of the
            patches alone, the semantic token where a group is empty.
        mlp (`bool`): a residual MLP after the merge, as in GroupViT.
        stage1_grouping (`bool`): whether training stage 1 groups. `False`: it trains the projector on single patches.
        vision_feature_layer (`int`): hidden state of the tower that is grouped; LLaVA reads -2.

    The other fields are those of `VtcConfig`; `downsample_ratio` is 1, since groups have no grid.

    Raises:
        ValueError: a field is outside of its range, or the tower is of another type than `TOWER_TYPES`.
    """

    model_type = "vtc_vistog"
    refused_bases = dict.fromkeys(
        ("llava_next", "llava_onevision"), "tiles are joined by their grids, which semantic tokens do not have"
    ) | dict.fromkeys(
        GRID_BASES,
        "semantic tokens have no place among patches that the tower attends to by windows and merges by 2 x 2",
    )
    one_tile_per_image = True
    takes_decisions = True

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        num_semantic_tokens: int = 64,
        semantic_init: str = "normal",
        semantic_self_attention: bool = True,
        similarity: str = "dot",
        hard: bool = True,
        gumbel_noise: bool = True,
        tau: float = 1.0,
        assign_eps: float = 1e-6,
        empty_assign_eps: float = 1.0,
        merge: str = "projected",
        mlp: bool = False,
        stage1_grouping: bool = True,
        vision_feature_layer: int = -2,
        **kwargs: Any,
    ):
        self.num_semantic_tokens = num_semantic_tokens
        self.semantic_init = semantic_init
        self.semantic_self_attention = semantic_self_attention
        self.similarity = similarity
        self.hard = hard
        self.gumbel_noise = gumbel_noise
        self.tau = tau
        self.assign_eps = assign_eps
        self.empty_assign_eps = empty_assign_eps
        self.merge = merge
        self.mlp = mlp
        self.stage1_grouping = stage1_grouping
        super().__init__(vision_config, text_config, vision_feature_layer=vision_feature_layer, **kwargs)
        for name, allowed in (
            ("semantic_init", ("normal", "cls")),
            ("similarity", ("dot", "cosine")),
            ("merge", ("projected", "mean")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}.")
        for name in ("semantic_self_attention", "hard", "gumbel_noise", "mlp", "stage1_grouping"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if not tau > 0:
            raise ValueError(f"`tau` is a temperature and must be above 0, got {tau}.")
        for name in ("assign_eps", "empty_assign_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0: it keeps means finite. Got {getattr(self, name)}.")
        self._check_tower()

    def _check_tower(self) -> None:
        tower, layer = self.vision_config, self.vision_feature_layer
        if not isinstance(layer, int) or not -tower.num_hidden_layers - 1 <= layer <= tower.num_hidden_layers:
            raise ValueError(
                f"`vision_feature_layer` must be one hidden state of the tower's {tower.num_hidden_layers} layers, "
                f"from {-tower.num_hidden_layers - 1} to {tower.num_hidden_layers}, got {layer}."
            )
        has_class_token = tower.model_type != "siglip_vision_model"
        strategy = "default" if has_class_token else "full"
        if self.vision_feature_select_strategy != strategy:
            raise ValueError(
                f"`vision_feature_select_strategy` must be {strategy!r} for {tower.model_type!r}, so that patches "
                f"alone are grouped, got {self.vision_feature_select_strategy!r}."
            )
        if self.semantic_init == "cls" and not has_class_token:
            raise ValueError("`semantic_init='cls'` needs a class token, which SigLIP lacks. Use 'normal'.")

    def _tokens_per_tile(self) -> int:
        if self.vision_config.model_type not in TOWER_TYPES:
            raise ValueError(
                f"`vision_config` has `model_type` {self.vision_config.model_type!r}. Semantic tokens run beside "
                f"towers of the types {', '.join(TOWER_TYPES)}."
            )
        if self.shuffle_factor != 1:
            raise ValueError(
                f"`downsample_ratio` must be 1: groups have no grid that a pixel shuffle could fold. Got "
                f"{self.downsample_ratio}."
            )
        num_patches = super()._tokens_per_tile()
        if not 1 <= self.num_semantic_tokens < num_patches:
            raise ValueError(
                f"`num_semantic_tokens` must be at least 1 and below the {num_patches} patches of a tile, got "
                f"{self.num_semantic_tokens}."
            )
        return num_patches

    def levels(self, sizes: ImageSizes) -> list[Sequence[int]]:
        """All patches of an image, or the groups of each of its tiles."""
        return [
            (tiles * self.image_seq_length, tiles * self.num_semantic_tokens) for tiles in sizes.num_tiles.tolist()
        ]

    def own_level(self, counts: Sequence[int], image_idx: int = 0) -> int:
        return 1
