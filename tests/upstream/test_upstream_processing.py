"""`ProcessorTesterMixin` of transformers on the processor of every method."""

import unittest
from unittest import mock

import factories
import numpy as np
from upstream_source import load_or_skip, one_row_per_image

from hf_vtc.models import processing_vtc
from hf_vtc.models.processing_vtc import VtcProcessor
from hf_vtc.models.tiling_vtc import TilingSettings

common = load_or_skip("test_processing_common")

# with these, no pixel is positive; the original does it by a negative `rescale_factor`, which is no field of ours
common.MODALITY_TEST_SPECS["images"]["init_time_kwargs"] = {"do_rescale": True, "image_mean": [1.0, 1.0, 1.0]}

# canvases for the images of these tests, 30 x 400 and 500 x 30 pixels: a tile has four rows of tokens only, and an
# image of which no row is left is refused
FIELDS = {"avg_llava": {"image_grid_pinpoints": ((32, 64), (64, 32), (64, 64), (32, 448), (544, 32))}}


class ProcessorSuite(common.ProcessorTesterMixin):
    """The mixin's tests with the fields of one method."""

    method: str
    processor_class = VtcProcessor
    # longer than any prompt here
    images_text_kwargs_max_length = images_unstructured_max_length = 400
    # of the image processor, for the test that sets them
    image_fields: dict = {}

    @classmethod
    def _setup_tokenizer(cls):
        return factories.tiny_tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return factories.tiny_processor(cls.method, **FIELDS.get(cls.method, {})).image_processor

    @classmethod
    def prepare_processor_dict(cls):
        fields = factories.TINY[cls.method].processor
        return {name: value for name, value in fields.items() if name not in TilingSettings.__dataclass_fields__}

    def setUp(self):
        np.random.seed(0)
        # these tests give them to every processor with a parameter for videos; ours refuses them, as it does videos
        names = VtcProcessor.call_arguments | {"do_sample_frames", "fps", "num_frames"}
        for owner, name in ((VtcProcessor, "call_arguments"), (processing_vtc, "_CALL_ARGUMENTS")):
            patch = mock.patch.object(owner, name, names)
            patch.start()
            self.addCleanup(patch.stop)

    # given to every processor that has the parameters; ours refuses them, where others leave them out of the outputs
    def prepare_videos_inputs(self, batch_size=None):
        return None

    def prepare_audio_inputs(self, batch_size=None):
        return None

    def get_processor(self, use_tiny_ckpt=True):
        processor = super().get_processor(use_tiny_ckpt)
        for name, value in self.image_fields.items():
            setattr(processor.image_processor, name, value)
        return processor

    def test_model_input_names(self):
        """Of all that it can return."""
        processor = self.get_processor()
        processor.return_layout = True
        with mock.patch.object(self, "get_processor", return_value=processor):
            super().test_model_input_names()

    @unittest.skip("a field that ours does not know is refused when it is read")
    def test_args_overlap_kwargs(self):
        pass

    def _test_apply_chat_template(self, *args, **kwargs):
        self.image_fields = one_row_per_image(self.method)
        super()._test_apply_chat_template(*args, **kwargs)

    def test_if_input_has_mismatching_tokens_and_mm_data(self):
        """With our words for the same error."""
        wanted = self.assertRaisesRegex
        with mock.patch.object(self, "assertRaisesRegex", lambda error, _: wanted(error, "one list per sample")):
            super().test_if_input_has_mismatching_tokens_and_mm_data()


for _method in factories.METHODS:
    _name = f"TestProcessor_{_method}"
    globals()[_name] = type(_name, (ProcessorSuite, unittest.TestCase), {"method": _method, "__module__": __name__})
