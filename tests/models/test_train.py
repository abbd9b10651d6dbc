"""The training recipe: schedule, determinism, resuming, and the way from a text to a bundle."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
from click.testing import CliRunner

import kvq
from kvq.exporter.calibration import calibration_text
from kvq.models.corpus import END_OF_TEXT
from kvq.models.family import SHAPES, config
from tests.tools.checkpoints import TINY
from tests.tools.packages import needs

torch, transformers = needs("torch"), needs("transformers")
from kvq.models import train as recipes
from kvq.models.train import Recipe, batch, main, make_loss, train

RECIPE = Recipe(
    steps=6, tokens_per_step=256, lengths=((0.0, 32), (0.5, 64)), warmup_steps=2, learning_rate=1e-2, checkpoint_steps=2
)


@pytest.fixture(scope="module")
def ids():
    return np.tile(np.arange(1, 101), 40).astype(np.uint16)


def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{k: v for k, v in TINY.items() if k != "model_type"})
    )


def run(ids, out, recipe):
    out.mkdir(exist_ok=True)
    result = model()
    train(result, recipe, ids, np.zeros(0, np.uint16), out, "cpu", compiled=False)
    return result.state_dict()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(ids, tmp_path, monkeypatch):
    whole = run(ids, tmp_path / "whole", RECIPE)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        calls = []
        original = torch.nn.utils.clip_grad_norm_
        patch.setattr(
            torch.nn.utils,
            "clip_grad_norm_",
            lambda *a: calls.append(1) or (original(*a) if len(calls) < 6 else killed()),
        )
        with pytest.raises(KeyboardInterrupt):
            run(ids, tmp_path / "resumed", RECIPE)
    assert torch.load(tmp_path / "resumed" / "checkpoint.pt", weights_only=True)["step"] == 4
    resumed = run(ids, tmp_path / "resumed", RECIPE)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_training_learns(ids, tmp_path):
    recipe = dataclasses.replace(RECIPE, steps=40)
    before = model()
    windows = batch(ids, recipe, 0, "cpu")
    first = make_loss(before, "cpu")(windows).item()
    before.load_state_dict(run(ids, tmp_path / "run", recipe))
    assert make_loss(before, "cpu")(windows).item() < 0.5 * first


def test_a_batch_depends_on_seed_and_step_alone(ids):
    assert torch.equal(batch(ids, RECIPE, 3, "cpu"), batch(ids, RECIPE, 3, "cpu"))
    assert not torch.equal(batch(ids, RECIPE, 3, "cpu"), batch(ids, RECIPE, 4, "cpu"))
    other = dataclasses.replace(RECIPE, seed=1)
    assert not torch.equal(batch(ids, RECIPE, 3, "cpu"), batch(ids, other, 3, "cpu"))


def test_schedule_warms_up_and_decays_and_lengthens():
    recipe = Recipe(steps=1000)
    rates = [recipe.rate(step) for step in range(1000)]
    assert int(np.argmax(rates)) in (recipe.warmup_steps - 1, recipe.warmup_steps)
    assert rates[0] < rates[50] < max(rates) == recipe.learning_rate
    assert rates[-1] == pytest.approx(recipe.final_learning_rate, rel=0.01)
    assert [recipe.length(step) for step in (0, 499, 500, 899, 900, 999)] == [512, 512, 1024, 1024, 2048, 2048]


def test_every_family_member_is_a_llama_with_heads_of_64():
    for name in SHAPES:
        fields = transformers.LlamaConfig(
            **{k: v for k, v in config(name).items() if k not in ("model_type", "architectures")}
        )
        assert fields.head_dim == 64
        assert json.dumps(config(name))


@pytest.mark.slow
def test_one_command_goes_from_a_text_to_a_bundle_that_generates(tmp_path, monkeypatch):
    # One window to learn from and eight to be examined on: nothing is learned here.
    monkeypatch.setattr(recipes, "Recipe", partial(Recipe, tokens_per_step=512, lengths=((0.0, 512),)))
    monkeypatch.setattr(recipes, "validate", partial(recipes.validate, windows=8))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(f"\n{END_OF_TEXT}\n".join([calibration_text()] * 3), encoding="utf-8")
    arguments = [str(corpus), str(tmp_path / "out"), "--valid", str(corpus), "--steps", "1", "--no-compile"]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000
    model = kvq.load(tmp_path / "out" / "bundle")
    assert model.bundle.manifest.name == Recipe.shape
    assert len(list(model.session("mixed").generate("The lighthouse", max_tokens=3, ignore_eos=True))) == 3
