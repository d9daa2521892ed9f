"""The site follows from the records alone, its pages are sound, and `check` finds what is not.

Claims of `poisonbench.leaderboard.site` and `columns` tested here:

- the same records give the same bytes, in whatever order they are read and hashed, whatever figures'
  bytes are, and a second update changes nothing;
- there is a page for each track and for each record, those set aside included; every link and picture
  leads to a file, ids are unique, pictures have alternative text, headers their scope;
- a table holds one game, shows what its records hold, and is sorted by numbers;
- claimed and re-measured stand side by side; flagged and disputed entries are marked, with the reason;
- every page forbids what is remote or inline, and has neither;
- `check` finds an edited, a missing and a left-over page and writes nothing; a folder that is no site of
  ours is refused, and nothing in it is touched.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from sitepages import Page, body, built, dispute, folder_of, headings, verified
from test_defended_tables import guarded
from test_leaderboard import DIGITS, FREE, controls, make, put

from poisonbench import records
from poisonbench.errors import UserError
from poisonbench.records import Record
from poisonbench.statistics import CURRENT, RULES
from poisonbench.tracks import TRACKS

tables: Any = importlib.import_module("poisonbench.leaderboard.tables")
games: Any = importlib.import_module("poisonbench.leaderboard.games")
papers: Any = importlib.import_module("poisonbench.leaderboard.papers")
site_module: Any = importlib.import_module("poisonbench.leaderboard.site")


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """Results with everything that a page may show."""
    results = tmp_path / "my results"
    best = make("mgd", 10.0, attack_config={"steps": 45}, command="poisonbench run --attack mgd")
    put(
        results, best, guarded(4.0, 1.0), make("inflated", 9.0, poison_hash="e" * 64),
        make("mgd", 3.0, custom=["seeds"], poison_hash="f" * 64),
        make("old", status="superseded", remark="measured again"),
        make("lone", 4.0, defense="spectral", poison_hash="1" * 64),
        *(
            record.model_copy(update={"poison_hash": f"{i:064x}"})
            for i, record in enumerate(
                [*controls(DIGITS.budget), *controls(FREE), make("mgd", 12, budget=FREE)]
            )
        ),
    )  # fmt: skip
    (mgd,) = [p for p in (results / "digits/mgd/none").iterdir() if p.name == "run-0"]
    verified(best, 9.95).save(mgd / "verification.json")
    (mgd / "summary.png").write_bytes(b"")
    (mgd / "poisons.png").write_bytes(b"")
    inflated = folder_of(results, "inflated")
    verified(make("inflated", 9.0, poison_hash="e" * 64), 7.0).save(inflated / "verification.json")
    dispute(make(poison_hash="e" * 64), "fails on other splits", evidence="https://example.org/x").save(
        inflated / "dispute-0001.json"
    )
    return results


@pytest.mark.parametrize("seeds", [10, 20])
def test_a_measurement_on_as_many_seeds_or_more_decides_the_rank(seeds: int, board: Path) -> None:
    def order() -> list[str]:
        (game,) = [game for game in games.read(board) if any(r.name == "rival" for r in game.ranked)]
        return [row.name for row in game.ranked if row.name in ("rival", "inflated")]

    put(board, make("rival", 8.0, poison_hash="2" * 64))
    path = folder_of(board, "inflated") / "verification.json"
    verified(make("inflated", 9.0, poison_hash="e" * 64), 7.0, seeds).save(path)
    assert order() == ["rival", "inflated"]
    path.unlink()
    assert order() == ["inflated", "rival"]


def test_same_records_same_bytes(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = built(board)
    assert all(text.endswith("\n") and "\r" not in text for text in pages.values())
    site = board.parent / "board"
    assert tables.update(board, site=site) == []

    for figure in (board / "figures").glob("*.png"):
        figure.write_bytes(figure.read_bytes() + b"other bytes")
    find = records.find
    monkeypatch.setattr(records, "find", lambda folder: find(folder)[::-1])
    assert tables.update(board, check=True, site=site) == []

    script = (
        "import sys, importlib, pathlib\n"
        "tables = importlib.import_module('poisonbench.leaderboard.tables')\n"
        "print(tables.update(pathlib.Path(sys.argv[1]), None, True, pathlib.Path(sys.argv[2])))"
    )
    again = subprocess.run(
        [sys.executable, "-c", script, str(board), str(site)],
        capture_output=True, check=True, text=True,
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert again.stdout == "[]\n"


def test_a_page_for_each_track_and_record(board: Path) -> None:
    pages = built(board)
    undefended = [r for _, r in records.find(board) if r.defense == "none"]
    assert len([name for name in pages if name.startswith("entries/")]) == len(undefended)
    assert set(pages) >= {"index.html", "about.html", "other.html"}
    assert set(pages) >= {f"track-{name}.html" for name in TRACKS}
    assert "No records yet." in pages["track-cifar10.html"]
    # Defended records stand with the attack, or with the reason why not.
    assert "85.45 (50 %, 50 to 50)" in pages["track-digits.html"]
    assert "no valid undefended record" in Page(pages["other.html"]).text
    assert "measured again" in pages["track-digits.html"]
    assert "Under defences" in pages["entries/digits-mgd-none-run-0.html"]


def test_pages_are_sound(board: Path) -> None:
    site = board.parent / "board"
    linked: set[Path] = set()
    for name, text in built(board).items():
        page = Page(text)
        (root,) = page.all("html")
        assert root["lang"] == "en"
        assert len(page.all("h1")) == len(page.all("main")) == len(page.all("title")) == 1
        ids = Counter(a["id"] for _, a in page.elements if "id" in a)
        assert [i for i, count in ids.items() if count > 1] == []
        assert all((img.get("alt") or "").strip() for img in page.all("img"))
        assert all(th.get("scope") in ("col", "row", "rowgroup") for th in page.all("th"))
        assert len(page.all("table")) == len(page.all("caption"))
        names = [a.get("aria-label") for _, a in page.elements if a.get("role") == "region"]
        assert len(names) == len(set(names)) == len(page.all("table"))
        here = (site / name).parent
        for _, attributes in page.elements:
            for address in (attributes.get("href"), attributes.get("src")):
                if address is None or urlsplit(address).scheme:
                    assert address is None or address.startswith("https://")
                    continue
                target, _, anchor = address.partition("#")
                path = (here / unquote(target)).resolve() if target else (site / name).resolve()
                assert path.is_file(), (name, address)
                if anchor:
                    assert f'id="{unquote(anchor)}"' in path.read_text("utf-8")
                linked.add(path)
    entries = {path.resolve() for path in (site / "entries").iterdir()}
    assert entries <= linked, "an entry that no page links to"


def test_nothing_remote_and_nothing_inline(board: Path) -> None:
    for text in built(board).values():
        page = Page(text)
        (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
        assert policy is not None
        rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
        assert rules["default-src"] == "'none'"
        assert {"http:", "https:", "*", "'unsafe-inline'", "data:"}.isdisjoint(policy.split())
        assert not page.all("style")
        assert not page.all("iframe")
        assert all(script.get("src", "").endswith(".js") for script in page.all("script"))  # type: ignore[union-attr]
        assert re.findall(r"<script[^>]*>[^<]+", text) == []
        for tag, attributes in page.elements:
            assert "style" not in attributes
            assert not any(name.startswith("on") for name in attributes)
            for address in (attributes.get("src"), attributes.get("href") if tag == "link" else None):
                assert address is None or not urlsplit(address).scheme
            if tag == "a" and (attributes["href"] or "").startswith("http"):
                assert attributes["rel"] == "noopener nofollow"


def test_a_row_shows_its_record(board: Path) -> None:
    text = built(board)["track-digits.html"]
    row = dict(zip(headings(text), body(text)[0], strict=True))
    assert row == {
        "rank": "1", "attack": "mgd", "drop, smooth": "10.00 ± 0.08",
        "drop, standard": "10.00 ± 0.08", "above controls, smooth": "yes",
        "claimed → re-measured, smooth": "10.00 ± 0.08 → 9.95 ± 0.08",
        "standing": "re-measured, and holds", "best-epoch drop, smooth": "10.50 ± 0.08",
        "fraction": "2.5 % (12 of 500)", "game": "replace, fixed labels, any pixels",
        "crafting, s": "1,234", "crafting, trainings": "617", "date": "2025-03-01",
        "files": "record poison picture",
    }  # fmt: skip


def test_transfer_victims_have_columns(tmp_path: Path) -> None:
    transfer: Any = importlib.import_module("poisonbench.transfer")
    record, other = make("mgd", 10.0), make("other", 5.0, poison_hash="e" * 64)
    results = put(tmp_path / "results", record, other)
    recipes = {name: recipe.as_dict() for name, recipe in DIGITS.transfer.items()}
    same = ("evaluation_seconds", "created", "command", "code", "libraries", "hardware", "poison_hash")
    carried = transfer.Transfer(
        victims=make(drop=2.0, recipes=recipes, surrogate="wide").victims,
        **{name: getattr(record, name) for name in same},
    )
    carried.save(folder_of(results, "mgd") / "transfer.json")
    text = built(results)["track-digits.html"]
    shown = [dict(zip(headings(text), row, strict=True)) for row in body(text)]
    assert [row["transfer, wide"] for row in shown] == ["2.00 ± 0.08", "–"]
    assert {f"transfer, {name}" for name in recipes} <= set(headings(text))


def test_numbers_are_sorted_as_numbers(board: Path) -> None:
    text = built(board)["track-digits.html"]
    for table in text.split('<table class="board">')[1:]:
        cells = Page(table.split("</table>")[0].replace("<tbody>", "").replace("</tbody>", ""))
        assert [a for a in cells.all("td") if a.get("class") == "num"]
    shown = re.findall(r'<td class="num" data-order="([^"]*)">(?:<a[^>]*>)?([^<]*)<', text)
    assert ("", "–") in shown  # what was not measured
    for order, said in shown:
        number = said.rpartition("→")[2].strip().partition(" ")[0].rstrip("=").replace(",", "")
        if order and "%" not in said:
            assert float(order) == pytest.approx(float(number), abs=0.0051 if "." in number else 0.51)
    assert len({order for order, _ in shown}) > 10


def test_games_are_never_mixed(board: Path) -> None:
    pages = built(board)
    parts = pages["track-digits.html"].split("<section ")[1:]
    games = [set(re.findall(r"replace, (\w+) labels", part)) for part in parts]
    assert games == [{"fixed"}, {"free"}]
    assert "custom (seeds)" in pages["other.html"]
    assert "custom (seeds)" not in pages["track-digits.html"]


def test_flagged_and_disputed_entries_are_marked_and_stay(board: Path) -> None:
    pages = built(board)
    text = pages["track-digits.html"]
    row = dict(zip(headings(text), body(text)[2], strict=True))
    assert (row["rank"], row["attack"]) == ("3", "inflated flagged disputed")
    assert row["claimed → re-measured, smooth"] == "9.00 ± 0.08 → 7.00 ± 0.08"
    # One of 600 images, 0.167, is more than the spread: ± t(9) = 3.250 · 0.167 · √(2/10) = 0.24.
    flag = "victims lost 2.00 points less when measured again (99 % interval 1.76 to 2.24)"
    assert row["standing"].count(flag) == 2
    assert "disputed: fails on other splits" in row["standing"]
    entry = Page(pages["entries/digits-inflated-none-run-0.html"])
    assert flag in entry.text
    assert {"href": "https://example.org/x", "rel": "noopener nofollow"} in entry.all("a")
    assert "not re-measured" in text


def test_the_rules_are_written_once(board: Path) -> None:
    rule = RULES[CURRENT].statement
    assert rule in Page(built(board)["about.html"]).text
    template = Path(site_module.__file__).parent / "templates" / "site" / "about.html.j2"
    assert rule[:60] not in template.read_text("utf-8")


def test_every_column_is_explained(board: Path) -> None:
    docs = Path(__file__).parents[1] / "docs" / "board.md"
    if not docs.is_file():
        pytest.skip(f"no {docs}: the pages are in a checkout only")
    explained = re.findall(r"^\| (\S[^|]*?) \|", docs.read_text("utf-8"), re.MULTILINE)
    text = built(board)["track-digits.html"]
    assert {name.partition(",")[0] for name in headings(text)} <= set(explained)
    glossary = text.split("What the columns mean")[1]
    assert all(f"<dt>{name}</dt>" in glossary for name in headings(text) if name != "files")


def test_check_finds_what_is_not_as_the_records_give(board: Path) -> None:
    site = board.parent / "board"
    built(board)
    edited, missing, extra = site / "about.html", site / "assets/board.js", site / "entries/more.html"
    edited.write_text("edited")
    missing.unlink()
    extra.write_text("x")
    (site / ".hidden").write_text("nobody's business")
    assert set(tables.update(board, check=True, site=site)) == {edited, missing, extra}
    assert edited.read_text() == "edited"
    assert not missing.exists()
    assert set(tables.update(board, site=site)) == {edited, missing, extra}
    assert not extra.exists()
    assert (site / ".hidden").exists()
    assert tables.update(board, check=True, site=site) == []
    old = folder_of(board, "old")
    (old / "record.json").unlink()
    gone = site / "entries/digits-old-none-run-0.html"
    assert gone in tables.update(board, site=site)
    assert not gone.exists()


@pytest.mark.parametrize("check", [False, True])
def test_a_folder_that_is_no_site_is_left_alone(board: Path, check: bool) -> None:
    other = board.parent / "thesis"
    other.mkdir()
    (other / "index.html").write_text("<html>mine</html>")
    with pytest.raises(UserError, match="holds something else than a board"):
        tables.update(board, check=check, site=other)
    assert [path.name for path in other.iterdir()] == ["index.html"]
    assert not (board / "README.md").exists()


def test_a_site_around_the_records_is_refused(tmp_path: Path) -> None:
    """Even where a board lies there already: what is left over of one is deleted."""
    results = put(tmp_path / "public" / "results", make("mgd"))
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    tables.update(results, site=tmp_path / "board")
    (tmp_path / "board" / "index.html").rename(tmp_path / "public" / "index.html")
    with pytest.raises(UserError, match="holds the records of"):
        tables.update(results, site=tmp_path / "public")
    assert all(path.read_bytes() == content for path, content in before.items())
    tables.update(results, site=tmp_path / "public" / "board")
    assert (tmp_path / "public" / "board" / "index.html").is_file()


def calls(results: Path) -> int:
    """Functions called to make everything but drawings, whose cost is bounded by what they show."""
    count = 0

    def step(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    previous = sys.getprofile()
    sys.setprofile(step)
    try:
        tables.update(results, check=True, site=results.parent / "board")
    finally:
        sys.setprofile(previous)
    return count


def test_each_record_is_read_once(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    load = Record.load
    monkeypatch.setattr(Record, "load", lambda path: (read.append(path), load(path))[1])
    built(board)
    assert sorted(read) == sorted(board.rglob("record.json"))


@pytest.mark.slow
def test_the_work_grows_with_the_records_and_no_faster(tmp_path: Path) -> None:
    def cost(number: int) -> int:
        several: list[Record] = []
        for i in range(number):
            more = {"poison_hash": f"{i:064x}", "attack_config": {"steps": i},
                    "created": datetime(2025, 1, 1, tzinfo=UTC) + timedelta(minutes=i)}  # fmt: skip
            several.append(make(f"made{i % 9}", i % 7, 0.5, **more))
            if i % 4 == 0:
                several.append(make(f"made{i % 9}", 1.0, 0.5, defense="spectral", **more))
        return calls(put(tmp_path / str(number) / "results", *several))

    cost(3)  # imports and compiles
    first, second, third = map(cost, (80, 160, 320))
    # 2.01 as it is; 2.11 where each row was held against each other one to rank them.
    assert (third - second) / (second - first) < 2.06
