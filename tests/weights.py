"""Reading merged models back, and mergekit's own command to compare them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a model folder, by name."""
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {name: t for f in files for name, t in load_file(f).items()}


def same_bits(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


def change(folder: Path, edit: Any) -> None:
    """Edit the tensors of a folder that has one weight file; `edit` gets them as a dict."""
    path = folder / "model.safetensors"
    tensors = {n: t.clone() for n, t in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def mergekit_yaml(recipe: Path, out: Path, *options: str, seed: int = 0) -> Path:
    """`mergekit-yaml RECIPE OUT --random-seed SEED`, in this process."""
    from mergekit.io.tasks import LoaderCache
    from mergekit.scripts.run_yaml import main

    LoaderCache().loaders.clear()  # it would read files from before
    arguments = [str(recipe), str(out), "--random-seed", str(seed), "--quiet", *options]
    main(args=arguments, standalone_mode=False)
    return out


def generates(folder: Path, tokens: int = 4) -> bool:
    """Whether transformers loads the folder and makes that many tokens after a prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = AutoTokenizer.from_pretrained(folder)("1+1=", return_tensors="pt").input_ids
    made = model.generate(ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)
    return bool(made.shape[1] == ids.shape[1] + tokens)
