"""What a defence costs is counted and timed beside an undefended victim, and docstrings say the same.

Claims of `benchmarks.counting`, `benchmarks.defences` and of the defences' docstrings tested here:

- a training's multiply-adds are its steps times those of a step, and what scoring its victim takes; a
  loop whose turns nobody knows is not counted, and nothing is left behind when counting is over;
- a defence that trains once more is counted so, one that changes nothing costs nothing, and one that
  climbs the loss by the images pays two thirds of a training for each step;
- every round has both victims, in either order; a mistake is one line and exit code 2; what a killed
  measurement leaves behind serves the same defences with the same options only;
- the committed file has every defence, and each docstring's cost is the measured one.

The problem: 60 digits, a plain network of width 2, two epochs.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("NOT TESTED: benchmarks/ is part of the checkout only", allow_module_level=True)

from benchmarks import cost, defences  # noqa: E402
from benchmarks.counting import counting  # noqa: E402
from benchmarks.defences import Bench, measured, multiply_adds  # noqa: E402
from benchmarks.operations import in_program  # noqa: E402
from poisonbench import costs, defenses, trained  # noqa: E402
from poisonbench.data import DataSpec, load  # noqa: E402
from poisonbench.tracks import DIGITS  # noqa: E402
from poisonbench.victim.training import logits  # noqa: E402

RECIPE = DIGITS.recipes["smooth"].replace(network="cnn", width=2, epochs=2, batch_size=20)


@cache
def bench() -> Bench:
    return Bench(load(DataSpec(name="digits", train_size=60, val_size=40, test_size=20)), RECIPE, 6)


def forward(images: int) -> int:
    """Multiply-adds of the logits of so many images."""
    run = bench()
    victim = trained.TrainedVictim.on(
        run.dataset.train_images, run.dataset.train_labels, 10, RECIPE, jax.random.key(0)
    )
    x = jnp.zeros((images, 8, 8, 1))
    return in_program(jax.make_jaxpr(lambda x: logits(RECIPE, 10, victim.state, x))(x))


@pytest.mark.slow
def test_a_training_is_its_steps_and_its_scores() -> None:
    before = trained.train
    counted = cost.cost(RECIPE, 60, (8, 8, 1), 0)
    whole = multiply_adds(bench().bare())
    assert whole == counted.training + RECIPE.epochs * forward(1)
    assert trained.train is before

    def defended(name: str, *options: str) -> int:
        return multiply_adds(bench().defended(defenses.build(name, options)))

    assert defended("none") == whole
    assert defended("mixup") == whole
    # Features are read of the set in a chunk of 500, all of the network but its last layer.
    more = defended("spectral") - whole
    assert counted.training < more < counted.training + forward(500)
    # Of forward, backward by images and backward by weights, a step of the climb takes the first two.
    # The first layer's gradient by its images is what the training itself does without.
    share = (defended("adversarial", "adversarial.steps=2") - whole) / counted.training
    assert 2 / 3 < share / 2 < 0.9


def test_turns_that_nobody_knows_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    @jax.jit
    def grown(n: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    monkeypatch.setattr(trained, "_grown", grown, raising=False)
    with counting(), pytest.raises(ValueError, match="cannot be counted"):
        trained._grown(3, jnp.eye(4))
    assert trained._grown is grown
    assert in_program(grown.trace(3, jnp.eye(4)).jaxpr, 3) == 3 * 4**3


def test_a_round_has_both_victims(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = (Bench.bare, Bench.defended)
    monkeypatch.setattr(Bench, "bare", lambda b: lambda: order.append("bare") or real[0](b)())
    monkeypatch.setattr(
        Bench, "defended", lambda b, d: lambda: order.append("defended") or real[1](b, d)()
    )
    found = measured(bench(), defenses.build("none"), 2)
    assert order == ["defended", "defended", "bare", "bare", "defended", "defended", "bare"]
    assert (found.defense, found.config, len(found.rounds)) == ("none", {"none": {}}, 2)
    assert found.trainings == sum(found.ratios) / 2


def test_a_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(defences, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["defences"])
    for names, also in ((["spectal"], None), (None, ["dpa.l=3"])):
        with pytest.raises(typer.Exit) as exit_:
            defences.main("digits", names, also, 1, tmp_path)
        out, err = capsys.readouterr()
        assert (exit_.value.exit_code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")


def test_other_options_are_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[Any] = []
    monkeypatch.setattr(defences, "one_core", lambda: None)
    monkeypatch.setattr(defences, "multiply_adds", lambda _: 1)
    one = costs.Round(defended=1, bare=1, defended_wall=1, bare_wall=1)

    def measured(_: Bench, defense: defenses.Composed, rounds: int) -> costs.DefenseCost:
        done.append(config := defenses.config(defense))
        if "none" in config:
            raise KeyboardInterrupt
        return costs.DefenseCost(defense="dpa", config=config, rounds=[one], multiply_adds=1)

    monkeypatch.setattr(defences, "measured", measured)
    for k in (30, 30, 20):
        several = [defenses.build("dpa", [f"dpa.k={k}"]), defenses.build("none")]
        with pytest.raises(KeyboardInterrupt):
            defences.measure("digits", several, 1, tmp_path, "")
    none: dict[str, Any] = {"none": {}}
    assert done == [{"dpa": {"k": 30}}, none, none, {"dpa": {"k": 20}}, none]


def test_docstrings_say_what_was_measured() -> None:
    (file,) = [c for c in costs.read(ROOT / "results") if c.track == "digits"]
    assert file.code["dirty"] is False
    default = {
        c.defense: c for c in file.defenses if c.config == defenses.config(defenses.build(c.defense))
    }
    assert set(default) >= {path.stem for path in (ROOT / "defenses").glob("[a-z]*.py")}
    assert 0.95 < default["none"].trainings < 1.05, "chance alone leads further than a defence costs"
    for name, found in default.items():
        said = (sys.modules[defenses.load(name).__module__].__doc__ or "").partition("Cost: ")[2]
        stated = re.search(r"([\d.]+) victim trainings on `digits`", said)
        if stated is None:
            assert name == "none" or said.startswith("nothing beside the victim's own training"), name
            assert found.trainings < 1.05, name
            assert file.counted(found) == pytest.approx(1, abs=0.01), name
        else:
            assert float(stated[1]) == pytest.approx(found.trainings, rel=0.02, abs=0.05), name
