"""A meta-training run: what is logged, kept, saved and resumed, and what stops it."""

import csv
import math
import os
import signal
import time
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


def scripted(monkeypatch, losses):
    """Let the validations have these losses after the inner step."""
    losses, usual = iter(losses), {"loss_before": 9.0, "step_size": 0.05, "queries": 1,
                                   "variants": {}}
    monkeypatch.setattr(train, "validate", lambda *_: usual | {"loss": next(losses)})


# ------------------------------------------------------------------------------ log and prompt

def test_more_processes_than_tasks_are_refused(monkeypatch):
    """At once, not after the corpus has been read."""
    monkeypatch.setattr(train, "join_ranks", lambda device: Ranks(0, 5))
    with pytest.raises(InputError, match="give --tasks 5"):
        train.main([])


def test_each_step_is_logged_with_what_explains_it(small_world):
    """A line a step has losses, s, b, lambda, the step's size, the second-order share, gate, phi's
    two gradients, |A - I|; a validation has each variant."""
    run = make_run(small_world, "logged")
    run.step()
    run.step()
    validation, first, second = log_without_times(run.folder)
    assert second.keys() == {
        "step", "variants", "s", "b", "lambda", "theta_gradient", "A_minus_I", "support_loss",
        "query_loss", "gate_loss", "step_size", "second_order", "gate_mean", "phi_gradient_meta",
        "phi_gradient_gate"}
    assert first["b"] == 0 < second["b"] and first["lambda"] == [0.0, 0.0] and second["step"] == 2
    assert second["step_size"] == pytest.approx(0.05, rel=1e-3)
    assert set(validation["validation"]["variants"]) == set(PAPER_VARIANTS)
    assert validation["validation"]["queries"] == 4 * len(PAPER_VARIANTS)


def test_a_validation_keeps_warns_or_stops(small_world, monkeypatch, capsys):
    """prompt.safetensors holds theta, phi and the step of the lowest loss after adaptation. An
    inner step that lowers the loss by under 1e-4 asks for a larger one, a rise for a smaller one.
    NaN compares as neither lower nor higher: such a run must not look finished."""
    run = make_run(small_world, "kept")
    scripted(monkeypatch, [0.5, 0.7, 8.9999, 9.5, math.nan])
    capsys.readouterr()                                         # of step 0
    run.step()
    run.validate()
    kept = run.state.theta.clone()
    run.step()
    run.validate()
    theta, phi, about = prompts.load_prompt(run.folder / "prompt.safetensors", 16)
    assert torch.equal(theta, kept) and not torch.equal(theta, run.state.theta)
    assert (about["step"], about["validation_loss"]) == ("1", "0.500000")
    assert set(phi) == {"A", "a", "W", "c"}
    assert "--relative-step" not in "".join(capsys.readouterr())
    for size in ("larger", "smaller"):
        run.validate()
        said = "".join(capsys.readouterr())
        assert "5.0e-02 of its length" in said and f"Try a {size} --relative-step" in said
    with pytest.raises(InputError, match="validation loss is nan"):
        run.validate()


def test_patience_ends_a_run_for_good(small_world, monkeypatch):
    """After two validations without a lower loss the run ends, also when it is resumed there."""
    scripted(monkeypatch, [0.5, 0.6, 0.7])
    for _ in range(2):
        run = make_run(small_world, "patient", patience=2, validate_every=1)
        run.method = replace(run.method, steps=10)
        assert run.train() is None and run.state.step == 2          # validated at 0, 1, 2


def test_a_run_becomes_pictures(small_world, monkeypatch, tmp_path):
    """--plot draws the log of a run that still works, too: its last line is torn. tour.py draws its
    pictures of a world and of that log, whose run it must be given."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run = unfinished(make_run(small_world, "drawn"))
    run.step()
    run.log.write('{"step": 2, "s"')
    run.log.flush()
    assert train.main(["--plot", str(run.folder)]) == 0
    theta, (_, index) = run.state.theta, run.sources[0]
    world = SimpleNamespace(t5=run.t5, index=index, theta=theta, phi=run.state.phi, start=theta,
                            tokenizer=load_tokenizer(small_world[0] / "small", run.t5.config))
    held_out = tour.held_out
    monkeypatch.setattr(tour, "world", lambda: world)
    monkeypatch.setattr(tour, "held_out", lambda number: held_out(1)[:1])
    monkeypatch.setattr(tour, "FOLDER", tmp_path)
    with pytest.raises(InputError, match="needs a run's folder"):
        tour.main([])
    assert tour.main(["--run", str(run.folder)]) == 0
    drawn = [*tmp_path.glob("*.png"), run.folder / "log.png"]
    assert {path.stem for path in drawn} == {*tour.PICTURES, "log"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


# ---------------------------------------------------------------------------- save and resume

@pytest.mark.parametrize("method", ["supmer", "ppt"])
def test_lost_steps_are_repeated_exactly(small_world, method):
    """Steps after the last saved state, and a torn log line, leave no trace: the resumed run
    repeats them bit by bit, phi's optimizer without a step included. The state of another run is
    refused."""
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


def test_labeled_sets_are_mixed_in(small_world, tmp_path):
    """Table 3: a third of the tasks is labeled; each set is validated beside the variants; with
    --labeled-share 1 there is no corpus. The screen has at most a dozen lines of settings, those
    that differ from the paper's, each variant's outcome and the next command."""
    folder, options = small_world
    rows = [(("yes", "no")[i % 2], sentence(i // 30, i % 30)) for i in range(1800)]
    with open(tmp_path / "topics.csv", "w", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *rows])
    options = [*options, "--labeled", tmp_path, "--labeled-clusters", "2"]
    status, said = run_script(train, *options, "--steps", "10", "--run", "mixed", folder=folder)
    log = log_without_times(folder / "mixed")
    drawn = [variant for line in log for variant in line.get("variants", ())]
    assert status == 0 and len(drawn) == 20 and 2 <= drawn.count("topics.csv") <= 12, said
    assert set(log[0]["validation"]["variants"]) == {*PAPER_VARIANTS, "topics.csv"}
    settings, rest = said.split("corpus: ", 1)
    assert len(settings.splitlines()) <= 12 and "relative_step 0.05" in settings
    assert "micro_tokens" not in settings and "python eval.py --prompt mixed" in rest
    assert all(f"\n{variant} " in rest for variant in PAPER_VARIANTS)
    status, said = run_script(train, *options, "--labeled-share", "1", "--steps", "1", "--corpus",
                              "nowhere", "--run", "labeled", folder=folder)
    assert status == 0, said
    assert log_without_times(folder / "labeled")[1]["variants"] == ["topics.csv"] * 2


@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 128 + signal.SIGTERM),
                                              (signal.SIGALRM, 0)])
def test_a_signal_ends_the_step_and_saves(small_world, monkeypatch, number, expected):
    """SIGTERM, and --max-minutes' SIGALRM with status 0, end the step at work and save; the resumed
    run equals an unbroken one."""
    folder, options = small_world
    options = [*options, "--max-minutes", "9", "--steps", "2"]
    step, name = train.meta_step, f"stopped-{number}"

    def interrupted(*arguments):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        return step(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(train, "meta_step", interrupted)
        status, said = run_script(train, *options, "--run", name, folder=folder)
    assert status == expected and f"python train.py --resume {name}" in said
    assert run_script(train, "--resume", name, folder=folder)[0] == 0
    whole = make_run((folder, options), f"whole-{number}")
    whole.train()
    assert log_without_times(whole.folder) == log_without_times(folder / name)


def test_a_run_is_resumed_on_what_made_it(small_world):
    """Another corpus or model is refused by name; other code of the method is one warning line;
    settings of another version are refused."""
    run = unfinished(make_run(small_world, "origin"))
    run_folder.check_origin(run.folder, run.made_of)
    assert run_folder.own_settings(run.folder, train.Training, Method) == [run.training, run.method]
    with pytest.raises(InputError, match="made with another model than is there now"):
        run_folder.check_origin(run.folder, run.made_of | {"model": "another"})
    unfinished(run, code="another")
    _, said = run_script(train, "--resume", "origin", "--max-minutes", "0.1", folder=small_world[0])
    warning, = (line for line in said.splitlines() if line.startswith("warning: "))
    assert "supmer.py, t5.py" in warning
    unfinished(run, training={"keep_gib": 0})
    with pytest.raises(InputError, match="origin/run.json is not a run of this version"):
        run_folder.own_settings(run.folder, train.Training, Method)


def test_a_run_belongs_to_one_process(small_world):
    """A second process on a run's folder, a finished run and a folder in use are refused."""
    run, options = unfinished(make_run(small_world, "mine")), small_world[1]
    refused = [(["--resume", "mine"], "mine is finished: start a new run"),
               ([*options, "--run", "mine"], "mine exists: name another --run")]
    with common.one_process(run.folder):
        status, said = run_script(train, "--resume", "mine", folder=small_world[0])
    assert status == 2 and "another process works on mine" in said
    unfinished(run, finished=True)
    for argv, says in refused:
        status, said = run_script(train, *argv, folder=small_world[0])
        assert status == 2 and says in said
