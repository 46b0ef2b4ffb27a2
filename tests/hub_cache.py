"""A hub cache as the hub's own client leaves it, with small models in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with org/base, org/math and org/code, laid out as the hub's client does."""
    import huggingface_hub.constants

    place = tmp_path / "hub"
    for seed, name in enumerate(("base", "math", "code")):
        files = make_model(tmp_path / "made" / name, seed=seed)
        repo = place / f"models--org--{name}"
        snapshot = repo / "snapshots" / commit(name)
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir()
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit(name), encoding="utf-8")
        for file in files.iterdir():
            content = file.read_bytes()
            blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place))
    return place


def commit(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()
