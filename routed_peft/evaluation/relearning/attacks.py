"""What an attacker may do: train everything or little, on much or few data of one kind or another."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

METHODS = {
    "full": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    "lora": (1e-4, 3e-4, 1e-3, 3e-3),
    "bias": (1e-2, 3e-2, 1e-1, 3e-1),
    "none": (0.0,),
}
"""What is trained, and the learning rates that are tried first: all parameters (``full``), LoRA adapters on all linear layers
(``lora``), one number per vocabulary entry that is added to the logits (``bias``), nothing (``none``)."""

DATA = ("forget", "mixed", "retain", "unrelated", "facts")
"""What it is trained on: forget text, batches of which half is retain text, retain text only, unrelated text only, or half of
a list of facts whose other half is then scored."""

_SHOTS, _BITS = re.compile(r"few-shot-(\d+)"), re.compile(r"int([48])")


@dataclass(frozen=True)
class Attack:
    """One way to bring knowledge back.

    Attributes:
        name: for readers and records; different attacks need different names.
        method: a key of `METHODS`.
        data: one of `DATA`.
        documents: how many documents of that data the attacker has, drawn by the seed (of each side if mixed); None: all.
        perturb: share by which every parameter is first moved towards a fresh initialisation
            (`routed_peft.unlearning.weight_noise`).
        bits: 4 or 8: weights of linear layers are first rounded to so many bits; None leaves them.
        batch_size: documents a step; where there are fewer, all of them every step.
        length: tokens of a training row; longer documents become several rows.
        lora_rank: rank of the adapters of ``lora``.

    Raises:
        ValueError: on an unknown method or kind of data, or a number out of range.

    Example:
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
            raise ValueError(
                f"the attack {self.name!r} on facts trains on half of them: leave out `documents`, few-shot-N"
            )
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
        least = 2 if self.data == "mixed" else 1
        if self.batch_size < least or self.length < 2 or self.lora_rank < 1:
            raise ValueError(
                f"`batch_size` must be at least {least}, `length` 2 and `lora_rank` 1, got {self.batch_size}, {self.length} "
                f"and {self.lora_rank}"
            )

    @property
    def target(self) -> str:
        """The split whose loss the attacker wants to lower."""
        return "facts" if self.data == "facts" else "forget"

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The learning rates that are tried first."""
        return METHODS[self.method]

    @classmethod
    def parse(cls, name: str, **settings: Any) -> Attack:
        """Make an attack from its name: parts joined by ``+``.

        A part is a method (``full``, ``lora``, ``bias``), a kind of data (``forget``, ``mixed``, ``retain``, ``unrelated``,
        ``facts``), ``few-shot-N`` for N documents of it, ``perturb`` (a share of 0.05) or ``int8`` or ``int4``; one of each at
        most. What is not said is full fine-tuning on forget text; ``int8`` and ``int4`` alone train nothing.

        Args:
            name: such as "forget", "lora", "lora+mixed", "few-shot-4", "perturb+retain", "int4".
            **settings: other attributes.
        """
        found: dict[str, Any] = {}
        for part in name.split("+"):
            kind, value = _part(part)
            if kind in found:
                raise ValueError(f"the attack {name!r} says `{kind}` twice: name two attacks instead")
            found[kind] = value
        if found.keys() == {"bits"}:
            found["method"] = "none"
        return cls(name, **(found | settings))


def _part(part: str) -> tuple[str, Any]:
    """Return which attribute a part of an attack's name sets, and to what."""
    if part in METHODS and part != "none":
        return "method", part
    if part in DATA:
        return "data", part
    if shots := _SHOTS.fullmatch(part):
        return "documents", int(shots[1])
    if part == "perturb":
        return "perturb", 0.05
    if bits := _BITS.fullmatch(part):
        return "bits", int(bits[1])
    raise ValueError(
        f"`{part}` is no part of an attack: take full, lora or bias; {', '.join(DATA)} or few-shot-16; perturb; "
        "int8 or int4; joined by +, as in lora+few-shot-16"
    )
