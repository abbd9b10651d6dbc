"""Ids to text as they come: whole characters only, and stop strings that never show."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvq.runtime.text.decoder import StopMatcher, StreamingDecoder
from tests.tools.checkpoints import small_tokenizer

TOKENIZER = small_tokenizer()
REPLACEMENT = "\ufffd"

# No surrogates: they are not text. Weighted towards what takes several tokens a character.
CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from("é€😀👩‍👩‍👧‍👦🏳️‍🌈ñ\u0301\u200d\ufe0f中文字한국어ابجदे\n\r\t “”‘’—…"),
)
# Hypothesis draws strings of the source too; a special token says nothing, so its text would not come back.
SPECIAL = [token.content for token in TOKENIZER.get_added_tokens_decoder().values()]
TEXTS = st.text(CHARACTERS, max_size=40).filter(lambda text: not any(token in text for token in SPECIAL))


def byte_letter(byte: int) -> str:
    """The letter that stands for a byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


def tokenizer_of(pieces: list[bytes]) -> Tokenizer:
    """A byte-level tokenizer whose first ids are all 256 bytes and whose next ones are `pieces`."""
    vocabulary = {byte_letter(byte): byte for byte in range(256)}
    for piece in pieces:
        vocabulary.setdefault("".join(map(byte_letter, piece)), len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


BYTES = tokenizer_of([])


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What is shown after each id, and at the end."""
    decoder = StreamingDecoder(tokenizer)
    return [*map(decoder.push, ids), decoder.flush()]


@given(TEXTS, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_a_decoder_that_follows_a_text_goes_on_where_it_was_cut(text, place):
    ids = TOKENIZER.encode(text).ids
    cut = int(place * len(ids))
    first, second = StreamingDecoder(TOKENIZER), StreamingDecoder(TOKENIZER)
    pieces = [*map(first.push, ids[:cut])]
    second.follow(ids[:cut])
    assert "".join([*pieces, *map(second.push, ids[cut:]), second.flush()]) == text


@given(TEXTS)
@settings(max_examples=300, deadline=None)
@example("")
@example("👩‍👩‍👧‍👦")
@example("e\u0301 n\u0303")
@example("line\n\nline\r\n")
def test_pieces_of_any_text_join_to_the_text(text):
    ids = TOKENIZER.encode(text).ids
    assert "".join(streamed(TOKENIZER, ids)) == TOKENIZER.decode(ids) == text


@given(TEXTS.filter(lambda text: REPLACEMENT not in text))
@settings(max_examples=300, deadline=None)
def test_no_piece_of_a_valid_text_holds_half_a_character(text):
    pieces = streamed(TOKENIZER, TOKENIZER.encode(text).ids)
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert pieces[-1] == ""  # nothing was left to flush: the last character was whole


@pytest.mark.slow
@given(TEXTS.filter(lambda text: REPLACEMENT not in text), st.data())
@settings(max_examples=300, deadline=None)
def test_characters_cut_anywhere_into_tokens_come_out_whole(text, data):
    # Tokens of arbitrary bytes: their borders need not be borders of characters at all.
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=12)))
    parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if raw[a:b]]
    tokenizer = tokenizer_of(parts)
    ids = [tokenizer.token_to_id("".join(map(byte_letter, part))) for part in parts]
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_tokens_that_straddle_characters_never_show_a_replacement_character():
    # Each token ends one curly quote and begins the next, so no border is one of characters.
    raw = "”’“‘”".encode()
    parts = [raw[:2], *(raw[at : at + 3] for at in range(2, len(raw) - 1, 3)), raw[-1:]]
    tokenizer = tokenizer_of(parts)
    pieces = streamed(tokenizer, [tokenizer.token_to_id("".join(map(byte_letter, part))) for part in parts])
    assert "".join(pieces) == "”’“‘”"
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("text", ["é", "€", "😀", "a😀b", "한국어", "👩‍👩‍👧‍👦"])
def test_a_character_appears_with_its_last_byte_and_not_before(text):
    pieces = streamed(BYTES, list(text.encode()))
    shown = [(sum(len(c.encode()) for c in text[: i + 1]) - 1, text[i]) for i in range(len(text))]
    assert [(at, piece) for at, piece in enumerate(pieces) if piece] == shown


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=60))
@settings(max_examples=300, deadline=None)
def test_random_ids_never_raise_and_keep_every_valid_character(ids):
    # Where bytes never become valid only the number of U+FFFD is open: a decoder that waits for
    # ever would show nothing. Every other character must come through, in order.
    pieces = streamed(TOKENIZER, ids)
    whole = TOKENIZER.decode(ids)
    assert "".join(pieces).replace(REPLACEMENT, "") == whole.replace(REPLACEMENT, "")


@pytest.mark.slow
@given(st.lists(st.sampled_from([0x41, 0x80, 0x82, 0xAC, 0xC3, 0xE2, 0xF0, 0x9F, 0x98, 0xFF, 0xED, 0xC0]), max_size=24))
@settings(max_examples=500, deadline=None)
def test_broken_utf8_never_loses_a_valid_character(raw):
    joined = "".join(streamed(BYTES, raw))
    assert joined.replace(REPLACEMENT, "") == BYTES.decode(raw).replace(REPLACEMENT, "")


@pytest.mark.parametrize("byte", [0x80, 0xE2, 0xFF])
def test_bytes_that_never_become_text_are_shown_as_replacements_and_not_held_for_ever(byte):
    pieces = streamed(BYTES, [byte] * 40 + [ord("A")])
    assert set("".join(pieces)) == {REPLACEMENT, "A"}
    assert sum(map(bool, pieces[:40])) >= 5  # something came out while they arrived


def test_a_character_that_is_never_finished_is_flushed_as_a_replacement():
    assert streamed(BYTES, [ord("a"), 0xE2, 0x82]) == ["a", "", "", REPLACEMENT]


def test_special_tokens_give_no_text_even_inside_a_character():
    end = TOKENIZER.token_to_id("<|endoftext|>")
    ids = [byte for part in TOKENIZER.encode("a😀b").ids for byte in (part, end)]
    assert "".join(streamed(TOKENIZER, ids)) == "a😀b"


class CountingTokenizer:
    """Counts the ids that are decoded."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def get_added_tokens_decoder(self) -> dict:
        return TOKENIZER.get_added_tokens_decoder()

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        self.lengths.append(len(ids))
        return TOKENIZER.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize(
    "ids",
    [TOKENIZER.encode("The ship left the harbour. " * 60).ids, TOKENIZER.encode("😀é€" * 150).ids],
    ids=["words", "multi-byte"],
)
def test_the_work_per_token_does_not_grow(ids):
    counting = CountingTokenizer()
    decoder = StreamingDecoder(counting)
    for token in ids:
        decoder.push(token)
    assert len(ids) > 500
    assert len(counting.lengths) <= 2 * len(ids)
    assert max(counting.lengths) <= 10


def literal_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Shown text and `stopped`, one character at a time.

    The stop string that is complete FIRST ends the text (earliest end); of several that end at
    the same character the longest counts. So the result does not depend on the tokens.
    """
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def matched(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    """What a caller shows, who stops pushing once `stopped` is set and flushes otherwise."""
    matcher = StopMatcher(stops)
    shown = []
    for piece in pieces:
        shown.append(matcher.push(piece))
        if matcher.stopped:
            return shown, True
    return [*shown, matcher.flush()], matcher.stopped


LETTERS = st.text("ab\n", max_size=14)
STOPS = st.lists(st.text("ab\n", max_size=4), max_size=4)


@given(LETTERS, STOPS)
@settings(max_examples=500, deadline=None)
def test_character_by_character_the_text_ends_before_the_stop_string_that_is_complete_first(text, stops):
    shown, stopped = matched(list(text), stops)
    assert ("".join(shown), stopped) == literal_stop(text, stops)


@pytest.mark.slow
@given(LETTERS, STOPS, st.data())
@settings(max_examples=1000, deadline=None)
def test_the_shown_text_does_not_depend_on_how_it_is_cut_into_pieces(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, stopped = matched(pieces, stops)
    assert ("".join(shown), stopped) == literal_stop(text, stops)


@given(LETTERS, STOPS, st.data())
@settings(max_examples=300, deadline=None)
def test_no_whole_stop_string_is_ever_shown_and_shown_text_is_never_taken_back(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    joined = "".join(matched(pieces, stops)[0])
    assert text.startswith(joined)
    assert not any(stop in joined for stop in stops if stop)


@pytest.mark.slow
@given(LETTERS, st.text("ab", min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_only_what_may_become_a_stop_string_is_held_back(text, stop):
    matcher = StopMatcher([stop])
    shown = ""
    for at, character in enumerate(text):
        shown += matcher.push(character)
        if matcher.stopped:
            return
        held = text[len(shown) : at + 1]
        assert stop.startswith(held)
        assert not any(stop.startswith(text[start : at + 1]) for start in range(len(shown)))


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "stopped"),
    [
        (["one END two"], ["END"], "one ", True),
        (["one E", "ND two"], ["END"], "one ", True),
        (["one E", "NE"], ["END"], "one ENE", False),
        (["one EN"], ["END"], "one EN", False),
        (["aab"], ["ab"], "a", True),
        (["a", "a", "b"], ["ab"], "a", True),
        (["abab", "ac"], ["abac"], "ab", True),  # the second beginning overlaps the first
        (["xabc"], ["bc", "abc"], "x", True),  # complete together: the longer one
        (["x", "a", "b", "c"], ["b", "abc"], "xa", True),  # complete first: the shorter one
        (["END"], ["END"], "", True),
        (["text"], [], "text", False),
        (["text"], [""], "text", False),  # an empty stop string stops nothing
        (["é€", "😀!"], ["€😀"], "é", True),
    ],
)
def test_stop_strings_by_example(pieces, stops, shown, stopped):
    result = matched(pieces, stops)
    assert ("".join(result[0]), result[1]) == (shown, stopped)


@pytest.fixture(scope="module")
def byte_fallback():
    """A tokenizer that decodes like Llama's: known pieces, everything else byte by byte."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"a": 256, "▁b": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize("text", ["a😀a", "😀😁😂", "é a 漢字 b", "ab😀"])
def test_byte_fallback_characters_come_out_whole(byte_fallback, text):
    ids = [256 if c == "a" else b for c in text for b in ([0] if c == "a" else c.encode())]
    decoder = StreamingDecoder(byte_fallback)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)
