"""Turns a trained LLaVA into one plain folder: adapter merged into its base, projector, processor, nothing else.

    python export.py output_zero2 merged                      for LlavaForConditionalGeneration, vLLM
    python export.py output_zero2 merged --dtype bfloat16     half the size of float32

The merge is done in fp32 and cast afterwards; then what was written is read again and its logits are compared, with a
picture in the prompt. Only then does the folder get its name: an export that fails leaves nothing.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig

from checkpoint import explain_write_errors, share_weights
from infer import find_base_model, load_trained_model
from pixels import read_processor
from prompt import ask_about, encode_prompts
from rows import UserError

# Largest difference of a logit, as a share of the largest logit, that rounding the weights explains.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}

# Towers that vLLM's class for LLaVA knows; it reads the first two's weights by the names of Transformers 4.
VLLM_TOWERS = ("clip_vision_model", "siglip_vision_model")


def draw_probe() -> Image.Image:
    """A picture of noise, wider than high: what a wrong way of making it square would change."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))


@torch.no_grad()
def probe_logits(model, processor) -> torch.Tensor:
    """Logits of a short prompt with a picture in it, shape (tokens, vocabulary), fp32 on the CPU."""
    inputs = encode_prompts(processor, [[ask_about([draw_probe()], "你好，图里有什么？")]])
    return model(**inputs.to(model.device, model.dtype)).logits[0].float().cpu()


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


@contextmanager
def new_folder(target: str) -> Iterator[Path]:
    """A folder beside the target to write to, which gets the target's name at the end; a failure leaves nothing.

    Raises:
        UserError: the target is there and not empty.
    """
    if Path(target).exists() and (not Path(target).is_dir() or any(Path(target).iterdir())):
        raise UserError(f"{target}: is not an empty folder. Name another one, or remove it first.")
    if Path(target).is_mount():
        raise UserError(f"{target}: a disk is mounted there, so it can't be replaced. Name a folder within it.")
    folder = Path(target).resolve()
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def hub_name(name: str, tower: str) -> str:
    """A weight's name as llava-hf's folders have it: the layout of Transformers 4, which vLLM reads, and 5 as well.

    `save_pretrained` writes the tower's names in one way or the other, by where they once came from.
    """
    name = name.removeprefix("model.")
    if tower in VLLM_TOWERS:
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.replace("language_model.", "language_model.model.", 1)


def write_model(model, folder: Path, dtype: str) -> None:
    """Config, generation settings and weights, in any process of a run (`save_pretrained` would, in the first alone).

    Args:
        dtype: the precision that the config names, and in which the model is loaded by default.
    """
    model.config.architectures, model.config.dtype = [type(model).__name__], dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights, tower = model.state_dict(), model.config.vision_config.model_type
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    weights = {hub_name(name, tower): weight.contiguous() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    share_weights(folder)


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
    with new_folder(target) as folder:
        model, processor = load_trained_model(path, trust_remote_code, dtype=torch.float32, device_map="cpu")
        expected = probe_logits(model, processor)
        base = find_base_model(path)
        if dtype is None:
            dtype = str(AutoConfig.from_pretrained(base or path).dtype or torch.float32).removeprefix("torch.")
        repair_generation_config(model.generation_config, path)
        if base is not None:
            refuse_tied_targets(model, path)
            model = model.merge_and_unload()
        write_model(model.to(getattr(torch, dtype)), folder, dtype)
        del model
        # Read afresh: the one at hand has settings that only matter to infer.py.
        processor = read_processor(path, trust_remote_code)
        processor.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)  # where Transformers 4, and vLLM with it, looks for it
        write_older_names(folder)
        return compare(folder, expected, dtype, path, trust_remote_code)


def compare(folder: Path, expected: torch.Tensor, dtype: str, path: str, trust_remote_code: bool) -> float:
    """The largest difference of a logit between a folder as written and `expected`, of shape (tokens, vocabulary).

    Raises:
        UserError: rounding to `dtype` can't explain it.
    """
    written, processor = load_trained_model(str(folder), trust_remote_code, dtype=torch.float32, device_map="cpu")
    difference = (probe_logits(written, processor) - expected).abs().max().item()
    allowed = TOLERANCES[dtype] * expected.abs().max().item()
    if not difference <= allowed:
        raise UserError(
            f"{path}: not exported, its logits differ by up to {difference:.2e} once it is written and read again, "
            f"rounding to {dtype} explains {allowed:.2e}. Do not use it like that; --dtype float32 shows whether "
            "rounding is the cause."
        )
    return difference


def describe_serving(target: str) -> str:
    """The command that serves an exported folder."""
    config = json.loads(Path(target, "config.json").read_text(encoding="utf-8"))
    tower, context = config["vision_config"]["model_type"], config["text_config"]["max_position_embeddings"]
    if tower in VLLM_TOWERS:
        return f"vllm serve {target} --max-model-len {context}"
    return f"python app.py {target}    (vLLM's LLaVA knows no tower {tower})"


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
    print(f"serve it: {describe_serving(args.target)}")


if __name__ == "__main__":
    main()
