"""The formulas of smoothness are what they are called, and their intervals are wide enough.

Claims of `poisonbench.smoothness` tested here, on problems whose answers are known:

- Definition 1 of a quadratic is `|vᵀHv|` at every point and `h`; of a linear function it is zero;
- Definition 2 is 1 for a training routine that is linear in its data, -1 for one that turns back, the
  stated weighted mean in between, near 0 where parameters are noise, and NaN where nothing moves;
- it does not change with the scale of the parameters;
- cosines are those of the vectors, whatever their length, and NaN for one without a direction;
- a sign step's predicted gain is its true gain where the loss is linear, clipping included;
- directions lead no pixel out of [0, 1], and where there is room both signs come up;
- the crossed and the pairs interval hold the true mean as often as they say, where Student's
  interval over the same values, taken for independent, does not;
- gains on the same seed are the diagonal and gains on others the rest, and the largest gaining step
  is the largest whose interval lies above zero;
- the grid changes one field at a time, in either direction, and keeps batches within the data;
- a record reads back as it was written, keeps what is not finite apart, and is refused when torn.
"""

from __future__ import annotations

import importlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poisonbench.errors import UserError
from poisonbench.smoothness import definitions, grid, pictures, report, tables
from poisonbench.smoothness.intervals import crossed_interval, pairs_interval
from poisonbench.smoothness.probe import Probe
from poisonbench.smoothness.records import Gain, SmoothnessRecord, Steps, Survey, numbers
from poisonbench.statistics import mean_interval
from poisonbench.stored import Hardware
from poisonbench.threat import Budget
from poisonbench.tracks import DIGITS

RNG = np.random.default_rng


def test_definition1_of_a_quadratic_is_its_curvature() -> None:
    rng = RNG(0)
    half, slope = rng.normal(size=(6, 6)), rng.normal(size=6)
    hessian = half + half.T
    for h in (1e-2, 0.3, 5.0):
        z, v = rng.normal(size=6), rng.normal(size=6)
        at = [0.5 * x @ hessian @ x + slope @ x for x in definitions.line(z, v, h)]
        found = definitions.definition1(*(np.array(x) for x in at), h)
        assert float(found) == pytest.approx(abs(v @ hessian @ v), rel=1e-6)
        flat = [slope @ x for x in definitions.line(z, v, h)]
        assert float(definitions.definition1(*(np.array(x) for x in flat), h)) < 1e-9 / h**2


def definition2_of(train: Any, h: float = 0.1, seed: int = 0) -> float:
    """Definition 2 of a training routine from 5 pixels to parameters, along one random direction."""
    rng = RNG(seed)
    thetas = [train(x) for x in definitions.line(rng.normal(size=5), rng.normal(size=5), h)]
    return definitions.definition2(*thetas)


def test_definition2_of_a_linear_routine_is_one() -> None:
    matrix = RNG(1).normal(size=(40, 5))
    for seed in range(5):
        assert definition2_of(lambda z: matrix @ z + 3, seed=seed) == pytest.approx(1)
        assert definition2_of(lambda z: 1e-6 * matrix @ z, seed=seed) == pytest.approx(1)


def test_definition2_of_a_routine_that_turns_back_is_minus_one() -> None:
    z, v, h = np.zeros(3), np.ones(3), 0.1
    thetas = [np.sin(x * 0.75 * np.pi / h) + 0.01 * x for x in definitions.line(z, v, h)]
    assert thetas[1][0] > 0 > thetas[2][0]
    assert definitions.definition2(*thetas) == pytest.approx(-1)


def test_definition2_weighs_parameters_by_how_far_they_went() -> None:
    start, middle, end = np.zeros(3), np.array([1.0, 2.0, 0.5]), np.array([3.0, 1.0, 0.5])
    # Moves on, weight 3; turns back, weight 1; stands still in the second half, weight 0.5.
    assert definitions.definition2(start, middle, end) == pytest.approx((3 - 1 + 0) / 4.5)
    assert definitions.definition2(7 * start, 7 * middle, 7 * end) == pytest.approx(2 / 4.5)


def test_definition2_tells_noise_from_an_answer() -> None:
    rng, matrix = RNG(2), RNG(3).normal(size=(5000, 5))
    noise = definition2_of(lambda z: rng.normal(size=5000))
    # Three independent draws: both halves end or begin at the middle one, so they tend to disagree (a
    # mean of -1/3), but weighed by the ends' distance they cancel, to within 0.02.
    assert abs(noise) < 0.08
    assert definition2_of(lambda z: matrix @ z + 1e-3 * rng.normal(size=5000)) > 0.9
    assert np.isnan(definition2_of(lambda z: np.ones(3)))
    assert np.isnan(definition2_of(lambda z: np.full(3, np.nan)))


def test_cosines_are_of_directions_alone() -> None:
    rows = np.array([[1, 0, 0], [1e-20, 1e-20, 0], [-3e30, 0, 0], [0, 0, 0], [np.inf, 1, 0]], np.float32)
    found = definitions.cosines(rows)
    expected = np.array([[1, 0.5**0.5, -1], [0.5**0.5, 1, -(0.5**0.5)], [-1, -(0.5**0.5), 1]])
    np.testing.assert_allclose(found[:3, :3], expected, atol=1e-6)
    assert np.isnan(found[3:]).all()
    assert np.isnan(found[:, 3:]).all()


def test_the_predicted_gain_is_the_gain_of_a_linear_loss() -> None:
    rng = RNG(4)
    z, slope = rng.uniform(size=(3, 4)), rng.normal(size=(3, 4))
    low, high = np.zeros_like(z), np.minimum(1, z + 0.1)
    for size in (0.01, 0.05, 0.7):
        after = definitions.sign_step(z, slope, size, low, high)
        assert ((low <= after) & (after <= high)).all()
        realised = (slope * after).sum() - (slope * z).sum()
        assert definitions.predicted_gain(slope, z, after) == pytest.approx(realised)
        assert realised > 0
    unclipped = definitions.sign_step(z, slope, 0.7, z - 1, z + 1)
    np.testing.assert_allclose(np.abs(unclipped - z), 0.7)


def test_directions_stay_inside_and_go_both_ways() -> None:
    rng = RNG(5)
    z = rng.integers(0, 256, size=20_000).astype(np.float32) / np.float32(255)
    z[:4000] = 0
    for reach in (0.1, 0.5):
        signs = definitions.inward(rng.uniform(size=z.shape) < 0.5, z, reach)
        assert set(np.unique(signs)) == {-1.0, 1.0}
        for point in definitions.line(z, signs, reach / 2):
            assert point.min() >= -1e-6
            assert point.max() <= 1 + 1e-6
    room = (z > 0.1) & (z < 0.9)
    signs = definitions.inward(rng.uniform(size=z.shape) < 0.5, z, 0.1)
    assert abs(signs[room].mean()) < 0.05
    with pytest.raises(ValueError, match="reach"):
        definitions.inward(np.ones(3, bool), np.zeros(3), 0.6)


def covered(draw: Any, construct: Any, times: int = 600) -> float:
    """How often an interval of what is drawn, whose mean is 0, holds 0."""
    rng = RNG(6)
    intervals = [construct(draw(rng)) for _ in range(times)]
    return float(np.mean([i.low <= 0 <= i.high for i in intervals]))


def test_the_crossed_interval_covers_where_students_does_not() -> None:
    def draw(rng: np.random.Generator) -> np.ndarray:
        return rng.normal(size=(5, 1)) + rng.normal(size=(1, 5)) + 0.5 * rng.normal(size=(5, 5))

    assert covered(draw, crossed_interval) >= 0.94
    assert covered(lambda rng: draw(rng) + 4, crossed_interval) < 0.2  # six standard errors away
    assert covered(draw, lambda x: mean_interval(list(x.ravel()))) < 0.7
    one = crossed_interval(np.full((3, 4), 2.0))
    assert (one.mean, one.low, one.high, one.n) == (2, 2, 2, 12)
    with pytest.raises(ValueError, match="two rows"):
        crossed_interval(np.zeros((1, 4)))


def test_the_pairs_interval_covers_where_students_does_not() -> None:
    def draw(rng: np.random.Generator) -> np.ndarray:
        seeds = rng.normal(size=6)
        return seeds[:, None] + 0.5 * seeds[None, :] + 0.5 * rng.normal(size=(6, 6))

    off = ~np.eye(6, dtype=bool)
    assert covered(draw, pairs_interval) >= 0.92
    assert covered(lambda rng: draw(rng) + 4, pairs_interval) < 0.2
    assert covered(draw, lambda x: mean_interval(list(x[off]))) < 0.75
    table = RNG(7).normal(size=(6, 6))
    assert pairs_interval(table).mean == pytest.approx(table[off].mean())
    assert pairs_interval(table + 100 * np.eye(6)) == pairs_interval(table)
    with pytest.raises(ValueError, match="three seeds"):
        pairs_interval(np.zeros((2, 2)))


def gain(size: float, same: float, other: float, spread: float = 0.0) -> Gain:
    noise = spread * RNG(8).normal(size=(4, 4))
    realised = np.where(np.eye(4, dtype=bool), same, other) + noise
    return Gain(step_size=size, predicted=[2.0] * 4, realised=numbers(realised))


def test_gains_are_told_apart_by_seed() -> None:
    one = gain(0.1, same=0.5, other=0.25)
    assert one.promised is not None
    assert one.same_seed is not None
    assert one.other_seeds is not None
    assert (one.promised.mean, one.same_seed.mean, one.other_seeds.mean) == (2, 0.5, 0.25)


def test_the_largest_step_that_gains_has_its_interval_above_zero() -> None:
    def largest(*gains: Gain) -> float | None:
        return Steps(
            images=[1], ranked_by=0, norms=[1.0] * 4, cosines=[[1.0] * 4] * 4, gains=list(gains)
        ).largest

    unsure = gain(0.3, same=1, other=0.01, spread=1.0)
    assert largest(gain(0.01, 1, 0.1), gain(0.1, 1, 0.2), unsure) == 0.1
    assert largest(gain(0.01, 1, 0.1), gain(0.1, 1, -0.2), gain(0.3, 1, 0.1)) == 0.3
    assert largest(gain(0.01, 1, 0.0), unsure) is None
    broken = Gain(step_size=1.0, predicted=[1.0] * 4, realised=[[1.0] * 3 + [None]] * 4)
    assert broken.other_seeds is None
    assert largest(gain(0.1, 1, 0.1), broken) == 0.1


def test_the_step_to_take_is_the_one_that_gains_most_for_sure() -> None:
    gains = [gain(0.01, 1, 0.1), gain(0.1, 1, 0.3), gain(0.3, 1, 0.2), gain(1.0, 1, 0.4, spread=4.0)]
    steps = Steps(images=[1], ranked_by=0, norms=[1.0] * 4, cosines=[[1.0] * 4] * 4, gains=gains)
    assert (steps.best, steps.largest) == (0.1, 0.3)


def test_the_grid_changes_one_field_at_a_time() -> None:
    base = DIGITS.recipes["smooth"]
    found = grid.changes(base, 500)
    fields = {"width", "norm", "pooling", "final_scale", "activation", "learning_rate", "batch_size"}
    changed: dict[str, list[Any]] = {name: [] for name in fields}
    for label, recipe in found.items():
        differing = {n for n, x in recipe.as_dict().items() if x != base.as_dict()[n]}
        (name,) = differing
        assert label.startswith(f"{name}=")
        changed[name].append(getattr(recipe, name))
    for name in ("width", "final_scale", "learning_rate", "batch_size"):
        assert min(changed[name]) < getattr(base, name) < max(changed[name])
    assert changed["norm"] == ["after_activation"]
    assert changed["pooling"] == ["max"]
    assert changed["activation"] == ["relu"]
    assert len(set(found.values())) == len(found)
    small = grid.changes(base, 100)
    assert all(recipe.batch_size <= 100 for recipe in small.values())
    assert set(found) - set(small) == {"batch_size=250"}


QUESTIONS = [
    ({"seeds": 2}, "--seeds"),
    ({"directions": 1}, "--directions"),
    ({"h": 0.0}, "--h"),
    ({"h": 0.26}, "--h"),
    ({"h": float("nan")}, "--h"),
    ({"step_sizes": ()}, "--step-size"),
    ({"step_sizes": (0.0, 0.1)}, "--step-size"),
    ({"step_sizes": (0.1, float("nan"))}, "--step-size"),
    ({"step_sizes": (0.1, 0.1)}, "--step-size"),
    ({"step_sizes": (0.2, 0.1)}, "--step-size"),
    ({"step_sizes": (2.0,)}, "--step-size"),
    ({"points": 1}, "--points"),
    ({"extent": 0.3}, "--extent"),
    ({"extent": float("inf")}, "--extent"),
]


@pytest.mark.parametrize(("wrong", "hint"), QUESTIONS)
def test_a_question_that_cannot_be_answered_is_refused(wrong: dict[str, Any], hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        Probe(**wrong)


def record(**changes: Any) -> SmoothnessRecord:
    """A record of three seeds and two directions, the second recipe's metagradients not finite."""
    calm, wild = DIGITS.recipes["smooth"], DIGITS.recipes["standard"]
    steps = Steps(
        images=[3, 5], ranked_by=3, norms=[1.0, 2.0, 1.5],
        cosines=[[1.0, 0.25, 0.25], [0.25, 1.0, 0.25], [0.25, 0.25, 1.0]],
        gains=[Gain(step_size=0.1, predicted=[0.5] * 3, realised=[[0.125] * 3] * 3)],
    )  # fmt: skip
    broken: list[list[float | None]] = [[0.1] * 3, [None] * 3, [0.1] * 3]
    nothing = Steps(
        images=[3, 5], ranked_by=0, norms=[1.0, None, 2.0],
        cosines=[[1.0, None, 0.5], [None, None, None], [0.5, None, 1.0]],
        gains=[Gain(step_size=0.1, predicted=[0.5, None, 0.5], realised=broken)],
    )  # fmt: skip
    smooth = Survey(
        label="smooth", recipe=calm.as_dict(), accuracy=[98.0, 99.0, 97.0], loss=[0.5] * 3,
        definition1=[[2.0, 4.0]] * 3, definition2=[[0.75, 0.5]] * 3, steps=steps, seconds=1.0,
    )  # fmt: skip
    standard = smooth.model_copy(
        update={
            "label": "standard", "recipe": wild.as_dict(), "steps": nothing,
            "definition2": [[0.5, None]] * 3,
        }
    )  # fmt: skip
    made = SmoothnessRecord(
        track="digits", custom=[], dataset=DIGITS.dataset, hashes={"train": "0" * 64, "val": "1" * 64},
        budget=Budget(fraction=0.025), num_train=500, num_moved=12,
        probe=Probe(seeds=3, directions=2, step_sizes=(0.1,)), base="smooth",
        recipes=[smooth, standard],
        grid=[s.model_copy(update={"steps": None}) for s in (smooth, standard)], landscapes=[],
        seconds=2.0, created=datetime(2026, 1, 1, tzinfo=UTC), command="poisonbench smoothness",
        code={}, libraries={}, hardware=Hardware(system="", processor="", cores=1, device=""),
    )  # fmt: skip
    return made.model_copy(update=changes)


def test_what_is_not_finite_is_reported_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = record()
    text = dict(report.rows(made.recipes))
    assert text["cosine between seeds"] == ["0.25 ± 0", "not finite (1 of 3)"]
    assert text["Definition 2, at most 1"][1] == "not finite (3 of 6)"
    assert text["step of 0.1: predicted"] == ["0.5 ± 0", "not finite (1 of 3)"]
    assert text["  gain on other seeds"] == ["0.125 ± 0", "not finite (3 of 9)"]
    assert text["largest step that gains"] == ["0.1", "none"]
    tables.write(made, tmp_path)
    pictures.write(made, tmp_path)
    assert (tmp_path / "gains.png").stat().st_size > 1000
    report.show(made, tmp_path)
    out = capsys.readouterr().out
    assert "--attack mgd --start pixels --step-size 0.1 …" in out
    assert "by 3 other seeds (finite: standard none; random images where none is)" in out
    assert str(tmp_path / "grid.csv") in out
    row = tables.summary(made)[1]
    assert (row["nonfinite_metagradients"], row["definition2"], row["agreement"]) == (1, None, None)


def test_a_record_reads_back_and_a_torn_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "smoothness.json"
    record().save(path)
    assert SmoothnessRecord.load(path) == record()
    text = path.read_text()
    for torn in (
        text[:-20],
        text.replace('"seeds":3', '"seeds":4').replace('"seeds": 3', '"seeds": 4'),
        text.replace('"valid"', '"invalid"'),
    ):
        path.write_text(torn)
        with pytest.raises(UserError, match=r"smoothness\.json is not a valid record"):
            SmoothnessRecord.load(path)
    with pytest.raises(UserError, match="cannot read"):
        SmoothnessRecord.load(tmp_path / "none.json")


def test_the_leaderboard_takes_no_notice_of_it(tmp_path: Path) -> None:
    module: Any = importlib.import_module("poisonbench.leaderboard.tables")
    before = module.build(tmp_path)
    record().save(tmp_path / "smoothness" / "digits" / "smoothness-00000000" / "smoothness.json")
    assert module.build(tmp_path) == before
