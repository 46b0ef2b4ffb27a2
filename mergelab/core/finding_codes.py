"""The codes of findings: what each means and what to do about it, in one table.

The reference page on findings is made from it, and a test keeps it complete. An extension of a user's may
use codes of its own.
"""

from __future__ import annotations

from typing import NamedTuple


class Code(NamedTuple):
    """What a code stands for."""

    cause: str
    remedy: str


CODES: dict[str, Code] = {
    "activation": Code(
        "An expert has another activation function than the base.", "Use fine-tunes of one base model."
    ),
    "adapter": Code(
        "An adapter cannot be used here: it is damaged, of a kind that has no weights to merge, or does not "
        "fit the model below it. As a warning: what peft leaves out of it.",
        "Use an adapter that peft saved for this base.",
    ),
    "adapter-base": Code(
        "A LoRA says that it was trained on another model than the one it is applied to.",
        "Name that model: `experts.ROLE.path=BASE+ADAPTER`.",
    ),
    "adapter-template": Code(
        "A LoRA comes with a chat template of its own; the output and measurements have that of its base.",
        "Set `model.chat_template` if the output needs it.",
    ),
    "added-tokens": Code(
        "An expert's tokenizer has other added tokens than the one that the output gets.",
        "Make sure that prompts do not need them, or set `model.tokenizer=union`.",
    ),
    "architecture": Code(
        "Models of different architectures.",
        "Use models of one architecture, or allow it if tensors of the same name mean the same in both.",
    ),
    "architecture-override": Code(
        "A YAML file says by `override_architecture` that a model has another architecture than its "
        "config.json says.",
        "Change `architectures` in a copy of its config.json.",
    ),
    "arithmetic": Code(
        "The recipe asks for arithmetic in 16 bits; the fast engine computes in float32 and rounds once.",
        "None is needed; `hardware.engine=mergekit` computes in 16 bits.",
    ),
    "base": Code(
        "`method.base` names a model that the method cannot take as its base.",
        "Set `method.base` to what the message names.",
    ),
    "base-merged": Code(
        "The method has no base model, so mergekit would merge the base in as one more model.",
        "Set `method.base=none`, or remove `base_model` from the YAML file.",
    ),
    "chat-template": Code(
        "`model.chat_template` is neither a known name nor a Jinja template that can be read.",
        "Correct the template, or choose one of the names in the message.",
    ),
    "config": Code(
        "An expert's config.json has another setting that changes what the model computes, such as a sliding "
        "window, a scale or the number of experts for a token; or its classes have other labels.",
        "Use fine-tunes of one base model.",
    ),
    "corrupt": Code(
        "A file is not what it should be: JSON, YAML, a tokenizer, a safetensors header.",
        "Fetch or write the file again.",
    ),
    "device": Code(
        "The CUDA device that was asked for is not there.", "Use `hardware=cpu`, or a device that exists."
    ),
    "disk": Code(
        "The disk has too little room for what would be written.", "Free some, or write to another disk."
    ),
    "documents": Code(
        "A YAML file has several documents, as mergekit-multi runs them.",
        "Put each into a file of its own, and run them one after another.",
    ),
    "dtype": Code(
        "Weights of a dtype that cannot be merged.",
        "Use an unquantized checkpoint in float32, bfloat16 or float16.",
    ),
    "duplicate": Code(
        "The same model takes part twice, or is the base itself.", "Leave one out: `'~experts.ROLE'`."
    ),
    "engine": Code(
        "`hardware.engine` or `method.rescale` asks for what the engine cannot do.",
        "Leave `hardware.engine` at auto.",
    ),
    "epsilon": Code(
        "DELLA's density - epsilon to density + epsilon leaves the range of probabilities.",
        "Lower epsilon, or move density away from 0 and 1.",
    ),
    "extra-tensor": Code(
        "A model has tensors of which transformers' model of its config.json makes nothing.",
        "Allow it if they are not needed: the merge leaves them out.",
    ),
    "filter": Code(
        "The filter of a parameter matches no tensor.", "Use one of the parts of names in the message."
    ),
    "float16": Code("Rescaling sums in float16, which overflows above 65504.", "Compute in float32."),
    "format": Code(
        "The model's files are not in the format that this step reads.",
        "Convert them: load with transformers and `save_pretrained`.",
    ),
    "gated": Code(
        "The repository is gated, and this login has no access.",
        "Accept the licence on its page, then `hf auth login`.",
    ),
    "heads": Code(
        "An expert has other numbers of attention heads than the base.", "Use fine-tunes of one base model."
    ),
    "inputs": Code(
        "The method takes another number of models.", "Choose another expert set or another method."
    ),
    "layer-range": Code(
        "The layers of a slice do not exist or do not fit together.",
        "Correct `layer_range` in the YAML file.",
    ),
    "layer-settings": Code(
        "A setting of single layers (a window, a scale, rotary positions) cannot follow a layer that is "
        "moved, or models that are merged disagree about it.",
        "Choose layers that keep their place, or allow it if the difference is intended.",
    ),
    "layers": Code(
        "An expert has another number of layers than the base.", "Use fine-tunes of one base model."
    ),
    "llama.cpp": Code(
        "The number of a mixture's experts is not a power of two, which llama.cpp requires.",
        "None is needed unless llama.cpp is to run it.",
    ),
    "memory": Code(
        "The run needs more memory than is available.",
        "Lower `hardware.shard_size`, set `eval=none`, or use a larger machine.",
    ),
    "missing": Code("A file, folder or model that is named does not exist.", "Correct the path."),
    "missing-file": Code(
        "A checkpoint is incomplete: its index names files that are not there.", "Fetch or copy it again."
    ),
    "missing-tensor": Code(
        "A checkpoint lacks tensors that transformers' model of its config.json has.",
        "Use the whole checkpoint.",
    ),
    "mixed-dtype": Code(
        "An expert's weights have another dtype than the base's.", "None is needed: arithmetic is in float32."
    ),
    "no-base": Code(
        "The method needs a base model; as a note: a YAML file names none, so the first model stands for it.",
        "Set `method.base=model`, or `base_model` in the YAML file.",
    ),
    "no-config": Code(
        "The folder or repository has no config.json or adapter_config.json.", "Name the folder of a model."
    ),
    "no-effect": Code(
        "A setting has no effect beside the others; as a warning: mergekit ignores it in a YAML file.",
        "Leave it out, or set what the message names.",
    ),
    "no-mixture": Code(
        "There is no architecture for a mixture of these models.", "Use models that the message names."
    ),
    "no-repository": Code(
        "There is no such folder, and the hub has no such repository or keeps it private.",
        "Check the name; for a private model: `hf auth login`.",
    ),
    "no-revision": Code("The repository does not have this revision.", "Look the revision up on its page."),
    "no-token": Code(
        "A token is taken from a model that does not have it.", "Name a model that has it, or `kind: zero`."
    ),
    "no-tokenizer": Code(
        "A model has no tokenizer: an error where an evaluation, a chat template or a tokenizer that is "
        "built needs one.",
        "Copy the tokenizer's files into its folder, or set `eval=none`.",
    ),
    "no-weights": Code(
        "The folder or repository has no weights that can be merged.",
        "Use an unquantized checkpoint in safetensors.",
    ),
    "norm": Code(
        "An expert has other settings of its norms than the base.", "Use fine-tunes of one base model."
    ),
    "not-downloaded": Code(
        "The model is on the hub and not on this machine.", "Fetch it: the same command with `job=fetch`."
    ),
    "not-generative": Code(
        "The class of a model, such as a reward model or an encoder, does not continue text, and is to be "
        "measured as a language model, or asked.",
        "Set `eval=none`; the merge itself needs no text.",
    ),
    "not-installed": Code(
        "An optional package is not installed.", "Install the extra that the message names."
    ),
    "output": Code(
        "The output folder is not empty, is not a folder, or cannot be written.",
        "Set `output=DIR` to a new folder.",
    ),
    "path": Code(
        "A path is neither a folder nor a hub id, or has characters that mergekit reads as its own.",
        "Correct it, or link to it under another name.",
    ),
    "pickled": Code(
        "The model has only pickled weights, which can run code when they are loaded.",
        "Convert them, or allow it: they are then read by a loader that runs no code.",
    ),
    "pickled-adapter": Code(
        "The adapter has only pickled weights.", "Convert it: load with peft and `save_pretrained`."
    ),
    "prompts": Code(
        "Experts of a mixture have no prompts, or the same ones.", "Give each expert prompts of its own."
    ),
    "quantization-leftover": Code(
        "config.json has a `quantization_config`, but the weights are not quantized.",
        "None is needed. The key is ignored, and the output does not get it.",
    ),
    "quantized": Code(
        "The weights are quantized, so their numbers cannot be averaged.", "Use the unquantized checkpoint."
    ),
    "range": Code("A parameter is outside its range.", "Choose a value in the range that the message names."),
    "remote-code": Code(
        "The model comes with Python code of its own.",
        "Read it, then set `model.trust_remote_code=true` and the revision that you read.",
    ),
    "renamed": Code(
        "A name has changed; the old one still works in this version.",
        "Use the new name that the message gives.",
    ),
    "role": Code(
        "The family has no checkpoint for this role.",
        "Choose a role that it has, or set `experts.ROLE.path`.",
    ),
    "rope": Code(
        "An expert has other rotary embedding settings than the base.", "Use fine-tunes of one base model."
    ),
    "same": Code("Two models have the same weights, or an expert those of the base.", "Leave one out."),
    "same-experts": Code(
        "All experts of a mixture are one model.", "Allow it if the mixture will be trained further."
    ),
    "scope": Code(
        "A parameter stands where the method does not take it: per model or for the whole merge.",
        "Set the key that the message names.",
    ),
    "setting": Code("A setting has a value that is not possible here.", "Choose one that the message names."),
    "shape": Code("A tensor has another shape than in the base.", "Use fine-tunes of one base model."),
    "shared-expert": Code(
        "The mixture's architecture needs another number of shared experts, or another model as one.",
        "Set `method.parameters.shared_expert`.",
    ),
    "softcap": Code(
        "An expert has another soft cap of its logits than the base.", "Use fine-tunes of one base model."
    ),
    "stale-weights": Code(
        "The folder has two sets of weights: mergekit would merge one, and transformers measure the other.",
        "Move what the message names elsewhere.",
    ),
    "structure": Code(
        "A YAML file is not what mergekit or mergekit-moe reads.", "Correct the key that the message names."
    ),
    "tied": Code(
        "An expert ties its embeddings to its output and the base does not, or the other way round.",
        "Use fine-tunes of one base model.",
    ),
    "tied-differ": Code(
        "A model holds different tensors under two names that its config.json ties. transformers loads both, "
        "so they are merged as two, and `tie_word_embeddings` becomes false.",
        "Remove the tensor that does not belong to the model, or set `tie_word_embeddings: false` in its "
        "config.json.",
    ),
    "tied-filter": Code(
        "A filter names a tied tensor by its second name, such as `lm_head`. The tensor is merged once, "
        "under the embedding's name, so the filter has no effect.",
        "Name the embedding, or leave the filter out.",
    ),
    "token-rows": Code(
        "A tokenizer has tokens for which the embedding has no row.",
        "Remove these tokens from the tokenizer, or use the model that they belong to.",
    ),
    "tokenizer": Code(
        "Token ids mean something else in an expert's tokenizer.",
        "Set `model.tokenizer=union`, or use another expert.",
    ),
    "tokenizer-files": Code(
        "Two tokenizers have different formats, so they cannot be compared.",
        "Make sure that ids mean the same tokens.",
    ),
    "tokenizer-rules": Code(
        "An expert's tokenizer has the same vocabulary and splits text by other rules.",
        "None is needed; the output gets the base's.",
    ),
    "type": Code("A value has the wrong type or lacks its unit.", "Write it as the message shows."),
    "unasked": Code(
        "The hub could not be asked whether a cached model is complete.", "Run `job=fetch` with a connection."
    ),
    "unchecked": Code(
        "Something could not be checked because the files are not here.", "Fetch the models, then plan again."
    ),
    "uncovered": Code(
        "A parameter that the method needs has no value for some tensors.",
        "Add `*` as the last filter, or set a number.",
    ),
    "unknown-key": Code(
        "mergekit does not know this key of the YAML file, and it looks like a misspelling.",
        "Correct or remove it, or allow it: it is then ignored.",
    ),
    "unknown-method": Code("There is no such merge method.", "Choose one that the message names."),
    "unknown-parameter": Code("The method has no such parameter.", "Choose one that the message names."),
    "unloadable": Code(
        "transformers cannot make a model of config.json; the message has its reason.", "Correct config.json."
    ),
    "unlisted": Code(
        "transformers has no class of its own for the model, so its tensors could not be checked.",
        "None is needed.",
    ),
    "unquantized": Code("A mixture's packed experts are measured unquantized.", "None is needed."),
    "unreachable": Code(
        "The model is not on this machine, and the hub does not answer.",
        "Fetch it on a machine with internet and copy or share its cache.",
    ),
    "unreadable": Code("A file or folder cannot be read.", "Correct its permissions, or copy it again."),
    "unrelated": Code(
        "An expert is so far from the base that it is not a fine-tune of it.",
        "Name its own base: `model.base.path`.",
    ),
    "unsafe": Code("A weight file contains more than tensors.", "Use weights in safetensors."),
    "untied": Code(
        "An adapter changes a head and not the embedding that it is tied to, or the two differently.",
        "None is needed: the merged model gets a head of its own.",
    ),
    "unused": Code(
        "A setting belongs to a job or method that does not run.", "Leave it out, or choose that job."
    ),
    "vocabulary": Code(
        "Two models have vocabularies of different sizes.",
        "Set `model.tokenizer=union` or `base`; or allow it if only padding differs: rows that not all "
        "have are then cut off.",
    ),
    "zero-sum": Code(
        "The weights sum to 0, and the method divides by their sum; as a warning: it takes halves then.",
        "Change a weight, or switch normalization off.",
    ),
}
"""Each code of a finding with its cause and remedy."""
