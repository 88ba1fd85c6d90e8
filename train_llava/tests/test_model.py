"""What is looked at before the first step: the folder, the processor, which weights are trained and which can't be."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from small_parts import TOWERS, make_language_model, make_tower

from build_model import build_llava
from export import draw_probe
from infer import load_trained_model
from model import (
    check_model,
    check_vocabulary,
    freeze,
    load_model,
    load_processor,
    read_config,
    set_aspect_ratio,
)
from pixels import count_image_tokens
from rows import UserError
from template import encode_conversation, encode_prompt
from tower import unused_in_tower

T.utils.logging.disable_progress_bar()

# Tensors of the tower that the chosen layer leaves unused.
UNUSED = {"clip": 18, "chinese_clip": 18, "siglip": 29, "vit": 20, "dinov2": 21, "swin": 2, "focalnet": 2, "levit": 0}

# As llava-hf's LLaVA 1.5 has it: contents are lists of typed parts, and no token ends a reply.
TYPED_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Every tower, a Qwen2, and a LLaVA of each tower with it."""
    folder = tmp_path_factory.mktemp("parts")
    text = make_language_model("qwen2", folder / "qwen2")
    for name in TOWERS:
        build_llava(make_tower(name, folder / name), text, str(folder / f"llava_{name}"))
    return folder


@pytest.fixture
def folder(parts, tmp_path) -> Path:
    """A copy of the LLaVA with CLIP that may be spoiled."""
    return Path(shutil.copytree(parts / "llava_clip", tmp_path / "model"))


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def arguments(path, train_type="none", **settings) -> SimpleNamespace:
    """What is read of ModelArguments."""
    return SimpleNamespace(
        **{
            "model_name_or_path": str(path),
            "train_type": train_type,
            "use_lora": train_type == "use_lora",
            "attn_implementation": None,
            "trust_remote_code": False,
        }
        | settings
    )


def precision(**settings) -> SimpleNamespace:
    return SimpleNamespace(
        **{"bf16": False, "fp16": False, "deepspeed": None, "device": torch.device("cpu"), "seed": 0} | settings
    )


def step(model, processor) -> torch.Tensor:
    """The loss of two questions, the second without a picture, with its gradients."""
    inputs = processor(text=["<image>你好", "天地玄黄"], images=[draw_probe()], padding=True, return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
    pixel_values = inputs.pop("pixel_values").repeat(1, 1, 1, 1)
    loss = model(**inputs, pixel_values=pixel_values, labels=labels).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("name", TOWERS)
def test_all_that_is_trained_gets_a_gradient(name, parts):
    """Of every tower: what lies behind the chosen layer is frozen, the rest of it learns; DDP would stop otherwise."""
    path = parts / f"llava_{name}"
    model, processor = load_model(arguments(path), precision()), load_processor(str(path))
    table = freeze(model, "none")
    model.train()
    step(model, processor)
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
    tower, unused = model.model.vision_tower, unused_in_tower(model.config)
    assert {key for key, value in tower.named_parameters() if not value.requires_grad} == unused
    size = sum(parameter.numel() for parameter in tower.parameters())
    used = sum(parameter.numel() for parameter in tower.parameters() if parameter.grad is not None)
    assert table[0] == f"vision tower    {size:14,} parameters, {used:14,} trained"
    assert (f"{len(unused)} tensors of the tower give nothing" in table[-1]) == bool(unused)
    assert len(unused) == UNUSED[name], sorted(unused)


def test_batch_norms_keep_their_statistics(parts):
    """A trained LeViT: one batch or two halves of it give the same loss, and a second step works."""
    model = load_model(arguments(parts / "llava_levit"), precision())
    freeze(model, "none")
    model.train()
    tower = model.model.vision_tower
    pixel_values = torch.randn(4, 3, 128, 128)
    whole = tower(pixel_values, output_hidden_states=True).hidden_states[-1]
    halves = [tower(half, output_hidden_states=True).hidden_states[-1] for half in pixel_values.chunk(2)]
    torch.testing.assert_close(torch.cat(halves), whole)
    whole.sum().backward()
    halves[0].sum().backward()


@pytest.mark.parametrize(
    ("train_type", "trained"),
    [
        ("none", {"vision_tower", "multi_modal_projector", "language_model"}),
        ("freeze_vision", {"multi_modal_projector", "language_model"}),
        ("projector", {"multi_modal_projector"}),
    ],
)
def test_what_a_step_changes(train_type, trained, parts):
    model = load_model(arguments(parts / "llava_levit", train_type), precision())
    freeze(model, train_type)
    model.train()
    assert model.model.vision_tower.training == (train_type == "none")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step(model, load_processor(str(parts / "llava_levit")))
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    after = model.state_dict()
    changed = {key.split(".")[1] for key in before if not after[key].equal(before[key])} - {"weight"}
    assert changed == trained  # the head is one weight with the embedding
    assert model.model.multi_modal_projector.training and model.model.language_model.training


def test_adapters_stand_in_the_language_model_alone(parts):
    """PEFT's "all-linear" would put them into the frozen tower too; the projector is trained whole."""
    lora = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["all-linear"]}
    model = load_model(arguments(parts / "llava_clip", "use_lora", **lora), precision(bf16=True))
    table = freeze(model, "use_lora")
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    adapters = [name for name in trained if "lora_" in name]
    assert len(adapters) == 2 * 7 * 2 and all(".language_model." in name for name in adapters)
    assert len(trained) == len(adapters) + 4 and "vision_tower" not in str(trained.keys())
    assert table[0].endswith(" 0 trained") and table[1].endswith("2,112 trained")
    model.train()
    assert not model.base_model.model.model.vision_tower.training


def test_what_is_updated_is_fp32(parts):
    model = load_model(arguments(parts / "llava_clip", "projector"), precision(bf16=True))
    assert model.model.language_model.dtype == model.model.vision_tower.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.model.multi_modal_projector.parameters()} == {torch.float32}
    assert load_model(arguments(parts / "llava_clip", "none"), precision(bf16=True)).dtype == torch.float32
    assert load_model(arguments(parts / "llava_clip"), precision(bf16=True, deepspeed="x")).dtype == torch.bfloat16


def test_the_tower_keeps_its_own_attention(parts):
    model = load_model(arguments(parts / "llava_clip", attn_implementation="eager"), precision())
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("size", "kept"), [((96, 32), 1), ((32, 96), 1), ((64, 64), 0)])
def test_three_ways_to_a_square(size, kept, parts):
    """A red picture with a blue edge at either end of its longer side."""
    from PIL import Image

    picture = Image.new("RGB", size, (255, 0, 0))
    edge = (8, size[1]) if size[0] >= size[1] else (size[0], 8)
    for place in ((0, 0), (size[0] - edge[0], size[1] - edge[1])):
        picture.paste((0, 0, 255), (*place, place[0] + edge[0], place[1] + edge[1]))
    own = load_processor(str(parts / "llava_clip")).image_processor
    mean, seen = torch.tensor(own.image_mean)[:, None, None], {}
    for mode in ("pad", "crop", "squash"):
        pixels = set_aspect_ratio(own, mode)(picture, return_tensors="pt")["pixel_values"][0]
        assert pixels.shape == (3, 32, 32)
        seen[mode] = pixels * torch.tensor(own.image_std)[:, None, None] + mean
    blue = {mode: ((colours[2] > 0.6) & (colours[0] < 0.4)).any().item() for mode, colours in seen.items()}
    assert blue == {"pad": True, "crop": not kept, "squash": True}
    border = seen["pad"][:, 0, 0] if size[0] >= size[1] else seen["pad"][:, 0, 0]
    assert ((border - mean[:, 0, 0]).abs().max() < 0.01).item() == bool(kept)


def test_the_way_to_a_square_is_kept(parts, tmp_path):
    processor = load_processor(str(parts / "llava_clip"))
    processor.image_processor = set_aspect_ratio(processor.image_processor, "squash")
    processor.save_pretrained(folder := shutil.copytree(parts / "llava_clip", tmp_path / "model"))
    _, served = load_trained_model(str(folder))
    assert not served.image_processor.do_pad and not served.image_processor.do_center_crop
    assert count_image_tokens(served) == 16


@pytest.mark.parametrize(
    "missing", [("patch_size",), ("num_additional_image_tokens", "vision_feature_select_strategy")]
)
def test_a_processor_that_counts_wrong_is_mended(missing, folder):
    """Many LLaVA folders of the hub lack these, or have those of another tower."""
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != missing}))
    assert count_image_tokens(load_processor(str(folder))) == 16
    change(folder / "config.json", image_token_index=7)
    with pytest.raises(UserError, match="the processor's <image> is token 280, in config.json image_token_index is 7"):
        load_processor(str(folder))


def test_a_folder_of_llava_hf(folder, parts):
    """preprocessor_config.json apart, <image> special, a template that wants typed parts."""
    processor = T.LlavaProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens([T.AddedToken("<image>", special=True)])
    processor.chat_template = processor.tokenizer.chat_template = TYPED_TEMPLATE
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    del settings["image_processor"]
    (folder / "processor_config.json").write_text(json.dumps(settings))

    check_model(arguments(folder), 2048)
    load_model(arguments(folder), precision())
    processor = load_processor(str(folder))
    tokenizer = processor.tokenizer
    message = {"role": "user", "content": "<image>\n你好"}
    prompt = encode_prompt([message], tokenizer)
    assert tokenizer.decode(prompt) == "USER: <image>\n你好 ASSISTANT:" and prompt.count(processor.image_token_id) == 1
    (example,) = encode_conversation([message, {"role": "assistant", "content": "天地"}], tokenizer)
    assert tokenizer.decode([token for token in example["labels"] if token != -100]) == " 天地<|im_end|>"
    parts_of = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "你好"}]}]
    assert processor.apply_chat_template(parts_of, add_generation_prompt=True) == "USER: <image>\n你好 ASSISTANT:"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"model_type": "qwen2"},
            "'qwen2' reads text only. Give it eyes first: python build_model.py VISION .*my_",
        ),
        ({"model_type": "qwen2_vl", "vision_config": {}}, "'qwen2_vl' is not the LLaVA class .* demand torchvision"),
        ({"model_type": "llava_onevision", "vision_config": {}}, "'llava_onevision' is not the LLaVA class"),
        (
            {"model_type": "llava", "mm_vision_tower": "openai/clip"},
            "layout of LLaVA's own code. .* from llava-hf",
        ),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "its vision tower 'pixtral' is none of"),
        ({"model_type": "clip_vision_model"}, "'clip_vision_model' is no LLaVA. Build one: python build_model.py"),
        ({"model_type": "llava9"}, "model_type 'llava9' is unknown to Transformers"),
    ],
)
def test_a_model_that_cannot_be_trained(config, reason, folder):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=reason) as raised:
        check_model(arguments(folder), 2048)
    assert "\n" not in str(raised.value)


def test_weights_that_are_not_whole(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["multi_modal_projector.linear_2.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of the model's tensors: model.multi_modal_projector.linear_2.weight"):
        load_model(arguments(folder), precision())
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="model.safetensors: is a Git LFS pointer"):
        check_model(arguments(folder), 2048)


def test_a_tokenizer_with_more_ids_than_the_model(folder):
    tokenizer, config = load_processor(str(folder)).tokenizer, read_config(str(folder))
    check_vocabulary(str(folder), tokenizer, config)
    tokenizer.add_tokens([f"新词{number}" for number in range(20)])
    with pytest.raises(UserError, match="the tokenizer has 301 ids, the model's embedding 288 rows"):
        check_vocabulary(str(folder), tokenizer, config)
