"""The tokenizer of the tiny models and the one text format that they know (ChatML, as InternVL writes it)."""

import itertools
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .pages import BOX_COLOURS, PAGE_COLOURS
from .questions import TEMPLATES

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
VOCAB_SIZE = 400
TOKENS_PER_TILE = 16
MAX_POSITIONS = 2048


def corpus() -> list[str]:
    """Every question and answer word of the data set, in a fixed order: what the byte pairs are merged on."""
    texts = []
    for wordings in TEMPLATES.values():
        for wording in wordings:
            for colour, row, column in itertools.product(BOX_COLOURS, range(1, 5), range(1, 5)):
                texts.append("user\n" + wording.format(colour=colour, row=row, column=column))
    answers = ["portrait", "landscape", "yes", "no", "empty", "row 1, column 2", *PAGE_COLOURS, *BOX_COLOURS]
    answers += [f"{first} 12, {second} 3" for first, second in itertools.permutations(BOX_COLOURS, 2)]
    return texts + [f"assistant\n{answer}" for answer in answers * 20]


def build_tokenizer(texts: Iterable[str] | None = None, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train the tokenizer: byte-level BPE of at most `vocab_size` entries, which can write any text.

    It is merged on `texts`, or `corpus()`.

    Digits are single tokens. Padding is `<|endoftext|>` on the left, the end of an answer is `<|im_end|>`, and nothing
    is added in front. The same installed `tokenizers` gives the same vocabulary every time.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus() if texts is None else texts, trainer)
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


def format_prompt(question: str, num_tiles: int) -> str:
    """Text that asks one question about one image of `num_tiles` tiles, up to where the answer begins."""
    image = "<img>" + "<IMG_CONTEXT>" * (TOKENS_PER_TILE * num_tiles) + "</img>"
    return f"<|im_start|>user\n{image}\n{question}<|im_end|>\n<|im_start|>assistant\n"
