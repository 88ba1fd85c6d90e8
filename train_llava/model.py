"""A LLaVA is looked at before it is trained; then its processor and the model are loaded, and frozen in part.

LLaVA here is Transformers' LlavaForConditionalGeneration: a vision tower, a projector of two layers, a language model.
What `build_model.py` writes is one, and so are the folders of llava-hf.
"""

from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaModel,
    LlavaProcessor,
    PreTrainedConfig,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

from export import repair_generation_config
from infer import find_base_model
from lora import add_lora, check_adapter, full_shape, load_adapter
from pixels import read_processor
from rows import UserError
from template import encode_conversation
from tower import CLASS_TOKEN, fit_processor, keep_in_eval, unused_in_tower

# For tokenizers that bring no template: plain role names, and the end of a turn is the tokenizer's own EOS.
PLAIN_TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""

LFS_POINTER = b"version https://git-lfs"

ASPECT_RATIOS = ("pad", "crop", "squash")


def check_model(model_args, model_max_length: int) -> LlavaConfig:
    """Looks at a model's files and its config, before anything is tokenised or loaded.

    Where the model is an adapter to be trained on, `model_args` gets the adapter's own rank, scale and layers.

    Returns:
        The config of the model, or of the adapter's base model.

    Raises:
        UserError: it can't be trained here, or not as the flags say.
    """
    path = model_args.model_name_or_path
    base = find_base_model(path)
    refuse_lfs_pointers(path)
    if base is not None:
        refuse_lfs_pointers(base)
        check_adapter(model_args, base)
    config = read_config(base or path)
    check_positions(base or path, config.get_text_config(), model_max_length)
    return config


# >>> model-files
def unreadable_model(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path}: no model could be read there ({str(error).splitlines()[0]}). Give a folder that holds "
        "config.json, tokenizer and weights, or a hub id; the readme says how to download one through a mirror."
    )


def refuse_lfs_pointers(path: str) -> None:
    """Raises UserError where git, without its LFS extension, has left a few words in the place of a file."""
    for file in sorted(Path(path).glob("*")):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            raise UserError(
                f"{file}: is a Git LFS pointer, not the file itself. Fetch it: git -C {path} lfs pull "
                "(after git lfs install)."
            )


# <<< model-files


def read_config(path: str) -> LlavaConfig:
    """The config of a LLaVA; raises UserError where there is none, or one of another kind."""
    try:
        settings, _ = PreTrainedConfig.get_config_dict(path)
        model_type = settings.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise UserError(
                f"{path}/config.json: model_type {model_type!r} is unknown to Transformers {transformers.__version__}."
            )
        config = AutoConfig.from_pretrained(path)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable_model(path, error) from None
    if model_type == "llava" and "vision_config" in settings:
        tower = config.vision_config.model_type
        if tower in CLASS_TOKEN:
            return config
        problem = f"its vision tower {tower!r} is none of {', '.join(CLASS_TOKEN)}. Build a LLaVA with another"
    elif model_type == "llava":
        problem = "it has the layout of LLaVA's own code. Give the same model in Transformers', from llava-hf"
    elif "vision_config" in settings:
        problem = (
            f"{model_type!r} is not the LLaVA class that this recipe trains (Qwen2-VL and LLaVA-OneVision have "
            "processors that demand torchvision). Give a folder of build_model.py or of llava-hf's LLaVA 1.5"
        )
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        problem = (
            f"{model_type!r} reads text only. Give it eyes first: python build_model.py VISION {path} my_llava, then "
            "MODEL=my_llava; the recipe train_qwen trains it as it is"
        )
    else:
        problem = f"{model_type!r} is no LLaVA. Build one: python build_model.py VISION TEXT my_llava"
    raise UserError(f"{path}: {problem}.")


# >>> model-limits
def check_positions(path: str, config: PreTrainedConfig, model_max_length: int) -> None:
    """Raises UserError where a row could be longer than the model's positions, and these end or change there."""
    limit, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None)
    if limit is None or model_max_length <= limit:
        return
    if rope is None:  # ALiBi and recurrent models that have no limit don't name one
        reason = f"the model has {limit} positions, and none beyond them"
    elif rope.get("rope_type") == "dynamic":
        reason = f"beyond {limit} tokens, dynamic NTK rotates a row by the longest one of its batch"
    else:
        return
    raise UserError(f"--model_max_length {model_max_length}: {reason} ({path}). The largest that works is {limit}.")


def check_vocabulary(path: str, tokenizer, config: PreTrainedConfig) -> None:
    """Raises UserError where the tokenizer has ids for which the model has no embedding."""
    ids, rows = max(tokenizer.get_vocab().values()) + 1, config.get_text_config().vocab_size
    if ids > rows:
        raise UserError(
            f"{path}: the tokenizer has {ids} ids, the model's embedding {rows} rows. Give the tokenizer that belongs "
            "to the model, or enlarge the model by model.resize_token_embeddings and save both."
        )


# <<< model-limits


# >>> chat-tokenizer
def prepare_tokenizer(tokenizer, path: str):
    """The tokenizer of the model at `path` as `load_tokenizer` promises it; see there."""
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its tokenizer has no fast version (tokenizer.json), which finding the labels needs.")
    if tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise UserError(f"{path}: its tokenizer has neither a chat template nor an EOS to end a reply with.")
        adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好"}]
    end_of_turn = encode_conversation(turns, tokenizer)[-1]["labels"][-1]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_of_turn)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# <<< chat-tokenizer


def load_processor(path: str, trust_remote_code: bool = False) -> LlavaProcessor:
    """The model's processor; its tokenizer has a chat template, and the token that ends a turn as its EOS.

    The EOS matters when the tuned model is served: base models often come with another one and would never stop.

    Raises:
        UserError: there is no such model, or its tokenizer can't tell where in a text a token stands, or where a reply
            ends, or the processor isn't the model's.
    """
    config = read_config(find_base_model(path) or path)
    try:
        processor = read_processor(path, trust_remote_code)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable_model(path, error) from None
    if processor.image_token_id != config.image_token_id:
        raise UserError(
            f"{path}: the processor's {processor.image_token} is token {processor.image_token_id}, in config.json "
            f"image_token_index is {config.image_token_id}. Take both from the same model."
        )
    processor.chat_template = prepare_tokenizer(processor.tokenizer, path).chat_template
    fit_processor(processor, config, path)
    return processor


def set_aspect_ratio(image_processor, mode: str) -> LlavaImageProcessorPil:
    """An image processor of the same size, resampling and colours that makes a picture square in another way.

    pad sets it on a square of the mean colour, as LLaVA does; crop cuts the longer side; squash keeps no proportions.
    """
    size = image_processor(Image.new("RGB", (64, 48)), return_tensors="pt")["pixel_values"].shape[-1]
    square, kept = {"height": size, "width": size}, ("resample", "do_rescale", "rescale_factor", "do_normalize")
    return LlavaImageProcessorPil(
        **{name: getattr(image_processor, name) for name in (*kept, "image_mean", "image_std")},
        do_convert_rgb=True,
        do_resize=True,
        size={"shortest_edge": size} if mode == "crop" else square,
        do_center_crop=mode == "crop",
        crop_size=square,
        do_pad=mode == "pad",
    )


def load_model(model_args, args) -> nn.Module:
    """The LLaVA in the precision that suits how it is trained, with adapters where they are asked for.

    Frozen weights and DeepSpeed's working copy are kept in half precision; weights that the optimizer updates itself
    stay in fp32, and so do the adapters (PEFT), since fp16 gradients could not be unscaled otherwise.

    Raises:
        UserError: the weights can't be read or are not the model's, it has no activation checkpointing, or an adapter
            can't stand where it should.
    """
    path = model_args.model_name_or_path
    base = find_base_model(path)
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    attention = model_args.attn_implementation
    if attention is None and half != torch.float32 and is_flash_attn_2_available():
        attention = "flash_attention_2"
    frozen_text = model_args.train_type in ("use_lora", "projector")
    try:
        model, loading = LlavaForConditionalGeneration.from_pretrained(
            base or path,
            dtype=half if frozen_text or args.deepspeed else torch.float32,
            attn_implementation=attention and {"text_config": attention},  # the tower keeps its own
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{base or path}: {str(error).splitlines()[0]}") from None
    except RuntimeError as error:  # under ZeRO-3
        if "size mismatch" not in str(error):
            raise
        raise UserError(f"{base or path}: {' '.join(str(error).split())[:300]}") from None
    refuse_other_weights(base or path, loading)
    if frozen_text and not args.deepspeed:
        model.model.multi_modal_projector.float()
    if base is not None:
        return load_adapter(model, path)
    if not model_args.use_lora:
        return model
    if not is_deepspeed_zero3_enabled():  # where it will be trained, the trial pass runs the same kernels
        model.to(args.device)
    torch.manual_seed(args.seed)  # under ZeRO-3 a ViT has drawn its class token before it was read
    return add_lora(model, model_args, modules_to_save=["multi_modal_projector"])


def freeze(model: nn.Module, train_type: str) -> list[str]:
    """Sets which weights are trained, and in which mode the tower stays; returns what there is to say, part by part.

    What lies behind `vision_feature_layer` in the tower gives nothing to the loss: it is always frozen, since DDP would
    wait for its gradients. A frozen tower stays in eval mode, whatever model.train() says (LeViT has batch norms); a
    trained one keeps the statistics of its batch norms, which else would make the loss depend on the ranks.

    Args:
        train_type: "none" trains all; "freeze_vision" the projector and the language model; "projector" it alone;
            "use_lora" what PEFT has chosen.
    """
    llava = next(module for module in model.modules() if isinstance(module, LlavaModel))
    tower, projector = llava.vision_tower, llava.multi_modal_projector
    if train_type != "use_lora":
        model.requires_grad_(train_type != "projector")
        tower.requires_grad_(train_type == "none")
        projector.requires_grad_(True)
    unused = unused_in_tower(model.config)
    for name, parameter in tower.named_parameters():
        if name in unused:
            parameter.requires_grad_(False)
    if any(parameter.requires_grad for parameter in tower.parameters()):
        for module in tower.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                keep_in_eval(module)
    else:
        keep_in_eval(tower)
    return describe_trained(model, llava, unused)


def describe_trained(model: nn.Module, llava: LlavaModel, unused: set[str]) -> list[str]:
    """One line for each part: its parameters, and how many of them are trained; one more for what is never used."""
    own = {
        "vision tower": set(llava.vision_tower.parameters()),
        "projector": set(llava.multi_modal_projector.parameters()),
    }
    own["language model"] = set(model.parameters()) - own["vision tower"] - own["projector"]
    lines = []
    for part, parameters in own.items():
        sizes = [(full_shape(parameter).numel(), parameter.requires_grad) for parameter in parameters]
        total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
        lines.append(f"{part:15} {total:14,} parameters, {trained:14,} trained")
    if unused and any(parameter.requires_grad for parameter in own["vision tower"]):
        kinds = sorted({".".join(name.split(".")[:-1]) or name for name in unused})
        shown = ", ".join(kinds[:2]) + (", ..." if len(kinds) > 2 else "")
        lines.append(
            f"{'':15} {len(unused)} tensors of the tower give nothing to the chosen features: frozen ({shown})"
        )
    return lines


# >>> loading-info
def refuse_other_weights(path: str, loading: dict) -> None:
    """Raises UserError where a part of the model was in no file, or of another size, and so is random.

    Args:
        loading: Transformers' `loading_info`; under ZeRO-3 it doesn't tell what else was in the files.
    """
    wrong_sizes = [f"{name} ({list(found)} for {list(own)})" for name, found, own in loading["mismatched_keys"]]
    problems = []
    for names, problem in (
        (loading["missing_keys"], "lacks {} of the model's tensors"),
        (wrong_sizes, "has {} of another size"),
        (loading["unexpected_keys"], "has {} that the model doesn't know"),
    ):
        if names:
            first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            problems.append(f"{problem.format(len(names))}: {first}")
    if loading["missing_keys"] or wrong_sizes:
        raise UserError(
            f"{path}: {'; '.join(problems)}. These would be trained from random numbers. Download the model again, "
            "or rename the tensors as its config.json asks for."
        )


def mend_generation_config(model: nn.Module) -> list[str]:
    """Makes the settings for sampling such that Transformers will save them with the model; returns what to say of it.

    Raises:
        UserError: they contradict each other in another way.
    """
    config = model.generation_config
    try:
        config.validate(strict=True)
        return []
    except ValueError:
        repair_generation_config(config, model.name_or_path)
    return [f"generation_config.json has settings that need do_sample; it is saved with do_sample={config.do_sample}"]


# <<< loading-info
