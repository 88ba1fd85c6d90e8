"""Rows without padding have the loss and the gradients of BLOOM and Falcon as they are, and are left out elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM

from alibi import AlibiFastPath, bloom_bias
from arguments import TrainingArguments
from batch import collate
from trainer import SFTTrainer

BLOOM = {"vocab_size": 320, "hidden_size": 60, "n_layer": 2, "n_head": 6}  # slopes of no power of 2 among them
FALCON = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
MODELS = {
    "bloom": (BloomForCausalLM, BloomConfig, BLOOM),
    "falcon-7b": (FalconForCausalLM, FalconConfig, FALCON),
    "falcon-40b": (FalconForCausalLM, FalconConfig, FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": (FalconForCausalLM, FalconConfig, FALCON | RW),
}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (20, 147, 33, 300):
        input_ids = torch.randint(5, 320, (length,), generator=generator).tolist()
        rows.append({"input_ids": input_ids, "labels": [-100] * (length // 2) + input_ids[length // 2 :]})
        rows[-1]["length"] = length
    return rows


def build(kind: str, **changed) -> torch.nn.Module:
    """Weights large enough for logits that are not flat; biases, which start at 0, are not."""
    model_class, config_class, settings = MODELS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**(settings | NO_DROPOUT | changed)))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3) if weight.ndim > 1 else weight.add_(0.05 * torch.randn_like(weight))
    return model


def own_loss(model, rows) -> torch.Tensor:
    """Summed over the rows, one a call."""
    total = 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum")
    return total


def make_path(model, rows, folder) -> AlibiFastPath:
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, eval_strategy="no", eval_on_start=False, bf16=False)
    path = AlibiFastPath(SFTTrainer(model, args, train_dataset=Dataset.from_list(rows)))
    path.notes = path.choose_ways()
    return path


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_the_models_own(kind, checkpointing, rows, tmp_path):
    model = build(kind).train()
    expected = own_loss(model, rows)
    expected.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    implementation = model.config._attn_implementation
    path = make_path(model, rows, tmp_path)
    assert path.padding_free and path.head_is_chunked and path.notes == []
    model.train()
    for shown in (rows[:2], rows):  # the bias grows with the longest row
        model.zero_grad()
        loss = path.summed_loss(model, collate(shown))
        loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, weight in model.named_parameters():
        assert (weight.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm() + 1e-6 * largest, name
    path.undo.close()
    assert model.config._attn_implementation == implementation
    assert not [module for module in model.modules() if "forward" in vars(module)]
    torch.testing.assert_close(own_loss(model, rows), expected)


@pytest.mark.parametrize("way", ["attention_dropout", "slow_but_exact"])
def test_what_is_not_rebuilt_is_left_padded_and_said(way, rows, tmp_path):
    model = build("bloom", **{way: 0.1 if way == "attention_dropout" else True})
    path = make_path(model, rows, tmp_path)
    assert not path.padding_free and path.head_is_chunked
    assert [note for note in path.notes if way in note and note.startswith("padded batches")]


def test_a_wrong_bias_is_left_out(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("alibi.bloom_bias", lambda *args: bloom_bias(*args) * 1.01)
    path = make_path(build("bloom"), rows, tmp_path)
    assert not path.padding_free and path.notes[0].startswith("padded batches: the ")


def test_distances_keep_their_digits_in_half_precision():
    """A bias in bf16 is as good as one in fp32 where the tensors are in bf16; one of positions would be lost."""
    torch.manual_seed(0)
    length, heads = 1500, 16
    states = [torch.randn(1, heads, length, 32) for _ in range(3)]
    half = [tensor.bfloat16() for tensor in states]
    causal = torch.zeros(length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    bias = bloom_bias(heads, 32, length, "cpu") + causal
    by_position = bloom_bias(heads, 32, 2, "cpu")[:, :1, 1:] * torch.arange(length) + causal
    exact = F.scaled_dot_product_attention(*states, bias[None])

    def error(states, bias) -> float:
        return (F.scaled_dot_product_attention(*states, bias[None]).float() - exact).abs().mean().item()

    least = error([tensor.float() for tensor in half], bias)
    assert error(half, bias.bfloat16()) < 1.5 * least
    assert error(half, by_position.bfloat16()) > 20 * least


def test_bias_is_of_the_distance_alone():
    bias = bloom_bias(6, 10, 40, "cpu")
    assert torch.equal(bias[:, 5:, 5:], bias[:, :-5, :-5]) and (bias.diagonal(dim1=1, dim2=2) == 0).all()
