"""verl loads a critic with FlashAttention, whatever the configuration says; without a GPU it gets PyTorch's attention.

VERL_USE_EXTERNAL_MODULES has every process load this file.
"""

from transformers import AutoModelForTokenClassification
from verl.utils import model


def load_critic(local_path, torch_dtype, model_config, trust_remote_code):
    return AutoModelForTokenClassification.from_pretrained(
        local_path,
        dtype=torch_dtype,
        config=model_config,
        attn_implementation="sdpa",
        trust_remote_code=trust_remote_code,
    )


model.load_valuehead_model = load_critic
