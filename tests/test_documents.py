"""Tests of sentences.py and documents.py: how text is split, what parts a corpus's documents."""

import gzip
import lzma
import re
from collections import Counter

import numpy as np
import pytest

import documents as reader
from common import InputError
from conftest import tar_of
from documents import documents
from sentences import split_sentences


SENTENCES = """Mr. Fox met Dr. Hall and Mrs. Dean. | They sat. | St. Paul came. | He spoke.
Messrs. Smith and Co. were there. | Apples, pears, etc. were sold. | Apples, pears, etc. | The end.
He read Tolkien, i.e. J. R. R. Tolkien, with joy. | Then he slept. | See e.g. Plato. | He knew.
J. Smith left. | R. Jones stayed. | The U.S. Army won. | It was 1945. | He left. . . . | She stayed.
He lives in the U.S. | He likes it. | Pi is 3.14 or so. | It cost $5.50. | Ten came.
At 5 p.m. Tom left. | At 6 p.m. | He was back. | On Jan. 5 he came. | On Feb. 7 he left.
Ford Inc. sued Jones Ltd. over it. | They won. | See No. 5 and vol. 3, p. 12. | Read on.
"It rained." | We left. | "It rained," he said. | "Yes." | 'Go,' said I. | 'Now!' | He went.
“It rained.” | “So?” | “We left.” | (It rained.) | We left. | It rained (a lot). | We left.
Well... maybe not. | Well... | We left. | Well… | We left. | He was . . . not here.
eBay fell. iPhones rose. | 1. The first point. | 2. The second. | هل ذهب؟ | ذهب الولد. | نام.
Smith et al. proved it. | We use it. | He met Gen. Grant vs. Lee. | They fought.
He met Sra. García. | She left. | St. Paul came. | እንዴት ነህ። | ሰላም። | no stop at all
The end.1 | The next.[12, 13] | See p.5 The rest of 3.14 The sum. | It ended.† | ~~Gone.~~ | Yes.
I. Introduction. | II. Methods. | 3. Results. | IV. The end. | In Main St. | The end.
¿Qué pasa? | ¡Nada! | —Claro. | 1. Open the lid. | 2. Pour the water. | 3. Is it hot? | 4. Wait.
Parker et al. | Later work agreed. | Smith et al. (2004) did not.
I am 5. | You are 6. | Am 3. Mai kam er. | Er blieb bis 2014. | Dann ging er.
the cat sat . | the dog ran . | is dr . fox here ? | yes !
他走了。。。 | 她来了！ | 真的？ | 「行く。」と言った。 | 彼は来た。
वह गया। | वह आई। | 29 Nov 2021 . | 30 Nov 2021 . | 29 Nov 2021 . | B follows A. | Then comes C.
»Wie froh bin ich.« | Das hatte er am 1. Februar 1916 geschrieben. | „Mein 1. Hauptfach.“ | Gut.
« Vraiment ? » dit-il. | Oui ! | Let's go.Then return.""".split("\n")


@pytest.mark.parametrize("text", SENTENCES)
def test_sentences_are_split_where_a_reader_would(text):
    """Every row is cut exactly at its bars."""
    assert split_sentences(text.replace(" | ", " ")) == text.split(" | ")


def test_splitting_loses_no_text():
    """The sentences of random texts, joined, are the text but for white space; none is empty."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        text = "".join(rng.choice([*"aB. ?!\"'()…1\n\t“”", "Mr", "no", "\u3000é"], 60))
        sentences = split_sentences(text)
        assert " ".join(sentences) == " ".join(text.split())
        assert all(s == s.strip() != "" for s in sentences)

OPENWEBTEXT = tar_of({"x.xz": lzma.compress(tar_of({"1.txt": b"Six.\n\nSeven.", "2.txt": b"8."})),
                      "y.xz": lzma.compress(tar_of({"3.txt": "Nïne.".encode()}))})
LATIN = b"\xef\xbb\xbfcaf\xe9\n\nok \xef\xbf\xbd\n\n\xff\xfe\n\na\0\0"


@pytest.mark.parametrize("name, content, how, expected, mended", [
    ("a.txt", "\n\nIt rained.\nWe left.\n\n \nThe sun rose.\n\n", {},
     "It rained.|We left.||The sun rose.", 0),
    ("a.txt", "It sat.\nIt ran.\nhow it ran\n", {}, "It sat.|It ran.|how it ran", 0),
    ("a.txt", "The cat sat\nthere. It\nran.\n\nNo.\n", {}, "The cat sat there. It ran.||No.", 0),
    ("a.txt", "One. Two.\n\nThree.", {"shape": "lines"}, "One. Two.||Three.", 0),
    ("A.TXT.gz", gzip.compress(b"One.\n\nTwo."), {"shape": "files"}, "One.|Two.", 0),
    ("a.md", "# A\n\nOne two\nthree. Four.\n\n- one\n- two\n- three\n", {},
     "# A|One two three. Four.|- one|- two|- three", 0),
    ("a.jsonl", '\n{"text": "One.\\nTwo."}\n\n{"paragraphs": ["3.", "4."], "id": 7}', {},
     "One.|Two.||3.|4.", 0),
    ("a.jsonl", r'{"text": "Cat\nThey sat. We ran."}' + "\n"
     r'{"text": "It sat\nthere. We\nran.\n\nNo."}', {},
     "Cat|They sat. We ran.||It sat there. We ran.|No.", 0),
    ("A.JSONL.GZ", gzip.compress(b'{"text": "Five."}'), {"shape": "lines"}, "Five.", 0),
    ("a.json", '{"content": "One."}\n{"content": null}', {"field": "content"}, "One.||", 0),
    ("a.json", '{"text": null, "paragraphs": ["One."]}', {}, "One.", 0),
    ("a.tar", OPENWEBTEXT, {}, "Six.|Seven.||8.||Nïne.", 0),
    ("a.tar.xz", lzma.compress(tar_of({"a.txt": b"One.\n\nTwo.", "LICENSE": b"x"})), {},
     "One.|Two.", 0),
    ("a.txt", LATIN, {}, "caf\ufffd||ok \ufffd||\ufffd\ufffd||a\ufffd\ufffd", 3),
    ("a.jsonl", '{"text": "\\ud800 half"}', {}, "? half", 0)])
def test_documents_of_each_kind_literally(tmp_path, name, content, how, expected, mended):
    """What parts documents and paragraphs; broken bytes become U+FFFD, and are counted."""
    content, counts = content if isinstance(content, bytes) else content.encode(), Counter()
    (tmp_path / name).write_bytes(content)
    found = "||".join("|".join(x) for x in documents(tmp_path / name, counts, **how))
    assert (found, counts["broken UTF-8"]) == (expected, mended)
    assert counts["files of another kind, not read"] == (name == "a.tar.xz")


def test_a_packed_text_is_read_as_it_is_unpacked(tmp_path):
    """Whether lines are wrapped is judged by the same part of a text: here by 64 KiB."""
    text = b"It is so.\n" * 1000 + b"It goes\non. And\non it\n" * 3000
    for name, content in (("a.txt", text), ("a.txt.gz", gzip.compress(text)),
                          ("a.tar", tar_of({"a.txt": text}))):
        (tmp_path / name).write_bytes(content)
        (paragraphs,) = documents(tmp_path / name)
        assert len(paragraphs) == 1


def test_a_folder_gives_its_corpus_files_in_order(tmp_path):
    """What is about them is left out, and printed; alone it is text."""
    for name in ("b.TXT", "a.json.gz", "c/d.tar", "README.md", "settings.json", "notes.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    files = reader.corpus_files([tmp_path])
    assert files == [tmp_path / name for name in ("a.json.gz", "b.TXT", "c/d.tar")]
    assert reader.unread_files([tmp_path], files) == ["README.md", "notes.csv", "settings.json"]
    assert reader.corpus_files([tmp_path / "README.md"]) == [tmp_path / "README.md"]
    for wrong, what in (("notes.csv", "no text found"), ("nowhere", "is missing")):
        with pytest.raises(InputError, match=f"{wrong}: {what}"):
            reader.corpus_files([tmp_path / wrong])


def test_no_document_is_held_beyond_a_limit(tmp_path, monkeypatch):
    """Of 16 MiB: a longer text comes in parts, which are counted; a JSON line is refused."""
    (tmp_path / "a.txt").write_bytes(b"a" * (2 ** 24 + 1))
    assert [len(text) for text, in documents(tmp_path / "a.txt")] == [2 ** 24, 1]
    monkeypatch.setattr(reader, "LONGEST", 8)
    (tmp_path / "a.txt").write_text("1234\n5678\n90\n\nabcdefghijkl\n\nok")
    (tmp_path / "b.tar").write_bytes(tar_of({"b.txt": b"0123456789abcdefgh"}))
    (tmp_path / "c.jsonl").write_text('{"text": ""}')
    counts = Counter()
    found = [text for name in ("a.txt", "b.tar") for text in documents(tmp_path / name, counts)]
    assert found == [["1234", "5678"], ["90"], ["abcdefgh"], ["ijkl"], ["ok"], ["01234567"],
                     ["89abcdef"], ["gh"]]
    assert counts["long documents parted"] == 1 + 1 + 2 and counts["bytes"] == 42
    with pytest.raises(InputError, match="c.jsonl, line 1 is not a document .8 bytes or more"):
        list(documents(tmp_path / "c.jsonl"))


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl", b'{"text": "ok"}\n{"text": ', "a.jsonl, line 2 is not a document"),
    ("a.json", b'{"body": "ok"}', "(no paragraphs or text; choose --field of body)"),
    ("a.jsonl", b'{"paragraphs": 1}', "line 1 is not a document (paragraphs or text must be"),
    ("a.txt", "not UTF-8".encode("utf-16"), "a.txt is not readable text (UTF-16"),
    ("a.json", b'[{"text": "a"}]', "line 1 is not a document (not an object; give one a line"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "ok"}' * 99)[:-9], "a.jsonl.gz is not readable text"),
    ("a.tar", b"not a tar", "a.tar is not readable text"),
    ("a.tar", tar_of({"b.jsonl": b'{"text": "ok"}'}), "no .txt inside"),
    ("a.tar", tar_of({"b.xz": lzma.compress(b"x" * 999)[:-9]}), "a.tar, b.xz is not a tar of text"),
    ("a.tar", tar_of({"b.txt": b"a" * 9999})[:6000], "a.tar is not readable text"),
    ("a.tar", tar_of({"b.txt": b"a", "c.txt": b"a"}).replace(b"c.t", b"d.t"), "(bad checksum)"),
])
def test_bad_corpus_files_are_refused_with_file_and_reason(tmp_path, name, content, says):
    """File and line are named; a damaged archive is never a shorter corpus."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(says)):
        list(documents(tmp_path / name))
