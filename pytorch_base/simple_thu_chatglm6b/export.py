"""Turns a trained model into one plain folder: adapter merged into its base, safetensors, tokenizer, nothing else.

    python export.py output_zero2 merged                      for AutoModelForCausalLM, vLLM, llama.cpp
    python export.py output_zero2 merged --dtype bfloat16     half the size of float32

The merge is done in fp32 and cast afterwards; then the folder is read again and its logits are compared.
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from infer import encode_prompts, find_base_model, load_trained_model
from rows import UserError

# Largest difference of a logit, as a share of the largest logit, that rounding the weights explains.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@torch.no_grad()
def probe_logits(model, tokenizer) -> torch.Tensor:
    """Logits of a short prompt, shape (tokens, vocabulary), fp32 on the CPU."""
    inputs = encode_prompts(tokenizer, [[{"role": "user", "content": "你好，请介绍一下你自己。"}]])
    return model(**inputs.to(model.device)).logits[0].float().cpu()


def export(path: str, target: str, dtype: str | None = None, trust_remote_code: bool = False) -> float:
    """Writes the model at `path`, its adapter merged in, as a plain folder `target`.

    Args:
        path: folder of a LoRA adapter or of a full model, or a hub id.
        dtype: float32, bfloat16 or float16; by default that of the (base) model.

    Returns:
        The largest difference of a logit between the folder as written and what it was made of.

    Raises:
        UserError: no model at `path`, a target that is not empty, or a difference that rounding can't explain.
    """
    if Path(target).exists() and (not Path(target).is_dir() or any(Path(target).iterdir())):
        raise UserError(f"{target}: is not an empty folder. Name another one, or remove it first.")
    model, tokenizer = load_trained_model(path, trust_remote_code, dtype=torch.float32, device_map="cpu")
    expected = probe_logits(model, tokenizer)
    base = find_base_model(path)
    if dtype is None:
        config = AutoConfig.from_pretrained(base or path, trust_remote_code=trust_remote_code)
        dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    if base is not None:
        model = model.merge_and_unload()
    model.to(getattr(torch, dtype)).save_pretrained(target)
    # Read afresh: the one at hand has settings that only matter to infer.py.
    AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code).save_pretrained(target)
    del model

    written = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, trust_remote_code=trust_remote_code)
    difference = (probe_logits(written.eval(), tokenizer) - expected).abs().max().item()
    allowed = TOLERANCES[dtype] * expected.abs().max().item()
    if not difference <= allowed:
        raise UserError(
            f"{target}: its logits differ from those of {path} by up to {difference:.2e}, rounding to {dtype} explains "
            f"{allowed:.2e}. Do not use it; --dtype float32 shows whether rounding is the cause."
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
        difference = export(args.model, args.target, args.dtype, args.trust_remote_code)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{args.target}: written and read again; largest difference of a logit {difference:.2e}")


if __name__ == "__main__":
    main()
