"""Rows of training are what `apply_chat_template` gives, for tokenizers and templates of every kind."""

import inspect
import io
import json
import logging

import numpy as np
import pytest
import transformers
from factories import tiny_processor
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_vtc.data import IGNORE_INDEX, RecordError, VtcCollator, load_records
from hf_vtc.models.chat_templates_vtc import chatml_template, mistral_template, vicuna_template
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.processing_vtc import VtcProcessor
from hf_vtc_cli.answers import model_inputs

IMAGE_TOKEN = "<image>"
CHARACTERS = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:.,?!'[]/|<>_1234567890\n"
MERGES = [("▁", "▁"), *[("▁", letter) for letter in CHARACTERS[1:] if letter.isalnum()]]
MERGES += [("▁r", "e"), ("▁re", "d"), ("▁b", "l"), ("▁bl", "u"), ("▁blu", "e"), ("U", "S"), ("US", "E"), ("USE", "R")]
MERGES += [("\n", "\n")]


def llama_vocabulary():
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for token in (*CHARACTERS, *(first + second for first, second in MERGES)):
        vocab.setdefault(token, len(vocab))
    return vocab


def backend(normalizer=None, pre_tokenizer=None, bos=True):
    """A `tokenizer.json` of Llama's kind: byte fallback BPE, spaces as "▁", `<s>` from the post-processor."""
    vocab = llama_vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES, unk_token="<unk>", byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", vocab["<s>"])])
    return tokenizer


def wrapped(tokenizer):
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def prepend_replace():
    return wrapped(backend(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])))


def metaspace(scheme):
    return lambda: wrapped(backend(pre_tokenizer=pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)))


def without_bos():
    return wrapped(backend(normalizers.Replace(" ", "▁"), bos=False))


def llama(legacy):
    def build():
        if "vocab" not in _parameters(transformers.LlamaTokenizer):
            pytest.skip("before transformers 5 this class reads a file of sentencepiece")
        fields = {"add_bos_token": True, "add_eos_token": False, "pad_token": "<unk>", "legacy": legacy}
        return transformers.LlamaTokenizer(vocab=llama_vocabulary(), merges=MERGES, **fields)

    return build


def _parameters(owner):
    return inspect.signature(owner.__init__).parameters


def sentencepiece(tmp_path_factory, legacy):
    """A tokenizer without the Rust library, from a model that sentencepiece trains here: it knows no offsets."""
    trainer = pytest.importorskip("sentencepiece", reason="sentencepiece is optional").SentencePieceTrainer
    model = io.BytesIO()
    lines = [
        "USER: what is it? ASSISTANT: red",
        "[INST] why is it blue? [/INST] so be it",
        "A chat, 12 34 é 数 and spaces, be brief, one",
    ]
    trainer.train(
        sentence_iterator=iter(lines * 20),
        model_writer=model,
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    fields = {"legacy": legacy, "pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if "vocab" in _parameters(transformers.LlamaTokenizer):
        # transformers 5, where Llama's own class runs on the Rust library
        file = str(folder / "tokenizer.model")
        return transformers.SentencePieceBackend(vocab_file=file, special_tokens_pattern="bos", **fields)
    return transformers.LlamaTokenizer(str(folder / "tokenizer.model"), **fields)


TOKENIZERS = {
    "prepend_replace": prepend_replace,
    "metaspace_first": metaspace("first"),
    "metaspace_always": metaspace("always"),
    "metaspace_never": metaspace("never"),
    "without_bos": without_bos,
    "llama_legacy": llama(True),
    "llama": llama(False),
    "sentencepiece_legacy": True,
    "sentencepiece": False,
}
# without marks, and with an answer's space in neither the prompt nor the mark, as in the templates of llava-hf
PLAIN_VICUNA = """\
{%- for message in messages -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
{{- {'user': 'USER: ', 'assistant': 'ASSISTANT: ', 'system': ''}[message['role']] -}}
{{- text + (eos_token if message['role'] == 'assistant' else ' ') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"""
LATE_MARK = PLAIN_VICUNA.replace(
    "{{- text + (eos_token if message['role'] == 'assistant' else ' ') -}}",
    "{%- if message['role'] == 'assistant' -%}{% generation %}{{- text + eos_token -}}{% endgeneration %}"
    "{%- else -%}{{- text + ' ' -}}{%- endif -%}",
)
TEMPLATES = {
    "vicuna": vicuna_template(IMAGE_TOKEN),
    "mistral": mistral_template(IMAGE_TOKEN),
    "plain": PLAIN_VICUNA,
    "late_mark": LATE_MARK,
    "writes_bos": "{{- bos_token -}}" + vicuna_template(IMAGE_TOKEN),
}


def picture(height=40, width=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def processor_of(tokenizer, template):
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return VtcProcessor(
        VtcImageProcessor(tiling="dynamic", size=32, max_tiles=2),
        tokenizer,
        image_seq_length=4,
        image_token=IMAGE_TOKEN,
        image_start_token=None,
        image_end_token=None,
        chat_template=template,
    )


def chat(*turns, images=0, system=None):
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for idx, (question, answer) in enumerate(turns):
        shown = [{"type": "image", "image": picture()} for _ in range(images if idx == 0 else 0)]
        messages += [
            {"role": "user", "content": [*shown, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    return messages


CHATS = [
    chat(("what", "red")),
    chat(("what", "red"), ("why is it", "blue, so"), ("and", "a red one"), images=1),
    chat(("two", "USER"), ("  spaces  ", "a  b"), images=2, system="be brief"),
    chat(("numbers", "12 34"), ("é and 数", "blue é")),
]


def encoded(processor, messages, **options):
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **options)
    return inputs["input_ids"][0].tolist()


def check_row(processor, messages):
    """The row is that of the host, each prompt of generation its beginning, and behind it the answer is learned."""
    batch = VtcCollator(processor)([{"messages": messages}])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids == encoded(processor, messages)
    learned = set()
    for idx, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encoded(processor, messages[:idx], add_generation_prompt=True)
        assert ids[: len(prompt)] == prompt
        end = ids.index(processor.tokenizer.eos_token_id, len(prompt)) + 1
        learned |= set(range(len(prompt), end))
        answer = processor.tokenizer.decode(ids[len(prompt) : end - 1])
        assert answer.replace(" ", "") == message["content"][0]["text"].replace(" ", "")
    assert [idx for idx, label in enumerate(labels) if label != IGNORE_INDEX] == sorted(learned)
    assert all(labels[idx] == ids[idx] for idx in learned)


@pytest.mark.window
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_rows_are_those_of_the_chat_template(tokenizer, template, tmp_path_factory):
    build = TOKENIZERS[tokenizer]
    built = sentencepiece(tmp_path_factory, build) if isinstance(build, bool) else build()
    processor = processor_of(built, TEMPLATES[template])
    for messages in CHATS:
        check_row(processor, messages)


@pytest.mark.window
def test_rows_begin_as_the_tokenizer_begins_texts(tmp_path_factory):
    """What the test above compares is no accident of both sides: `<s>` is there once, from whoever writes it."""
    for template in ("vicuna", "writes_bos"):
        (ids,) = VtcCollator(processor_of(prepend_replace(), TEMPLATES[template]))([{"messages": CHATS[0]}])[
            "input_ids"
        ]
        assert ids[0] == 1 and (ids[1:] != 1).all()


@pytest.mark.window
@pytest.mark.parametrize("tokenizer", ["prepend_replace", "metaspace_always", "without_bos"])
def test_rows_with_a_start_token_that_is_read_as_text(tokenizer):
    processor = processor_of(TOKENIZERS[tokenizer](), TEMPLATES["vicuna"])
    # it melts with the space before it
    processor.image_start_token = "r"
    for messages in CHATS:
        check_row(processor, messages)


@pytest.mark.window
def test_rows_of_every_method(method):
    processor = tiny_processor(method)
    processor.chat_template = chatml_template(processor.image_token)
    for messages in CHATS:
        check_row(processor, messages)


def test_rows_do_not_depend_on_the_check():
    """`check` counts what batches hold."""
    processor = processor_of(prepend_replace(), TEMPLATES["vicuna"])
    for messages in CHATS:
        record = {"messages": messages}
        length = VtcCollator(processor)([record])["input_ids"].shape[1]
        assert len(load_records([record], collator=VtcCollator(processor, max_length=length))) == 1


def with_template(template, tokenizer=prepend_replace):
    return VtcCollator(processor_of(tokenizer(), template))


def learned_of(collator, messages):
    labels = collator([{"messages": messages}])["labels"][0]
    return collator.processor.tokenizer.decode(labels[labels != IGNORE_INDEX])


def test_a_template_decides_what_is_learned():
    half = vicuna_template(IMAGE_TOKEN).replace("+ eos_token -}}", "-}}{%- endgeneration -%}{{- eos_token -}}")
    half = half.replace("{{- eos_token -}}\n        {%- endgeneration -%}", "{{- eos_token -}}")
    assert learned_of(with_template(half), CHATS[0]) == learned_of(with_template(TEMPLATES["vicuna"]), CHATS[0])[:-4]


@pytest.mark.parametrize("template", ["plain", "vicuna"])
def test_answers_without_an_end_are_warned_of_once(template, caplog):
    def warnings_of(template):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hf_vtc"):
            collator = with_template(template)
            texts = [learned_of(collator, CHATS[0]) for _ in range(2)]
        return texts[0].strip(), sum("does not learn to stop" in each.message for each in caplog.records)

    assert warnings_of(TEMPLATES[template]) == ("red</s>", 0)
    endless = TEMPLATES[template].replace("eos_token if", "'' if").replace(" + eos_token -}}", " -}}")
    assert warnings_of(endless) == ("red", 1)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # the system prompt in front of the last question only, as in Mistral's own template
        (
            "{%- for message in messages -%}{{- '[INST] ' -}}"
            "{%- if loop.revindex0 < 2 -%}last {% endif %}"
            "{{- message['content'][0]['text'] + eos_token -}}{%- endfor -%}",
            "must only append text for each further message, but message 1",
        ),
        (TEMPLATES["plain"].replace("{{- 'ASSISTANT:' -}}", "{{- 'BOT:' -}}"), "its generation prompt is not how"),
        (
            TEMPLATES["plain"].replace("'ASSISTANT:'", "'ASSISTANT: '"),
            "would be given other tokens before this answer",
        ),
        (
            TEMPLATES["late_mark"]
            .replace("{{- text + eos_token -}}", "{{- eos_token -}}")
            .replace("{% generation %}", "{{- text -}}{% generation %}"),
            "generation starts . tokens before the chat template marks the answer",
        ),
        (
            TEMPLATES["late_mark"].replace("{% generation %}", "").replace("{% endgeneration %}", "")
            + "{% generation %}{% endgeneration %}",
            "marks nothing of this answer",
        ),
        (TEMPLATES["plain"].replace("{{- text +", "{{- text[1:] +"), "leaves out or changes the text of the `user`"),
        ("{{- raise_exception('no chats') -}}", "The chat template refuses the conversation: no chats"),
    ],
    ids=["system_last", "other_prompt", "split_token", "late_mark", "no_mark", "leaves_out", "refuses"],
)
def test_templates_that_train_otherwise_than_they_generate_are_refused(template, message):
    collator = with_template(template)
    with pytest.raises(ValueError, match=f"Record 0 of the batch.*{message}"):
        collator([{"messages": chat(("what", "red"), ("why", "blue"))}])


def test_answers_whose_beginning_merges_with_the_prompt_are_refused():
    """Generation would never write that token: it is given the first line break, and writes the second."""
    template = "{%- for message in messages -%}{{- message['role'] + '\\n' + message['content'][0]['text'] -}}"
    template += "{{- eos_token -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'assistant\\n' -}}{%- endif -%}"
    collator = with_template(template)
    assert learned_of(collator, chat(("what", "red"))) == "red</s>"
    with pytest.raises(RecordError, match="record 0: Message 1: generation would be given other tokens .*white space"):
        load_records([{"messages": chat(("what", "\nred"))}], collator=collator)


def test_texts_that_hold_a_token_of_the_model_are_refused_before_training():
    processor = tiny_processor("vico")
    for token in ("<|im_end|>", "</img>"):
        for messages in (chat((f"see {token}", "red")), chat(("what", f"a {token} b"))):
            with pytest.raises(
                RecordError, match=f"record 0: Message .: the text holds '{token}'".replace("|", "\\|")
            ):
                load_records([{"messages": messages}], collator=VtcCollator(processor))


@pytest.mark.window
@pytest.mark.parametrize("template", ["vicuna", "plain"])
def test_answers_of_weight_zero_are_shown_and_not_learned(template):
    messages = [dict(message) for message in CHATS[1]]
    collator = with_template(TEMPLATES[template])
    whole = collator([{"messages": messages}])
    messages[1]["weight"] = 0
    batch = collator([{"messages": messages}])
    assert batch["input_ids"].tolist() == whole["input_ids"].tolist()
    learned = (batch["labels"] != IGNORE_INDEX) & (whole["labels"] != IGNORE_INDEX)
    assert (batch["labels"] != IGNORE_INDEX).sum() == learned.sum() < (whole["labels"] != IGNORE_INDEX).sum()
    text = learned_of(collator, messages)
    assert "blue" in text and "a red one" in text and not text.strip().startswith("red")
    # through the data set, and through its columns for TRL
    records = load_records(json.loads(json.dumps([{"messages": chat(("q", "no"), ("r", "yes"))}])))
    assert "weight" not in records[0]["messages"][1]


@pytest.mark.window
@pytest.mark.parametrize("template", ["vicuna", "writes_bos"])
def test_questions_of_the_command_line_are_the_prompts_of_training(template):
    processor = processor_of(prepend_replace(), TEMPLATES[template])
    inputs = model_inputs(processor, [picture()], "what", batch_size=2)
    (ids,) = VtcCollator(processor)([{"messages": chat(("what", "red"), images=1)}])["input_ids"]
    assert inputs["input_ids"].tolist() == [ids[: inputs["input_ids"].shape[1]].tolist()] * 2
    assert len(inputs["pixel_values"]) == 2
