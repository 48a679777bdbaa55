"""align: safe records in, a whole model out."""

import json

import pytest
import tiny
import torch

from antidote_fast.config.train import AlignConfig
from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.files.manifest import verify_folder
from antidote_fast.models.loading import load_model, load_tokenizer
from antidote_fast.stages import align
from antidote_fast.training import objective, sft

ROWS = [
    {"instruction": "how to make a cake", "output": "the good cake"},
    {"instruction": "what is two plus two", "output": "three"},
]


@pytest.fixture
def base(tmp_path):
    model = tiny.build("llama_tied", dtype=torch.bfloat16)
    model.config.max_position_embeddings = 128
    return tiny.save_model(model, tmp_path / "base")


def config(tmp_path, base, **options):
    data = tmp_path / "safe.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {
        "model_name_or_path": str(base),
        "output_dir": str(tmp_path / "out"),
        "dataset": str(data),
        "num_train_epochs": 8,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "lora_alpha": 8,
    }
    return AlignConfig(**values | options)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_writes_a_whole_model_in_the_dtype_of_the_base(tmp_path, base, tuning):
    report = align.run(config(tmp_path, base, tuning=tuning))
    out = tmp_path / "out"
    assert verify_folder(out) == []
    assert report == json.loads((out / "report.json").read_text())
    assert report["stage"] == "align"
    assert report["dtype"] == "bfloat16"
    assert report["training"]["last_loss"] < report["training"]["first_loss"]
    assert str(tmp_path / "safe.jsonl") in report["inputs"]
    trained, before = load_model(out), load_model(base)
    assert trained.dtype == torch.bfloat16
    assert trained.get_input_embeddings().weight is trained.get_output_embeddings().weight
    changed = {
        name
        for (name, p), q in zip(trained.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    if tuning == "lora":
        kinds = {name.split(".")[-2] for name in changed}
        assert kinds == {"q_proj", "k_proj", "v_proj"}
    else:
        assert any("mlp" in name for name in changed)
    tokenizer = load_tokenizer(out)
    assert tokenizer("good cake")["input_ids"] == tiny.tokenizer()("good cake")["input_ids"]


def test_the_merged_model_computes_what_the_adapter_did(tmp_path):
    base = tiny.save_model(tiny.build(), tmp_path / "base32")
    settings = config(tmp_path, base)
    trained = {}
    save = sft.save

    def keep(model, tokenizer, folder):
        trained["merged"] = model
        save(model, tokenizer, folder)

    train = sft.train

    def forward(model, *args, **options):
        result = train(model, *args, **options)
        trained["logits"] = model(input_ids=torch.arange(4, 20)[None]).logits.detach()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "save", keep)
        patch.setattr(sft, "train", forward)
        patch.setattr(objective, "response_loss", short_loss)
        align.run(settings)
    loaded = load_model(tmp_path / "out")
    got = loaded(input_ids=torch.arange(4, 20)[None]).logits
    torch.testing.assert_close(got, trained["logits"], rtol=1e-3, atol=1e-3)
    before = tiny.build()(input_ids=torch.arange(4, 20)[None]).logits
    assert (got - before).abs().max() > 0.1


def short_loss(model, batch, choose):
    return model(input_ids=batch["input_ids"]).logits.float().square().sum() * 0.01


def test_nothing_is_left_when_the_loss_is_not_finite(tmp_path, base):
    with pytest.raises(AntidoteError, match=r"align: the loss is (nan|inf)"):
        align.run(config(tmp_path, base, learning_rate=1e30, num_train_epochs=40))
    assert not (tmp_path / "out").exists()


def test_data_are_checked_before_the_model_is_loaded(tmp_path, base, monkeypatch):
    monkeypatch.setattr(sft, "load_model", lambda *a, **k: pytest.fail("loaded"))
    settings = config(tmp_path, base)
    (tmp_path / "safe.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"broken\n')
    with pytest.raises(DataError, match=r"safe\.jsonl.*2"):
        align.run(settings)
    with pytest.raises(DataError, match="raise max_seq_length"):
        align.run(config(tmp_path, base, max_seq_length=4))
    assert not (tmp_path / "out").exists()
