"""The command lines: --help, and mistakes."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

import bench
import common
import eval as evaluation
import jobs
import train
from conftest import PLANTED, SMALL, run_script, write_run
from supmer import Method
from tasks import TASKS

OWN = ["--model", "small", "--prompt-length", "3", "--prompt", "vocab", "--template", "{text} <X>",
       "--words", "bad,good", "--data"]


@pytest.mark.parametrize("script, argv, says", [
    (train, "--tasks 0", "0 must be above 0"), (train, "--task 3", "arguments: --task 3"),
    (train, "--device nonsense", "--device nonsense is not available"),
    (train, "--method metapt", "give --labeled FOLDER"),
    (train, "--method unified-ppt --labeled sets", "leave --labeled away"),
    (train, "--encoding cp1252", "--encoding: for a table of your own, which is not read here"),
    (train, "--resume nowhere --steps 3", "add nothing but --yes"),
    (train, "WORLD --corpus empty", "empty: no text found"),
    (train, "WORLD --clusters 5000", "fewer --clusters"),
    (train, "WORLD --support 5000", "a smaller --support and --query"),
    (train, "WORLD --labeled empty", "--labeled empty: no folder with .csv"),
    (train, "WORLD --relative-step 0 --inner-rate 1e29", "not finite"),
    (train, "WORLD --run corpus.jsonl", "corpus.jsonl exists: name another --run"),
    (evaluation, "--task movie sst3", "no task sst3: give movie, "),
    (evaluation, "WORLD --prompt vocab --data nowhere", "--data nowhere: give a folder"),
    (evaluation, "--model elsewhere", "RUN|released|random|vocab"),         # no finished run
    (evaluation, "WORLD --prompt randm", "randm is missing: it should be a prompt"),
    (evaluation, "WORLD --prompt released", "released prompts for t5-base and flan-t5-xl only"),
    (evaluation, "WORLD --prompt runs/other", "was learned on other with other weights"),
    (evaluation, "WORLD --prompt runs/long", "--prompt-length 5"),
    (evaluation, "WORLD --prompt vocab --out busy.json", "another process works on"),
    (evaluation, "OWN my.csv", "my.csv has 3 labels, 0"),
    (evaluation, "OWN my.csv --words 2=great,1=bad,0=good", "label 2 has 1 different texts"),
    (evaluation, "OWN my.csv b.csv my.csv", "at most a second file to test on"),
    (evaluation, "WORLD --prompt vocab --no-header --max-tokens 9", "--no-header, --max-tokens: "),
    (evaluation, "--predict my.csv --words a,b", "--words: for a table of your own"),
    (evaluation, "--predict my.csv --prompt my.csv", "my.csv is not a result of eval.py"),
    (bench, "--threads 0", "0 must be above 0"), (bench, "--json no/file", "no/file")])
def test_mistakes_end_with_status_2_and_one_line(small_world, monkeypatch, script, argv, says):
    """The last line on the screen says what is wrong. WORLD, OWN: options of a call that works."""
    folder, options = small_world
    monkeypatch.setitem(TASKS, "planted", PLANTED)
    if not (folder / "empty").exists():
        (folder / "empty").mkdir()
        (folder / jobs.TUNED).mkdir(parents=True)
        (folder / "my.csv").write_text("label,text\n0,a\n1,b\n2,c\n")
        write_run(folder / "runs/other", model="other", finished=False)
        write_run(folder / "runs/long", model=folder / "small", finished=False, P=5)
    stands_for = {"WORLD": options if script is train else SMALL, "OWN": OWN}
    words = [word for given in argv.split() for word in stands_for.get(given, [given])]
    with common.one_process(folder / jobs.TUNED / "busy.json"):
        status, said = run_script(script, *words, folder=folder)
    line = said.splitlines()[-1]
    assert status == 2 and line.startswith("error: ") and says in line, said
    assert "Traceback" not in said


@pytest.mark.parametrize("script, settings", [
    (train, [*fields(train.Training), *fields(Method)]), (evaluation, fields(evaluation.Settings))])
def test_help_names_defaults(script, settings, capsys):
    """--help has each setting with its default in brackets."""
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    text = "".join(capsys.readouterr().out.split())         # it breaks lines at hyphens, too
    for entry in settings:
        values = entry.default if isinstance(entry.default, tuple) else [entry.default]
        shown = "".join(f"{entry.metadata['help']}[{''.join(map(str, values))}".split())
        assert shown in text, entry.name


def test_a_gpu_that_is_named_is_the_current_one(monkeypatch):
    """--device cuda:1: what names no GPU goes there as well."""
    current = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(item=lambda: 0.0))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert common.pick_device("cuda:1") == torch.device("cuda:1") and common.pick_device("cpu")
    assert current == ["cuda:1"]
