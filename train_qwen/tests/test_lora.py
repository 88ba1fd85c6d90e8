"""Adapters at the default flags, on what is no plain transformer: they stand where they learn and come back."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, FalconConfig

import lora
from arguments import ModelArguments
from lora import add_lora, describe_adapters, find_targets
from rows import UserError

# fmt: off
SMALL = dict(
    vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=64, moe_intermediate_size=32, num_experts_per_tok=2, pad_token_id=0, eos_token_id=2,
)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, n_group=1)
CONFIGS = {
    "qwen3_moe": dict(num_experts=4, mlp_only_layers=[0]),
    "deepseek_v32": LATENT | dict(
        n_routed_experts=4, topk_group=1, num_key_value_heads=4, index_topk=8, index_head_dim=16, index_n_heads=2,
        mlp_layer_types=["dense", "sparse"],
    ),
    "gpt_oss": dict(num_local_experts=4),
    "phimoe": dict(num_local_experts=4, router_jitter_noise=0.0, input_jitter_noise=0.0),
    "laguna": dict(num_experts=4, shared_expert_intermediate_size=32, mlp_layer_types=["dense", "sparse"]),
    "falcon_h1": dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=16),
    "mamba": dict(state_size=16),
}
# fmt: on
BATCH = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(0))


def build(family: str) -> nn.Module:
    """A tiny model of random weights, the same at each call."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SMALL | CONFIGS[family]))


def arguments(**settings) -> ModelArguments:
    return ModelArguments(use_lora=True, **settings)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(BATCH, use_cache=False).logits


def train_two_steps(model: nn.Module) -> list[str]:
    """The adapters' tensors that have not moved."""
    model.train()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    for _ in range(2):
        predicted = model(BATCH, use_cache=False).logits[:, :-1].flatten(0, 1)
        F.cross_entropy(predicted, BATCH[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [name for name, weight in weights.items() if weight.equal(before[name])]


ATTENTION = "q_proj x2, k_proj x2, v_proj x2, o_proj x2"
LATENT_ATTENTION = "q_a_proj x2, q_b_proj x2, kv_a_proj_with_mqa x2, kv_b_proj x2, o_proj x2"
DENSE_AND_EXPERTS = "gate_proj x1, up_proj x1, down_proj x2, gate_up_proj x1"
WITH_SHARED = "gate_proj x2, up_proj x2, down_proj x3, gate_up_proj x1"
INDEXER = "indexer.wq_b x2, indexer.wk x2, indexer.weights_proj x2"
MESSAGES = {
    "qwen3_moe": (
        f"11 of 11 linear layers and 2 of 2 stacks of experts: {ATTENTION}, {DENSE_AND_EXPERTS}",
        "mlp.gate x1",
    ),
    "deepseek_v32": (
        f"16 of 22 linear layers and 2 of 2 stacks of experts: {LATENT_ATTENTION}, {WITH_SHARED}",
        f"{INDEXER}, mlp.gate x1",
    ),
    "gpt_oss": (
        f"8 of 8 linear layers and 4 of 4 stacks of experts: {ATTENTION}, gate_up_proj x2, down_proj x2",
        "mlp.router x2",
    ),
    "phimoe": (
        f"8 of 10 linear layers and 4 of 4 stacks of experts: {ATTENTION}, gate_up_proj x2, down_proj x2",
        "mlp.router x2",
    ),
    "laguna": (
        f"13 of 16 linear layers and 2 of 2 stacks of experts: {ATTENTION}, g_proj x2, {DENSE_AND_EXPERTS}",
        "mlp.gate x1, shared_experts.gate_proj x1, shared_experts.up_proj x1, shared_experts.down_proj x1",
    ),
    "falcon_h1": (
        f"16 of 18 linear layers: gate_proj x2, up_proj x2, down_proj x2, in_proj x2, {ATTENTION}",
        "mamba.conv1d x2, mamba.out_proj x2",
    ),
    "mamba": (
        "4 of 8 linear layers: in_proj x2, x_proj x2",
        "mixer.A_log x2, mixer.conv1d x2, mixer.dt_proj x2, mixer.out_proj x2",
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_adapters_learn_and_come_back(family, tmp_path):
    expected = logits(build(family))
    model = add_lora(build(family), arguments())
    assert logits(model).equal(expected)

    stands, lacking = MESSAGES[family]
    messages = describe_adapters(model, arguments())
    assert messages[0] == f"adapters on {stands}"
    assert messages[1].startswith(f"no adapters on {lacking}: no gradient gets there, ")
    has_stacks = "stacks" in stands
    assert messages[2:] == ["--lora_dropout 0.1: 0 is used, since stacks of experts can't have it"] * has_stacks
    assert model.peft_config["default"].lora_dropout == (0 if has_stacks else 0.1)

    assert train_two_steps(model) == []
    trained = logits(model)
    assert not torch.allclose(trained, expected, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path)
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), trained, rtol=1e-4, atol=1e-4)


class ListOfExperts(nn.Module):
    """A mixture as models bring it with their own code; one expert is chosen, and one layer never is."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.unused = nn.Linear(64, 64)

    def forward(self, x):
        return self.experts[1](x)


def test_experts_in_a_list_that_no_token_chose_have_adapters():
    model = build("gpt_oss")
    model.model.layers[0].mlp, model.model.layers[1].mlp = ListOfExperts(), nn.Identity()
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda layer, inputs, output: (output, None))
    stands, lacking = describe_adapters(add_lora(model, arguments()), arguments())
    assert stands.endswith(f"11 of 12 linear layers: {ATTENTION}, experts.0 x1, experts.1 x1, experts.2 x1")
    assert lacking.startswith("no adapters on mlp.unused x1: ")


def test_the_trial_pass_leaves_no_trace():
    model = build("qwen3_moe").eval()
    model.model.layers[0].self_attn.attention_dropout = 0.5
    random_state = torch.get_rng_state()
    find_targets(model, ["all-linear"])
    assert torch.get_rng_state().equal(random_state) and not model.training
    assert not any(layer._forward_hooks for layer in model.modules())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(
    ("targets", "stands", "dropout"),
    [
        (["q_proj", "v_proj"], "4 of 11 linear layers and 0 of 2 stacks of experts: q_proj x2, v_proj x2", 0.1),
        (["gate_up_proj"], "0 of 11 linear layers and 1 of 2 stacks of experts: gate_up_proj x1", 0),
        (["experts.down_proj"], "0 of 11 linear layers and 1 of 2 stacks of experts: down_proj x1", 0),
        (["mlp.down_proj"], "1 of 11 linear layers and 0 of 2 stacks of experts: down_proj x1", 0),
    ],
)
def test_targets_by_name(targets, stands, dropout):
    model = add_lora(build("qwen3_moe"), arguments(target_modules=targets))
    assert describe_adapters(model, arguments())[0] == f"adapters on {stands}"
    assert model.peft_config["default"].lora_dropout == dropout
    assert train_two_steps(model) == []


@pytest.mark.parametrize(
    ("family", "target", "reason"),
    [
        (
            "phimoe",
            "router",
            "takes no adapter; the linear ones are down_proj, gate_up_proj, k_proj, o_proj, q_proj,",
        ),
        ("mamba", "dt_proj", "takes no adapter; the linear ones are in_proj, x_proj$"),
        ("mamba", "query", "no such module; the linear ones are in_proj, x_proj$"),
        ("qwen3_moe", "gate_proj", "no adapters for tiny: Cannot convert PEFT target"),
    ],
)
def test_targets_that_take_no_adapter(family, target, reason):
    with pytest.raises(UserError, match=f"--target_modules {target}: {reason}") as raised:
        add_lora(build(family), arguments(target_modules=[target]))
    assert "\n" not in str(raised.value)


def test_without_adapters_there_is_nothing_to_say():
    assert describe_adapters(build("mamba"), ModelArguments()) == []


@pytest.mark.parametrize("family", ["falcon", "phimoe", "qwen3_moe"])
def test_under_zero3_routers_are_known_without_a_pass(family, monkeypatch):
    """Falcon's linear layers have a forward of their own that only multiplies; PhiMoE's routers do more."""
    if family == "falcon":
        config = FalconConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = build(family)
    expected = find_targets(model, ["all-linear"])
    monkeypatch.setattr(lora, "is_deepspeed_zero3_enabled", lambda: True)
    assert find_targets(model, ["all-linear"]) == expected
