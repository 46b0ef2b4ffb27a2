"""Which files of a folder belong to the model that is in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergelab.core.model_folder import companions, companions_of

BELONG = """
    tokenizer.json tokenizer.model spiece.model sentencepiece.bpe.model source.spm vocab.txt merges.txt
    bpe.codes tekken.json qwen.tiktoken preprocessor_config.json processor_config.json
    video_preprocessor_config.json chat_template.jinja chat_template.json normalizer.json
    additional_chat_templates/rag.jinja modules.json sentence_bert_config.json 1_Pooling/config.json
    LICENSE LICENSE.md anything_else.json further/words.txt
"""

DO_NOT = """
    config.json generation_config.json model.safetensors model.safetensors.index.json pytorch_model.bin
    consolidated.00.pth params.json model.gguf tf_model.h5 flax_model.msgpack README.md figure.png
    .gitattributes .cache/huggingface/x.json optimizer.pt trainer_state.json training_args.bin
    events.out.tfevents.1 runs/Jan/x.json checkpoint-500/tokenizer.json original/tokenizer.model
    onnx/tokenizer.json other/model.safetensors other/tokenizer.json adapter_config.json
    adapter_model.safetensors quantize_config.json mergekit_config.yml modeling_own.py handler.sh
    tokenizer.pkl 2_Dense/pytorch_model.bin
"""


def test_what_belongs_to_a_model_is_what_nothing_else_explains() -> None:
    assert companions(f"{BELONG} {DO_NOT}".split()) == sorted(BELONG.split())


@pytest.mark.parametrize("listed", [[{"path": "2_Dense"}, {"path": ""}], [{"path": "2_Dense/"}]])
def test_the_weights_of_further_modules_belong_to_the_model(tmp_path: Path, listed: object) -> None:
    (tmp_path / "2_Dense").mkdir()
    for name in ("model.safetensors", "2_Dense/model.safetensors", "2_Dense/config.json"):
        (tmp_path / name).touch()
    (tmp_path / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
    assert companions_of(tmp_path) == ["2_Dense/config.json", "2_Dense/model.safetensors", "modules.json"]
