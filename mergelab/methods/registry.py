"""The merge methods: for each one row, of what mergekit declares and what we know besides (`traits`).

A method is one of mergekit's, or one that a user brings: a Python file in `my_conf/methods/` of
`--config-dir my_conf`, or a package with an entry point in the group `mergelab.methods`. Either registers
it with mergekit, by `mergelab.methods.register` or by mergekit's own `register`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from mergelab.core.errors import did_you_mean
from mergelab.core.findings import Finding, error
from mergelab.core.registry import Origin, Registry
from mergelab.methods import declared
from mergelab.methods.declared import Inputs, Parameter
from mergelab.methods.traits import TASK_VECTORS, TRAITS, Traits

if TYPE_CHECKING:
    from mergekit.merge_methods import MergeMethod

MERGEKIT = Origin("mergekit")


@dataclass(frozen=True)
class MethodInfo:
    """Everything known of a merge method."""

    name: str
    parameters: Mapping[str, Parameter]
    inputs: Inputs
    traits: Traits
    origin: Origin

    @property
    def used(self) -> set[str]:
        """The parameters that make a difference."""
        return set(self.parameters) - self.traits.unused

    @property
    def rescales(self) -> bool:
        """Whether `method.rescale` says how it makes up for what it drops."""
        return self.traits.kernel == TASK_VECTORS and "rescale" in self.used

    @property
    def whole_tensors(self) -> bool:
        """Whether merging holds whole tensors, because there is no kernel that works on chunks."""
        return self.traits.kernel is None

    @property
    def code(self) -> str:
        """A hash of the code that a user brought for it; empty for mergekit's methods. What is begun with
        other code is not continued."""
        return self.origin.digest


class _Methods(Registry["MergeMethod"]):
    """mergekit's own registry, together with where each method comes from."""

    def __init__(self) -> None:
        super().__init__("methods", "merge method")
        self._traits: dict[str, Traits] = {}
        self._rows: dict[str, tuple[MergeMethod, MethodInfo]] = {}

    def register(self, method: MergeMethod, traits: Traits) -> None:
        """Add a method to mergekit's registry and to ours.

        Raises:
            InputError: where the name is taken.
        """
        from mergekit.merge_methods import register as register_with_mergekit

        name = method.spec.name
        self.add(name, method)
        register_with_mergekit(method)
        self._traits[name] = traits

    def load(self) -> None:
        """As `Registry.load`, after what mergekit and the running program have registered."""
        for method in _registered():
            if method.spec.name not in self._entries:
                self._entries[method.spec.name] = method, _origin_of(method)
        super().load()

    def remove(self, name: str) -> None:
        """Forget a method, here and in mergekit's registry."""
        super().remove(name)
        self._traits.pop(name, None)
        _drop(name)

    @contextmanager
    def _registering(self, origin: Origin) -> Iterator[None]:
        try:
            with super()._registering(origin):
                yield
                for method in self._strays():
                    self.add(method.spec.name, method)
        except BaseException:
            for method in self._strays():
                _drop(method.spec.name)
            raise

    def _strays(self) -> list[MergeMethod]:
        """What has been registered with mergekit alone."""
        return [m for m in _registered() if m.spec.name not in self._entries]

    def row(self, name: str) -> MethodInfo:
        """Everything known of a method.

        Raises:
            LookupError: for an unknown name.
        """
        method = self.get(name)
        if name not in self._rows or self._rows[name][0] is not method:
            self._rows[name] = method, self._row(method)
        return self._rows[name][1]

    def _row(self, method: MergeMethod) -> MethodInfo:
        name = method.spec.name
        origin = self._entries[name][1]
        traits = self._traits.get(name) or (TRAITS.get(name) if origin is MERGEKIT else None) or Traits()
        parameters = {
            p.name: replace(p, allowed=traits.ranges.get(p.name, p.allowed))
            for p in declared.parameters(method)
        }
        return MethodInfo(name, parameters, declared.inputs(method), traits, origin)


METHODS = _Methods()


def register(method: Any = None, /, **traits: Any) -> Any:
    """Register a merge method of your own, above mergekit's decorator:

        @register
        @merge_method(name="consensus_ta", ...)
        def consensus_ta(group: TensorGroup, weight: PerNonBase[float]) -> torch.Tensor: ...

    Args:
        method: what mergekit's `merge_method` has made of a function.
        traits: what mergekit cannot know: the fields of `mergelab.methods.Traits`, such as `random=True`.
    Returns:
        the method.
    Raises:
        InputError: where the name is taken.
        TypeError: for traits that the method cannot have.
    """
    if method is None:
        return lambda made: register(made, **traits)
    known = Traits(**traits)
    if not (known.kernel is None or callable(known.kernel)):
        raise TypeError(f"kernel has to be a function, not {known.kernel!r}")
    if unknown := known.named - {p.name for p in method.spec.parameters}:
        raise TypeError(f"{method.spec.name} has no parameter {', '.join(sorted(unknown))}")
    METHODS.register(method, known)
    return method


def methods() -> dict[str, MethodInfo]:
    """Every merge method by name (imports torch).

    Raises:
        InputError: where a user's file fails to import.
    """
    return {name: METHODS.row(name) for name in METHODS.names()}


def get(name: str) -> MethodInfo:
    """Everything known of a method (imports torch).

    Raises:
        LookupError: for an unknown name.
        InputError: where a user's file fails to import.
    """
    return METHODS.row(name)


def function(name: str) -> MergeMethod:
    """The method as mergekit executes it."""
    return METHODS.get(name)


def code_of(names: Iterable[str]) -> dict[str, str]:
    """For those of these methods that a user brought the hash of their code, by name."""
    known = methods()
    return {n: known[n].code for n in sorted(set(names)) if n in known and known[n].code}


def check_name(name: str, place: str) -> list[Finding]:
    """An error where there is no such method."""
    choices = sorted(methods())
    if name in choices:
        return []
    return [
        error(
            "unknown-method",
            place,
            f"'{name}' is not a merge method.{did_you_mean(name, choices)}",
            f"There are {', '.join(choices)}.",
        )
    ]


def _registered() -> tuple[MergeMethod, ...]:
    from mergekit.merge_methods import registered_methods

    found: tuple[MergeMethod, ...] = registered_methods()
    return found


def _drop(name: str) -> None:
    """Take a method out of mergekit's registry, which has no function for it."""
    from mergekit.merge_methods import registry

    registry._METHODS.pop(name, None)


def _origin_of(method: MergeMethod) -> Origin:
    """Where a method comes from that no file or package of `Registry.load` registered."""
    made: Callable[..., Any] = getattr(method, "implementation", type(method))
    if made.__module__.partition(".")[0] == "mergekit":
        return MERGEKIT
    try:
        source = inspect.getsource(made)
    except (OSError, TypeError):  # typed at a prompt: never the same one again
        source = repr(made)
    return Origin(f"{made.__module__}.{made.__qualname__}", sha256(source.encode()).hexdigest())
