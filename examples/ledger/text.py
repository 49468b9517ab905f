"""The tokenizer of the ledger models: byte pairs merged on what is asked and answered, digits one by one."""

import itertools

from digit_forms.text import MAX_POSITIONS, SPECIAL_TOKENS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .pages import COLOURS, PAPERS
from .questions import TEMPLATES

VOCAB_SIZE = 400


def corpus() -> list[str]:
    """Every question and answer word, in a fixed order."""
    texts = []
    for _, template in TEMPLATES.values():
        for colour, row, column in itertools.product(COLOURS, range(1, 5), range(1, 5)):
            texts.append("user\n" + template.format(colour=colour, row=row, column=column))
    answers = ["yes", "no", *PAPERS, *(f"{colour} r1" for colour in COLOURS)]
    return texts + [f"assistant\n{answer}" for answer in answers * 20]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; special tokens and sides as those of `digit_forms`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|endoftext|>", "<|im_end|>")],
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
