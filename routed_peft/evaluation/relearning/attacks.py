"""Attacks by name: methods of fine-tuning, kinds of data, and the hook that adds to either."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from routed_peft.evaluation.text_loss import vocabulary

_SHOTS, _BITS = re.compile(r"few-shot-(\d+)"), re.compile(r"int([48])")
TEXTS = ("forget_train", "retain_train", "unrelated_train")
"""Attributes of `AttackData` from which an attacker may train."""


@dataclass(frozen=True)
class AttackMethod:
    """A choice of trained parameters.

    Attributes:
        prepare: ``prepare(model, attack)``, a context manager that yields the parameters to train, of which none requires a
            gradient before; at the end of the block the model has its own modules again. Weights are restored elsewhere.
        learning_rates: tried first.
    """

    prepare: Callable[[PreTrainedModel, Attack], AbstractContextManager[Sequence[nn.Parameter]]]
    learning_rates: tuple[float, ...]


METHODS: dict[str, AttackMethod] = {}
"""Method -> its preparation: ``full``, ``lora``, ``bias``, ``none``, and those of `register_attack`."""

DATA: dict[str, tuple[str, ...]] = {
    "forget": ("forget_train",),
    "mixed": ("forget_train", "retain_train"),
    "retain": ("retain_train",),
    "unrelated": ("unrelated_train",),
    "facts": ("facts",),
}
"""Kind of data -> the attributes of `AttackData` that share each batch in equal parts. Of ``facts`` one half is trained on and
the other half is scored."""


def register_attack(name: str, *, method: AttackMethod | None = None, texts: Sequence[str] = ()) -> None:
    """Add a method or a kind of data to attacks; `Attack.parse` and command lines then understand its ``name``.

    Args:
        method: for a method, its parameters and learning rates.
        texts: for a kind of data, one or more of `TEXTS`.

    Raises:
        ValueError: where the name has a meaning already, not exactly one of ``method`` and ``texts`` is given, or a text is
            unknown.

    >>> register_attack("forget-unrelated", texts=["forget_train", "unrelated_train"])
    >>> Attack.parse("lora+forget-unrelated").data, DATA.pop("forget-unrelated")[1]
    ('forget-unrelated', 'unrelated_train')
    """
    if (method is None) == (not texts):
        raise ValueError("an attack's part is a method or a kind of data: give one of `method` and `texts`")
    if "+" in name or name == "perturb" or name in {*METHODS, *DATA} or _SHOTS.fullmatch(name) or _BITS.fullmatch(name):
        raise ValueError(f"{name!r} has a meaning in names of attacks already: choose another name, without +")
    if unknown := sorted(set(texts) - set(TEXTS)):
        raise ValueError(f"`texts` must be some of {', '.join(TEXTS)}, got {unknown}")
    if method is None:
        DATA[name] = tuple(texts)
    else:
        METHODS[name] = method


@dataclass(frozen=True)
class Attack:
    """One way to bring knowledge back; a ValueError names an unknown method or kind of data, or a number out of range.

    Attributes:
        name: for readers and records; different attacks need different names.
        method: a key of `METHODS`.
        data: a key of `DATA`.
        documents: number of documents of that data, drawn by the seed (from each side if mixed); None: all.
        perturb: share by which every parameter is first moved towards a fresh initialization (`shrink_perturb`).
        bits: 4 or 8: weights of linear layers are first rounded to so many bits; None leaves them.
        batch_size: documents a step; with fewer documents, all of them every step.
        length: tokens of a training row; longer documents become several rows.
        lora_rank: rank of the adapters of ``lora``.

    >>> attack = Attack.parse("lora+few-shot-16")
    >>> attack.method, attack.data, attack.documents, attack.target
    ('lora', 'forget', 16, 'forget')
    >>> Attack.parse("lorra")
    Traceback (most recent call last):
    ...
    ValueError: `lorra` is no part of an attack: ...
    """

    name: str
    method: str = "full"
    data: str = "forget"
    documents: int | None = None
    perturb: float = 0.0
    bits: int | None = None
    batch_size: int = 16
    length: int = 256
    lora_rank: int = 16

    def __post_init__(self) -> None:
        if self.data == "facts" and self.documents is not None:
            problem = f"the attack {self.name!r} on facts trains on half of them"
            raise ValueError(f"{problem}: leave out `documents`, few-shot-N")
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.data not in DATA:
            raise ValueError(f"`data` must be one of {', '.join(DATA)}, got {self.data!r}")
        if not 0 <= self.perturb < 1:
            raise ValueError(f"`perturb` is a share from 0 to below 1, got {self.perturb}")
        if self.bits not in (None, 4, 8):
            raise ValueError(f"`bits` must be 4, 8 or None, got {self.bits}")
        if self.documents is not None and self.documents < 1:
            raise ValueError(f"`documents` must be at least 1 or None, got {self.documents}")
        least = len(DATA[self.data])  # every batch has rows of each side
        if self.batch_size < least or self.length < 2 or self.lora_rank < 1:
            raise ValueError(f"`batch_size` must be at least {least}, `length` 2 and `lora_rank` 1, got "
                             f"{self.batch_size}, {self.length} and {self.lora_rank}")  # fmt: skip

    @property
    def target(self) -> str:
        """The split whose loss the attacker wants to lower."""
        return "facts" if self.data == "facts" else "forget"

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The learning rates that are tried first."""
        return METHODS[self.method].learning_rates

    @classmethod
    def parse(cls, name: str, **settings: Any) -> Attack:
        """Make an attack from its name, such as "lora+mixed" or "perturb+retain": parts joined by ``+``, at most one of each.

        A part is a method (``full``, ``lora``, ``bias``), a kind of data (``forget``, ``mixed``, ``retain``, ``unrelated``,
        ``facts``), ``few-shot-N`` for N documents of it, ``perturb`` (a share of 0.05), ``int8`` or ``int4``, or a name from
        `register_attack`. ``settings`` are other attributes. The default is full fine-tuning on forget text; ``int8`` and
        ``int4`` alone train nothing. An unknown part, or two of one kind, is a ValueError.
        """
        found: dict[str, Any] = {}
        for part in name.split("+"):
            kind, value = _parse_part(part)
            if kind in found:
                raise ValueError(f"the attack {name!r} says `{kind}` twice: name two attacks instead")
            found[kind] = value
        if found.keys() == {"bits"}:
            found["method"] = "none"
        return cls(name, **(found | settings))


def _parse_part(part: str) -> tuple[str, Any]:
    """Return the attribute that a part of an attack's name sets, and its value."""
    methods = [name for name in METHODS if name != "none"]
    if part in methods or part in DATA:
        return ("method" if part in methods else "data"), part
    if shots := _SHOTS.fullmatch(part):
        return "documents", int(shots[1])
    if part == "perturb":
        return "perturb", 0.05
    if bits := _BITS.fullmatch(part):
        return "bits", int(bits[1])
    raise ValueError(f"`{part}` is no part of an attack: take {', '.join(methods)}; {', '.join(DATA)} or few-shot-16; "
                     "perturb; int8 or int4; joined by +, as in lora+few-shot-16")  # fmt: skip


@contextlib.contextmanager
def _full(model: PreTrainedModel, attack: Attack) -> Iterator[list[nn.Parameter]]:
    """Train all parameters."""
    model.requires_grad_(True)
    yield list(model.parameters())


@contextlib.contextmanager
def _lora(model: PreTrainedModel, attack: Attack) -> Iterator[list[nn.Parameter]]:
    """Train LoRA adapters beside all linear layers but the head."""
    rank = attack.lora_rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT then sets it
        wrapped = get_peft_model(model, config, adapter_name="attack")
    try:
        yield [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    finally:
        wrapped.unload()


@contextlib.contextmanager
def _bias(model: PreTrainedModel, attack: Attack) -> Iterator[list[nn.Parameter]]:
    """Train one number per vocabulary entry, added to the logits."""
    head = next(model.parameters())
    bias = nn.Parameter(torch.zeros(vocabulary(model), device=head.device, dtype=head.dtype))

    def add(_: nn.Module, __: object, output: object) -> object:
        output.logits = output.logits + bias  # type: ignore[attr-defined]
        return output

    handle = model.register_forward_hook(add)
    try:
        yield [bias]
    finally:
        handle.remove()


register_attack("full", method=AttackMethod(_full, (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)))
register_attack("lora", method=AttackMethod(_lora, (1e-4, 3e-4, 1e-3, 3e-3)))
register_attack("bias", method=AttackMethod(_bias, (1e-2, 3e-2, 1e-1, 3e-1)))
register_attack("none", method=AttackMethod(lambda model, attack: contextlib.nullcontext([]), (0.0,)))
