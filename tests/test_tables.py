"""Tests of tables: what people have is read, what is damaged is refused, nothing is run."""

import pickle
from pathlib import Path

import pytest

import tasks
from common import InputError
from conftest import Evil, write_task
from tables import read_table
from tasks import TASKS


@pytest.mark.parametrize("name, content, rows", [
    ("a.csv", "label,text\n1,good\n0,bad\n", [["1", "good"], ["0", "bad"]]),
    ("a.CSV", "text;label\ngood, really;1\nbad;0\n", [["1", "good, really"], ["0", "bad"]]),
    ("a.csv", "text|x|label\ngood|2|1\n\nbad|3\n", [["1", "good"], None, None]),
    ("a.csv", '1,"good, ""really""\ngood"\n', [["1", 'good, "really"\ngood']]),
    ("a.csv", "1;good, really\n0;bad\n", [["1", "good, really"], ["0", "bad"]]),
    ("a.tsv", 'label\ttext\n1\t"He said ""good""."\n', [["1", 'He said "good".']]),
    ("a.tsv", 'label\ttext\n1\t"good" film\n', [["1", '"good" film']]),
    ("a.json", '{"text": "good", "label": 1.0}\n\n{"text": null, "label": true}\n',
     [["1.0", "good"], None]),
    ("a.txt", "good\t\t1\nbad\t0", [["1", "good\t"], ["0", "bad"]]),
    ("a.csv", "label,text\n1," + "good " * 40_000, [["1", "good " * 40_000]])])
def test_tables_as_people_have_them(tmp_path, name, content, rows):
    """Delimiters, quotes doubled as pandas does, quotes that are characters, no header, ragged and
    blank lines, JSON lines, long texts: each value in its column."""
    (tmp_path / name).write_text(content)
    found = list(read_table(tmp_path / name, ("label", "text"), "either"))
    assert [values for _, values in found] == rows
    assert found[0][0].startswith(f"{tmp_path / name}, line ")


def test_a_headers_columns_are_named(tmp_path):
    """"yes": a header without the columns is refused, and they are listed; "no": it is a row."""
    path = tmp_path / "a.csv"
    path.write_text("label,text\n1,good\n")
    assert [values for _, values in read_table(path, ("label", "text"), "no")] == [
        ["label", "text"], ["1", "good"]]
    with pytest.raises(InputError, match="has the columns label, text, and not all of label, body"):
        list(read_table(path, ("label", "body"), "yes"))
    with pytest.raises(InputError, match="a.xlsx: give .csv, .tsv"):
        list(read_table(tmp_path / "a.xlsx", ("label",)))


@pytest.mark.parametrize("name, content, says", [
    ("sst2", "", "no rows"), ("sst2", "sentence\tlabel\n", "no rows"),
    ("sst2", "text\tlabel\nok\t1\n", "line 1"),
    ("sst2", "sentence\tlabel\nok\t1\nok\t2\n", "line 3"),
    ("sst2", "sentence\tlabel\nok\t1\textra\n", "line 2"),
    ("sst2", "sentence\tlabel\n \t1\n", "line 2"),
    ("sst2", b"sentence\tlabel\ncaf\xe9\t1\n", "line 2: byte 0xe9 is not utf-8"),
    ("mr", '1,"never closed\n0,text\n', "is not a well quoted table"),
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
