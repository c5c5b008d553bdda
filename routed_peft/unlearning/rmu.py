"""RMU: the steered layer, the trained matrices, and the target of forget activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from routed_peft.architectures import find_mlps, output_projection
from routed_peft.routes import IGNORED
from routed_peft.unlearning.arguments import UnlearningArguments
from routed_peft.unlearning.data import Rows, collate, run_on
from routed_peft.unlearning.losses import steering_vector

MEASURED_ROWS = 16


def prepare(model: PreTrainedModel, args: UnlearningArguments) -> int:
    """Freeze all but the output projections of a few MLPs, and return the number of the steered block."""
    blocks = model.config.get_text_config().num_hidden_layers
    layer = (blocks - 1) // 2 if args.rmu_layer is None else args.rmu_layer
    if not 0 <= layer < blocks - 1:
        allowed = f"0 to {blocks - 2}" + (" (a model of one block has none)" if blocks == 1 else "")
        raise ValueError(f"`rmu_layer` is {layer}, but the model has {blocks} blocks: RMU steers the output of a block below "
                         f"the last, {allowed}")  # fmt: skip
    trained = list(range(max(0, layer - 2), layer + 1)) if args.rmu_train_layers is None else args.rmu_train_layers
    if not trained or not set(trained) <= set(range(layer + 1)):
        raise ValueError(f"`rmu_train_layers` is {trained}: name blocks between 0 and {layer}, the steered one, or later ones "
                         "learn nothing")  # fmt: skip
    mlps = list(find_mlps(model).values())
    if len(mlps) != blocks:
        raise ValueError(f"{type(model).__name__} has {len(mlps)} MLPs of a known layout in {blocks} blocks, and RMU "
                         "needs one in each: describe its MLPs with `register_mlp_layout`")  # fmt: skip
    model.requires_grad_(False)
    for block in trained:
        output_projection(mlps[block]).requires_grad_(True)
    return layer


def target(reference: nn.Module, forget: Rows, *, layer: int, args: UnlearningArguments) -> Tensor:
    r"""Return the target of forget activations, ``(D,)``: :math:`c\,u` with one random direction u for the whole run.

    If ``steering_relative``, c is ``steering`` times the median length of the frozen model's activations on the first forget
    rows; the first position is often a hundred times longer than the others.
    """
    rows = [forget[i] for i in range(min(MEASURED_ROWS, len(forget)))]
    device = next(reference.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate(rows).items()}
    with torch.no_grad():
        hidden = run_on(reference, batch, output_hidden_states=True).hidden_states[layer + 1]
    counted = batch["labels"][:, 1:] != IGNORED
    lengths = hidden[:, :-1][counted].float().norm(dim=-1)
    scale = lengths.median() if args.steering_relative else torch.ones_like(lengths[0])
    return args.steering * scale * steering_vector(hidden.shape[-1], args.seed).to(scale)
