"""Chat templates for prompts with images: one placeholder per image, where its content item stands."""

# what every template does with the content of a message; images stand where their content items stand
_PARTS = """\
{%- macro parts(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] in ['image', 'image_url'] -%}
                {{- IMAGE_TOKEN + '\\n' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception("Content parts must be of type text or image, got " + (part['type'] | string)) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""
# ChatML without a default system prompt (InternVL's `internvl2_5`); the parts that a model is trained to write are
# marked for `return_assistant_tokens_mask`, here and below
_CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- parts(message['content']) + '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
        {{- parts(message['content']) + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def chatml_template(image_token: str) -> str:
    """The default chat template, with `image_token` where an image stands."""
    return (_PARTS + _CHATML).replace("IMAGE_TOKEN", repr(image_token))


# the conversation `vicuna_v1` of LLaVA-1.5; the tokenizer writes the first token, and the answer's space is its own
_VICUNA = """\
{%- if messages[0]['role'] == 'system' -%}
    {{- parts(messages[0]['content']) + ' ' -}}
{%- else -%}
    {{- SYSTEM + ' ' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' + parts(message['content']) + ' ' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}
            {{- ' ' + parts(message['content']) + eos_token -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def vicuna_template(image_token: str) -> str:
    """The chat template of LLaVA-1.5 on Vicuna (`vicuna_v1`), with `image_token` where an image stands."""
    return (_PARTS + _VICUNA).replace("IMAGE_TOKEN", repr(image_token)).replace("SYSTEM", repr(_VICUNA_SYSTEM))


# the conversation `mistral_instruct` of LLaVA-NeXT
_MISTRAL = """\
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- ' ' + parts(message['content']) + eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- '[INST] ' + parts(message['content']) + ' [/INST]' -}}
    {%- endif -%}
{%- endfor -%}
"""


def mistral_template(image_token: str) -> str:
    """The chat template of LLaVA-NeXT on Mistral, with `image_token` where an image stands."""
    return (_PARTS + _MISTRAL).replace("IMAGE_TOKEN", repr(image_token))


def chat_template_for(decoder_type: str, image_token: str) -> str:
    """The chat template that LLaVA's code chooses for a decoder, given by its `model_type`."""
    templates = {"llama": vicuna_template, "mistral": mistral_template}
    return templates.get(decoder_type, chatml_template)(image_token)
