"""Sources of subspaces: a model's own activations, a sparse autoencoder, published vectors, or a weight change."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

from routed_peft.architectures import decoder_layers, find_writers, layer_index
from routed_peft.deprecation import formerly_positional
from routed_peft.subspaces.activations import Conversations, response_means
from routed_peft.subspaces.basis import Subspace

Layers = int | Sequence[int] | None
"""One layer, whose basis then serves all layers; several layers, with a basis each; or None for all."""

_HOOK = re.compile(r"(?:blocks|model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)(?:\.(hook_\w+))?$")
_SITES = {None: 0, "hook_resid_post": 0, "hook_mlp_out": 0, "hook_attn_out": 0, "hook_resid_pre": -1}


@formerly_positional("positive", "negative", "layers")
def difference_of_means(
    model: nn.Module, tokenizer: Tokenizer, *, positive: Conversations, negative: Conversations, layers: Layers
) -> Subspace:
    """Return the direction from responses without a trait to responses with it (persona vectors, arXiv 2507.21509).

    ``model`` is the one to be trained, as it is before; ``positive`` conversations show the trait, and ``negative`` ones,
    perhaps of another number, do not. A ValueError names an unknown layer or an empty response.
    """
    chosen = _listed(layers, decoder_layers(model))
    shown, plain = [response_means(model, tokenizer, conversations=c, layers=chosen) for c in (positive, negative)]
    directions = {layer: (shown[layer].mean(0) - plain[layer].mean(0)).unsqueeze(0) for layer in chosen}
    about = {**_origin(model), "positive": len(positive), "negative": len(negative)}
    return _measured(directions, layers, source="difference_of_means", **about)


@formerly_positional("positive", "negative", "layers", "k")
def contrastive_pca(
    model: nn.Module, tokenizer: Tokenizer, *, positive: Conversations, negative: Conversations, layers: Layers, k: int
) -> Subspace:
    """Return the k leading directions of the differences within pairs of conversations, without centering.

    ``model`` is the one to be trained, as it is before; ``negative`` are the counterparts of ``positive``, in the same
    order, and there are at least ``k`` pairs.
    """
    if (n := len(positive)) != len(negative):
        raise ValueError(f"`positive` and `negative` must be pairs, got {n} and {len(negative)} conversations")
    if not 1 <= k <= n:
        raise ValueError(f"`k` must be from 1 to the number of pairs, {n}, got {k}")
    chosen = _listed(layers, decoder_layers(model))
    shown, plain = [response_means(model, tokenizer, conversations=c, layers=chosen) for c in (positive, negative)]
    directions, energy = _leading({layer: shown[layer] - plain[layer] for layer in chosen}, k)
    return _measured(directions, layers, source="contrastive_pca", **_origin(model), pairs=n, energy=energy)


def sae_latents(folder: str | Path, latents: Sequence[int]) -> Subspace:
    """Return the span of decoder rows of a sparse autoencoder in the layout of SAELens; only these rows are read.

    Args:
        folder: with ``cfg.json`` and ``sae_weights.safetensors``, whose ``W_dec`` is ``(d_sae, d)``.

    Raises:
        ValueError: for a missing file or tensor, a latent out of range, or an autoencoder of anything else than the residual
            stream or a layer's output into it.
    """
    folder = Path(folder).expanduser()
    config, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise ValueError(f"{str(folder)!r} is no autoencoder in SAELens's layout: it has no {path.name}")
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings |= settings.get("metadata") or {}
    found = _HOOK.fullmatch(hook := str(settings.get("hook_name")))
    if found is None or found[2] not in _SITES:
        raise ValueError(f"this autoencoder was trained at {hook!r}, which is not the residual stream: take one of "
            "`hook_resid_post`, `hook_resid_pre`, `hook_mlp_out`, `hook_attn_out` or a decoder layer's output")  # fmt: skip
    with safe_open(weights, framework="pt") as file:
        if "W_dec" not in file.keys():  # noqa: SIM118
            raise ValueError(f"{str(weights)!r} has no tensor `W_dec`, only {sorted(file.keys())}")
        size = (decoder := file.get_slice("W_dec")).get_shape()[0]
        if not latents or not all(0 <= i < size for i in latents):
            raise ValueError(f"`latents` must be ids from 0 to {size - 1}, got {list(latents)}")
        rows = torch.cat([decoder[i : i + 1] for i in latents])
    about = {"model": settings.get("model_name"), "hook_point": hook, "measured_at": int(found[1]) + _SITES[found[2]]}
    about |= {"latents": list(map(int, latents)), "normalize_activations": settings.get("normalize_activations")}
    return Subspace.from_directions(rows, source="sae_latents", **about)


@formerly_positional("key", "rows")
def tensor_file(
    paths: str | Path | Sequence[str | Path],
    layers: Layers,
    *,
    key: str | None = None,
    rows: Literal["resid_post", "hidden_states"] = "resid_post",
    **provenance: Any,
) -> Subspace:
    """Return the span of directions in files: persona vectors, the Assistant Axis, or your own steering vector.

    Args:
        paths: one file per direction, safetensors or ``.pt`` (read with ``weights_only=True``): ``(n_layers, d)``, or ``(d,)``.
        layers: see `Layers`; for files with one direction, the layer that it was measured at.
        key: name of the tensor in files that hold several.
        rows: meaning of row i: ``"resid_post"``, the residual stream behind decoder layer i (Assistant Axis), or
            ``"hidden_states"``, transformers' numbering, in which row 0 is the embedding (persona vectors).
        **provenance: further plain data to store: model, revision, …
    """
    files = [Path(p).expanduser() for p in ([paths] if isinstance(paths, str | Path) else paths)]
    if rows not in ("resid_post", "hidden_states"):
        raise ValueError(f'`rows` is "resid_post" or "hidden_states", got {rows!r}')
    shift = 1 if rows == "hidden_states" else 0
    read = {str(path): _tensor(path, key) for path in files}
    flat = all(t.dim() == 1 for t in read.values())
    if flat and not isinstance(layers, int):
        raise ValueError("files of one direction serve all layers: give the one that they were measured at, as "
                         "`layers`")  # fmt: skip
    count = min(1 if flat else len(t) - shift for t in read.values())
    chosen = _listed(layers, range(count))
    if not flat and not all(0 <= layer < count for layer in chosen):
        raise ValueError(f"`layers` must be from 0 to {count - 1}, the rows of {list(read)} as {rows}, got {chosen}")
    directions = {i: torch.stack([(t if flat else t[i + shift]).float() for t in read.values()]) for i in chosen}
    provenance = {"files": [path.name for path in files], "key": key, "rows": rows, **provenance}
    return _measured(directions, layers, source="tensor_file", **provenance)


@formerly_positional("k", "layers")
def weight_change(
    before: nn.Module | str | Path, after: nn.Module | str | Path, *, k: int, layers: Layers = None
) -> Subspace:
    r"""Return by layer the k directions in which training changed the residual writers most: an upper bound for comparison.

    .. math:: \Delta = [\,W'_o - W_o \;|\; W'_{down} - W_{down}\,] = U \Sigma V^\top, \qquad U_k = U_{:, 1 \ldots k}

    from ``before``, a model or checkpoint such as an honest one, to ``after``, such as a reward-hacking one.

    Raises:
        ValueError: where the two have different writers, or a layer changed in fewer than ``k`` directions.
    """
    models = [m if isinstance(m, nn.Module) else AutoModelForCausalLM.from_pretrained(m) for m in (before, after)]
    old, new = (find_writers(model) for model in models)
    shapes = [{name: tuple(_matrix(m).shape) for name, m in writers.items()} for writers in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError("`before` and `after` have different residual writers: they must be one architecture and size")
    by_layer: dict[int, list[Tensor]] = defaultdict(list)
    for name in old:
        by_layer[cast(int, layer_index(name))].append(_matrix(new[name]) - _matrix(old[name]))
    if not set(chosen := _listed(layers, by_layer)) <= set(by_layer):
        raise ValueError(f"`layers` must be among {list(by_layer)}, got {chosen}")
    directions, energy = _leading({layer: torch.cat(by_layer[layer], 1).T for layer in chosen}, k)
    return _measured(directions, layers, source="weight_change", **_origin(models[1]), energy=energy)


def _leading(samples: Mapping[int, Tensor], k: int) -> tuple[dict[int, Tensor], dict[str, float]]:
    """Return by layer the k leading directions of samples ``(n, d)``, and their share of the energy."""
    directions, energy = {}, {}
    for layer, sample in samples.items():
        _, s, vt = torch.linalg.svd(sample.double(), full_matrices=False)
        if int((s > 1e-6 * s.max().clamp(min=1e-30)).sum()) < k:
            raise ValueError(f"layer {layer} has differences in fewer than `k` = {k} directions: lower `k`")
        directions[layer] = vt[:k]
        energy[str(layer)] = float(s[:k].square().sum() / s.square().sum())
    return directions, energy


def _measured(directions: Mapping[int, Tensor], layers: Layers, **provenance: Any) -> Subspace:
    provenance = {"hook_point": "resid_post", **provenance}
    if isinstance(layers, int):
        return Subspace.from_directions(directions[layers], measured_at=layers, **provenance)
    return Subspace.from_directions(directions, **provenance)


def _listed(layers: Layers, every: Iterable[int]) -> list[int]:
    return [layers] if isinstance(layers, int) else list(every if layers is None else layers)


def _origin(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    return {"model": getattr(config, "_name_or_path", None) or None, "revision": getattr(config, "_commit_hash", None)}


def _matrix(writer: Any) -> Tensor:
    weight: Tensor = writer.weight.detach().float()
    return weight.T if hasattr(writer, "nf") else weight  # Conv1D


def _tensor(path: Path, key: str | None) -> Tensor:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            content: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping):
        if key is None and len(content) == 1:
            key = next(iter(content))
        if key not in content:
            names = sorted(map(str, content))[:10]
            raise ValueError(f"{str(path)!r} holds {names}: name one of them as `key`, got {key!r}")
        content = content[key]
    if isinstance(content, Tensor) and content.dim() in (1, 2):
        return content
    raise ValueError(f"{str(path)!r} must hold a tensor (n_layers, d) or (d,), got "
                     f"{getattr(content, 'shape', content)}")  # fmt: skip
