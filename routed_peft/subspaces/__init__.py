"""Subspaces of the residual stream: sources, placebos, measures, and a validation before training."""

from routed_peft.subspaces.basis import Subspace, drift, leak
from routed_peft.subspaces.sources import contrastive_pca, difference_of_means, sae_latents, tensor_file, weight_change
from routed_peft.subspaces.validation import Validation, energy_matched, haar, validate

__all__ = ["Subspace", "Validation", "contrastive_pca", "difference_of_means", "drift", "energy_matched", "haar"]
__all__ += ["leak", "sae_latents", "tensor_file", "validate", "weight_change"]
