"""From arguments to a `Run`: what Hydra composes, typed and closed, in a process that may use Hydra itself.

Nothing heavy is imported here: `--help`, `--cfg` and `mergelab.compose` must answer at once.
"""

import shlex
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Dict  # noqa: UP035 (OmegaConf reads it at run time)

from hydra import compose as hydra_compose
from hydra import initialize_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException

from mergelab import config_errors
from mergelab.core import registry
from mergelab.core.conf_dir import CONF
from mergelab.core.errors import InputError
from mergelab.core.run_dir import hydra_value, write_text
from mergelab.jobs.settings import run_type
from mergelab.schema import Composition, Expert, Run, settings_of, with_overrides

LAUNCHERS = ("mergelab_cluster", "mergelab_slurm")
"""How a config file selects the launcher of clusters. The second name is that of version 0.1."""


# ---------------------------------------------------------------- what Hydra knows of us


@dataclass
class _Composed(Run):
    """What Hydra composes: a Run whose mappings are still open, so that a new expert or a parameter
    is given like any other value, without a plus. `typed` closes them."""

    experts: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006 (read by OmegaConf)


@cache
def _schema(kind: type[Any]) -> DictConfig:
    node: DictConfig = OmegaConf.structured(kind)
    for mapping in (
        node.experts, node.method.parameters, node.eval.shares, node.eval.metrics, node.eval.options,
        node.search.space,
    ):  # fmt: skip
        OmegaConf.set_struct(mapping, False)
    return node


def register(config_dir: str | None = None) -> None:
    """Tell Hydra of the schema, the sweeper of searches and the launcher of clusters.

    Args:
        config_dir: the user's folder, whose steps may bring sections of their own.
    """
    store, kind = ConfigStore.instance(), run_type(config_dir, _Composed)
    known = store.repo.get("run.yaml")
    if known is not None and OmegaConf.get_type(known.node) is kind:
        return
    node: Any = _schema(kind)  # type: ignore[arg-type]  # a class has a hash
    store.store(name="run", node=node, provider="mergelab", replace=True)
    for group, name, target in (
        ("hydra/sweeper", "evolution", "mergelab.optimization.sweeper.SearchSweeper"),
        *(("hydra/launcher", name, "mergelab.scheduling.launcher.ArrayLauncher") for name in LAUNCHERS),
    ):
        node = {"_target_": target}
        store.store(group=group, name=name, node=node, provider="mergelab", replace=True)


SHARED = ("Plugins", "SourcesRegistry")
"""Singletons of Hydra that only say what is installed."""

_lock = threading.RLock()
_own: dict[type, Any] = {}
"""Hydra's singletons as they are while we compose, kept from one composition to the next."""


@contextmanager
def _own_hydra(config_dir: str | None) -> Iterator[None]:
    """Hydra with a state of its own: that of a program which uses it is back when the body ends."""
    with _lock:
        Plugins.instance()  # imports what is installed, which registers itself, once a process
        singletons, resolvers = Singleton._instances, BaseContainer._resolvers
        known = ConfigStore.instance().repo
        Singleton._instances, BaseContainer._resolvers = _own, dict(resolvers)
        try:
            if not _own:
                _own.update({k: v for k, v in singletons.items() if k.__name__ in SHARED})
                ConfigStore.instance().repo = {k: _copied(v) for k, v in known.items() if k == "hydra"}
            register(config_dir)
            yield
        finally:
            Singleton._instances, BaseContainer._resolvers = singletons, resolvers


def _copied(node: Any) -> Any:
    """A group of the config store, without sharing what is in it."""
    return {k: _copied(v) for k, v in node.items()} if isinstance(node, dict) else node


# ---------------------------------------------------------------- composing


def compose(*overrides: str, config_dir: str | Path | None = None) -> Run:
    """The Run that these arguments come to, those of the command line.

    May be called any number of times, from any thread, in a notebook, and in a program that uses Hydra
    itself: no state of Hydra is changed.

    Args:
        overrides: such as `"method=ties"`, `"experts.math.weight=0.4"`, `"~experts.code"`.
        config_dir: a folder of groups of your own, as `--config-dir` names it.
    Raises:
        InputError: for whatever Hydra or the schema has against them, in the words of the command.
    """
    for text in overrides:
        if not isinstance(text, str):
            raise InputError(f"compose: {text!r} is not a text such as 'method=ties'")
        if text.lstrip("+~").partition("=")[0].startswith("hydra"):
            raise InputError(f"{text}: settings of Hydra are for the command line")
    folder = None if config_dir is None else Path(config_dir).expanduser().resolve()
    if folder is not None and not folder.is_dir():
        raise InputError(f"config_dir: {folder} is not a folder")
    sources = [f"file://{CONF}", *([f"file://{folder}"] if folder else [])]
    with _own_hydra(str(folder) if folder else None):
        try:
            with initialize_config_search_path(sources):
                cfg = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
                return typed(cfg, cfg)
        except (HydraException, OmegaConfBaseException, ValueError) as e:
            raise InputError(config_errors.explain_composition(e, overrides)) from None


def typed(cfg: DictConfig, whole: DictConfig) -> Run:
    """The Run that a composition comes to.

    Args:
        cfg: what was composed, with or without the node `hydra`.
        whole: with it.
    Raises:
        InputError: for an expert's key or value that the schema does not have.
    """
    h = whole.hydra
    own = [s.path for s in h.runtime.config_sources if s.schema == "file" and Path(s.path) != CONF]
    folder = next(iter(own), None)
    kind = run_type(folder)
    # Hydra has validated all but the experts, whose names are open, and keys that were added with a plus.
    nodes = {str(k): v for k, v in cfg.items_ex(resolve=False) if k != "hydra"}
    _check_keys(kind, nodes, "")
    try:
        named = OmegaConf.merge(_named(), {"experts": OmegaConf.to_container(cfg.experts)})
        experts: dict[str, Expert] = OmegaConf.to_object(named.experts)  # type: ignore[assignment]
        found = {k: cfg[k] for k in nodes if k != "experts"}
        values = {k: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for k, v in found.items()}
    except OmegaConfBaseException as e:
        raise InputError(config_errors.explain(e)) from None
    run: Run = kind(**values, experts=experts)
    run.composition = Composition(
        tuple(h.overrides.task),
        {k: str(v) for k, v in h.runtime.choices.items() if "/" not in k and v},
        folder,
        registry.digests(folder) if folder else {},
    )
    return run


def _check_keys(kind: Any, node: Mapping[Any, Any], place: str) -> None:
    """Raise InputError for a key that a part of the schema does not have."""
    names = [f.name for f in fields(kind) if not f.metadata.get("omegaconf_ignore")]
    for name, value in node.items():
        if name not in names:
            raise InputError(config_errors.no_key(f"{place}{name}", str(name), names))
        if isinstance(value, DictConfig) and not value._is_none() and is_dataclass(OmegaConf.get_type(value)):
            _check_keys(OmegaConf.get_type(value), dict(value.items_ex(resolve=False)), f"{place}{name}.")


@dataclass
class _Named:
    experts: Dict[str, Expert] = field(default_factory=dict)  # noqa: UP006 (read by OmegaConf)


@cache
def _named() -> DictConfig:
    node: DictConfig = OmegaConf.structured(_Named)
    return node


def without_hydra(config: DictConfig) -> DictConfig:
    """What Hydra composed, without its own settings."""
    out: DictConfig = config.copy()
    with open_dict(out):
        out.pop("hydra", None)
    return out


# ---------------------------------------------------------------- and back to arguments


def arguments(run: Run) -> list[str]:
    """Arguments that compose a run, one that was changed after it had been composed included.

    Raises:
        InputError: for a run that no arguments compose.
    """
    c = run.composition or Composition()
    base = compose(*c.overrides, config_dir=c.config_dir)
    if settings_of(base) == settings_of(run):
        return list(c.overrides)
    out = [*c.overrides, *_differences(settings_of(base), settings_of(run))]
    try:
        told = compose(*out, config_dir=c.config_dir)
    except InputError:
        told = base
    if settings_of(told) != settings_of(run):
        raise InputError("the run cannot be expressed as arguments of the command line, so it could not be "
                         "repeated\nChange it through arguments of mergelab.compose.")  # fmt: skip
    return out


def recomposed(run: Run) -> Run:
    """The run with the arguments that compose it, also where it was changed in the meantime."""
    known = run if run.composition else replace(run, composition=compose().composition)
    return with_overrides(known, arguments(known))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], key: str = "") -> Iterator[str]:
    for name in old.keys() - new.keys():
        yield f"~{key}{name}"
    for name, value in new.items():
        if name not in old:
            yield f"++{key}{name}={value_text(value)}"
        elif old[name] != value:
            if isinstance(old[name], dict) and isinstance(value, dict):
                if all(map(_plain_key, {*value, *old[name]})):
                    yield from _differences(old[name], value, f"{key}{name}.")
                    continue
                if old[name].keys() - value.keys():  # a mapping is merged into what is there
                    yield f"{key}{name}=null"
            yield f"{key}{name}={value_text(value)}"


def _plain_key(key: object) -> bool:
    return str(key).replace("_", "").replace("-", "").isalnum()


def value_text(value: Any, space: str = "") -> str:
    """A value in the words of Hydra's command line.

    Args:
        value: of a setting.
        space: what follows a comma or a colon.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, dict):
        pairs = (f"{k}:{space}{value_text(v, space)}" for k, v in value.items())  # no quotes for keys
        return "{" + f",{space}".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + f",{space}".join(value_text(v, space) for v in value) + "]"
    return hydra_value(str(value))


def save(run: Run, folder: Path) -> None:
    """Leave what was composed in a run's folder, as Hydra does: `.hydra/config.yaml` and `overrides.yaml`."""
    place = folder / ".hydra"
    write_text(place / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(settings_of(run))))
    write_text(place / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(run.overrides)))


def command(run: Run, *flags: str) -> str:
    """The command line that repeats a composed run."""
    c = run.composition or Composition()
    folder = ["--config-dir", c.config_dir] if c.config_dir else []
    return shlex.join(["python", "-m", "mergelab", *folder, *flags, *c.overrides])
