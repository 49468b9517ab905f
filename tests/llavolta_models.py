"""Tiny LLaVolta models of several decoders, and what tests of them share."""

import torch
from factories import random_batch, row_of, tiny_model

GREEDY = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
NUM_LAYERS = 3
# -1: before the sequence is built, 0: before the first layer, 3: never
LAYER_IDXS = range(-1, NUM_LAYERS + 1)
DECODERS = {
    "qwen3": {},
    "qwen2": {"model_type": "qwen2", "head_dim": None},
    "llama": {"model_type": "llama", "head_dim": 12},
    # a window that no prompt fits into, so that sliding caches differ from full ones
    "mistral": {"model_type": "mistral", "sliding_window": 9},
    "qwen2 with sliding layers": {
        "model_type": "qwen2",
        "head_dim": None,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
}


def model_with(layer_idx=1, stride=4, decoder="qwen3", **overrides):
    text = {
        "model_type": "qwen3",
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        **DECODERS[decoder],
    }
    text = {name: value for name, value in text.items() if value is not None}
    return tiny_model("llavolta", text_config=text, compress_layer_idx=layer_idx, compress_stride=stride, **overrides)


def batch_of(model, seed=0, images_per_row=(1, 0, 2), padding_side="left"):
    generator = torch.Generator().manual_seed(seed)
    return random_batch(model.config, generator, images_per_row=list(images_per_row), padding_side=padding_side)


def without_cache(model, inputs, new_tokens):
    """Logits `(num_new, vocab_size)` of each new token from one forward pass over the whole unpadded row."""
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], new_tokens[None]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0, length - 1 : -1]


def assert_cached_equals_uncached(model, batch):
    length = batch["input_ids"].shape[1]
    out = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(out.sequences[:, :length], batch["input_ids"])
    logits = torch.stack(out.logits, 1)
    for row, sequence in enumerate(out.sequences):
        expected = without_cache(model, row_of(batch, row), sequence[length:])
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=2e-5)
        assert torch.equal(sequence[length:], expected.argmax(-1))


# states and positions


class LayerInputs:
    """What each decoder layer got."""

    def __init__(self, model):
        self.layers, self.states, self.positions = model.get_decoder().layers, {}, {}

    def __enter__(self):
        def record(idx):
            def hook(module, args, kwargs):
                self.states[idx], self.positions[idx] = args[0], kwargs["position_ids"]

            return hook

        self.handles = [
            layer.register_forward_pre_hook(record(idx), with_kwargs=True) for idx, layer in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
