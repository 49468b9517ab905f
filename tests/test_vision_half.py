"""Tower, connectors and router without a language model, loaded from the checkpoint of a whole model."""

import importlib

import pytest
import torch
from factories import METHODS, budgets_of, random_batch, tiny_model


@pytest.mark.parametrize("method", METHODS)
def test_a_vision_half_gives_the_visual_tokens_of_the_whole_model(method, tmp_path):
    model = tiny_model(method)
    model.save_pretrained(tmp_path, save_code=False)
    module = importlib.import_module(f"hf_vtc.models.modeling_{method}")
    half_class = getattr(module, type(model).__name__.replace("ForConditionalGeneration", "Vision"))
    half, report = half_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not [name for name in half.state_dict() if "language_model" in name or "lm_head" in name]
    batch = random_batch(model.config, torch.Generator().manual_seed(3), images_per_row=[1, 2])
    images = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    for budget in ("full", budgets_of(model.config)[0]):
        if not model.model.budgets_settle and budget != "full":
            # it reads the question, of which a vision half knows nothing
            for each in (model, half):
                with pytest.raises(ValueError, match="needs the question"):
                    each.get_image_features(**images, vtc_budget=budget)
            continue
        with torch.no_grad():
            expected = model.get_image_features(**images, vtc_budget=budget).pooler_output
            found = half.eval().get_image_features(**images, vtc_budget=budget).pooler_output
        assert len(found) == len(expected) == 3
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
