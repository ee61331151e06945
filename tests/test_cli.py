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
from conftest import SMALL, run_script
from supmer import Method


@pytest.mark.parametrize("argv, says", [
    ("--inner-rate inf", "inf must be above 0, at most 1e+30"),
    ("--tasks 0", "0 must be above 0"),
    ("--seed=-1", "-1 must be 0 or more"),
    ("--labeled-share 1.5", "1.5 must be above 0, at most 1"),
    ("--prompt-length 10001", "at most 10,000"),
    ("--method pt", "'unified-ppt'"),
    ("--device nonsense", "--device nonsense is not available"),
    ("--device cpu:0", "--device cpu:0 is not available"),
    ("--device cuda:99", "--device cuda:99 is not available"),
    ("--examples 9 --steps 3", "leave --steps away"),
    ("--method metapt", "give --labeled FOLDER"),
    ("--only sp --variants hidden mc-next", "--variants has none of this format"),
    ("--method unified-ppt --labeled sets", "leave --labeled away"),
    ("--resume nowhere", "nowhere/run.json is missing"),
    ("--resume nowhere --steps 3", "add nothing but --yes"),
    ("--plot nowhere", "nowhere/log.jsonl is missing"),
    ("--model no-such-folder", "no-such-folder"),
    ("WORLD --corpus empty", "empty: no text found"),
    ("WORLD --corpus nowhere", "nowhere: no text found"),
    ("WORLD --clusters 5000", "fewer --clusters"),
    ("WORLD --support 5000", "a smaller --support and --query"),
    ("WORLD --labeled empty", "--labeled empty: no folder with .csv"),
    ("WORLD --relative-step 0 --inner-rate 1e29", "not finite")])
def test_mistakes_end_with_status_2_and_one_line(small_world, argv, says):
    """A mistake is one line on the screen that says what is wrong, no traceback, exit status 2.
    WORLD stands for the options of a run that would work."""
    folder, options = small_world
    (folder / "empty").mkdir(exist_ok=True)
    words = argv.split()
    words = [*options, *words[1:]] if words[0] == "WORLD" else words
    status, said = run_script(train, *words, folder=folder)
    line = said.splitlines()[-1]
    assert status == 2 and line.startswith("error: ") and says in line, said
    assert "Traceback" not in said


@pytest.mark.parametrize("script, classes", [(train, (train.Training, Method)),
                                             (evaluation, (evaluation.Settings,))])
def test_help_names_defaults(script, classes, capsys):
    """--help has each setting with its default in brackets."""
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    text = "".join(capsys.readouterr().out.split())         # it breaks lines at hyphens, too
    for entry in (entry for cls in classes for entry in fields(cls)):
        values = entry.default if isinstance(entry.default, tuple) else [entry.default]
        about = "".join(entry.metadata["help"].split()) + "[" + "".join(map(str, values))
        assert about in text, entry.name


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
    argv = [*SMALL, "--prompt", "vocab", "--rates", "0.1", "--seeds", "10", "--out", "out.json"]
    with common.one_process(jobs.TUNED / "out.json"):
        with pytest.raises(InputError, match="another process works on .*out.json"):
            evaluation.main(argv)
