"""Grids and landscapes of a smoothness survey, and what is not finite in it.

Claims of `poisonbench.smoothness` tested here:

- grid and landscape are written where they are asked for: a routine that is linear in its pixels has
  Definition 2 of 1 at every recipe, and a plane for a landscape;
- a metagradient or a loss that is not finite is a finding, not a failure.

The recipe is tiny: 60 digits, a ResNet-9 of width 2, two epochs of two steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from commandline import Run
from test_smoothness_survey import PROBE, files, request, words

from poisonbench.metagradient import NonFiniteError
from poisonbench.smoothness import experiment, survey


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is replaced by a routine whose parameters and losses are linear in the pixels."""

    def fake(self: survey.Surveyor, indices: Any, z: np.ndarray, stop: int | None = None) -> Any:
        data = self.task.train_images.astype(np.float64) / 255
        data[indices] = z
        flat = data.ravel()
        rate = self.task.recipe.learning_rate
        slopes = [np.random.default_rng(s).normal(size=(7, flat.size)) for s in range(stop or 3)]
        thetas = np.stack([rate * slope @ flat for slope in slopes])
        return survey.Trained(thetas[:, 0], np.full(len(thetas), 100 * rate), thetas)

    monkeypatch.setattr(survey.Surveyor, "_train", fake)
    monkeypatch.setattr(survey.Surveyor, "_gradient", lambda *_: None)


@pytest.mark.usefixtures("linear")
def test_the_grid_holds_its_recipes(tmp_path: Path) -> None:
    done = experiment.run(request(grid=True, names=("standard",)), tmp_path)
    labels = [survey.label for survey in done.record.grid]
    assert labels[:2] == ["smooth", "standard"]
    assert {"width=1", "width=4", "learning_rate=0.1", "norm=after_activation"} <= set(labels)
    table = pd.read_csv(done.folder / "grid.csv").set_index("recipe")
    assert list(table.index) == labels
    np.testing.assert_allclose(table["definition2"], 1, atol=1e-9)
    assert table["accuracy"]["learning_rate=0.1"] == pytest.approx(10)
    assert table["accuracy"]["smooth"] == pytest.approx(20)
    assert (done.folder / "grid.png").read_bytes().startswith(b"\x89PNG")
    lines = pd.read_csv(done.folder / "lines.csv")
    assert sorted(lines["recipe"].unique()) == sorted(labels)
    assert len(lines) == len(labels) * 3 * 2


@pytest.mark.usefixtures("linear")
def test_a_landscape_is_the_loss_over_its_square(tmp_path: Path) -> None:
    done = experiment.run(request(landscape=True, names=()), tmp_path)
    assert {"landscape.png", "landscape.csv"} <= set(files(done.folder, ".png", ".csv"))
    assert [scape.label for scape in done.record.landscapes] == ["smooth", "standard"]
    scape, survey_ = done.record.landscapes[0], done.record.recipes[0]
    assert scape.at == pytest.approx([0, PROBE.extent / 2, PROBE.extent])
    loss = np.array(scape.loss, np.float64)
    assert loss[0, 0] == pytest.approx(survey_.loss[0])
    # Of a linear loss it is the plane through three of its points; its slopes differ.
    down, right = loss[1, 0] - loss[0, 0], loss[0, 1] - loss[0, 0]
    plane = loss[0, 0] + down * np.arange(3)[:, None] + right * np.arange(3)[None, :]
    np.testing.assert_allclose(loss, plane, atol=1e-3 * abs(loss).max())
    assert min(abs(down), abs(right), abs(down - right)) > 1e-3
    table = pd.read_csv(done.folder / "landscape.csv")
    chosen = (table["recipe"] == "smooth") & (table["first"] == scape.at[1]) & (table["second"] == 0)
    assert table["loss"][chosen].item() == pytest.approx(loss[1, 0])


@pytest.mark.slow
def test_what_is_not_finite_is_a_finding(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real_gradient, real_judge, calls = survey.metagradient, survey._judge, [0]

    def sometimes(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] % 2:  # two of three in the ranking, one of three after it
            raise NonFiniteError("the metagradient is NaN at step 1", 1)
        return real_gradient(*arguments)

    def broken(loss: Any, state: Any) -> Any:
        losses, accuracies = real_judge(loss, state)
        return losses.at[0].set(jnp.nan), accuracies

    monkeypatch.setattr(survey, "metagradient", sometimes)
    code, out, err = command(*words("--out", "gradients"))
    assert code == 0, err
    assert "not finite (1 of 3)" in out
    assert "finite: smooth 1; random images" in out
    monkeypatch.setattr(survey, "_judge", broken)
    monkeypatch.setattr(survey, "metagradient", real_gradient)
    code, out, err = command(*words("--out", "losses", "--json"))
    assert code == 0, err
    (row,) = json.loads(out)["summary"]
    assert row["definition1"] is None
    assert row["definition2"] is not None
    assert row["largest_gaining_step"] is None
