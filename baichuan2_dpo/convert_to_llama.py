"""Turns a folder of Baichuan2-7B, Base or Chat, or of Baichuan-7B into a Llama of Transformers: no remote code is run.

    python convert_to_llama.py Baichuan2-7B-Chat my_model

They compute the same. Baichuan has Llama's names, but one W_pack for query, key and value; the head of Baichuan2 is a
NormHead, which scales its rows to length 1 before it uses them (their modeling_baichuan.py). A Llama's head is a plain
matrix: it gets the scaled rows, and if training moves them, nothing scales them again (LoRA leaves them as they are).

A file is read, written and forgotten before the next one. The target gets its name when it is complete.
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
from tokenizers import AddedToken
from torch.nn.functional import normalize
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from checkpoint import explain_write_errors, share_weights
from export import write_older_names
from model import refuse_lfs_pointers
from rows import UserError
from sentencepiece_bpe import check_tokenizer, fast_tokenizer, read_sentencepiece

# Baichuan2's own code asks without </s> after the answers of a history, yet was trained to say it there: its
# fine-tune.py learns </s> where the input goes on with <reserved_106>. A text can't hold both, so here each answer
# ends with the </s> that is learned. For a conversation of one question this is the official text; behind an older
# answer there is one token more.
CHAT_TEMPLATE = """{% for message in messages %}\
{% if message.role == "system" %}{{ message.content }}\
{% elif message.role == "user" %}<reserved_106>{{ message.content }}\
{% elif message.role == "assistant" %}<reserved_107>{{ message.content }}{{ eos_token }}\
{% else %}{{ raise_exception("Baichuan2 knows system, user and assistant only") }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<reserved_107>{% endif %}"""
USER, ASSISTANT = "<reserved_106>", "<reserved_107>"
USER_ID = 195  # of Baichuan2's <reserved_106> and Baichuan's <reserved_102>; the assistant's comes next

BAICHUAN_VOCABULARY = 64000  # Baichuan2 has 125,696
NEEDED = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
NEEDED |= {"max_position_embeddings", "rms_norm_eps"}


# >>> read-json
def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: no JSON ({error}). Download it again.") from None


# <<< read-json


def read_config(folder: Path) -> dict:
    """The settings in config.json; raises UserError where they are of no model that is converted here."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: there is no config.json in it. Give the folder of the downloaded model.")
    settings = read_json(folder / "config.json")
    family = settings.get("model_type")
    if family == "llama":
        raise UserError(f"{folder}: needs no conversion, it is a Llama: MODEL={folder} bash train_zero2.sh.")
    if family != "baichuan":
        raise UserError(f"{folder}/config.json: model_type is {family!r}. Give a Baichuan2-7B, Base or Chat.")
    if "quantization_config" in settings:
        raise UserError(f"{folder}: its weights are quantised. Give the release without -4bits in its name.")
    # The 7B names its length in both ways.
    alibi = "model_max_length" in settings and "max_position_embeddings" not in settings
    if alibi or settings.get("hidden_size") == 5120:
        raise UserError(
            f"{folder}: is a Baichuan of 13B, which has ALiBi where Llama rotates by the position; Transformers has no "
            "class that computes so. Give a Baichuan2-7B."
        )
    if missing := NEEDED - settings.keys():
        raise UserError(f"{folder}/config.json: it lacks {', '.join(sorted(missing))}. Download it again.")
    return settings


def llama_config(old: dict) -> LlamaConfig:
    """Llama's settings for those of Baichuan; what isn't named in these, its code has fixed."""
    return LlamaConfig(
        **{name: old[name] for name in NEEDED},
        hidden_act=old.get("hidden_act", "silu"),
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        initializer_range=old.get("initializer_range", 0.02),
        dtype=old.get("torch_dtype") or old.get("dtype"),
        architectures=["LlamaForCausalLM"],
    )


def has_norm_head(old: dict) -> bool:
    """Whether the head's rows are scaled: always, but in the first Baichuan, known by its vocabulary or its class.

    By what the first one is rather than by 125,696, so that a Baichuan2 to which tokens were added stays one.
    """
    return old["vocab_size"] != BAICHUAN_VOCABULARY and "BaiChuanForCausalLM" not in old.get("architectures", [])


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


def wanted_tensors(config: LlamaConfig) -> dict[str, tuple[list[int], list[str]]]:
    """The shape of each tensor by its name in the source, and its names in Llama: W_pack is three of them."""
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    wanted = {}
    for name, tensor in tensors.items():
        old = re.sub("[qkv]_proj", "W_pack", name)
        (rows, *columns), names = wanted.get(old, ([0, *tensor.shape[1:]], []))
        wanted[old] = ([rows + tensor.shape[0], *columns], [*names, name])
    return wanted


def scale_rows(head: torch.Tensor) -> torch.Tensor:
    """A NormHead's rows at length 1: in fp32, since bfloat16 gets every third one wrong, and a part at a time."""
    return torch.cat([normalize(rows.float(), eps=1e-12).to(head.dtype) for rows in head.split(4096)])


def convert_shard(file: Path, target: Path, wanted: dict, norm_head: bool) -> dict[str, int]:
    """Writes the tensors of one file under Llama's names and takes them out of `wanted`; returns their bytes by name.

    Raises:
        UserError: a tensor that isn't wanted, or of another shape.
    """
    new = {}
    for name, tensor in read_shard(file).items():
        if name.endswith("rotary_emb.inv_freq"):  # computed
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
        if name == "lm_head.weight" and norm_head:
            tensor = scale_rows(tensor)
        new |= zip(names, tensor.contiguous().chunk(len(names)), strict=True)  # W_pack: all q, then all k, then all v
    save_file(new, target, metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in new.items()}


def convert_weights(source: Path, target: Path, config: LlamaConfig, norm_head: bool) -> None:
    """Writes the weights, file by file; raises UserError where a tensor is missing."""
    wanted, files = wanted_tensors(config), list_shards(source)
    weight_map, total = {}, 0
    for number, file in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        sizes = convert_shard(file, target / name, wanted, norm_head)
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


def find_speakers(proto: ModelProto) -> list[str]:
    """The pieces that open a turn of the user and of the assistant, or none.

    They are known by their ids, since Baichuan calls other pieces so than Baichuan2; by their names where these ids
    are text, as in a small vocabulary.
    """
    names = [piece.piece for piece in proto.pieces]
    speakers = names[USER_ID : USER_ID + 2]
    if re.fullmatch(r"(<reserved_\d+>){2}", "".join(speakers)):
        return speakers
    return [name for name in (USER, ASSISTANT) if name in names]


def read_marks(settings: dict, proto: ModelProto, speakers: list[str]) -> dict[int, AddedToken]:
    """The tokens that are no text, by id: those of tokenizer_config.json, SentencePiece's own, the speakers'."""
    marks = {}
    for number, token in settings.get("added_tokens_decoder", {}).items():
        marks[int(number)] = AddedToken(token["content"], special=token["special"], normalized=False)
    for number, piece in enumerate(proto.pieces):
        if piece.piece in speakers or piece.type in (piece.CONTROL, piece.UNKNOWN):
            marks[number] = AddedToken(piece.piece, special=True, normalized=False)
    return dict(sorted(marks.items()))


def convert_tokenizer(source: Path) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The tokenizer with its chat template, checked against SentencePiece, and the ids at which generation stops.

    Raises:
        UserError: a file is missing or no Baichuan's, or the two tokenise a text differently.
    """
    proto, processor = read_sentencepiece(source / "tokenizer.model")
    file = source / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    speakers = find_speakers(proto)
    if len(speakers) < 2:
        raise UserError(f"{source}/tokenizer.model: it has no {USER} and {ASSISTANT}. Is it Baichuan's?")
    marks = read_marks(settings, proto, speakers)
    fast = fast_tokenizer(proto, processor, marks)
    check_tokenizer(fast, proto, processor, marks)
    bos, eos, unk = (processor.id_to_piece(i) for i in (processor.bos_id(), processor.eos_id(), processor.unk_id()))
    template = CHAT_TEMPLATE.replace(USER, speakers[0]).replace(ASSISTANT, speakers[1])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        **{"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": unk},
        chat_template=settings.get("chat_template") or template,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    return tokenizer, [processor.eos_id(), fast.token_to_id(speakers[0])]


def write_model(source: Path, folder: Path, settings: dict, tokenizer, stops: list[int]) -> None:
    """Everything but the tokenizer; raises UserError where the source isn't whole, or the disk too small."""
    config = llama_config(settings)
    needed = sum(file.stat().st_size for file in list_shards(source))
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(f"{folder.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free. Free some.")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id}
    config.update(ends)
    convert_weights(source, folder, config, has_norm_head(settings))
    GenerationConfig(**ends).save_pretrained(folder)
    config.save_pretrained(folder)


def convert(source: Path, target: Path) -> list[str]:
    """Writes `target`, all of it or nothing; returns the names of its files.

    Raises:
        UserError: the source is no Baichuan, isn't whole, or can't be converted exactly; the target holds something.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is not an empty folder. Name another one, or remove it first.")
    if target.is_mount():
        raise UserError(f"{target}: a disk is mounted there, so it can't be replaced. Name a folder within it.")
    refuse_lfs_pointers(str(source))
    settings = read_config(source)
    tokenizer, stops = convert_tokenizer(source)
    folder = target.resolve()
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        tokenizer.save_pretrained(unfinished)
        write_model(source, unfinished, settings, tokenizer, stops)
        write_older_names(unfinished)
        share_weights(unfinished)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return sorted(file.name for file in folder.iterdir())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a Baichuan2-7B, as downloaded")
    parser.add_argument("target", type=Path, help="folder to write, new or empty")
    args = parser.parse_args(argv)
    try:
        with explain_write_errors(str(args.target), "the target"):
            files = convert(args.source, args.target)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{args.target}: written, {', '.join(files)}")
    print(f"train it: MODEL={args.target} DATA=my_data bash train_zero2.sh")


if __name__ == "__main__":
    main()
