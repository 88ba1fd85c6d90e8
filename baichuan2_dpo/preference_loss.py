"""From the log-probabilities of two replies to a loss: DPO and what has grown around it."""

import torch
import torch.nn.functional as F

LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust", "simpo", "sft")
PER_TOKEN = ("ipo", "simpo")  # on means per token: sums would pay for length
WITHOUT_REFERENCE = ("simpo", "sft")
ROUNDING = 1e-4  # nats by which a log-probability differs in another batch, in fp32; no preference


def preference_losses(
    policy: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor, args
) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss and two rewards for each pair.

    - sigmoid: Rafailov et al., "Direct Preference Optimization" (2023); with `label_smoothing` the conservative DPO of
      Mitchell's note (2023)
    - ipo: Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences" (2023)
    - hinge: Zhao et al., "SLiC-HF" (2023), on DPO's margin (Liu et al., "RSO", 2023)
    - robust: Chowdhury et al., "Provably Robust DPO" (2024)
    - simpo: Meng et al., "SimPO" (2024), without a reference
    - sft: none; the chosen reply's cross-entropy alone, which the trainer adds

    Args:
        policy, reference: summed log-probabilities of the chosen and the rejected replies, shape (pairs, 2), fp32; the
            reference is 0 where the loss has none.
        tokens: how many they were summed over, shape (pairs, 2).
        args: `loss_type`, `beta`, `label_smoothing`, `simpo_gamma`.

    Returns:
        Losses, shape (pairs,), and rewards: beta times the log-ratios, shape (pairs, 2), without gradient.
    """
    log_ratios = policy - reference
    if args.loss_type in PER_TOKEN:
        log_ratios = log_ratios / tokens.clamp(min=1)
    margin, beta, smoothing = log_ratios[:, 0] - log_ratios[:, 1], args.beta, args.label_smoothing
    if args.loss_type == "sigmoid":
        losses = -(1 - smoothing) * F.logsigmoid(beta * margin) - smoothing * F.logsigmoid(-beta * margin)
    elif args.loss_type == "robust":
        losses = -(1 - smoothing) * F.logsigmoid(beta * margin) + smoothing * F.logsigmoid(-beta * margin)
        losses = losses / (1 - 2 * smoothing)
    elif args.loss_type == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    elif args.loss_type == "hinge":
        losses = torch.relu(1 - beta * margin)
    elif args.loss_type == "simpo":
        losses = -F.logsigmoid(beta * margin - args.simpo_gamma)
    else:
        losses = torch.zeros_like(margin)
    return losses, beta * log_ratios.detach()
