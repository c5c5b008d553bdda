"""Derive the text slices in ``evals/corpora/`` from the sources they come from.

    python recipes/build_corpora.py SOURCE [--out evals/corpora]

SOURCE holds one gzipped JSONL file per source, extracted from these Debian packages:

- ``bible_en_es.jsonl.gz``: ``{ref, en, es}``, one verse a row, from the SWORD modules of ``sword-text-web`` (World
  English Bible) and ``sword-text-sparv`` (Reina-Valera 1909), joined on the verse;
- ``gene_ontology.jsonl.gz``: ``{id, term, def, ontology, virus}``, from ``GO.sqlite`` in ``r-bioc-go.db`` 3.16;
- ``wordnet_glosses.jsonl.gz``: ``{word, pos, domain, hypernym, gloss, examples}``, one synset a row, from
  ``wordnet-base`` 3.0;
- ``go_mcq.jsonl.gz`` and ``wordnet_mcq.jsonl.gz``: ``{question, choices, answer, domain, split}``, multiple-choice
  questions made from the two above.

What is taken: every verse; every WordNet gloss about animals, plants and the body; of the Gene Ontology and the other
glosses, the rows that a multiple-choice question asks about (a model can only know what it was taught), all terms about
viruses, and then rows in the order of a hash of their id until the counts below, which give about 1.2M tokens a side
with a byte-level BPE of 2,048 entries. The files are reproduced byte for byte.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from routed_peft.runs.command_line import run_recipe

GENE_ONTOLOGY_ROWS = 21_500
WORDNET_GENERAL_ROWS = 51_000
BIOLOGY = {"noun.animal", "noun.plant", "noun.body"}

Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description="Derive the text slices in evals/corpora/ from their sources.")
    parser.add_argument("source", type=Path, help="directory with the extracted *.jsonl.gz files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "evals" / "corpora")
    args = parser.parse_args()
    for name, rows in slices(args.source).items():
        path = write(args.out / f"{name}.jsonl.gz", rows)
        print(f"{path.name}: {len(rows):,} rows, {path.stat().st_size / 1e6:.2f} MB")


def slices(source: Path) -> dict[str, list[Row]]:
    verses = read(source / "bible_en_es.jsonl.gz")
    general, biology = wordnet(source)
    return {
        "bible_en": [{"id": v["ref"], "text": v["en"]} for v in verses],
        "bible_es": [{"id": v["ref"], "text": v["es"]} for v in verses],
        "gene_ontology": gene_ontology(source),
        "wordnet_biology": biology,
        "wordnet_general": general,
    }


def gene_ontology(source: Path) -> list[Row]:
    asked = {q["choices"][q["answer"]] for q in read(source / "go_mcq.jsonl.gz")}
    terms = read(source / "gene_ontology.jsonl.gz")
    wanted = {t["id"] for t in terms if t["virus"] or t["term"] in asked}
    rows = [{"id": t["id"], "text": f"{t['term']}: {t['def']}"} for t in terms]
    return sorted(choose(rows, wanted, GENE_ONTOLOGY_ROWS), key=lambda row: row["text"])  # packs tightest


def wordnet(source: Path) -> tuple[list[Row], list[Row]]:
    asked = {
        (q["choices"][q["answer"]], q["question"].removeprefix("Which word means: ").removesuffix("?"))
        for q in read(source / "wordnet_mcq.jsonl.gz")
    }
    sides: dict[bool, list[Row]] = {True: [], False: []}
    wanted, numbers, seen = set(), Counter[str](), set()
    for synset in read(source / "wordnet_glosses.jsonl.gz"):
        word, domain, gloss = synset["word"], synset["domain"], synset["gloss"]
        if (word, gloss) in seen:  # 21 glosses are given twice
            continue
        seen.add((word, gloss))
        numbers[domain] += 1
        id = f"{domain}/{numbers[domain]}"
        sides[domain in BIOLOGY].append({"id": id, "text": f"{word}: {gloss}"})
        if (word, gloss) in asked:
            wanted.add(id)
    return choose(sides[False], wanted, WORDNET_GENERAL_ROWS), sides[True]


def choose(rows: list[Row], wanted: set[str], count: int) -> list[Row]:
    """Take ``count`` rows, in their order: those wanted, then the first by a hash of their id."""
    ranked = sorted(rows, key=lambda row: (row["id"] not in wanted, hashlib.md5(row["id"].encode()).digest()))
    chosen = {row["id"] for row in ranked[:count]}
    return [row for row in rows if row["id"] in chosen]


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: Iterable[Row]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    return path


if __name__ == "__main__":
    run_recipe(main)
