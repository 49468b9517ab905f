"""Fine-tune with TRL's SFTTrainer as it is: adapters and compressor, or with `--full` every weight.

    pip install trl
    python examples/sft_trl.py --model model_cards/vico-tiny --data examples/finetune_data/records.json \\
        --output outputs/forms-sft --epochs 20 --learning-rate 1e-3

Records, pictures and labels are those of `hf_vtc.data`, so `max_length` of TRL stays None: our collator cuts text and
never an image.
"""

import argparse

import torch
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer

from hf_vtc import AutoModelForVision2Seq
from hf_vtc.data import VtcCollator, load_records
from hf_vtc.lora import default_lora_config


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id of a model of hf_vtc")
    parser.add_argument("--data", required=True, help=".json, .jsonl or .parquet file, or a folder of them")
    parser.add_argument("--image-folder", help="where paths of images start; default: the folder of the data")
    parser.add_argument(
        "--check-images", choices=["pixels", "header"], default="pixels", help="header: decode none before training"
    )
    parser.add_argument("--output", required=True)
    parser.add_argument("--full", action="store_true", help="train every weight, without adapters")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-length", type=int, help="tokens per conversation; text beyond is cut, images never")
    args = parser.parse_args(arguments)

    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForVision2Seq.from_pretrained(args.model, dtype=torch.float32)
    collator = VtcCollator(processor, max_length=args.max_length)
    records = load_records(args.data, args.image_folder, check_images=args.check_images, collator=collator)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=args.output,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            bf16=half,
            max_length=None,
            remove_unused_columns=False,
            # the loss has no gradient for routers, which decay would shrink
            weight_decay=0.0,
            report_to="none",
        ),
        train_dataset=records.to_dataset(),
        data_collator=collator,
        processing_class=processor,
        peft_config=None if args.full else default_lora_config(model),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
