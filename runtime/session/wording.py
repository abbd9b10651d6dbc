"""What a bundle says about text: its tokenizer and its chat template."""

from __future__ import annotations

from tokenizers import Tokenizer

from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.manifest import CHAT_TEMPLATE, TOKENIZER
from kvq.runtime.errors import BundleError, ChatTemplateError, TokenizerError
from kvq.runtime.text.template import ChatTemplate
from kvq.runtime.text.tokenizer import load_tokenizer


def tokenizer_of(bundle: Bundle) -> Tokenizer | None:
    """A bundle's tokenizer, None where it has none.

    Raises:
        BundleError: it cannot be read.
    """
    if TOKENIZER not in bundle.manifest.files:
        return None
    try:
        tokenizer = load_tokenizer((bundle.path / TOKENIZER).read_text(encoding="utf-8"))
    except (TokenizerError, OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{TOKENIZER} cannot be read ({error}); export the bundle again") from None
    # Left behind by training: either would change a prompt without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def template_of(bundle: Bundle, tokenizer: Tokenizer | None) -> ChatTemplate:
    """A bundle's chat template, for its tokenizer; a plain transcript where it has none.

    Raises:
        ChatTemplateError: the bundle's template is not valid.
    """
    manifest = bundle.manifest
    special_tokens = dict(manifest.special_tokens)
    if tokenizer is not None and manifest.eos_token_ids and "eos_token" not in special_tokens:
        special_tokens["eos_token"] = tokenizer.id_to_token(manifest.eos_token_ids[0]) or ""
    source = None
    if CHAT_TEMPLATE in manifest.files:
        try:
            source = (bundle.path / CHAT_TEMPLATE).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ChatTemplateError(f"{CHAT_TEMPLATE} is not UTF-8; export the bundle again") from None
    return ChatTemplate(source, tokenizer, special_tokens, manifest.architecture.context)
