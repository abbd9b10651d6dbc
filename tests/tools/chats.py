"""Chat templates as published models have them, small bundles that carry one, and what is asked of conversations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer

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


GREEDY = {"temperature": 0.0, "max_tokens": 9}
USER, ASSISTANT, SYSTEM = ({"role": role, "content": role} for role in ("user", "assistant", "system"))


def with_special(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """The tokenizer with the special tokens that a template needs."""
    found = Tokenizer.from_str(tokenizer.to_str())
    found.add_special_tokens(SPECIAL[name])
    return found


def special_of(name: str) -> dict[str, str]:
    """Special tokens by the names that a template knows them by."""
    return {"bos_token": SPECIAL[name][0], "eos_token": SPECIAL[name][1]}


def save_tokenizer(tokenizer: Tokenizer, name: str, folder: Path) -> None:
    """Tokenizer and template in the files that transformers saves them in."""
    with_special(tokenizer, name).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).write_text(json.dumps(special_of(name), indent=2))


def chat_bundle(checkpoint: Path, tokenizer: Tokenizer, name: str, folder: Path) -> Path:
    """A bundle of the checkpoint with that template, by way of a Hugging Face folder."""
    shutil.copytree(checkpoint, folder / "checkpoint")
    save_tokenizer(tokenizer, name, folder / "checkpoint")
    return export(str(folder / "checkpoint"), folder / name, weights="fp32").path


def said(replies) -> str:
    """The text of a reply."""
    return "".join(response.text for response in replies)


def cached(conversation) -> str:
    """The text in the cache, and sampled but not yet in it."""
    session = conversation.session
    text = session.model.tokenizer.decode([*session.tokens, *session.pending], skip_special_tokens=False)
    return text.replace("\ufffd", "")  # of characters that random weights leave incomplete


def counted(session) -> list[int]:
    """Lengths of everything the session feeds to the model from now on, as a list that grows."""
    fed, step = [], session.step

    def counting(ids, *rest):
        fed.append(len(ids))
        step(ids, *rest)

    session.step = counting
    return fed


def spelled(conversation, question: str) -> str:
    """What the cache must spell when the reply to a question begins: the template over all messages."""
    messages = [*conversation.messages, {"role": "user", "content": question}]
    return conversation.template.render(messages).replace("\ufffd", "")
