"""What defences win back follows from two records of one poison.

Claims of `poisonbench.leaderboard.shields` tested here:

- a defended record is held against the undefended one of the same poison, data, victims and seeds, seed
  by seed; one without such a twin, a custom one and one set aside are left out;
- price, share won back, precision, recall and clean images lost are those worked out by hand;
- where nothing was lost for sure there is nothing to win back;
- controls come first; two records of a defence are told apart by their options;
- defended records stand in no table of attacks, and the page, the CSV and the figure show them.
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

from poisonbench.records import Certificate, Filtering, Record

games: Any = importlib.import_module("poisonbench.leaderboard.games")
shields: Any = importlib.import_module("poisonbench.leaderboard.shields")
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
    several: list[Any] = shields.sieges(results, games.read(results))
    return several


def test_a_cell_by_hand(tmp_path: Path) -> None:
    # Undefended victims lose 10 points; defended ones pay 1, and then lose 4: 5 of 10 are won back.
    put(tmp_path, make("mgd", 10.0, 0.0), guarded(4.0, 1.0))
    (siege,) = found(tmp_path)
    assert (siege.attacks, siege.defenses) == (["mgd"], ["spectral"])
    cell = siege.cells["mgd", "spectral"]
    assert cell.price.mean == pytest.approx(1.0)
    assert cell.won_back.mean == pytest.approx(0.5)
    assert cell.precision == pytest.approx(6 / 18)
    assert cell.recall == pytest.approx(6 / 12)
    assert cell.clean_lost == pytest.approx(12)
    # The mean clean accuracy is 90.45: less 1, less 4.
    assert siege.shown("mgd", "spectral") == "85.45 (50 %, 50 to 50)"
    assert siege.shown("mgd", "other") == "–"
    assert cell.filtered == "33 / 50 / 12.0"
    assert siege.filters == ["spectral"]
    text = siege.certified("spectral")
    assert "90.0 % against 0, 50.0 % against 1" in text
    assert "24 such changes; promises broken: 0" in text


def test_shares_of_several_attacks_are_of_all_that_was_lost(tmp_path: Path) -> None:
    """Of 10 and of 1 points 5 and -4 are won back: 1 of 11, where the mean of the shares is -1.75."""
    other = {"attack": "es", "poison_hash": "e" * 64}
    weak = guarded(4.0, 1.0).model_copy(update=other)
    put(
        tmp_path,
        make("mgd", 10.0, 0.0),
        make("es", 1.0, 0.0, poison_hash="e" * 64),
        guarded(4.0, 1.0),
        weak,
    )
    (siege,) = found(tmp_path)
    assert [siege.cells[a, "spectral"].won_back.mean for a in ("mgd", "es")] == [0.5, -4.0]
    assert siege.won_back("spectral").mean == pytest.approx(1 / 11)

    adaptive = {"attack_config": {"against": "spectral"}, "poison_hash": "f" * 64}
    put(tmp_path, make("mgd", 9.0, 0.0, **adaptive), guarded(9.0, 1.0).model_copy(update=adaptive))
    (siege,) = found(tmp_path)
    assert len(siege.of("spectral")) == 3
    assert siege.won_back("spectral").mean == pytest.approx(1 / 11)


def test_intervals_of_shares_are_not_of_one_mould(tmp_path: Path) -> None:
    put(tmp_path, make("mgd", 10.0, 2.0), guarded(4.0, 1.0, spread=2.0))
    (siege,) = found(tmp_path)
    won = siege.cells["mgd", "spectral"].won_back
    assert won.low < 0.5 < won.high
    assert won.high - 0.5 != pytest.approx(0.5 - won.low, rel=1e-3)


def test_nothing_lost_is_nothing_to_win(tmp_path: Path) -> None:
    put(tmp_path, make("mgd", 0.1, 3.0), guarded(0.0, 1.0))
    (siege,) = found(tmp_path)
    assert siege.cells["mgd", "spectral"].won_back is None
    assert "nothing lost" in siege.shown("mgd", "spectral")
    assert siege.won_back("spectral") is None


@pytest.mark.parametrize(
    "change",
    [
        {"poison_hash": "e" * 64},
        {"hashes": {"train": "b" * 64, "val": "a" * 64, "test": "a" * 64}},
        {"seeds": 4},
        {"recipes": {"smooth": {**DIGITS.recipes["smooth"].as_dict(), "width": 17}}},
        {"status": "invalid", "remark": "x"},
        {"track": "cifar10-small"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_without_a_twin_a_record_is_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    put(tmp_path, make("mgd", 10.0), make("mgd", 4.0, defense="spectral", **change))
    assert found(tmp_path) == []
    assert "## Defended records that stand in no table" in page(tmp_path)


def test_fewer_seeds_are_held_against_as_many_of_the_twin(tmp_path: Path) -> None:
    bare, defended = make("mgd", 10.0, 2.0), make("mgd", 4.0, 2.0, defense="spectral", seeds=5)
    put(tmp_path, bare, defended)
    (siege,) = found(tmp_path)
    cell = siege.cells["mgd", "spectral"]
    one, other = bare.victims[0], defended.victims[0]
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
    (siege,) = found(tmp_path)
    assert siege.defenses == ["oracle", "epic", "mixup (alpha=0.2)", "mixup (alpha=1.0)", "spectral"]
    assert len(rows(page(tmp_path))) == 1
    assert "| *oracle* | 0.00 ± 0.00 | 100 %, 100 to 100 | 90.45 (100 %, 100 to 100) |" in page(tmp_path)
    written = tables.build(tmp_path)
    (name,) = [path for path in written if path.name.endswith("-defences.csv")]
    table = pd.read_csv(StringIO(written[name]))
    assert table["defense"].tolist() == siege.defenses
    assert table["certificate_violations"].tolist() == [0] * 5
    assert table["price"][4] == pytest.approx(1.0)

    tables.update(tmp_path)
    (figure,) = (tmp_path / "figures").glob("*-defences.png")
    assert f"](figures/{figure.name})" in page(tmp_path)
    assert tables.update(tmp_path, check=True) == []
