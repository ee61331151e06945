"""Tests of damage."""

import ast
import common
import corpus as corpus_module
import data
import eval as evaluation
import gzip
import hub as hubs
import io
import json
import math
import numpy as np
import os
import pickle
import predict
import prompts
import pytest
import re
import resource
import safetensors.torch
import shutil
import supmer
import t5 as T
import tarfile
import tasks
import torch
import train
import zipfile
from common import InputError
from corpus import documents
from data import TaskIndex, load_tokenizer
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from safetensors.torch import save_file
from t5 import load_t5
from tasks import TASKS
from types import SimpleNamespace
from conftest import (Evil, FORMATS, HERE, V10, affine_start, ended, forked, make_run, openwebtext_tar, released_files, save_model, save_shards, tar_of,
    variants, write_model, write_task, zip_of)


# ------------------------------------------- damaged inputs: one line, which file, what to do then

REMEDY = re.compile(r"fetch it |[Tt]ake |delete|[Gg]ive |mend|drop|put|start a new run|do not use"
                    r"|use another|is missing|export it again|name a |do not fit|[Tt]ry |must ")


def damages(whole, n, seed=0):
    """n damaged versions of some bytes: cut, bits flipped, a part zeroed, doubled, lost, random, or
    alone."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        way, b = rng.integers(7), bytearray(whole)
        i, j = sorted(rng.integers(0, len(b) + 1, 2))
        j = min(j, i + 9) if rng.random() < 0.5 else j
        if way == 1:
            for place in rng.integers(0, len(b), rng.integers(1, 5)):
                b[place] ^= 1 << int(rng.integers(8))
        else:
            b[i:j] = (b"", b"", bytes(j - i), b[i:j] * 2, b"", rng.bytes(j - i), b[i:j])[way]
            b = (b[:i], b, b, b, b, b, b[i:j])[way]
        yield bytes(b)


def tries(path, call, content=damages, n=16):
    """A family's member: (file, call, its contents to try), of the file as it is."""
    whole = path.read_bytes()
    return path, call, [*(variants(json.loads(whole)) if content is variants else
                          content(whole, n) if whole else [])], whole


def of_weights(folder, _):
    """model.safetensors, also with anything in its header; its index; config.json."""
    model, sharded = save_model(folder / "m", V10), save_shards(folder / "s", V10)
    whole = (model / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    first = next(iter(header))
    headers = []
    for text in variants({first: header[first]}):
        changed = json.loads(text) if text[1:2] != b"[" else None
        text = json.dumps(header | changed).encode() if isinstance(changed, dict) else text
        headers.append(len(text).to_bytes(8, "little") + text + whole[end:])
    path, call, contents, _ = tries(model / "model.safetensors", lambda: load_t5(model))
    yield path, call, contents + headers, whole
    yield tries(model / "config.json", lambda: load_t5(model), variants)
    yield tries(model / "config.json", lambda: load_t5(model))
    for content in (damages, variants):
        yield tries(sharded / T.INDEX, lambda: load_t5(sharded), content)


def of_tokenizers(folder, _):
    """tokenizer.json, of one piece a word."""
    model, _ = write_model(folder / "m", ["a", "b", "c"])

    def call():
        tokenizer = load_tokenizer(model, SimpleNamespace(vocab_size=16))
        found = data.tokenize(tokenizer, ["a b <extra_id_0> zz", "", "\u65e5 \0"])
        assert all(id < 16 for ids in found for id in ids)
    for content in (damages, variants):
        yield tries(model / "tokenizer.json", call, content)


def of_corpora(folder, _):
    """Each format, and what a JSON line may hold."""
    texts = [f"It rained {i}. We left." for i in range(30)]
    (folder / "a.txt").write_text("\n\n".join(texts))
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress((folder / "b.jsonl").read_bytes()))
    openwebtext_tar(folder / "d.tar", [[text.encode() for text in texts[:5]], [b"x"]])
    with tarfile.open(folder / "e.tar.xz", "w:xz") as packed:
        packed.add(folder / "a.txt", "a.txt")
    for path in sorted(folder.iterdir()):
        yield tries(path, lambda path=path: list(documents(path)))
    (folder / "f.jsonl").write_text('{"text": "a", "paragraphs": ["a", "b"]}')
    yield tries(folder / "f.jsonl", lambda: list(documents(folder / "f.jsonl")), variants)


def of_tasks(folder, _):
    """Every data set's format, a pickle in each protocol."""
    _, tokenizer = write_model(folder / "m", ["a"])
    for name, (written, _) in FORMATS.items():
        write_task(folder, name, written)

        def call(task=TASKS[name]):
            for row in tasks.load_train(task, folder):
                data.tokenize(tokenizer, row.fields.values())
        yield tries(folder / TASKS[name].train, call)
        if name in ("cb", "wic"):
            yield tries(folder / TASKS[name].train, call, variants)
    for protocol in range(6):
        path = folder / f"{protocol}"
        path.write_bytes(pickle.dumps((["A pan.", "Rust."] * 4, [1, 0] * 4), protocol))
        yield tries(path, lambda path=path: list(tasks.read_table(path, ("label", "text"))))


def of_archives(folder, _):
    """tar and zip, packed and plain."""
    members = {"original/CB/x": b"1", "CB/val.jsonl": b"text " * 99, "\u00fc/x": b""}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    for name, content in (("a.zip", packed.getvalue()), ("b.zip", zip_of(members)),
                          ("c.tar", tar_of(members)), ("d.tar", gzip.compress(tar_of(members)))):
        (folder / name).write_bytes(content)
        yield tries(folder / name, lambda path=folder / name: hubs.archive_member(
            path, "superglue/CB/val.jsonl"))


def of_prompts(folder, _):
    """prompt.safetensors, PEFT's two files, the authors' two, and the pickle in one of these."""
    path, peft_folder = folder / "prompt.safetensors", folder / "peft"
    prompts.save_prompt(path, torch.ones(3, 8), affine_start(8), {"model": "m"})
    yield tries(path, lambda: prompts.load_prompt(path, 8))
    prompts.save_peft(peft_folder, torch.ones(3, 8), V10, "m")
    for name, content in (("adapter_model.safetensors", damages), ("adapter_config.json", variants),
                          ("adapter_config.json", damages)):
        yield tries(peft_folder / name, lambda: prompts.load_prompt(peft_folder, 8), content)
    theirs = folder / "theirs"
    released_files(theirs, "t5base", 768)
    for theta, name in ((torch.ones(3, 768), "prompt_t5base.pt"),
                        ({"a": torch.ones(2)}, "gradient_edit_t5base.pt")):
        torch.save(theta, theirs / name)
        path, call, contents, whole = tries(theirs / name, lambda: prompts.load_prompt(theirs, 768))
        parts = {part.filename: zipfile.ZipFile(path).read(part)
                 for part in zipfile.ZipFile(path).filelist}
        inner = next(part for part in parts if part.endswith("data.pkl"))
        contents += [zip_of(parts | {inner: content}) for content in damages(parts[inner], 40)]
        yield path, call, [*contents, zip_of(parts | {inner: pickle.dumps(Evil())})], whole


def of_runs(folder, small_world):
    """state.pt, run.json, log.jsonl; the files of a store; a tuned prompt."""
    run = make_run(small_world, "fuzzed")
    run.step()
    run.save()
    training, method, _, _ = train.parse(small_world[1])
    train.write_run(run.folder, {
        "model": "m", "name": "supmer", "training": asdict(training), "method": asdict(method),
        "made_of": run.made_of, "finished": False, "ended": None})
    t5, store = run.t5, run.sources[0][1].store

    def resumed():
        train.load_state(run.folder, supmer.init_state(
            supmer.init_prompt(t5, 4, 0), method))

    def parsed():
        train.parse(["--resume", str(run.folder)])
        train.check_origin(run.folder, run.made_of)
    yield tries(run.folder / "state.pt", resumed)
    yield tries(run.folder / "log.jsonl", lambda: train.read_log(run.folder))
    for content in (damages, variants):
        yield tries(run.folder / "run.json", parsed, content)
    shutil.copytree(small_world[0] / store.folder, folder / "store")
    tokenizer = load_tokenizer(small_world[0] / "model", t5.config)
    for path in sorted((folder / "store").iterdir()):
        yield tries(path, lambda: data.open_store(folder / "store"), n=12)
    yield tries(folder / "store/first.bin", lambda: TaskIndex(
        data.open_store(folder / "store"), tokenizer, support=4, query=4), n=12)
    path = folder / "tuned.safetensors"
    (folder / "new.txt").write_text("a\n")
    settings = evaluation.Settings(model=str(small_world[0] / "model"), prompt=(str(path),),
                                   predict=str(folder / "new.txt"), device="cpu")
    values = {"task": TASKS["movie"]._replace(words=("A", "B"))._asdict(), "baseline": "learned",
              "model": "m", "model_sha256": T.model_fingerprint(settings.model)}
    save_file({"theta": torch.ones(3, 16)}, path, {"result": json.dumps(values)})
    path, call, contents, whole = tries(path, lambda: predict.predict(settings), n=10)
    for text in variants({name: values[name] for name in ("task", "baseline")}):
        save_file({"theta": torch.ones(3, 16)}, path, {"result": text.decode()})
        contents.append(path.read_bytes())
    for theta in (torch.tensor(1.0), torch.ones(3, 17), torch.ones(16)):
        save_file({"theta": theta}, path, {"result": json.dumps(values)})
        contents.append(path.read_bytes())
    yield path, call, contents, whole


@pytest.mark.parametrize("family", [of_weights, of_tokenizers, of_corpora, of_tasks, of_archives,
                                    of_prompts, of_runs])
def test_damage_is_told_or_harmless(family, tmp_path, small_world, monkeypatch):
    """Whatever has happened to a file: it is read, or refused in one line that can be printed,
    names it or its folder, and says what to do. Nothing in it is run."""
    monkeypatch.chdir(small_world[0])
    for path, call, contents, whole in family(tmp_path, small_world):
        refused = 0
        for content in contents:
            path.write_bytes(content)
            try:
                call()
            except InputError as error:
                line, refused = str(error), refused + 1
                assert line.isprintable() and len(line) < 4100, content
                assert path.name in line or path.parent.name in line, (line, content)
                assert REMEDY.search(line), line
            except OSError as error:        # such as a name that is too long: the system's words
                assert path.parent.name in str(error) and str(error).isprintable()
            except Exception as error:
                raise AssertionError((path.name, content[:500])) from error
        path.write_bytes(whole)
        assert refused >= min(10, len(contents) // 4) or path.suffix in (".bin", ".txt"), path
    assert not list(tmp_path.rglob("executed")) and not Path("executed").exists()


def bent(kind, target="", size=0, name="CB/val.jsonl", packed=False):
    """A tar of one entry that is no plain file, or says that it is larger than it is."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if packed else "w") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname, entry.size = kind, target, size
        archive.addfile(entry, io.BytesIO(bytes(size)) if size else None)
    return out.getvalue()


def with_bit(content, place):
    """Some bytes with another one in a place."""
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]


PHI = {f"phi.{name}": x for name, x in affine_start(8).items()}
TWO = tar_of({"CB/a.txt": b"It rained.", "CB/val.jsonl": b"It rained."})


def prompt_of(theta, metadata=None, **more):
    """A prompt's file, as bytes."""
    return safetensors.torch.save({"theta": theta, **PHI, **more},
                                  {"regularizer": "affine", **(metadata or {})})


def saved(value):
    """torch.save, as bytes."""
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def read_tar(path):
    """What both readers of tars do with one."""
    if path.name[0] == "c":
        return list(documents(path))
    return hubs.archive_member(path, "superglue/CB/val.jsonl")


def read_pickle(path):
    """A task's rows."""
    return list(tasks.read_table(path, ("label", "text")))


def read_prompt(path):
    """A prompt for a T5 of width 8; a file of the authors' stands for both of theirs."""
    if path.suffix == ".pt":
        shutil.copy(path, path.with_name("gradient_edit_t5base.pt"))
        return prompts.load_prompt(path.parent, 768)
    return prompts.load_prompt(path, 8)


@pytest.mark.parametrize("read, name, content, says", [
    (read_tar, "a.tar", bent(tarfile.SYMTYPE, "/etc/passwd"), "is not a whole archive"),
    (read_tar, "a.tar", bent(tarfile.SYMTYPE, "CB/val.jsonl"), "is not a whole archive"),
    (read_tar, "a.tar", bent(tarfile.LNKTYPE, "nowhere"), "is not a whole archive"),
    (read_tar, "a.tar", bent(tarfile.CHRTYPE), "is not a whole archive"),
    (read_tar, "a.tar", bent(tarfile.FIFOTYPE), "is not a whole archive"),
    (read_tar, "a.tar", bent(tarfile.GNUTYPE_LONGNAME, size=1 << 21), "is not a whole archive"),
    (read_tar, "c.tar.xz", bent(tarfile.XHDTYPE, size=1 << 26, packed=True), "a header of 67,108,"),
    (read_tar, "c.tar", with_bit(TWO, 1024 + 150), "is not readable text"),
    (read_tar, "a.tar", with_bit(TWO, 1024 + 150), "is not a whole archive"),
    (read_tar, "c.tar", TWO[:1024], "is not readable text"),
    (read_pickle, "p", b"\x80\x02r\xff\xff\xff\x7f.", "no .* values"),
    (read_pickle, "p", b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "but only"),
    (read_pickle, "p", pickle.dumps((["\ud800"], [0])), "surrogates"),
    (read_prompt, "a.safetensors", prompt_of(torch.tensor(1.0)), "is not a prompt for"),
    (read_prompt, "a.safetensors", prompt_of(torch.zeros(0, 8)), "is not a prompt for"),
    (read_prompt, "a.safetensors", prompt_of(torch.zeros(10_001, 8)), "is not a prompt for"),
    (read_prompt, "a.safetensors", prompt_of(torch.ones(3, 8).int()), "not finite"),
    (read_prompt, "a.safetensors", prompt_of(torch.ones(3, 8).double() * 1e300), "not finite"),
    (read_prompt, "a.safetensors", prompt_of(torch.full((3, 8), math.nan).to(torch.float8_e5m2)),
     "not finite"),
    (read_prompt, "a.safetensors", prompt_of(torch.ones(3, 8), {"model": "m\nerror: fine"}),
     "line breaks in its metadata"),
    (read_prompt, "a.safetensors", prompt_of(torch.ones(3, 8), {"\x1b[2J": "m"}), "line breaks in"),
    (read_prompt, "prompt_t5base.pt", saved(torch.ones(1).as_strided((2 ** 40, 768), (0, 0))),
     "is not a prompt for"),
    (read_prompt, "prompt_t5base.pt", saved({"a": torch.ones(3, 8).to_sparse()}), "is not a prompt for"),
    (read_prompt, "prompt_t5base.pt", saved({"a": torch.ones(3, device="meta")}), "is not a prompt for")])
def test_each_guard_is_needed(tmp_path, read, name, content, says):
    """Links, devices, headers and pickles that claim to be large, a damaged header that would pass
    for an archive's end, halves of surrogates, numbers that are none, forged lines: each is
    told."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read(path)
    assert str(caught.value).isprintable() and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("change, says", [
    ({"a": 60_000}, "pieces, the model 16 embeddings"), ({"<unk>": None}, "Missing .UNK."),
    ({"<pad>": 3}, "must be 0, 1, 2")])
def test_a_vocabulary_fits_its_model(tmp_path, change, says):
    """An id beyond the embeddings, whatever the number of pieces; no <unk>, which fails only with
    the first text that needs it; another <pad>."""
    path = write_model(tmp_path / "m", ["a", "b", "c"])[0] / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"] | change
    values["model"]["vocab"] = {piece: id for piece, id in vocabulary.items() if id is not None}
    values["added_tokens"] = [token for token in values["added_tokens"]
                              if token["content"] not in change]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=says):
        load_tokenizer(tmp_path / "m", SimpleNamespace(vocab_size=16))


def test_memory_is_bounded_whatever_a_file_claims(tmp_path):
    """A line of 100 MB as text, of 32 as JSON, also one that gzip made small, a million empty
    documents, a member of a zip, a config.json of absurd sizes: read or refused within 400 MB more
    than the process has."""
    (tmp_path / "line.txt").write_bytes(b"a" * 10 ** 8)
    (tmp_path / "line.jsonl").write_bytes(b'{"text": "' + b"a" * 2 ** 25)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * 2 ** 25, 1))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        bomb.writestr("CB/val.jsonl", bytes(9 * corpus_module.LONGEST))
    model = save_model(tmp_path / "m", V10, d_model=2 ** 20 - 1, vocab_size=2 ** 20 - 1)

    def told(call, *arguments):
        with pytest.raises(InputError):
            call(*arguments)

    def work():
        assert sum(len(text) for text, in documents(tmp_path / "line.txt")) == 10 ** 8
        for name in ("line.jsonl", "bomb.jsonl.gz"):
            told(list, documents(tmp_path / name))
        told(hubs.archive_member, tmp_path / "bomb.zip", "superglue/CB/val.jsonl")
        told(load_t5, model)

    def empty():
        nothing = corpus_module.Document(0.5, [])
        corpus_module.write_text(tmp_path, [tmp_path], lambda *_: repeat(nothing, 10 ** 6), tokenizer,
                                 lambda *_: None)

    def limited(more):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    assert ended(forked(work, lambda: limited(400_000_000))) == 0
    _, tokenizer = write_model(tmp_path / "words", ["a"])
    assert ended(forked(empty, lambda: limited(50_000_000))) == 0


def test_what_is_too_large_or_too_much_is_refused(tmp_path):
    """JSON of 64 MB, unread; a PEFT file with a second tensor; released tensors without data."""
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 26)
    with pytest.raises(InputError, match="config.json is not JSON .it is too large"):
        common.read_json(tmp_path / "config.json")
    prompts.save_peft(tmp_path / "peft", torch.ones(2, 6), V10, "m")
    save_file({"prompt_embeddings": torch.ones(2, 6), "more": torch.ones(2)},
              tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="must hold 2 vectors as prompt_embeddings alone"):
        prompts.load_prompt(tmp_path / "peft", 6)
    name = next(name for (width, _), name in hubs.RELEASED.items() if width == 768)
    for kind, what in (("prompt", torch.ones(2, 768, device="meta")), ("gradient_edit", {})):
        torch.save(what, tmp_path / f"{kind}_{name}.pt")
    with pytest.raises(InputError, match="is not a prompt for a T5 of width 768"):
        prompts.load_prompt(tmp_path, 768)


def test_nothing_in_a_file_is_run():
    """By the syntax of every module: no eval or exec, no shell, no pickle but the one that looks
    nothing up, torch.load of weights only, numpy's files without objects, no code from a hub."""
    for path in {*HERE.glob("*.py")} - {Path(__file__)}:
        for call in (node for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            words = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert name not in ("eval", "exec", "os.system", "os.popen", "pickle.load",
                                "pickle.loads", "pickle.Unpickler", "marshal.loads"), path
            assert name != "torch.load" or words.get("weights_only") == "True", path
            assert not words.keys() & {"shell", "allow_pickle", "trust_remote_code"}, (path, name)


def test_files_have_the_users_mode_and_no_company(tmp_path):
    """A file is made with the umask; its temporary one lies in its folder and is gone afterwards;
    one that a kill left is swept, but not one of a process that lives."""
    before, seen = os.umask(0o027), []
    try:
        common.atomic_write(tmp_path / "a", lambda file: seen.append(Path(file.name).parent))
        prompts.save_peft(tmp_path / "peft", torch.ones(2, 6), V10, "m")
    finally:
        os.umask(before)
    assert seen == [tmp_path]
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"a": 0o640, "peft": 0o750, "adapter_model.safetensors": 0o640,
                     "adapter_config.json": 0o640}
    gone = forked(lambda: None)
    assert ended(gone) == 0
    for pid in (gone, os.getpid(), "mine"):
        (tmp_path / f".a.{pid}.tmp").touch()
    common.sweep(tmp_path)
    assert {path.name for path in tmp_path.glob(".*")} == {f".a.{os.getpid()}.tmp", ".a.mine.tmp"}
