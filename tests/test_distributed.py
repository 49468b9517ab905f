"""Two processes train as one does, under DDP, FSDP2 and ZeRO-3, whatever each of them has in its batch.

All run on the CPU over gloo, under FSDP2 and ZeRO-3 with every parameter sharded. DeepSpeed is not among what the
tests install: `DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed` (with wheel and ninja beforehand).
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed_worker import CASES, STOCK_CASES, collator_of, rows_of, train, trainer_of
from factories import random_batch, tiny_model
from trainer_helpers import changed, snapshot

from hf_vtc.trainers import VtcTrainer
from hf_vtc.trainers.sharding import sharded_units

TESTS = Path(__file__).resolve().parent
ONE_TILE = "vico_router_one_tile"
# what trainers refuse, and the remedy that they name
REFUSED = {
    ("fsdp2", ONE_TILE): "Use `probe='all_tiles'`, or DDP",
    ("zero3", ONE_TILE): "Use `probe='all_tiles'`, or DDP",
    ("zero3", "avg_llava_granularity_tower"): "Use FSDP2",
    **{("zero3", f"convllava_{stage}"): "Use FSDP2" for stage in (1, 2, 3)},
}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    """Results of one process that has the whole batch of every step."""
    return {name: train(name, per_device_train_batch_size=4) for name in CASES}


@pytest.fixture(scope="module", params=["ddp", "fsdp2", "zero3"])
def together(request, tmp_path_factory) -> tuple[str, dict[str, dict]]:
    """Results of two processes, each of which has half of the batch in two micro-batches."""
    if request.param == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is optional")
    return request.param, results_of_two(tmp_path_factory.mktemp(request.param), request.param)


def results_of_two(folder: Path, kind: str, *names: str) -> dict[str, dict]:
    """What two processes found in these cases, or in all of our trainers."""
    result = folder / "result.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent))),
        "DS_ACCELERATOR": "cpu",
    }
    # a hang shows as a timeout
    run = subprocess.run(
        [*launch, str(TESTS / "distributed_worker.py"), str(result), kind, *names],
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(result)


@pytest.mark.slow
def test_a_stock_trainer_shards_the_units_that_accelerate_finds(tmp_path):
    found = results_of_two(tmp_path, "fsdp2", *STOCK_CASES)
    for name, case in STOCK_CASES.items():
        if case.method == "vistog":
            assert "transformer_layer_cls_to_wrap" in found[name]["refused"]
            continue
        expected = train(name, per_device_train_batch_size=4)
        assert found[name]["losses"] == pytest.approx(expected["losses"], abs=1e-4), name
        assert found[name]["sharded"] == len(expected["weights"])
        torch.testing.assert_close(found[name]["weights"], expected["weights"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(tmp_path, together, alone, name):
    kind, results = together
    if (kind, name) in REFUSED:
        assert REFUSED[kind, name] in results[name]["refused"]
        return
    found, expected = results[name], alone[name]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    assert len(expected["losses"]) == 5 and max(expected["losses"]) > 0.1
    assert found["sharded"] == (0 if kind == "ddp" else len(expected["weights"]))
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-4, atol=1e-5)
    # a tied head is saved once
    assert found["weights"].keys() - found["saved"].keys() <= {"lm_head.weight"}
    shared = found["weights"].keys() & found["saved"].keys()
    assert all(torch.equal(found["weights"][key], found["saved"][key]) for key in shared)
    start = trainer_of(name, tmp_path).model
    assert any(not torch.equal(weight, expected["weights"][key]) for key, weight in start.named_parameters())


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_train_as_the_large_batch(name):
    whole = train(name, per_device_train_batch_size=4, max_steps=2)
    split = train(name, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2)
    assert split["losses"] == pytest.approx(whole["losses"], abs=1e-4)
    torch.testing.assert_close(split["weights"], whole["weights"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_trains_moves_and_nothing_else(tmp_path, name):
    trainer = trainer_of(name, tmp_path, per_device_train_batch_size=4, max_steps=2, optim="adamw_torch")
    trainable = {key for key, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    if name == "vico_consistency":
        # every tile is compressed here, through the other connector
        trainable = {key for key in trainable if "multi_modal_projector" not in key}
    before = snapshot(trainer.model)
    trainer.train()
    assert trainable and changed(trainer.model, before) == trainable


def units_run(trainer, step) -> list[str]:
    """What FSDP would gather while `step` runs: names of its units, embeddings and head, in their order."""
    model, seen = trainer.model, []
    units = set(sharded_units(model))
    parts = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    parts |= {name: module for name, module in model.named_modules() if type(module).__name__ in units}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name)) for name, module in parts.items()
    ]
    step()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", [name for name in CASES if name != ONE_TILE])
def test_every_batch_runs_the_same_units(tmp_path, monkeypatch, name, mode):
    trainer = trainer_of(name, tmp_path)
    # as under FSDP or ZeRO-3, which would wait for ever if this failed
    monkeypatch.setattr(VtcTrainer, "is_sharded", True)
    trainer.create_optimizer()
    model, collate = trainer.model, collator_of(trainer.model.config)
    text, one, _, two, *_ = rows_of(model.config)

    def step(batch: dict[str, torch.Tensor]) -> None:
        if mode == "train":
            trainer.training_step(model, batch, torch.tensor(9))
        else:
            model.eval()
            trainer.prediction_step(model, batch, True)

    runs = [units_run(trainer, partial(step, collate(rows))) for rows in ([text], [one], [text, two, one])]
    assert runs[0] == runs[1] == runs[2]
    tower = [unit for unit in runs[0] if "vision_tower" in unit]
    assert "head" in runs[0] and any("language_model" in unit for unit in runs[0])
    # VisToG's tower is gathered as a whole
    assert len(tower) == len(set(tower)) and bool(tower) == (CASES[name].method != "vistog")


@pytest.mark.parametrize("name", [name for name in CASES if name != ONE_TILE])
def test_a_black_tile_changes_no_loss(tmp_path, monkeypatch, name):
    trainer = trainer_of(name, tmp_path)
    model = trainer.model
    batch = collator_of(model.config)(rows_of(model.config)[:1])
    losses = []
    for sharded in (False, True):
        monkeypatch.setattr(VtcTrainer, "is_sharded", sharded)
        losses.append(float(trainer.training_step(model, dict(batch), torch.tensor(9))))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


@pytest.mark.parametrize("method", ["vico", "vistog", "avg_llava", "llavolta", "convllava"])
def test_no_split_modules_are_modules_of_the_model(method):
    """accelerate looks for every class that is named, and fails if there is none."""
    model = tiny_model(method)
    classes = {type(module).__name__ for module in model.modules()}
    for part in (model, model.model):
        assert part._no_split_modules and set(part._no_split_modules) <= classes
    assert any(name.endswith("DecoderLayer") for name in model._no_split_modules)
    assert set(sharded_units(model)) <= set(model._no_split_modules)


def test_which_tiles_are_compressed_changes_no_unit_of_a_stock_trainer():
    """Or processes would wait for each other when they evaluate."""
    model, runs = tiny_model("vico"), []
    for name, module in model.named_modules():
        if type(module).__name__ in model._no_split_modules:
            module.register_forward_pre_hook(lambda *_, name=name: runs[-1].append(name))
    batch = dict(random_batch(model.config, torch.Generator().manual_seed(5), images_per_row=[3]))
    compressed = []
    # none, some and all
    for budget in (1.0, 0.7, 0.26):
        runs.append([])
        with torch.no_grad():
            compressed.append(model(**batch, vtc_budget=budget).router_decisions.float().mean())
    assert 0 == compressed[0] < compressed[1] < compressed[2] == 1
    assert runs[0] and runs[0] == runs[1] == runs[2]
