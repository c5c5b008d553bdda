"""Every subset of two whole regions: measured by one load, and exported as plain checkpoints."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from cli_parts import call
from evaluation_parts import byte_tokenizer, tiny_llama, token_loss, write_jsonl
from peft import get_peft_model
from regions_parts import PEFT_NOISE, randomize
from rich.console import Console
from transformers import AutoModelForCausalLM

from routed_peft import Route, RoutedConfig, load_routed, presets, save_routed
from routed_peft.checkpoint.subsets import export_subsets, parse_subsets
from routed_peft.evaluation import TopicLoss, subset_losses
from routed_peft.evaluation.subsets import subsets_table

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)
TOPICS = {"bio": ["a cell wall", "a gene of a plant"], "core": ["a cat", "corre mucho"]}
SUBSETS = {"none": [], "bio": ["bio"], "cyber": ["cyber"], "bio+cyber": ["bio", "cyber"]}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved run with two whole regions."""
    path = tmp_path_factory.mktemp("two") / "run"
    config = RoutedConfig(size=4, r=2, embeddings="full", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config, adapter_name="bio")
    model.add_adapter("cyber", RoutedConfig(size=3, r=2, embeddings="full", task_type="CAUSAL_LM"))
    for name in ("bio", "cyber"):
        randomize(model, name)
    routes = {**presets.sgtm("bio"), "cyber": Route(weights={"base": 0.0})}
    return save_routed(model, path, routes=routes, tokenizer=byte_tokenizer(), train_base=True)


@pytest.fixture
def topics(tmp_path: Path) -> list[str]:
    return [f"{name}=" + write_jsonl(tmp_path / f"{name}.jsonl", [{"text": t} for t in texts])
            for name, texts in TOPICS.items()]  # fmt: skip


def test_losses_of_every_subset_are_those_of_the_run_loaded_with_it_and_of_its_export(two, topics, tmp_path):
    out, plot = tmp_path / "losses.json", tmp_path / "losses.svg"
    result = call("evaluate", two, "--subsets", "all", "--topics", *topics, "--out", out, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert call("export", two, tmp_path / "models", "--subsets", "all").exit_code == 0
    found, tokenizer = json.loads(out.read_text()), byte_tokenizer()
    assert found["regions"] == SUBSETS and list(found["losses"]) == list(SUBSETS)
    live = load_routed(two, regions=["bio", "cyber"])
    exact = subset_losses(live, tokenizer, topics=TOPICS)
    for name, regions in SUBSETS.items():
        alone = subset_losses(load_routed(two, regions=regions), tokenizer, topics=TOPICS, subsets=["all"])
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / name)
        for topic, texts in TOPICS.items():
            cell = found["losses"][name][topic]
            same = list(alone.values())[-1][topic]
            assert cell["loss"] == exact[name][topic].loss == same.loss and cell["interval"] == list(same.interval)
            assert cell["loss"] == pytest.approx(token_loss(plain, tokenizer, texts)[0], rel=1e-5)
            assert f"{cell['loss']:.3f}" in result.output
    losses = [found["losses"][name]["bio"]["loss"] for name in SUBSETS]
    assert len(set(losses)) == 4 and "<svg" in plot.read_text()


def test_a_list_of_subsets_is_measured_alone(two, topics):
    result = call("evaluate", two, "--subsets", "all", "none", "bio", "--topics", *topics)
    assert result.exit_code == 0, result.output
    rows = [line.split()[0] for line in result.output.splitlines() if line.strip()]
    assert [row for row in rows if row in ("none", "bio", "cyber", "all")] == ["none", "bio", "all"]


@pytest.mark.parametrize("count", [2, 6])
def test_tables_fit_80_columns(count):
    regions = [f"region_{name}" for name in ("biology", "cyber", "spanish", "products", "animals", "plants")[:count]]
    topics = [*(name.split("_")[1] for name in regions), "core"]
    losses = {name: dict.fromkeys(topics, TopicLoss(14.5, (13.5, 15.25))) for name in parse_subsets(regions)}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(subsets_table(losses, title="run"))
    lines = console.export_text().splitlines()
    assert all(name in "".join(lines[:4]) for name in topics), lines
    assert "region_" not in "".join(lines) and sum("14.500" in line for line in lines) == 2**count
    assert any("13.50–15.25" in line for line in lines) == (count < 5)
    assert [line.split()[0] for line in lines if "14.500" in line][:: 2**count - 1] == ["none", "all"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--subsets", "bio+law", "--topics", "a={file}"], "the region 'law' in 'bio+law': the regions are bio, cyber"),
        (["--subsets", "bio+cyber", "all", "--topics", "a={file}"], "has a subset twice"),
        (["--subsets", "all", "--topics", "a={file}", "a={file}"], "each name once"),
        (["--subsets", "all", "--topics", "a=nowhere.jsonl"], "nowhere.jsonl"),
        (["--subsets", "all", "--topics", "file.jsonl"], "takes NAME=FILE"),
        (["--subsets", "all"], "takes NAME=FILE"),
        (["--topics", "a={file}"], "add --subsets all"),
        (["--subsets", "all", "--topics", "a={file}", "--plot", "a.pdf"], "neither a .png nor a .svg"),
        (["--subsets", "all", "--topics", "a={file}", "--tasks", "routed_loss"], "runs no tasks"),
    ],
)
def test_mistakes_are_one_line(two, topics, more, message):
    file = topics[0].split("=")[1]
    result = call("evaluate", two, *(word.format(file=file) for word in more))
    assert result.exit_code == 1 and message in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_a_plot_without_matplotlib_is_one_line(two, topics, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "routed_peft.report"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = call("evaluate", two, "--subsets", "all", "--topics", *topics, "--plot", tmp_path / "a.png")
    assert result.exit_code == 1 and 'pip install "routed_peft[report]"' in result.stderr


def test_every_subset_of_many_regions_is_refused():
    with pytest.raises(ValueError, match="7 regions have 128 subsets"):
        parse_subsets(list("abcdefg"))
    assert len(parse_subsets(list("abcdef"))) == 64
    assert parse_subsets(list("abcdefg"), ["none", "g+a"]) == {"none": [], "a+g": ["a", "g"]}


def test_exports_share_files_and_a_repeat_keeps_what_is_there(two, tmp_path, monkeypatch):
    out = tmp_path / "models"
    folders = export_subsets(two, out, subsets=["none", "bio"])
    first, second = (folder / "tokenizer.json" for folder in folders.values())
    assert first.samefile(second) and not (out / "none/config.json").samefile(out / "bio/config.json")
    kept = {name: (folder / "ablation.json").read_bytes() for name, folder in folders.items()}
    second.unlink()
    with pytest.raises(ValueError, match="no unchanged export of 'bio'"):
        export_subsets(two, out)
    second.write_bytes(first.read_bytes())  # killed before files were linked
    made = []
    monkeypatch.setattr(
        "routed_peft.checkpoint.subsets.export", lambda src, folder, **_: made.append(folder.name) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        export_subsets(two, out)
    assert made == ["cyber"]
    monkeypatch.undo()
    assert list(export_subsets(two, out)) == list(SUBSETS)
    assert second.samefile(first) and (out / "bio+cyber/tokenizer.json").samefile(first)
    assert kept == {name: (out / name / "ablation.json").read_bytes() for name in kept}


def test_without_hard_links_files_are_copies(two, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    folders = export_subsets(two, tmp_path / "models", subsets=["none", "bio"])
    one, other = (folder / "tokenizer.json" for folder in folders.values())
    assert one.read_bytes() == other.read_bytes() and not one.samefile(other)
    assert not list((tmp_path / "models/bio").glob(".routed_peft*"))
