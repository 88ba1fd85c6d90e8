"""The dual encoder: any text encoder beside any vision encoder, or a whole CLIP as it is.

    embed_images(model, pixel_values)              (n, d), normalised; training, evaluation and serving all call these
    embed_texts(model, input_ids, attention_mask)  (n, d), normalised
    model(pixel_values=..., ...)                   both, with the temperature and the bias: what DDP and ZeRO call

`load_model` reads a folder of DualEncoderModel, CLIPModel, ChineseCLIPModel or SiglipModel; `join_towers` makes a
DualEncoderModel of two folders.
"""

import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec

from rows import UserError

LFS_POINTER = b"version https://git-lfs"
LOGIT_SCALE = math.log(1 / 0.07)  # Radford et al., "Learning Transferable Visual Models" (2021)

# How these pool a tower, which is not left to choose: vision, text.
NATIVE_POOLING = {"clip": ("pooler", "pooler"), "chinese_clip": ("pooler", "cls"), "siglip": ("pooler", "pooler")}
POOLINGS = ("cls", "mean", "max", "pooler")
# What a tower is pooled by unless --vision_pooling says so. Those of the first line have a class token, the others not.
VISION_POOLING = {
    **dict.fromkeys(("vit", "deit", "dinov2", "dinov2_with_registers", "chinese_clip_vision_model"), "cls"),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), "pooler"),
}


class DualEncoderConfig(PreTrainedConfig):
    """Two towers' own configs, how each is pooled, and the width of the common space (None: the towers' own)."""

    model_type = "dual_encoder"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
    }

    text_config: PreTrainedConfig | dict | None = None
    vision_config: PreTrainedConfig | dict | None = None
    text_pooling: str = "cls"
    vision_pooling: str = "mean"
    projection_dim: int | None = None
    initializer_range: float = 0.02


class DualEncoderModel(PreTrainedModel):
    """vision_model and text_model, each with a projection (none where their widths agree and none was asked for)."""

    config_class = DualEncoderConfig
    base_model_prefix = "dual_encoder"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: DualEncoderConfig, vision_model=None, text_model=None):
        """vision_model, text_model: towers that are there already; without them, random ones."""
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config) if vision_model is None else vision_model
        self.text_model = AutoModel.from_config(config.text_config) if text_model is None else text_model
        widths, width = (tower_width(config.vision_config), tower_width(config.text_config)), config.projection_dim
        if width is None and widths[0] != widths[1]:
            width = min(widths)
        self.visual_projection, self.text_projection = (
            nn.Identity() if width is None else nn.Linear(own, width, bias=False) for own in widths
        )
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self.logit_bias = nn.Parameter(torch.zeros(()))  # 0: not trained yet, see trainer.start_logit_bias
        self.post_init()
        if width is not None:
            for projection, own in ((self.visual_projection, widths[0]), (self.text_projection, widths[1])):
                nn.init.normal_(projection.weight, std=own**-0.5)  # as CLIP has it; Transformers' 0.02 moves too fast

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(n, d), not normalised."""
        return self.visual_projection(pool_images(self, pixel_values))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(n, d), not normalised."""
        return self.text_projection(pool_texts(self, input_ids, attention_mask))

    def forward(self, **batch):
        return embed_pairs(self, **batch)


AutoConfig.register("dual_encoder", DualEncoderConfig)
AutoModel.register(DualEncoderConfig, DualEncoderModel)


def tower_width(config: PreTrainedConfig) -> int:
    return config.hidden_sizes[-1] if config.model_type == "levit" else config.hidden_size


# ------------------------------------------------------------------------------------------------------ embeddings
def pool(outputs, pooling: str, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A tower's output as one vector each: (n, positions, width) -> (n, width).

    Args:
        pooling: "cls" the first position, "mean" and "max" over all positions that are no padding, "pooler" the tower's
            own way.
        mask: (n, positions), 0 where there is padding.
    """
    if pooling == "pooler":
        return outputs.pooler_output
    hidden = outputs.last_hidden_state
    if pooling == "cls":
        return hidden[:, 0]
    mask = torch.ones_like(hidden[..., :1]) if mask is None else mask[..., None].to(hidden.dtype)
    if pooling == "mean":
        return (hidden * mask).sum(1) / mask.sum(1)
    return hidden.masked_fill(mask == 0, -torch.inf).amax(1)


def poolings_of(config: PreTrainedConfig) -> tuple[str, str]:
    """Of the vision and the text tower."""
    return NATIVE_POOLING.get(config.model_type) or (config.vision_pooling, config.text_pooling)


def pool_images(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """The vision tower's vectors, (n, width), before the projection; a frozen tower's are cached (features.py)."""
    outputs = model.vision_model(pixel_values=pixel_values.to(model.dtype))  # DeepSpeed's copy may be in bf16
    return pool(outputs, poolings_of(model.config)[0])


def pool_texts(model, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The text tower's vectors, (n, width), before the projection.

    SigLIP's text tower reads its padding, always to the full length, and pools the last position.
    """
    config = model.config.text_config
    if model.config.model_type == "siglip":
        missing = config.max_position_embeddings - input_ids.shape[1]
        padded = F.pad(input_ids, (0, missing), value=config.pad_token_id)
        return model.text_model(input_ids=padded).pooler_output
    outputs = model.text_model(input_ids=input_ids, attention_mask=attention_mask)
    return pool(outputs, poolings_of(model.config)[1], attention_mask)


def embed_images(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """pixel_values (n, 3, height, width) -> (n, d), of length 1, fp32."""
    return F.normalize(model.visual_projection(pool_images(model, pixel_values)).float(), dim=-1)


def embed_texts(model, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """input_ids, attention_mask (n, positions), padded on the right -> (n, d), of length 1, fp32."""
    return F.normalize(model.text_projection(pool_texts(model, input_ids, attention_mask)).float(), dim=-1)


def embed_pairs(
    model, *, pixel_values=None, input_ids=None, attention_mask=None, image_features=None, text_features=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The forward pass of a training step.

    Args:
        image_features, text_features: (n, width) what `pool_images` and `pool_texts` gave of a frozen tower.

    Returns:
        Image and text embeddings (n, d), the temperature's inverse (a scalar, not its logarithm), and the bias, None
        where the model has none. Both scalars go through here since ZeRO-3 gathers parameters for `forward` alone.
    """
    if image_features is None:
        image_features = pool_images(model, pixel_values)
    if text_features is None:
        text_features = pool_texts(model, input_ids, attention_mask)
    image_embeds = F.normalize(model.visual_projection(image_features).float(), dim=-1)
    text_embeds = F.normalize(model.text_projection(text_features).float(), dim=-1)
    bias = model.logit_bias.float().reshape(()) if has_bias(model) else None
    return image_embeds, text_embeds, model.logit_scale.float().exp().reshape(()), bias


def has_bias(model) -> bool:
    return model.config.model_type in ("dual_encoder", "siglip")


# ------------------------------------------------------------------------------------------------------ loading
def unreadable_model(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path}: no model could be read there ({str(error).splitlines()[0]}). Give a folder that holds config.json, "
        "weights, tokenizer and preprocessor_config.json, or a hub id; dl_model.sh downloads one through a mirror."
    )


def refuse_lfs_pointers(path: str) -> None:
    """Raises UserError where git, without its LFS extension, has left a few words in the place of a file."""
    for file in sorted(Path(path).glob("*")):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            raise UserError(
                f"{file}: is a Git LFS pointer, not the file itself. Fetch it: git -C {path} lfs pull "
                "(after git lfs install)."
            )


def read_config(path: str) -> PreTrainedConfig:
    """The config of a model folder or hub id; raises UserError where there is none."""
    refuse_lfs_pointers(path)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise unreadable_model(path, error) from None


def load_tokenizer(path: str):
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise unreadable_model(path, error) from None


def load_image_processor(path: str):
    """Always by PIL: torchvision's resizing gives other pixels, and a model is served where it wasn't trained."""
    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError) as error:
        raise unreadable_model(path, error) from None


def load_processors(folder: str) -> tuple:
    """A model folder's tokenizer and image processor."""
    return load_tokenizer(folder), load_image_processor(folder)


def read_weights(path: str, needs_pooler: bool) -> PreTrainedModel:
    """A model in fp32; raises UserError where a part of it is in no file, or of another size: it would be random."""
    try:
        model, loading = AutoModel.from_pretrained(
            path, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise unreadable_model(path, error) from None
    missing = sorted(name for name in loading["missing_keys"] if needs_pooler or "pooler." not in name)
    wrong = [f"{name} ({list(found)} for {list(own)})" for name, found, own in loading["mismatched_keys"]]
    for names, problem in ((missing, "lacks"), (wrong, "has of another size")):
        if names:
            raise UserError(
                f"{path}: {problem} {len(names)} of the model's tensors: {', '.join(names[:3])}. They would be trained "
                "from random numbers. Download the model again, or rename the tensors as its config.json asks for."
            )
    return model


def load_model(path: str) -> PreTrainedModel:
    """A finished dual encoder or a whole CLIP, in fp32, whose `forward` is `embed_pairs`.

    Raises:
        UserError: there is no such model.
    """
    config = read_config(path)
    if config.model_type not in (*NATIVE_POOLING, "dual_encoder"):
        raise UserError(
            f"{path}: model_type {config.model_type!r} is no pair of an image and a text encoder. Give a folder of "
            "CLIP, Chinese-CLIP, SigLIP or of this recipe, or two encoders by --text_model_name_or_path and "
            "--image_model_name_or_path."
        )
    model = read_weights(path, needs_pooler="pooler" in poolings_of(config) and config.model_type == "dual_encoder")
    if config.model_type == "siglip":
        model.config.text_config.pad_token_id = load_tokenizer(path).pad_token_id  # its text tower reads the padding
    return prepare_forward(model)


def prepare_forward(model) -> PreTrainedModel:
    """Gives any of the four classes the `forward` of this recipe."""
    if model.config.model_type == "siglip":  # whose towers end in the common space
        model.visual_projection, model.text_projection = nn.Identity(), nn.Identity()
    model.forward = partial(embed_pairs, model)
    return model


def load_vision_tower(path: str, pooling: str | None) -> PreTrainedModel:
    """A vision encoder; of a whole CLIP, its vision part."""
    config = read_config(path)
    model = read_weights(path, needs_pooler=pooling == "pooler")
    return model.vision_model if "vision_config" in config.sub_configs else model


def load_text_tower(path: str, pooling: str | None) -> PreTrainedModel:
    config = read_config(path)
    if "vision_config" in config.sub_configs or config.is_encoder_decoder or type(config) not in MODEL_MAPPING:
        raise UserError(
            f"--text_model_name_or_path {path}: model_type {config.model_type!r} is no text encoder. Give one such as "
            "BERT, RoBERTa or bge; a whole CLIP goes to --model_name_or_path."
        )
    return read_weights(path, needs_pooler=pooling == "pooler")


def join_towers(vision_model, text_model, vision_pooling=None, text_pooling=None, projection_dim=None):
    """A DualEncoderModel of two encoders; its projections, where there are any, are new.

    Args:
        vision_pooling, text_pooling: one of POOLINGS; None for the class token where the tower has one, else the mean.
        projection_dim: width of the common space; None for the towers' own, or the smaller of the two.

    Raises:
        UserError: a tower can't be pooled so.
    """
    vision_type = vision_model.config.model_type
    has_class_token = VISION_POOLING.get(vision_type) == "cls" or vision_type == "clip_vision_model"
    if vision_pooling == "cls" and not has_class_token:
        raise UserError(f"--vision_pooling cls: {vision_type} has no class token; give mean, max or pooler.")
    config = DualEncoderConfig(
        vision_config=vision_model.config.to_dict(),
        text_config=text_model.config.to_dict(),
        vision_pooling=vision_pooling or VISION_POOLING.get(vision_type, "mean"),
        text_pooling=text_pooling or "cls",
        projection_dim=projection_dim,
    )
    return DualEncoderModel(config, vision_model, text_model)


def count_positions(config) -> int:
    """Tokens that a text tower takes; RoBERTa's kind counts positions from behind the padding's."""
    has_offset = config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl")
    return config.max_position_embeddings - (config.pad_token_id + 1 if has_offset else 0)


def choose_max_length(path: str, tokenizer, asked: int | None) -> int:
    """Tokens of a caption: as asked for, else as many as the text encoder has positions and the tokenizer allows.

    Raises:
        UserError: more are asked for than there are positions, or the model has no limit to go by.
    """
    config = read_config(path)
    config = config.text_config if "text_config" in config.sub_configs else config
    if not hasattr(config, "max_position_embeddings"):
        raise UserError(
            f"{path}: model_type {config.model_type!r} has no number of positions, as text encoders of this recipe do. "
            "Give a BERT, RoBERTa or bge, or a whole CLIP."
        )
    limit = count_positions(config)
    if asked is not None and not 3 <= asked <= limit:
        raise UserError(f"--max_seq_length {asked}: from 3 to the {limit} positions of the text encoder ({path}).")
    return asked or min(limit, tokenizer.model_max_length)
