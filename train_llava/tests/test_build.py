"""A LLaVA of any tower and any language model: what it gives is what its parts give, and half a one is never left."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers as T
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_parts import (
    LANGUAGE_MODELS,
    TOWERS,
    make_language_model,
    make_tower,
    save_image_processor,
)

import build_model
from build_model import build_llava, tower_features
from export import draw_probe
from model import load_processor
from pixels import count_image_tokens, read_processor
from rows import UserError
from template import encode_prompt

T.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> str:
    return make_language_model("qwen2", tmp_path_factory.mktemp("parts") / "qwen2")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return make_tower("clip", tmp_path_factory.mktemp("parts") / "clip")


@pytest.fixture
def folder(clip, tmp_path) -> Path:
    """A copy of the CLIP tower that may be spoiled."""
    return Path(shutil.copytree(clip, tmp_path / "clip"))


def read(folder) -> T.LlavaForConditionalGeneration:
    return T.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower(name, qwen2, tmp_path):
    """The features of a picture are the tower's own, each with an image token, the class token left out."""
    vision, target = make_tower(name, tmp_path / "vision"), tmp_path / "llava"
    notes = build_llava(vision, qwen2, str(target))
    _, _, tokens, layer = TOWERS[name]
    assert notes[-1] == f"image tokens: {tokens} in the prompt, {tokens} features of the tower"
    model, processor = read(target), load_processor(str(target))
    assert model.config.vision_feature_layer == layer and model.config.image_seq_length == tokens
    inputs = processor(text="<image>你好<image>", images=[draw_probe()] * 2, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 2 * tokens == 2 * count_image_tokens(processor)
    with torch.no_grad():
        tower = T.AutoModel.from_pretrained(vision).eval()
        hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[layer]
        expected = hidden[:, hidden.shape[1] - tokens :]  # a class token comes first
        assert tower_features(model.model.vision_tower, model.config, inputs["pixel_values"]).equal(expected)
        projected = model.get_image_features(inputs["pixel_values"]).pooler_output
        assert projected[0].shape == (tokens, 32) and model(**inputs).logits.isfinite().all()
    # What the processor's file says counts too, where it is read by other programs, or by infer.py.
    assert count_image_tokens(read_processor(str(target))) == tokens
    assert type(processor.image_processor).__name__ == "LlavaImageProcessorPil"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_language_model(name, dtype, clip, tmp_path):
    """Its logits stay its own, with and without a free row for <image>; what is tied stays tied."""
    spare = 8 if dtype is torch.float32 else 0
    text, target = make_language_model(name, tmp_path / "text", spare, dtype), tmp_path / "llava"
    build_llava(clip, text, str(target))
    lm, model = T.AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32).eval(), read(target)
    processor, rows = load_processor(str(target)), lm.config.vocab_size
    prompt = encode_prompt([{"role": "user", "content": "天地玄黄"}], processor.tokenizer)
    with torch.no_grad():
        expected, found = lm(torch.tensor([prompt])).logits, model(torch.tensor([prompt])).logits
    assert found[..., :rows].equal(expected) and found.shape[-1] == (rows if spare else rows + 1)
    tied = LANGUAGE_MODELS[name][1]
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    with safe_open(target / "model.safetensors", "pt") as file:
        assert ("language_model.lm_head.weight" in file.keys()) != tied  # noqa: SIM118
        norm = file.get_tensor("language_model.model.norm.weight")
        assert norm.dtype == dtype and file.get_tensor("multi_modal_projector.linear_1.weight").dtype == torch.float32
    assert json.loads((target / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_every_end_of_a_reply_and_no_image_in_one(clip, qwen2, tmp_path):
    """The base model stops at <|endoftext|>, its template ends turns by <|im_end|>: the LLaVA stops at both."""
    build_llava(clip, qwen2, str(tmp_path / "llava"))
    model, processor = read(tmp_path / "llava"), load_processor(str(tmp_path / "llava"))
    tokenizer, config = processor.tokenizer, model.generation_config
    assert tokenizer.convert_ids_to_tokens(config.eos_token_id) == ["<|endoftext|>", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == processor.chat_template
    assert (config.do_sample, config.temperature, config.repetition_penalty) == (True, 0.7, 1.1)

    def push(head, inputs, logits):
        logits[..., processor.image_token_id] += 1e4
        return logits

    inputs = processor(text="<image>你好", images=draw_probe(), return_tensors="pt")
    model.lm_head.register_forward_hook(push)
    with torch.no_grad():
        assert model(**inputs).logits[0, -1].argmax() == processor.image_token_id
        for settings in ({"do_sample": False}, {"num_beams": 2}):
            reply = model.generate(**inputs, max_new_tokens=8, **settings)[0, inputs["input_ids"].shape[1] :]
            assert processor.image_token_id not in reply


def test_an_image_token_that_is_there_is_not_added_again(clip, qwen2, tmp_path):
    text = shutil.copytree(qwen2, tmp_path / "text")
    tokenizer = T.AutoTokenizer.from_pretrained(text)
    tokenizer.add_tokens([T.AddedToken("<image>", special=True)])
    tokenizer.save_pretrained(text)
    build_llava(clip, str(text), str(tmp_path / "llava"))
    processor = load_processor(str(tmp_path / "llava"))
    assert len(processor.tokenizer) == len(tokenizer) and processor.image_token_id == len(tokenizer) - 1
    assert "<image>" not in processor.tokenizer.all_special_tokens  # else no message could hold a picture


def test_a_language_model_without_a_template(clip, tmp_path):
    text = make_language_model("llama", tmp_path / "text", chat_template=None)
    build_llava(clip, text, str(tmp_path / "llava"))
    template = load_processor(str(tmp_path / "llava")).tokenizer.chat_template
    assert template.startswith("{% for message in messages %}{{ message.role }}: ")


def whole_clip(name: str, folder: Path) -> T.PreTrainedModel:
    """A whole CLIP of random weights; the vision part is that of TOWERS."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = TOWERS["vit" if name == "dual" else name][0].to_dict()
    torch.manual_seed(2)
    if name == "dual":
        config = T.VisionTextDualEncoderConfig(vision_config=vision, text_config=T.BertConfig(**text).to_dict())
        model = T.VisionTextDualEncoderModel(config)
    else:
        kind = {"clip": "CLIP", "siglip": "Siglip", "chinese_clip": "ChineseCLIP"}[name]
        config = getattr(T, f"{kind}Config")(vision_config=vision, text_config=text | {"vocab_size": 99})
        model = getattr(T, f"{kind}Model")(config)
    model.save_pretrained(folder)
    save_image_processor("vit" if name == "dual" else name, folder)
    return model.eval()


@pytest.mark.parametrize("name", ["clip", "siglip", "chinese_clip", "dual", "own class"])
def test_the_vision_part_of_a_whole(name, qwen2, tmp_path):
    vision = tmp_path / "vision"
    model = whole_clip("dual" if name == "own class" else name, vision)
    if name == "own class":  # as chinese_clip_ddp writes it: a model_type that Transformers doesn't know
        config = json.loads((vision / "config.json").read_text()) | {"model_type": "dual_encoder"}
        (vision / "config.json").write_text(json.dumps(config))
    notes = build_llava(str(vision), qwen2, str(tmp_path / "llava"))
    assert any("left out: " in note and "text_model" in note for note in notes)
    expected = model.vision_model.state_dict()
    found = read(tmp_path / "llava").model.vision_tower.state_dict()
    assert found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in expected)


def test_a_classifiers_tower_and_several_layers(qwen2, tmp_path):
    torch.manual_seed(0)
    classifier = T.ViTForImageClassification(TOWERS["vit"][0])
    classifier.save_pretrained(tmp_path / "vision")  # has no pooler, whose output no feature depends on
    save_image_processor("vit", tmp_path / "vision")
    notes = build_llava(str(tmp_path / "vision"), qwen2, str(tmp_path / "llava"), vision_feature_layer=[1, -2])
    assert "  left out: classifier" in notes and "(1, 16, 64)" in notes[-2]


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("convnext", r"'convnext' gives maps \(channels, height, width\).* Give one of clip_vision_model"),
        ("resnet", "'resnet' gives maps"),
        ("dinov3_vit", "'dinov3_vit' has an image processor that demands torchvision"),
        ("dinov3_convnext", "'dinov3_convnext' gives maps"),
        ("bert", "'bert' is none that was tried in a LLaVA"),
        ("vit9", "'vit9' is none that was tried"),
    ],
)
def test_a_tower_that_no_llava_can_have(model_type, reason, folder, qwen2, tmp_path):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=f"^{folder}: model_type {reason}"):
        build_llava(str(folder), qwen2, str(tmp_path / "llava"))


def spoil(folder: Path, how: str) -> None:
    weights = load_file(folder / "model.safetensors")
    if how == "missing":
        del weights["encoder.layers.0.mlp.fc1.weight"]
    elif how == "unexpected":
        weights["encoder.layers.3.mlp.fc1.weight"] = torch.zeros(64, 32)
    elif how == "size":
        weights["encoder.layers.0.mlp.fc1.weight"] = torch.zeros(64, 16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", r"lacks 1 of the model's tensors: encoder.layers.0.mlp.fc1.weight"),
        (
            "unexpected",
            r"1 tensors have no place in the model: encoder.layers.3.mlp.fc1.weight. Does config.json belong",
        ),
        ("size", r"has 1 of another size: encoder.layers.0.mlp.fc1.weight \(\[64, 16\] for \[64, 32\]\)"),
    ],
)
def test_weights_that_are_not_the_towers(how, reason, folder, qwen2, tmp_path):
    spoil(folder, how)
    with pytest.raises(UserError, match=f"^{folder}: {reason}"):
        build_llava(str(folder), qwen2, str(tmp_path / "llava"))
    assert not list(tmp_path.glob("*llava*"))


def test_weights_that_are_not_the_language_models(clip, qwen2, tmp_path):
    text = Path(shutil.copytree(qwen2, tmp_path / "text"))
    weights = load_file(text / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(64, 32)
    save_file(weights, text / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"^{text}: 1 tensors have no place in the model: model.layers.2.mlp"):
        build_llava(clip, str(text), str(tmp_path / "llava"))


def test_what_else_a_user_may_give(clip, folder, qwen2, tmp_path):
    def build(vision, text, target="llava", **settings):
        return build_llava(str(vision), str(text), str(tmp_path / target), **settings)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match="mine: is not an empty folder. Name another one"):
        build(clip, qwen2, "mine")
    text = Path(shutil.copytree(qwen2, tmp_path / "text"))
    (text / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(UserError, match="model.safetensors: is a Git LFS pointer, .* lfs pull"):
        build(clip, text)
    (text / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    (text / "model.safetensors").unlink()
    with pytest.raises(UserError, match="text: model_type 'bloom' is none of qwen2, qwen3, llama, internlm3"):
        build(clip, text)
    (text / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": qwen2}))
    with pytest.raises(UserError, match="text: is an adapter. Merge it"):
        build(clip, text)
    with pytest.raises(UserError, match="nowhere: no model could be read there"):
        build(clip, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"vision_feature_layer \[7\]: the tower gives 4, from -4 to 3"):
        build(clip, qwen2, vision_feature_layer=7)
    with pytest.raises(UserError, match="gives pictures of 64 x 64, the vision tower's config says 32"):
        T.CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False).save_pretrained(folder)
        build(folder, qwen2)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="clip: no preprocessor_config.json is there, .* Copy it"):
        build(folder, qwen2)
    assert not (tmp_path / "llava").exists()


def test_a_tokenizer_without_a_fast_version(clip, qwen2, tmp_path, monkeypatch):
    tokenizer = T.AutoTokenizer.from_pretrained(qwen2)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    monkeypatch.setattr(build_model, "read_tokenizer", lambda *_: tokenizer)
    with pytest.raises(UserError, match=f"^{qwen2}: its tokenizer has no fast version"):
        build_llava(clip, qwen2, str(tmp_path / "llava"))


def test_another_model_than_its_parts_is_found(clip, qwen2, tmp_path, monkeypatch):
    def join(tower, lm, config, right=build_model.join):
        model = right(tower, lm, config)
        model.model.language_model.layers[0].mlp.up_proj.weight.data += 0.1
        return model

    monkeypatch.setattr(build_model, "join", join)
    with pytest.raises(UserError, match="not built: text-only logits: differ by"):
        build_llava(clip, qwen2, str(tmp_path / "llava"))
    assert not list(tmp_path.iterdir())


def test_a_killed_build_leaves_nothing_of_its_name(clip, qwen2, tmp_path):
    """Killed once the weights are written; the next build clears away what it left beside the target."""
    written = multiprocessing.Event()

    def build_and_wait():
        build_model.compare = lambda *_: (written.set(), time.sleep(60))
        build_llava(clip, qwen2, str(tmp_path / "llava"))

    process = multiprocessing.get_context("fork").Process(target=build_and_wait)
    process.start()
    assert written.wait(30)
    process.kill()
    process.join()
    assert [path.name for path in tmp_path.iterdir()] == [".llava.unfinished"]
    build_llava(clip, qwen2, str(tmp_path / "llava"))
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]


def test_the_command(clip, qwen2, tmp_path, capsys):
    arguments = [clip, qwen2, str(tmp_path / "llava"), "--image_aspect_ratio", "crop", "--vision_feature_layer", "-1"]
    build_model.main(arguments)
    assert f"MODEL={tmp_path}/llava DATA=my_data bash train_stages.sh" in capsys.readouterr().out
    processor = load_processor(str(tmp_path / "llava"))
    assert processor.image_processor.do_center_crop and not processor.image_processor.do_pad
    assert json.loads((tmp_path / "llava" / "config.json").read_text())["vision_feature_layer"] == -1
    with pytest.raises(SystemExit, match="error: .*llava: is not an empty folder"):
        build_model.main(arguments)


def test_the_short_program_that_asks(clip, qwen2, tmp_path, capsys):
    import code04_test_model

    build_llava(clip, qwen2, str(tmp_path / "llava"))
    draw_probe().save(tmp_path / "my.png")
    code04_test_model.main([str(tmp_path / "llava"), str(tmp_path / "my.png"), "--max_new_tokens", "4"])
    screen = capsys.readouterr().out
    assert "(80, 48) -> (1, 3, 32, 32)" in screen and "<image> x 16\\n图里有什么？" in screen
    assert "(16, 32) behind the projector: 16 for 16 tokens" in screen
    with pytest.raises(SystemExit, match="error: .*none.png: can't be read"):
        code04_test_model.main([str(tmp_path / "llava"), str(tmp_path / "none.png")])
    with pytest.raises(SystemExit, match="error: the conversation has .* or lower max_new_tokens"):
        code04_test_model.main([str(tmp_path / "llava"), str(tmp_path / "my.png"), "--max_new_tokens", "99999"])
