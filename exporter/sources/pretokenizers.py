"""How byte-level tokenizers cut text into words, by the name GGUF files give in `tokenizer.ggml.pre`.

A tokenizer whose words are cut in other places gives other ids for the same text, and nothing else shows it. So only
names whose published tokenizer.json is known are here, every other one is refused by name. Names and the two flags are
those of llama.cpp (src/llama-vocab.cpp); steps and normalizers are those of the published files, which the models were
trained with: llama.cpp itself leaves out the NFC of Qwen2, Command-R and OLMo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvq.runtime.errors import UnsupportedArchitectureError


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting.

    Attributes:
        steps: pre-tokenizers of a tokenizer.json, applied one after the other; the last is ByteLevel.
        normalizer: of a tokenizer.json; None leaves text as it is.
        ignore_merges: a word that is in the vocabulary is one token, whatever the merges say.
        add_bos: whether texts begin with the BOS token where the file does not say.
    """

    steps: tuple[dict[str, Any], ...]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False
    add_bos: bool = False

    def as_json(self) -> dict[str, Any]:
        """The `pre_tokenizer` of a tokenizer.json."""
        return self.steps[0] if len(self.steps) == 1 else {"type": "Sequence", "pretokenizers": list(self.steps)}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    """Bytes as printable characters; with use_regex, words are cut as GPT-2 does first."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _words(regex: str, **options: Any) -> PreTokenizer:
    return PreTokenizer((_split(regex), _byte_level(use_regex=False)), **options)


DIGITS = {"type": "Digits", "individual_digits": True}
NFC = {"type": "NFC"}
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# OpenAI's cl100k_base as Llama 3 and (with numbers digit by digit) Qwen2 have it.
CL100K = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + REST
# OpenAI's o200k_base: a word begins where capitals begin. Tekken has no contractions and takes numbers digit by digit.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
    rf"|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}"
)

GPT2 = PreTokenizer((_byte_level(use_regex=True),))
GPT_NEOX = PreTokenizer(GPT2.steps, NFC)
STARCODER = PreTokenizer((DIGITS, _byte_level(use_regex=True)))
COMMAND_R = PreTokenizer(STARCODER.steps, NFC)
LLAMA3 = _words(CL100K % "{1,3}", ignore_merges=True, add_bos=True)
SMAUG = _words(CL100K % "{1,3}")
QWEN2 = _words(CL100K % "", normalizer=NFC)
TEKKEN = _words(O200K % ("", "", ""), ignore_merges=True, add_bos=True)
GPT4O = _words(O200K % (CONTRACTION + "?", CONTRACTION + "?", "{1,3}"))
DEEPSEEK_CODER = PreTokenizer(
    (
        _split(r"[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _split("[一-龥ࠀ-一가-퟿]+"), DIGITS,
        _byte_level(use_regex=False),
    )
)  # fmt: skip

PRE_TOKENIZERS = {
    "smollm": STARCODER, "starcoder": STARCODER, "refact": STARCODER, "codeshell": STARCODER, "command-r": COMMAND_R,
    "gpt-2": GPT2, "phi-2": GPT2, "olmo": GPT_NEOX,
    "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "falcon3": LLAMA3, "smaug-bpe": SMAUG, "dbrx": SMAUG,
    "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2,
    "tekken": TEKKEN, "gpt-4o": GPT4O, "llama4": GPT4O, "deepseek-coder": DEEPSEEK_CODER,
}  # fmt: skip


def pre_tokenizer(pre: str | None, name: str) -> PreTokenizer:
    """The way of cutting that a GGUF file names.

    Args:
        pre: `tokenizer.ggml.pre`; None if the file has none, as those from before May 2024. llama.cpp then takes
            "default", which is its stand-in for a tokenizer it does not know, and warns that quality suffers: neither
            is taken here.
        name: of the file, for messages.

    Raises:
        UnsupportedArchitectureError: none is named, or one that is not known.
    """
    if pre is None or pre == "default":
        what = "does not say" if pre is None else "says 'default' for"
        raise UnsupportedArchitectureError(
            f"{name} {what} how its tokenizer cuts text into words (tokenizer.ggml.pre), and a guess would give wrong"
            " ids; convert the model again with a present llama.cpp, or give its Hugging Face folder"
        )
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedArchitectureError(
            f"pre-tokenizer {pre[:40]!r} of {name} is not known; known: {', '.join(sorted(PRE_TOKENIZERS))};"
            " give the model's Hugging Face folder with its tokenizer.json"
        )
    return PRE_TOKENIZERS[pre]
