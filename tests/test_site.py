"""The site follows from the records alone, and gives a stranger's record no power over its reader.

Claims of `poisonbench.leaderboard.site`, `columns` and `papers` tested here:

- the same records give the same bytes, in whatever order they are read and hashed, whatever figures'
  bytes are, and a second update changes nothing;
- there is a page for each track and for each record, those set aside included; every link and picture
  leads to a file, ids are unique, pictures have alternative text, headers their scope;
- a table holds one game, shows what its records hold, and is sorted by numbers;
- claimed and re-measured stand side by side; flagged and disputed entries are marked, with the reason,
  and keep their rank;
- an entry's page has its seeds, its options, its command and its BibTeX, and what its author says of it;
- whatever a record, a dispute or an `entry.json` says is text: no element, no script, no address but
  those of http and https, no command that a shell would read something else into;
- every page forbids what is remote or inline, and has neither;
- `check` finds an edited, a missing and a left-over page and writes nothing; a folder that is no site of
  ours is refused, and nothing in it is touched.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from test_leaderboard import DIGITS, FREE, controls, make, put
from test_shields import guarded

from poisonbench import attacks, records
from poisonbench.errors import UserError
from poisonbench.records import Record
from poisonbench.statistics import RANKING
from poisonbench.tracks import TRACKS
from poisonbench.verification import Dispute, Verification

tables: Any = importlib.import_module("poisonbench.leaderboard.tables")
papers: Any = importlib.import_module("poisonbench.leaderboard.papers")
site_module: Any = importlib.import_module("poisonbench.leaderboard.site")

VOID = {"meta", "link", "img", "input", "br", "hr"}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}\u202e`"


class Page(HTMLParser):
    """A page as a browser sees it: its elements, and its text without them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of every element of that name."""
        return [attributes for tag, attributes in self.elements if tag == name]


def built(results: Path) -> dict[str, str]:
    """Every page of the site of these records, by name."""
    site = results.parent / "board"
    tables.update(results, site=site)
    return {p.relative_to(site).as_posix(): p.read_text("utf-8") for p in site.rglob("*.html")}


def body(text: str) -> list[list[str]]:
    """Cells of the first table of a page, as text."""
    first = text.split('<table class="board">')[1].split("<tbody>")[1].split("</tbody>", maxsplit=1)[0]
    rows = re.findall(r"<tr>(.*?)</tr>", first, re.DOTALL)
    return [
        [
            " ".join(Page(c).text.split())
            for c in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)
        ]
        for row in rows
    ]


def headings(text: str) -> list[str]:
    first = text.split('<table class="board">')[1].split("<thead>")[1].split("</thead>", maxsplit=1)[0]
    return re.findall(r"<th[^>]*>(.*?)</th>", first)


def verified(record: Record, drop: float) -> Verification:
    """A verification that measured this drop, give or take what `make` gives."""
    again = make(record.attack, drop).victims
    hidden = [v.model_copy(update={"seeds": [seed + 10**6 for seed in v.seeds]}) for v in again]
    same = ("poison_hash", "evaluation_seconds", "created", "command", "code", "libraries", "hardware")
    return Verification(
        victims=hidden, secret_hash="c" * 64, **{name: getattr(record, name) for name in same}
    )


def dispute(record: Record, reason: str, **changes: Any) -> Dispute:
    values: dict[str, Any] = {
        "poison_hash": record.poison_hash, "reason": reason, "author": "someone",
        "created": datetime(2025, 4, 1, tzinfo=UTC),
    }  # fmt: skip
    return Dispute(**values | changes)


def folder_of(results: Path, attack: str) -> Path:
    (folder,) = (results / "digits" / attack / "none").iterdir()
    return folder


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
        "drop, standard": "10.00 ± 0.08", "claimed → re-measured, smooth": "10.00 ± 0.08 → 9.95 ± 0.08",
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
        numeric = [a for a in cells.all("td") if a.get("class") == "num"]
        assert numeric
        for attributes in numeric:
            order = attributes["data-order"]
            assert order == "" or float(order or "x") == pytest.approx(float(order or "x"))
    assert 'data-order="">–<' in text  # what was not measured


def test_games_are_never_mixed(board: Path) -> None:
    pages = built(board)
    parts = pages["track-digits.html"].split("<section ")[1:]
    games = [set(re.findall(r"replace, (\w+) labels", part)) for part in parts]
    assert games == [{"fixed"}, {"free"}]
    assert "custom (seeds)" in pages["other.html"]
    assert "custom (seeds)" not in pages["track-digits.html"]


def test_flagged_and_disputed_entries_are_marked_and_keep_their_rank(board: Path) -> None:
    pages = built(board)
    text = pages["track-digits.html"]
    row = dict(zip(headings(text), body(text)[1], strict=True))
    assert (row["rank"], row["attack"]) == ("2", "inflated flagged disputed")
    assert row["claimed → re-measured, smooth"] == "9.00 ± 0.08 → 7.00 ± 0.08"
    # Two samples of 0.1·√(10/9) over ten: t(18) at 99 % is 2.878, so ± 2.878·0.1054·√(2/10) = 0.14.
    flag = "victims lost 2.00 points less when measured again (99 % interval 1.86 to 2.14)"
    assert row["standing"].count(flag) == 2
    assert "disputed: fails on other splits" in row["standing"]
    entry = Page(pages["entries/digits-inflated-none-run-0.html"])
    assert flag in entry.text
    assert {"href": "https://example.org/x", "rel": "noopener nofollow"} in entry.all("a")
    assert "not re-measured" in text


def test_an_entry_has_all_that_is_known_of_it(board: Path) -> None:
    folder = board / "digits/mgd/none/run-0"
    said = {
        "author": "Ada <b>", "description": "Climbs.", "paper": "A paper", "code": "https://example.org/c",
        "bibtex": "@misc{own}", "unknown": 3,
    }  # fmt: skip
    page = "entries/digits-mgd-none-run-0.html"
    alone = Page(built(board)[page]).text
    assert "Engstrom and others" in alone
    assert "Climbs." not in alone
    assert "poisonbench run --attack mgd" in alone
    (folder / "entry.json").write_text(json.dumps(said))
    text = Page(built(board)[page]).text
    for known in ("By Ada <b>.", "Climbs.", "Paper: A paper", "https://example.org/c", "@misc{own}"):
        assert known in text
    assert "Engstrom and others" not in text
    assert "author = {{Ada <b>}}" in text
    lines = text.splitlines()
    # Seed 4 by hand: clean, poisoned, lost, and the best epochs; on victims of both kinds.
    assert lines.count("490.4080.3010.1090.9080.30") == 2
    assert "steps45" in lines


@pytest.mark.parametrize(
    "wrong", ["[]", "{", "\x00", "[" * 40_000, '{"author": "' + "x" * 70_000 + '"}']
)
def test_an_entry_that_is_not_valid_is_refused(board: Path, wrong: str) -> None:
    (folder_of(board, "inflated") / "entry.json").write_text(wrong)
    with pytest.raises(UserError, match=r"entry\.json"):
        built(board)


def test_bibtex_of_an_attacks_paper() -> None:
    assert papers.of_attack(make("tgda")) == (
        "@article{lu-2022-indiscriminate,\n"
        "  title         = {{Indiscriminate Data Poisoning Attacks on Neural Networks}},\n"
        "  author        = {Lu and Kamath and Yu},\n"
        "  year          = {2022},\n"
        "  journal       = {TMLR},\n"
        "  eprint        = {2204.09092},\n"
        "  archiveprefix = {arXiv},\n"
        "  url           = {https://arxiv.org/abs/2204.09092}\n"
        "}"
    )
    # A file that was handed in under an attack's name is not that paper's.
    assert papers.of_attack(make("tgda", crafting_seconds=None)) == ""
    assert papers.of_attack(make("unknown")) == ""


def test_every_paper_of_an_attack_is_understood() -> None:
    named = [name for name in attacks.names() if "\nPaper:" in papers.docstring(name)]
    assert "mgd" in named
    for name in named:
        assert papers.of_attack(make(name)).startswith("@"), f"the paper in attacks/{name}.py"


@pytest.mark.parametrize(
    "text",
    ["javascript:alert(1)", "data:text/html,x", "//evil.org", "https:", "http://a b", "file:///etc",
     "https://x/\u202e", "https://[", "x" * 9],
)  # fmt: skip
def test_only_addresses_of_the_web_are_linked(text: str) -> None:
    assert papers.address(text) is None


def hostile(results: Path) -> None:
    evil: dict[str, Any] = {
        "attack_config": {EVIL: EVIL, "deep": {"a": [EVIL]}}, "command": f"poisonbench run; {EVIL}",
        "libraries": {EVIL: EVIL}, "code": {"version": EVIL, "commit": EVIL, "dirty": True},
        "custom": [EVIL], "hardware": {"system": EVIL, "processor": EVIL, "cores": 2, "device": EVIL},
    }  # fmt: skip
    put(results, make("evil", **evil), make("old", status="invalid", remark=EVIL))
    folder = folder_of(results, "evil")
    dispute(make(), EVIL, evidence="javascript:alert(3)").save(folder / "dispute-1.json")
    said = dict.fromkeys(("author", "description", "paper", "bibtex"), EVIL)
    (folder / "entry.json").write_text(json.dumps(said | {"code": "javascript:alert(4)"}))
    folder.rename(folder.with_name("run & <b> %22"))


def test_what_a_record_says_is_text(tmp_path: Path) -> None:
    results = tmp_path / "results"
    hostile(results)
    pages = built(results)
    tame = built(
        put(tmp_path / "tame" / "results", make("mgd"), make("old", status="invalid", remark="x"))
    )
    allowed = {tag for text in tame.values() for tag, _ in Page(text).elements} | {"span", "strong"}
    assert "img" not in allowed
    shown = 0
    for name, text in pages.items():
        page = Page(text)
        assert {tag for tag, _ in page.elements} <= allowed, name
        assert all(script.get("src") for script in page.all("script"))
        assert not any(a.startswith("on") for _, attributes in page.elements for a in attributes)
        assert all("alert(" not in (a.get("href") or "") for a in page.all("a"))
        assert "\u202e" not in text
        shown += EVIL.replace("\u202e", " ") in page.text
    assert shown >= 3  # the entry's page, its table, and that of the record set aside
    (entry,) = [
        text for name, text in pages.items() if name.startswith("entries/digits-evil-none-run-b-")
    ]
    assert "is not one of" in entry
    assert "poisonbench run; " not in entry


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("poisonbench run --attack mgd", True),
        ("poisonbench run --set 'smooth.width=3 2'", True),
        ("poisonbench run; rm -rf x", False),
        ("poisonbench run $(x)", False),
        ("poisonbench run\nx", False),
        ("sudo poisonbench run", False),
        ("poisonbench 'run", False),
        ("", False),
    ],
)
def test_only_commands_of_this_program_are_shown(command: str, shown: bool) -> None:
    assert (site_module._command(make(command=command)) is not None) == shown


def test_names_of_pages_differ_however_they_are_compared() -> None:
    folders = ["digits/a/none/run", "digits/A/none/run", "digits/a-none/run", "digits/a/none-run",
               "a b", "a%20b", "x" * 300, "x" * 301, "../../etc"]  # fmt: skip
    slugs = site_module._slugs(folders)
    assert len({slug.lower() for slug in slugs.values()}) == len(folders)
    assert all(re.fullmatch(r"[a-z0-9_-]{1,120}", slug) for slug in slugs.values())
    assert site_module._slugs(folders[:1]) == {"digits/a/none/run": "digits-a-none-run"}


def test_the_rules_are_written_once(board: Path) -> None:
    text = Page(built(board)["about.html"]).text
    assert RANKING in text
    assert (
        RANKING[:60]
        not in (Path(site_module.__file__).parent / "templates/site/about.html.j2").read_text()
    )


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


def calls(results: Path) -> tuple[int, int]:
    """Records read, and functions called, to make everything."""
    count = reads = 0

    def step(frame: Any, event: str, arg: Any) -> None:
        nonlocal count, reads
        count += event in ("call", "c_call")
        reads += event == "call" and frame.f_code is Record.load.__func__.__code__  # type: ignore[attr-defined]

    previous = sys.getprofile()
    sys.setprofile(step)
    try:
        built(results)
    finally:
        sys.setprofile(previous)
    return reads, count


@pytest.mark.slow
def test_the_work_grows_with_the_records_and_no_faster(tmp_path: Path) -> None:
    several: list[Record] = []
    for i in range(240):
        poison = f"{i:064x}"
        more = {"poison_hash": poison, "attack_config": {"steps": i},
                "created": datetime(2025, 1, 1, tzinfo=UTC) + timedelta(minutes=i)}  # fmt: skip
        several.append(make(f"made{i % 9}", i % 7, 0.5, **more))
        if i % 4 == 0:
            several.append(make(f"made{i % 9}", 1.0, 0.5, defense="spectral", **more))
    built(put(tmp_path / "warm" / "results", *several[:3]))
    half = put(tmp_path / "half" / "results", *several[: len(several) // 2])
    whole = put(tmp_path / "whole" / "results", *several)
    (reads, some), (all_reads, every) = calls(half), calls(whole)
    assert (reads, all_reads) == (len(several) // 2, len(several))
    assert every / some < 2.3  # twice as much, and what sorting takes
