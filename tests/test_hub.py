"""Tests of hub."""

import common
import data
import eval as evaluation
import hashlib
import hub as hubs
import huggingface_hub
import json
import numpy as np
import os
import pytest
import re
import runpy
import subprocess
import sys
import t5 as T
import tasks
from common import InputError
from data import VARIANTS
from pathlib import Path
from t5 import load_t5
from tasks import TASKS, load_test
from conftest import (ANY, COMMIT, FORMATS, HERE, README, REFILL, SMALL, V10, V11, ended, forked, hub_files,
    refilled, save_model, save_shards, tar_of, zip_of)


def test_missing_tasks_are_fetched_once(files, monkeypatch):
    """Out of LM-BFF's tar (whose GLUE-SST-2 is another data set), a zip, the second address where
    the first fails, or as a file; the archive is not fetched again; a checksum is held against."""
    cb, kitchen = FORMATS["cb"][0].encode(), FORMATS["kitchen"][0]
    sst = b"sentence\tlabel\nok\t1\n"
    files.files = {
        "/datasets.tar": tar_of({"original/GLUE-SST-2/dev.tsv": b"other", "original/mr/a": b"",
                                 "original/trec/test.csv": b"1,x\n",
                                 "original/SST-2/dev.tsv": sst}),
        "/CB.zip": zip_of({"CB/val.jsonl": cb, "__MACOSX/CB/._val.jsonl": b"?"}),
        "/QQP-clean.zip": zip_of({"QQP-clean/dev.tsv": FORMATS["qqp"][0]}),
        "/kitchen/test": kitchen}
    assert load_test(TASKS["sst2"], "none") == [tasks.Row(1, {"text": "ok"})]
    assert load_test(TASKS["trec"], "none") == [tasks.Row(1, {"text": "x"})]
    for name in ("cb", "qqp", "kitchen"):
        assert load_test(TASKS[name], "none") == [tasks.Row(*row) for row in FORMATS[name][1]]
    assert files.asked == [
        "/datasets.tar", "/CB.zip", "/QQP-clean.zip", "/kitchen/test"]
    for name in ("cb", "kitchen"):
        (tasks.FETCHED / TASKS[name].test).unlink()
        monkeypatch.setitem(tasks.CHECKSUMS, TASKS[name].test, "0" * 32)
        with pytest.raises(InputError, match="has another checksum than it should"):
            load_test(TASKS[name], "none")
        assert not (tasks.FETCHED / TASKS[name].test).exists()


def test_a_download_is_whole_or_not_there(files, capsys):
    """The line goes dead, within a file or an archive: one error with what to do, and nothing that
    looks whole; the next call gets it, and takes away what a killed one left. In a log there is no
    bar."""
    files.files = {"/kitchen/test": FORMATS["kitchen"][0],
                   "/CB.zip": zip_of({"CB/val.jsonl": b"x"})}
    files.cut = 10
    for file in ("domain/kitchen/test", "superglue/CB/val.jsonl"):
        with pytest.raises(InputError, match="put it there.*stopped at 10 of .* bytes") as error:
            tasks.locate(file, "none")
        assert "\n" not in str(error.value) and not list(Path().rglob("*"))
    files.cut = None
    killed = forked(lambda: None)
    assert ended(killed) == 0
    torn = tasks.FETCHED / f"domain/kitchen/.test.{killed}.tmp"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"half")
    assert tasks.locate("domain/kitchen/test").read_bytes() == FORMATS["kitchen"][0]
    assert not torn.exists() and capsys.readouterr().err == ""


@pytest.mark.parametrize("name, content, says", [
    ("CB.zip", zip_of({"../CB/val.jsonl": b"x"}), "leads outside"),
    ("CB.zip", zip_of({"CB/val.jsonl": b"x", "/etc/passwd": b"x"}), "leads outside"),
    ("CB.zip", zip_of({"CB/val.jsonl": b"x" * 99})[:-40], "damaged or incomplete"),
    ("CB.zip", b"", "damaged or incomplete"),
    ("CB.zip", zip_of({"WiC/val.jsonl": b"x"}), "has no CB/val.jsonl"),
    ("datasets.tar", tar_of({"original/../../mr/test.csv": b"x"}), "leads outside"),
    ("datasets.tar", tar_of({"original/mr/test.csv": b"x" * 9999})[:2000], "damaged or incomplete"),
    ("datasets.tar", b"<html>", "damaged or incomplete"),
    ("datasets.tar", tar_of({"original/MRPC/test.csv": b"x"}), "has no mr/test.csv")])
def test_archives_that_cannot_be_trusted(files, name, content, says):
    """A truncated one, one with ../ in it, one without the task: an InputError of one line that
    names it; nothing is written anywhere."""
    Path("given").mkdir()
    (Path("given") / name).write_bytes(content)
    task = TASKS["cb" if name == "CB.zip" else "mr"]
    with pytest.raises(InputError, match=f"{name}.*{says}|{says}.*{name}") as error:
        load_test(task, "given")
    assert "\n" not in str(error.value)
    assert [path for path in Path().rglob("*") if path.is_file()] == [Path("given") / name]


def test_a_task_that_nobody_has_says_where_to_put_it(files):
    """Nothing to fetch it from, or a server that lacks it: the file and the option are named."""
    for name in ("dvd", "mr"):
        with pytest.raises(InputError, match=f"{TASKS[name].test} is not in none.*--data FOLDER"):
            load_test(TASKS[name], "none")


def test_only_the_needed_files_are_fetched(tmp_path, hub):
    """Of a repository that has everything twice: config, tokenizer and the single file of weights.
    A second time nothing is asked for; what is fetched is what is loaded."""
    folder = save_shards(tmp_path / "sharded", V11)
    save_model(folder, V11)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    junk = {name: b"junk" for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack",
                                       "spiece.model", "README.md")}
    hub.repos[ANY] = {"main": (COMMIT, files | junk | {"tokenizer.json": b"{}"})}
    listed = [(part.file, part.bytes) for part in hubs.model_downloads(ANY)]
    assert listed == [(name, len(hub.repos[ANY]["main"][1][name]))
                      for name in ("config.json", "model.safetensors", "tokenizer.json")]
    fetched = hubs.model_folder(ANY)
    assert {file for method, _, file in hub.asked if method == "GET"} == {
        "config.json", "model.safetensors", "tokenizer.json"}
    assert hubs.tokenizer_file(fetched) == fetched / "tokenizer.json"
    assert load_t5(fetched).config == V11
    hub.asked.clear()
    assert hubs.model_folder(f"{ANY}@{COMMIT}") == fetched and not hub.asked


def test_shards_are_fetched_where_there_is_no_single_file(tmp_path, hub):
    """The index and the shards that it names; a repository without a tokenizer takes t5-base's."""
    files = hub_files(save_shards(tmp_path / "m", V10), "config.json", T.INDEX,
                      "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    config = json.loads(files["config.json"]) | {"vocab_size": hubs.OFFICIAL_ROWS}
    hub.repos[ANY] = {"main": (COMMIT, files)}
    hub.repos["google-t5/t5-base"] = {
        hubs.MODELS["t5-base"].split("@")[1]: ("d" * 40, {"tokenizer.json": b'"base"'})}
    fetched = hubs.model_folder(ANY)
    assert sorted(path.name for path in fetched.iterdir()) == sorted(files)
    assert load_t5(fetched).config == V10
    hub.repos["x/official"] = {"main": ("f" * 40, files | {
        "config.json": json.dumps(config).encode()})}
    assert hubs.fetch_list("x/official")[0].endswith("tokenizer.json of google-t5/t5-base")
    hub.asked.clear()
    hubs.model_downloads(f"{ANY}@{COMMIT}")      # the hub has said that two files are not there
    assert not hub.asked
    other = tmp_path / "official"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    assert hubs.tokenizer_file(other).read_bytes() == b'"base"'
    with pytest.raises(InputError, match="tokenizer.json is missing: put the model's"):
        hubs.tokenizer_file(fetched)            # its vocabulary is not the official one
    del hub.repos["google-t5/t5-base"], files["model-00002-of-00002.safetensors"]
    with pytest.raises(InputError, match="tokenizer.json is missing, put t5-base's there"):
        hubs.tokenizer_file(save_config(tmp_path / "again", config))
    hub.repos[ANY] = {"main": ("e" * 40, files)}
    with pytest.raises(InputError, match="lacks model-00002-of-00002.safetensors, which its index"):
        hubs.model_folder(ANY)


def save_config(folder, values):
    """A folder with a config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_short_names_are_hub_ids_with_their_commit():
    """t5-base, Flan, v1.1 and LM-adapted: each short name is a repository; the ones that can be
    cited are pinned to a whole commit; OWNER/NAME@REVISION is taken as it is."""
    assert hubs.hub_source("t5-base") == {
        "repo_id": "google-t5/t5-base", "revision": "a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1"}
    assert hubs.hub_source("t5-v1_1-xxl") == {"repo_id": "google/t5-v1_1-xxl"}
    assert hubs.hub_source("me/mine@v2") == {"repo_id": "me/mine", "revision": "v2"}
    names = ("t5-small t5-base t5-large t5-3b flan-t5-small flan-t5-base flan-t5-large flan-t5-xl "
             "flan-t5-xxl t5-v1_1-small t5-v1_1-base t5-v1_1-large t5-v1_1-xl t5-v1_1-xxl "
             "t5-small-lm-adapt t5-base-lm-adapt t5-large-lm-adapt t5-xl-lm-adapt t5-xxl-lm-adapt")
    assert sorted(hubs.MODELS) == sorted(names.split())
    for name in hubs.MODELS:
        revision = hubs.hub_source(name).get("revision", "refs/pr/0")
        assert re.fullmatch(r"[0-9a-f]{40}|refs/pr/\d", revision), name
        assert len(revision) == 40 or "v1_1" in name or "lm-adapt" in name
    with pytest.raises(InputError, match="no model 't5-huge': give tiny, t5-small, t5-base"):
        hubs.model_folder("t5-huge")


def test_without_safetensors_the_revision_that_has_them_is_named(tmp_path, hub):
    """Only pytorch_model.bin on main: the pull requests are looked through."""
    config = hub_files(save_model(tmp_path / "m", V11), "config.json", "model.safetensors")
    hub.repos[ANY] = {"main": (COMMIT, {"config.json": config["config.json"], "x.bin": b""}),
                      "refs/pr/3": ("3" * 40, {"README.md": b""}),
                      "refs/pr/7": ("7" * 40, config)}
    with pytest.raises(InputError) as caught:
        hubs.model_folder(ANY)
    assert "no safetensors at main" in str(caught.value)
    assert str(caught.value).endswith(f"take --model {ANY}@refs/pr/7")
    assert load_t5(hubs.model_folder(f"{ANY}@refs/pr/7")).config == V11


def test_what_cannot_be_fetched_says_what_to_do(tmp_path, hub, monkeypatch):
    """A wrong name, revision or file, a line that breaks: one line with the way out, and no file
    that looks whole; the next try gets it."""
    for name, says in (("x/none", "x/none was not fetched .the hub has no such repository"),
                       ("too/many/parts", "was not fetched .Repo id must"),
                       (f"{ANY}@v9", "not fetched .the repository has no such revision")):
        hub.repos[ANY] = {"main": (COMMIT, hub_files(save_model(tmp_path / str(len(name)), V11),
                                                     "config.json", "model.safetensors"))}
        with pytest.raises(InputError, match=says) as caught:
            hubs.model_folder(name)
        assert str(caught.value).endswith("check name, revision and network, or put its files into "
                                          "a folder and give --model FOLDER")
        assert "\n" not in str(caught.value)
    hub.cut = 10_000
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    with pytest.raises(InputError, match="model.safetensors of x/model.*was not fetched"):
        hubs.model_folder(ANY)
    assert not list((tmp_path / "hub").rglob("snapshots/*/model.safetensors"))
    hub.cut = None
    assert load_t5(hubs.model_folder(ANY)).config == V11


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_nothing_broken_stays_in_the_cache(name, tmp_path, hub):
    """A web page in place of a file, or a file that its author uploaded half, is refused by name
    and not kept: when the hub is well again, so is the next try. What a killed download left is
    swept away then."""
    files = hub_files(save_model(tmp_path / "m", V11), "config.json", "model.safetensors")
    for wrong in (b"<html>Sign in</html>", files[name][:-9]):
        hub.repos[ANY] = {"main": (COMMIT, files | {name: wrong})}
        with pytest.raises(InputError, match=f"{name} .*fetch it again .it was taken out"):
            hubs.model_folder(ANY)
        blobs = [path.read_bytes() for path in (tmp_path / "hub").rglob("blobs/*")]
        assert wrong not in blobs and not list((tmp_path / "hub").rglob(f"snapshots/*/{name}"))
    hub.repos[ANY] = {"main": (COMMIT, files)}
    killed = tmp_path / "hub/models--x--model/blobs" / (
        hashlib.sha256(files[name]).hexdigest() + ".0123abcd.incomplete")
    killed.write_bytes(files[name][:100])
    assert load_t5(hubs.model_folder(ANY)).config == V11 and not killed.exists()


def test_the_hubs_own_settings_are_honoured(tmp_path, hub, monkeypatch):
    """$HF_ENDPOINT, $HF_HOME and $HF_HUB_OFFLINE: fetched into that folder from there; offline it
    is found again, and what is not there is told, both without asking. Without a network train.py
    ends in one line, whatever the client does meanwhile."""
    hub.repos[ANY] = {"main": (COMMIT, hub_files(
        save_model(tmp_path / "m", V11), "config.json", "model.safetensors"))}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}

    def python(code, **more):
        return subprocess.run([sys.executable, "-c", code], cwd=Path(data.__file__).parent,
                              env=os.environ | home | more, text=True, capture_output=True)
    fetch = f"import data; print(hubs.model_folder({ANY!r}))"
    ended = python(f"""{fetch}
import huggingface_hub, runpy, sys, time
huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"                   # nobody is there
huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE = huggingface_hub.constants.ENDPOINT + (
    "/{{repo_id}}/resolve/{{revision}}/{{filename}}")
time.sleep = lambda _: None
sys.argv[1:] = ["--model", "x/no"]
runpy.run_path("train.py", run_name="__main__")""")
    first = ended.stdout.partition("\n")[0]
    assert first.startswith(str(tmp_path / "home")) and (Path(first) / "config.json").is_file()
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: config.json of x/no was not fetched (the hub was not re")
    hub.asked.clear()
    assert python(fetch, HF_HUB_OFFLINE="1").stdout.strip() == first
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="was not reached, and it is not in the cache.: check"):
        hubs.model_folder("x/no")
    assert not hub.asked


def test_an_evaluation_tells_what_it_fetches(place, hub, capsys):
    """eval.py --model OWNER/NAME names the files and their size, and that they are not pinned."""
    hub.repos[ANY] = {"main": (COMMIT, hub_files(
        place / "small", "config.json", "model.safetensors", "tokenizer.json"))}
    evaluation.main([*SMALL, "--model", ANY, "--prompt", "random"])
    assert (f"download: 0 MB of {ANY} at {COMMIT}, not pinned: config.json (cached), "
            "model.safetensors, tokenizer.json\n") in capsys.readouterr().out


def test_a_corpus_is_fetched_as_far_as_it_is_wanted(monkeypatch):
    """As many of its files as hold the bytes; OpenWebText's of the revision that has tars."""
    asked = []

    def download(filename, **source):
        asked.append((source, filename))
        return filename
    monkeypatch.setattr(data, "hf_hub_download", download)
    counts = [len(hubs.fetch_corpus("openwebtext", size)) for size in (10**10, 10**12)]
    assert counts == [6, 21] and len(hubs.fetch_corpus("c4", 10**9)) == 2
    assert asked[5] == ({"repo_id": "Skylion007/openwebtext", "repo_type": "dataset",
                         "revision": "f3808c30e817981b845ec549c43e82bb467d8144"},
                         "subsets/urlsf_subset05.tar")


def test_the_demonstration_without_the_embedded_model(tmp_path, capsys):
    """`python data.py` beside no tiny/ ends with status 2 and says how to build it."""
    (tmp_path / "data.py").write_bytes(Path(data.__file__).read_bytes())
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tmp_path / "data.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "python tiny.py" in error and error.count("\n") == 1


@pytest.mark.skipif(not (common.TINY / "model.safetensors").is_file(),
                    reason="tiny/ has not been built: python tiny.py")
@pytest.mark.parametrize("lost", ["tokenizer.json", "model.safetensors"])
def test_the_models_demonstration_with_a_damaged_file(tmp_path, lost, capsys):
    """`python t5.py` ends with status 2 and says how to build tiny/."""
    (tmp_path / "t5.py").write_bytes(Path(T.__file__).read_bytes())
    (tmp_path / "tiny").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "tiny" / name).symlink_to(common.TINY / name)
    (tmp_path / "tiny" / lost).unlink()
    (tmp_path / "tiny" / lost).write_text("{")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tmp_path / "t5.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "python tiny.py" in error and error.count("\n") == 1


@pytest.mark.skipif(not (common.TINY / "model.safetensors").is_file(),
                    reason="tiny/ has not been built: python tiny.py")
def test_each_module_shows_its_concept(capsys):
    """Run alone: the second-order gradient is its finite difference and the first-order one is not;
    blanks are filled with words, likeliest first; a task of each variant is text, source -> target;
    inertia falls."""
    shown = {}
    for name in ("supmer.py", "t5.py", "data.py", "kmeans.py"):
        runpy.run_path(str(HERE / name), run_name="__main__")
        shown[name] = capsys.readouterr().out
    table = np.array([line.split() for line in shown["supmer.py"].splitlines()[2:]], dtype=float)
    second, difference, first = table.T
    assert len(table) == 3 and np.allclose(second, difference, rtol=0, atol=1e-7)
    assert (abs(first - difference) > 1e-3).all()
    for line in shown["t5.py"].splitlines():
        *words, _ = re.split(r" 0\.\d\d ?", line.partition("<extra_id_0>. ")[2])
        shares = list(map(float, re.findall(r"0\.\d\d", line)))
        assert len(words) == 5 and all(map(str.isalpha, words))
        assert shares == sorted(shares, reverse=True) and shares[0] > 0.2
    assert shown["t5.py"].count("\n") == 2
    assert all(f"{variant}, anchors of cluster" in shown["data.py"] for variant in VARIANTS)
    assert [shown["data.py"].count(part) for part in (
        "<extra_id_0>", "</s> -> ", "  support: ", "  query: ")] == [20, 20, 15, 5]
    assert "[centroid " in shown["data.py"]
    assert README.read_text() == refilled(README.read_text(), shown["data.py"]), REFILL
    inertia = [float(line.rpartition(" ")[2]) for line in shown["kmeans.py"].splitlines()]
    assert len(inertia) > 3 and all(b < a for a, b in zip(inertia, inertia[1:]))
    assert inertia[-1] == pytest.approx(2, abs=0.05)      # of two unit normals around each centre
