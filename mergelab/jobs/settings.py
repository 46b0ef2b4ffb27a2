"""Settings that users' steps bring along: each becomes a section of the `Run` that is composed.

Nothing of our own steps is imported here: their sections are in the schema, and composing must be fast.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache
from typing import Any

from mergelab.core import registry
from mergelab.core.errors import InputError
from mergelab.jobs.step import STEPS
from mergelab.schema import Composition, Run


def run_type(config_dir: str | None, base: type[Any] = Run) -> type[Any]:
    """`Run`, with a section for each step with settings of a user's folder and of installed packages.

    Args:
        config_dir: the user's folder, or None.
        base: what the sections are added to.
    Raises:
        InputError: where a step cannot be imported, or its settings cannot become a section.
    """
    if config_dir is not None:
        registry.use_config_dir(config_dir)
    own = STEPS.added(in_folder=config_dir is not None)
    sections = tuple((s.name, s.settings) for s in own.values() if isinstance(s.settings, type))
    return _extended(base, sections) if sections else base  # type: ignore[arg-type]  # a class has a hash


@cache
def _extended(base: type[Any], sections: tuple[tuple[str, type[Any]], ...]) -> type[Any]:
    for name, settings in sections:
        where = STEPS.origin(name).label
        if not name.isidentifier() or name in {f.name for f in fields(base)}:
            raise InputError(
                f"{where}: the settings of step '{name}' cannot become the section '{name}' of a run, "
                "because its name is taken or not a plain word"
            )
        if not is_dataclass(settings):
            raise InputError(f"{where}: the settings of step '{name}' are not a dataclass")
        with registry.explained(where):
            _checked(settings)
    made = [(name, settings, field(default_factory=settings)) for name, settings in sections]
    return make_dataclass(base.__name__, made, bases=(base,), namespace={"__reduce__": _reduced})


def _checked(settings: type[Any]) -> None:
    """Raises whatever OmegaConf has against a dataclass."""
    from omegaconf import OmegaConf

    OmegaConf.structured(settings)


def _reduced(run: Run) -> tuple[Any, ...]:
    """Lets such a run be pickled: its type is made again where it is loaded."""
    ours = {f.name: getattr(run, f.name) for f in fields(Run)}
    own = {f.name: asdict(getattr(run, f.name)) for f in fields(run) if f.name not in ours}
    return _restored, (run.composition, ours, own)


def _restored(composition: Composition | None, ours: dict[str, Any], own: dict[str, Any]) -> Run:
    from omegaconf import OmegaConf

    registry.use_extensions(composition)
    kind = run_type(composition.config_dir if composition else None)
    types = {f.name: f.default_factory for f in fields(kind)}
    nodes = {k: OmegaConf.merge(OmegaConf.structured(types[k]), v) for k, v in own.items()}
    run: Run = kind(**ours, **{k: OmegaConf.to_object(node) for k, node in nodes.items()})
    return run


def with_extensions(run: Run, work: Callable[[], Any]) -> Callable[[], Any]:
    """Work for another process that can be unpickled there: what a user's files define is imported first."""
    return work if run.composition is None or run.composition.config_dir is None else _Work(run, work)


@dataclass(frozen=True)
class _Work:
    run: Run
    work: Callable[[], Any]

    def __call__(self) -> Any:
        return self.work()

    def __reduce__(self) -> tuple[Any, ...]:
        import cloudpickle

        return _unpickled, (self.run, cloudpickle.dumps(self.work))


def _unpickled(run: Run, work: bytes) -> Any:
    registry.use_extensions(run.composition)
    STEPS.load()
    return pickle.loads(work)
