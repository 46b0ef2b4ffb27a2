"""One model with an adapter: peft's modules become weights again, in float32, one module after another."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergelab.core.errors import StepError, summary
from mergelab.core.findings import first_few
from mergelab.core.model_class import model_class
from mergelab.core.run_dir import read_json
from mergelab.models.adapters import copies

log = logging.getLogger(__name__)

TIED = "tie_word_embeddings"

PREFIX = "base_model.model."
"""What peft puts before the names of a model's own modules."""


class AdaptedModel:
    """A model with an adapter in it. Its weights can be taken once: modules are given up one by one."""

    def __init__(self, base: Path, adapter: Path, *, trust_remote_code: bool = False) -> None:
        """Load both.

        Args:
            base: The folder of the model.
            adapter: The folder of the adapter.
            trust_remote_code: Whether code that comes with the model may run.

        Raises:
            StepError: peft cannot put the adapter on this model, or cannot merge it.
        """
        self.heads: dict[str, str] = {}
        """The embedding by each head that has parted from it, as files name them. Known at the end."""
        self._base, self._adapter = base, adapter
        self._what = f"{adapter} cannot be put on {base}"
        with self._refusing():
            self._model = _load(base, trust_remote_code)
            parameters = dict(self._model.named_parameters(remove_duplicate=False))
            self._dtypes = {n: p.dtype for n, p in parameters.items()}
            self._shapes = {n: tuple(p.shape) for n, p in parameters.items()}
            shared, self._ends = _shared(parameters), _ends(self._model)
            self._tuner = self._wrap()
            self._wrappers = dict(_wrappers(self._model))
            self._direct = self._replaced_directly()
            self._twins = self._part(shared, parameters)
        self._changed = [n for n in self._dtypes if self._adapts(n) or n in self._direct]

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn every exception of peft and transformers into a StepError."""
        import torch

        try:
            with torch.no_grad(), warnings.catch_warnings():
                # Tied weights part here, so peft need not say that they should.
                warnings.filterwarnings("ignore", message="(?s).*tie")
                yield
        except StepError:
            raise
        except Exception as e:  # they raise exceptions of every type
            log.exception("the adapter cannot be put on")
            raise StepError(f"{self._what}: {summary(e)}") from e

    def _wrap(self) -> Any:
        """Put peft's modules into the model, and return the tuner that has done so."""
        from peft import PeftConfig, PeftModel

        config = PeftConfig.from_pretrained(str(self._adapter))
        config.inference_mode = True
        wrapped = PeftModel(self._model, config)
        found = wrapped.load_adapter(str(self._adapter), "default", torch_device="cpu")
        unexpected = {*found.unexpected_keys} - copies(self._names())
        if odd := [*found.missing_keys, *sorted(unexpected)]:
            raise StepError(f"{self._what}: peft has no module for, or misses, {first_few(odd)}")
        tuner: Any = wrapped.base_model
        if not hasattr(tuner, "merge_and_unload"):
            kind = config.peft_type.value
            raise StepError(f"{self._what}: an adapter of the type {kind} has no weights to merge")
        tuner._check_merge_allowed()
        for name, tensor in (*tuner.named_parameters(), *tuner.named_buffers()):
            if tuner.prefix in name:  # some kinds keep tensors outside the modules that use them
                _widen(tensor)
        return tuner

    def _replaced_directly(self) -> set[str]:
        """The weights that the adapter replaces without a module of peft's, such as biases."""
        names = {n.removeprefix(PREFIX) for n in self._names()}
        return {n for n in names if n in self._dtypes and not self._adapts(n)}

    def _names(self) -> set[str]:
        """The names of the tensors in the adapter's file."""
        from safetensors import safe_open

        with safe_open(str(self._adapter / "adapter_model.safetensors"), framework="pt") as f:
            return {*f.keys()}

    def _adapts(self, parameter: str) -> bool:
        return any(parameter.startswith(f"{wrapper}.") for wrapper in self._wrappers)

    def _part(self, shared: list[list[str]], parameters: Mapping[str, Any]) -> dict[str, str]:
        """Give every module that shares a weight which the adapter changes a weight of its own.

        Returns:
            The first name of such a weight by each of its other names.
        """
        import torch

        twins: dict[str, str] = {}
        for first, *others in shared:
            if not any(self._adapts(n) or n in self._direct for n in (first, *others)):
                continue
            twins |= dict.fromkeys(others, first)
            weight, owner = parameters[first], first.rpartition(".")[0]
            for name, module in self._model.named_modules():
                if not f"{name}.".startswith(f"{owner}."):
                    for leaf, p in list(module.named_parameters(recurse=False)):
                        if p is weight:
                            setattr(module, leaf, torch.nn.Parameter(weight.clone(), requires_grad=False))
        return twins

    def names(self) -> set[str] | None:
        """What files call the tensors that change, but for heads that part; None where that is not known."""
        import torch

        own = {n: torch.empty(self._shapes[n], device="meta") for n in self._changed if n not in self._twins}
        try:
            return {file_name for n, t in own.items() for file_name in self._as_files({n: t})}
        except Exception:  # transformers converts several tensors at once, and has no other way to say so
            log.info("the changed tensors have no names of their own", exc_info=True)
            return None

    def changed(self, *, wide: bool) -> Iterator[tuple[str, Any]]:
        """The tensors that change, by their names in files.

        Args:
            wide: Whether they stay in float32 where the model's dtype is narrower.

        Raises:
            StepError: peft cannot merge them, or the result cannot be written as one model.
        """
        with self._refusing():
            kept: dict[str, Any] = {}
            for name, tensor in self._merged():
                if name in self._twins or name in self._twins.values():
                    kept[name] = tensor
                else:
                    yield from self._as_files({name: self._cast(name, tensor, wide)}).items()
            for first in dict.fromkeys(self._twins.values()):
                if first in kept:
                    yield from self._as_files({first: self._cast(first, kept[first], wide)}).items()
            for name, tensor in self._parted(kept):
                yield from self._as_files({name: self._cast(name, tensor, wide)}).items()

    def everything(self, *, wide: bool) -> Iterator[tuple[str, Any]]:
        """All tensors of the model, as `changed` gives those that change. They are in memory together."""
        with self._refusing():
            state = dict(self._merged())
            parted = dict(self._parted(state))
            left_out = {*self._twins} - {*parted} | {*(self._model._keys_to_ignore_on_save or ())}
            left_out |= {n for group in self._shared_now() for n in group[1:]}
            state = {**self._model.state_dict(), **state, **parted}
            state = {n: self._cast(n, t, wide) for n, t in state.items() if n not in left_out}
            yield from self._as_files(state).items()

    def _shared_now(self) -> list[list[str]]:
        return _shared(dict(self._model.named_parameters(remove_duplicate=False)))

    def copies(self) -> set[str]:
        """What files call the weights that are copies of another one, which may have changed since."""
        return {f for n in self._twins for f in self._as_files({n: self._placeholder(n)})} - {*self.heads}

    def _placeholder(self, name: str) -> Any:
        import torch

        return torch.empty(self._shapes[name], device="meta")

    def _merged(self) -> Iterator[tuple[str, Any]]:
        """The weights that change, by the model's names, in float32 where that is wider than their own."""
        import torch

        for name, wrapper in self._wrappers.items():
            for tensor in (*wrapper.parameters(), *wrapper.buffers()):
                _widen(tensor)
            if hasattr(wrapper, "unload_and_optionally_merge_module"):
                plain = wrapper.unload_and_optionally_merge_module(
                    merge=True, safe_merge=False, adapter_names=None
                )
            else:
                wrapper.merge(safe_merge=False, adapter_names=None)
                plain = wrapper.get_base_layer()
            self._model.set_submodule(name, plain)
            for leaf, p in plain.named_parameters():
                yield f"{name}.{leaf}", p.detach()
            for module in plain.modules():  # not the weights, which another module may share
                for leaf in dict(module.named_parameters(recurse=False)):
                    setattr(module, leaf, torch.nn.Parameter(torch.empty(0), requires_grad=False))
        for name in sorted(self._direct):
            yield name, self._model.get_parameter(name).detach()

    def _parted(self, changed: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """The weights that were others' and are their own now."""
        for twin, first in self._twins.items():
            one, other = (
                changed[n] if n in changed else self._model.get_parameter(n).detach() for n in (first, twin)
            )
            if _same(one, other):
                continue
            self._check_can_part(first, twin)
            (head,), (embedding,) = (self._as_files({n: self._placeholder(n)}) for n in (twin, first))
            self.heads[head] = embedding
            yield twin, other

    def _check_can_part(self, first: str, twin: str) -> None:
        """Raise where no config.json describes a model in which two weights are no longer one."""
        kind = type(self._model)
        if (first, twin) != self._ends:
            reason = "only a head and its embedding can part"
        elif not _describes_parted(
            type(self._model.config), self._base / "config.json"
        ) or "self.config.tie_word_embeddings" in inspect.getsource(kind.forward):
            reason = (
                f"no config.json describes a {kind.__name__} in which they are two, and nothing else differs"
            )
        else:
            return
        raise StepError(f"{self._what}: it changes {twin}, which is also {first}, and {reason}")

    def _cast(self, name: str, tensor: Any, wide: bool) -> Any:
        """The tensor in the model's own dtype, or as it was computed."""
        own = self._dtypes.get(name)
        if own is None or (wide and name in self._changed and own.itemsize < tensor.dtype.itemsize):
            return tensor
        return tensor.to(own)

    def _as_files(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors under the names, and in the layout, that the model's files have."""
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self._model, dict(tensors)))


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json by which the model has a head of its own."""
    parts = {k: {**v, TIED: False} for k, v in config.items() if isinstance(v, dict) and TIED in v}
    return {**config, **parts, TIED: False}


def _describes_parted(kind: Any, file: Path) -> bool:
    """Whether a config.json of this kind can say that head and embedding are two, and no more."""

    def without(config: Mapping[str, Any]) -> dict[str, Any]:
        inner = {k: without(v) if isinstance(v, dict) else v for k, v in config.items()}
        return {k: v for k, v in inner.items() if k != TIED}

    content = read_json(file)
    one, two = kind.from_dict(content), kind.from_dict(untied(content))
    return not two.tie_word_embeddings and without(one.to_dict()) == without(two.to_dict())


def _load(base: Path, trust: bool) -> Any:
    from transformers import AutoConfig

    code = {"trust_remote_code": trust, "local_files_only": True}
    kind = model_class(AutoConfig.from_pretrained(base, **code))
    return kind.from_pretrained(base, dtype="auto", **code)


def _wrappers(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules that peft has put around others, without those inside of them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = f"{name}."
            yield name, module


def _shared(parameters: Mapping[str, Any]) -> list[list[str]]:
    """The names of each weight that has several."""
    names: dict[int, list[str]] = {}
    for name, p in parameters.items():
        names.setdefault(id(p), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _ends(model: Any) -> tuple[str, str] | None:
    """The names of the weights of the embedding and the head, if the model has both."""
    names = {m: f"{n}.weight" for n, m in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return (names[embedding], names[head]) if embedding in names and head in names else None


def _widen(tensor: Any) -> None:
    """Have a parameter or buffer of 16 bits in float32, in place."""
    if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
        tensor.data = tensor.data.float()


def _same(one: Any, other: Any) -> bool:
    """Whether two weights are equal up to the rounding of two ways to compute them."""
    import torch

    if one.shape != other.shape:
        return False
    a, b = one.float(), other.float()
    return bool(torch.equal(a, b) or torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(a.abs().max())))
