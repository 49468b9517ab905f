"""What the host's arguments mean to our trainers: honoured, or refused by name; and data that comes as a stream."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_model, tiny_processor
from PIL import Image
from torch.utils.data import IterableDataset
from trainer_helpers import arguments, collate, make_records, model_without_dropout, snapshot
from transformers import Trainer

from hf_vtc.data import VtcCollator
from hf_vtc.trainers import (
    AvgLlavaGranularityTrainer,
    AvgLlavaRouterTrainer,
    ConvllavaTrainer,
    LlavoltaTrainer,
    VicoConsistencyTrainer,
    VicoRouterTrainer,
    VistogTrainer,
)
from hf_vtc.trainers.losses import next_token_loss, token_cross_entropy

# trainer, method, options: objectives on the next token, and others
NEXT_TOKEN = {
    "convllava": (ConvllavaTrainer, "convllava", {"stage": 3}),
    "llavolta": (LlavoltaTrainer, "llavolta", {"scheme": "single"}),
    "vistog": (VistogTrainer, "vistog", {"stage": 2, "grouping": False}),
    "avg_llava": (AvgLlavaGranularityTrainer, "avg_llava", {}),
}
OTHERS = {
    "vico": (VicoConsistencyTrainer, "vico", {}),
    "vico_router": (VicoRouterTrainer, "vico", {"ratio_loss": "cross_entropy"}),
    "avg_llava_router": (AvgLlavaRouterTrainer, "avg_llava", {}),
}


def chats(count=6):
    """Records of no, one or two images in turn."""
    rng = np.random.default_rng(0)
    records = []
    for idx in range(count):
        sizes = [(40, 60 + 10 * idx)] * (1, 0, 2)[idx % 3]
        pictures = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
        question = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": f"which {idx}?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"number {idx}"}]
        records.append({"messages": messages, "images": pictures})
    return records


def build(entry, folder, kwargs=None, model=None, **options):
    trainer_class, method, own = entry
    model = tiny_model(method) if model is None else model
    data = {"train_dataset": chats(), "data_collator": VtcCollator(tiny_processor(method))}
    return trainer_class(model, arguments(folder, **options), **own, **{**data, **(kwargs or {})})


def smoothed(logits, labels, factor):
    """By hand: the share `factor` of the target lies evenly on the vocabulary."""
    log_probs, targets = logits[:, :-1].log_softmax(-1), labels[:, 1:]
    known = targets != -100
    hit = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -((1 - factor) * hit[known].mean() + factor * log_probs.mean(-1)[known].mean())


@pytest.mark.parametrize("factor", [0.0, 0.1])
@pytest.mark.parametrize("name", NEXT_TOKEN)
def test_label_smoothing_is_that_of_the_next_token(name, factor, tmp_path):
    trainer = build(NEXT_TOKEN[name], tmp_path, label_smoothing_factor=factor)
    model = trainer.model.eval()
    batch = trainer.data_collator(chats())
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch))
        labels = batch.pop("labels")
        if name == "avg_llava":
            num_images, scales = len(batch["num_tiles"]), len(model.config.vis_token_granularity)
            runs = [{"router_decisions": torch.full((num_images,), idx)} for idx in range(scales)]
        else:
            runs = [{"vtc_budget": "full"} if name == "vistog" else {}]
        expected = torch.stack([smoothed(model(**batch, **run).logits, labels, factor) for run in runs]).mean()
    assert abs(loss - expected) < 1e-5
    # and the unshifted one is another number
    assert abs(loss - smoothed(model(**batch).logits, torch.cat([labels[:, :1], labels[:, :-1]], 1), factor)) > 1e-3


def test_token_cross_entropy_smooths_by_hand():
    logits, targets = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([0])
    expected = -(0.7 * np.log(0.5) + 0.3 * (np.log(0.5) + 2 * np.log(0.25)) / 3)
    torch.testing.assert_close(token_cross_entropy(logits, targets, 0.3), torch.tensor([expected]).float())


@pytest.mark.parametrize("name", OTHERS)
def test_label_smoothing_is_refused_without_a_next_token(name, tmp_path):
    with pytest.raises(ValueError, match="`label_smoothing_factor` has no effect in .*, got 0.1"):
        build(OTHERS[name], tmp_path, label_smoothing_factor=0.1)


def test_the_stock_trainer_smooths_by_a_function_of_ours(tmp_path, method):
    """Its own smoothing does not shift: the way out that the documentation names does."""
    model, collator = tiny_model(method), VtcCollator(tiny_processor(method))
    options = {"data_collator": collator, "train_dataset": chats()}
    batch = collator(chats())
    with torch.no_grad():
        expected = smoothed(model(**{**batch, "labels": None}).logits, batch["labels"], 0.1)
        right = partial(next_token_loss, label_smoothing=0.1)
        trainer = Trainer(model, arguments(tmp_path), compute_loss_func=right, **options)
        assert abs(trainer.compute_loss(model, dict(batch)) - expected) < 1e-5


@pytest.mark.parametrize("name", [*NEXT_TOKEN, *OTHERS])
@pytest.mark.parametrize("taken", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"])
def test_functions_that_nobody_would_call_are_refused(name, taken, tmp_path):
    with pytest.raises(ValueError, match=f"`{taken}` has no effect in"):
        build((NEXT_TOKEN | OTHERS)[name], tmp_path, {taken: print})


@pytest.mark.parametrize("name", [*NEXT_TOKEN, *OTHERS])
def test_arguments_without_effect_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="`use_liger_kernel` has no effect"):
        build((NEXT_TOKEN | OTHERS)[name], tmp_path, use_liger_kernel=True)
    if "router" in name:
        with pytest.raises(ValueError, match="`neftune_noise_alpha` has no effect"):
            build(OTHERS[name], tmp_path, neftune_noise_alpha=5.0)


# streams


class Stream(IterableDataset):
    def __init__(self, records):
        self.records = records

    def __iter__(self):
        return iter(self.records)


@pytest.mark.parametrize("name", [*NEXT_TOKEN, *OTHERS])
def test_streams_train_and_evaluate_as_lists_do(name, tmp_path):
    entry = (NEXT_TOKEN | OTHERS)[name]
    start, weights, losses = model_without_dropout(entry[1]), [], []
    for kind in (list, Stream):
        data = {"train_dataset": kind(chats()), "eval_dataset": kind(chats())}
        options = {"per_device_train_batch_size": 2, "max_steps": 2, "train_sampling_strategy": "sequential"}
        trainer = build(entry, tmp_path, data, copy.deepcopy(start), **options)
        trainer.train()
        weights.append(snapshot(trainer.model))
        losses.append(trainer.evaluate()["eval_loss"])
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)
    assert losses[0] == losses[1]


def test_batches_that_accelerate_would_cut_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`dispatch_batches` must not be True"):
        build(NEXT_TOKEN["llavolta"], tmp_path, accelerator_config={"dispatch_batches": True})


def test_the_stock_trainer_says_what_a_stream_needs(method, tmp_path):
    """Batches that accelerate has cut are refused with that advice, never trained on."""
    records = [record for record in chats(12) if len(record["images"]) == 2]
    for config, fails in (({}, True), ({"dispatch_batches": False}, False)):
        options = {"per_device_train_batch_size": 2, "max_steps": 2, "accelerator_config": config}
        options["remove_unused_columns"] = False
        collator = VtcCollator(tiny_processor(method))
        trainer = Trainer(
            tiny_model(method), arguments(tmp_path, **options), train_dataset=Stream(records), data_collator=collator
        )
        if fails:
            with pytest.raises(ValueError, match="'dispatch_batches': False"):
                trainer.train()
        else:
            trainer.train()


def train_on_a_stream(folder, **options):
    """Weights after training on a stream, the same whatever the number of processes."""
    model = model_without_dropout("llavolta")
    records = make_records(model, ((1,), (2, 1), (), (3,), (1,), (2,), (1, 1), ()))
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, **options}
    kwargs = {"train_dataset": Stream(records), "data_collator": collate}
    trainer = LlavoltaTrainer(model, arguments(folder, **options), scheme="single", **kwargs)
    trainer.train()
    return snapshot(trainer.model)


DISTRIBUTED = """
import sys
import torch
from test_trainers_arguments import train_on_a_stream
result = train_on_a_stream(sys.argv[1], per_device_train_batch_size=2, ddp_backend="gloo")
if torch.distributed.get_rank() == 0:
    torch.save(result, sys.argv[2])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_streams_on_two_processes_equal_one(tmp_path):
    script, result = tmp_path / "script.py", tmp_path / "result.pt"
    script.write_text(DISTRIBUTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    tests = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    run = subprocess.run(
        [*launch, str(script), str(tmp_path / "many"), str(result)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    expected = train_on_a_stream(tmp_path / "one", per_device_train_batch_size=4)
    torch.testing.assert_close(torch.load(result), expected, rtol=1e-4, atol=1e-5)
