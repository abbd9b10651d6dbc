"""Several sessions in one pass: tokens a second of 1, 4 and 8 sessions that decode together.

    python -m kvq.bench.together -m BUNDLE --context 512

Every round has all arms once, in an order that turns, so that a slow minute is everybody's; ratios are those within a
round. Tokens are the most likely ones, or drawn as `kvq-run` draws them with --draw. At the end every session's
logits are compared with those of a session alone that was fed the same tokens.
"""

from __future__ import annotations

import json
import time

import click
import numpy as np

import kvq
from kvq.bench.options import HELP
from kvq.runtime.session.model import Model
from kvq.runtime.session.sampling import DEFAULTS, Sampler, make_sampler


class Arm:
    """Some sessions that decode together.

    Args:
        model: the loaded model.
        sessions: how many.
        context: tokens of each to begin with.
        policy: of the sessions.
        draw: tokens are drawn, not the most likely ones.
    """

    def __init__(self, model: Model, sessions: int, context: int, policy: str, draw: bool) -> None:
        self.model = model
        generator = np.random.default_rng(sessions)
        texts = generator.integers(1, model.architecture.vocab, (sessions, context))
        self.sessions = [model.session(policy) for _ in texts]
        self.logits = [session.append(text) for session, text in zip(self.sessions, texts, strict=True)]
        one = {**DEFAULTS, "seed": 1} if draw else {"temperature": 0.0}
        self.samplers: list[Sampler] = [make_sampler(**one) for _ in texts]

    def run(self, steps: int) -> float:
        """Tokens a second of all sessions together over so many steps, the choice of tokens included."""
        begun = time.perf_counter()
        for _ in range(steps):
            each = zip(self.samplers, self.logits, self.sessions, strict=True)
            tokens = [sampler(logits, session.tokens)[0] for sampler, logits, session in each]
            self.logits = self.model.step([(s, [token]) for s, token in zip(self.sessions, tokens, strict=True)])
        return steps * len(self.sessions) / (time.perf_counter() - begun)

    def wrong(self, context: int, policy: str) -> int:
        """Sessions whose logits are not to the bit those of one alone."""
        wrong = 0
        for session, logits in zip(self.sessions, self.logits, strict=True):
            alone = self.model.session(policy)
            alone.append(session.tokens[:context])
            for token in session.tokens[context:]:
                found = alone.append([token])
            wrong += not np.array_equal(found, logits)
        return wrong


@click.command(context_settings=HELP)
@click.option("-m", "--model", help="bundle; the embedded model if not given")
@click.option("--sessions", default="1,4,8", show_default=True)
@click.option("--context", default=512, show_default=True, help="tokens of each session to begin with")
@click.option("--policy", default="int8", show_default=True)
@click.option("--rounds", default=8, show_default=True)
@click.option("--steps", default=16, show_default=True, help="of an arm in a round")
@click.option("--draw", is_flag=True, help="draw tokens with the defaults of kvq-run")
def main(model, sessions, context, policy, rounds, steps, draw) -> None:
    """Print medians and quartiles as JSON, and check the logits."""
    loaded = kvq.load(model)
    arms = {int(count): Arm(loaded, int(count), context, policy, draw) for count in sessions.split(",")}
    first = next(iter(arms))
    rates: dict[int, list[float]] = {count: [] for count in arms}
    order = list(arms)
    for arm in arms.values():
        arm.run(2)
    for _ in range(rounds):
        for count in order:
            rates[count].append(arms[count].run(steps))
        order = order[1:] + order[:1]
    report = {}
    for count, found in rates.items():
        ratios = np.array(found) / np.array(rates[first])
        report[count] = {
            "tokens_per_s": round(float(np.median(found)), 1),
            "ratio_quartiles": np.round(np.percentile(ratios, [25, 50, 75]), 2).tolist(),
            "wrong": arms[count].wrong(context, policy),
        }
    click.echo(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
