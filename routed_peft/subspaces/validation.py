"""Validation of a subspace before training, and random subspaces to compare with.

These placebos separate the effect of a direction's content from that of any protected subspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from routed_peft.deprecation import formerly_positional
from routed_peft.subspaces.activations import Conversations, covariance, response_means, writer_gradients
from routed_peft.subspaces.basis import Subspace, each_basis

MOST_OF_THE_WIDTH = 1 / 16
"""Largest share of the residual stream for a trait; the base cannot learn along a larger one, which costs it much else."""

_GOOD_AUROC = 0.8
_FEWEST = 5


@dataclass(frozen=True)
class LayerValidation:
    """The validation of one layer, beside the same numbers for random subspaces."""

    layer: int  # of the decoder, from 0
    auroc: float  # by which coordinates in the subspace separate held-out texts with the trait from those without
    random_auroc: tuple[float, ...]
    energy: float  # share of the gradient of the trait's loss, at this layer's writers, within the subspace
    random_energy: tuple[float, ...]  # about k / d


@dataclass(frozen=True)
class Validation:
    """The result of `validate`."""

    width: int  # of the residual stream
    k: int  # directions
    texts: tuple[int, int]  # numbers of conversations with and without the trait
    layers: tuple[LayerValidation, ...]

    @property
    def problems(self) -> list[str]:
        """Reasons against routing into this subspace, one sentence each; empty where there are none."""
        found = []
        if self.k > MOST_OF_THE_WIDTH * self.width:
            many = f"{self.k} of {self.width} directions are more than 1/{round(1 / MOST_OF_THE_WIDTH)}"
            found.append(f"{many}: the base would be kept from learning much else")
        for at in self.layers:
            name, auroc, energy = f"layer {at.layer}", max(at.random_auroc), max(at.random_energy)
            if at.auroc < _GOOD_AUROC:
                found.append(f"{name}: AUROC {at.auroc:.2f} on held-out texts is below {_GOOD_AUROC}")
            if at.auroc <= auroc:
                found.append(f"{name}: a random subspace tells the texts apart as well ({auroc:.2f})")
            if at.energy <= energy:
                rival = f"a random subspace holds as much of the gradient ({energy:.3f}, this one {at.energy:.3f})"
                found.append(f"{name}: {rival}")
        return found

    @property
    def ok(self) -> bool:
        """True where there are no `problems`."""
        return not self.problems

    def table(self) -> Table:
        """Return a rich table of the layers and problems."""
        table = Table(title=f"{self.k} of {self.width} directions, {self.texts[0]} + {self.texts[1]} held-out texts")
        for name in ("layer", "AUROC", "random", "gradient energy", "random", "k / d"):
            table.add_column(name, justify="right")
        spread = lambda values: f"{min(values):.3f} … {max(values):.3f}"
        for at in self.layers:
            cells = (f"{at.auroc:.3f}", spread(at.random_auroc), f"{at.energy:.3f}", spread(at.random_energy))
            table.add_row(str(at.layer), *cells, f"{self.k / self.width:.3f}")
        table.caption = "\n".join(self.problems) or "no problems found"
        return table


@formerly_positional("tokenizer", "positive", "negative", "layers", "seeds")
def validate(
    subspace: Subspace,
    model: nn.Module,
    *,
    tokenizer: Tokenizer,
    positive: Conversations,
    negative: Conversations,
    layers: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> Validation:
    """Validate a subspace before training, on texts that it was not made from; preferably rollouts of the task itself.

    AUROC is that of a cross-validated logistic regression on the k coordinates, so it does not depend on signs or on k. The
    gradient is that of the loss on ``positive``, at the outputs of the residual writers.

    Args:
        positive: held-out conversations that show the trait, at least five; ``negative`` as many or more without it.
        layers: decoder layers; by default those with bases, or the one where a single basis was measured.
        seeds: seeds of the random subspaces to compare with, at least three.

    Raises:
        ValueError: for too few texts or seeds, or where ``layers`` is needed.
        ImportError: without scikit-learn.
    """
    if min(len(positive), len(negative)) < _FEWEST:
        raise ValueError(f"{_FEWEST} texts a side at least are needed, got {len(positive)} and {len(negative)}")
    if len(set(seeds)) < 3:
        raise ValueError(f"compare with at least 3 random subspaces, got the seeds {list(seeds)}")
    measured = subspace.provenance.get("measured_at")
    chosen = list((subspace.layers if layers is None else layers) or ([] if measured is None else [int(measured)]))
    if not chosen:
        raise ValueError("this subspace serves all layers, and does not say where it was measured: give `layers`")
    candidates = [subspace, *(haar(subspace, seed) for seed in seeds)]
    shown, plain = [response_means(model, tokenizer, conversations=c, layers=chosen) for c in (positive, negative)]
    energies = _energies(candidates, model, tokenizer=tokenizer, texts=positive, layers=chosen)
    found = []
    for layer in chosen:
        auroc, *aurocs = (_auroc(shown[layer], plain[layer], candidate.at(layer)) for candidate in candidates)
        energy, *random = energies[layer]
        found.append(LayerValidation(layer, auroc, tuple(aurocs), energy, tuple(random)))
    return Validation(subspace.width, subspace.k, (len(positive), len(negative)), tuple(found))


def _auroc(positive: Tensor, negative: Tensor, u: Tensor) -> float:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise ImportError('`validate` needs scikit-learn: `pip install "routed_peft[classifiers]"`') from None
    coordinates = (torch.cat([positive, negative]) @ u).numpy()
    truth = [1] * len(positive) + [0] * len(negative)
    folds = StratifiedKFold(_FEWEST, shuffle=True, random_state=0)
    classifier = make_pipeline(StandardScaler(), LogisticRegression())
    # the mean over folds: scores of different folds' classifiers are not on one scale
    return float(cross_val_score(classifier, coordinates, truth, cv=folds, scoring="roc_auc").mean())


def _energies(
    spaces: Sequence[Subspace], model: nn.Module, *, tokenizer: Tokenizer, texts: Conversations, layers: Sequence[int]
) -> dict[int, list[float]]:
    """Return, by layer and subspace, the share of the gradient at the layer's writers that is within it."""
    sums = {layer: torch.zeros(1 + len(spaces), dtype=torch.float64) for layer in layers}  # of all, and within each
    for layer, gradient in writer_gradients(model, tokenizer, conversations=texts):
        if layer in sums:
            parts = (gradient, *(gradient @ space.at(layer).to(gradient.device) for space in spaces))
            sums[layer] += torch.tensor([float(part.square().sum()) for part in parts])
    return {layer: (found[1:] / found[0]).nan_to_num(0.0).tolist() for layer, found in sums.items()}


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
