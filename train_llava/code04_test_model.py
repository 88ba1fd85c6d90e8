"""Asks a LLaVA one question about one picture, and shows on the way what it makes of both.

    python code04_test_model.py my_llava my.jpg "图里有什么？"

A model that build_model.py has just written answers at random: its projector is new. What is to be looked at then are
the shapes, and the numbers of tokens and features, which must agree.
"""

import argparse
import sys

import torch

from files import UserError
from infer import decode, generation_settings, load_trained_model
from prompt import ask_about, encode_prompts, open_picture


@torch.no_grad()
def show(model, processor, picture, question: str, max_new_tokens: int) -> None:
    """Prints each step from the picture to the answer; raises UserError where they can't be asked, or are too long."""
    inputs = encode_prompts(processor, [[ask_about([picture], question)]])
    image_tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    prompt = decode(processor.tokenizer, inputs["input_ids"][0].tolist())
    print("picture       ", picture.size, "->", tuple(inputs["pixel_values"].shape))
    print("prompt        ", tuple(inputs["input_ids"].shape), "tokens, of the picture", image_tokens)
    print("              ", repr(prompt.replace(processor.image_token * image_tokens, f"<image> x {image_tokens}")))

    config, pixel_values = model.config, inputs["pixel_values"].to(model.device, model.dtype)
    (features,) = model.get_image_features(pixel_values).pooler_output
    print("tower         ", config.vision_config.model_type, "layer", config.vision_feature_layer)
    print(
        "features      ", tuple(features.shape), "behind the projector:", len(features), "for", image_tokens, "tokens"
    )
    print("language model", config.text_config.model_type, "stops at", end=" ")
    print(*processor.tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id))

    inputs = inputs.to(model.device, model.dtype)
    settings = generation_settings(model, processor, inputs, max_new_tokens, 0.0, 1.0, 1.0)
    reply = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    print("answer        ", len(reply), "tokens:", repr(decode(processor.tokenizer, reply.tolist())))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a LLaVA or of a LoRA adapter, or a hub id of llava-hf")
    parser.add_argument("picture", help="a picture's file")
    parser.add_argument("question", nargs="?", default="图里有什么？")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer, in tokens")
    args = parser.parse_args(argv)
    try:
        picture = open_picture(args.picture)
        show(*load_trained_model(args.model), picture, args.question, args.max_new_tokens)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
