"""`ImageProcessingTestMixin` of transformers on the image processor of every method."""

import unittest

import factories
import numpy as np
import torch
from PIL import Image
from upstream_source import load_or_skip, one_row_per_image

from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.tiling_vtc import TilingSettings

common = load_or_skip("test_image_processing_common")


class ImageProcessorTester(common.ImageProcessingTester):
    """What the mixin asks about the image processor of a method: its fields, images and the shape of outputs."""

    # transformers knows this class by its registration only, not by the folder of a test
    def _get_image_processing_classes(self):
        return {"pil": VtcImageProcessor}

    def prepare_image_processor_dict(self):
        fields = {**factories.TINY[self.parent.method].processor, **self.parent.overrides}
        fields = {name: value for name, value in fields.items() if name in TilingSettings.__dataclass_fields__}
        if "image_grid_pinpoints" in fields:
            fields["image_grid_pinpoints"] = [list(pair) for pair in fields["image_grid_pinpoints"]]
        # as it is saved
        side = fields["size"]
        return {**fields, "size": {"height": side, "width": side}, "image_mean": [0.5, 0.4, 0.3]}

    def expected_output_image_shape(self, images):
        processor = VtcImageProcessor(**self.prepare_image_processor_dict())
        if processor.tiling != "keep_aspect":
            return 3, processor.size["height"], processor.size["width"]
        sizes = [processor.get_tile_layout(*_height_and_width(image)).resized_size for image in images]
        return 3, max(height for height, _ in sizes), max(width for _, width in sizes)


def _height_and_width(image):
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[:2] if isinstance(image, np.ndarray) else image.shape[1:]


class ImageProcessorSuite(common.ImageProcessingTestMixin):
    """The mixin's tests with the fields of one method."""

    method: str
    overrides: dict = {}
    image_processor_tester_class = ImageProcessorTester
    test_cast_dtype = torch.float16

    def setUp(self):
        # the images are random, and sizes decide on tiles
        np.random.seed(0)
        super().setUp()

    def test_call_pil(self):
        self.overrides = one_row_per_image(self.method)
        super().test_call_pil()

    def test_call_numpy(self):
        self.overrides = one_row_per_image(self.method)
        super().test_call_numpy()

    def test_call_pytorch(self):
        self.overrides = one_row_per_image(self.method)
        super().test_call_pytorch()

    @unittest.skip("every image becomes RGB: there is no field `do_convert_rgb`")
    def test_image_processor_from_dict_with_kwargs_has_attributes(self):
        pass

    @unittest.skip("every image becomes RGB, alpha is dropped: there are no outputs of four channels")
    def test_call_numpy_4_channels(self):
        pass

    @unittest.skip("PIL and numpy alone, bit for bit as published models were trained; torchvision resizes otherwise")
    def test_new_models_require_torchvision_backend(self):
        pass


for _method in factories.METHODS:
    _name = f"TestImageProcessor_{_method}"
    globals()[_name] = type(
        _name, (ImageProcessorSuite, unittest.TestCase), {"method": _method, "__module__": __name__}
    )
