"""`python -m tests.long`: parts pass, fail, are stopped or cannot be run, and the table keeps what is not asked for."""

import sys

import pytest

from tests import long


def part(code, **more):
    return long.Part("a part", lambda: [(sys.executable, "-S", "-c", one) for one in code], **more)


@pytest.fixture
def parts(monkeypatch, tmp_path):
    made = {
        "good": part(["print('first')", "print('a | b')"]),
        "bad": part(["print('before'); raise SystemExit(3)", "print('never')"]),
        "slow": part(["import time; time.sleep(60)"]),
        "absent": part(["print('never')"], lacks=lambda: "its package is not there"),
        "unasked": part(["print('never')"]),
    }
    monkeypatch.setattr(long, "PARTS", made)
    monkeypatch.setattr(long, "LOGS", tmp_path / "logs")
    return made


def called(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["long", *map(str, words)])
    return long.main()


def test_every_part_has_its_line_and_lines_stay(parts, monkeypatch, tmp_path, capsys):
    table = tmp_path / "long.md"
    assert called(monkeypatch, "good", "bad", "slow", "absent", "--limit", "2", "--table", table) == 1
    rows = long.read(table.read_text(encoding="utf-8"))
    assert list(rows) == list(parts)
    assert [row.result for row in rows.values()] == [
        "passed", "failed (exit code 3)", "not run to its end: stopped after 2 s", "not run", "not run",
    ]  # fmt: skip
    assert [row.words for row in rows.values()] == [
        "a / b",
        "before",
        "",
        "its package is not there",
        "never asked for",
    ]
    assert "good: passed" in capsys.readouterr().out
    assert called(monkeypatch, "unasked", "--table", table) == 0
    again = long.read(table.read_text(encoding="utf-8"))
    assert again["unasked"].result == "passed"
    assert [again[name] for name in parts if name != "unasked"] == [rows[name] for name in parts if name != "unasked"]
    with pytest.raises(SystemExit):
        called(monkeypatch, "another", "--table", table)


def test_the_committed_table_has_every_part_and_tutorials_have_studies():
    held = long.read(long.TABLE.read_text(encoding="utf-8"))
    assert list(held) == list(long.PARTS)
    assert all(row.does == long.PARTS[name].does for name, row in held.items())
    from tsdyn import studies

    assert long.tutorial_studies()
    assert set(long.tutorial_studies()) <= set(studies.names())
