"""LLaVA-OneVision of transformers, tiny: a model, its processor, and batches of rows with one and several images."""

import torch
from factories import tiny_tokenizer
from llava_checkpoints import TEXT, VISION
from PIL import Image
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, SiglipVisionConfig
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

try:
    # 5.x, beside one on torchvision
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil as StockImages,
    )
except ImportError:
    from transformers import LlavaOnevisionImageProcessor as StockImages

TILE, TOKENS = 32, 16
# more tiles than nine, above which maps are scaled down
PINPOINTS = [[TILE * rows, TILE * columns] for rows in range(1, 5) for columns in range(1, 5)]
# (height, width); maps of 16, 12 and 3 tiles, the first two scaled down, one of a tile, and one cut by its padding
SIZES = [(125, 128), (96, 128), (33, 90), (20, 20), (70, 64)]


class StockProcessor(LlavaOnevisionProcessor):
    """The processor of transformers without its part for videos, which needs torchvision."""

    attributes = ["image_processor", "tokenizer"]

    def __init__(self, image_processor, tokenizer, **kwargs):
        super().__init__(image_processor, tokenizer, None, **kwargs)

    def check_argument_for_proper_class(self, argument_name, argument):
        """Of 5.x, which looks for the class of what is not there."""


def onevision_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    return tokenizer


def stock_images():
    return StockImages(
        size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=[0.5] * 3,
        image_std=[0.25, 0.5, 0.75],
    )


def stock_processor():
    return StockProcessor(
        stock_images(), onevision_tokenizer(), num_image_tokens=TOKENS, vision_feature_select_strategy="full"
    )


def stock_model(tied=False, dtype=torch.float32, image_size=TILE, **fields):
    """An uncompressed model with weights that matter."""
    tokenizer = onevision_tokenizer()
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION | {"image_size": image_size}, vision_use_head=False).to_dict(),
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer), "tie_word_embeddings": tied},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=tied,
        **fields,
    )
    model = LlavaOnevisionForConditionalGeneration(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape).to(dtype))
        # answers with a placeholder could not be fed back
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(["<image>", "<video>"])] = 0
    return model


def picture(height, width, seed=0):
    noise = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy())


def rows_of(*sizes):
    """Pictures of rows of (height, width)."""
    return [[picture(*size, seed=idx) for idx, size in enumerate(row)] for row in sizes]


def texts_of(rows):
    """Prompts with an image, then a word for it, and so on; images touch each other in every second row."""
    return ["what " + ("" if idx % 2 else " it").join(["<image>"] * len(row)) + " is" for idx, row in enumerate(rows)]


def both(ours, rows, dtype=torch.float32):
    """Inputs of the same rows by the processor of transformers and by `ours`."""
    images = rows if any(rows) else None
    arguments = {"images": images, "text": texts_of(rows), "return_tensors": "pt", "padding": True}
    stock = stock_processor()
    stock.tokenizer.padding_side = "left"
    theirs = stock(**arguments).to(dtype)
    theirs.pop("token_type_ids", None)
    return dict(theirs), dict(ours(**arguments).to(dtype))
