"""Fine-tune a checkpoint on your own records by LoRA: one GPU, several, or a CPU for a trial.

    accelerate launch examples/finetune_lora.py --model my-avg --data mine.json --image-folder imgs --output my-lora
    python examples/finetune_lora.py --model model_cards/vico-tiny --data examples/finetune_data/records.json \\
        --output outputs/forms-lora --epochs 30 --learning-rate 2e-3 --merge

Adapters go to the language model; the compressor (connectors, and what the method has besides) trains whole, with a
learning rate of its own. The output folder holds both and the processor, `merged` in it a model without adapters.
Learning rates are those of LLaVA-1.5's own LoRA script, 2e-4 and 2e-5 for the connector; rank and scale are ours.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoProcessor, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_vtc import AutoModelForVision2Seq
from hf_vtc.data import VtcCollator, load_records
from hf_vtc.lora import default_lora_config, quantization_config
from hf_vtc.trainers import Responses, VtcTrainer


class FineTuneTrainer(VtcTrainer):
    """Next-token loss with the compression that the model chooses by itself; logs how many visual tokens it keeps."""

    without_effect = ("use_liger_kernel",)

    def __init__(self, *args: Any, compressor_learning_rate: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.compressor_learning_rate = compressor_learning_rate

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        responses = Responses.from_labels(inputs.pop("labels"))
        loss, outputs = self.next_token_loss(model, responses, inputs, num_items_in_batch)
        self.record_visual_tokens(outputs)
        kept = outputs.num_visual_tokens
        if kept is not None:
            reserved = int((inputs["input_ids"] == self.unwrap(model).config.image_token_id).sum())
            self.record("kept_share", int(kept.sum()) / reserved, reserved)
        loss = self.across_processes(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = args[0] if args else self.model
            trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
            compressor = [parameter for name, parameter in trained if ".modules_to_save." in name]
            adapters = [parameter for name, parameter in trained if ".modules_to_save." not in name]
            groups = [
                # decay would shrink routers, which this loss does not teach
                {"params": adapters, "lr": self.args.learning_rate, "weight_decay": self.args.weight_decay},
                {"params": compressor, "lr": self.compressor_learning_rate, "weight_decay": 0.0},
            ]
            optimizer_class, fields = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class([group for group in groups if group["params"]], **fields)
        return super().create_optimizer(*args)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id of a model of hf_vtc")
    parser.add_argument("--data", required=True, help=".json, .jsonl or .parquet file, or a folder of them")
    parser.add_argument("--image-folder", help="where paths of images start; default: the folder of the data")
    parser.add_argument("--output", required=True, type=Path, help="folder for the adapter and its checkpoints")
    parser.add_argument("--eval-data", help="records to measure the loss on after every epoch")
    parser.add_argument("--on-error", choices=["raise", "skip"], default="raise", help="what to do with bad records")
    parser.add_argument(
        "--check-images", choices=["pixels", "header"], default="pixels", help="header: decode none before training"
    )
    parser.add_argument("--allow-urls", action="store_true", help="download images that are addresses")
    parser.add_argument("--max-length", type=int, help="tokens per conversation; text beyond is cut, images never")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=4, help="records per device and forward pass")
    parser.add_argument("--accumulate", type=int, default=1, help="forward passes per optimizer step")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of the adapters")
    parser.add_argument("--compressor-learning-rate", type=float, default=2e-5)
    parser.add_argument("--freeze-compressor", action="store_true", help="train adapters alone")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--adapter", help="folder or Hub id of an adapter to train on, in place of a fresh one")
    parser.add_argument("--quantize", choices=["4bit", "8bit"], help="QLoRA: needs a GPU and bitsandbytes")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, ... or none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")
    parser.add_argument("--merge", action="store_true", help="write a model without adapters as well")
    return parser.parse_args(arguments)


def load_model(args: argparse.Namespace, dtype: torch.dtype) -> PeftModel:
    """The checkpoint with a fresh adapter or with that of `--adapter`, whose weights are trained in float32."""
    fields = {"dtype": dtype, "trust_remote_code": args.trust_remote_code}
    if args.quantize:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
        eight = {"load_in_8bit": True} if args.quantize == "8bit" else {}
        fields["quantization_config"] = quantization_config(config, **eight)
        fields["device_map"] = {"": PartialState().local_process_index}
    model = AutoModelForVision2Seq.from_pretrained(args.model, **fields)
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    else:
        compressor = () if args.freeze_compressor else None
        lora = default_lora_config(model, args.rank, args.alpha, args.dropout, compressor=compressor)
        model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # steps of the optimizer are smaller than bfloat16 can hold
            parameter.data = parameter.data.float()
    return model


def training_arguments(args: argparse.Namespace, half: bool) -> TrainingArguments:
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        # a share of all steps
        warmup_steps=0.03,
        bf16=half,
        dataloader_num_workers=args.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="epoch" if args.eval_data else "no",
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        save_total_limit=2,
        report_to=args.report_to,
        seed=args.seed,
        # a row without an image uses what trains all the same, and frozen weights need no gradient
        ddp_find_unused_parameters=False,
        **(checkpointing if args.gradient_checkpointing else {}),
    )


def write_merged(args: argparse.Namespace, processor) -> None:
    """The model with the adapter folded in, as an ordinary checkpoint, made from what was written to disk."""
    # under ZeRO-3 it would come in parts, and this process is alone here
    unset_hf_deepspeed_config()
    base = AutoModelForVision2Seq.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    merged = PeftModel.from_pretrained(base, str(args.output)).merge_and_unload()
    merged.save_pretrained(args.output / "merged")
    processor.save_pretrained(args.output / "merged")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    set_seed(args.seed)
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    collator = VtcCollator(processor, max_length=args.max_length)
    checked = {"on_error": args.on_error, "check_images": args.check_images, "allow_urls": args.allow_urls}
    checked["collator"] = collator
    records = load_records(args.data, args.image_folder, **checked)
    eval_records = load_records(args.eval_data, args.image_folder, **checked) if args.eval_data else None
    model = load_model(args, torch.bfloat16 if half else torch.float32)
    model.print_trainable_parameters()
    trainer = FineTuneTrainer(
        model,
        training_arguments(args, half),
        compressor_learning_rate=args.compressor_learning_rate,
        train_dataset=records,
        eval_dataset=eval_records,
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    trainer.save_model()
    if trainer.is_world_process_zero():
        processor.save_pretrained(args.output)
        if args.merge:
            write_merged(args, processor)


if __name__ == "__main__":
    main()
