"""Damaged and hostile files: each one reads, or ends in one line that names it. Nothing is run."""

import gzip
import json
import lzma
import os
import pickle
import random
import re
import resource
import shutil
import tarfile
import zipfile
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

import prompts
import released
import run_folder
import t5 as T
import train
from common import InputError
from conftest import (Evil, FORMATS, V10, affine_start, ended, forked, make_run, save_shards,
                      released_files, save_model, tar_of, write_model, write_task)
from corpus import open_store
from documents import documents
from own import OwnTable, own_task
from eval import Settings
from download import archive_member
from predict import predict
from supmer import Method, init_state
from tasks import TASKS, read_rows
from templates import load_tokenizer, tokenize

DAMAGES, RETYPED = 56, 30       # of each file; of those that hold JSON
MISFITS = [None, True, -1, 0, 3, 2 ** 40, 10 ** 30, 1e300, float("nan"), "", "x\ny\x1b[2J",
           "\ud800", [], {}, [1], {"a": 1}, [[[]]], "long " * 999]
VALUE = re.compile(rb'(\\?"[^"\\]*\\?"|[\w.+-]+|\[[^][]*\]|\{[^{}]*\})(?=\s*[],}\n])')  # no key
THETA = torch.ones(4, 16)
TABLES = ("sst5", "rte", "cb", "restaurants", "kitchen")    # .csv, .tsv, .jsonl, .txt, a pickle


READ = {
    "model/*": lambda path: T.load_t5(path.parent),
    "shards/*.json": lambda path: T.load_t5(path.parent),
    "words/tokenizer.json": lambda path: tokenize(load_tokenizer(
        path, V10._replace(vocab_size=16)), ["a b <extra_id_0> zz", "", "\u65e5 \0"]),
    "prompt.safetensors": lambda path: prompts.load_prompt(path, 8),
    "peft/*": lambda path: prompts.load_prompt(path.parent, 8),
    "theirs/*": lambda path: prompts.load_prompt(path.parent, 8),
    "text/*": lambda path: sum(len("".join(texts)) for texts in documents(path)),
    "CB.*": lambda path: archive_member(path, "superglue/CB/val.jsonl"),
    "own.csv": lambda path: own_task(path, OwnTable(), "{text} <X>"),
    **{TASKS[name].train: partial(read_rows, task=TASKS[name]) for name in TABLES},
    "run/state.pt": lambda path: run_folder.load_state(path.parent, init_state(THETA, Method())),
    "run/run.json": lambda path: (run_folder.check_origin(path.parent, {"absent": None}),
                                  run_folder.own_settings(path.parent, train.Training, Method)),
    "run/log.jsonl": lambda path: run_folder.read_log(path.parent),
    "store/[mbcft]*": lambda path: open_store(path.parent),
    "a.tuned": lambda path: predict(Settings(
        model=str(path.with_name("small")), prompt=(str(path),), device="cpu",
        predict=str(path.with_name("new.txt")), out=str(path.with_name("out")))),
}


def readers(folder):
    """{file of READ in the folder: how it is read}"""
    return {path: READ[pattern] for pattern in READ for path in sorted(folder.glob(pattern))}


@pytest.fixture(scope="module")
def valid(tmp_path_factory, small_world):
    """A folder of valid files -> {path: how it is read}; the authors' prompts are of width 8."""
    x, world = tmp_path_factory.mktemp("valid"), small_world[0]
    save_model(x / "model", V10)
    save_shards(x / "shards", V10)
    write_model(x / "words", ["a", "b", "c"])
    prompts.save_prompt(x / "prompt.safetensors", torch.ones(3, 8), affine_start(8), {"model": "m"})
    prompts.save_peft(x / "peft", torch.ones(3, 8), V10, "m")
    released_files(x / "theirs", "ours", 8)
    (x / "text").mkdir()
    texts = [f"It rained {i}. We left." for i in range(30)]
    lines = "".join(json.dumps({"text": text, "paragraphs": [text]}) + "\n" for text in texts)
    (x / "text/a.txt").write_text("\n\n".join(texts))
    (x / "text/a.jsonl").write_text(lines)
    (x / "text/a.json.gz").write_bytes(gzip.compress(lines.encode()))
    inner = [tar_of({"1.txt": text.encode()}) for text in texts[:2]]    # as OpenWebText's are
    (x / "text/a.tar").write_bytes(tar_of(dict(zip(("a.xz", "b.xz"), map(lzma.compress, inner)))))
    (x / "text/a.tar.xz").write_bytes(lzma.compress(tar_of({"a.txt": b"Rain.\n\nSun."})))
    with zipfile.ZipFile(x / "CB.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("CB/val.jsonl", b"text " * 99)
    (x / "CB.tar").write_bytes(tar_of({"CB/x": b"1", "CB/val.jsonl": b"text " * 99}))
    (x / "own.csv").write_text("label;text\n0;bad\n1;good\n1;fine\n")
    for name in TABLES:
        write_task(x, name, FORMATS[name][0])
    run = make_run(small_world, "damaged")
    run.step()
    run.save()
    run_folder.write_run(run.folder, run_folder.new_run([], run.training, run.method, run.made_of))
    shutil.copytree(run.folder, x / "run")
    shutil.copytree(world / "small", x / "small")
    shutil.copytree(world / run.sources[0][1].store.folder, x / "store")
    about = {"task": TASKS["movie"]._replace(words=("A", "B"))._asdict(), "baseline": "learned",
             "model": "m", "model_sha256": T.model_fingerprint(x / "small")}
    save_file({"theta": THETA}, x / "a.tuned", {"result": json.dumps(about)})
    (x / "new.txt").write_text("a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(released, "RELEASED", {(8, 16): "ours"})
        yield readers(x)


def damaged(path, whole, rng):
    """A file empty, cut, with bytes flipped, inserted, lost, zeroed, random; its JSON retyped."""
    yield b""
    for k in range(DAMAGES):
        i, j = sorted(rng.randrange(len(whole) + 1) for _ in "ij")
        j = min(j, i + 9) if rng.random() < 0.5 else j
        head, tail, bits = whole[:i], whole[j:], bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
        middle = (bytes(j - i), rng.randbytes(j - i), rng.randbytes(5) + whole[i:j], b"")[k % 4]
        yield (head, bytes(bits), head + middle + tail)[k % 3]
    packed = path.suffix in (".safetensors", ".tuned")
    end = 8 + int.from_bytes(whole[:8], "little") if packed else len(whole)
    text = whole[8 * packed:end]
    for _ in range(RETYPED if packed or path.suffix in (".json", ".jsonl") else 0):
        i, j = rng.choice(list(VALUE.finditer(text))).span()
        value = json.dumps(rng.choice(MISFITS)).encode()
        value = value.replace(b'"', b'\\"') if path.suffix == ".tuned" else value
        changed = text[:i] + value + text[j:]
        yield len(changed).to_bytes(8, "little") + changed + whole[end:] if packed else changed


def test_a_damaged_file_reads_or_is_refused_in_one_line(valid):
    """2,000 damaged files: each reads, or ends in one printable InputError that names it."""
    count, faults = 0, []
    for path, read in valid.items():
        read(path)
        whole = path.read_bytes()
        for content in damaged(path, whole, random.Random(path.name)):
            path.write_bytes(content)
            count += 1
            try:
                read(path)
            except InputError as error:
                line = str(error)
                named = path.name in line or path.parent.name in line
                faults += [line] * (not named or not line.isprintable() or len(line) >= 4100)
            except Exception as error:      # which a user would see as a traceback
                faults.append(f"{path}: {error!r} {content[:300]}")
        path.write_bytes(whole)
    assert not faults, "\n".join([str(len(faults)), *faults[:20]])
    assert count >= 2000 and len(valid) > len(READ)


def test_nothing_in_a_pickle_is_run(valid, tmp_path):
    """A pickle that would create a file, also in a store's array, is refused and creates none."""
    def save_array(value, file):
        np.save(file, np.array(value, dtype=object), allow_pickle=True)
    evil = Evil(tmp_path / "executed")
    pickles = [path for path in valid
               if path.suffix in (".pt", ".npy") or path.match("kitchen/train")]
    for path, dump, value in product(pickles, (torch.save, pickle.dump, save_array),
                                     (evil, {"theta": evil}, ([evil], [0]))):
        whole = path.read_bytes()
        with open(path, "wb") as file:
            dump(value, file)
        with pytest.raises(InputError, match=path.parent.name):
            valid[path](path)
        path.write_bytes(whole)
    assert len(pickles) == 6 and not (tmp_path / "executed").exists()


def tar_with(kind, size=0):
    """A tar whose only member is not a plain file."""
    entry = tarfile.TarInfo("CB/val.jsonl")
    entry.type, entry.linkname, entry.size = kind, "/etc/passwd", size
    return entry.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)


@pytest.mark.parametrize("reader", ["CB.*", "text/*"])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, reader):
    """Whether the tar should hold a task's file or text: only plain files are read."""
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        (tmp_path / "a.tar").write_bytes(tar_with(kind))
        with pytest.raises(InputError, match="a.tar"):
            READ[reader](tmp_path / "a.tar")


def test_memory_is_bounded_whatever_a_file_claims(valid, tmp_path):
    """What unpacks to more than it is, or claims more, is refused within 400 MB more memory."""
    x = tmp_path
    (x / "text").mkdir()
    (x / "line.txt").write_bytes(b"a" * 2 ** 27)
    (x / "text/line.jsonl").write_bytes(b'{"text": "' + b"a" * 2 ** 27)
    (x / "text/spaces.jsonl.gz").write_bytes(gzip.compress(b" " * 2 ** 24, 1) * 64)
    (x / "text/header.tar").write_bytes(tar_with(tarfile.XHDTYPE, 1 << 29))
    os.truncate(x / "text/header.tar", 1 << 30)
    prompts.save_peft(x / "peft", torch.ones(3, 8), V10, "m")
    os.truncate(x / "peft/adapter_config.json", 1 << 40)
    save_model(x / "model", V10, d_model=2 ** 20 - 1, vocab_size=2 ** 20 - 1)
    save_model(x / "shards", V10, num_layers=2 ** 20 - 1)
    released_files(x / "theirs", "ours", 8)
    claim = save({"theta": torch.ones(3, 8)}, {"": "x" * 12}).replace(b"x" * 12, b"")
    (x / "prompt.safetensors").write_bytes(claim.replace(b"[3,8]", b"[3" + b"0" * 12 + b",8]"))
    torch.save(torch.ones(1).as_strided((2 ** 40, 8), (0, 0)), x / "theirs/prompt_ours.pt")

    def limited():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 400_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def work():
        assert READ["text/*"](x / "line.txt") == 2 ** 27
        for path, read in readers(x).items():
            with pytest.raises(InputError, match=path.parent.name) as caught:
                read(path)
            assert not re.search("MemoryError|insufficient", str(caught.value))
    assert len(readers(x)) == 11 and ended(forked(work, limited)) == 0
