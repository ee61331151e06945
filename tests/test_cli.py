"""Tests of cli."""

import bench
import common
import eval as evaluation
import jobs
import pytest
import re
import torch
import train
from common import InputError
from dataclasses import fields
from types import SimpleNamespace
from supmer import Method
from conftest import SMALL


def test_one_process_at_a_time(place):
    """A second evaluation of the same file is refused while the first one works."""
    jobs.TUNED.mkdir(parents=True)
    argv = [*SMALL, "--prompt", "vocab", "--rates", "0.1", "--seeds", "10", "--out", "out.json"]
    with common.one_process(jobs.TUNED / "out.json"):
        with pytest.raises(InputError, match="another process works on .*out.json"):
            evaluation.main(argv)
    evaluation.main(argv)


@pytest.mark.parametrize("script, argv, says", [
    (train, ["--inner-rate", "0.5"], "--inner-rate has no effect with --relative-step 0.03"),
    (train, ["--labeled-share", "1"], "--labeled-share has no effect with no --labeled"),
    (train, ["--labeled-clusters", "3"], "--labeled-clusters has no effect with no --labeled"),
    (train, ["--plot", "a", "--steps", "3"], "--plot are of a run that is there"),
    (train, ["--export-peft", "a", "b", "--plot", "c"], "add nothing to them"),
    (train, ["--export-peft", "a", "b", "--dry-run"], "add nothing to them"),
    (train, ["--stepz", "3"], "--stepz 3: the options are --model, --corpus, .*--export-peft"),
    (bench, ["--dtype", "int8"], "--dtype int8: the options are --quick, --threads, --device, ")])
def test_options_without_effect_are_refused(script, argv, says):
    """What would be ignored or does not exist is told, with what there is, before anything is
    read."""
    with pytest.raises(InputError, match=says) as caught:
        (script.main if script is bench else script.parse)(argv)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("script", [train, evaluation])
def test_help_tells_defaults_and_sources(script, capsys):
    """Each number has its default in brackets, and tiny's; the help says whose it is that names no
    source; the paper's numbers name their place."""
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    text = "".join(capsys.readouterr().out.split())         # it is broken at hyphens, too
    assert "hatnamesnosourceisours" in text
    classes = (train.Training, Method) if script is train else (evaluation.Settings,)
    for entry in (entry for cls in classes for entry in fields(cls)):
        values = entry.default if type(entry.default) is tuple else [entry.default]
        told = "".join(entry.metadata["help"].split()) + "[" + "".join(map(str, values))
        assert told in text, entry.name
        assert type(values[0]) not in (int, float) or re.search(
            r"Table|section|Alg|Fig|4\.1|C\.1|MetaPT|ours|released|of the prompt|0: (on|one|never)",
            entry.metadata["help"]), entry.name


def test_a_gpu_that_is_named_is_the_current_one(monkeypatch):
    """--device cuda:1: what names no GPU goes there as well."""
    current = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(
        device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert common.pick_device("cuda:1") == torch.device("cuda:1") and common.pick_device("cpu")
    assert current == [torch.device("cuda:1")]
