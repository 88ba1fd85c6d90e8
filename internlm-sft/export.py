"""Turns a trained model into one plain folder: adapter merged into its base, safetensors, tokenizer, nothing else.

    python export.py output_zero2 merged                      for AutoModelForCausalLM, vLLM, llama.cpp
    python export.py output_zero2 merged --dtype bfloat16     half the size of float32

The merge is done in fp32 and cast afterwards; then what was written is read again and its logits are compared. Only
then does the folder get its name: an export that fails leaves nothing.
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

from checkpoint import explain_write_errors, share_weights
from infer import encode_prompts, find_base_model, load_trained_model
from rows import UserError
from template import read_tokenizer

# Largest difference of a logit, as a share of the largest logit, that rounding the weights explains.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@torch.no_grad()
def probe_logits(model, tokenizer) -> torch.Tensor:
    """Logits of a short prompt, shape (tokens, vocabulary), fp32 on the CPU."""
    inputs = encode_prompts(tokenizer, [[{"role": "user", "content": "你好，请介绍一下你自己。"}]])
    return model(**inputs.to(model.device)).logits[0].float().cpu()


# >>> plain-folder
def refuse_tied_targets(model, named_by: str) -> None:
    """Raises UserError for a low-rank adapter on the input embedding or the head where both are one weight (peft#2018).

    Args:
        named_by: the flag or the adapter's folder, which the error names.
    """
    from peft.tuners.lora import LoraLayer

    ends = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    adapted = [name for name, layer in ends.items() if isinstance(layer, LoraLayer)]
    if adapted and ends["embed_tokens"].weight is ends["lm_head"].weight:
        raise UserError(
            f"{named_by}: the adapter changes {' and '.join(adapted)}, but the head (lm_head) and the embedding "
            "(embed_tokens) of this model are one weight: merged, the change would reach the other one too. Train "
            "without them; an adapter that has them can be served beside its base only."
        )


def repair_generation_config(config, path: str) -> None:
    """Makes the sampling settings agree with each other, as saving demands (transformers#29988), in place.

    Values for sampling without a word on do_sample mean to sample; where do_sample is false nobody reads them.

    Raises:
        UserError: something else in it can't be saved.
    """
    sampling = [name for name in ("temperature", "top_p", "top_k") if getattr(config, name) is not None]
    if sampling and config.do_sample is None:
        config.do_sample = config.temperature != 0
    if not config.do_sample:
        for name in sampling:
            setattr(config, name, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise UserError(
            f"{path}: the generation_config.json of the (base) model can't be saved, mend it there first: "
            f"{' '.join(str(error).split())}"
        ) from None


def write_older_names(folder: Path) -> None:
    """Adds what Transformers 4, and with it llama.cpp's converter, looks for under another name than 5 writes.

    Without `rope_theta` they would take 10000 in silence; a list of `extra_special_tokens` they can't read at all.
    Transformers 5 reads both forms.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config", {})):  # the second: where a vision tower stands beside it
        rope = part.get("rope_parameters") or {}
        at_top = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if "rope_theta" in rope:  # elsewhere each type of layer has its own
            part |= at_top
            if rope["rope_type"] != "default":
                part["rope_scaling"] = {name: value for name, value in rope.items() if name not in at_top}
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")

    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


# <<< plain-folder


def export(path: str, target: str, dtype: str | None = None, trust_remote_code: bool = False) -> float:
    """Writes the model at `path`, its adapter merged in, as a plain folder `target`.

    Args:
        path: folder of a LoRA adapter or of a full model, or a hub id.
        dtype: float32, bfloat16 or float16; by default that of the (base) model.

    Returns:
        The largest difference of a logit between the folder as written and what it was made of.

    Raises:
        UserError: no model at `path`, one that can't be merged or saved, a target that is not empty, or a difference
            that rounding can't explain.
    """
    if Path(target).exists() and (not Path(target).is_dir() or any(Path(target).iterdir())):
        raise UserError(f"{target}: is not an empty folder. Name another one, or remove it first.")
    if Path(target).is_mount():
        raise UserError(f"{target}: a disk is mounted there, so it can't be replaced. Name a folder within it.")
    model, tokenizer = load_trained_model(path, trust_remote_code, dtype=torch.float32, device_map="cpu")
    expected = probe_logits(model, tokenizer)
    base = find_base_model(path)
    if dtype is None:
        config = AutoConfig.from_pretrained(base or path, trust_remote_code=trust_remote_code)
        dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    repair_generation_config(model.generation_config, path)
    if base is not None:
        refuse_tied_targets(model, path)
        model = model.merge_and_unload()
    folder = Path(target).resolve()
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model.to(getattr(torch, dtype)).save_pretrained(unfinished)
        # Read afresh: the one at hand has settings that only matter to infer.py.
        read_tokenizer(path, trust_remote_code).save_pretrained(unfinished)
        del model
        write_older_names(unfinished)
        share_weights(unfinished)
        difference = compare(unfinished, expected, dtype, path, trust_remote_code)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return difference


def compare(folder: Path, expected: torch.Tensor, dtype: str, path: str, trust_remote_code: bool) -> float:
    """The largest difference of a logit between a folder as written and `expected`, of shape (tokens, vocabulary).

    Raises:
        UserError: rounding to `dtype` can't explain it.
    """
    written, tokenizer = load_trained_model(str(folder), trust_remote_code, dtype=torch.float32, device_map="cpu")
    difference = (probe_logits(written, tokenizer) - expected).abs().max().item()
    allowed = TOLERANCES[dtype] * expected.abs().max().item()
    if not difference <= allowed:
        raise UserError(
            f"{path}: not exported, its logits differ by up to {difference:.2e} once it is written and read again, "
            f"rounding to {dtype} explains {allowed:.2e}. Do not use it like that; --dtype float32 shows whether "
            "rounding is the cause."
        )
    return difference


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a LoRA adapter or of a full model, or a hub id")
    parser.add_argument("target", help="folder to write, new or empty")
    parser.add_argument("--dtype", choices=list(TOLERANCES), help="by default that of the (base) model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    args = parser.parse_args(argv)
    try:
        with explain_write_errors(args.target, "the target"):
            difference = export(args.model, args.target, args.dtype, args.trust_remote_code)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{args.target}: written and read again; largest difference of a logit {difference:.2e}")
    context = json.loads(Path(args.target, "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    print(f"serve it: vllm serve {args.target}", f"--max-model-len {context}" if context else "")


if __name__ == "__main__":
    main()
