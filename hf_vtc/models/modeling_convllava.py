"""ConvLLaVA: a hierarchical encoder in place of the ViT, a ConvNeXt whose fifth stage compresses the image.

Paper: "ConvLLaVA: Hierarchical Backbones as Visual Encoder for Large Multimodal Models" (arXiv 2405.15738). Upstream:
alibaba/conv-llava@3e7ae57 (Apache-2.0), whose tower is the `ConvNextModel` of transformers with one more stage.
Weights (`ConvLLaVA/ConvLLaVA-*`): Llama-2 community licence of their language model, Vicuna-7B v1.5.

As upstream: the raw map of the last stage goes row by row through LLaVA's projector, without a final norm, a newline
token or a thumbnail; every LayerNorm has eps 1e-6, whatever the configuration says. Parameters have the names of
`ConvNextModel`, whose pooled `layernorm` is not used and not here.

Ours: images of different sizes in one batch, each encoded at its own size (upstream stops at a list of images), as
many at a time as are fast and bounded in memory; gradient checkpointing by stage; a layer scale that can be folded
into weights for inference. Where we differ: a text-only row takes no image of the batch.
"""

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from .configuration_convllava import ConvllavaConfig
from .head_vtc import VtcForConditionalGeneration
from .layout_vtc import Layout, layout_of_images
from .modeling_vtc import VtcModel
from .prompt_vtc import VisionInputs
from .vision_vtc import VtcVisionHalf

# hard-coded upstream; `layer_norm_eps` of published configurations (1e-12) concerns a norm that is not used
LAYER_NORM_EPS = 1e-6
# pixels that run through a stage at a time where no graph is built. A block's widest map has four times its channels:
# what leaves the caches of a CPU is slow, and eight images of 768 x 768 one by one took 0.63 of their time together,
# though images of 256 x 256 are faster in fours than alone. Elsewhere many pixels keep a device busy, and the bound is
# for memory: a choice, not measured
_PIXELS_AT_ONCE_ON_CPU, _PIXELS_AT_ONCE = 512 * 512, 8 * 768 * 768


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps `(B, C, h, w)`, pixel by pixel; the result is in channels-last memory."""

    def __init__(self, width: int):
        super().__init__(width, eps=LAYER_NORM_EPS)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextStem(nn.Module):
    """Patches of `patch_size` pixels to maps of the first stage's width, for all sizes of a batch at once."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        patch, width = config.patch_size, config.hidden_sizes[0]
        self.patch_embeddings = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        self.layernorm = ChannelLayerNorm(width)

    def forward(self, *batches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One `(B, 3, H, W)` batch of pixels per size, to `(B, C, H // patch, W // patch)` each."""
        return tuple(self.layernorm(self.patch_embeddings(pixel_values)) for pixel_values in batches)


class DropPath(nn.Dropout):
    """Leaves the branch of a whole sample out, with probability `p`, in training."""

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if self.p == 0.0 or not self.training:
            return branch
        kept = 1.0 - self.p
        draw = torch.empty(branch.shape[0], 1, 1, 1, dtype=branch.dtype, device=branch.device).bernoulli_(kept)
        return branch * (draw / kept)


class ConvNextLayer(nn.Module):
    """One residual block: 7 x 7 depthwise convolution, LayerNorm, two pointwise layers, scale per channel."""

    def __init__(self, config: PretrainedConfig, width: int, drop_path: float):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, kernel_size=7, padding=3, groups=width)
        self.layernorm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.act = ACT2FN[config.hidden_act]
        self.pwconv2 = nn.Linear(4 * width, width)
        scale = config.layer_scale_init_value
        self.layer_scale_parameter = nn.Parameter(torch.full((width,), float(scale))) if scale > 0 else None
        self.drop_path = DropPath(drop_path)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """`(B, C, h, w)` to the same shape."""
        # one name for all, so that each step frees what the one before it read: the wide ones are the peak of memory
        branch = self.layernorm(self.dwconv(maps).permute(0, 2, 3, 1))  # (B, h, w, C)
        # pixels in a row: not every linear layer that may stand here takes more than three axes
        branch = branch.flatten(1, 2)
        branch = self.pwconv1(branch)
        branch = self.act(branch)
        branch = self.pwconv2(branch).unflatten(1, maps.shape[2:])
        if self.layer_scale_parameter is not None:
            branch = self.layer_scale_parameter * branch
        return maps + self.drop_path(branch).permute(0, 3, 1, 2)

    @torch.no_grad()
    def fold_layer_scale(self) -> None:
        """Multiply the scale into the last pointwise layer, and drop it."""
        if self.layer_scale_parameter is not None:
            if (
                type(self.pwconv2) is not nn.Linear
                or not self.pwconv2.weight.is_floating_point()
                or (self.pwconv2.weight.is_meta or self.layer_scale_parameter.is_meta)
            ):
                raise ValueError(
                    f"A layer scale folds into plain weights only, got {type(self.pwconv2).__name__} with "
                    f"{self.pwconv2.weight.dtype} weights on {self.pwconv2.weight.device}. Fold before adapters, "
                    "quantisation and offloading, or merge the adapters first."
                )
            self.pwconv2.weight.mul_(self.layer_scale_parameter[:, None])
            self.pwconv2.bias.mul_(self.layer_scale_parameter)
            self.layer_scale_parameter = None


class ConvNextStage(nn.Module):
    """Halve both sides, unless it is the first stage, then residual blocks.

    Takes the maps of all sizes of a batch at once, so that every process of sharded training calls each stage once,
    however many sizes its batch has.
    """

    def __init__(self, config: PretrainedConfig, fan_in: int, width: int, drop_paths: list[float], stride: int = 2):
        super().__init__()
        downsampling = [ChannelLayerNorm(fan_in), nn.Conv2d(fan_in, width, kernel_size=2, stride=2)]
        self.downsampling_layer = nn.ModuleList(downsampling if stride > 1 else [])
        self.layers = nn.ModuleList([ConvNextLayer(config, width, drop_path) for drop_path in drop_paths])

    def forward(self, *batches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One `(B, C, h, w)` batch of maps per size, to `(B, C', h // 2, w // 2)` each."""
        return tuple(self._run(maps) for maps in batches)

    def _run(self, maps: torch.Tensor) -> torch.Tensor:
        for module in (*self.downsampling_layer, *self.layers):
            maps = module(maps)
        return maps


class ConvNextEncoder(nn.Module):
    """All stages; with gradient checkpointing only the maps between them are kept for the backward pass."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.gradient_checkpointing = False
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(list(config.depths))
        widths = list(config.hidden_sizes)
        self.stages = nn.ModuleList(
            [
                ConvNextStage(config, fan_in, width, drop_paths.tolist(), stride=1 if stage_idx == 0 else 2)
                for stage_idx, (fan_in, width, drop_paths) in enumerate(zip([widths[0], *widths], widths, rates))
            ]
        )

    def forward(self, *batches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for stage in self.stages:
            batches = self._checkpointed(stage, batches) if self.gradient_checkpointing else stage(*batches)
        return batches

    def _checkpointed(self, stage: nn.Module, batches: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        trained = any(parameter.requires_grad for parameter in stage.parameters())
        tracked = any(maps.requires_grad for maps in batches)
        if not (self.training and torch.is_grad_enabled() and (trained or tracked)):
            return stage(*batches)
        if not tracked:
            # after frozen stages; reentrant checkpoints give no gradients at all if no input asks for one
            batches = tuple(maps.detach().requires_grad_() for maps in batches)
        return self._gradient_checkpointing_func(stage, *batches)


class ConvNextTower(nn.Module):
    """Stem and stages of a ConvNeXt; state dict keys are those of `ConvNextModel`.

    For channels-last memory, `.to(memory_format=torch.channels_last)`: maps are kept so between stages in any case.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.config = config
        self.embeddings = ConvNextStem(config)
        self.encoder = ConvNextEncoder(config)

    def forward(self, *batches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One `(B, 3, H, W)` batch of pixels per size, to the last stage's `(B, C, H // 64, W // 64)` each."""
        return self.encoder(*self.embeddings(*batches))

    def fold_layer_scale(self) -> "ConvNextTower":
        """Fold every layer scale into weights, in place: the same outputs, a pass over memory less in each block.

        The configuration says so afterwards (`layer_scale_init_value` 0), so that the model saves and loads as it is.
        Meant for inference: training a folded tower is another parametrisation. Fold in float32, before a cast to half
        precision.
        """
        for module in self.modules():
            if isinstance(module, ConvNextLayer):
                module.fold_layer_scale()
        self.config.layer_scale_init_value = 0.0
        return self


def encode_sizes(tower: nn.Module, pixel_values: torch.Tensor, image_sizes: list[list[int]]) -> list[torch.Tensor]:
    """Run a tower on images of different sizes, each at its own size, those of one size together.

    Without a graph a size may make several batches, so that the memory of a stage does not grow with the images. The
    tower is called once in any case. What trains keeps the maps of all images anyway, and sums its gradients as ever.

    Args:
        tower (`nn.Module`): takes batches of pixels, each of one size, gives as many batches of maps.
        pixel_values (`torch.Tensor` of shape `(num_images, 3, H_max, W_max)`): padded on the right and at the bottom.
        image_sizes (`list[list[int]]`): (height, width) in pixels of each image, without padding.

    Returns:
        Features of each image, `(N_i, C)`, row-major.
    """
    images_of_size: dict[tuple[int, int], list[int]] = {}
    for image_idx, (height, width) in enumerate(image_sizes):
        images_of_size.setdefault((height, width), []).append(image_idx)
    whole = tuple(pixel_values.shape[-2:])
    trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters())
    batches = []
    for (height, width), images in images_of_size.items():
        same = len(images_of_size) == 1 and (height, width) == whole
        pixels = pixel_values if same else torch.stack([pixel_values[idx, :, :height, :width] for idx in images])
        batches += [pixels] if trains else pixels.split(_images_at_once(height * width, pixels.device))
    found = (features for maps in tower(*batches) for features in maps.flatten(2).transpose(1, 2))
    order = [image_idx for images in images_of_size.values() for image_idx in images]
    features = dict(zip(order, found, strict=True))
    return [features[image_idx] for image_idx in range(len(image_sizes))]


def _images_at_once(num_pixels: int, device: torch.device) -> int:
    return max(1, (_PIXELS_AT_ONCE_ON_CPU if device.type == "cpu" else _PIXELS_AT_ONCE) // num_pixels)


class ConvllavaSteps:
    """A tower that compresses, and LLaVA's projector. Features are `(1, total_tokens, C)`, all images in a row."""

    config_class = ConvllavaConfig
    _no_split_modules = ["ConvNextStem", "ConvNextStage", "Connector"]

    def make_tower(self, config: ConvllavaConfig) -> nn.Module:
        return ConvNextTower(config.vision_config)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ConvNextLayer) and module.layer_scale_parameter is not None:
            nn.init.constant_(module.layer_scale_parameter, self.config.vision_config.layer_scale_init_value)

    def encode(self, pixel_values: torch.Tensor, layout: Layout | None = None) -> torch.Tensor:
        """Features of all images after each other, `(num_images, 3, H_max, W_max)` to `(1, total_tokens, C)`.

        Without a layout every image fills `pixel_values`.
        """
        if layout is None:
            layout = layout_of_images(self.config, VisionInputs(pixel_values))
        sizes = layout.sizes.image_sizes.tolist()
        return torch.cat(encode_sizes(self.vision_tower, pixel_values.to(self.dtype), sizes))[None]


class ConvllavaVision(ConvllavaSteps, VtcVisionHalf):
    """Tower and projector of ConvLLaVA."""


class ConvllavaModel(ConvllavaSteps, VtcModel):
    """ConvLLaVA without a head."""


class ConvllavaForConditionalGeneration(VtcForConditionalGeneration):
    """ConvLLaVA with a language modelling head."""

    config_class = ConvllavaConfig
    model_class = ConvllavaModel
