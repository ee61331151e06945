"""Kill any command at any moment: the same command then ends as if nothing had happened.

    KILLS=20 pytest tests/test_kills.py     # 20 kills of each command instead of one; minutes
"""

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import common
import corpus
import download
import eval as evaluation
import hub as hubs
import train
from conftest import (ANY, COMMIT, OPTIONS, SMALL, V11, contents, ended, forked, outcome_of,
                      rows_of, save_model, write_run)
from t5 import load_t5
from tasks import TASKS
from templates import load_tokenizer


# Each begins in an empty folder beside the world, or resumes.
def begin_training():
    if not Path("run/run.json").exists():
        train.main([*OPTIONS, "--model", "../small", "--corpus", "../corpus.jsonl", "--run", "run",
                    "--steps", "2", "--save-seconds", "0"])
    elif not common.read_json(Path("run/run.json"))["finished"]:
        train.main(["--resume", "run"])


def begin_store():
    model = Path("../small")
    t5 = load_t5(model)
    corpus.build_store("cache", [Path("../corpus.jsonl")], load_tokenizer(model, t5.config), t5,
                       6, 0, model=model)


def begin_evaluation():
    evaluation.main([*SMALL, "--data", "../data", "--model", "../small", "--prompt", "vocab",
                     "--out", "out.json"])


def begin_export():
    if not Path("adapter").exists():
        train.main(["--export-peft", "../exported", "adapter"])


def begin_download():
    hubs.model_folder(ANY)
    download.locate(TASKS["kitchen"], "test", "none")


COMMANDS = {    # what begins or resumes it; what must not differ from an unbroken one's
    "train": (begin_training, lambda: (outcome_of(Path("run")), contents(Path("run"), ".tmp"))),
    "store": (begin_store, lambda: contents(Path("cache"), ".bin", ".npy")),
    "eval": (begin_evaluation, lambda: (rows_of("out.json"), contents(Path(), ".tmp"),
                                        Path("out.md").read_bytes())),
    "export": (begin_export, lambda: contents(Path())),
    "download": (begin_download, lambda: contents(Path(), "config.json", ".safetensors", "test"))}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_resumes(name, place, hub, monkeypatch):
    """Killed, on a full disk (status 2, as where it may not write): it ends as an unbroken one."""
    monkeypatch.setattr(corpus, "CHUNK", 256)       # so that a small store is saved in parts, too
    monkeypatch.setattr(train, "prepare", lambda _, method, *rest: method)
    write_run("exported", place / "small")
    large = save_model(place / "large", V11._replace(vocab_size=9000, d_model=64))
    model = contents(large, "config.json", "model.safetensors")
    hub.repos, hub.files = {ANY: {"main": (COMMIT, model)}}, {"/test": bytes(4_000_000)}
    (begin, result), folder = COMMANDS[name], place / "work"

    def empty():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        monkeypatch.chdir(folder)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    def read_only():
        os.getuid() or os.setuid(65534)             # root may write anywhere

    empty()
    began = time.monotonic()
    assert ended(forked(begin)) == 0
    whole, seconds = result(), time.monotonic() - began
    largest = max(map(len, contents(Path()).values()))
    rng, kills = np.random.default_rng(0), int(os.environ.get("KILLS", 1))
    empty()
    while kills:
        pid = forked(begin)
        time.sleep(rng.random() * seconds)
        os.kill(pid, signal.SIGKILL)
        status = ended(pid)
        assert status in (0, -signal.SIGKILL)
        kills -= status != 0
        if status == 0 or not kills:
            assert ended(forked(begin)) == 0 and result() == whole
            empty()
    assert ended(forked(begin, full)) == 2
    assert ended(forked(begin)) == 0 and result() == whole
    empty()
    place.chmod(0o755)
    folder.chmod(0o555)
    assert ended(forked(begin, read_only)) == 2 and not contents(Path())
    folder.chmod(0o755)
