"""What defences win back follows from two records of one poison.

Claims of `poisonbench.leaderboard.defended` tested here:

- a defended record is held against the undefended one of the same poison, data, victims and seeds, seed
  by seed; one without such a twin, a custom one and one set aside are left out;
- price, share won back, precision, recall and clean images lost are those worked out by hand;
- where nothing was lost for sure there is nothing to win back, and points are shown instead;
- a defence that has not met all attacks of a table has no share of them all; controls that are missing
  are named, so are defences that other tables have, and undefended victims stand above;
- weak attacks count in the share of them all, those made against a defence do not, and are named;
- on the front are the defences that no other beats in price and share, or else none, controls aside;
- a share with an interval too wide to read is shown as points; trusted images are counted;
- victims of every recipe have tables;
- of several twins the one of the same attack counts, and a record that has one is never left out;
- controls come first; two records of a defence are told apart by their options;
- defended records stand in no table of attacks, and the page, the CSV and the figure show them;
- what a defence costs is read from the results, where it was measured on the same data, victims and
  hyperparameters, and the tables are out of date where it changes;
- pairs of victims from two kinds of machine are marked as such;
- a certificate is shown beside the accuracy that attacks of as many changes left.
"""

from __future__ import annotations

import importlib
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_leaderboard import DIGITS, make, page, put, rows

from poisonbench.costs import Costs, DefenseCost, Round
from poisonbench.errors import UserError
from poisonbench.records import Certificate, Filtering, Record

games: Any = importlib.import_module("poisonbench.leaderboard.games")
defended: Any = importlib.import_module("poisonbench.leaderboard.defended")
grids: Any = importlib.import_module("poisonbench.leaderboard.grids")
tables: Any = importlib.import_module("poisonbench.leaderboard.tables")
SEEDS = DIGITS.seeds


def guarded(
    drop: float, price: float, defense: str = "spectral", spread: float = 0.0, **changes: Any
) -> Record:
    """Defended victims that score `price` less than those of `make`, and lose `drop` to the poison."""
    record = make("mgd", drop, spread, defense=defense, **changes)
    victims = [
        v.model_copy(
            update={
                "clean": [c - price for c in v.clean],
                "poisoned": [p - price for p in v.poisoned],
                "filtering": Filtering(
                    clean_run=[18] * SEEDS, poisoned_run=[18] * SEEDS, poison=[6] * SEEDS
                ),
                "certificate": Certificate(curve=[90.0, 50.0], changes=24, violations=0),
            }
        )
        for v in record.victims
    ]
    return record.model_copy(update={"victims": victims})


def found(results: Path) -> list[Any]:
    several: list[Any] = defended.defense_tables(results, games.read(results))
    return several


def test_a_cell_by_hand(tmp_path: Path) -> None:
    # Undefended victims lose 10 points; defended ones pay 1, and then lose 4: 5 of 10 are won back.
    put(tmp_path, make("mgd", 10.0, 0.0), guarded(4.0, 1.0))
    (grid,) = found(tmp_path)
    assert (grid.attacks, grid.defenses) == (["mgd"], ["spectral"])
    cell = grid.cells["mgd", "spectral"]
    assert cell.price.mean == pytest.approx(1.0)
    assert cell.won_back.mean == pytest.approx(0.5)
    assert cell.precision == pytest.approx(6 / 18)
    assert cell.recall == pytest.approx(6 / 12)
    assert cell.clean_lost == pytest.approx(12)
    # The mean clean accuracy is 90.45: less 1, less 4.
    assert grid.shown("mgd", "spectral") == "85.45 (50 %, 50 to 50)"
    assert grid.shown("mgd", "other") == "–"
    assert cell.filtered == "33 / 50 / 12.0"
    assert grid.filters == ["spectral"]
    text = grid.certified("spectral")
    assert "90.0 % against 0, 50.0 % against 1" in text
    assert "Against poisons of 24 changes it promises nothing. Promises broken: 0" in text


def test_shares_of_several_attacks_are_of_all_that_was_lost(tmp_path: Path) -> None:
    """Of 10 and of 1 points 5 and -4 are won back: 1 of 11, where the mean of the shares is -1.75."""
    other = {"attack": "es", "poison_hash": "e" * 64}
    weak = guarded(4.0, 1.0).model_copy(update=other)
    strong = make("mgd", 10.0, 0.0)
    put(tmp_path, strong, make("es", 1.0, 0.0, poison_hash="e" * 64), guarded(4.0, 1.0), weak)
    (grid,) = found(tmp_path)
    assert [grid.cells[a, "spectral"].won_back.mean for a in ("mgd", "es")] == [0.5, -4.0]
    assert grid.won_back("spectral").mean == pytest.approx(1 / 11)

    adaptive = {"attack_config": {"against": "spectral"}, "poison_hash": "f" * 64}
    put(tmp_path, make("mgd", 9.0, 0.0, **adaptive), guarded(9.0, 1.0).model_copy(update=adaptive))
    (grid,) = found(tmp_path)
    assert len(grid.of("spectral")) == 3
    assert grid.won_back("spectral").mean == pytest.approx(1 / 11)
    from_a_file = guarded(2.0, 1.0, "mixup").model_copy(update={**adaptive, "attack_config": {}})
    put(tmp_path, from_a_file)
    (grid,) = found(tmp_path)
    assert [cell.adaptive for cell in grid.of("mixup")] == [True]
    assert grid.pooled == []
    put(tmp_path, guarded(0.0, 0.0, "oracle"), guarded(0.0, 0.0, "oracle").model_copy(update=other))
    (grid,) = found(tmp_path)
    assert grid.pooled == [name for name in grid.attacks if not grid.cells[name, "spectral"].adaptive]
    assert [grid.cells[name, "spectral"].adaptive for name in grid.adaptive] == [True]
    name = grid.adaptive[0].replace("_", r"\_")
    assert f" Adaptive, made against a defence: {name}.\n" in page(tmp_path)
    assert grid.won_back("spectral").mean == pytest.approx(1 / 11)


def test_the_front_is_of_what_nothing_beats(tmp_path: Path) -> None:
    price_and_won = {
        "oracle": (0.0, 10.0), "cheap": (1.0, 2.0), "beaten": (2.0, 1.0), "dear": (2.0, 5.0),
        "as_good": (3.0, 5.0),
    }  # fmt: skip
    several = [guarded(10 - won - price, price, name) for name, (price, won) in price_and_won.items()]
    put(tmp_path, make("mgd", 10.0, 0.0), *several)
    (grid,) = found(tmp_path)
    assert grid.won_back("cheap").mean == pytest.approx(0.2)
    assert grid.won_back("as_good").mean == pytest.approx(0.5)
    assert grid.front == ["undefended", "cheap", "dear"]


def test_nothing_beats_no_defence_by_costing_more(tmp_path: Path) -> None:
    put(tmp_path, make("mgd", 10.0, 0.0), guarded(11.0, 1.0, "harmful"), guarded(10.0, 0.0, "idle"))
    (grid,) = found(tmp_path)
    assert (grid.won_back("harmful").mean, grid.won_back("idle").mean) == pytest.approx((-0.2, 0))
    assert grid.front == ["undefended"]
    put(tmp_path, guarded(9.0, -1.0, "improving"))
    assert found(tmp_path)[0].front == ["improving"]


def test_intervals_of_shares_are_not_of_one_mould(tmp_path: Path) -> None:
    put(tmp_path, make("mgd", 10.0, 2.0), guarded(4.0, 1.0, spread=2.0))
    (grid,) = found(tmp_path)
    won = grid.cells["mgd", "spectral"].won_back
    assert won.low < 0.5 < won.high
    assert won.high - 0.5 != pytest.approx(0.5 - won.low, rel=1e-3)


def test_of_several_twins_that_of_the_same_attack_counts(tmp_path: Path) -> None:
    """One poison on record under two names, the other of which ranks above it."""
    put(tmp_path, make("mgd", 10.0, 0.0), make("a_copy", 10.0, 0.0), guarded(4.0, 1.0))
    read = games.read(tmp_path)
    assert [row.record.attack for row in read[0].ranked] == ["a_copy", "mgd"]
    (grid,) = defended.defense_tables(tmp_path, read)
    assert grid.attacks == ["mgd"]
    assert defended.left_out(tmp_path, read) == []


def test_nothing_lost_is_nothing_to_win(tmp_path: Path) -> None:
    put(tmp_path, make("mgd", 0.1, 3.0), guarded(0.0, 1.0))
    (grid,) = found(tmp_path)
    assert grid.cells["mgd", "spectral"].won_back is None
    won = np.subtract(
        grid.cells["mgd", "spectral"].poisoned.mean, grid.cells["mgd", "spectral"].bare.mean
    )
    assert grid.shown("mgd", "spectral").partition(" ")[2].startswith(f"({won:.2f} ± ")
    assert grid.shown("mgd", "spectral").endswith(" points)")
    assert grid.won_back("spectral") is None


def test_a_share_that_nobody_can_read_is_shown_as_points(tmp_path: Path) -> None:
    put(tmp_path, make("mgd", 2.0, 2.0), guarded(4.0, 1.0, spread=8.0))
    (grid,) = found(tmp_path)
    won = grid.cells["mgd", "spectral"].won_back
    assert won.high - won.low > grids.WIDEST
    assert grid.shown("mgd", "spectral").endswith(" points)")


def test_what_is_told_beside_the_shares(tmp_path: Path) -> None:
    trusting = {"early_stop": {"trusted": 100}}
    other = {"budget": {**make().budget.model_dump(), "fraction": 0.05}, "poison_hash": "f" * 64}
    put(
        tmp_path, make("mgd", 10.0, 0.0), guarded(4.0, 1.0),
        guarded(4.0, 1.0, "early_stop", defense_config=trusting),
        make("es", 5.0, **other), guarded(2.0, 1.0, "mixup", **other),
        guarded(2.0, 1.0, "spectral+mixup", **other),  # several at once are not missed elsewhere
    )  # fmt: skip
    one, two = sorted(found(tmp_path), key=lambda grid: "mixup" in grid.defenses)
    assert [one.trusted(name) for name in one.defenses] == [100, 0]
    assert two.defenses == ["mixup", "spectral+mixup"]
    assert (one.unmeasured, two.unmeasured) == (("mixup",), ("early_stop", "spectral"))
    text = page(tmp_path)
    assert "\nNot measured in this game: mixup.\n" in text
    for recipe in ("smooth", "standard"):
        assert f"| defence, {recipe} victims |" in text
        assert f"| filter, {recipe} victims |" in text


def test_pairs_of_two_kinds_of_machine_are_marked(tmp_path: Path) -> None:
    bare, here = make("mgd", 10.0, 0.0), guarded(4.0, 1.0)
    other = here.hardware.model_copy(update={"processor": "another"})
    put(tmp_path, bare, here.model_copy(update={"hardware": other}))
    (grid,) = found(tmp_path)
    assert grid.cells["mgd", "spectral"].elsewhere
    assert grid.shown("mgd", "spectral") == "85.45† (50 %, 50 to 50)"
    assert grid.priced("spectral") == "1.00 ± 0.00†"
    assert "| 1.00 ± 0.00† |" in page(tmp_path)
    put(tmp_path, bare.model_copy(update={"hardware": other}))
    (grid,) = found(tmp_path)
    (cell,) = grid.cells.values()
    assert not cell.elsewhere, "of two twins that of the same machine counts"
    assert grid.priced("spectral") == "1.00 ± 0.00"


def test_what_tells_the_controls_apart(tmp_path: Path) -> None:
    put(
        tmp_path, make("mgd", 10.0, 0.0), guarded(1.0, 0.0, "oracle"),
        guarded(9.0, 0.0, "random_filter"),
    )  # fmt: skip
    (grid,) = found(tmp_path)
    assert grid.told_apart.mean == pytest.approx(8)
    assert "\nOf all together the oracle wins back 8.00 ± 0.00 points more than" in page(tmp_path)
    assert "too few pairs" not in page(tmp_path)
    put(tmp_path, guarded(1.0, 0.0, "random_filter"))
    assert "victims: too few pairs to tell even the controls apart.\n" in page(tmp_path)


def test_only_who_met_all_attacks_has_a_share_of_them_all(tmp_path: Path) -> None:
    other = {"attack": "es", "poison_hash": "e" * 64}
    put(
        tmp_path, make("mgd", 10.0, 0.0), make("es", 5.0, 0.0, poison_hash="e" * 64),
        guarded(4.0, 1.0), guarded(4.0, 1.0).model_copy(update=other), guarded(2.0, 1.0, "mixup"),
    )  # fmt: skip
    (grid,) = found(tmp_path)
    assert grid.pooled == ["mgd"]  # which alone both met; where controls are there, they decide
    put(tmp_path, guarded(0.0, 0.0, "oracle"), guarded(0.0, 0.0, "oracle").model_copy(update=other))
    (grid,) = found(tmp_path)
    assert grid.pooled == ["mgd", "es"]
    assert "\nWon back of all: of mgd, es.\n" in page(tmp_path)
    assert grid.won_back("spectral").mean == pytest.approx(5 / 15)
    assert grid.cells["mgd", "mixup"].won_back.mean == pytest.approx(0.7)
    assert grid.won_back("mixup") is None
    assert grid.front == ["undefended", "spectral"]
    assert grid.missing == ["random_filter"]
    assert "\nControls missing: random\\_filter.\n" in page(tmp_path)
    assert "\n| *undefended* | 0 | 1 | 0 | 0 % | 80.45 | 85.45 |\n" in page(tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"poison_hash": "e" * 64}, "no valid undefended record"),
        ({"hashes": {"train": "b" * 64, "val": "a" * 64, "test": "a" * 64}}, "no valid undefended"),
        ({"seeds": 4}, "4 pairs of victims, and a table takes 5 or more"),
        ({"recipes": {"smooth": {**DIGITS.recipes["smooth"].as_dict(), "width": 17}}}, "no valid"),
        ({"status": "invalid", "remark": "its reason"}, "its reason"),
        ({"track": "cifar10-small"}, "no valid undefended record"),
        ({"poison_hash": "e" * 64, "custom": ["smooth.width"]}, "a custom game, and tables of"),
    ],
)
def test_without_a_twin_a_record_is_left_out(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    put(tmp_path, make("mgd", 10.0), make("mgd", 4.0, defense="spectral", **change))
    assert found(tmp_path) == []
    assert why in page(tmp_path).partition("## Defended records that stand in no table")[2]


def test_fewer_seeds_are_held_against_as_many_of_the_twin(tmp_path: Path) -> None:
    bare, fewer = make("mgd", 10.0, 2.0), make("mgd", 4.0, 2.0, defense="spectral", seeds=5)
    put(tmp_path, bare, fewer)
    (grid,) = found(tmp_path)
    cell = grid.cells["mgd", "spectral"]
    one, other = bare.victims[0], fewer.victims[0]
    assert cell.price.n == 5
    assert cell.price.mean == pytest.approx(np.subtract(one.clean[:5], other.clean).mean())
    lost = np.subtract(one.clean[:5], one.poisoned[:5]).mean()
    won = np.subtract(other.poisoned, one.poisoned[:5]).mean()
    assert cell.won_back.mean == pytest.approx(won / lost)
    put(tmp_path, make("mgd", 4.0, 2.0, defense="spectral"))  # older, and of all seeds
    assert found(tmp_path)[0].cells["mgd", "spectral"].price.n == SEEDS


def test_defended_records_stand_in_no_table_of_attacks(tmp_path: Path) -> None:
    put(
        tmp_path, make("mgd", 10.0), guarded(4.0, 1.0),
        guarded(0.0, 0.0, "oracle"), guarded(6.0, 0.5, "epic"),
        guarded(5.0, 0.5, "mixup", defense_config={"mixup": {"alpha": 1.0}}),
        guarded(5.5, 0.5, "mixup", defense_config={"mixup": {"alpha": 0.2}}),
    )  # fmt: skip
    (grid,) = found(tmp_path)
    assert grid.defenses == ["oracle", "epic", "mixup (alpha=0.2)", "mixup (alpha=1.0)", "spectral"]
    assert len(rows(page(tmp_path))) == 1
    whole = "100 %, 100 to 100"
    assert f"| *oracle* | 0.00 ± 0.00 | – | 0 | {whole} | 90.45 ({whole}) |" in page(tmp_path)
    written = tables.build(tmp_path)
    (name,) = [path for path in written if path.name.endswith("-defences.csv")]
    table = pd.read_csv(StringIO(written[name]))
    assert table["victims"].tolist() == ["smooth"] * 5 + ["standard"] * 5
    assert table["defense"].tolist() == grid.defenses * 2
    assert table["certificate_violations"].tolist() == [0] * 10
    assert not table[["adaptive", "other_processor"]].to_numpy().any()
    assert table["trusted_images"].tolist() == [0] * 10
    assert table["price"][4] == pytest.approx(1.0)
    np.testing.assert_allclose(
        table["clean"] - table["undefended_poisoned"] + table["price"], table["lost"]
    )
    np.testing.assert_allclose(table["poisoned"] - table["undefended_poisoned"], table["won"], atol=1e-6)
    assert table["won_back"][4] == pytest.approx(table["won"][4] / table["lost"][4])
    assert grid.missing == ["random_filter"]

    tables.update(tmp_path)
    (figure,) = (tmp_path / "figures").glob("*-defences.png")
    assert f"](figures/{figure.name})" in page(tmp_path)
    assert tables.update(tmp_path, check=True) == []


def measured(config: dict[str, Any] | None = None, **changes: Any) -> Costs:
    """A defence that takes twice, thrice and ten times as long, and 2.5 times by count."""
    rounds = [Round(defended=t, bare=1.5, defended_wall=9, bare_wall=1) for t in (15.0, 3.0, 4.5)]
    cost = DefenseCost(
        defense="spectral", config={} if config is None else config, rounds=rounds, multiply_adds=25
    )
    record = make()
    values: dict[str, Any] = {
        "track": "digits", "dataset": DIGITS.dataset, "num_train": 500, "allowed": 12,
        "recipe_name": "smooth", "recipe": DIGITS.recipes["smooth"].as_dict(), "multiply_adds": 10,
        "cores": 1, "defenses": [cost], "command": "python", "code": record.code, "libraries": {},
        "hardware": record.hardware, "created": record.created,
    }  # fmt: skip
    return Costs(**values | changes)


def test_the_cost_is_that_of_the_same_defence(tmp_path: Path) -> None:
    mixup = {"mixup": {"alpha": 1.0}}
    put(tmp_path, make("mgd"), guarded(4.0, 1.0), guarded(4.0, 1.0, "mixup", defense_config=mixup))
    tables.update(tmp_path)
    measured().save(tmp_path / "costs" / "digits.json")
    (grid,) = found(tmp_path)
    assert (grid.trainings("spectral"), grid.trainings("mixup")) == (3.0, None)
    assert (grid.cost("spectral"), grid.cost("mixup")) == ("3.0 (2.50)", "–")
    stale = {path.name for path in tables.update(tmp_path, check=True)}
    assert "README.md" in stale
    assert any(name.endswith("-defences.csv") for name in stale)
    tables.update(tmp_path)
    assert "| spectral | 1.00 ± 0.00 | 3.0 (2.50) | 0 |" in (tmp_path / "README.md").read_text()
    (name,) = (tmp_path / "tables").glob("*-defences.csv")
    row = pd.read_csv(name).query("victims == 'smooth'").set_index("defense").loc["spectral"]
    assert row[["cost_trainings", "cost_least", "cost_most", "cost_by_count"]].tolist() == [
        3,
        2,
        10,
        2.5,
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"spectral": {"factor": 2.0}}},
        {"num_train": 400},
        {"dataset": DIGITS.dataset.model_copy(update={"split_seed": 1})},
        {"recipe": DIGITS.recipes["standard"].as_dict()},
        {"recipe_name": "standard"},
        {"track": "cifar10-small"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_cost_of_something_else_is_not_shown(tmp_path: Path, changes: dict[str, Any]) -> None:
    put(tmp_path, make("mgd"), guarded(4.0, 1.0))
    measured(**changes).save(tmp_path / "costs" / "digits.json")
    assert found(tmp_path)[0].cost("spectral") == "–"


def test_costs_that_are_none_are_refused(tmp_path: Path) -> None:
    put(tmp_path, make("mgd"), guarded(4.0, 1.0))
    text = measured().model_dump_json().replace('"bare":1.5', '"bare":0')
    (tmp_path / "costs").mkdir()
    (tmp_path / "costs" / "digits.json").write_text(text)
    with pytest.raises(UserError, match=r"digits\.json is not a valid file of costs"):
        tables.build(tmp_path)


def test_a_certificate_stands_beside_what_was_left(tmp_path: Path) -> None:
    promised = Certificate(curve=[90.0, 70.0, 60.0], changes=2, violations=3)
    one = guarded(4.0, 1.0)
    victims = [v.model_copy(update={"certificate": promised}) for v in one.victims]
    put(tmp_path, make("mgd", 10.0, 0.0), one.model_copy(update={"victims": victims}))
    (grid,) = found(tmp_path)
    assert grid.certified("spectral").endswith("Promises broken: 3")
    assert grid.tried("spectral") == [("mgd", "2 changes: 60.0 % promised, 85.5 % left")]
    assert "broken: 3. Tried by mgd, 2 changes: 60.0 % promised, 85.5 % left.\n" in page(tmp_path)
    (table,) = (
        pd.read_csv(StringIO(text))
        for path, text in tables.build(tmp_path).items()
        if path.name.endswith("-defences.csv")
    )
    assert (table["certified"][0], table["certificate_changes"][0]) == (60.0, 2)
