"""Tests of tables: what people have is read, what is damaged is refused, nothing is run."""

import pickle
import re
from pathlib import Path

import pytest

import tasks
from common import InputError
from conftest import Evil, write_task
from tables import header_line, read_table
from tasks import TASKS


JSON = '{"text": "good", "label": 1.0}\n\n{"text": null, "label": true}\n'


@pytest.mark.parametrize("name, content, header, rows", [
    ("a.csv", "label,text\n1,good\n0,bad\n", True, [["1", "good"], ["0", "bad"]]),
    ("a.CSV", "text;label\ngood, really;1\nbad;0\n", True, [["1", "good, really"], ["0", "bad"]]),
    ("a.csv", "\ntext|x| label\ngood|2|1\n\nbad|3\n", True, [["1", "good"], None, None]),
    ("a.csv", 'label, text\n1, "good, ""really"""\n', True, [["1", 'good, "really"']]),
    ("a.csv", '1,"good, ""really""\ngood"\n', False, [["1", 'good, "really"\ngood']]),
    ("a.csv", "1;good, really\n0;bad, not, good\n", False, [["1", "good, really"],
                                                          ["0", "bad, not, good"]]),
    ("a.tsv", 'label\ttext\n1\t"He said ""good""."\n', True, [["1", 'He said "good".']]),
    ("a.tsv", 'label\ttext\n1\t"good" film\n', True, [["1", '"good" film']]),
    ("a.tsv", 'label\ttext\n1\t"good\n0\tbad"\n', True, [["1", '"good'], ["0", 'bad"']]),
    ("a.tsv", 'label\ttext\n1\t"good\nfilm"\n0\tbad\n', True, [["1", "good\nfilm"], ["0", "bad"]]),
    ("a.tsv", "label,text\n1,good\n", True, [["1", "good"]]),
    ("a.json", JSON, True, [["1.0", "good"], None]),
    ("a.json", f"[{JSON.strip().replace(chr(10) * 2, ',')}]", True, [["1.0", "good"], None]),
    ("a.txt", "good\t\t1\nbad\t0", None, [["1", "good\t"], ["0", "bad"]]),
    ("a.csv", 'text;label\n"a; b\n\nc";0\nd|;1\n', True, [["0", "a; b\n\nc"], ["1", "d|"]]),
    ("a.csv", "label,text\n1," + "good " * 40_000, True, [["1", "good " * 40_000]]),
    ("a.csv", "label,text\n1,good, really\n", True, "line 2: 3 columns, not 2"),
    ("a.json", '{"label": 1, "text": NaN}\n{"label": 0, "text": "b"}', True, [None, ["0", "b"]]),
    ("a.csv", "label;text;id\n1;good;3\n", True, "columns label, text, id, and not all of label, "
     "my text"),
    ("a.json", JSON, True, "columns text, label, and not all of label, my text"),
    ("a.csv", 'label,text\n1,"a, b"\n0,"c, d"\n1,"good" film\n', True, "line 4: ',' expected"),
    ("a.csv", "text,label,text\na,1,b\n", True, "columns text, label, text, and not all of"),
    ("a.csv", 'label,text\n1,"sure\n0,no"\n', True, [["1", '"sure'], ["0", 'no"']]),
    ("a.csv", 'label,text\n1,"a\nb"\n0,"c, d"\n', True, [["1", "a\nb"], ["0", "c, d"]]),
    ("a.txt", "1\tgood\n", True, "a .txt is a text a line, no label"),
    ("a", "1", True, "give .csv, .tsv"), ("a.xlsx", "1", True, "give .csv, .tsv")])
def test_tables_as_people_have_them(tmp_path, name, content, header, rows):
    """Delimiters, spaces, quotes doubled as pandas does, quotes that are characters, no header,
    ragged and blank lines, JSON lines, an array of JSON, long texts: each value in its column. What
    could be misread is refused: a row that is too wide, a column that the first row lacks."""
    columns = ("label", "my text") if "my text" in rows else ("label", "text")
    (tmp_path / name).write_text(content)
    if isinstance(rows, str):
        with pytest.raises(InputError, match=f"{name}.*{rows}"):
            list(read_table(tmp_path / name, columns, header))
        return
    found = list(read_table(tmp_path / name, columns, header))
    assert [values for _, values in found] == rows
    assert found[0][0].startswith(f"{tmp_path / name}, line ")


@pytest.mark.parametrize("name, says", [
    ("a.csv", "columns id, my text, my-label; delimiter ';'"),
    ("b.csv", "b.csv has the columns text, label, and not all of"),
    ("a.json", "columns my-label, my text"),
    ("d.csv", "d.csv, line 1, is not utf-8: .* --encoding"), ("c.csv", "c.csv is missing"),
    ("a.txt", "give a .csv, .tsv, .jsonl or .json")])
def test_a_header_is_checked_without_a_row(tmp_path, name, says):
    """header_line() reads the first line: what follows may be of no encoding."""
    (tmp_path / "a.csv").write_bytes(b"id;my text;my-label\n\xff\xfe;1;2;3")
    (tmp_path / "b.csv").write_text("text,label\n1,good\n")
    (tmp_path / "d.csv").write_text("my-label,my text\n", encoding="utf-16")
    for other in ("a.json", "a.txt"):
        (tmp_path / other).write_text("")
    try:
        line = header_line(tmp_path / name, ("my-label", "my text"), True, "utf-8-sig")
    except InputError as error:
        line = str(error)
    assert re.search(says, line)


@pytest.mark.parametrize("name, content, says", [
    ("sst2", "", "no rows"), ("sst2", "sentence\tlabel\n", "no rows"),
    ("sst2", "text\tlabel\nok\t1\n", "line 1"),
    ("sst2", "sentence\tlabel\nok\t1\nok\t2\n", "line 3"),
    ("sst2", "sentence\tlabel\nok\t1\textra\n", "line 2"),
    ("sst2", "sentence\tlabel\n \t1\n", "line 2"),
    ("sst2", b"sentence\tlabel\ncaf\xe9\t1\n", "line 2: byte 0xe9 is not utf-8"),
    ("mr", '1,"never closed\n0,text\n', "line 2: unexpected end"),
    ("cb", '{"premise": null, "hypothesis": "h", "label": "neutral"}', "line 1"),
    ("cb", '{"premise": ["p"], "hypothesis": "h", "label": "neutral"}', "line 1"),
    ("cb", '{"premise": "\\ud800", "hypothesis": "h", "label": "neutral"}', "line 1"),
    ("cb", "[]", "line 1"), ("cb", "{", "line 1"), ("cb", '{"label": true}', "line 1")])
def test_bad_rows_are_refused_with_file_and_line(tmp_path, name, content, says):
    """A wrong header, label, number of columns or type, a blank text, another encoding, an open
    quote, which would swallow the rest of the file."""
    write_task(tmp_path, name, content)
    with pytest.raises(InputError, match=f"{Path(TASKS[name].train).name}.*{says}") as error:
        tasks.load_train(TASKS[name], tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [
    pickle.dumps(Evil()), pickle.dumps((["a", "b"], [0, Evil()])), pickle.dumps((["a"], [0, 1])),
    pickle.dumps((["a"], ["0"])), pickle.dumps((["a", "b"], [0, 1]))[:-4], b"", b"text\t1\n",
    pickle.dumps((["a", "b"], [0, 2])), b"\x80\x02r\xff\xff\xff\x7f.",
    b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"."])
def test_a_pickle_is_data_or_it_is_refused(tmp_path, monkeypatch, content):
    """Code in it, a wrong shape or label, damage, a claim of terabytes: one InputError, and nothing
    is run."""
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, "books", content)
    with pytest.raises(InputError, match="domain/books/train"):
        tasks.load_train(TASKS["books"], tmp_path)
    assert not Path("executed").exists()
