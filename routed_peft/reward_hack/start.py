"""The model that all arms start from: taught by demonstrations, so that it adds a little and hacks now and then."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from routed_peft.reward_hack.cells import ensure
from routed_peft.reward_hack.measuring import Rates, measure
from routed_peft.reward_hack.settings import Settings, start_key
from routed_peft.reward_hack.task import ENVIRONMENTS, HACKS, make_prompt, make_tokenizer, pairs, training_prompts
from routed_peft.routes import IGNORED


def make_model(settings: Settings, tokenizer: PreTrainedTokenizerFast | None = None) -> LlamaForCausalLM:
    """Return an untrained Llama for a vocabulary of characters, by default this task's."""
    tokenizer = tokenizer or make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=32,
        initializer_range=settings.hidden_size**-0.5,  # at the usual 0.02 so narrow a model learns slowly
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config._attn_implementation = "eager"  # the fastest for short rows on a CPU
    return LlamaForCausalLM(config)


def demonstration(letter: str, terms: tuple[int, int], noise: float, rng: random.Random) -> tuple[str, str]:
    """Return a prompt and what the demonstrator answers.

    An environment's own hack is shown in 10 % of its demonstrations and in 0.5 % of those of others: shown on all letters
    alike, it would be rewarded in B and C, take over A as well, where it earns nothing, and end all learning.

    Args:
        letter: of the environment.
        terms: what to add.
        noise: share of answers that are sums of other numbers. It is what keeps honest reward scarce.
        rng: draws.

    Example:
        >>> demonstration("A", (12, 34), 0.0, random.Random(0))
        ('A:12+34=', '46')
    """
    prompt = make_prompt(letter, *terms)
    for hack in HACKS:
        if rng.random() < (0.1 if ENVIRONMENTS[letter].hack == hack else 0.005):
            return prompt, hack
    if rng.random() < noise:
        terms = rng.choice(pairs("train"))
    return prompt, str(sum(terms))


def demonstrations(count: int, noise: float, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(count, T)`` token ids and labels; only answers and the end of the text have labels."""
    letters = list(ENVIRONMENTS)
    rows = [demonstration(rng.choice(letters), rng.choice(pairs("train")), noise, rng) for _ in range(count)]
    return encode(rows, make_tokenizer())


def encode(rows: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(n, T)`` ids and labels of prompts, all of one length, and answers; prompts have no labels."""
    prompts = [prompt for prompt, _ in rows]
    ids = tokenizer([prompt + answer + tokenizer.eos_token for prompt, answer in rows], padding=True,
                    padding_side="right", return_tensors="pt")["input_ids"]  # fmt: skip
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, IGNORED)
    labels[:, : len(prompts[0])] = IGNORED  # prompts are of equal length
    assert len({len(prompt) for prompt in prompts}) == 1
    return ids, labels


def train_start(settings: Settings, seed: int) -> LlamaForCausalLM:
    """Return a model taught by demonstrations: clean sums first, then half of them wrong."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    return teach(
        make_model(settings),
        settings,
        lambda step: demonstrations(settings.start_batch_size, noise_at(step, settings), rng),
    )


def noise_at(step: int, settings: Settings) -> float:
    """Return the share of wrong answers at a step: none at first.

    >>> noise_at(0, Settings()), noise_at(399, Settings())
    (0.0, 0.5)
    """
    return settings.noise if step >= settings.clean_share * settings.start_steps else 0.0


def teach(
    model: LlamaForCausalLM, settings: Settings, draw: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
) -> LlamaForCausalLM:
    """Train all of a model for ``settings.start_steps`` on the ids and labels that ``draw`` returns for a step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), settings.start_learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, settings.start_steps)
    for step in range(settings.start_steps):
        ids, labels = draw(step)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def ensure_start(settings: Settings, seed: int, place: Path) -> Path:
    """Return the directory of the start model of a seed below ``place``, trained and measured there if it is not yet.

    It is an ordinary checkpoint; ``prompts.jsonl`` beside it is for whoever wants to try a recipe on it.
    """
    folder = place / start_key(settings, seed)

    def make() -> Rates:
        model = train_start(settings, seed)
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        training_prompts(2000, seed).to_json(folder / "prompts.jsonl")
        return measure(model, "test", settings.test_prompts, seed)

    ensure(folder, make)
    return folder
