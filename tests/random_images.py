"""Random images as methods take them, which the batches of `factories.py` are made of."""

import torch
from stock_models import (
    VISION_START,
)

from hf_vtc.models.grids_vtc import black_image
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.processing_vtc import COUNT_RULES


def draw_int(low: int, high: int, generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


class TiledImages:
    """Random images of a method whose images are stacks of equal tiles."""

    most_tiles = 4
    # ids before the placeholders of each image
    opening: tuple[int, ...] = ()

    def draw(self, config, generator, alone: bool = True) -> tuple[dict[str, torch.Tensor], int]:
        """Vision inputs of one image, which may be alone in its row, and the placeholders that it reserves."""
        tiles = draw_int(1, self.most_tiles, generator)
        side = config.vision_config.image_size
        side = side if isinstance(side, int) else side[0]
        inputs = {"pixel_values": torch.randn(tiles, 3, side, side, generator=generator)}
        return inputs | {"num_tiles": torch.tensor([tiles])}, tiles * config.image_seq_length

    def collate(self, images: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Vision inputs of all images of a batch, from those of each."""
        return {name: torch.cat([image[name] for image in images]) for name in images[0]}


class AnyresImages(TiledImages):
    """Random images of LLaVA-NeXT and LLaVA-OneVision: some size in pixels, and the tiles that follow from it."""

    def draw(self, config, generator, alone: bool = True) -> tuple[dict[str, torch.Tensor], int]:
        """Vision inputs of one image, which may be alone in its row, and the placeholders that it reserves."""
        height, width = draw_int(20, 90, generator), draw_int(20, 90, generator)
        tile_size, pinpoints = config.tile_size, config.image_grid_pinpoints
        images = VtcImageProcessor(
            "anyres", tile_size, image_grid_pinpoints=pinpoints, max_map_tiles=config.max_map_tiles
        )
        layout = images.get_tile_layout(height, width, alone)
        inputs = {
            "pixel_values": torch.randn(layout.num_tiles, 3, tile_size, tile_size, generator=generator),
            "num_tiles": torch.tensor([layout.num_tiles]),
            "image_sizes": torch.tensor([[height, width]]),
        }
        return inputs, COUNT_RULES[f"unpad_{config.unpad_rule}"](layout, config.image_seq_length)


class SizedImages:
    """Random images of ConvLLaVA, of few sizes so that some are equal; padding holds NaN, which nobody may read."""

    opening: tuple[int, ...] = ()

    def draw(self, config, generator, alone: bool = True) -> tuple[dict[str, torch.Tensor], int]:
        """Vision inputs of one image, and the placeholders that it reserves."""
        stride = config.token_stride
        height, width = (stride * draw_int(1, 2, generator) + 5 * draw_int(0, 1, generator) for _ in range(2))
        inputs = {
            "pixel_values": torch.randn(1, 3, height, width, generator=generator),
            "image_sizes": torch.tensor([[height, width]]),
        }
        return inputs, (height // stride) * (width // stride)

    def collate(self, images: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Vision inputs of all images of a batch, from those of each."""
        sizes = torch.cat([image["image_sizes"] for image in images])
        pixel_values = torch.full((len(images), 3, *sizes.amax(0).tolist()), float("nan"))
        for padded, image, (height, width) in zip(pixel_values, images, sizes.tolist()):
            padded[:, :height, :width] = image["pixel_values"][0]
        return {"pixel_values": pixel_values, "image_sizes": sizes}


class GridImages(TiledImages):
    """Random images of Qwen's bases: grids of patches, of few sizes, all patches in one tensor."""

    opening = (VISION_START,)

    def draw(self, config, generator, alone: bool = True) -> tuple[dict[str, torch.Tensor], int]:
        """Vision inputs of one image, and the placeholders that it reserves."""
        merge = config.vision_config.spatial_merge_size
        rows, columns = draw_int(2, 3, generator), draw_int(2, 4, generator)
        grid = (1, rows * merge, columns * merge)
        width = black_image(config)["pixel_values"].shape[1]
        inputs = {
            "pixel_values": torch.randn(grid[1] * grid[2], width, generator=generator),
            "image_grid_thw": torch.tensor([grid]),
        }
        return inputs, rows * columns
