"""Many prompts, one after the other; what all of them begin with is processed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvq.runtime.errors import GrammarError
from kvq.runtime.session.generation import Response

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model


@dataclass(frozen=True)
class Completion:
    """What a prompt was gone on with.

    Attributes:
        index: of the prompt.
        text: all of it.
        responses: its tokens.
    """

    index: int
    text: str
    responses: list[Response] = field(repr=False)

    @property
    def finish_reason(self) -> str | None:
        """As in `Response`."""
        return self.responses[-1].finish_reason if self.responses else None


def complete_all(
    model: Model, prompts: Sequence[Sequence[int]], settings: dict[str, Any], generations: Sequence[dict[str, Any]]
) -> Iterator[Completion]:
    """Go on with prompts, one after the other; what all of them begin with is processed once.

    Each text is the one that the prompt alone would get: what is shared are whole chunks of the prefill. The first has
    the `seed`, each further one the next number.

    Args:
        model: the loaded model.
        prompts: token ids of each.
        settings: of the sessions.
        generations: options of `Session.generate`, of each.

    Raises:
        GrammarError: a `constraint`, which is of one text.
    """
    if any(generation.get("constraint") is not None for generation in generations):
        raise GrammarError("constraint is of one text; give schema, regex, grammar or choice")
    first = model.session(**settings)
    chunk = first.prefill_chunk
    # One token at least is left to each, to give logits; a budget counts to the end of the call that appends.
    common = 0 if first.budget is not None or len(prompts) < 2 else _shared(prompts) // chunk * chunk
    if common:
        first.append(prompts[0][:common])
    for index, (ids, generation) in enumerate(zip(prompts, generations, strict=True)):
        seed = generation.get("seed")
        session = first.fork() if common else model.session(**settings)
        options = generation if seed is None else {**generation, "seed": seed + index}
        responses = list(session.generate(ids[common:], **options))
        yield Completion(index, "".join(response.text for response in responses), responses)


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, the last one of the shortest left out."""
    length = min(map(len, prompts)) - 1
    return next((i for i in range(length) if len({prompt[i] for prompt in prompts}) > 1), max(0, length))
