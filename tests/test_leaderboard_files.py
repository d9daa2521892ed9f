"""What the leaderboard writes is whole and its own, and `check` finds what is not.

Claims of `poisonbench.leaderboard.tables` tested here:

- `check` finds an edited, a missing and a left-over table, and writes nothing;
- only what stands between the markers of a page is replaced, by tables of the tracks' own fractions; a
  page without them is refused;
- a record that is not valid is refused, and none at all makes a page;
- links lead to files that are there;
- rows with other clean victims than most of their table are named below it;
- tables of an earlier version of the rules are made again in a folder of their own.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from test_leaderboard import FREE, controls, csvs, make, page, put, rows, tables

from poisonbench.errors import UserError
from poisonbench.statistics import RULES
from poisonbench.tracks import TRACKS

MARKED = "# Title\n\nbefore\n<!-- leaderboard: begin -->\nold\n<!-- leaderboard: end -->\nafter\n"


def test_check_finds_what_is_out_of_date(tmp_path: Path) -> None:
    results, readme = (
        put(tmp_path / "results", make("mgd"), make("mgd", custom=["seeds"])),
        tmp_path / "R.md",
    )
    readme.write_bytes(MARKED.encode())
    wanted = [results / path for path in tables.build(results)] + [readme]
    assert sorted(tables.update(results, readme, check=True)) == sorted(wanted)
    assert not (results / "README.md").exists()
    assert readme.read_text("utf-8") == MARKED

    assert sorted(tables.update(results, readme)) == sorted(wanted)
    assert tables.update(results, readme, check=True) == tables.update(results, readme) == []

    for path in wanted:
        good = path.read_bytes()
        path.write_bytes(good.replace(b"mgd", b"mdg", 1) if b"mgd" in good else good + b" ")
        assert tables.update(results, readme, check=True) == [path]
        assert tables.update(results, readme) == [path]
        assert path.read_bytes() == good

    stale = results / "tables" / "gone.csv"
    stale.write_text("rank\n")
    assert tables.update(results, readme, check=True) == [stale]
    assert stale.exists()
    assert tables.update(results, readme) == [stale]
    assert not stale.exists()

    other = make("other", budget=make().budget.model_copy(update={"fraction": 0.1}))
    assert readme not in tables.update(put(results, other), readme)
    assert "other" in (results / "README.md").read_text("utf-8")

    put(results, make("new"))
    changed = tables.update(results, readme, check=True)
    assert {path.name for path in changed} >= {"README.md", "R.md"}


def test_only_the_marked_part_of_a_page_is_replaced(tmp_path: Path) -> None:
    results = put(
        tmp_path / "docs" / "results", make("mgd"), make("own", custom=["seeds"]), *controls(FREE)
    )
    readme = tmp_path / "README.md"
    readme.write_bytes(MARKED.replace("\n", "\r\n").encode())
    tables.update(results, readme)
    text = readme.read_bytes().decode()
    before, rest = text.split("<!-- leaderboard: begin -->")
    inside, after = rest.split("<!-- leaderboard: end -->")
    assert (before, after) == ("# Title\r\n\r\nbefore\r\n", "\r\nafter\r\n")
    assert [len(rows(table)) for table in inside.split("**digits")] == [0, 1, 4]
    assert "own" not in inside
    assert "old" not in inside
    assert "](docs/results/digits/mgd/none/run-0/record.json)" in inside
    assert "Controls missing: none, noise, " in inside


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        "<!-- leaderboard: begin -->",
        "<!-- leaderboard: end -->",
        "<!-- leaderboard: end --><!-- leaderboard: begin -->",
        MARKED + MARKED,
        MARKED + "<!-- leaderboard: end -->",
        MARKED + "<!-- leaderboard: begin -->",
        "<!-- leaderboard: end -->" + MARKED,
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_a_page_without_its_markers_is_refused(tmp_path: Path, text: str, check: bool) -> None:
    results = put(tmp_path / "results", make("mgd"))
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(UserError, match=r"^[^\n]*README\.md must hold the lines[^\n]*$"):
        tables.update(results, tmp_path / "README.md", check)
    assert not (results / "README.md").exists()
    with pytest.raises(UserError, match="cannot read"):
        tables.update(results, tmp_path / "none.md", check)


def test_a_record_that_is_not_valid_is_refused(tmp_path: Path) -> None:
    results = put(tmp_path, make("mgd"))
    (results / "digits" / "record.json").write_text("{}")
    with pytest.raises(UserError, match="is not a valid record"):
        tables.update(results, None, check=True)


def test_no_records(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert csvs(tmp_path) == {}
    assert text.count("No records yet.") == len(TRACKS)
    assert all(track.summary.replace("~", r"\~") in text for track in TRACKS.values())


def test_links_lead_to_files(tmp_path: Path) -> None:
    results = put(tmp_path / "my results", make("mgd"), make("odd", custom=["x"]), *controls(FREE))
    odd = results / "digits" / "odd" / "none" / "run-0"
    odd.rename(odd.with_name("run (0) #1"))
    (odd.with_name("run (0) #1") / "summary.png").write_bytes(b"")
    readme = tmp_path / "README.md"
    readme.write_text(MARKED)
    tables.update(results, readme)
    for source in (results / "README.md", readme):
        pages = MarkdownIt("commonmark").enable("table").render(source.read_text("utf-8"))
        links = [html.unescape(link) for link in re.findall('<a href="(.*?)"', pages)]
        assert links
        for link in links:
            assert (source.parent / unquote(link)).is_file(), link


def test_tables_of_an_earlier_rule_are_made_again(tmp_path: Path) -> None:
    some = (make("a", 10.0, 4.0), make("b", 9.0, 4.0))  # in step, seed by seed: their intervals overlap
    results = put(tmp_path / "results", *some)
    tables.update(results)
    assert [row[:2] for row in rows(page(results))] == [["1", "a"], ["2", "b"]]
    for version in RULES:
        to = tmp_path / f"rules-{version}"
        tables.of_earlier_rules(results, version, to)
        shown = (to / "README.md").read_text("utf-8")
        assert [row[0] for row in rows(shown)] == (["1=", "1="] if version == 1 else ["1", "2"])
        assert " ".join(RULES[version].statement.split()) in " ".join(shown.split())
    assert tables.update(results, check=True) == []
    with pytest.raises(UserError, match="not empty"):
        tables.of_earlier_rules(results, 1, tmp_path / "rules-1")
    with pytest.raises(UserError, match="the versions are 1, 2"):
        tables.of_earlier_rules(results, 4, tmp_path / "rules-4")


def test_rows_with_other_clean_victims_than_most_are_named_below_their_table(tmp_path: Path) -> None:
    other = make("mgd", 5.0)
    rounded = [
        victim.model_copy(update={"clean": [c - 0.1 for c in victim.clean]}) for victim in other.victims
    ]
    put(tmp_path, make("none", 0.0, 0.0), make("noise", 1.0))
    assert "Processors round" not in page(tmp_path)
    put(tmp_path, other.model_copy(update={"victims": rounded}))
    (told,) = re.findall(r"Processors round[^.]*\.", page(tmp_path))
    assert told.endswith("are mgd.")
