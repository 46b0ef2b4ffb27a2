"""The model card: README.md in the merged model's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergelab.core.run_dir import RunDir, read_json, write_text
from mergelab.report import score_table


def write_card(run_dir: RunDir, folder: Path) -> None:
    """The card of a run's model, with the scores where it has been measured."""
    result, recipe = read_json(run_dir.result), run_dir.recipe.read_text(encoding="utf-8")
    write_text(folder / "README.md", card(result, recipe, run_dir.model.name))


def card(result: Mapping[str, Any], recipe: str, name: str) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    Args:
        result: result.json.
        recipe: the text of recipe.yaml.
        name: the model's name.
    """
    inputs = result.get("inputs", [])
    hub = [m["path"] for m in inputs if m.get("commit")]
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["mergekit", "merge", "mergelab"]}
    if hub:
        front["base_model"] = hub
    method = result.get("merge_method", "")
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---\n",
        f"# {name}\n",
        f"Merged with the method `{method}` by mergelab {result['versions']['mergelab']} "
        f"(engine {result.get('engine')}, mergekit {result['versions']['mergekit']}), "
        f"seed {result['seed']}.\n",
        "## Models\n",
        score_table.markdown(["name", "model", "commit or content"], [_input(m) for m in inputs]) + "\n",
    ]
    if result.get("metrics"):
        heads, body = score_table.rows(result["metrics"], "validation", result.get("shares", {}))
        if body:
            tasks = {n: s for m in result["metrics"].values() for n, s in m.get("validation", {}).items()}
            parts += [
                "## Evaluation\n",
                score_table.markdown(heads, body) + "\n",
                "Measured with lm_eval "
                f"{result['versions']['lm_eval']}{score_table.how(result.get('measured') or {})}: "
                + ", ".join(
                    f"{n}: {s['metric']} on {s['samples']:,} of {s['task']}" for n, s in tasks.items()
                )
                + ". ± is one standard error.\n",
            ]
    parts += [
        "## Recipe\n",
        f"```yaml\n{_public(recipe, inputs)}```\n",
        "## Command\n",
        f"```\n{result['command']}\n```\n",
        f"Run key `{result.get('key', '')}`.\n",
    ]
    return "\n".join(parts)


def _public(recipe: str, inputs: Sequence[Mapping[str, Any]]) -> str:
    """The recipe with hub ids in the place of this machine's folders."""
    for m in sorted(inputs, key=lambda m: -len(m["reference"])):
        commit = f"@{m['commit']}" if m.get("commit") else ""
        recipe = recipe.replace(m["reference"], m["path"] + commit)
    return recipe


def _input(m: Mapping[str, Any]) -> list[str]:
    path = m["path"]
    shown = f"[{path}](https://huggingface.co/{path})" if m.get("commit") else f"`{path}`"
    return [m["name"], shown, f"`{m.get('commit') or 'sha256 ' + m['content'][:16]}`"]
