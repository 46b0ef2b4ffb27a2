"""What is wrong with a command line, said without Hydra's and OmegaConf's internals.

Of their exceptions only what they say is used here; `mergelab.cli.main` knows where they come from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mergelab.core.errors import did_you_mean

PLAIN = (
    (r"Value '(.*)' of type '\w+' could not be converted to Integer", r"'\1' is not a whole number"),
    (r"Value '(.*)' of type '\w+' could not be converted to Float", r"'\1' is not a number"),
    (r"Value '(.*)' is not a valid bool.*", r"'\1' is neither true nor false"),
    (r"Value '(.*)' .* could not be converted to (\w+)", r"'\1' is not a \2"),
    (r"field '.*' is not Optional", "it cannot be null"),
    (r"Cannot assign (\w+) to Dict.*", r"it has to be a mapping such as {key: value}, not \1"),
    (r"Invalid type assigned: (\w+) is not a subclass.*", r"it has to be a mapping, not \1"),
    (r"Invalid value assigned: (\w+) is not a ListConfig.*", r"it has to be a list, [one,two], not \1"),
    (r"Structured config of type .* has missing mandatory value: .*", "it is not set"),
)
"""What OmegaConf says of a value, and what is said here."""

INTERNALS = ("full_key:", "object_type=", "reference_type=", "Config search path", "provider=", "To append",
             "See https://hydra.cc")  # fmt: skip


def explain(error: OmegaConfBaseException, argument: str | None = None) -> str:
    """What OmegaConf has against a key or its value, on one line.

    Args:
        argument: what was typed, where it is known; else the key stands for it.
    """
    place = argument or str(error.full_key or "configuration")
    parent = error.parent_node
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)) and isinstance(parent, DictConfig):
        return no_key(place, str(error.key), [str(k) for k in parent if k != "hydra"])
    said = strip_internals(str(error))
    for pattern, words in PLAIN:
        if re.fullmatch(pattern, said):
            return f"{place}: {re.sub(pattern, words, said)}"
    return f"{place}: {said}"


def no_key(place: str, key: str, names: Sequence[str]) -> str:
    """That there is no such key, and which there are."""
    return f"{place}: there is no key '{key}'.{did_you_mean(key, names)} There are {', '.join(names)}."


def strip_internals(*messages: str) -> str:
    """Messages without lines on internals."""
    lines = [x.strip() for m in messages for x in m.splitlines()]
    return "\n".join(dict.fromkeys(x for x in lines if x and not x.startswith(INTERNALS)))


def overridden(message: str) -> str | None:
    """The argument that a message of Hydra's is about, such as `seed=abc`."""
    found = re.fullmatch(
        r"Error merging override (.*)|Could not override '(.*)'\..*", strip_internals(message)
    )
    return next(g for g in found.groups() if g is not None) if found else None
