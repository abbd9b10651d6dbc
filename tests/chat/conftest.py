"""Models for all tests of conversations: one for each chat template, and one without."""

from __future__ import annotations

import pytest

from kvq.composition import open_bundle
from tests.tools.chats import TEMPLATES, chat_bundle
from tests.tools.checkpoints import small_tokenizer


@pytest.fixture(scope="session")
def base():
    """A tokenizer that leaves room for special tokens in TINY's vocabulary of 512."""
    return small_tokenizer(490)


@pytest.fixture(scope="session")
def models(tiny_checkpoint, base, tmp_path_factory):
    """Models whose bundles have a template, by its name."""
    folder = tmp_path_factory.mktemp("chat")
    return {name: open_bundle(chat_bundle(tiny_checkpoint, base, name, folder / f"of-{name}")) for name in TEMPLATES}


@pytest.fixture(scope="session")
def every(models, tiny_model):
    """Those models, and "plain", which has no template."""
    return {**models, "plain": tiny_model}
