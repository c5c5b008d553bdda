"""`AttackData`: texts to train on and texts to score, without overlap; and batches of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from routed_peft.data.beginnings import begin_tokens, document_tokens
from routed_peft.data.columns import check_strings
from routed_peft.deprecation import warn_renamed
from routed_peft.evaluation.relearning.attacks import DATA, TEXTS, Attack
from routed_peft.evaluation.text_loss import first_token, pad

Batch = tuple[Tensor, Tensor, Tensor]
Row = tuple[list[int], list[int]]
SCORED = ("forget_test", "retain_test")
_LONG = 40  # characters


@dataclass(frozen=True)
class AttackData:
    """Texts for attacks; a ValueError names an empty scored side, and a scored text that equals a training text or lies within
    one.

    Attributes:
        forget_train: forget documents in the attacker's hands.
        forget_test: held-out forget documents, scored.
        retain_test: held-out retain documents, scored.
        retain_train: for attacks on mixed or retain text.
        unrelated_train: for attacks on unrelated text.
        facts: for attacks on facts: the model's knowledge before unlearning. Halves are drawn by the seed; one is trained on
            and the other scored. A tuple holds the wordings of one fact, or facts that imply each other, and stays together.

    >>> AttackData(["a cell"], ["a gene", "A  cell"], ["a cat"])
    Traceback (most recent call last):
    ...
    ValueError: 1 text of `forget_test` is also in `forget_train`, or within one of it, first 'A  cell': an attacker ...
    """

    forget_train: Sequence[str]
    forget_test: Sequence[str]
    retain_test: Sequence[str]
    retain_train: Sequence[str] = ()
    unrelated_train: Sequence[str] = ()
    facts: Sequence[str | tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in SCORED:
            if not getattr(self, name):
                raise ValueError(f"`{name}` has no texts: both sides are scored, so give held-out text of each")
        facts = flat_facts(self.facts)
        for name in (*SCORED, *TEXTS, "facts"):
            check_strings(facts if name == "facts" else getattr(self, name), f"`{name}`")
        for trained in (*TEXTS, "facts"):
            known = facts if trained == "facts" else getattr(self, trained)
            for scored in SCORED:
                if both := _among(getattr(self, scored), known):
                    got = f"{len(both)} texts of `{scored}` are" if len(both) > 1 else f"1 text of `{scored}` is"
                    raise ValueError(f"{got} also in `{trained}`, or within one of it, first {both[0][:60]!r}: an attacker "
                                     "must not train on scored text; split the data anew")  # fmt: skip
        if len({_normal(text) for text in facts}) < len(facts):
            raise ValueError("`facts` has texts twice, so its halves would overlap: remove the copies")

    @classmethod
    def without_overlap(cls, **texts: Sequence[str | tuple[str, ...]]) -> AttackData:
        """Make data of texts with repetitions: scored texts are left out of training texts.

        >>> train, test = ["a cell", "A gene"], ["a gene"]
        >>> AttackData.without_overlap(forget_train=train, forget_test=test, retain_test=["a cat"]).forget_train
        ['a cell']
        """
        scored = {_normal(text) for name in SCORED for text in flat_facts(texts[name])}
        kept: dict[str, Any] = {
            name: [
                one for one in own if name in SCORED or not any(_normal(text) in scored for text in flat_facts([one]))
            ]
            for name, own in texts.items()
        }
        return cls(**kept)

    @classmethod
    def apart(cls, **texts: Sequence[str | tuple[str, ...]]) -> AttackData:
        """Call `without_overlap`, under its former name."""
        warn_renamed("AttackData.apart", "AttackData.without_overlap")
        return cls.without_overlap(**texts)

    def relevant_to(self, attack: Attack) -> dict[str, list[str]]:
        """Return the attributes that influence the result of an attack."""
        trained = () if attack.method == "none" else DATA[attack.data]
        scored = (*SCORED, "facts") if attack.data == "facts" else SCORED
        return {name: list(getattr(self, name)) for name in (*scored, *trained)}

    def for_training(self, attack: Attack, seed: int) -> list[list[str]]:
        """Return the training documents of an attack, one list for each side that shares its batches."""
        if attack.data == "facts":
            return [self.halves(seed)[0]]
        return [self._documents(attack, name, seed) for name in DATA[attack.data]]

    def halves(self, seed: int) -> tuple[list[str], list[str]]:
        """Return the facts to train on, and those to score: half of the tuples each."""
        if len(self.facts) < 2:
            raise ValueError(f"an attack on facts needs at least two `facts`, got {len(self.facts)}")
        shuffled = random.Random(seed).sample(list(self.facts), len(self.facts))
        return flat_facts(shuffled[: len(shuffled) // 2]), flat_facts(shuffled[len(shuffled) // 2 :])

    def scored(self, attack: Attack, seed: int) -> dict[str, list[str]]:
        """Return the scored documents of an attack, by split."""
        facts = {"facts": self.halves(seed)[1]} if attack.data == "facts" else {}
        return {"forget": list(self.forget_test), "retain": list(self.retain_test), **facts}

    def _documents(self, attack: Attack, name: str, seed: int) -> list[str]:
        texts = list(getattr(self, name))
        if not texts or len(texts) < (attack.documents or 0):
            wanted = f"{attack.documents or 'some'} documents of `{name}`"
            raise ValueError(f"the attack {attack.name!r} trains on {wanted}, which has {len(texts)}: give more")
        return texts if attack.documents is None else random.Random(seed).sample(texts, attack.documents)


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def flat_facts(facts: Sequence[str | tuple[str, ...]]) -> list[str]:
    """Return the texts of ``facts``, those of tuples one by one."""
    return [text for fact in facts for text in ([fact] if isinstance(fact, str) else fact)]


def _among(scored: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Return the scored texts that are among others, or within one; a passage shorter than `_LONG` may be a coincidence."""
    known = {_normal(text) for text in texts}
    whole = "\n".join(known)
    return [text for text in scored if (own := _normal(text)) in known or (len(own) >= _LONG and own in whole)]


def training_batches(tokenizer: Any, sides: Sequence[Sequence[str]], *, attack: Attack, seed: int) -> Iterator[Batch]:
    """Yield batches without end: inputs, attention mask and targets for `token_losses`.

    Each document stands between the tokens for the beginning and the end of a sequence; long ones become several rows, each
    with the tokenizer's own beginning. Every side contributes equally many rows to a batch, in a new random order in every
    pass; a side with fewer rows all of them.
    """
    share = attack.batch_size // len(sides)
    streams = [_stream(_rows(tokenizer, texts, attack.length), share, seed + 1000 * i) for i, texts in enumerate(sides)]
    for parts in zip(*streams, strict=True):
        yield pad([row for part in parts for row in part])


def _rows(tokenizer: Any, texts: Sequence[str], length: int) -> list[Row]:
    """Return inputs of fewer than ``length`` tokens, and their last targets; every token is a target once."""
    begin, last = begin_tokens(tokenizer), tokenizer.eos_token_id
    first, rows = begin or [first_token(tokenizer)], []
    size, more = max(1, length - len(first)), max(1, length - len(begin) - 1)
    for ids in document_tokens(tokenizer, texts):
        tokens = [*ids, *([] if last is None else [last])]
        rows.append(([*first, *tokens[:size][:-1]], tokens[:size]))
        for at in range(size, len(tokens), more):  # later rows repeat the token that the one before ended with
            rows.append(([*begin, *tokens[at - 1 : at + more][:-1]], tokens[at : at + more]))
    return [row for row in rows if row[1]]


def _stream(rows: list[Row], share: int, seed: int) -> Iterator[list[Row]]:
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        if len(rows) <= share:
            yield rows
            continue
        while len(waiting) < share:
            waiting += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[i] for i in waiting[:share]]
        waiting = waiting[share:]
