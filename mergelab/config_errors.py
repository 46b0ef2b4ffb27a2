"""What is wrong with a command line, said without Hydra's and OmegaConf's internals.

`explain_composition` takes whatever composing raises, `explain` what OmegaConf raises.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mergelab.core.errors import InputError, did_you_mean

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


def explain_composition(error: BaseException, arguments: Sequence[str]) -> str:
    """What Hydra or OmegaConf has against arguments, without their internals.

    Args:
        error: what they raised.
        arguments: what was typed.
    """
    cause = error.__cause__
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = [o for o in error.options if not str(o).startswith("_")]
        near = did_you_mean(name, options)
        return f"{group}={name}: there is no such option.{near}\nThere are {', '.join(options)}."
    if isinstance(error, OverrideParseException):
        reason = strip_internals(str(error)).splitlines()[-1]
        reason = reason.replace("missing EQUAL at", "there is no = before")
        if set(reason) <= {"^"}:  # Hydra points at a sign that it knows only within quotes
            return f"'{error.override}' cannot be read\nPut texts in quotes: 'key=[\"one\", \"other\"]'."
        return (
            f"'{error.override}' cannot be read: {reason}\nArguments are key=value; quote what holds spaces."
        )
    if isinstance(error, OmegaConfBaseException):
        return explain(error)
    if isinstance(cause, OmegaConfBaseException):
        return explain(cause, overridden(str(error)))
    if isinstance(error, ValueError):
        return f"{shlex.join(arguments)}: {error}"
    return strip_internals(str(error), str(cause or ""))


def unwritable(error: OSError) -> str:
    """Why the run's folder cannot be made, or written to."""
    at = f" {error.filename}" if error.filename else ""
    return f"hydra.run.dir: cannot write{at}: {error.strerror}\nChoose another folder: hydra.run.dir=DIR"
