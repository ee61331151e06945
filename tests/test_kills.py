"""Kill any command at any moment: the same command then ends as if nothing had happened.

    python tests/test_kills.py 20       # 20 kills of each command, and a table; minutes
"""

import contextlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import common
import corpus
import eval as evaluation
import download
import hub
import tasks
import train
from conftest import (ANY, COMMIT, OPTIONS, PLANTED, SMALL, V11, contents, ended, forked,
                      outcome_of, rows_of, save_model, serving, write_run, write_world)
from t5 import load_t5
from templates import load_tokenizer


# Each begins in an empty working directory beside the world, or resumes.

def begin_training():
    if not Path("run/run.json").exists():
        train.main([*OPTIONS, "--model", "../small", "--corpus", "../corpus.jsonl", "--run", "run",
                    "--steps", "2", "--save-seconds", "0"])
    elif not common.read_json(Path("run/run.json"))["finished"]:
        train.main(["--resume", "run"])


def begin_store():
    t5 = load_t5("../small")
    tokenizer = load_tokenizer("../small", t5.config)
    corpus.build_store(Path("cache"), [Path("../corpus.jsonl")], tokenizer, t5, 6, 0,
                       model=Path("../small"))


def begin_evaluation():
    evaluation.main([*SMALL, "--data", "../data", "--model", "../small", "--prompt", "vocab",
                     "--out", "out.json"])


def begin_export():
    if not Path("adapter").exists():
        train.main(["--export-peft", "../exported", "adapter"])


def begin_download():
    hub.model_folder(ANY)
    download.locate(tasks.TASKS["kitchen"], "test", "none")


COMMANDS = {    # what begins or resumes it; what must not differ from an unbroken one's
    "meta-training of 2 steps": (
        begin_training, lambda: (outcome_of(Path("run")), contents(Path("run"), ".tmp"))),
    "building a store": (begin_store, lambda: contents(Path("cache"), ".bin", ".npy")),
    "evaluation of two seeds and two rates": (begin_evaluation, lambda: (
        rows_of("out.json"), contents(Path(), ".tmp"), Path("out.md").read_bytes())),
    "export for PEFT": (begin_export, lambda: contents(Path())),
    "download of a model and a task's file": (begin_download, lambda: (
        contents(Path("hub"), "config.json", ".safetensors"), contents(Path("cache"), "test")))}


def survives(name, kills, rng):
    """Kill the command so often, resume it, compare the result with an unbroken run's; once with
    too small a disk (a limit on a file's size) and in a read-only folder, which end with status 2.
    -> equal results, of how many."""
    (begin, result), folder, equal = COMMANDS[name], Path("work").resolve(), []

    def empty():
        os.chdir(folder.parent)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.chdir(folder)

    def resume():
        equal.append(ended(forked(begin)) == 0 and result() == whole)
        empty()

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    def read_only():
        os.getuid() or os.setuid(65534)         # root may write anywhere
    empty()
    began = time.monotonic()
    assert ended(forked(begin)) == 0
    whole, seconds = result(), time.monotonic() - began
    largest = max(map(len, contents(Path()).values()))
    empty()
    while kills:
        pid = forked(begin)
        time.sleep(rng.random() * seconds)
        os.kill(pid, signal.SIGKILL)
        status = ended(pid)
        assert status in (0, -signal.SIGKILL), status
        kills -= status != 0
        if status == 0 or not kills:
            resume()
    assert ended(forked(begin, full)) == 2
    resume()
    folder.chmod(0o555)
    assert ended(forked(begin, read_only)) == 2 and not contents(Path())
    folder.chmod(0o755)
    os.chdir(folder.parent)
    return sum(equal), len(equal)


@contextlib.contextmanager
def prepared(place):
    """The small world, a run and a server in a folder, which becomes the working directory."""
    with pytest.MonkeyPatch.context() as patch, serving(patch, "hub") as server:
        patch.setitem(tasks.TASKS, "planted", PLANTED)
        patch.setattr(corpus, "CHUNK", 256)         # so that a small store is saved in parts, too
        patch.setattr(train, "prepare", lambda _, method, *rest: method)
        patch.chdir(write_world(place))
        place.chmod(0o755)
        write_run("exported", place / "small")
        large = save_model(place / "large", V11._replace(vocab_size=9000, d_model=64))
        model = contents(large, "config.json", "model.safetensors")
        server.repos, server.files = {ANY: {"main": (COMMIT, model)}}, {"/test": bytes(4_000_000)}
        yield


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_resumes(name, tmp_path):
    """Each command, killed at a random moment, on a full disk and in a read-only folder: nothing is
    torn, and the same command ends with what an unbroken one has, bit by bit."""
    with prepared(tmp_path):
        equal, of = survives(name, 1, np.random.default_rng(0))
    assert equal == of


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, prepared(Path(place)):
        print("| command | kills | equal to an unbroken one | of | seconds |")
        print("|---|---|---|---|---|")
        for name in COMMANDS:
            began, kills = time.monotonic(), int(sys.argv[1])
            equal, of = survives(name, kills, np.random.default_rng(0))
            print(f"| {name} | {kills} | {equal} | {of} | {time.monotonic() - began:.0f} |",
                  flush=True)
