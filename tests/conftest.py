"""What the tests share: the tiny family, small random models of real architectures, and the command."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from broken_models import Models
from filelock import FileLock
from forks import Forks
from hub_cache import cache  # noqa: F401 (a fixture)
from slurm_cluster import absent
from slurm_together import deeds, ended, labs, undisturbed  # noqa: F401 (fixtures)
from sweeps import swept  # noqa: F401 (a fixture)
from xdist.scheduler import LoadFileScheduling

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several workers share the processors
os.environ.pop("HYDRA_FULL_ERROR", None)


PACKAGES = (Path(__file__).parent / "slurm" / "packages.txt").read_text(encoding="utf-8").strip()
"""What the tests' own cluster is made of, on Debian and Ubuntu."""

CLUSTER = (
    "test_slurm_faults.py", "test_slurm_sweeps.py", "test_slurm_outages.py", "test_slurm_chaos.py",
)  # fmt: skip
"""The files of the cluster's tests, which share it and mostly wait."""

LONG = (
    "test_in_memory.py", "test_tracking.py", "test_kernel_chunks.py", "test_kernel_devices.py",
    "test_kernels.py", "test_random_methods.py", "test_search.py", "test_engine.py", "test_merge.py",
    "test_run.py", "test_analyze.py", "test_search_killed.py", "test_mixtures.py", "test_mergekit_files.py",
    "test_generate.py", "test_readme.py", "test_lora.py",
)  # fmt: skip
"""Files that take longest begin first, so that no process is left with one at the end. The first trains the
tiny family, which the next five do not need."""


def pytest_configure(config: pytest.Config) -> None:
    """A marker that holds what a test comes after; see `slurm_together`."""
    config.addinivalue_line("markers", "after(*deeds): the test looks at what came of them")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A process for each processor, and one for the cluster's tests, which mostly wait."""
    return len(os.sched_getaffinity(0)) + (not absent())


class ByFile(LoadFileScheduling):
    """A file in whichever process is free; those of the cluster all in one, and so those of the hub, which
    share warm commands."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(super()._split_scope(nodeid))
        if file.name in CLUSTER:
            return "cluster"
        return "hub" if file.parent.name == "hub" else str(file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """xdist's own groups are not seen by this version of pytest."""
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    places = {name: i for i, name in enumerate((*CLUSTER, *LONG))}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what it takes to run the tests that were skipped for want of Slurm."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "Slurm cluster" in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} tests need Slurm's programs and were skipped. To get them:"
        )
        terminalreporter.write_line(f"  sudo apt-get install -y --no-install-recommends {PACKAGES}")


@pytest.fixture(scope="session", autouse=True)
def mergelab_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the tests' own, one for all workers."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "home"
    os.environ["MERGELAB_HOME"] = str(home)
    return home


@pytest.fixture(scope="session")
def family(mergelab_home: Path, pytestconfig: pytest.Config) -> Any:
    """The tiny family, really trained. It is kept from one session to the next for as long as nothing that
    goes into it changes; `--cache-clear` has it trained again."""
    from mergelab import zoo

    own = zoo.family_path(0)
    kept = pytestconfig.cache.mkdir("family") / _recipe_of_the_family()  # type: ignore[union-attr]
    with FileLock(f"{mergelab_home}.lock"):
        if not own.exists() and (kept / own.name).exists():
            shutil.copytree(kept / own.name, own)
        found = zoo.open_family(0)  # verifies every file
        if not (kept / own.name).exists():
            aside = kept.with_name(f"{kept.name}.{os.getpid()}")
            shutil.copytree(own, aside / own.name)
            with suppress(OSError):  # another session has kept it
                aside.rename(kept)
    return found


def _recipe_of_the_family() -> str:
    """A hash of the code that trains the family, and of the libraries that do it."""
    import mergelab.zoo

    files = sorted(Path(mergelab.zoo.__file__).parent.glob("*.py"))
    texts = [f.read_text(encoding="utf-8") for f in files]
    versions = [version(p) for p in ("torch", "transformers", "tokenizers")]
    return hashlib.sha256("\n".join([*texts, *versions]).encode()).hexdigest()[:16]


@pytest.fixture(scope="session", autouse=True)
def little_garbage() -> None:
    """Import what nearly every test needs. Python does not search it for garbage any more, and elsewhere only
    between files: a fifth of the time."""
    import lm_eval.evaluator  # noqa: F401 (with it torch and transformers)
    import mergekit.merge_methods  # noqa: F401

    import mergelab.cli.main  # noqa: F401

    gc.collect()
    gc.freeze()
    gc.disable()


@pytest.fixture(scope="module", autouse=True)
def garbage() -> Iterator[None]:
    """What a file leaves is taken away."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def warm(mergelab_home: Path) -> Iterator[Forks]:
    """Commands in processes of their own that need not import anything first; see `warm_command`."""
    forks = Forks("warm_command.py")
    yield forks
    forks.close()


@dataclass
class Outcome:
    """What a command line came to."""

    status: int
    out: str
    err: str
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        """result.json of the run."""
        return dict(json.loads((self.folder / "result.json").read_text(encoding="utf-8")))


Command = Callable[..., Outcome]


@pytest.fixture
def mergelab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """`mergelab("method=ties", ...)`: the command in this process, with a folder of its own."""
    from mergelab.cli.main import main

    count = 0

    def run(*arguments: str, folder: Path | None = None) -> Outcome:
        nonlocal count
        count += 1
        where = folder or tmp_path / f"run{count}"
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        place = f"hydra.sweep.dir={where}" if "-m" in arguments else f"hydra.run.dir={where}"
        monkeypatch.setattr("sys.argv", ["mergelab", *arguments, place])
        capfd.readouterr()
        try:
            main()
            status: Any = 0
        except SystemExit as e:
            status = e.code or 0
        out, err = capfd.readouterr()
        return Outcome(int(status), out, err, where)

    yield run


ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "gemma2")


def random_model(
    folder: Path, architecture: str = "qwen2", *, seed: int = 0, dtype: str = "float32", tied: bool = True,
    tokenizer_from: Path | None = None, **changes: Any,
) -> Path:  # fmt: skip
    """A random model of a real architecture, small enough to merge in milliseconds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": tied, "head_dim": 8,
        "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(architecture, **(settings | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():  # norms start at a constant, which would hide mistakes
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    model.save_pretrained(folder)
    for file in (tokenizer_from or Path("/nonexistent")).glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="session")
def make_model(family: Any) -> Callable[..., Path]:
    """`random_model` with the tiny family's tokenizer."""

    def make(folder: Path, architecture: str = "qwen2", **settings: Any) -> Path:
        return random_model(folder, architecture, tokenizer_from=family.checkpoint("base"), **settings)

    return make


@pytest.fixture(scope="session")
def sound(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two experts that nobody breaks."""
    folder = tmp_path_factory.mktemp("sound")
    for seed, name in enumerate(("base", "math", "physics")):
        make_model(folder / name, seed=seed)
    return folder


@pytest.fixture
def models(sound: Path, make_model: Callable[..., Path], tmp_path: Path) -> Models:
    """Copies of the sound models, for a test to break."""
    return Models(tmp_path / "in", sound, make_model)


@pytest.fixture
def stable_mergekit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """mergekit with one thread and stable sorts: equal magnitudes stay in the order of their places."""
    import torch

    argsort, sort, threads = torch.argsort, torch.sort, torch.get_num_threads()

    def topk(x: Any, k: int, largest: bool = True) -> Any:
        return None, argsort(x, descending=largest, stable=True)[:k]

    monkeypatch.setattr(torch, "argsort", lambda *a, **k: argsort(*a, **{**k, "stable": True}))
    monkeypatch.setattr(torch, "sort", lambda *a, **k: sort(*a, **{**k, "stable": True}))
    monkeypatch.setattr(torch, "topk", topk)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
