"""Tests of tables: what people have is read, what is damaged is refused, nothing is run."""

import pickle
import re
from pathlib import Path

import pytest

import tasks
from common import InputError
from conftest import Evil, write_task
from tables import read_table
from tasks import TASKS


JSON = '{"text": "good", "label": 1.0}\n\n{"text": null, "label": true}\n'
TWO = '1,"a\nb"\n0,"so ""so"""\n'
LONG, NOT_ALL = "good " * 40_000, "and not all of label, "


@pytest.mark.parametrize("name, content, header, rows, says", [
    ("a.csv", "label,text\r1,good\r0,bad\r", True, [["1", "good"], ["0", "bad"]], "2 rows in 3"),
    ("a.CSV", "text;label\nso, so;1\n", True, [["1", "so, so"]], "text, label; delimiter ';'$"),
    ("a.csv", "\ntext|x| label\ngood|2|1\n\nbad|3\n", True, [["1", "good"], None, None], "'|'"),
    ("a.csv", 'label, text\n1, "good, ""really"""\n', True, [["1", 'good, "really"']], "around"),
    ("a.csv", '1,"good, ""really""\ngood"\n', False, [["1", 'good, "really"\ngood']],
     "1 rows in 2 lines; columns label, text; delimiter ','; quotes around texts"),
    ("a.csv", "1;good, really\n0;bad, not, good\n", False, [["1", "good, really"],
                                                          ["0", "bad, not, good"]], "';'"),
    ("a.csv", "sep=;\nlabel;text\n1;good\n", True, [["1", "good"]], "';'"),
    ("a.tsv", 'label\ttext\n1\t"He said ""good""."\n', True, [["1", 'He said "good".']], "around"),
    ("a.csv", 'label,text\n1,"He said, \\"good\\"."\n', True, [["1", 'He said, "good".']], "backs"),
    ("a.TSV", 'label\ttext\n1\t"good" film\n', True, [["1", '"good" film']], "as characters"),
    ("a.tsv", 'label\ttext\n1\t"good\n0\tbad\n', True, [["1", '"good'], ["0", "bad"]], "as char"),
    ("a.tsv", 'label\ttext\n1\t"good\n0\tbad"\n1\ta "so so" film\n', True, None, "or as 3 rows"),
    ("a.csv", f'label,text\n{TWO}0,', True, [["1", "a\nb"], ["0", 'so "so"'], ["0", ""]], "around"),
    ("a.csv", f'label,text\n{TWO}end', True, [["1", "a\nb"], ["0", 'so "so"'], None], "around"),
    ("a.csv", f'label,text\n{TWO}0,a 5" one', True,
     [["1", "a\nb"], ["0", 'so "so"'], ["0", 'a 5" one']], "3 rows .*around"),
    ("a.csv", 'label,text\n1,"good"\n0,a "so so" film\n', True,
     [["1", "good"], ["0", 'a "so so" film']], "around"),
    ("a.csv", f'label,text\n{TWO}0,"a cut te', True, None, "line 5: unexpected end"),
    ("a.csv", f'label,text\n{TWO}0,"so" so\n', True, None, "line 5: ',' expected"),
    ("a.csv", 'label,text\n1,"a \\"b\\""\n0,C:\\new "d"\n1,"\\\\t ""e"""\n0,\\"f\\"', True,
     [["1", 'a "b"'], ["0", 'C:\\new "d"'], ["1", '\\t "e"'], ["0", '"f"']], "a backslash"),
    ("a.csv", 'label,text\n1,a \\" b "c"\n', True, [["1", 'a \\" b "c"']], "as characters"),
    ("a.csv", 'label,text\n1,"C:\\new\\"\n0,"d"', True, [["1", "C:\\new\\"], ["0", "d"]], "around"),
    ("a.csv", '"label" ,"text"\n"1" ,"a , b" \n', True, [["1", "a , b"]], "columns label, text;"),
    ("a.csv", "label,text,id\n1,good\n0,bad,1\n1\n", True, [["1", "good"], ["0", "bad"], None], ""),
    ("a.tsv", 'label\ttext\n1\t"good\nfilm"\n', True, [["1", "good\nfilm"]], "1 rows in 3 lines"),
    ("a.tsv", "label,text\n1,good\n", True, [["1", "good"]], "','"),
    ("a.json", JSON, True, [["1.0", "good"], None], "^$"),
    ("a.json", f"\n[{JSON.strip().replace(chr(10) * 2, ',')}]", True, [["1.0", "good"], None], ""),
    ("a.txt", "good\t\t1\nbad\t0", None, [["1", "good\t"], ["0", "bad"]], "^$"),
    ("a.csv", 'text;label\n"a; b;\n\nc";0\nd|;1\n', 1, [["0", "a; b;\n\nc"], ["1", "d|"]], "';'"),
    ("a.csv", f"label,text\n1,{LONG}", True, [["1", LONG]], "','"),
    ("a.csv", 'label,text\n1,"a\nb"\n0,"c, d"\n', True, [["1", "a\nb"], ["0", "c, d"]], "around"),
    ("a.json", '{"label": 1, "text": NaN}\n', True, [None], ""),
    ("a.csv", "label,text\n1,good, really\n", True, None, "line 2: 3 columns, not 2"),
    ("a.csv", "1;good, no\n0;bad, ok\n", False, None, "delimiter ',', or as 2 rows .* ';': write"),
    ("a.csv", 'label,text\n1,"sure\n0,no"\n', True, None, "as 1 rows .*, or as 2 rows in 3 lines"),
    ("a.csv", "label;text;id\n1;good;3\n", True, None, f"label, text, id, {NOT_ALL}my text"),
    ("a.json", JSON, True, None, f"columns text, label, {NOT_ALL}my text: [a-z ]*$"),
    ("a.json", '{"label": 1, "text": "a"}\n{"label": 0, "te\n', True, None, "line 2 is not an obj"),
    ("a.csv", 'label,text\n1,"a, b"\n0,"c, d"\n1,"good" film\n', True, None, "line 4: ','"),
    ("a.csv", "text,label,text\na,1,b\n", True, None, "the column text twice"),
    ("a.csv", "\n", True, None, "is empty"), ("a.csv", "", False, None, "is empty"),
    ("a.json", '[{"label": 1, "text": "a"}, [1, "a"]]', True, None, "line 2 .*'list' object"),
    ("a.json", '{"label": {"0": 1}, "text": {"0": "a"}}', True, None, "orient='records'"),
    ("a.csv", "a,b".encode("utf-16-le"), True, None, "line 1: byte 0x00 is not .*--encoding"),
    ("a.txt", "1\tgood\n", True, None, "a .txt is a text a line, no label"),
    ("a", "1", True, None, "give .csv, .tsv"), ("a.xlsx", "1", True, None, "give .csv, .tsv")])
def test_tables_as_people_have_them(tmp_path, name, content, header, rows, says):
    """Delimiters, spaces, quotes doubled, escaped or characters, no header, ragged and blank lines,
    JSON lines, an array of JSON, long texts: each value in its column, and how it was read is said.
    What could be misread is refused: two ways to read it, a wide row, a column that lacks."""
    columns, said = ("label", "my text") if "my text" in says else ("label", "text"), []
    (tmp_path / name).write_bytes(content if type(content) is bytes else content.encode())
    if rows is None:
        with pytest.raises(InputError, match=f"{name}.*{says}"):
            list(read_table(tmp_path / name, columns, header))
        return
    found = list(read_table(tmp_path / name, columns, header, say=said.append))
    assert [values for _, values in found] == rows and re.search(says, "".join(said))
    assert all(where.startswith(f"{tmp_path / name}, line ") for where, _ in found)


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
