"""A meta-training run: what is logged, kept, saved and resumed, and what stops it."""

import csv
import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import common
import prompts
import run_folder
import tour
import train
from common import InputError
from conftest import log_without_times, make_run, run_script, sentence
from data import PAPER_VARIANTS
from ranks import Ranks
from supmer import Method
from templates import load_tokenizer


def unfinished(run, **changes):
    """Give a run that make_run began the run.json that it is resumed by."""
    values = run_folder.new_run([], run.training, run.method, run.made_of)
    run_folder.write_run(run.folder, values | changes)
    return run


def scripted(monkeypatch, losses, before=9.0):
    """Let the validations have these losses after the inner step."""
    losses, usual = iter(losses), {"step_size": 0.05, "queries": 1, "variants": {}}
    monkeypatch.setattr(train, "validate", lambda *_: {
        **usual, "loss": next(losses), "loss_before": before})


def test_a_validation_keeps_warns_or_stops(small_world, monkeypatch, capsys):
    """The lowest loss is kept; too small or large an inner step is said; NaN ends the run."""
    run = make_run(small_world, "kept")
    scripted(monkeypatch, [0.5, 0.7, 8.9999, 9.5, math.nan])
    capsys.readouterr()                                         # of step 0
    run.step()
    run.validate()
    kept = run.state.theta.clone()
    run.step()
    run.validate()
    theta, phi, about = prompts.load_prompt(run.folder, 16)
    assert torch.equal(theta, kept) and not torch.equal(theta, run.state.theta)
    assert (about["step"], about["validation_loss"]) == ("1", "0.500000")
    assert set(phi) == {"A", "a", "W", "c"}
    assert "--relative-step" not in "".join(capsys.readouterr())
    for size in ("larger", "smaller"):
        run.validate()
        assert f"Try a {size} --relative-step" in "".join(capsys.readouterr())
    with pytest.raises(InputError, match="validation loss is nan"):
        run.validate()


def test_plain_pretraining_is_chosen_without_an_inner_step(small_world, monkeypatch):
    """PPT's kept prompt is that of the lowest loss before an inner step, SUPMER's after one."""
    for method, kept in (("ppt", "2"), ("supmer", "1")):
        run = make_run(small_world, f"{method}-chosen", method=method)
        run.best = math.inf
        for before, after in ((0.4, 0.1), (0.3, 0.2)):
            run.step()
            with monkeypatch.context() as patch:
                scripted(patch, [after], before)
                run.validate()
        assert prompts.load_prompt(run.folder)[2]["step"] == kept


def test_patience_ends_a_run_for_good(small_world, monkeypatch):
    """After two validations without a lower loss the run ends, also when it is resumed there."""
    scripted(monkeypatch, [0.5, 0.6, 0.7])
    for _ in range(2):
        run = make_run(small_world, "patient", patience=2, validate_every=1)
        run.method = replace(run.method, steps=10)
        assert run.train() is None and run.state.step == 2          # validated at 0, 1, 2


def test_a_run_becomes_pictures(small_world, monkeypatch, tmp_path):
    """--plot draws the log of a run that still works; tour.py its pictures of a world and that log.
    """
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run = unfinished(make_run(small_world, "drawn"))
    run.step()
    run.log.write('{"step": 2, "s"')                            # a torn line
    run.log.flush()
    assert train.main(["--plot", str(run.folder)]) == 0
    theta, (_, index), held_out = run.state.theta, run.sources[0], tour.held_out
    world = SimpleNamespace(t5=run.t5, index=index, theta=theta, phi=run.state.phi, start=theta,
                            tokenizer=load_tokenizer(small_world[0] / "small", run.t5.config))
    monkeypatch.setattr(tour, "world", lambda: world)
    monkeypatch.setattr(tour, "held_out", lambda number: held_out(1)[:1])
    monkeypatch.setattr(tour, "FOLDER", tmp_path)
    assert tour.main(["--run", str(run.folder)]) == 0
    drawn = [*tmp_path.glob("*.png"), run.folder / "log.png"]
    assert {path.stem for path in drawn} == {*tour.PICTURES, "log"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_labeled_sets_are_mixed_in(small_world, tmp_path):
    """Table 3: a third of the tasks is labeled; with --labeled-share 1 there is no corpus."""
    folder, options = small_world
    rows = [(("yes", "no")[i % 2], sentence(i // 30, i % 30)) for i in range(1800)]
    with open(tmp_path / "topics.csv", "w", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *rows])
    options = [*options, "--labeled", tmp_path, "--labeled-clusters", "2"]
    status, said = run_script(train, *options, "--steps", "10", "--run", "mixed", folder=folder)
    log = log_without_times(folder / "mixed")
    drawn = [variant for line in log for variant in line.get("variants", ())]
    assert status == 0 and len(drawn) == 20 and 2 <= drawn.count("topics.csv") < 10, said
    assert set(log[0]["validation"]["variants"]) == {*PAPER_VARIANTS, "topics.csv"}
    assert log[0]["validation"]["queries"] == 4 * 6
    assert "relative_step 0.05" in said and "micro_tokens" not in said
    assert all(f"\n{variant} " in said for variant in PAPER_VARIANTS)
    assert "python eval.py --prompt mixed" in said
    status, said = run_script(train, *options, "--labeled-share", "1", "--steps", "1", "--corpus",
                              "nowhere", "--run", "labeled", folder=folder)
    assert status == 0, said
    assert log_without_times(folder / "labeled")[1]["variants"] == ["topics.csv"] * 2


@pytest.mark.parametrize("method", ["supmer", "ppt"])
def test_lost_steps_are_repeated_exactly(small_world, method):
    """Steps after the saved state, and a torn log line, come again bit by bit."""
    name = f"replayed-{method}"
    first = make_run(small_world, name, method=method)
    first.step()
    first.save()
    entries = [{**first.step(), "time": 0} for _ in range(2)]
    first.log.write('{"step": 4, "torn')
    first.log.close()
    second = make_run(small_world, name, method=method)
    assert second.state.step == 1 and len(log_without_times(second.folder)) == 2
    assert [{**second.step(), "time": 0} for _ in range(2)] == entries
    assert torch.equal(first.state.theta, second.state.theta)
    with pytest.raises(InputError, match="state.pt is not the state of this run"):
        make_run(small_world, name, prompt_length=5)


@pytest.mark.parametrize("number, steps, expected", [
    (signal.SIGTERM, 2, 128 + signal.SIGTERM), (signal.SIGALRM, 2, 0), (signal.SIGTERM, 1, 0)])
def test_a_signal_ends_the_step_and_saves(small_world, monkeypatch, number, steps, expected):
    """SIGTERM, and --max-minutes' SIGALRM with status 0, end the step at work and save it. A run
    whose last step this is has nothing to resume."""
    folder, options = small_world
    step, name = train.meta_step, f"stopped-{number}-{steps}"
    monkeypatch.setattr(train, "meta_step", lambda *a: (os.kill(os.getpid(), number), step(*a))[1])
    argv = ["--max-minutes", "9", "--steps", str(steps), "--run", name]
    status, said = run_script(train, *options, *argv, folder=folder)
    assert status == expected and (f"python train.py --resume {name}" in said) == (steps > 1)
    assert torch.load(folder / name / "state.pt", weights_only=True)["step"] == 1


def test_a_run_is_resumed_on_what_made_it(small_world, monkeypatch):
    """Another model or version, a run in use or finished are refused; other code is a warning."""
    folder, options = small_world
    run = unfinished(make_run(small_world, "origin"))

    def said(expected, *argv):
        status, text = run_script(train, *argv, folder=folder)
        assert status == 2 and expected in text, text
    with pytest.raises(InputError, match="made with another model than is there now"):
        run_folder.check_origin(run.folder, run.made_of | {"model": "another"})
    assert run_folder.own_settings(run.folder, train.Training, Method) == [run.training, run.method]
    said("origin exists: name another --run", *options, "--run", "origin")
    with common.one_process(run.folder):
        said("another process works on origin", "--resume", "origin")
    with monkeypatch.context() as patch:
        patch.setattr(train, "join_ranks", lambda device: Ranks(0, 5))
        said("give --tasks 5", *options)
    unfinished(run, training={"keep_gib": 0})
    said("origin/run.json is not a run of this version", "--resume", "origin")
    unfinished(run, finished=True)
    said("origin is finished: start a new run", "--resume", "origin")
    unfinished(run, code="another")
    _, text = run_script(train, "--resume", "origin", "--max-minutes", "0.1", folder=folder)
    assert text.count("warning: ") == 1 and "supmer.py, t5.py" in text
