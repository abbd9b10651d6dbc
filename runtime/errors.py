"""Every error a caller can cause. One message line each: what is wrong, and the remedy."""

from __future__ import annotations

LONGEST_MESSAGE = 2000  # characters


class KvqError(Exception):
    """Base of all kvq errors; `except kvq.KvqError` catches everything a caller can cause.

    The message is one line that any terminal and any encoding can take, whatever names from a file or a request are in
    it: what cannot be printed (escapes, marks that turn text around, lone surrogates) is written out, a line end is a
    space.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(one_line(each) if isinstance(each, str) else each for each in args))


def one_line(text: str) -> str:
    """A text of which every character can be printed, `LONGEST_MESSAGE` of them at most."""
    if len(text) > LONGEST_MESSAGE:
        text = text[: LONGEST_MESSAGE - 3] + "..."
    if text.isprintable():
        return text
    text = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class BundleError(KvqError):
    """A model bundle is missing, damaged, unsafe or of another format version."""


class HubError(BundleError):
    """A model that would have to come from the hub, which cannot be had or is not to be used."""


class CheckpointError(KvqError):
    """A checkpoint to export cannot be read: missing files, pickled weights, wrong shapes."""


class UnsupportedArchitectureError(CheckpointError):
    """The checkpoint is readable but needs something kvq does not implement."""


class PolicyError(KvqError):
    """Unknown policy name, or an option the policy does not take."""


class BudgetError(KvqError):
    """A byte budget that cannot be kept, or that the policy cannot follow."""


class CalibrationError(KvqError):
    """A text that a controller cannot be trained or measured on."""


class PromptError(KvqError):
    """The prompt is empty, not UTF-8, or holds token ids outside the vocabulary."""


class ContextError(KvqError):
    """More tokens than the model's context holds."""


class SessionError(KvqError):
    """A session file that cannot be read or written, is damaged, or belongs to another model."""


class SamplingError(KvqError):
    """A sampling option is out of its range."""


class GrammarError(KvqError):
    """A schema, regular expression or grammar that is not valid, too large, or cannot be held to."""


class OptionError(KvqError, TypeError):
    """A keyword that a function does not take: a typo, most often."""


class NonFiniteError(KvqError):
    """NaN, infinity, or a magnitude beyond half precision in keys, values or logits."""


class TokenizerError(KvqError):
    """Text was given to a bundle that carries no tokenizer."""


class ChatTemplateError(KvqError):
    """A bundle's chat template is not valid, does what it must not, or refuses the conversation."""


class BackendError(KvqError):
    """An attention backend or thread setting cannot be had in this process."""


class MemoryShortageError(KvqError, MemoryError):
    """The machine, or a limit that was set for the process, has not the memory that a model needs."""


class ServerError(KvqError):
    """`kvq serve` cannot start: the address is taken, or an option is out of its range."""


class BatchError(KvqError):
    """A file of `kvq batch` whose lines cannot be told apart, or that does not belong to the other one."""


class RequestError(KvqError):
    """A request that the server refuses; `status`, `code` and `param` go into the HTTP answer."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
