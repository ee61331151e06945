"""Tests of hub and download: against servers on this machine."""

import io
import json
import re
import shutil
import socket
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

import download as downloads
import hub as hubs
from common import InputError
from conftest import ANY, COMMIT, FORMATS, V10, V11, contents, save_model, save_shards, tar_of
from t5 import load_t5
from tasks import Row, TASKS, load_test, load_train


def zip_of(members):
    """A zip {name: bytes}, as bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def test_missing_tasks_are_fetched_once(hub):
    """Out of a tar (GLUE-SST-2 is another set), a zip, the second address, or as a file."""
    hub.files = {
        "/datasets.tar": tar_of({"original/GLUE-SST-2/dev.tsv": b"other", "original/mr/a": b"",
                                 "original/trec/test.csv": b"1,x\n",
                                 "original/SST-2/dev.tsv": b"sentence\tlabel\nok\t1\n"}),
        "/CB.zip": zip_of({"CB/val.jsonl": FORMATS["cb"][0].encode(), "_/CB/._val.jsonl": b"?"}),
        "/QQP-clean.zip": zip_of({"QQP-clean/dev.tsv": FORMATS["qqp"][0]}),
        "/test": FORMATS["kitchen"][0]}
    for _ in range(2):
        assert load_test(TASKS["sst2"], "none") == [Row(1, {"text": "ok"})]
        assert load_test(TASKS["trec"], "none") == [Row(1, {"text": "x"})]
        for name in ("cb", "qqp", "kitchen"):
            assert load_test(TASKS[name], "none") == [Row(*row) for row in FORMATS[name][1]]
    assert hub.asked == ["/datasets.tar", "/CB.zip", "/QQP-clean.zip", "/test"]


def test_what_cannot_be_used_leaves_no_file(hub):
    """Lacking, of another checksum, cut short, or from a server that says nothing."""
    for name in ("dvd", "mr"):
        with pytest.raises(InputError, match=f"{TASKS[name].test} is not in none.*--data FOLDER.*"
                                             "127.0.0.1.*404"):
            load_test(TASKS[name], "none")
    hub.files = {"/CB.zip": zip_of({"CB/val.jsonl": b"x"}), "/test": b"x" * 20}
    for name, says in (("cb", "another checksum"), ("kitchen", "20 of 20 bytes, sha256")):
        wrong = TASKS[name]._replace(sha256=("", "0" * 32))
        with pytest.raises(InputError, match=says):
            load_test(wrong, "none")
        assert not (downloads.FETCHED / wrong.test).exists()
    hub.cut = 9
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port, says in ((hub.server_port, "9 of 20 bytes"),
                           (silent.getsockname()[1], "timed out")):
            with pytest.raises(InputError, match=f"/test is not a file .*{says}.*the network"):
                downloads.download(f"http://127.0.0.1:{port}/test", Path("in/test"), timeout=0.3)
    assert not list(Path("in").iterdir())


@pytest.mark.parametrize("name, content, says", [
    ("CB.zip", zip_of({"../CB/val.jsonl": b"x"}), "leads outside"),
    ("CB.zip", zip_of({"CB/val.jsonl": b"x", "/etc/passwd": b"x"}), "leads outside"),
    ("CB.zip", zip_of({"WiC/val.jsonl": b"x"}), "archive with CB/val.jsonl"),
    ("datasets.tar", tar_of({"original/../../CB/val.jsonl": b"x"}), "leads outside"),
    ("datasets.tar", tar_of({"CB/val.jsonl": b"x" * 9999})[:2000], "unexpected end")])
def test_archives_that_cannot_be_trusted(tmp_path, name, content, says):
    """Truncated, with ../ in it, without the task."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is not.*{says}"):
        downloads.archive_member(tmp_path / name, "superglue/CB/val.jsonl")


def test_a_member_is_bounded(tmp_path, monkeypatch):
    """A small zip whose member is large is refused, and not read whole."""
    (tmp_path / "a.zip").write_bytes(zip_of({"CB/val.jsonl": b"x" * 1000}))
    asked, read = [], zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda *a: asked.append(a[1:]) or read(*a))
    assert downloads.archive_member(tmp_path / "a.zip", "CB/val.jsonl", 1000) == b"x" * 1000
    with pytest.raises(InputError, match="too large"):
        downloads.archive_member(tmp_path / "a.zip", "CB/val.jsonl", 999)
    assert asked == [(1001,), (1000,)]


# Lines as the hub has them, with their real fields, and their rows. Its subj counts the other way.
LINES = {"sst2": ({"text": "ok", "label": 1, "label_text": "positive"}, 1, "ok"),
         "sst5": ({"text": "ok", "label": 3, "label_text": "good"}, 3, "ok"),
         "cr": ({"text": "ok", "label": 0, "label_text": "negative"}, 0, "ok"),
         "subj": ({"text": "ok", "label": 0, "label_text": "objective"}, 1, "ok"),
         "trec": ({"text": "?", "label": 4, "label_coarse_original": "LOC"}, 4, "?"),
         "rte": ({"text1": "It is.", "text2": "It was.", "label": 1, "idx": 0}, 1, "It was",
                 "It is."),
         "qnli": ({"text1": "Who?", "text2": "He.", "label": 0, "idx": 0}, 0, "He.", "Who?"),
         "mrpc": ({"text1": "a", "text2": "b", "label": 1, "idx": 0}, 1, "a", "b"),
         "qqp": ({"text1": "a?", "text2": "b?", "label": 0, "idx": 0}, 0, "a?", "b?")}


def test_the_hubs_form_of_a_task_is_the_same_rows(hub, monkeypatch):
    """Fetched where the first source fails, both files of one form; then read offline."""
    assert set(LINES) == {name for name, task in TASKS.items() if task.hub}
    assert dict(zip(TASKS["trec"].hub[3], TASKS["trec"].words)) == {
        "DESC": "description", "ENTY": "entity", "ABBR": "expression", "HUM": "human",
        "LOC": "location", "NUM": "number"}
    for name, (line, label, *texts) in LINES.items():
        task = TASKS[name]._replace(urls=("http://127.0.0.1:1/a.tar",))
        repository, split, *_ = task.hub
        with pytest.raises(InputError, match=f"{task.train} is not in none.*jsonl is not in none"):
            downloads.find_task(task, "none")
        files = {f"{file}.jsonl": json.dumps(line).encode() for file in ("train", split)}
        hub.repos[f"datasets/{repository}"] = {"main": (COMMIT, files)}
        for offline in (False, True):
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
            form = downloads.find_task(task, "none")
            assert form.train == f"{repository}/train.jsonl" and form.words == task.words
            for load in (load_train, load_test):
                row, = load(form, "none")
                assert [row.label, *row.fields.values()] == [label, *texts]
            shutil.rmtree("cache")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def test_only_the_needed_files_are_fetched(tmp_path, hub, monkeypatch):
    """Of a repository that has all twice; a second time, or offline, nothing is asked for."""
    files = contents(save_model(save_shards(tmp_path / "both", V11), V11))
    junk = dict.fromkeys(("pytorch_model.bin", "tf_model.h5", "spiece.model", "README.md"), b"junk")
    hub.repos[ANY] = {"main": (COMMIT, files | junk | {"tokenizer.json": b"{}"})}
    listed, = hubs.fetch_list(ANY)
    assert f"of {ANY} at {COMMIT}, not pinned: " in listed
    assert listed.endswith(": config.json, model.safetensors, tokenizer.json")
    fetched = hubs.model_folder(ANY)
    assert {file for method, file in hub.asked if method == "GET"} == {
        "config.json", "model.safetensors", "tokenizer.json"}
    assert hubs.tokenizer_file(fetched) == fetched / "tokenizer.json"
    hub.asked.clear()
    assert hubs.model_folder(f"{ANY}@{COMMIT}") == fetched and not hub.asked
    assert hubs.fetch_list(f"{ANY}@{COMMIT}")[0].startswith(f"download: 0 MB of {ANY} at {COMMIT}:")
    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hubs.model_folder(ANY) == fetched and load_t5(fetched).config == V11
    assert hubs.fetch_list(ANY) == [
        f"download: the hub does not answer for {ANY}: its cache must have it"]
    with pytest.raises(InputError, match="x/no was not fetched .LocalEntryNotFoundError"):
        hubs.model_folder("x/no")
    assert not hub.asked


def test_shards_and_tokenizers_of_others(tmp_path, hub):
    """In place of a single file; a model with the official vocabulary takes t5-base's
    tokenizer."""
    files = contents(save_shards(tmp_path / "m", V10))
    hub.repos[ANY] = {"main": (COMMIT, files)}
    hub.repos["google-t5/t5-base"] = {
        hubs.MODELS["t5-base"].split("@")[1]: ("d" * 40, {"tokenizer.json": b'"base"'})}
    fetched = hubs.model_folder(ANY)
    assert load_t5(fetched).config == V10
    with pytest.raises(InputError, match="tokenizer.json is missing: put the model's"):
        hubs.tokenizer_file(fetched)
    save_model(tmp_path / "m", V10, vocab_size=hubs.OFFICIAL_ROWS)
    assert hubs.tokenizer_file(tmp_path / "m").read_bytes() == b'"base"'


def test_short_names_are_hub_ids_with_their_commit():
    """What others cite is pinned to a whole commit; OWNER/NAME@REVISION is taken as it is."""
    assert hubs.hub_source("t5-base") == {
        "repo_id": "google-t5/t5-base", "revision": "a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1"}
    assert hubs.hub_source("me/mine@v2") == {"repo_id": "me/mine", "revision": "v2"}
    for name in hubs.MODELS:
        revision = hubs.hub_source(name).get("revision", "")
        assert re.fullmatch("[0-9a-f]{40}", revision) or "v1_1" in name or "lm-adapt" in name
    with pytest.raises(InputError, match="no model 't5-huge': give tiny, t5-small, t5-base"):
        hubs.model_folder("t5-huge")


def test_what_cannot_be_fetched_says_what_to_do(tmp_path, hub, monkeypatch):
    """And leaves no file that looks whole; a pull request, and the next try, have the model."""
    files = contents(save_model(tmp_path / "m", V11))
    hub.repos[ANY] = {"main": (COMMIT, {"config.json": files["config.json"], "x.bin": b""}),
                      "refs/pr/7": ("7" * 40, files)}
    for name, says in (
            ("x/none", "x/none was not fetched .RepositoryNotFound.*check name, revision and netw"),
            ("too/many/parts", "was not fetched .HFValidationError: Repo id must.*--model"),
            (f"{ANY}@v9", "not fetched .RevisionNotFound.*--model"),
            (ANY, f"{ANY} has no model.safetensors.*@refs/pr/1.*convert it: python -c")):
        with pytest.raises(InputError, match=says):
            hubs.model_folder(name)
    hub.cut = 10_000                    # bytes, after which the line goes dead
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    with pytest.raises(InputError, match="x/model was not fetched"):
        hubs.model_folder(f"{ANY}@refs/pr/7")
    assert not list((tmp_path / "hub").rglob("snapshots/*/model.safetensors"))
    hub.cut = None
    assert load_t5(hubs.model_folder(f"{ANY}@refs/pr/7")).config == V11


def test_a_corpus_is_fetched_as_far_as_it_is_wanted(monkeypatch):
    """As many of its files as hold the bytes; OpenWebText's of the commit that has tars."""
    monkeypatch.setattr(hubs, "hf_hub_download", lambda filename, revision="main", **source:
                        f"{revision[:4]}/{filename}")
    for name, size, count, last in (
            ("openwebtext", 10 ** 10, 6, "f380/subsets/urlsf_subset05.tar"),
            ("openwebtext", 10 ** 12, 21, "f380/subsets/urlsf_subset20.tar"),
            ("c4", 10 ** 9, 2, "main/en/c4-train.00001-of-01024.json.gz")):
        paths = hubs.corpus_paths(SimpleNamespace(corpus=(name,), bytes=size))
        assert (len(paths), str(paths[-1])) == (count, last)
