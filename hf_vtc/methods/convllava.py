"""ConvLLaVA: a tower of five stages, whose last map is small."""

import numpy as np

from ..models.configuration_convllava import ConvllavaConfig
from ..models.modeling_convllava import ConvllavaForConditionalGeneration, ConvllavaModel
from .baselines import Baselines
from .costs import Workload
from .drawing import FULL_COLOUR, Drawing, Kept, Tile
from .record import Base, Costs, Record, Sharding, connect_all, register
from .shapes import of_convnext


def compressor_flops(workload: Workload, num_kept: int) -> float:
    """The projector of the tower's last map, which nothing shortens."""
    return workload.projector_flops(num_kept)


def draw(kept: Kept) -> Drawing:
    """The grid of tokens over the image that the tower sees; pixels at the end that fill no token are veiled."""
    layout, count, stride = kept.layout, kept.num_tokens, kept.config.token_stride
    rows, columns = layout.token_grid or (0, 0)
    if rows * columns != count:
        raise ValueError(
            f"An image of {layout.image_size[0]} x {layout.image_size[1]} pixels has {rows} x {columns} visual tokens "
            f"by its processor, but {count} by the output. Pass the `processor` that cut the images."
        )
    left, top, right, bottom = layout.boxes[0]
    # of the resized image the tower sees what lies in the tile
    seen = [
        resized * min(1.0, length / whole)
        for resized, length, whole in zip(layout.resized_size, (bottom - top, right - left), layout.image_size)
    ]
    covered = (rows * stride / seen[0], columns * stride / seen[1])
    legend = [(FULL_COLOUR, f"{rows} x {columns} = {count} visual tokens, one per {stride} x {stride} pixels seen")]
    return Drawing([Tile(FULL_COLOUR, np.arange(count).reshape(rows, columns), str(count), covered=covered)], legend)


def compressor(config: ConvllavaConfig) -> tuple[str, ...]:
    """Projector, and the last stage of the tower."""
    last = len(config.vision_config.hidden_sizes) - 1
    return "model.multi_modal_projector", f"model.vision_tower.encoder.stages.{last}"


RECORD = register(
    Record(
        ConvllavaConfig,
        ConvllavaModel,
        ConvllavaForConditionalGeneration,
        costs=Costs(compressor_flops),
        oracle=connect_all,
        draw=draw,
        baselines=Baselines(),
        compressor=compressor,
        # its tower is another one
        base=Base(kinds=()),
        sharding=Sharding(
            # it gathers the parts of a stage each time they run, which is once per image size
            zero3_problem="ConvLLaVA cannot train under ZeRO-3, where processes whose images differ in size would "
            "wait for each other for ever. Use FSDP2 (examples/accelerate/fsdp2.yaml), DDP, or `zero_stage: 2`."
        ),
        trainers=("ConvllavaTrainer",),
        # what it starts from has been through the paper's first two
        recipes=("convllava_stage3",),
        shapes=of_convnext(),
    )
)
