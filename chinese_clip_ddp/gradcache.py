"""A batch larger than memory, with the gradients of the whole: GradCache.

    1  towers, chunk by chunk, without a graph   ->  embeddings of all pairs; each chunk's random state is kept
    2  the loss of all of them over all ranks    ->  its gradient by each embedding
    3  towers again, chunk by chunk              ->  each chunk's backward pass starts from its embeddings' gradients

Activations take a chunk's memory; the price is a second forward pass. The gradients are the same, since the loss sees a
pair through its embeddings only. Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup" (2021).
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rows import UserError


def gradcache_backward(
    model: nn.Module, embed: Callable, batch: dict[str, Tensor], chunk_size: int, loss_of_embeddings: Callable
) -> Tensor:
    """The loss of a batch, whose gradients the parameters have afterwards.

    Under DDP only the last chunk's backward pass averages over the ranks, so these may differ in the number of chunks.

    Args:
        embed: embed(model, chunk) -> image_embeds (rows, d), text_embeds (rows, d), then scalars that are the same for
            every chunk, as logit_scale is, or None.
        batch: tensors, the first dimension of each is the rows.
        loss_of_embeddings: takes what `embed` returns, of all rows.

    Raises:
        UserError: the model has batch norms in training.
    """
    refuse_batch_norms(model)
    rows = len(next(iter(batch.values())))
    starts = range(0, rows, chunk_size)
    chunks = [{name: values[start : start + chunk_size] for name, values in batch.items()} for start in starts]
    states, found = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(random_states())
            found.append(embed(model, chunk))

    image_embeds, text_embeds, *scalars = zip(*found, strict=True)
    outputs = [torch.cat(image_embeds), torch.cat(text_embeds), *(of_chunks[0] for of_chunks in scalars)]
    leaves = [None if output is None else output.detach().requires_grad_() for output in outputs]
    loss = loss_of_embeddings(*leaves)
    loss.backward()
    gradients = [None if leaf is None else leaf.grad for leaf in leaves]

    after = random_states()
    for start, chunk, state in zip(starts, chunks, states, strict=True):
        is_last = start == starts[-1]
        is_averaged = is_last or not isinstance(model, DistributedDataParallel)
        with contextlib.nullcontext() if is_averaged else model.no_sync():
            set_random_states(state)
            outputs = embed(model, chunk)
            of_chunk = [gradient[start : start + chunk_size] for gradient in gradients[:2]]
            of_scalars = gradients[2:] if is_last else [None] * len(scalars)
            pairs = zip(outputs, [*of_chunk, *of_scalars], strict=True)
            pairs = [(output, gradient) for output, gradient in pairs if gradient is not None and output.requires_grad]
            torch.autograd.backward(*zip(*pairs, strict=True))
    set_random_states(after)
    return loss.detach()


def random_states() -> tuple[Tensor, Tensor | None]:
    """Of the CPU and of this process's GPU, from which dropout draws."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_random_states(states: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])


def refuse_batch_norms(model: nn.Module) -> None:
    """Raises UserError where a chunk is not a part of the batch: a batch norm takes its mean over what it gets."""
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    if norms:
        raise UserError(
            f"--gradcache_chunk_size: this model has {len(norms)} batch norms ({norms[0]}, ...), which would take "
            "their means over a chunk in place of the batch. Freeze that tower, take one without them (ViT, say), or "
            "leave the flag out."
        )
