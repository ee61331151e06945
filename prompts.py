"""theta and phi on the disk: ours, the authors', Hugging Face PEFT's.

    save_prompt(path, theta, phi, {"model": "tiny", "regularizer": "affine"})
    theta, phi, metadata = load_prompt(path, t5.config.d_model)
"""

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

import hub
from common import InputError, read_json, reading, whole_file
from released import read_released
from shapes import model_shape
from supmer import REGULARIZERS

LONGEST = 10_000        # vectors of a prompt: a file may claim any number without holding them


def save_prompt(path, theta, phi, metadata):
    """Write theta, phi if there is one, and metadata {str: str} as safetensors, whole or not at
    all. metadata["regularizer"] names phi's form; "affine" unless given."""
    tensors = {"theta": theta, **{f"phi.{name}": x for name, x in (phi or {}).items()}}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with whole_file(path) as file:
        file.write(save(tensors, {"regularizer": "affine" if phi else "none", **metadata}))


def load_prompt(path, d=None):
    """Read a prompt, of a T5 of width d if given -> theta (P, d), phi or None, metadata {str: str}.

    path: save_prompt's file or its run's folder; a file that eval.py tuned; a folder of Hugging
    Face PEFT's; or a folder with the authors' files. metadata["regularizer"]: one of REGULARIZERS.
    Raises InputError for anything else, another width or form, values that are not finite. Whether
    it belongs to a model, candidates.is_of_model decides.
    """
    path = Path(path)
    with reading(path, f"a prompt{f' for a T5 of width {d}' if d else ''}", "give a run on "
                 "this model, a prompt's safetensors, or a folder of PEFT's or the authors'"):
        if (path / "adapter_config.json").is_file():
            tensors, metadata = _read_peft(path)
        elif any(path.glob("prompt_*.pt")):
            tensors, metadata = read_released(path, d)
        else:
            tensors, metadata = _read_ours(path)
        _check(tensors, metadata, d or tensors["theta"].shape[1])
        tensors = {name: x.detach().float().contiguous() for name, x in tensors.items()}
    theta = tensors.pop("theta")
    return theta, {name.removeprefix("phi."): x for name, x in tensors.items()} or None, metadata


def _check(tensors, metadata, d):
    """Raise ValueError unless the tensors are theta (P, d) and phi of the form that the metadata
    names, and finite, and the metadata print as one line."""
    length, form = len(tensors["theta"]), metadata["regularizer"]
    if form not in REGULARIZERS:
        raise ValueError(f"its regularizer is {form!r}, not one of {', '.join(REGULARIZERS)}")
    start = REGULARIZERS[form].init(length, d)
    shapes = {f"phi.{name}": tuple(x.shape) for name, x in start.items()} | {"theta": (length, d)}
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    if found != shapes or not 0 < length <= LONGEST:
        raise ValueError(f"it holds {found}")
    finite = all(x.is_floating_point() and x.float().isfinite().all() for x in tensors.values())
    if not (finite and "".join(metadata.values()).isprintable()):
        raise ValueError("it has values that are not finite, or line breaks in its metadata")


def _read_safetensors(path):
    """A file's tensors and metadata."""
    with reading(path, "a prompt's safetensors"), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def _read_ours(path):
    """save_prompt's tensors and metadata, or of what eval.py tuned theta and where it belongs."""
    tensors, metadata = _read_safetensors(path / "prompt.safetensors" if path.is_dir() else path)
    if "result" in metadata:
        about = json.loads(metadata["result"])
        method = "unified-ppt" if about["baseline"] == "unified" else "tuned"
        metadata = {"model": about["model"], "model_sha256": about["model_sha256"],
                    "method": method, "regularizer": "none"}
        tensors = {"theta": tensors["theta"]}           # without other steps' states
    form = metadata["regularizer"] or "none"        # "": of an earlier version
    return tensors, metadata | {"regularizer": form}


# --------------------------------------------------------------------- Hugging Face PEFT

def _read_peft(folder):
    """A soft prompt as PEFT saves it. It may hold the encoder's vectors and then the decoder's: as
    in PEFT itself the first ones are used."""
    config = read_json(folder / "adapter_config.json")
    kind, length = (config["peft_type"], config["task_type"]), config["num_virtual_tokens"]
    tensors, _ = _read_safetensors(folder / "adapter_model.safetensors")
    vectors = tensors.pop("prompt_embeddings")
    wanted = kind == ("PROMPT_TUNING", "SEQ_2_SEQ_LM") and len(vectors) in (length, 2 * length)
    if tensors or not wanted:
        raise ValueError(f"it is {' for '.join(kind)} with {len(vectors)} vectors, not "
                         f"PROMPT_TUNING for SEQ_2_SEQ_LM with {length}, or holds more")
    base = str(config.get("base_model_name_or_path") or "")
    return {"theta": vectors[:length]}, {"model": base, "regularizer": "none"}


def save_peft(folder, theta, config, model, revision=None):
    """Write theta (P, d) as a new folder, whole or not at all, that peft.PeftModel.from_pretrained
    loads on a model, a hub id or folder, of this T5Config.
    PEFT's format has no place for psi: only tuning as here uses it."""
    values = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM", "inference_mode": True,
              "base_model_name_or_path": model, "revision": revision,
              "num_virtual_tokens": len(theta), "token_dim": theta.shape[1],
              "num_transformer_submodules": 1,      # else PEFT expects the decoder's vectors, too
              "num_attention_heads": config.num_heads, "num_layers": config.num_layers,
              "prompt_tuning_init": "RANDOM"}
    new = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)              # what a kill left
    new.mkdir(parents=True)
    (new / "adapter_model.safetensors").write_bytes(save({"prompt_embeddings": theta}))
    (new / "adapter_config.json").write_text(json.dumps(values, indent=2))
    new.rename(folder)


def export_peft(source, folder):
    """Write the prompt of a run, or of a prompt's or tuned file, as a new folder for PEFT -> what
    to say."""
    if folder.exists():
        raise InputError(f"{folder} exists: name another folder")
    name = load_prompt(source)[2].get("model", "")
    config = model_shape(name)
    theta, _, _ = load_prompt(source, config.d_model)
    source = hub.hub_source(name)
    base = dict(zip(("model", "revision"), source.values()))
    base = base or {"model": str(hub.model_folder(name))}
    save_peft(folder, theta, config, **base)
    return (f"{folder}: {len(theta)} vectors for peft.PeftModel.from_pretrained on {base['model']};"
            " psi is left out, PEFT's format has no place for it")
