"""What an exception says on one line: never its key or a first line that says nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

from mergelab.core.errors import LONGEST, first_line, summary, typed_line


def caught(work: Callable[[], Any]) -> Exception:
    try:
        work()
    except Exception as e:
        return e
    raise AssertionError("nothing was raised")


def of(message: str) -> str:
    return first_line(ValueError(message))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("It is too small.\nSee the page on sizes.", "It is too small."),
        ("Validation error for field 'x':\n    TypeError: expected float", None),
        ("Error(s) in loading X:\n\tsize mismatch for a,\n\tand for b.\n\tMore.", None),
        ("\nX requires the Y library but it was not found. Check the\ninstallation page: Z\n", None),
        ("One of: \n(1) a file, \n(2) a tokenizer or \n(3) a class. \nInstall one.", None),
        ("CUDA error: out of memory\nCompile with `X`", "CUDA error: out of memory"),
    ],
)
def test_a_sentence_is_not_cut(message: str, said: str | None) -> None:
    whole = {
        "Val": "Validation error for field 'x': TypeError: expected float",
        "Err": "Error(s) in loading X: size mismatch for a, and for b.",
        "\nX ": "X requires the Y library but it was not found. Check the installation page: Z",
        "One": "One of: (1) a file, (2) a tokenizer or (3) a class.",
    }
    assert of(message) == (said or whole[message[:3]])


def test_pydantic_names_fields_and_reasons() -> None:
    class Two(BaseModel):
        first: int
        second: list[str]

    said = first_line(caught(lambda: Two.model_validate({"first": "x"})))
    assert said.startswith("first: Input should be a valid integer")
    assert said.endswith("; second: Field required")


@pytest.mark.parametrize("key", [322, "config"])
def test_a_key_comes_with_the_place(key: object) -> None:
    said = typed_line(caught(lambda: {}[key]))
    assert said.startswith(f"KeyError: there is no entry {key!r} (core/test_errors.py, line ")
    assert said.endswith(", in <lambda>)")


def test_an_assertion_without_a_word_comes_with_the_place() -> None:
    def fails() -> None:
        raise AssertionError

    said = typed_line(caught(fails))
    assert said.startswith("AssertionError: core/test_errors.py, line ") and said.endswith(", in fails")


def test_code_of_a_library_is_named_by_its_package() -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    e = caught(lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer).encode("x"))
    assert "(transformers/tokenization_utils" in first_line(e)


def test_errors_of_the_system_and_long_messages() -> None:
    assert first_line(FileNotFoundError(2, "No such file", "a/b")) == "No such file: a/b"
    assert len(of("x y " * LONGEST)) < LONGEST + 9
    assert typed_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert summary(ValueError("it is wrong")) == "ValueError: it is wrong."
