"""Estimates from headers, against what models really compute and hold."""

import types

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from antidote_fast.config.prune import CalibrateConfig, PruneConfig
from antidote_fast.config.train import FinetuneConfig, TrainConfig
from antidote_fast.errors import AntidoteError
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.models import footprint
from antidote_fast.models.footprint import check_memory, weight_bytes
from antidote_fast.models.targets import find_targets
from antidote_fast.planning import cost as estimate
from antidote_fast.training import objective, sft

BATCH, LENGTH, ANSWER = 3, 17, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(kind, layers=2):
        if (kind, layers) not in made:
            path = tmp_path_factory.mktemp(f"{kind}{layers}")
            tiny.save_model(tiny.build(kind, layers=layers), path)
            made[kind, layers] = path
        return made[kind, layers]

    return make


def cost_of(path, config=None, adapt=None):
    config = config or types.SimpleNamespace(dtype="auto", trust_remote_code=False)
    return estimate.cost_of(config, open_checkpoint(path), adapt)


def inputs():
    ids = torch.zeros((BATCH, LENGTH), dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_flops_of_a_forward(kind, folder):
    cost = cost_of(folder(kind))
    model = tiny.build(kind)
    model.set_attn_implementation("eager")  # the fused one on CPUs is not counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs(), use_cache=False)
    tokens = BATCH * LENGTH
    estimated = cost.forward.of(tokens, tokens * LENGTH, tokens)
    assert estimated == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_flops_of_a_training_step(kind, tuning, folder):
    path = folder(kind, layers=8)
    config = training(path, kind, tuning)
    model, _ = sft.load_trainable(config, path)
    inner = model.get_base_model() if tuning == "lora" else model
    inner.set_attn_implementation("eager")
    labels = inputs()["input_ids"].clone()
    labels[:, : LENGTH - ANSWER] = -100
    model.train()
    with FlopCounterMode(display=False) as counter, objective.response_logits(model) as choose:
        objective.response_loss(model, inputs() | {"labels": labels}, choose).backward()
    adapt = (lambda m: sft.add_lora(m, config)) if tuning == "lora" else None
    cost = cost_of(path, config, adapt)
    tokens = BATCH * LENGTH
    flops = cost.training.of(tokens, tokens * LENGTH, BATCH * ANSWER)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def training(path, kind, tuning, **options):
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "k_proj", "v_proj"]
    return TrainConfig(
        model_name_or_path=str(path),
        output_dir="out",
        tuning=tuning,
        lora_r=4,
        lora_targets=targets,
        **options,
    )


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_of_fused_experts_those_count_that_a_token_meets(kind, folder):
    model = tiny.build(kind)
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    )
    routers = sum(p.numel() for name, p in model.named_parameters() if "mlp.gate.weight" in name)
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    assert experts
    flops = cost_of(folder(kind)).forward
    assert flops.token == 2 * (linear + routers + experts // 2)  # 2 of 4
    assert flops.logit == 2 * model.lm_head.weight.numel()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_forward_that_ends_early_counts_what_comes_before(kind, folder):
    cost = cost_of(folder(kind))
    targets = find_targets(cost.model)
    modules = [target.input_module for target in targets]
    shares = []
    for count in (1, len(modules)):
        early = cost.forward_until(modules[:count])
        assert early.logit == 0
        shares.append(early.token / cost.forward.token)
    assert shares[0] < 0.1  # the first in order of names has its input beside the others
    assert 0.4 < shares[1] < 0.7  # of two blocks the first, and what the second begins with
    assert cost.forward_until([]) == cost.forward


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "qwen3_moe"])
def test_weights_are_counted_once(kind, folder):
    cost = cost_of(folder(kind))
    model = tiny.build(kind)
    assert cost.num_weights == sum(p.numel() for p in model.parameters())
    assert cost.weight_bytes == 4 * cost.num_weights
    assert weight_bytes(open_checkpoint(folder(kind))) == cost.weight_bytes


@pytest.mark.parametrize(
    ("dtype", "size"), [("auto", 4), ("float32", 4), ("bfloat16", 2), ("float16", 2)]
)
def test_weights_in_the_dtype_that_is_asked_for(dtype, size, folder):
    weights = sum(p.numel() for p in tiny.build("qwen2").parameters())
    assert weight_bytes(open_checkpoint(folder("qwen2")), dtype) == size * weights


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "opt"])
def test_a_rehearsed_forward_holds_what_the_real_one_does(kind, folder):
    model = tiny.build(kind)
    model.set_attn_implementation("eager")
    known = [p.untyped_storage() for p in (*model.parameters(), *model.buffers())]
    options = {} if kind == "opt" else {"logits_to_keep": 1}
    with torch.no_grad(), estimate.AliveBytes(known) as alive:
        model(**inputs(), use_cache=False, **options)
    rehearsed = cost_of(folder(kind)).peak_bytes(BATCH, LENGTH, attention="eager")
    assert rehearsed == pytest.approx(alive.peak, rel=0.3)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_rehearsed_step_holds_what_the_real_one_does(kind, tuning, folder):
    path = folder(kind)
    config = training(path, kind, tuning)
    model, _ = sft.load_trainable(config, path)
    (model.get_base_model() if tuning == "lora" else model).set_attn_implementation("eager")
    labels = inputs()["input_ids"].clone()
    labels[:, : LENGTH - ANSWER] = -100
    model.train()
    known = [p.untyped_storage() for p in (*model.parameters(), *model.buffers())]
    with objective.response_logits(model) as choose, estimate.AliveBytes(known) as alive:
        objective.response_loss(model, inputs() | {"labels": labels}, choose).backward()
    adapt = (lambda m: sft.add_lora(m, config)) if tuning == "lora" else None
    cost = cost_of(path, config, adapt)
    rehearsed = cost.peak_bytes(BATCH, LENGTH, BATCH * ANSWER, attention="eager")
    assert rehearsed == pytest.approx(alive.peak, rel=0.3)
    assert all(p.grad is None for p in cost.model.parameters())


def test_what_cannot_be_rehearsed_is_not_known(folder):
    cost = cost_of(folder("llama"))
    cost.model.forward = lambda **inputs: inputs["input_ids"].max().item()
    assert cost.peak_bytes(BATCH, LENGTH) is None
    assert cost.forward == (2 * cost.num_weights, 0, 0)


# --- refusals -------------------------------------------------------------------------------------


def configured(kind, path, **options):
    return kind(model_name_or_path=str(path), output_dir="out", dataset="x.jsonl", **options)


@pytest.mark.parametrize("left", [0, -1])
def test_weights_that_fit_exactly_are_not_refused(left, folder, monkeypatch):
    path = folder("llama")
    base = open_checkpoint(path)
    needed = weight_bytes(base)
    monkeypatch.setattr(footprint, "available_memory", lambda: needed + left)
    config = configured(CalibrateConfig, path, device="cpu")
    if left >= 0:
        check_memory(config, [base, None])
        return
    with pytest.raises(AntidoteError, match=r"need 94\.8 kB .* 94\.8 kB are available on cpu; "):
        check_memory(config, [base, None])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: configured(CalibrateConfig, p), r"need 94\.8 kB .* and 7 B are available"),
        (lambda p: configured(CalibrateConfig, p, dtype="bfloat16"), r"need 47\.4 kB"),
        (lambda p: configured(FinetuneConfig, p, poison_ratio=0), r"need 94\.8 kB"),
        (
            lambda p: configured(FinetuneConfig, p, poison_ratio=0, tuning="full"),
            r"training all weights needs 379 kB .* give --tuning lora",
        ),
    ],
)
def test_refusals_say_what_is_needed(make, words, folder, monkeypatch):
    monkeypatch.setattr(footprint, "available_memory", lambda: 7)
    path = folder("llama")
    with pytest.raises(AntidoteError, match=words) as error:
        check_memory(make(path), [open_checkpoint(path)])
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1


def test_a_gpu_is_asked_for_its_own_memory(folder, monkeypatch):
    monkeypatch.setattr(footprint, "pick_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5000, 10**9))
    path = folder("llama")
    with pytest.raises(AntidoteError, match=r"5 kB are available on cuda"):
        check_memory(configured(PruneConfig, path), [open_checkpoint(path)])


def test_a_model_that_is_spread_is_not_refused(folder, monkeypatch):
    monkeypatch.setattr(footprint, "available_memory", lambda: 7)
    path = folder("llama")
    config = configured(CalibrateConfig, path, device_map="auto")
    check_memory(config, [open_checkpoint(path)])
