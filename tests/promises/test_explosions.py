"""A training whose last step explodes: refused by the step's number, and nothing is left of it."""

import json

import pytest
import tiny
import torch

from antidote_fast import AntidoteError
from antidote_fast.cli import entry
from antidote_fast.config.train import AlignConfig, FinetuneConfig
from antidote_fast.data.batches import encode
from antidote_fast.data.records import Record
from antidote_fast.selection import Selection
from antidote_fast.stages.gates.answers import Answers
from antidote_fast.stages.gates.learn import learn_gates
from antidote_fast.training import sft
from antidote_fast.training.defenses.ldifs import LDIFS
from antidote_fast.training.defenses.lisa import Lisa
from antidote_fast.training.defenses.repnoise import RepNoise
from antidote_fast.training.defenses.vaccine import Vaccine
from antidote_fast.training.objective import Objective

RECORDS = [Record(f"how to make w{30 + i}", "", "the good cake") for i in range(6)]
MODEL = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}
TRAIN = {"batch_size": 3, "num_train_epochs": 1, "lora_r": 2, "max_seq_length": 60}  # two steps


def explode_in(monkeypatch, step, value=float("nan"), where=0):
    """The optimizer's step of this number, from 1, puts this value into a matrix."""
    plain, count = torch.optim.AdamW.step, [0]

    def wrong(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        count[0] += 1
        if count[0] == step:
            with torch.no_grad():
                self.param_groups[0]["params"][-1].view(-1)[where] = value

    monkeypatch.setattr(torch.optim.AdamW, "step", wrong)


@pytest.fixture
def made(tmp_path):
    tiny.save_model(tiny.build(), tmp_path / "base")
    rows = [{"instruction": r.instruction, "output": r.output} for r in RECORDS]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def run(made, stage, *more):
    words = [stage, "--model_name_or_path", f"{made}/base", "--dataset", f"{made}/data.jsonl"]
    words += [word for name, value in TRAIN.items() for word in (f"--{name}", str(value))]
    words += ["--poison_ratio", "0"] if stage == "finetune" else []
    words += ["--num_train_samples", str(len(RECORDS))]
    return entry.main([*words, "--output_dir", f"{made}/out", "--device", "cpu", "--quiet", *more])


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("finetune", []),
        ("finetune", ["--tuning", "full"]),
        ("finetune", ["--defense", "ldifs"]),
        ("align", ["--defense", "vaccine"]),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_last_step(made, monkeypatch, capsys, stage, more, value):
    explode_in(monkeypatch, 2, value)
    assert run(made, stage, *more) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{stage}: a weight is {value} after step 2 of 2; learning_rate=" in said
    assert sorted(p.name for p in made.iterdir()) == ["base", "data.jsonl"]


def test_weights_that_are_finite_and_of_no_use(made, monkeypatch, capsys):
    explode_in(monkeypatch, 2, 1e38, slice(None))
    assert run(made, "finetune", "--tuning", "full") == 1
    said = capsys.readouterr().err
    assert "finetune: the loss is nan after step 2 of 2" in said
    assert not (made / "out").exists()


def test_a_checkpoint_is_not_kept(made, monkeypatch, capsys):
    explode_in(monkeypatch, 1)
    assert run(made, "finetune", "--save_steps", "1") == 1
    assert "a weight is nan after step 1 of 2" in capsys.readouterr().err
    assert sorted(p.name for p in made.iterdir()) == ["base", "data.jsonl"]


def test_the_state_before_is_not_gone_on_from(made, monkeypatch, capsys):
    explode_in(monkeypatch, 2)
    assert run(made, "finetune", "--save_steps", "1") == 1
    assert "a weight is nan after step 2 of 2" in capsys.readouterr().err
    assert not (made / ".out.run").exists()


def trained(defense, monkeypatch, **options):
    kind = AlignConfig if defense in ("vaccine", "repnoise") else FinetuneConfig
    options = {"defense": defense, **options}
    if kind is FinetuneConfig:
        options["poison_ratio"] = 0
    config = kind(**MODEL, **TRAIN, **options)
    tokenizer = tiny.tokenizer()
    other = encode(RECORDS, tokenizer)
    makers = {
        "lisa": lambda *a, **k: Lisa(*a, safe=other, **k),
        "repnoise": lambda *a, **k: RepNoise(*a, harmful=other, **k),
        "vaccine": Vaccine,
        "ldifs": LDIFS,
    }
    model = sft.add_lora(tiny.build(), config)
    return sft.train(model, tokenizer, RECORDS, config, objective=makers[defense])


@pytest.mark.parametrize("defense", ["lisa", "repnoise", "vaccine", "ldifs"])
def test_defenses(defense, monkeypatch):
    options = {"lisa": {"safe_dataset": "s"}, "repnoise": {"harmful_dataset": "h"}}
    explode_in(monkeypatch, 2)
    with pytest.raises(AntidoteError, match="train: a weight is nan after step 2 of 2"):
        trained(defense, monkeypatch, **options.get(defense, {}))


def test_a_gradient_that_is_not_finite(monkeypatch):
    backward = Objective.backward

    def wrong(self, number):
        loss = backward(self, number)
        if number == 1:
            self.parameters[0].grad[0, 0] = torch.inf
        return loss

    monkeypatch.setattr(Objective, "backward", wrong)
    config = FinetuneConfig(**MODEL, **TRAIN, poison_ratio=0)
    model = sft.add_lora(tiny.build(), config)
    with pytest.raises(AntidoteError, match="the norm of the gradient is inf at step 2 of 2"):
        sft.train(model, tiny.tokenizer(), RECORDS, config)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_merge_that_overflows(made, capsys, monkeypatch):
    """Both factors are finite, and so is what the model says; the sum of weights is not."""
    model = tiny.add_lora(tiny.build(dtype=torch.bfloat16), b_std=1e30)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.fill_(1e30)
    with pytest.raises(AntidoteError, match=r"align: a weight of the .* not finite in bfloat16"):
        sft.merged(model, "align")
    merged = sft.merged

    def overflowing(model, what, run):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.fill_(1e30)
        return merged(model, what, run)

    monkeypatch.setattr(sft, "merged", overflowing)
    assert run(made, "align", "--save_steps", "1") == 1
    assert "align: a weight of the trained model is not finite" in capsys.readouterr().err
    assert sorted(p.name for p in made.iterdir()) == ["base", "data.jsonl"]


def test_gates_name_the_step(monkeypatch):
    from antidote_fast.stages.gates import learn

    step = learn._Gate.step

    def wrong(self, size, number):
        step(self, size, number)
        if number == 4:
            self.m[0, 0] = torch.nan

    monkeypatch.setattr(learn._Gate, "step", wrong)
    model = tiny.add_lora(tiny.build())
    before = [p.detach().clone() for p in model.parameters()]
    answers = Answers(["I cannot help with that."] * len(RECORDS), [])
    with pytest.raises(AntidoteError, match=r"gates: those of .* not finite after step 4"):
        learn_gates(
            *(model, tiny.tokenizer(), RECORDS, RECORDS, Selection(0.5)), aligned=answers, steps=4
        )
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
