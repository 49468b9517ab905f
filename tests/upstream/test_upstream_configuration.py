"""`ConfigTester` of transformers on the configuration of every method."""

import unittest
from types import SimpleNamespace

import factories
import pytest
from upstream_source import load_or_skip

from hf_vtc.methods import record_named

common = load_or_skip("test_configuration_common")

CHECKS = sorted(name for name in vars(common.ConfigTester) if name.startswith(("create_and_test", "check_config")))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("method", factories.METHODS)
def test_config(method, check):
    """One step of `ConfigTester.run_common_tests`, as separate tests."""
    case = unittest.TestCase()
    case.model_tester = SimpleNamespace(get_config=lambda: factories.tiny_config(method))
    config_class = record_named(method).config
    # all others are fields of the parts
    fields = ["vision_config", "text_config", "image_token_id", "image_seq_length", "vision_feature_layer"]
    config = factories.tiny_config(method)
    tester = common.ConfigTester(
        case,
        config_class=config_class,
        has_text_modality=False,
        common_properties=fields,
        image_token_id=config.image_token_id,
        projector_hidden_act="relu",
        tie_word_embeddings=True,
    )
    getattr(tester, check)()


def test_every_check_is_run():
    assert len(CHECKS) == 10
