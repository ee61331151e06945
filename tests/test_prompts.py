"""Prompt files: ours, the authors' and PEFT's are read as what they are; others are refused."""

import contextlib
import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import eval as evaluation
import jobs
import prompts
import released
import t5 as T
import train
from candidates import open_candidate
from common import InputError
from conftest import (SMALL, affine_start, logits, peft, relative, released_files, rows_of,
                      small_config, small_t5, transformers, write_run)
from t5 import load_t5


def refused(path, d, says):
    """load_prompt refuses it in one line that names it."""
    with pytest.raises(InputError, match=says) as caught:
        prompts.load_prompt(path, d)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_ours_are_read_and_others_refused(tmp_path):
    """theta, phi, metadata come back; another width, form, phi, length or NaN is refused."""
    path, phi, ones = tmp_path / "prompt.safetensors", affine_start(8), torch.rand(3, 8)
    prompts.save_prompt(path, ones, phi, {"model": "m"})
    theta, read, about = prompts.load_prompt(tmp_path, 8)
    assert torch.equal(theta, ones) and read.keys() == phi.keys()
    assert all(torch.equal(read[name], phi[name]) for name in phi)
    assert about == {"model": "m", "regularizer": "affine"}
    refused(path, 16, "not a prompt for a T5 of width 16 .it holds")
    none = {"regularizer": "none"}
    for theta, metadata, says in (
            (ones, {"regularizer": "affine"}, "it holds"),
            (ones, {"regularizer": "x"}, "'x', not one"),
            (ones, {}, "regularizer"), (ones, none | {"model": "m\nforged"}, "line breaks"),
            (ones * math.nan, none, "finite"), (ones[0], none, "holds"),
            (torch.ones(10_001, 8), none, "10001, 8")):
        save_file({"theta": theta}, path, metadata)
        refused(path, 8, says)
    for form in ("none", ""):                   # as an earlier version called it
        save_file({"theta": ones.half()}, path, {"regularizer": form})
        theta, phi, about = prompts.load_prompt(path, 8)
        assert theta.dtype == torch.float32 and phi is None and about["regularizer"] == "none"


def test_released_regularizer_by_hand():
    """Width 2, rank 2: the mean of g and h where the gate is 1/2, g where it is 1."""
    phi = {name: x.clone() for name, x in released.init_released(3, 2).items()}
    phi |= {"mlp.layers.0.u": torch.eye(2), "mlp.layers.0.v": torch.eye(2),
            "mlp.layers.1.u": torch.tensor([2., 1.]).diag(), "mlp.layers.1.v": torch.eye(2).flip(0),
            "mlp.layers.1.bias": torch.tensor([0., -1.]),
            "mlp.linear_1.weight": torch.ones(24, 2) / 4, "mlp.linear_2.weight": torch.ones(1, 24),
            "mlp.linear_2.bias": torch.tensor([-24.])}
    g, pooled = torch.tensor([[3., 4.], [-3., 4.], [0., 0.], [-3., -4.]]), torch.tensor([1., 3.])
    # the gate: sigmoid(1 * relu(24 * (1 + 3) / 4) - 24) = 1/2; relu(g): (3, 4), (0, 4), 0, 0;
    # swapped, * (2, 1), - (0, 1), relu: (8, 2), (8, 0), 0, 0; and rescaled to |g|: h
    h = torch.tensor([[8., 2.], [5., 0.], [0., 0.], [0., 0.]])
    h[0] *= 5 / 68 ** 0.5
    assert torch.allclose(released.regularize_released(phi, g, pooled), (g + h) / 2, rtol=1e-6)
    phi["mlp.linear_2.bias"] += 124
    assert torch.allclose(released.regularize_released(phi, g, pooled), g)


def test_released_prompts_are_read(tmp_path):
    """Both sizes of the authors' files; another width, a missing file, another psi are refused."""
    for name, d in (("t5base", 768), ("flant5xl", 2048)):
        theta, phi = released_files(tmp_path / name, name, d)
        read, read_phi, about = prompts.load_prompt(tmp_path / name, d)
        assert torch.equal(read, theta) and about == {"model": name, "regularizer": "released"}
        assert read_phi.keys() == phi.keys()
        assert all(torch.equal(x, read_phi[name]) for name, x in phi.items())
    assert phi["mlp.layers.0.u"].shape == (2048, 1920)          # as in their file
    folder = tmp_path / "t5base"
    refused(folder, 512, "of widths 768 and 2048")
    refused(folder, 2048, "prompt_flant5xl.pt is missing")
    torch.save({"mlp.linear_1.weight": torch.zeros(2)}, folder / "gradient_edit_t5base.pt")
    refused(folder, 768, "is not a prompt for a T5 of width 768")


def test_the_authors_files_are_fetched_once(place, monkeypatch):
    """`eval.py --prompt released` fetches both and starts from their theta, through their psi."""
    theta, phi = released_files(place / "theirs", "t5base", 16)
    monkeypatch.setitem(released.RELEASED, (16, 32), "t5base")
    monkeypatch.setattr(released, "RELEASED_URL", (place / "theirs").as_uri() + "/")
    settings, _ = evaluation.parse([*SMALL, "--prompt-length", "100", "--prompt", "released"])
    for _ in range(2):
        prompt = open_candidate("released", small_config(), settings)
        assert torch.equal(prompt.starts[0](small_t5())["theta"], theta)
        g, pooled = theta.flip(0) / 1e4, theta[0]
        assert torch.equal(prompt.psi(g, pooled), released.regularize_released(phi, g, pooled))
        monkeypatch.setattr(released, "RELEASED_URL", "file:///nowhere/")    # they are there


def test_a_tuned_prompt_goes_to_peft_and_back(place, capsys):
    """A tuned file, or PEFT's, is a --prompt of its model's; --export-peft writes PEFT's, once."""
    evaluation.main([*SMALL, "--prompt", "vocab", "--seeds", "10", "--rates", "0.1"])
    tuned = rows_of("runs/eval/small-planted.json", kind="tuned")[0]["file"]
    kept, about = jobs.read_result(tuned)
    theta = kept["theta"]
    steps = kept | {"0:theta": theta + 1}                   # as --study steps keeps them
    save_file(steps, tuned, {"result": json.dumps(about)})
    settings, _ = evaluation.parse([*SMALL, "--prompt", tuned])
    train.main(["--export-peft", tuned, "adapter"])
    assert "3 vectors for peft.PeftModel.from_pretrained on small" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists: name another folder"):
        train.main(["--export-peft", tuned, "adapter"])
    for name in (tuned, "adapter"):
        prompt = open_candidate(name, small_config(), settings)
        assert torch.equal(prompt.starts[0](small_t5())["theta"], theta) and prompt.psi is None
    config, vectors = Path("adapter/adapter_config.json"), Path("adapter/adapter_model.safetensors")
    values = json.loads(config.read_text())
    for name, says in (("t5-base", "was learned on t5-base with other weights"), (None, None),
                       ("elsewhere/small/", None)):
        config.write_text(json.dumps(values | {"base_model_name_or_path": name}))
        with pytest.raises(InputError, match=says) if says else contextlib.nullcontext():
            open_candidate("adapter", small_config(), settings)
    save_file({"prompt_embeddings": torch.cat([theta, -theta])}, vectors)   # the decoder's, too
    assert torch.equal(prompts.load_prompt("adapter", 16)[0], theta)
    for tensors in ({"prompt_embeddings": theta, "x": theta + 0}, {"prompt_embeddings": theta[:2]}):
        save_file(tensors, vectors)
        refused(config.parent, 16, "with 3, or holds more")
    config.write_text(json.dumps(values | {"peft_type": "LORA"}))
    refused(config.parent, 16, "it is LORA for SEQ_2_SEQ_LM with")


@pytest.mark.skipif(peft is None, reason="peft is not installed: pip install peft")
def test_peft_reads_our_prompt_and_we_read_theirs(tmp_path):
    """PEFT's logits with our exported prompt are ours to 1e-5, and ours with theirs."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, vocab_size=60, dropout_rate=0.,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path / "model")
    theta = write_run(tmp_path / "run", tmp_path / "model", P=5, d=32)
    prompts.export_peft(tmp_path / "run", tmp_path / "adapter")
    adapter = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    peft.get_peft_model(copy.deepcopy(theirs), adapter).save_pretrained(tmp_path / "of peft")
    read, _, _ = prompts.load_prompt(tmp_path / "of peft", 32)
    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(7))
    mask, target = torch.ones_like(ids).bool(), torch.tensor([[0, 5, 6], [0, 7, 8]])
    mask[1, 5:] = False
    for folder, prompt, P in (("adapter", theta, 5), ("of peft", read, 3)):
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / folder).eval()
        with torch.no_grad():
            reference = wrapped(input_ids=ids, attention_mask=mask.long(),
                                decoder_input_ids=target).logits
        ours = load_t5(tmp_path / "model")
        x = torch.cat([prompt.expand(2, -1, -1), T.embed_tokens(ours, ids)], 1)
        out = logits(ours, x, F.pad(mask, (P, 0), value=True), target)
        assert len(prompt) == P and relative(out, reference) < 1e-5
