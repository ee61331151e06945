"""A meta-training run: what is logged, kept, saved and resumed, and what stops it."""

import csv
import math
import os
import resource
import signal
import time
from dataclasses import replace

import pytest
import torch

import common
import prompts
import run_folder
import train
from common import InputError
from conftest import ended, log_without_times, make_run, run_train, sentence, start_train
from data import PAPER_VARIANTS

VALIDATION = {"loss_before": 9.0, "step_size": 0.05, "queries": 1, "variants": {}}


def unfinished(run, **changes):
    """Give a run that make_run began the run.json that it is resumed by."""
    values = run_folder.new_run([], run.training, run.method, run.made_of)
    run_folder.write_run(run.folder, values | changes)
    return run


def scripted(monkeypatch, losses):
    """Let the validations have these losses after the inner step."""
    losses = iter(losses)
    monkeypatch.setattr(train, "validate", lambda *_: VALIDATION | {"loss": next(losses)})


# ------------------------------------------------------------------------------ log and prompt

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
    assert first["b"] == 0 and first["lambda"] == [0.0, 0.0]
    assert second["step"] == 2 and second["b"] > 0
    assert second["step_size"] == pytest.approx(0.05, rel=1e-3)
    assert set(validation["validation"]["variants"]) == set(PAPER_VARIANTS)
    assert validation["validation"]["queries"] == 4 * len(PAPER_VARIANTS)


def test_the_lowest_validation_loss_is_kept(small_world, monkeypatch):
    """prompt.safetensors holds theta, phi and the step of the lowest loss after adaptation."""
    run = make_run(small_world, "kept")
    scripted(monkeypatch, [0.5, 0.7])
    run.step()
    run.validate()
    kept = run.state.theta.clone()
    run.step()
    run.validate()
    theta, phi, about = prompts.load_prompt(run.folder / "prompt.safetensors", 16)
    assert torch.equal(theta, kept) and not torch.equal(theta, run.state.theta)
    assert (about["step"], about["validation_loss"]) == ("1", "0.500000")
    assert set(phi) == {"A", "a", "W", "c"}


def test_patience_ends_a_run_for_good(small_world, monkeypatch):
    """After two validations without a lower loss the run ends, also when it is resumed there."""
    run = make_run(small_world, "patient", patience=2)
    scripted(monkeypatch, [0.5, 0.6, 0.7])
    run.method = replace(run.method, steps=10)
    assert run.train() is None and run.state.step == 6          # validated at 2, 4, 6
    again = make_run(small_world, "patient", patience=2)
    again.method = run.method
    assert again.train() is None and again.state.step == 6


def test_an_inner_step_of_the_wrong_size_is_reported(small_world, monkeypatch, capsys):
    """A drop under 1e-4 of the loss asks for a larger step, a rise for a smaller one; both print
    the step's size."""
    run = make_run(small_world, "warned")
    for loss, does, size in ((8.9999, "lowers the held-out loss by less than 1e-4 of it", "larger"),
                             (9.5, "raises the held-out loss to 1.06 times it", "smaller")):
        scripted(monkeypatch, [loss])
        run.validate()
        said = "".join(capsys.readouterr())
        assert does in said and "5.0e-02 of its length" in said
        assert f"Try a {size} --relative-step" in said


def test_a_validation_that_is_not_finite_stops_the_run(small_world, monkeypatch):
    """NaN compares as neither lower nor higher: such a run must not look finished."""
    run = make_run(small_world, "nan")
    scripted(monkeypatch, [math.nan])
    with pytest.raises(InputError, match="validation loss is nan"):
        run.validate()


def test_the_screen_shows_what_differs_from_the_paper(small_world):
    """At most a dozen lines of settings, each with its reason; then the outcome, each variant's
    accuracy and loss at the start and at the end, and the next command."""
    status, said = run_train(small_world[0], *small_world[1], "--run", "shown")
    assert status == 0
    settings, rest = said.split("corpus: ", 1)
    assert len(settings.splitlines()) <= 12 and "relative_step 0.05" in settings
    assert "micro_tokens" not in settings
    assert all(f"\n{variant} " in rest for variant in PAPER_VARIANTS)
    assert "broken" not in said and "python eval.py --prompt shown" in rest


def test_a_log_becomes_a_picture(small_world, capsys):
    """--plot draws the log of a run that still works, too: its last line is torn."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run = unfinished(make_run(small_world, "drawn"))
    run.step()
    run.log.write('{"step": 2, "s"')
    run.log.flush()
    assert train.main(["--plot", str(run.folder)]) == 0
    assert str(run.folder / "log.png") in capsys.readouterr().out
    assert (run.folder / "log.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------- save and resume

@pytest.mark.parametrize("changes", [{}, {"method": "ppt"}])
def test_lost_steps_are_repeated_exactly(small_world, changes):
    """Steps after the last saved state, and a torn log line, leave no trace: the resumed run
    repeats them bit by bit, phi's optimizer without a step included."""
    first = make_run(small_world, f"replayed{len(changes)}", **changes)
    first.step()
    first.save()
    entries = [first.step() for _ in range(2)]
    first.log.write('{"step": 4, "torn')
    first.log.close()
    second = make_run(small_world, f"replayed{len(changes)}", **changes)
    assert second.state.step == 1 and len(log_without_times(second.folder)) == 2
    again = [second.step() for _ in range(2)]
    assert [{**entry, "time": 0} for entry in entries] == [{**entry, "time": 0} for entry in again]
    assert torch.equal(first.state.theta, second.state.theta)


def test_labeled_sets_are_mixed_in(small_world, tmp_path):
    """Table 3: a third of the tasks is labeled; each set is validated beside the variants; with
    --labeled-share 1 there is no corpus."""
    folder, options = small_world
    (tmp_path / "sets").mkdir()
    rows = [(("yes", "no")[i % 2], sentence(i // 30, i % 30)) for i in range(1800)]
    with open(tmp_path / "sets" / "topics.csv", "w", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *rows])
    options = [*options, "--labeled", tmp_path / "sets", "--labeled-clusters", "2"]
    status, said = run_train(folder, *options, "--steps", "10", "--run", "mixed")
    log = log_without_times(folder / "mixed")
    drawn = [variant for line in log for variant in line.get("variants", ())]
    assert status == 0, said
    assert len(drawn) == 20 and 2 <= drawn.count("topics.csv") <= 12
    assert set(log[0]["validation"]["variants"]) == {*PAPER_VARIANTS, "topics.csv"}
    status, said = run_train(folder, *options, "--labeled-share", "1", "--steps", "1",
                             "--corpus", "nowhere", "--run", "labeled")
    assert status == 0, said
    assert log_without_times(folder / "labeled")[1]["variants"] == ["topics.csv"] * 2


@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 128 + signal.SIGTERM),
                                              (signal.SIGALRM, 0)])
def test_a_signal_ends_the_step_and_saves(small_world, monkeypatch, number, expected):
    """SIGTERM, and --max-minutes' SIGALRM with status 0, end the step at work and save; the resumed
    run equals an unbroken one."""
    folder, options = small_world
    options = [*options, "--max-minutes", "9", "--steps", "3"]
    step, name = train.meta_step, f"stopped-{number}"

    def interrupted(*arguments):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        return step(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(train, "meta_step", interrupted)
        status, said = run_train(folder, *options, "--run", name)
    assert status == expected and f"python train.py --resume {name}" in said
    assert run_train(folder, "--resume", name)[0] == 0
    whole = make_run((folder, options), f"whole-{number}")
    whole.train()
    assert log_without_times(whole.folder) == log_without_times(folder / name)


def test_a_full_disk_ends_with_status_2_and_the_run_resumes(small_world):
    """A limit on file sizes stands in for a full disk: one line, nothing torn, and it resumes."""
    run = unfinished(make_run(small_world, "full"))
    run.save()
    whole = (run.folder / "state.pt").read_bytes()
    limit = len(whole) - 1                                              # the log is shorter
    pid = start_train(small_world[0], "--resume", "full", before=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit)))
    assert ended(pid) == 2
    said = (small_world[0] / "said").read_text()
    assert "File too large" in said.splitlines()[-1] and "Traceback" not in said
    assert (run.folder / "state.pt").read_bytes() == whole
    assert not list(run.folder.glob(".*.tmp"))
    assert run_train(small_world[0], "--resume", "full")[0] == 0


def test_a_run_is_resumed_on_what_made_it(small_world):
    """Another corpus or model is refused by name; other code of the method is one warning line;
    another version's settings are refused."""
    run = unfinished(make_run(small_world, "origin"))
    run_folder.check_origin(run.folder, run.made_of)
    with pytest.raises(InputError, match="made with another model than is there now"):
        run_folder.check_origin(run.folder, run.made_of | {"model": "another"})
    unfinished(run, code="another")
    status, said = run_train(small_world[0], "--resume", "origin", "--max-minutes", "0.1")
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "supmer.py, t5.py" in warnings[0]
    unfinished(run, training={"keep_gib": 0})
    status, said = run_train(small_world[0], "--resume", "origin")
    assert status == 2 and "origin/run.json is not a run of this version of train.py" in said


def test_a_run_belongs_to_one_process(small_world):
    """A second process on a run's folder, a finished run and a folder in use are refused."""
    folder = small_world[0]
    run = unfinished(make_run(small_world, "mine"))
    with common.one_process(run.folder):
        status, said = run_train(folder, "--resume", "mine")
    assert status == 2 and "another process works on mine" in said
    for there in ("mine", "corpus.jsonl"):
        status, said = run_train(folder, *small_world[1], "--run", there)
        assert status == 2 and f"{there} exists: name another --run" in said
    unfinished(run, finished=True)
    status, said = run_train(folder, "--resume", "mine")
    assert status == 2 and "mine is finished: start a new run" in said


def test_damaged_states_are_refused(small_world):
    """A truncated state and the state of another run: an InputError that names the file."""
    run = make_run(small_world, "damaged")
    run.step()
    run.save()
    path = run.folder / "state.pt"
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="state.pt is not the state of this run"):
            make_run(small_world, "damaged")
    path.write_bytes(whole)
    with pytest.raises(InputError, match="state.pt is not the state of this run"):
        make_run(small_world, "damaged", prompt_length=5)
