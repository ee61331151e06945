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
LONG = "good " * 40_000


@pytest.mark.parametrize("name, content, header, rows, says", [
    ("a.csv", "label,text\r1,good\r0,bad\r", True, [["1", "good"], ["0", "bad"]], "2 rows in 3"),
    ("a.csv", "\ntext|x| label\ngood|2|1\n\nbad|3\n", True, [["1", "good"], None, None], "'|'"),
    ("a.csv", '1,"good, ""really""\ngood"\n', False, [["1", 'good, "really"\ngood']],
     "1 rows in 2 lines; columns label, text; delimiter ','; quotes around texts"),
    ("a.csv", "1;good, really\n0;bad, not, good\n", False, [["1", "good, really"],
                                                          ["0", "bad, not, good"]], "';'"),
    ("a.csv", "sep=;\nlabel;text\n1;good\n", True, [["1", "good"]], "';'"),
    ("a.TSV", 'label\ttext\n1\t"good" film\n', True, [["1", '"good" film']], "as characters"),
    ("a.tsv", 'label\ttext\n1\t"good\n0\tbad\n', True, [["1", '"good'], ["0", "bad"]], "as char"),
    ("a.tsv", 'label\ttext\n1\t"good\n0\tbad"\n1\ta "so so" film\n', True, None, "or as 3 rows"),
    ("a.csv", f'label,text\n{TWO}0,a 5" one', True,
     [["1", "a\nb"], ["0", 'so "so"'], ["0", 'a 5" one']], "3 rows .*around"),
    ("a.csv", f'label,text\n{TWO}0,"a cut te', True, None, "line 5: unexpected end"),
    ("a.csv", 'label,text\n1,"a \\"b\\""\n0,C:\\new "d"\n1,"\\\\t ""e"""\n0,\\"f\\"', True,
     [["1", 'a "b"'], ["0", 'C:\\new "d"'], ["1", '\\t "e"'], ["0", '"f"']], "a backslash"),
    ("a.csv", 'label,text\n1,a \\" b "c"\n', True, [["1", 'a \\" b "c"']], "as characters"),
    ("a.csv", '"label" ,"text"\n"1" ,"a , b" \n', True, [["1", "a , b"]], "columns label, text;"),
    ("a.csv", "label,text,id\n1,good\n0,bad,1\n1\n", True, [["1", "good"], ["0", "bad"], None], ""),
    ("a.json", JSON, True, [["1.0", "good"], None], "^$"),
    ("a.json", f"\n[{JSON.strip().replace(chr(10) * 2, ',')}]", True, [["1.0", "good"], None], ""),
    ("a.txt", "good\t\t1\nbad\t0", None, [["1", "good\t"], ["0", "bad"]], "^$"),
    ("a.csv", f"label,text\n1,{LONG}", True, [["1", LONG]], "','"),
    ("a.json", '{"label": 1, "text": NaN}\n', True, [None], ""),
    ("a.csv", "label,text\n1,good, really\n", True, None, "line 2: 3 columns, not 2"),
    ("a.csv", "1;good, no\n0;bad, ok\n", False, None, "delimiter ',', or as 2 rows .* ';': write"),
    ("a.json", JSON, True, None, "columns text, label, and not all of label, my text: "),
    ("a.json", '{"label": 1, "text": "a"}\n{"label": 0, "te\n', True, None, "line 2 is not an obj"),
    ("a.csv", "text,label,text\na,1,b\n", True, None, "the column text twice"),
    ("a.csv", "\n", True, None, "is empty"), ("a.csv", "", False, None, "is empty"),
    ("a.json", '[{"label": 1, "text": "a"}, [1, "a"]]', True, None, "line 2 .*'list' object"),
    ("a.json", '{"label": {"0": 1}, "text": {"0": "a"}}', True, [None], "^$"),
    ("a.csv", "a,b".encode("utf-16-le"), True, None, "line 1: byte 0x00 is not .*--encoding"),
    ("a.txt", "1\tgood\n", True, None, "give .csv, .tsv, .jsonl, .json$"),
    ("a", "1", True, None, "give .csv, .tsv"), ("a.xlsx", "1", True, None, "give .csv, .tsv")])
def test_tables_as_people_have_them(tmp_path, name, content, header, rows, says):
    """Each value is in its column, and how it was read is said; what is ambiguous is refused."""
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
    ("cb", '{"premise": ["p"], "hypothesis": "h", "label": "neutral"}', "line 1"),
    ("cb", '{"premise": "\\ud800", "hypothesis": "h", "label": "neutral"}', "line 1"),
    ("cb", "[]", "line 1"), ("cb", "{", "line 1"), ("cb", '{"label": true}', "line 1"),
    ("books", pickle.dumps(Evil()), "code that is not run"),
    ("books", pickle.dumps((["a", "b"], [0, Evil()])), "code that is not run"),
    ("books", pickle.dumps((["a"], [0, 1])), "not a whole table"),
    ("books", pickle.dumps((["a"], ["0"])), "label 1 is no integer"),
    ("books", pickle.dumps((["a", "b"], [0, 2])), "line 2"),
    ("books", b"\x80\x02r\xff\xff\xff\x7f.", "it has no 2,147,483,647 values"),
    ("books", b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "not a whole table")])
def test_bad_rows_are_refused_with_file_and_line(tmp_path, monkeypatch, name, content, says):
    """Released sets are read strictly; a pickle that has code, which is not run, is refused."""
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, name, content)
    with pytest.raises(InputError, match=f"{Path(TASKS[name].train).name}.*{says}"):
        tasks.load_train(TASKS[name], tmp_path)
    assert not Path("executed").exists()
