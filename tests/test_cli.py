"""The command lines: --help, and mistakes."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

import common
import eval as evaluation
import jobs
import train
from common import InputError
from conftest import PLANTED, SMALL, run_script, write_run
from supmer import Method
from tasks import TASKS

OWN = ["--model", "small", "--prompt-length", "3", "--prompt", "vocab", "--template", "{text} <X>",
       "--words", "bad,good", "--data"]


@pytest.mark.parametrize("script, argv, says", [
    (train, "--tasks 0", "0 must be above 0"),
    (train, "--device nonsense", "--device nonsense is not available"),
    (train, "--method metapt", "give --labeled FOLDER"),
    (train, "--method unified-ppt --labeled sets", "leave --labeled away"),
    (train, "--resume nowhere", "nowhere/run.json is missing"),
    (train, "--encoding cp1252", "--encoding: for a table of your own, which is not read here"),
    (train, "--resume nowhere --steps 3", "add nothing but --yes"),
    (train, "--plot nowhere", "nowhere/log.jsonl is missing"),
    (train, "--model no-such-folder", "no-such-folder"),
    (train, "WORLD --corpus empty", "empty: no text found"),
    (train, "WORLD --clusters 5000", "fewer --clusters"),
    (train, "WORLD --support 5000", "a smaller --support and --query"),
    (train, "WORLD --labeled empty", "--labeled empty: no folder with .csv"),
    (train, "WORLD --relative-step 0 --inner-rate 1e29", "not finite"),
    (train, "WORLD --run corpus.jsonl", "corpus.jsonl exists: name another --run"),
    (evaluation, "--task sst3", "sst3: there is no such task: give movie, "),
    (evaluation, "--model elsewhere", "RUN|released|random|vocab"),         # no finished run
    (evaluation, "WORLD --prompt randm", "randm is missing: it should be a prompt"),
    (evaluation, "WORLD --prompt released", "released prompts for t5-base and flan-t5-xl only"),
    (evaluation, "WORLD --prompt runs/other", "was learned on other with other weights"),
    (evaluation, "WORLD --prompt runs/long", "--prompt-length 5"),
    (evaluation, "OWN my.csv", "my.csv has 3 labels, 0"),
    (evaluation, "OWN my.csv --words 2=great,1=bad,0=good", "label 2 has 1 different texts"),
    (evaluation, "OWN my.csv none.csv", "none.csv is missing"),
    (evaluation, "OWN my.csv b.csv my.csv", "at most a second file to test on"),
    (evaluation, "WORLD --prompt vocab --no-header --max-tokens 9", "--no-header, --max-tokens: "),
    (evaluation, "--predict my.csv --words a,b", "--words: for a table of your own"),
    (evaluation, "--predict my.csv --prompt my.csv", "my.csv is not a result of eval.py")])
def test_mistakes_end_with_status_2_and_one_line(small_world, monkeypatch, script, argv, says):
    """A mistake is one line, the last on the screen, that says what is wrong; no traceback, status
    2. WORLD stands for the options of a call that would work, OWN for those of an own task."""
    folder, options = small_world
    monkeypatch.setitem(TASKS, "planted", PLANTED)
    if not (folder / "empty").exists():
        (folder / "empty").mkdir()
        (folder / "my.csv").write_text("label,text\n0,a\n1,b\n2,c\n")
        write_run(folder / "runs/other", model="other", finished=False)
        write_run(folder / "runs/long", model=folder / "small", finished=False, P=5)
    stands_for = {"WORLD": options if script is train else SMALL, "OWN": OWN}
    words = [word for given in argv.split() for word in stands_for.get(given, [given])]
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


def test_one_process_at_a_time(place):
    """A second evaluation of the same file is refused while the first one works."""
    jobs.TUNED.mkdir(parents=True)
    with common.one_process(jobs.TUNED / "out.json"):
        with pytest.raises(InputError, match="another process works on .*out.json"):
            evaluation.main([*SMALL, "--prompt", "vocab", "--out", "out.json"])
