"""`ModelTesterMixin` of transformers on the base model and the model with a head of every method."""

import unittest
from unittest import mock

import factories
import torch
from upstream_source import load_or_skip

from hf_vtc.methods import RECORDS, record_named

common = load_or_skip("test_modeling_common")

# its class lists are lists of names, and tell base models, labels and shifted losses apart
common.MODEL_MAPPING_NAMES = {
    **common.MODEL_MAPPING_NAMES,
    **{entry.config.model_type: entry.model.__name__ for entry in RECORDS.values()},
}
common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = {
    **common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **{entry.config.model_type: entry.head.__name__ for entry in RECORDS.values()},
}


def ids_without_placeholders(shape, vocab_size, *args, **kwargs):
    """Random token ids; one that announces an image would have to bring it."""
    ids = _ids_tensor(shape, vocab_size, *args, **kwargs)
    return ids.masked_fill(ids == factories.tiny_config("vico").image_token_id, 1)


_ids_tensor, common.ids_tensor = common.ids_tensor, ids_without_placeholders

# no more than two layers each, as `test_num_layers_is_small` wants
_TWO_LAYERS = {"num_hidden_layers": 2}
OVERRIDES = {
    "vico": {},
    "vistog": {"vision_config": {**factories._CLIP, **_TWO_LAYERS}},
    "avg_llava": {"vision_config": {**factories._CLIP, **_TWO_LAYERS}},
    "convllava": {},
    "llavolta": {
        "vision_config": {**factories._CLIP, **_TWO_LAYERS},
        "text_config": {**factories._TEXT, **_TWO_LAYERS},
    },
    "visionzip": {"vision_config": {**factories._CLIP, **_TWO_LAYERS}},
    "cdpruner": {"vision_config": {**factories._CLIP, **_TWO_LAYERS}},
}
# what the vision side of a forward pass takes
VISION_INPUTS = ("pixel_values", "num_tiles", "image_sizes")


class ModelTester:
    """What the mixin asks about a method: a configuration and inputs.

    Args:
        method (`str`): name of the method.
        batch_size (`int`): rows of an input, one image each.
        tiles (`str`): of an image: `"several"` where the method has tiles, `"one"`, or `"none"` for text alone.
        inputs (`dict`): further arguments of a forward pass.
        overrides: fields of the configuration.
    """

    is_training = True

    def __init__(
        self, method: str, batch_size: int = 2, tiles: str = "several", inputs: dict | None = None, **overrides
    ):
        self.method, self.batch_size, self.tiles, self.inputs = method, batch_size, tiles, inputs or {}
        self.overrides = {**OVERRIDES[method], **overrides}
        config, inputs = self.prepare_config_and_inputs_for_common()
        self.seq_length = self.encoder_seq_length = inputs["input_ids"].shape[1]
        self.hidden_size = config.text_config.hidden_size
        self.vocab_size = config.text_config.vocab_size
        self.num_hidden_layers = config.text_config.num_hidden_layers
        self.num_attention_heads = config.text_config.num_attention_heads

    def get_config(self):
        return factories.tiny_config(self.method, **self.overrides)

    def prepare_config_and_inputs_for_common(self):
        """Rows of one length, with images of one size: upstream cuts and compares batches as if all were alike."""
        config, generator = self.get_config(), torch.Generator().manual_seed(0)
        image, reserved = {}, 0
        if self.tiles != "none":
            image, reserved = self._image(config, generator)
        rows = []
        for _ in range(self.batch_size):
            text = torch.randint(1, 200, (8,), generator=generator).tolist()
            images = []
            if image:
                pixel_values = torch.randn(image["pixel_values"].shape, generator=generator)
                images = [{**image, "pixel_values": pixel_values}]
            rows.append(([*text[:3], *[config.image_token_id] * reserved, *text[3:]], images))
        return config, {**factories.RandomBatch(config, rows, "left"), **self.inputs}

    def _image(self, config, generator):
        while True:
            image, reserved = factories.images_of(config).draw(config, generator)
            if "num_tiles" not in image or (image["num_tiles"] > 1) == (self.tiles == "several"):
                return image, reserved


class ModelSuite(common.ModelTesterMixin):
    """The mixin's tests on the classes of one method."""

    method: str
    _is_composite = True
    # it feeds these besides `input_ids` where it makes inputs of its own
    additional_model_inputs = VISION_INPUTS

    @property
    def all_model_classes(self):
        record = record_named(self.method)
        return record.model, record.head

    @property
    def skip_test_image_features_output_shape(self):
        # ConvLLaVA's images differ in size: the features of all of them are one row, and its width is a list
        return self.method == "convllava"

    def setUp(self):
        self.model_tester = ModelTester(self.method)

    def _image_features_prepare_config_and_inputs(self):
        # upstream goes by names that contain "image" or "pixel"
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {name: value for name, value in inputs.items() if name in VISION_INPUTS}

    @unittest.skip(
        "`tests/generation`, which it asks for, is in no source distribution; see tests/test_contracts_generation.py"
    )
    def test_generation_tester_mixin_inheritance(self):
        pass

    @unittest.skip("`encode` gives the features that are read; other states are had from `model.model.vision_tower`")
    def test_get_image_features_hidden_states(self):
        pass

    @unittest.skip("`encode` gives the features that are read; attentions are had from `model.model.vision_tower`")
    def test_get_image_features_attentions(self):
        pass

    def test_attention_outputs(self):
        """With every token kept: the attentions of a compressed prompt are as short as it is."""
        self.model_tester = ModelTester(self.method, inputs={"vtc_budget": "full"})
        super().test_attention_outputs()

    def test_hidden_states_output(self):
        """With every token kept: all hidden states but the last are as short as the compressed prompt."""
        self.model_tester = ModelTester(self.method, inputs={"vtc_budget": "full"})
        super().test_hidden_states_output()

    def test_sdpa_can_dispatch_composite_models(self):
        if self.method == "convllava":
            self.skipTest(
                "a ConvNeXt has no attention to dispatch, and ours is a plain module that does not claim any"
            )
        super().test_sdpa_can_dispatch_composite_models()

    def test_model_outputs_equivalence(self):
        """With a difference of booleans: the message of the test, made beforehand, subtracts whatever is a tensor."""
        subtract = torch.Tensor.__sub__

        def minus(first, second):
            return (first ^ second).int() if first.dtype == torch.bool else subtract(first, second)

        with mock.patch.object(torch.Tensor, "__sub__", minus):
            super().test_model_outputs_equivalence()


def _eager_matches_sdpa(self, *args, **kwargs):
    """Seven rows, since the original fills fewer up with ids and images at random and cuts every input to seven."""
    if self.method == "avg_llava":
        # its images have two tiles or more, so that seven would be cut
        self.model_tester = ModelTester(self.method, batch_size=7, tiles="none")
    elif self.method == "vico":
        # the default rule never compresses the only tile of a sample
        self.model_tester = ModelTester(self.method, batch_size=7, tiles="one", routing_rule="absolute")
    else:
        self.model_tester = ModelTester(self.method, batch_size=7, tiles="one")
    _test_eager_matches_sdpa_inference(self, *args, **kwargs)


# the tests of the mixin find this function by its name in their module
_test_eager_matches_sdpa_inference = common._test_eager_matches_sdpa_inference
common._test_eager_matches_sdpa_inference = _eager_matches_sdpa

for _method in factories.METHODS:
    _name = f"TestModel_{_method}"
    globals()[_name] = type(_name, (ModelSuite, unittest.TestCase), {"method": _method, "__module__": __name__})
