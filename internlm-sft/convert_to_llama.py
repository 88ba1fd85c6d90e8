"""Turns a folder of InternLM (7b, 20b), InternLM2 or InternLM2.5 into a Llama of Transformers: no remote code is run.

    python convert_to_llama.py internlm2_5-7b-chat my_model
    python convert_to_llama.py internlm-chat-7b my_model --no_eoh
    python convert_to_llama.py internlm3-8b-instruct my_tokenizer --tokenizer_only

They compute the same. InternLM has Llama's names and biases in its attention; InternLM2 has names of its own and packs
query, key and value group by group (their modeling_internlm.py and modeling_internlm2.py). InternLM3 is a model of
Transformers; what it may lack is a fast tokenizer, which --tokenizer_only writes into a folder by itself.

A shard is read, written and forgotten before the next one. The target gets its name when it is complete.
"""

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from checkpoint import explain_write_errors, share_weights
from export import write_older_names
from model import refuse_lfs_pointers
from rows import UserError
from sentencepiece_bpe import check_tokenizer, fast_tokenizer, read_sentencepiece

# A turn of the first InternLM as its first releases were trained; the code of the later ones leaves <eoh> out.
INTERNLM_TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message.role == "system" %}<|System|>:{{ message.content }}
{% elif message.role == "user" %}<|User|>:{{ message.content }}<eoh>
{% elif message.role == "assistant" %}<|Bot|>:{{ message.content }}<eoa>
{% else %}{{ raise_exception("InternLM knows system, user and assistant only") }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|Bot|>:{% endif %}"""
CHATML_TEMPLATE = """{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Pieces with a meaning in the chat format, and their names there. InternLM2's chat releases name the last six of the
# vocabulary so in their tokenizer_config.json; the base models leave them unused.
CHATML_MARKS = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
MARKS = {"<eoh>": "<eoh>", "<eoa>": "<eoa>"}
MARKS |= {f"[UNUSED_TOKEN_{number}]": mark for number, mark in enumerate(CHATML_MARKS, start=141)}

# Llama's names, and InternLM2's for the same.
INTERNLM2_NAMES = {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output"}
INTERNLM2_NAMES |= {f"self_attn.{letter}_proj": "attention.wqkv" for letter in "qkv"}
INTERNLM2_NAMES |= {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1"}
INTERNLM2_NAMES |= {"mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}
INTERNLM2_NAMES |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
NEEDED = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
NEEDED |= {"max_position_embeddings", "rms_norm_eps"}


# >>> read-json
def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: no JSON ({error}). Download it again.") from None


# <<< read-json


def read_config(folder: Path, tokenizer_only: bool) -> dict:
    """The settings in config.json; raises UserError where they are of no model that is converted here."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: there is no config.json in it. Give the folder of the downloaded model.")
    settings = read_json(folder / "config.json")
    family = settings.get("model_type")
    if family == "llama" or (family == "internlm3" and not tokenizer_only):
        raise UserError(
            f"{folder}: needs no conversion, Transformers has {family}: MODEL={folder} bash train_zero2.sh. If an "
            "InternLM3 has no tokenizer.json, --tokenizer_only makes one."
        )
    if family not in ("internlm", "internlm2", "internlm3"):
        raise UserError(f"{folder}/config.json: model_type is {family!r}. Give an InternLM, InternLM2 or InternLM2.5.")
    return settings


def read_rope(folder: Path, old: dict) -> dict:
    """`rope_parameters` from the three forms that InternLM's configs have: `rotary`, `rope_scaling`, or neither."""
    rotary, scaling = old.get("rotary") or {}, old.get("rope_scaling") or {}
    kind = scaling.get("type") or scaling.get("rope_type") or rotary.get("type", "origin")
    rope = {"rope_theta": float(rotary.get("base", old.get("rope_theta", 10000)))}
    if kind in ("origin", "default"):
        return rope | {"rope_type": "default"}
    if kind not in ("dynamic", "linear"):
        raise UserError(f"{folder}/config.json: its rope is {kind!r}, neither dynamic nor linear. Not converted.")
    return rope | {"rope_type": kind, "factor": float(scaling.get("factor", rotary.get("scaling_factor", 1.0)))}


def llama_config(folder: Path, old: dict) -> LlamaConfig:
    """Llama's settings for those of InternLM or InternLM2."""
    if missing := NEEDED - old.keys():
        raise UserError(f"{folder}/config.json: it lacks {', '.join(sorted(missing))}. Download it again.")
    return LlamaConfig(
        **{name: old[name] for name in NEEDED},
        hidden_act=old.get("hidden_act", "silu"),
        num_key_value_heads=old.get("num_key_value_heads") or old["num_attention_heads"],
        attention_bias=old.get("bias", True),  # the default of InternLM's own code
        tie_word_embeddings=old.get("tie_word_embeddings", False),
        rope_parameters=read_rope(folder, old),
        initializer_range=old.get("initializer_range", 0.02),
        dtype=old.get("torch_dtype") or old.get("dtype"),
        architectures=["LlamaForCausalLM"],
    )


# >>> list-shards
def list_shards(folder: Path) -> list[Path]:
    """The files of weights, which Transformers would look for in this order; raises UserError where one is missing."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise UserError(
                    f"{folder}: {len(missing)} of the {len(names)} files that {index.name} names are missing, "
                    f"{missing[0]} among them. Download them, or the index that belongs to the files."
                )
            return [folder / name for name in names]
    raise UserError(f"{folder}: there is neither model.safetensors nor pytorch_model.bin in it, nor the index of one.")


# <<< list-shards


# >>> read-shard
def read_shard(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file; a pickled one is read as tensors only, never as code.

    Mapped, not copied: the releases hold all their 15 GB in one file.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:  # OSError: a .bin cut off
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: no weights can be read from it ({reason}). Download it again.") from None


# <<< read-shard


def wanted_tensors(config: LlamaConfig, family: str) -> dict[str, tuple[list[int], list[str]]]:
    """The shape of each tensor by its name in the source, and its names in Llama: InternLM2's wqkv is three of them."""
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    wanted = {}
    for name, tensor in tensors.items():
        layer, part, kind = re.fullmatch(r"(model\.layers\.\d+\.)?(.+)\.(weight|bias)", name).groups(default="")
        old = f"{layer}{INTERNLM2_NAMES.get(part, part)}.{kind}" if family == "internlm2" else name
        (rows, *columns), names = wanted.get(old, ([0, *tensor.shape[1:]], []))
        wanted[old] = ([rows + tensor.shape[0], *columns], [*names, name])
    return wanted


def split_wqkv(tensor: torch.Tensor, config: LlamaConfig) -> list[torch.Tensor]:
    """Query, key and value from InternLM2's: in each group of heads, its queries, then one key, then one value."""
    groups = tensor.unflatten(0, (config.num_key_value_heads, -1, config.head_dim))
    return [part.flatten(0, 2).clone() for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])]


def convert_shard(file: Path, target: Path, wanted: dict, config: LlamaConfig) -> dict[str, int]:
    """Writes the tensors of one file under Llama's names and takes them out of `wanted`; returns their bytes by name.

    Raises:
        UserError: a tensor that isn't wanted, or of another shape.
    """
    new, ignored = {}, ("output.weight", "lm_head.weight") if config.tie_word_embeddings else ()
    for name, tensor in read_shard(file).items():
        if name.endswith("rotary_emb.inv_freq") or name in ignored:  # computed; the embedding's own
            continue
        if name not in wanted:
            raise UserError(
                f"{file}: {name} is unknown to config.json, or stands in an earlier file. Download it again."
            )
        shape, names = wanted.pop(name)
        if list(tensor.shape) != shape:
            raise UserError(
                f"{file}: {name} is {list(tensor.shape)}, config.json asks for {shape}. Download both again."
            )
        parts = split_wqkv(tensor, config) if len(names) > 1 else [tensor.contiguous()]
        new |= zip(names, parts, strict=True)
    save_file(new, target, metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in new.items()}


def convert_weights(source: Path, target: Path, config: LlamaConfig, family: str) -> None:
    """Writes the weights, file by file; raises UserError where a tensor is missing."""
    wanted, files = wanted_tensors(config, family), list_shards(source)
    weight_map, total = {}, 0
    for number, file in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        sizes = convert_shard(file, target / name, wanted, config)
        weight_map |= dict.fromkeys(sizes, name)
        total += sum(sizes.values())
    if wanted:
        raise UserError(
            f"{source}: {len(wanted)} tensors are missing, {next(iter(wanted))} among them. Read were "
            f"{', '.join(file.name for file in files)}: is the download whole?"
        )
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")


def read_marks(settings: dict, proto: ModelProto) -> dict[int, AddedToken]:
    """The tokens that are no text, by id: SentencePiece's own, the chat format's, those of tokenizer_config.json."""
    marks = {}
    for number, token in settings.get("added_tokens_decoder", {}).items():
        marks[int(number)] = AddedToken(token["content"], special=token["special"], normalized=False)
    known = {mark.content for mark in marks.values()}
    for number, piece in enumerate(proto.pieces):
        name = piece.piece if piece.type in (piece.CONTROL, piece.UNKNOWN) else MARKS.get(piece.piece)
        if name and name not in known:
            marks.setdefault(number, AddedToken(name, special=True, normalized=False))
    return dict(sorted(marks.items()))


def convert_tokenizer(source: Path, family: str, no_eoh: bool) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The tokenizer with its chat template, checked against SentencePiece, and the ids at which generation stops.

    Raises:
        UserError: a file is missing or no InternLM's, or the two tokenise a text differently.
    """
    proto, processor = read_sentencepiece(source / "tokenizer.model")
    file = source / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    marks = read_marks(settings, proto)
    fast = fast_tokenizer(proto, processor, marks)
    end = "<eoa>" if family == "internlm" else "<|im_end|>"
    if end not in {mark.content for mark in marks.values()}:
        raise UserError(f"{source}: its tokenizer has no {end}, nor an unused piece for it. Is it {family}'s?")
    check_tokenizer(fast, proto, processor, marks)
    bos, eos, unk = (processor.id_to_piece(i) for i in (processor.bos_id(), processor.eos_id(), processor.unk_id()))
    if settings.get("add_bos_token", True):
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, processor.bos_id())]
        )
    template = settings.get("chat_template") or CHATML_TEMPLATE
    if family == "internlm":
        template = INTERNLM_TEMPLATE.replace("<eoh>", "" if no_eoh else "<eoh>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        **{"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": eos},
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    return tokenizer, [processor.eos_id(), fast.token_to_id(end)]


def write_model(source: Path, folder: Path, settings: dict, tokenizer, stops: list[int]) -> None:
    """Everything but the tokenizer; raises UserError where the source isn't whole, or the disk too small."""
    config = llama_config(source, settings)
    needed = sum(file.stat().st_size for file in list_shards(source))
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(f"{folder.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free. Free some.")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id}
    config.update(ends)
    convert_weights(source, folder, config, settings["model_type"])
    GenerationConfig(**ends).save_pretrained(folder)
    config.save_pretrained(folder)


def convert(source: Path, target: Path, no_eoh: bool = False, tokenizer_only: bool = False) -> list[str]:
    """Writes `target`, all of it or nothing; returns the names of its files.

    Raises:
        UserError: the source is no InternLM, isn't whole, or can't be converted exactly; the target holds something.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is not an empty folder. Name another one, or remove it first.")
    if target.is_mount():
        raise UserError(f"{target}: a disk is mounted there, so it can't be replaced. Name a folder within it.")
    refuse_lfs_pointers(str(source))
    settings = read_config(source, tokenizer_only)
    tokenizer, stops = convert_tokenizer(source, settings["model_type"], no_eoh)
    folder = target.resolve()
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        tokenizer.save_pretrained(unfinished)
        if not tokenizer_only:
            write_model(source, unfinished, settings, tokenizer, stops)
            write_older_names(unfinished)
            share_weights(unfinished)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return sorted(file.name for file in folder.iterdir())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of an InternLM, as downloaded")
    parser.add_argument("target", type=Path, help="folder to write, new or empty")
    parser.add_argument("--no_eoh", action="store_true", help="InternLM (the first): leave <eoh> out of the template")
    parser.add_argument("--tokenizer_only", action="store_true", help="write the tokenizer, and nothing else")
    args = parser.parse_args(argv)
    try:
        with explain_write_errors(str(args.target), "the target"):
            files = convert(args.source, args.target, args.no_eoh, args.tokenizer_only)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{args.target}: written, {', '.join(files)}")
    if args.tokenizer_only:
        print(f"weights and config.json stay in {args.source} as they are; put the tokenizer there, then train:")
        print(f"cp {args.target}/* {args.source}/ && MODEL={args.source} DATA=my_data bash train_zero2.sh")
    else:
        print(f"train it: MODEL={args.target} DATA=my_data bash train_zero2.sh")


if __name__ == "__main__":
    main()
