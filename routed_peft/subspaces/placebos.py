"""Random subspaces as placebos: they separate the effect of a direction's content from that of any protected subspace."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from routed_peft.deprecation import formerly_positional
from routed_peft.subspaces.activations import Conversations, covariance
from routed_peft.subspaces.basis import Subspace, each_basis


def haar(like: Subspace, seed: int) -> Subspace:
    """Return a uniformly random (Haar) subspace of the same shape, drawn independently for each layer.

    >>> haar(Subspace(torch.eye(4)[:, :2]), seed=0).k
    2
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(u: Tensor, layer: int | None) -> Tensor:
        q, r = torch.linalg.qr(torch.randn(u.shape, generator=generator, dtype=torch.float64))
        return (q * r.diagonal().sign()).float()  # without the signs, QR is not uniform

    return Subspace(each_basis(like.bases, draw), {"source": "haar", "seed": seed, "in_place_of": like.sha256})


@formerly_positional("tokenizer", "texts", "seed", "layer")
def energy_matched(
    like: Subspace, model: nn.Module, *, tokenizer: Tokenizer, texts: Conversations, seed: int, layer: int | None = None
) -> Subspace:
    r"""Return a random subspace with the same energy in *generic* activations as ``like``, direction by direction.

    With the second moment :math:`C = \sum_i \lambda_i v_i v_i^\top` of the residual stream on ``texts``, a direction of energy
    :math:`e = u^\top C u` is matched by :math:`\cos\theta\, v_a \pm \sin\theta\, v_b`, from a random pair of eigenvectors with
    :math:`\lambda_a \ge e \ge \lambda_b` that no other direction uses. A Haar-random subspace has far less
    energy, because a few directions hold most of a residual stream's.

    Args:
        like: the subspace to be matched, which belongs to ``model``.
        texts: conversations that have nothing to do with the trait.
        layer: decoder layer of the activations, for a basis that serves all layers; by default the one where it was measured.
    """
    generator = torch.Generator().manual_seed(seed)
    common = like.provenance.get("measured_at") if layer is None else layer
    if like.layers is None and common is None:
        raise ValueError("this subspace serves all layers, and does not say where it was measured: give `layer`")

    def draw(u: Tensor, own: int | None) -> Tensor:
        at = cast(int, common if own is None else own)
        return matched_directions(u, covariance(model, tokenizer, conversations=texts, layer=at), generator)

    about = {"source": "energy_matched", "seed": seed, "in_place_of": like.sha256, "measured_at": common}
    return Subspace(each_basis(like.bases, draw), about)


def matched_directions(u: Tensor, moment: Tensor, generator: torch.Generator) -> Tensor:
    """Return orthonormal directions ``(d, k)`` with the energies that those of ``u`` have under ``moment`` ``(d, d)``.

    >>> v = matched_directions(torch.eye(4)[:, :1], torch.diag(torch.tensor([2.0, 1.0, 3.0, 5.0])), torch.Generator())
    >>> round(float((v.double().T @ torch.diag(torch.tensor([2.0, 1.0, 3.0, 5.0])).double() @ v.double())), 5)
    2.0
    """
    values, vectors = torch.linalg.eigh(moment.double())
    energies = torch.einsum("dk,de,ek->k", u.double(), moment.double(), u.double())
    free = torch.ones(len(values), dtype=torch.bool)
    chosen = torch.zeros(u.shape, dtype=torch.float64)
    for j in energies.argsort(descending=True).tolist():
        above, below = ((free & side).nonzero().squeeze(1) for side in (values >= energies[j], values < energies[j]))
        if not len(above) or not len(below):  # beyond the spectrum's end: the nearest unused eigenvector
            nearest = int(torch.where(free, (values - energies[j]).abs(), torch.inf).argmin())
            free[nearest], chosen[:, j] = False, vectors[:, nearest]
            continue
        a, b = (int(side[torch.randint(len(side), (1,), generator=generator)]) for side in (above, below))
        share = (energies[j] - values[b]) / (values[a] - values[b])
        sign = 1 if torch.rand(1, generator=generator) < 0.5 else -1
        chosen[:, j] = share.sqrt() * vectors[:, a] + sign * (1 - share).sqrt() * vectors[:, b]
        free[a] = False
        free[b] = free[b] & (share == 1)  # an eigenvector's own energy needs no partner
    return chosen.float()
