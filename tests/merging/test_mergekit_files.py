"""Plain mergekit files as its documentation has them, the models' names replaced: they run unchanged, and
give the bits that `mergekit-yaml` gives under the same seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command
from weights import mergekit_yaml, same_bits

FILES = {
    # https://github.com/arcee-ai/mergekit/tree/main/examples
    "bio-merge": """
        models:
          - model: {b}
            parameters: {{density: 0.5, weight: 0.5}}
          - model: {c}
            parameters: {{density: 0.5, weight: 0.5}}
        merge_method: ties
        base_model: {a}
        parameters: {{normalize: false, int8_mask: true}}
        dtype: float16
        """,
    "gradient-slerp": """
        slices:
          - sources:
              - model: {b}
                layer_range: [0, 40]
              - model: {c}
                layer_range: [0, 40]
        merge_method: slerp
        base_model: {b}
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5 # fallback for rest of tensors
        dtype: float16
        """,
    "linear": """
        models:
          - model: {a}
            parameters:
              weight: 1.0
          - model: {b}
            parameters:
              weight: 0.3
          - model: {c}
            parameters:
              weight: 0.5
        merge_method: linear
        dtype: float16
        """,
    "orcamini-platy-44layer": """
        slices:
          - sources:
            - model: {b}
              layer_range: [0, 24]
          - sources:
            - model: {c}
              layer_range: [20, 40]
        merge_method: passthrough
        dtype: float16
        """,
    "ties": """
        models:
          - model: {b}
            parameters:
              density: [1, 0.7, 0.1] # density gradient
              weight: 1.0
          - model: {c}
            parameters:
              density: 0.5
              weight: [0, 0.3, 0.7, 1] # weight gradient
          - model: {d}
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0
        merge_method: ties
        base_model: {a}
        parameters:
          normalize: true
          int8_mask: true
        dtype: float16
        """,
    "arcee_fusion": """
        models:
          - model: {b}
          - model: {c}
        merge_method: arcee_fusion
        base_model: {b}
        dtype: bfloat16
        """,
    # the random methods, whose masks are drawn from the seed (docs/merge_methods.md); docs/multimerge.md
    "dare_ties": """
        merge_method: dare_ties
        base_model: {a}
        models:
          - model: {b}
            parameters:
              density: 0.6
              weight: 0.5
          - model: {c}
            parameters:
              density: 0.8
              weight: 0.5
        """,
    "della": """
        merge_method: della
        base_model: {a}
        models:
          - {{model: {b}, parameters: {{density: 0.6, weight: 0.5, epsilon: 0.1}}}}
          - {{model: {c}, parameters: {{density: 0.5, weight: 0.5, epsilon: 0.1}}}}
        parameters: {{lambda: 1.0}}
        dtype: float32
        """,
    # README.md, tokenizer and chat template
    "tokenizer": """
        merge_method: linear
        models:
          - {{model: {b}, parameters: {{weight: 0.5}}}}
          - {{model: {c}, parameters: {{weight: 0.5}}}}
        dtype: float32
        tokenizer:
          source: union
          tokens:
            <|endoftext|>:
              source: {b}
            <|pad|>:
              source: {c}
              force: true
            <|renamed_token|>:
              source:
                kind: model_token
                model: {b}
                token: <|endoftext|>
            <|unused|>:
              source:
                kind: zero
          pad_to_multiple_of: 8
        chat_template: chatml
        """,
}


@pytest.fixture(scope="module")
def deep(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four models of 40 layers, as the examples' have."""
    folder = tmp_path_factory.mktemp("deep")
    return {
        name: make_model(
            folder / name, "llama", seed=seed, hidden_size=16, head_dim=4, intermediate_size=24,
            num_hidden_layers=40, tied=False,
        )
        for seed, name in enumerate("abcd")
    }  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_from_the_documentation(
    name: str, deep: dict[str, Path], mergelab: Command, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(FILES[name].format(**deep), encoding="utf-8")
    out = mergelab("method=mergekit", f"method.path={file}", "eval=none", "seed=3")
    assert out.status == 0, out.err
    own = mergekit_yaml(file, tmp_path / "own", seed=3)
    assert same_bits(out.folder / "model", own)
    assert out.result["check"]["problems"] == []  # which has loaded it and let it answer
    # and what the run leaves is such a file again
    again = mergekit_yaml(out.folder / "recipe.yaml", tmp_path / "again", seed=3)
    assert same_bits(again, own)
