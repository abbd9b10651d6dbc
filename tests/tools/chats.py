"""Chat templates as published models have them, and small bundles that carry one."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kvq.exporter.export import export

# As in SmolLM2-Instruct's tokenizer_config.json.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Meta-Llama-3-Instruct's, with the whitespace control, date and JSON of its successors.
LLAMA3 = """{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set year = strftime_now("%Y") %}
{%- endif %}
{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Unknown role: ' + message['role'] | tojson) }}
    {%- endif %}
    {#- a comment #}
    {% generation %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
# Puts the system prompt into the last question, as Mistral's does: what precedes changes with every turn.
REWRITING = """{{ bos_token }}{% for message in messages -%}
{% if message.role == 'user' -%}
{% if loop.last and messages[0].role == 'system' %}[INST] {{ messages[0].content }}

{{ message.content }} [/INST]{% else %}[INST] {{ message.content }} [/INST]{% endif %}
{%- elif message.role == 'assistant' %} {{ message.content | trim }}{{ eos_token }}{% endif %}
{%- endfor %}"""
SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "rewriting": ["<s>", "</s>"],
}
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "rewriting": REWRITING}


def chat_tokenizer(tokenizer: Tokenizer, name: str) -> PreTrainedTokenizerFast:
    """transformers' tokenizer with the template and the special tokens it needs."""
    special = SPECIAL[name]
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])
    wrapped.chat_template = TEMPLATES[name]
    return wrapped


def chat_bundle(checkpoint: Path, tokenizer: Tokenizer, name: str, folder: Path) -> Path:
    """A bundle of the checkpoint with that template, by way of files as transformers saves them."""
    shutil.copytree(checkpoint, folder / "checkpoint")
    chat_tokenizer(tokenizer, name).save_pretrained(folder / "checkpoint")
    return export(str(folder / "checkpoint"), folder / name, weights="fp32").path
