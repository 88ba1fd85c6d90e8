"""Builds a LLaVA out of a vision tower and a chat model: one folder that train.py trains, and infer.py asks.

    python build_model.py openai/clip-vit-large-patch14-336 Qwen/Qwen2.5-1.5B-Instruct my_llava
    python build_model.py my_chinese_clip Qwen/Qwen3-0.6B my_llava --image_aspect_ratio crop

The tower (CLIP, Chinese-CLIP, SigLIP, ViT, DINOv2, Swin, FocalNet, LeViT, or the vision part of a whole CLIP) and the
language model (Qwen 1.5, 2, 2.5, 3, Llama, InternLM3) keep their weights; the projector between them is new, and is
what stage 1 trains. What was written is read again: text-only logits must be the language model's, features the
tower's. Only then does the folder get its name: a build that fails, or is killed, leaves nothing of that name.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from checkpoint import explain_write_errors
from export import TOLERANCES, draw_probe, new_folder, repair_generation_config, write_model
from infer import find_base_model
from model import (
    ASPECT_RATIOS,
    load_processor,
    prepare_tokenizer,
    refuse_lfs_pointers,
    refuse_other_weights,
    set_aspect_ratio,
    unreadable_model,
)
from pixels import count_image_tokens
from rows import IMAGE_MARK, UserError
from template import encode_prompt, read_tokenizer, stop_tokens
from tower import CLASS_TOKEN, feature_layers, feature_shape, fit_processor

LANGUAGE_MODELS = ("qwen2", "qwen3", "llama", "internlm3")  # Qwen 1.5 and 2.5 are of the class qwen2
# Transformers' ViTs are read one layer before the last, as LLaVA does; towers of several stages behind the last.
STAGED = ("swin", "focalnet", "levit")
MAPS = ("convnext", "convnextv2", "resnet", "regnet", "bit", "efficientnet", "dinov3_convnext")
# Parts of a whole CLIP, and heads of classifiers, that a LLaVA has no use for.
LEFT_OUT = ("text_model.", "text_projection.", "visual_projection.", "logit_", "classifier", "decoder.")


def read_vision_config(path: str) -> tuple[PreTrainedConfig, bool]:
    """The config of a vision tower, and whether it is a part of a whole (CLIP, a dual encoder).

    Raises:
        UserError: there is none, or a LLaVA can't have it.
    """
    refuse_lfs_pointers(path)
    try:
        settings, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise unreadable_model(path, error) from None
    model_type, is_whole = settings.get("model_type"), "vision_config" in settings
    if is_whole and model_type in CONFIG_MAPPING:
        config = AutoConfig.from_pretrained(path).vision_config
        model_type = config.model_type
    elif is_whole:  # a dual encoder with a class of its own
        model_type = settings["vision_config"].get("model_type")
    if model_type in CLASS_TOKEN:
        if not is_whole:
            return AutoConfig.from_pretrained(path), False
        known = settings["model_type"] in CONFIG_MAPPING
        return (config if known else AutoConfig.for_model(**settings["vision_config"])), True
    if model_type in MAPS:
        reason = "gives maps (channels, height, width), and LLaVA's projector takes rows of (positions, width)"
    elif str(model_type).startswith("dinov3"):
        reason = "has an image processor that demands torchvision"
    else:
        reason = "is none that was tried in a LLaVA"
    raise UserError(f"{path}: model_type {model_type!r} {reason}. Give one of {', '.join(CLASS_TOKEN)}.")


def load_tower(path: str) -> tuple[PreTrainedModel, list[str]]:
    """The vision tower in the precision of its files, and what to say of it.

    Raises:
        UserError: there is none that a LLaVA can have, or its weights are not all there, or there are others.
    """
    config, is_whole = read_vision_config(path)
    try:
        tower, loading = MODEL_MAPPING[type(config)].from_pretrained(
            path,
            config=config,
            dtype="auto",
            key_mapping={r"^(vision_model\.)+": ""} if is_whole else None,
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise unreadable_model(path, error) from None
    left_out = {name for name in loading["unexpected_keys"] if name.startswith(LEFT_OUT)}
    pooler = {name for name in loading["missing_keys"] if name.startswith("pooler.")}
    loading["unexpected_keys"] -= left_out
    loading["missing_keys"] -= pooler  # no feature depends on it
    refuse_all_other_weights(path, loading)
    size = sum(parameter.numel() for parameter in tower.parameters())
    notes = [f"vision tower: {type(tower).__name__} of {path}, {size:,} parameters, {tower.dtype}"]
    if left_out:
        notes.append(f"  left out: {', '.join(sorted({name.split('.')[0] for name in left_out}))}")
    return tower, notes


def refuse_all_other_weights(path: str, loading: dict) -> None:
    """As `refuse_other_weights`, and tensors without a place are an error too: the model would be another."""
    refuse_other_weights(path, loading)
    if loading["unexpected_keys"]:
        names = sorted(loading["unexpected_keys"])
        raise UserError(
            f"{path}: {len(names)} tensors have no place in the model: {', '.join(names[:3])}. Does config.json belong "
            "to these weights?"
        )


def load_language_model(path: str) -> PreTrainedModel:
    """The causal LM in the precision of its files; raises UserError where it is none of those, or not whole."""
    refuse_lfs_pointers(path)
    if find_base_model(path) is not None:
        raise UserError(f"{path}: is an adapter. Merge it into its base model first (train_qwen: python export.py).")
    try:
        settings, _ = PreTrainedConfig.get_config_dict(path)
        if settings.get("model_type") not in LANGUAGE_MODELS:
            raise UserError(
                f"{path}: model_type {settings.get('model_type')!r} is none of {', '.join(LANGUAGE_MODELS)} (Qwen 1.5 "
                "to 3, Llama, InternLM3)."
            )
        lm, loading = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", ignore_mismatched_sizes=True, output_loading_info=True
        )
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable_model(path, error) from None
    refuse_all_other_weights(path, loading)
    return lm.eval()


def load_tokenizer(path: str, trust_remote_code: bool):
    """The language model's tokenizer; the token that ends a turn becomes its EOS."""
    try:
        tokenizer = read_tokenizer(path, trust_remote_code)
    except (OSError, ValueError) as error:
        raise unreadable_model(path, error) from None
    return prepare_tokenizer(tokenizer, path)


def load_image_processor(path: str):
    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError):
        raise UserError(
            f"{path}: no preprocessor_config.json is there, which says how the tower was trained to see pictures "
            "(size, colours). Copy it from where the tower came from."
        ) from None


def add_image_token(tokenizer, lm: PreTrainedModel) -> tuple[int, str]:
    """Gives the tokenizer <image>, once, and the model a row for it, if it has none; the token, and what to say.

    It is no special token, since a template's own tokens are refused where they stand in a message.
    """
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=False, normalized=False)])
    token, rows = tokenizer.convert_tokens_to_ids(IMAGE_MARK), lm.get_input_embeddings().num_embeddings
    if token < rows:
        return token, f"{IMAGE_MARK}: token {token}, one of the {rows:,} rows that the embedding has"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return token, f"{IMAGE_MARK}: token {token}, for which the embedding grew from {rows:,} to {len(tokenizer):,} rows"


def make_generation_config(lm: PreTrainedModel, tokenizer, ends: set[str], image_token: int) -> GenerationConfig:
    """The language model's, which stops at every token that ends a reply, and never says <image>."""
    config = lm.generation_config
    repair_generation_config(config, lm.name_or_path)
    config.eos_token_id = sorted(set(tokenizer.convert_tokens_to_ids(sorted(ends))))
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    config.suppress_tokens = sorted({image_token, *(config.suppress_tokens or [])})
    return config


def make_config(tower, lm, image_token: int, layer: int | list[int] | None, pixel_shape, path: str) -> LlavaConfig:
    """The LLaVA's config; the tower's gets the width of its features where it doesn't name it.

    Raises:
        UserError: the layer is none of the tower's, or it doesn't take such pictures.
    """
    tower_type = tower.config.model_type
    if layer is None:
        layer = -1 if tower_type in STAGED else -2
    config = LlavaConfig(
        vision_config=copy.deepcopy(tower.config),  # their attention is a composite's from here on
        text_config=copy.deepcopy(lm.config),
        image_token_index=image_token,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default" if CLASS_TOKEN[tower_type] else "full",
        tie_word_embeddings=lm.config.tie_word_embeddings,
    )
    positions, width = feature_shape(config, pixel_shape, path)
    if tower_type in ("focalnet", "levit"):
        config.vision_config.hidden_size = width
    elif width != config.vision_config.hidden_size:
        own = config.vision_config.hidden_size
        raise UserError(f"{path}: vision_feature_layer {layer} is {width} wide, LLaVA's projector takes {own}.")
    config.image_seq_length = positions - CLASS_TOKEN[tower_type]
    return config


def join(tower: PreTrainedModel, lm: PreTrainedModel, config: LlavaConfig) -> LlavaForConditionalGeneration:
    """The LLaVA of these very modules, and a new projector.

    They stand in `model.model`: Transformers 5 accepts `model.language_model = lm`, says nothing, and doesn't use it.
    """
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        projector = LlavaMultiModalProjector(config)  # as PyTorch starts linear layers, which LLaVA's own code does too
    for name, part in (("vision_tower", tower), ("language_model", lm.model), ("multi_modal_projector", projector)):
        assert type(getattr(model.model, name)) is type(part), f"{name}: {type(part).__name__}"
        setattr(model.model, name, part)
    model.lm_head = lm.lm_head
    return model


@torch.no_grad()
def tower_features(tower: nn.Module, config: LlavaConfig, pixel_values: torch.Tensor) -> torch.Tensor:
    """The chosen layers' output without class token, (pictures, positions, width of all layers)."""
    hidden_states = tower(pixel_values, output_hidden_states=True).hidden_states
    first = int(config.vision_feature_select_strategy == "default")
    return torch.cat([hidden_states[layer][:, first:] for layer in feature_layers(config)], dim=-1)


@torch.no_grad()
def text_logits(model: PreTrainedModel, tokenizer) -> torch.Tensor:
    """Logits of a question without a picture, (tokens, vocabulary)."""
    prompt = encode_prompt([{"role": "user", "content": "你好，请介绍一下你自己。"}], tokenizer)
    return model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]


def compare(folder: Path, logits: torch.Tensor, features: torch.Tensor) -> list[str]:
    """Reads what was written and compares it with what the parts gave; returns what was found.

    Raises:
        UserError: they differ.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor, picture = load_processor(str(folder)), draw_probe()
    pixel_values = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    found = {
        "text-only logits": (text_logits(model, processor.tokenizer), logits),
        "features": (tower_features(model.model.vision_tower, model.config, pixel_values), features),
    }
    notes = []
    for name, (written, expected) in found.items():
        difference = (written[..., : expected.shape[-1]] - expected).abs().max().item()
        notes.append(f"{name}: differ by {difference:.1e} from those of the parts, {tuple(expected.shape)}")
        if not difference <= TOLERANCES["float32"] * expected.abs().max().item():
            raise UserError(f"not built: {notes[-1]}, once written and read again.")
    inputs = processor(text=f"{processor.image_token}你好", images=picture, return_tensors="pt")
    with torch.no_grad():
        model(**inputs)
    tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert tokens == count_image_tokens(processor) == features.shape[1], (tokens, features.shape)
    return [*notes, f"image tokens: {tokens} in the prompt, {features.shape[1]} features of the tower"]


def build_llava(
    vision: str,
    text: str,
    target: str,
    image_aspect_ratio: str = "pad",
    vision_feature_layer: int | list[int] | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """Writes a LLaVA of a vision tower and a language model to the folder `target`; returns what there is to say.

    Each part keeps the precision of its files. The image processor keeps the tower's size, resampling and colours.

    Args:
        vision, text: folders or hub ids.
        image_aspect_ratio: how a picture becomes square; see `model.set_aspect_ratio`.
        vision_feature_layer: which of the tower's hidden states is shown to the language model, or several, side by
            side; by default the last but one, of towers of several stages the last.
        trust_remote_code: run the code that comes with the tokenizer.

    Raises:
        UserError: a part can't be had, or not be used, or the target is not empty.
    """
    with new_folder(target) as folder:
        tower, notes = load_tower(vision)
        image_processor = set_aspect_ratio(load_image_processor(vision), image_aspect_ratio)
        pixel_values = image_processor(draw_probe(), return_tensors="pt")["pixel_values"]
        lm = load_language_model(text)
        tower_dtype, dtype = tower.dtype, lm.dtype
        tokenizer = load_tokenizer(text, trust_remote_code)
        logits, ends = text_logits(lm.float(), tokenizer), stop_tokens(tokenizer)
        image_token, said = add_image_token(tokenizer, lm)
        config = make_config(tower, lm, image_token, vision_feature_layer, tuple(pixel_values.shape[1:]), vision)
        features = tower_features(tower.float().eval(), config, pixel_values)
        model = join(tower, lm, config)
        model.generation_config = make_generation_config(lm, tokenizer, ends, image_token)
        size = sum(parameter.numel() for parameter in model.parameters())
        notes += [f"language model: {type(lm).__name__} of {text}, {dtype}; {size:,} parameters in all", said]
        tower.to(tower_dtype)
        lm.to(dtype)
        write_model(model, folder, str(dtype).removeprefix("torch."))
        processor = LlavaProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)
        fit_processor(processor, config, vision)
        processor.save_pretrained(folder)
        del tower, lm, model
        notes += [f"stops at: {' '.join(sorted(ends))}", f"pictures: {image_aspect_ratio}, {pixel_values.shape[-1]} px"]
        return [*notes, *compare(folder, logits, features)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vision", help="folder or hub id of a vision tower, or of a whole CLIP")
    parser.add_argument("text", help="folder or hub id of a causal language model")
    parser.add_argument("target", help="folder to write, new or empty")
    parser.add_argument("--image_aspect_ratio", choices=ASPECT_RATIOS, default="pad", help="how a picture gets square")
    parser.add_argument("--vision_feature_layer", type=int, nargs="+", help="hidden states of the tower that are shown")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the tokenizer")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    layers = args.vision_feature_layer
    layer = layers[0] if layers and len(layers) == 1 else layers
    try:
        with explain_write_errors(args.target, "the target"):
            notes = build_llava(
                args.vision, args.text, args.target, args.image_aspect_ratio, layer, args.trust_remote_code
            )
    except UserError as error:
        sys.exit(f"error: {error}")
    command = f"MODEL={args.target} DATA=my_data bash train_stages.sh"
    print(*notes, f"{args.target}: written; train it by {command}", sep="\n")


if __name__ == "__main__":
    main()
