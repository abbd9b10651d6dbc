"""tokenizer.json beside tokenizer_config.json: ids are those of the tokenizer that transformers makes of both."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from tokenizers import Tokenizer, processors

from kvq.exporter.checkpoint import load_checkpoint
from kvq.exporter.sources.huggingface import HuggingFaceFolder
from kvq.runtime.errors import CheckpointError
from tests.text.test_continuing import TOKENIZERS
from tests.tools.checkpoints import TINY, save_checkpoint, small_tokenizer
from tests.tools.kvdata import examples
from tests.tools.packages import needs
from tests.tools.tokenizer_texts import TEXT

ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
CONFIGS = {
    "Llama's class, which begins with BOS": {"tokenizer_class": "LlamaTokenizer"},
    "Llama's class without BOS": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False},
    "Llama's class with both": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True},
    "EOS alone": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False, "add_eos_token": True},
    "Gemma's class": {"tokenizer_class": "GemmaTokenizer"},
    "GPT-NeoX' class": {"tokenizer_class": "GPTNeoXTokenizer"},
    "GPT-NeoX' class with BOS": {"tokenizer_class": "GPTNeoXTokenizer", "add_bos_token": True},
    "any class, which leaves the file as it is": {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True},
    "a prefix space": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
    "no prefix space": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False},
    "tokens that only the configuration calls special": {
        "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["he", "re"]},
    "tokens of the configuration": {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {
        "9": {"content": "nd", "lstrip": False, "rstrip": True, "single_word": False, "normalized": False,
              "special": True}}},
}  # fmt: skip


def tokenizer() -> Tokenizer:
    """A byte-level tokenizer with BOS and EOS, and a post-processor of its own."""
    found = small_tokenizer(490)
    found.add_special_tokens(list(ENDS.values()))
    found.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", found.token_to_id("</s>"))]
    )
    return found


@pytest.fixture(scope="module", params=[*CONFIGS, "sentencepiece-like"])
def pair(request, tmp_path_factory):
    """kvq's tokenizer and transformers' of one folder."""
    transformers = needs("transformers")
    folder = tmp_path_factory.mktemp("resolved") / "c"
    save_checkpoint(folder, TINY, tokenizer=False)
    config = CONFIGS.get(request.param, {"tokenizer_class": "LlamaTokenizer", "legacy": True})
    made = TOKENIZERS["legacy"] if request.param == "sentencepiece-like" else tokenizer()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(ENDS | {"unk_token": None} | config))
    os.environ["HF_HUB_OFFLINE"] = "1"
    ours = Tokenizer.from_str(HuggingFaceFolder(folder, "c").tokenizer_json())
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@given(text=TEXT)
@examples(40)
def test_ids_are_those_of_transformers(pair, text):
    ours, theirs = pair
    for part in (text, f"the and {text}== <s>x</s> the"):
        assert ours.encode(part).ids == theirs(part)["input_ids"]
        assert ours.encode(part, add_special_tokens=False).ids == theirs(part, add_special_tokens=False)["input_ids"]


def test_a_file_that_needs_no_change_is_carried_over_as_it_is(tmp_path):
    folder = save_checkpoint(tmp_path / "c", TINY)
    text = (folder / "tokenizer.json").read_text()
    assert HuggingFaceFolder(folder, "c").tokenizer_json() == text
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert HuggingFaceFolder(folder, "c").tokenizer_json() == text


@pytest.mark.parametrize("config", [{"add_bos_token": True}, {"add_eos_token": True, "add_bos_token": False}], ids=str)
def test_a_token_to_add_that_is_not_there_is_named(config, tmp_path):
    folder = save_checkpoint(tmp_path / "c", TINY)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | config))
    with pytest.raises(CheckpointError, match=r"has no '</?s>' to add"):
        HuggingFaceFolder(folder, "c").tokenizer_json()


@pytest.mark.parametrize(
    ("templates", "wanted"),
    [
        ([{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}], "y"),
        ([{"name": [], "template": "x"}, {"name": {}, "template": "x"}, 5, {"template": "x"}], None),
        ([{"name": "default", "template": ["y"]}], None),
        ({"default": "y"}, None),
    ],
)
def test_of_several_templates_the_default_is_taken(templates, wanted, tmp_path):
    folder = save_checkpoint(tmp_path / "c", TINY)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert HuggingFaceFolder(folder, "c").chat_template() == wanted


def test_vocabulary_and_merges_alone_are_a_tokenizer(tmp_path):
    folder = save_checkpoint(tmp_path / "c", TINY, tokenizer=False)
    small_tokenizer().model.save(str(folder))
    assert sorted(file.name for file in folder.glob("*.txt")) == ["merges.txt"]
    ours = Tokenizer.from_str(load_checkpoint(folder).tokenizer_json())
    text = "The lighthouse keeper climbed the stairs. é 漢字\n"
    assert ours.decode(ours.encode(text).ids) == text
    assert ours.get_vocab_size() == small_tokenizer().get_vocab_size()
