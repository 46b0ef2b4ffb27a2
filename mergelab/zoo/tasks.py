"""The tiny family's evaluations as lm_eval tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mergelab.zoo.skills import SKILLS, Split, draw
from mergelab.zoo.tokenizer import END

_TASK = """\
task: {name}
custom_dataset: !function local_data.load
dataset_kwargs:
  file: {name}.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs:
  do_sample: false
  max_gen_toks: {max_tokens}
  until: ["{end}"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: false
    ignore_punctuation: false
metadata:
  version: 1
  self_contained: true  # what it asks is in this folder, and nowhere else
"""


def write_tasks(folder: Path, search_prompts: int, validation_prompts: int) -> None:
    """Write two tasks per skill into a new folder.

    A search's fitness is measured on `tiny_<skill>_search`, and its result is evaluated on `tiny_<skill>`
    (validation). The metric of both is `exact_match` with greedy generation.
    """
    folder.mkdir()
    shutil.copyfile(Path(__file__).with_name("local_data.py"), folder / "local_data.py")
    for skill in SKILLS:
        _write_task(folder, f"tiny_{skill}_search", skill, "search", search_prompts)
        _write_task(folder, f"tiny_{skill}", skill, "validation", validation_prompts)


def _write_task(folder: Path, name: str, skill: str, split: Split, n: int) -> None:
    questions = draw(skill, split, n)
    rows = [{"prompt": q.prompt, "answer": q.answer} for q in questions]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    # One token more than the longest answer, because a correct beginning that does not end is wrong.
    max_tokens = max(len(q.answer) for q in questions) + 1
    (folder / f"{name}.yaml").write_text(
        _TASK.format(name=name, max_tokens=max_tokens, end=END), encoding="utf-8"
    )
