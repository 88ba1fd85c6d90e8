"""Each kind of encoder and each whole CLIP: embeddings, saving, what of them is trained."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize
from transformers import (
    BertConfig,
    BertModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LevitConfig,
    LevitModel,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

import model as model_module
from freeze import choose_trained, describe_trained, find_unused, frozen_modules
from model import (
    choose_max_length,
    embed_images,
    embed_pairs,
    embed_texts,
    join_towers,
    load_image_processor,
    load_model,
    load_text_tower,
    load_vision_tower,
    prepare_forward,
)
from rows import UserError
from zero import batch_norms_in_fp32

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = {"image_size": 32, "patch_size": 16}
TEXT = {"vocab_size": 50, "max_position_embeddings": 16, "pad_token_id": 1, "bos_token_id": 48, "eos_token_id": 49}
LEVIT = {"hidden_sizes": [48, 48], "num_attention_heads": [2], "depths": [2], "key_dim": [8], "down_ops": []}
SWIN = {"patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}

VISION = {
    "vit": lambda: ViTModel(ViTConfig(**SIZES, **IMAGE)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, **IMAGE)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, **IMAGE)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, **IMAGE)),
    "levit": lambda: LevitModel(LevitConfig(image_size=32, mlp_ratio=[2], attention_ratio=[2], **LEVIT)),
    "swin": lambda: SwinModel(SwinConfig(image_size=32, **SWIN)),
}
TEXTS = {
    "bert": lambda: BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(**TEXT | {"max_position_embeddings": 18}, **SIZES)),
}
WHOLE = {
    "clip": (CLIPModel, CLIPConfig),
    "cn": (ChineseCLIPModel, ChineseCLIPConfig),
    "siglip": (SiglipModel, SiglipConfig),
}
PAIRS = {
    **{f"{vision}+bert": (vision, "bert", {}) for vision in VISION},
    "dinov2+roberta": ("dinov2", "roberta", {"vision_pooling": "max", "text_pooling": "mean", "projection_dim": 24}),
    "vit+bert pooler": ("vit", "bert", {"vision_pooling": "pooler", "text_pooling": "pooler"}),
}


def build(name: str):
    """A random model of PAIRS or WHOLE."""
    torch.manual_seed(0)
    if name in PAIRS:
        vision, text, settings = PAIRS[name]
        return prepare_forward(join_towers(VISION[vision](), TEXTS[text](), **settings))
    model_class, config_class = WHOLE[name]
    own = {"projection_dim": 16} if name != "siglip" else {}
    return prepare_forward(model_class(config_class(text_config=TEXT | SIZES, vision_config=IMAGE | SIZES, **own)))


def make_batch() -> dict[str, torch.Tensor]:
    """3 images, and captions of 7, 4 and 5 tokens that end by the EOS."""
    torch.manual_seed(1)
    mask = (torch.arange(7)[None] < torch.tensor([7, 4, 5])[:, None]).long()
    ids = torch.randint(4, 48, (3, 7)) * mask + (1 - mask)
    ids[torch.arange(3), mask.sum(1) - 1] = 49
    return {"pixel_values": torch.randn(3, 3, 32, 32), "input_ids": ids, "attention_mask": mask}


def settings(**changed) -> SimpleNamespace:
    return SimpleNamespace(**{"freeze": "none", "unlocked_layers": 0, "model_name_or_path": None} | changed)


@pytest.mark.parametrize("name", [*PAIRS, *WHOLE])
def test_a_model_is_saved_and_read_bit_for_bit_and_padding_changes_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "load_tokenizer", lambda path: SimpleNamespace(pad_token_id=1))
    model, batch = build(name).eval(), make_batch()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path)).eval()
    assert type(loaded) is type(model)
    weights = loaded.state_dict()
    assert all(torch.equal(weights[key], weight) for key, weight in model.state_dict().items())
    with torch.no_grad():
        images, texts, scale, bias = model(**batch)
        for found, expected in zip(loaded(**batch), (images, texts, scale, bias), strict=True):
            assert torch.equal(found, expected) if expected is not None else found is None
        assert torch.allclose(images.norm(dim=1), torch.ones(3)) and torch.allclose(texts.norm(dim=1), torch.ones(3))
        assert torch.equal(images, embed_images(model, batch["pixel_values"]))
        alone = embed_texts(model, batch["input_ids"][1:2, :4], batch["attention_mask"][1:2, :4])
        assert torch.allclose(alone[0], texts[1], atol=1e-6) and not torch.allclose(texts[0], texts[1])


def test_whole_models_embed_as_their_own_classes_do():
    batch = make_batch()
    for name in WHOLE:
        model = build(name).eval()
        inputs = dict(batch)
        if name == "siglip":  # which was trained with padding up to its 16 positions, and without a mask
            inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (0, 9), value=1)
            del inputs["attention_mask"]
        with torch.no_grad():
            own = type(model).forward(model, **inputs)
            images, texts, scale, _ = model(**batch)
        assert torch.allclose(own.image_embeds, images, atol=1e-6) and torch.allclose(own.text_embeds, texts, atol=1e-6)
        assert scale.shape == () and scale.item() == pytest.approx(model.logit_scale.exp().item())


@pytest.mark.parametrize("name", [*PAIRS, *WHOLE])
def test_what_gets_no_gradient_is_found_and_frozen_and_the_rest_learns(name):
    model, batch = build(name), make_batch()
    unused = find_unused(model, (3, 32, 32))
    choose_trained(model, settings(), "tiled", (3, 32, 32))
    assert not getattr(model, "logit_bias", torch.zeros(())).requires_grad
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    images, texts, scale, _ = model.train()(**batch)
    torch.nn.functional.cross_entropy(scale * images @ texts.T, torch.arange(3)).backward()
    without = {key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None}
    assert not without, "DDP would wait for them"
    optimizer.step()
    changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert not changed & (unused | {"logit_bias"})
    assert {key.split(".")[0] for key in changed} >= {"vision_model", "text_model", "logit_scale"}
    has_pooler = "pooler" in name or name in WHOLE
    assert has_pooler == (not [key for key in unused if "pooler" in key])


def test_a_frozen_encoder_stays_equal_and_in_eval_mode_but_for_its_last_layers():
    batch = make_batch()
    for name, unlocked, layers in (("vit+bert", 0, 2), ("levit+bert", 1, 4), ("swin+bert", 2, 3)):
        model = build(name)
        choose_trained(model, settings(freeze="vision", unlocked_layers=unlocked), "tiled", (3, 32, 32))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.train()
        for module in frozen_modules(model):
            module.eval()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        images, texts, *_ = model(**batch)
        (images @ texts.T).diag().sum().backward()
        optimizer.step()
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        of_tower = {key for key in changed if key.startswith("vision_model.")}
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert bool(of_tower) == bool(unlocked) and any(key.startswith("text_model.") for key in changed)
        assert {key for key in trained if key.startswith("vision_model.")} >= {
            key for key in of_tower if "running" not in key and "num_batches" not in key
        }
        with pytest.raises(UserError, match=f"the vision encoder has {layers} layers"):
            choose_trained(model, settings(freeze="vision", unlocked_layers=9), "tiled", (3, 32, 32))


def test_a_whole_model_freezes_its_projection_too_and_what_is_trained_is_said():
    model = build("clip")
    choose_trained(model, settings(freeze="vision", model_name_or_path="clip"), "tiled", (3, 32, 32))
    assert not model.visual_projection.weight.requires_grad and model.text_projection.weight.requires_grad
    lines = "\n".join(describe_trained(model))
    choose_trained(model, settings(freeze="vision", unlocked_layers=1, model_name_or_path="clip"), "tiled", (3, 32, 32))
    assert model.visual_projection.weight.requires_grad and model.vision_model.post_layernorm.weight.requires_grad
    assert not model.vision_model.embeddings.class_embedding.requires_grad
    assert "visual_projection           512 parameters,            0 trained" in lines
    joined = build("levit+bert")  # a width of 48 beside 32: two new projections
    choose_trained(joined, settings(freeze="vision"), "tiled", (3, 32, 32))
    assert joined.visual_projection.weight.shape == (32, 48) and joined.visual_projection.weight.requires_grad


def test_features_of_a_frozen_tower_take_its_place():
    model, batch = build("swin+bert").eval(), make_batch()
    kept = model_module.pool_images(model, batch["pixel_values"])
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for found, expected in zip(embed_pairs(model, image_features=kept, **texts), model(**batch), strict=True):
        assert torch.equal(found, expected)
    assert torch.allclose(normalize(model.get_image_features(batch["pixel_values"])), model(**batch)[0])


def test_encoders_are_taken_from_folders_and_what_they_lack_is_said(tmp_path):
    build("clip").save_pretrained(tmp_path / "clip")
    TEXTS["bert"]().save_pretrained(tmp_path / "bert")
    ViTModel(ViTConfig(**SIZES, **IMAGE), add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    vision = load_vision_tower(str(tmp_path / "clip"), None)
    assert type(vision) is CLIPVisionModel
    model = join_towers(vision, load_text_tower(str(tmp_path / "bert"), None))
    assert (model.config.vision_pooling, model.config.text_pooling) == ("pooler", "cls")
    assert isinstance(model.visual_projection, torch.nn.Identity)
    load_vision_tower(str(tmp_path / "vit"), "cls")
    with pytest.raises(UserError, match="lacks 2 of the model's tensors: pooler.dense.bias"):
        load_vision_tower(str(tmp_path / "vit"), "pooler")
    with pytest.raises(UserError, match="'clip' is no text encoder.*--model_name_or_path"):
        load_text_tower(str(tmp_path / "clip"), None)
    with pytest.raises(UserError, match="'bert' is no pair of an image and a text encoder"):
        load_model(str(tmp_path / "bert"))
    with pytest.raises(UserError, match="no model could be read there"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match="--vision_pooling cls: swin has no class token"):
        join_towers(VISION["swin"](), TEXTS["bert"](), "cls")
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="is a Git LFS pointer"):
        load_text_tower(str(tmp_path / "bert"), None)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="images of 48 x 48.*48"):
        find_unused(build("vit+bert"), (3, 48, 48))
    with pytest.raises(UserError, match="sigmoid needs a bias, and CLIPModel has none"):
        choose_trained(build("clip"), settings(), "sigmoid", (3, 32, 32))
    choose_trained(build("siglip"), settings(), "sigmoid", (3, 32, 32))


def test_batch_norms_of_weights_that_deepspeed_has_cast():
    model, other = build("levit+bert"), build("levit+bert")
    pixels = make_batch()["pixel_values"]
    batch_norms_in_fp32(other)
    for mode in (True, False):
        expected, found = (embed_images(each.train(mode), pixels) for each in (model, other))
        assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))
    for parameter in other.parameters():
        parameter.data = parameter.data.bfloat16()
    expected = embed_images(model.train(), pixels)
    assert torch.allclose(embed_images(other.train(), pixels), expected, atol=0.1)


def test_the_length_of_a_caption_comes_from_the_model(tmp_path):
    long, short = SimpleNamespace(model_max_length=int(1e30)), SimpleNamespace(model_max_length=12)
    for name, positions in (("bert", 16), ("roberta", 16)):
        TEXTS[name]().config.save_pretrained(tmp_path / name)
        assert choose_max_length(str(tmp_path / name), long, None) == positions
    build("siglip").config.save_pretrained(tmp_path / "siglip")
    assert choose_max_length(str(tmp_path / "siglip"), short, None) == 12
    assert choose_max_length(str(tmp_path / "siglip"), short, 16) == 16
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="'vit' has no number of positions.*Give a BERT"):
        choose_max_length(str(tmp_path / "vit"), long, None)
    with pytest.raises(UserError, match="--max_seq_length 17: from 3 to the 16 positions"):
        choose_max_length(str(tmp_path / "siglip"), short, 17)


def test_the_image_processor_is_always_pil_s(tiny_folder):
    assert load_image_processor(tiny_folder).backend == "pil"
