"""How large the models are and how long they learn: on CPU cores, on one GPU, and in a dry run."""

from dataclasses import dataclass

# pixels that a visual token at full length covers each way: 16 tokens a tile
TOKEN_SIDE = 12


@dataclass(frozen=True)
class Size:
    """Of base and methods.

    Args:
        patch_size (`int`): of the tower, in pixels: 6, four patches being a visual token.
        tower_width (`int`), tower_layers (`int`): of the vision tower.
        width (`int`), layers (`int`), feed_forward (`int`): of the language model; `width` a multiple of 96 or 64.
        pages (`int`): drawn before the base learns.
        tower_steps (`int`), connector_steps (`int`), steps (`int`): of the base's three phases.
        batch (`int`), learning_rate (`float`): of the third.
        consistency_steps (`int`), router_steps (`int`): of ViCO.
        granularity_steps (`int`), avg_router_steps (`int`): of AVG-LLaVA.
        method_batch (`int`): pages per step of both methods.
        bf16 (`bool`): whether products are taken in bfloat16.
        workers (`int`): processes that draw pages; 0 draws them between the steps.
    """

    patch_size: int
    tower_width: int
    tower_layers: int
    width: int
    layers: int
    feed_forward: int
    pages: int
    tower_steps: int
    connector_steps: int
    steps: int
    batch: int
    learning_rate: float
    consistency_steps: int
    router_steps: int
    granularity_steps: int
    avg_router_steps: int
    method_batch: int
    bf16: bool = False
    workers: int = 0


SIZES = {
    "cpu": Size(6, 64, 3, 128, 3, 256, 10000, 4000, 400, 4000, 8, 2e-3, 600, 80, 200, 400, 16),
    "gpu": Size(
        6, 128, 4, 384, 8, 1024, 40000, 1000, 300, 1200, 64, 1e-3, 300, 100, 200, 100, 64, bf16=True, workers=12
    ),
    "dry": Size(6, 64, 1, 64, 1, 64, 96, 2, 2, 2, 4, 2e-3, 2, 2, 2, 2, 2),
}
