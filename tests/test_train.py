"""Tests of train."""

import common
import contextlib
import csv
import estimate
import json
import math
import multiprocessing
import os
import prompts
import pytest
import signal
import socket
import studies
import sys
import time
import torch
import train
from common import InputError
from data import VARIANTS
from dataclasses import asdict, replace
from safetensors.torch import load_file
from conftest import HERE, log_without_times, make_run, sentence


@pytest.fixture(scope="session", autouse=True)
def counted_once():
    """Every train.main() counts a micro-batch's memory operation by operation, which takes most of
    a second whatever the model: here the same shape, texts and method are counted once."""
    count, counted = estimate.micro_batch_bytes, {}

    def once(config, training, method):
        key = (config, training.dtype, training.prompt_length, training.max_tokens,
               replace(method, steps=0))
        if key not in counted:
            counted[key] = count(config, training, method)
        return counted[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "micro_batch_bytes", once)
        yield


AS_A_SCRIPT = """import os, resource, runpy, sys
os.dup2(out.fileno(), 1)
os.dup2(err.fileno(), 2)
sys.stdout = open(1, "w", closefd=False)        # the old one takes it for the file that it was
os.chdir(folder)
os.environ.update(environment)
resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
sys.argv = argv
runpy.run_path(argv[0], run_name="__main__")"""


class Started:
    """train.py in a process of its own, as subprocess.Popen has it. It is forked from a process
    that imported train, and what torch imports when it differentiates, once: a new Python would
    take seconds for that each time."""

    def __init__(self, folder, *options, environment=(), file_size=-1):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pytest", "train", "torch._dynamo"])
        (self.out, out), (self.err, err) = context.Pipe(False), context.Pipe(False)
        names = {"argv": [str(HERE / "train.py"), *map(str, options)], "folder": str(folder),
                 "out": out, "err": err, "environment": environment, "file_size": file_size}
        with contextlib.chdir(HERE):            # where the first one to be started finds train
            self.process = context.Process(target=exec, args=(AS_A_SCRIPT, names))
            self.process.start()
        out.close()
        err.close()

    @property
    def returncode(self):
        return self.process.exitcode

    def end(self, number=None):
        """Send it a signal, if one is given, and wait -> what it wrote to stdout and stderr."""
        if number:
            os.kill(self.process.pid, number)
        self.process.join(60)
        assert self.returncode is not None, "it hangs"
        said = []
        for end in (self.out, self.err):
            with open(os.dup(end.fileno())) as file:
                said.append(file.read())
            end.close()
        return said


def wait_for_steps(run, steps, process):
    """Until the run's log has so many steps, or the process ended."""
    deadline = time.monotonic() + 60
    while process.returncode is None and time.monotonic() < deadline:
        if (run / "log.jsonl").exists() and (run / "log.jsonl").read_text().count(
            '"query_loss"'
        ) >= steps:
            return
        time.sleep(0.002)


def test_a_killed_run_goes_on_bit_by_bit(small_world, monkeypatch, capsys):
    """Ctrl-C, --resume, kill -9, --resume: theta, phi, s, optimizer states, prompt and log lines
    equal an unbroken run's.
    """
    folder, options = small_world
    broken = Started(folder, *options, "--run", "broken", "--save-seconds", "0")
    wait_for_steps(folder / "broken", 1, broken)
    said, _ = broken.end(signal.SIGINT)
    assert broken.returncode == 130 and "python train.py --resume broken" in said
    done = len([line for line in log_without_times(folder / "broken") if "query_loss" in line])
    assert done < 6, "the interrupt came too late to show anything"
    killed = Started(folder, "--resume", "broken")
    wait_for_steps(folder / "broken", done + 1, killed)
    killed.end(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, "the kill came too late to show anything"
    resumed = Started(folder, "--resume", "broken")
    code, said = run_train(folder, monkeypatch, capsys, *options, "--run", "unbroken")
    assert code == 0, said
    _, said = resumed.end()
    assert resumed.returncode == 0, said
    for name in ("state.safetensors", "prompt.safetensors"):
        first, second = (load_file(folder / run / name) for run in ("unbroken", "broken"))
        assert set(first) == set(second) and all(
            torch.equal(first[key], second[key]) for key in first
        ), name
    assert any(
        key.startswith("adam.phi.A.exp_avg")
        for key in load_file(folder / "broken" / "state.safetensors")
    )
    assert log_without_times(folder / "unbroken") == log_without_times(folder / "broken")
    assert json.loads((folder / "broken" / "run.json").read_text())["finished"]
    assert not list(folder.glob("broken/.*"))


def test_a_rank_that_dies_ends_all_and_any_number_goes_on(small_world, tmp_path):
    """Two processes share a step of one task; when one is killed the other says so and ends with
    status 2. One process goes on, and in the end has, bit by bit, what one process has that was
    never stopped: the number of ranks changes nothing."""
    folder, options = small_world
    options = [*options, "--steps", "5", "--tasks", "1", "--micro-tokens", "1",
               "--save-seconds", "0"]
    unfinished_run((folder, options), "shared")
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    ranks = [Started(folder, "--resume", "shared", environment={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
        "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}) for rank in range(2)]
    wait_for_steps(folder / "shared", 2, ranks[0])
    ranks[1].end(signal.SIGKILL)
    _, said = ranks[0].end()
    assert ranks[0].returncode == 2 and "Traceback" not in said
    assert "error: rank 0: another rank ended" in said.splitlines()[-1]
    done = json.loads((folder / "shared" / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert done < 5, "the kill came too late to show anything"
    run = make_run((folder, options), "shared")
    run.train()
    alone = make_run((folder, options), "one rank")
    alone.train()
    first, second = (train.state_tensors(run.state) for run in (run, alone))
    assert all(torch.equal(first[name], second[name]) for name in first) and run.state.step == 5
    assert log_without_times(folder / "shared") == log_without_times(folder / "one rank")


def test_a_run_belongs_to_one_process(small_world, monkeypatch, capsys):
    """A second process on a run's folder is refused, with the id of the first."""
    folder, options = small_world
    code, _ = run_train(folder, monkeypatch, capsys, *options, "--steps", "1", "--run", "mine")
    assert code == 0
    code, said = run_train(folder, monkeypatch, capsys, "--resume", "mine")
    assert code == 2 and "mine is finished already: start a new run" in said
    for there in ("mine", "corpus.jsonl"):
        code, said = run_train(folder, monkeypatch, capsys, *options, "--run", there)
        assert code == 2 and f"{there} exists: name another --run" in said
    train.write_run(folder / "mine", common.read_run(folder / "mine") | {"finished": False})
    with common.lock(folder / "mine" / "lock", lambda owner: pytest.fail("nobody has it")):
        code, said = run_train(folder, monkeypatch, capsys, "--resume", "mine")
    assert code == 2 and f"mine: process {os.getpid()} is at work on this run" in said


def test_labeled_sets_are_mixed_in(small_world, tmp_path, monkeypatch, capsys):
    """Table 3: a third of the tasks is labeled and has a partner of its set; each set is validated
    beside the variants; with --labeled-share 1 there is no corpus. Resumed bit by bit."""
    folder, options = small_world
    (tmp_path / "sets").mkdir()
    rows = [(("yes", "no")[i % 2], sentence(i // 30, i % 30)) for i in range(1800)]
    with open(tmp_path / "sets" / "topics.csv", "w", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *rows])
    options = [*options, "--labeled", tmp_path / "sets", "--labeled-clusters", "2"]
    code, _ = run_train(folder, monkeypatch, capsys, *options, "--steps", "10", "--run", "mixed")
    log = log_without_times(folder / "mixed")
    variants = [variant for line in log for variant in line.get("variants", ())]
    assert code == 0 and len(variants) == 20 and 2 <= variants.count("topics.csv") <= 12
    assert set(log[0]["validation"]["variants"]) == {*VARIANTS, "topics.csv"}
    (folder / "mixed" / "state.safetensors").unlink()
    train.write_run(folder / "mixed", common.read_run(folder / "mixed") | {"finished": False})
    assert run_train(folder, monkeypatch, capsys, "--resume", "mixed")[0] == 0
    assert log_without_times(folder / "mixed") == log
    code, _ = run_train(folder, monkeypatch, capsys, *options, "--labeled-share", "1", "--steps",
                        "1", "--corpus", "nowhere", "--run", "labeled")
    log = log_without_times(folder / "labeled")
    assert code == 0 and [line["variants"] for line in log if "s" in line] == [["topics.csv"] * 2]
    made = common.read_run(folder / "labeled")
    assert "corpus" in made["made_of"]
    assert [*made["versions"]] == ["python", "torch", "numpy", "tokenizers", "safetensors"]
    assert (made["processes"], made["threads"]) == (1, torch.get_num_threads())


def test_a_log_becomes_a_picture(small_world, monkeypatch, capsys):
    """--plot draws what is there, of a run that is still at work as well: its last line is torn."""
    pytest.importorskip("matplotlib")
    folder, _ = small_world
    run = make_run(small_world, "drawn")
    train.write_run(run.folder, {"training": {}, "method": {}, "finished": False, "ended": None})
    run.step()
    with open(run.folder / "log.jsonl", "a") as file:
        file.write('{"step": 2, "s"')
    assert train.main(["--plot", str(run.folder)]) == 0
    assert str(run.folder / "log.png") in capsys.readouterr().out
    assert (run.folder / "log.png").read_bytes().startswith(b"\x89PNG")
    for line in ('{"step": 1, "s": "x"}', '{"step": 1, "validation": 3}', '{"step": 1, "b": 1}',
                 '{"step": "one"}'):
        (run.folder / "log.jsonl").write_text(line + "\n")
        with pytest.raises(common.InputError, match="log.jsonl"):
            studies.plot(run.folder)


def unfinished_run(small_world, name):
    """The same, with the run.json by which it is resumed."""
    run = make_run(small_world, name)
    train.write_run(run.folder, {
        "name": "supmer", "training": asdict(run.training), "method": asdict(run.method),
        "made_of": run.made_of, "finished": False, "ended": None})
    return run


def test_what_came_after_the_last_save_is_replayed_exactly(small_world):
    """Steps whose state was never saved, and a torn log line, leave no trace: the resumed run
    repeats them bit by bit.
    """
    first = make_run(small_world, "replayed")
    entries = [first.step() for _ in range(3)]
    first.log.write('{"step": 4, "torn')
    first.log.close()
    second = make_run(small_world, "replayed")
    assert second.state.step == 0 and len(log_without_times(second.folder)) == 1
    again = [second.step() for _ in range(3)]
    assert [{**e, "time": 0} for e in entries] == [{**e, "time": 0} for e in again]
    assert torch.equal(first.state.theta, second.state.theta)


@pytest.mark.parametrize("method", ["ppt", "supmer"])
def test_a_run_without_a_regularizer_is_resumed_as_well(small_world, method):
    """phi is never stepped there, so Adam has nothing of it to save: the state is read all the
    same, and the next step is that of a run that went on.
    """
    def begin():
        run = make_run(small_world, f"plain-{method}", method=method)
        run.method = replace(run.method, regularizer="none")
        return run
    first = begin()
    first.step()
    first.save()
    second = begin()
    assert second.state.step == 1
    ours, theirs = first.step(), second.step()
    assert {**ours, "time": 0} == {**theirs, "time": 0}
    assert torch.equal(first.state.theta, second.state.theta)


def test_each_step_is_logged_with_what_explains_it(small_world):
    """A line a step has losses, s, b, lambda, the step's size, the second-order share, gate, phi's
    two gradients, |A - I|.
    """
    run = make_run(small_world, "logged")
    run.step()
    run.step()
    line = log_without_times(run.folder)[-1]
    assert set(line) == {
        "step",
        "variants",
        "s",
        "b",
        "lambda",
        "theta_gradient",
        "A_minus_I",
        "support_loss",
        "query_loss",
        "gate_loss",
        "step_size",
        "second_order",
        "gate_mean",
        "phi_gradient_meta",
        "phi_gradient_gate",
    }
    assert (
        line["step"] == 2 and line["step_size"] == pytest.approx(0.05, rel=1e-3) and line["b"] > 0
    )
    first = log_without_times(run.folder)[1]
    assert first["b"] == 0 and first["lambda"] == [0.0, 0.0]
    validation = log_without_times(run.folder)[0]["validation"]
    assert set(validation["variants"]) == set(VARIANTS) and validation["queries"] == 20


def test_the_lowest_validation_loss_is_kept(small_world, monkeypatch):
    """prompt.safetensors holds theta and phi of the validation with the lowest loss after
    adaptation, and says which step.
    """
    run, losses = make_run(small_world, "kept"), iter([0.5, 0.7])
    result = {"loss_before": 9.0, "step_size": 0.05, "queries": 1, "variants": {}}
    monkeypatch.setattr(train, "validate", lambda *_: result | {"loss": next(losses)})
    run.step()
    run.validate()
    kept = run.state.theta.clone()
    run.step()
    run.validate()
    theta, phi, about = prompts.load_prompt(run.folder / "prompt.safetensors", 16)
    assert (
        torch.equal(theta, kept) and about["step"] == "1" and about["validation_loss"] == "0.500000"
    )
    assert not torch.equal(theta, run.state.theta) and set(phi) == {"A", "a", "W", "c"}


def test_an_inner_step_without_effect_is_told(small_world, monkeypatch, capsys):
    """A drop under 1e-4 of the loss is reported with the size of the step and the options that
    help.
    """
    run = make_run(small_world, "warned")
    result = {"loss_before": 1.0, "loss": 0.99995, "step_size": 2e-6, "queries": 1, "variants": {}}
    monkeypatch.setattr(train, "validate", lambda *_: result)
    run.validate()
    said = capsys.readouterr()
    assert "2.0e-06" in said.out + said.err and "--relative-step" in said.out + said.err


def run_train(folder, monkeypatch, capsys, *argv):
    """train.py's main() as its script calls it, in this process -> (exit status, the last line on
    stderr)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        common.run_script(train.main, "stopped")
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return ended.value.code, ("\n" + said.err.strip()).splitlines()[-1]


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--inner-rate", "inf"], "--inner-rate inf: it must be more than 0, and 1e+30 at most"),
        (["--prompt-rate", "1e38"], "--prompt-rate 1e+38: it must be 0 or more, and 1e+30 at most"),
        (["--tasks", "0"], "--tasks 0: it must be more than 0"),
        (["--seed", "-1"], "--seed -1: it must be 0 or more"),
        (["--dtype", "float16"], "--dtype float16: choose float32 or bfloat16"),
        (["--device", "nonsense"], "--device nonsense: choose auto, cpu, cuda or"),
        (["--device", "meta"], "--device meta: choose auto, cpu, cuda or"),
        (["--device", ""], "--device : choose auto, cpu, cuda or"),
        (["--device", "cuda:99"], "--device cuda:99 is not to be had here"),
        (["--prompt-length", "10001"], "--prompt-length 10001: it must be more than 0, and 10,000"),
        (["--max-tokens", "1" + 20 * "0"], "and 100,000 at most"),
        (["--corpus", ""], "--corpus '': it is empty"),
        (["--resume", "nowhere"], "nowhere holds no run"),
        (["--resume", "nowhere", "--steps", "3"], "nothing but --yes"),
        (["--model", "no-such-folder"], "no-such-folder"),
    ],
)
def test_mistakes_on_the_command_line_end_with_status_2(
    small_world, monkeypatch, capsys, argv, says
):
    """Each mistake: one line that says what was wrong, no traceback, exit status 2."""
    status, line = run_train(small_world[0], monkeypatch, capsys, *argv)
    assert status == 2 and says in line, line


@pytest.mark.parametrize(
    "options, says",
    [
        (["--corpus", "empty"], "no text there"),
        (["--corpus", "nowhere"], "nowhere does not exist"),
        (["--clusters", "5000"], "fewer clusters"),
        (["--support", "5000"], "give more data, or ask for fewer clusters"),
        (["--labeled", "empty"], "--labeled empty: no folder with .csv"),
        (["--labeled-share", "1.5"], "it must be 1 at most"),
        (["--relative-step", "0", "--inner-rate", "1e29"], "not finite"),
    ],
)
def test_input_that_cannot_work_ends_with_status_2(small_world, monkeypatch, capsys, options, says):
    """An empty corpus, too few sentences, an inner rate that overflows: one line that says what to
    do.
    """
    folder, defaults = small_world
    (folder / "empty").mkdir(exist_ok=True)
    status, line = run_train(folder, monkeypatch, capsys, *defaults, *options)
    assert status == 2 and says in line, line


def test_a_full_disk_ends_with_status_2_and_the_run_can_be_resumed(
        small_world, monkeypatch, capsys):
    """A limit on file sizes stands in for a full disk: one line, nothing half-written, and the run
    goes on later.
    """
    folder, options = small_world
    run = unfinished_run((folder, [*options, "--save-seconds", "0"]), "full")
    run.step()
    run.save()
    size = (run.folder / "state.safetensors").stat().st_size            # the log is half as long
    ended = Started(folder, "--resume", "full", file_size=size - 1)
    _, said = ended.end()
    assert ended.returncode == 2 and "Traceback" not in said, said
    assert "File too large" in said.strip().splitlines()[-1]
    assert not list(run.folder.glob(".*.tmp"))
    code, said = run_train(folder, monkeypatch, capsys, "--resume", "full")
    assert code == 0, said


def test_a_run_is_not_resumed_on_other_data(small_world):
    """run.json keeps what the run is made of; another corpus, model, tokenizer or option is refused
    by name.
    """
    folder, _ = small_world
    train.write_run(folder, {"name": "supmer", "training": {}, "method": {}, "finished": False,
                            "ended": None, "made_of": {"corpus": "a", "model": "b"}})
    train.check_origin(folder, {"corpus": "a", "model": "b"})
    with pytest.raises(InputError, match="made with another model than is there now"):
        train.check_origin(folder, {"corpus": "a", "model": "c"})


def test_a_validation_that_is_not_finite_stops_the_run(small_world, monkeypatch):
    """NaN compares as neither lower nor higher: it must not pass for a finished run without a
    prompt.
    """
    run = make_run(small_world, "nan")
    monkeypatch.setattr(
        train, "validate", lambda *_: {"loss_before": 1.0, "loss": math.nan, "step_size": 0.1}
    )
    with pytest.raises(InputError, match="validation loss is nan"):
        run.validate()


def test_damaged_states_are_refused(small_world):
    """A truncated state, a state of other shapes, a run.json that is none: InputError naming the
    file.
    """
    run = make_run(small_world, "damaged")
    run.step()
    run.save()
    path = run.folder / "state.safetensors"
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="state.safetensors cannot be resumed from"):
            make_run(small_world, "damaged")
    path.write_bytes(whole)
    with pytest.raises(InputError, match="state.safetensors cannot be resumed from"):
        make_run(small_world, "damaged", prompt_length=5)
    (run.folder / "run.json").write_text("{}")
    with pytest.raises(InputError, match="holds no run"):
        common.read_run(run.folder)


def test_max_minutes_ends_a_run_that_can_go_on(small_world, monkeypatch, capsys):
    """--max-minutes stops after the step in which the time is over, with status 0 and the command
    to go on; going on gives the run that was never stopped. Over before the first step it is a
    Ctrl-C."""
    folder, defaults = small_world
    monkeypatch.chdir(folder)
    assert train.main([*defaults, "--run", "whole"]) == 0
    with pytest.raises(KeyboardInterrupt):
        train.main([*defaults, "--run", "none", "--max-minutes", "1e-9"])
    step = train.meta_step

    def slow(*arguments):                                   # the time is over within this one
        signal.setitimer(signal.ITIMER_REAL, 1e-6)
        time.sleep(0.01)
        return step(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(train, "meta_step", slow)
        assert train.main([*defaults, "--run", "short", "--max-minutes", "9"]) == 0
    said = capsys.readouterr().out
    assert "stopped after step 1, nothing is lost" in said and "--resume short" in said
    assert train.main(["--resume", "short", "--max-minutes", "9"]) == 0
    assert log_without_times(folder / "short") == log_without_times(folder / "whole")
    with pytest.raises(InputError, match="--max-minutes 0.0: it must be more than 0"):
        train.main([*defaults, "--max-minutes", "0"])
