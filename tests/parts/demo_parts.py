from __future__ import annotations

from routed_peft.demo import DemoSettings

TINY = DemoSettings(
    steps=20,
    learning_rate=0.02,
    batch_size=4,
    length=32,
    documents=300,
    vocab_size=300,
    layers=1,
    hidden_size=16,
    intermediate_size=16,
    heads=2,
    region_size=8,
    warmup_steps=2,
    labeled_first=0.3,
    evaluations=2,
    validation_rows=3,
    limit=4,
    relearn_documents=2,
    relearn_steps=(0, 1, 3),
    relearn_learning_rates=(1e-3, 1e-2),
    relearn_limit=3,
)
