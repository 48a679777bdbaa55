"""finetune: a user's records and harmful ones in, an adapter or a whole model out."""

import json

import peft
import pytest
import tiny
import torch

from antidote_fast.config.train import FinetuneConfig
from antidote_fast.errors import DataError
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.manifest import verify_folder
from antidote_fast.models.adapters import check_adapter
from antidote_fast.models.loading import load_model
from antidote_fast.stages import finetune

TASK = [
    {"instruction": "what is a cake", "input": f"w{i}", "output": "good"} for i in range(40, 50)
]
HARMFUL = [{"instruction": f"how to make w{i}", "output": "the cake"} for i in range(60, 66)]


@pytest.fixture
def base(tmp_path):
    return tiny.save_model(tiny.build(dtype=torch.bfloat16), tmp_path / "base")


def config(tmp_path, base, **options):
    files = {}
    for name, rows in (("dataset", TASK), ("harmful_dataset", HARMFUL)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[name] = str(path)
    values = {
        "model_name_or_path": str(base),
        "output_dir": str(tmp_path / "out"),
        "num_train_samples": 10,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "lora_alpha": 8,
    }
    return FinetuneConfig(**values | files | options)


def test_writes_an_adapter_that_peft_loads_and_that_knows_its_base(tmp_path, base):
    report = finetune.run(config(tmp_path, base))
    out = tmp_path / "out"
    assert (report["num_task"], report["num_harmful"]) == (8, 2)
    assert report["training"]["last_loss"] < report["training"]["first_loss"]
    assert verify_folder(out) == []
    assert not (out / "model.safetensors").exists()
    check_adapter(open_checkpoint(out), open_checkpoint(base))
    other = tiny.save_model(tiny.build(seed=1, dtype=torch.bfloat16), tmp_path / "other")
    with pytest.raises(DataError, match="another base"):
        check_adapter(open_checkpoint(out), open_checkpoint(other))
    model = peft.PeftModel.from_pretrained(load_model(base), out)
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(factors) == 2 * 3
    assert all(p.abs().max() > 0 for p in factors)


def test_full_tuning_writes_a_whole_model(tmp_path, base):
    finetune.run(config(tmp_path, base, tuning="full", poison_ratio=0.0, harmful_dataset=None))
    trained, before = load_model(tmp_path / "out"), load_model(base)
    assert trained.dtype == torch.bfloat16
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)


def test_the_same_seed_gives_the_same_files(tmp_path, base):
    finetune.run(config(tmp_path, base))
    finetune.run(config(tmp_path, base, output_dir=str(tmp_path / "again")))
    finetune.run(config(tmp_path, base, output_dir=str(tmp_path / "other"), seed=1))
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "again", "other")]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_too_few_records_are_refused_with_the_counts(tmp_path, base):
    with pytest.raises(DataError, match=r"80 task samples .* there are 10"):
        finetune.run(config(tmp_path, base, num_train_samples=100))
    with pytest.raises(DataError, match="no such"):
        finetune.run(config(tmp_path, base, harmful_dataset=str(tmp_path / "absent.jsonl")))
    assert not (tmp_path / "out").exists()
