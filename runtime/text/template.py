"""Chat templates: a conversation as the text, and the token ids, that its model was trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from kvq.runtime.errors import ChatTemplateError, PromptError, TokenizerError
from kvq.runtime.text.continuing import added_tokens, adds_space, encoded_behind
from kvq.runtime.text.markers import Markers
from kvq.runtime.text.tokenizer import encoded, guarded
from kvq.runtime.text.tools import CallFormat, call_format

# Beside role and content, other text that a template may read, and "tool_calls": JSON values.
Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None

# For bundles without a template, base models above all: text that such a model has seen the like of.
TRANSCRIPT = """\
{%- for message in messages -%}
{%- if not loop.first %}{{ "\n" }}{% endif -%}
{%- if message.role == "system" -%}{{ message.content | trim }}{{ "\n" }}
{%- else -%}{{ message.role | capitalize }}: {{ message.content | trim }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{% if messages %}{{ "\n" }}{% endif %}Assistant:{% endif -%}
"""
# Noncharacters, which no text may contain: inside a special token's text that a message quotes...
GUARD = "\ufdd0"
# ...and in place of a reply, to find where it stands.
REPLY = "\ufdd1"
MOST_DEPTH = 48  # of what a template is given beside text
ROLE = re.compile(r"[a-z][a-z_]*")


class ChatTemplate:
    """A chat template and the tokenizer it goes with.

    Args:
        source: Jinja source; None takes a plain transcript (`TRANSCRIPT`).
        tokenizer: of the same model; without one only `render` works.
        special_tokens: names a template may use -> text, such as {"bos_token": "<s>"}.
        most_tokens: what there is room for, as in `kvq.runtime.text.tokenizer.encoded`; None does not look.

    Attributes:
        builtin: whether this is the plain transcript.
        stop: strings that end a reply, because the model goes on to speak for the user.
        stop_tokens: ids that end a reply, besides the model's end-of-text ids.

    Raises:
        ChatTemplateError: the source is too long or cannot be compiled.
    """

    def __init__(
        self,
        source: str | None,
        tokenizer: Tokenizer | None = None,
        special_tokens: Mapping[str, str] | None = None,
        most_tokens: int | None = None,
    ) -> None:
        self.builtin = source is None
        self.tokenizer = tokenizer
        self.special_tokens = dict(special_tokens or {})
        self.most_tokens = most_tokens
        self.source = TRANSCRIPT if source is None else source
        from kvq.runtime.text.sandbox import compiled  # jinja2 loads only for a chat

        self._program = compiled(self.source)
        # All of them: a template's markers need not be flagged as special.
        self._specials = added_tokens(tokenizer) if tokenizer else {}
        self._special = Markers(self._specials, GUARD)
        self.stop, self.stop_tokens = self._ends()

    def __repr__(self) -> str:
        what = "a plain transcript" if self.builtin else f"{len(self.source)} characters"
        return f"<kvq.ChatTemplate: {what}, a reply ends by {self.stop_tokens or self.stop or 'end of text'}>"

    def render(self, messages: Messages, add_generation_prompt: bool = True, tools: Tools = None) -> str:
        """The conversation as text.

        Special tokens that a message quotes look like those of the template here; `encode` keeps them apart.

        Args:
            messages: {"role", "content"} each, in order.
            add_generation_prompt: end where the assistant's reply begins.
            tools: definitions of functions, as the OpenAI API has them.

        Raises:
            PromptError: a message has no role or content, or they are not text.
            ChatTemplateError: the template fails, takes too long, or refuses the conversation.
        """
        return self._program(self._checked(messages), add_generation_prompt, {**self.special_tokens, "tools": tools})

    def encode(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Tools = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The conversation as token ids; a special token's text inside a message is ordinary text.

        Args:
            messages, add_generation_prompt, tools: as in `render`.
            variables: more names for the template, with JSON values.

        Raises:
            PromptError, ChatTemplateError: as `render`.
            TokenizerError: there is no tokenizer.
        """
        text = self.render_guarded(messages, add_generation_prompt, tools, variables)
        return self.encode_guarded(text, beginning=True)

    def encode_begun(
        self, messages: Messages, tools: Tools = None, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The conversation as token ids, the last message being a reply that is to go on.

        Raises:
            PromptError: the last message is no assistant's; or as `encode`.
            ChatTemplateError, TokenizerError: as `encode`.
        """
        *before, begun = self._checked(messages)
        if begun["role"] != "assistant":
            raise PromptError("only a reply can be gone on with: the last message must be the assistant's")
        text = self.render_guarded(before, True, tools, variables)
        return self.encode_guarded(text + self.guarded(begun["content"]), beginning=True)

    def encode_for_reply(self, messages: Messages) -> list[int]:
        """The conversation as token ids up to where the model goes on: in a last message of the assistant's, else in a
        new one.

        Raises:
            PromptError, ChatTemplateError, TokenizerError: as `encode`.
        """
        begun = bool(messages) and messages[-1].get("role") == "assistant"
        return self.encode_begun(messages) if begun else self.encode(messages)

    def render_guarded(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Tools = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """As `render`, with `GUARD` inside every special token that a message quotes, for `encode_guarded`."""
        guarded = [
            {key: value if key == "role" else self._guarded_values(value) for key, value in message.items()}
            for message in self._checked(messages)
        ]
        names = {name: self._guarded_values(value) for name, value in (variables or {}).items()}
        names |= {**self.special_tokens, "tools": None if tools is None else self._guarded_values(list(tools))}
        return self._program(guarded, add_generation_prompt, names)

    def _guarded_values(self, value: Any, depth: int = 0) -> Any:
        """`guarded`, for all text of a JSON value."""
        if depth > MOST_DEPTH:
            raise PromptError(f"tools, calls and variables nest at most {MOST_DEPTH} deep; make them flatter")
        if isinstance(value, str):
            if not _encodable(value):
                raise PromptError("tools, calls and variables must be text that UTF-8 can encode; no lone surrogates")
            return self.guarded(value)
        if isinstance(value, Mapping):
            return {self._guarded_values(key): self._guarded_values(part, depth + 1) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded_values(part, depth + 1) for part in value]
        return value

    def before_end(self, text: str) -> str:
        """A reply as the template writes it, up to what ends it."""
        ends = [text.find(self._text_of[token]) for token in self.stop_tokens] + [text.find(stop) for stop in self.stop]
        return text[: min((at for at in ends if at >= 0), default=len(text))]

    def special_pieces(self, text: str) -> list[tuple[str, int | None]]:
        """A text cut at its special tokens: each piece with the id of the token, None for ordinary text."""
        pieces: list[tuple[str, int | None]] = []
        for at, piece in enumerate(self._special.split(text)):
            token = self._specials[piece] if at % 2 and piece in self.hidden else None
            if piece:
                pieces.append((piece, token))
        return pieces

    @cached_property
    def hidden(self) -> frozenset[str]:
        """Texts of the special tokens, which no decoded text shows."""
        added = self.tokenizer.get_added_tokens_decoder().values() if self.tokenizer else ()
        return frozenset(token.content for token in added if token.special and token.content in self._specials)

    @cached_property
    def _text_of(self) -> dict[int, str]:
        return {index: content for content, index in self._specials.items()}

    @cached_property
    def calls(self) -> CallFormat:
        """How calls of tools are written."""
        return call_format(self)

    def encode_guarded(self, text: str, beginning: bool, before: int | None = None) -> list[int]:
        """Token ids of a text from `render_guarded`, or of a part of one.

        Args:
            text: where a special token's text holds `GUARD`, it is ordinary text.
            beginning: of a session: a plain transcript begins as any prompt does (BOS), a template brings its own.
            before: the id that a text which is no beginning stands behind.

        Raises:
            ContextError: far more tokens than there is room for.
            TokenizerError: there is no tokenizer, or it fails.
        """
        if self.tokenizer is None:
            raise TokenizerError("this bundle has no tokenizer; export a checkpoint with tokenizer.json to chat")
        behind = self._text_of.get(-1 if before is None else before)
        if GUARD not in text and beginning:
            return encoded(self.tokenizer, text, self.builtin, self.most_tokens)
        if GUARD not in text:
            return encoded_behind(self.tokenizer, text, behind, self.most_tokens)
        ids = encoded(self.tokenizer, "", beginning and self.builtin)
        for at, piece in enumerate(self._special.split(text)):
            if at % 2:
                ids.append(self._specials[piece])
                behind, beginning = piece, False
            elif piece:
                ids += self._plain_ids(piece.replace(GUARD, ""), beginning, behind)
                behind, beginning = None, False
        return ids

    def _plain_ids(self, text: str, beginning: bool, before: str | None) -> list[int]:
        """Token ids of a text in which nothing is a special token; before: the one that it stands behind."""
        # Some tokenizers put a space behind a special token as at a beginning.
        if beginning or (before is not None and self._begins_behind(before)):
            return encoded(self._plain, text, most=self.most_tokens)
        return encoded_behind(self._plain, text, None, self.most_tokens)

    def _begins_behind(self, special: str) -> bool:
        """Whether what stands behind a special token is encoded as a text of its own."""
        if self.tokenizer is None or not adds_space(self.tokenizer):
            return True
        return encoded(self.tokenizer, special + "a")[1:] == encoded(self.tokenizer, "a")

    @cached_property
    def _plain(self) -> Tokenizer:
        """A second tokenizer, which finds no added token in a text but blanks.

        The switch is a property of a tokenizer, which other threads may be using, and it is for special tokens only.
        """
        document = json.loads(self.tokenizer.to_str()) if self.tokenizer else {}
        for token in document["added_tokens"]:
            token["special"] = token["content"] in self._specials
        plain = guarded(lambda: Tokenizer.from_str(json.dumps(document)), "to load")
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def takes_system(self) -> bool:
        """Whether what is said as the system stands at the beginning of the text, and stays there.

        Some templates refuse it, some leave it out, and some put it into the latest question.
        """
        user, other = {"role": "user", "content": "first question"}, {"role": "assistant", "content": "?"}
        try:
            text = self.render_guarded([{"role": "system", "content": REPLY}, user, other, user])
        except ChatTemplateError:
            return False
        return 0 <= text.find(REPLY) < text.find("first question")

    def guarded(self, text: str) -> str:
        """A message's text with `GUARD` inside every special token that it quotes."""
        clean = text.replace(GUARD, "\ufffd").replace(REPLY, "\ufffd") if text != REPLY else text
        return self._special.replaced(clean, lambda found: found[:1] + GUARD + found[1:])

    def _checked(self, messages: Messages) -> list[dict[str, Any]]:
        checked = []
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise PromptError(f"a message must have role and content, got {message!r:.80}")
            texts = [text for name, text in message.items() if name != "tool_calls"]
            if not all(isinstance(text, str) for text in texts) or not ROLE.fullmatch(message["role"]):
                raise PromptError(f"role and content must be text, the role one lower-case word, got {message!r:.80}")
            if not all(map(_encodable, texts)):
                raise PromptError(f"a message holds lone surrogates, which are no characters, got {message!r:.80}")
            checked.append(dict(message))
        return checked

    def _ends(self) -> tuple[list[str], list[int]]:
        """What stands between a reply and the next question: a special token, or else text, ends the reply."""
        question = {"role": "user", "content": "?"}
        try:
            text = self.render_guarded([question, {"role": "assistant", "content": REPLY}, question], False)
        except ChatTemplateError:  # one that takes single turns only
            return [], []
        between = text.partition(REPLY)[2].partition("?")[0]
        found = next(self._special.found(between), None)
        if found:
            return [], [self._specials[found[1]]]
        return ([between.rstrip()] if between.strip() else []), []


def _encodable(text: str) -> bool:
    """Whether UTF-8 can encode it: lone surrogates come from JSON and from broken terminals."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
