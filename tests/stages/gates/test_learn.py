"""Learned gates: gradients, updates, selections, what is restored, and refusals of live models."""

import copy
import functools

import plain_prune
import pytest
import refusing_models
import torch
from refusing_models import HARM, NUM_TOKENS, ORDINARY, PRESERVE, TASK
from torch.nn import functional as F

from antidote_fast import AntidoteError, DataError, Selection, UsageError, ops, prune_model_
from antidote_fast.config.prune import GateMixture
from antidote_fast.data.batches import collate, encode
from antidote_fast.evaluation.measure import answer_sets
from antidote_fast.evaluation.phrases import is_refusal
from antidote_fast.models.targets import find_targets
from antidote_fast.pruning.evidence import Evidence
from antidote_fast.pruning.layers import prepare
from antidote_fast.pruning.prune import prune_state_
from antidote_fast.stages.gates import learn as gates
from antidote_fast.stages.gates.answers import KINDS, Answers, answer_prompts, fill_pools
from antidote_fast.stages.gates.learn import learn_gates

# Every record once a step, so that neither order nor seed matters.
ALL = GateMixture(ordinary_weight=1.5, harmful=len(HARM), task=len(TASK), ordinary=len(ORDINARY))
HALF = Selection(0.5, scope="tensor")


class Stop(Exception):
    pass


@functools.cache
def _made(kind, lora):
    return refusing_models.attacked(kind, lora), refusing_models.aligned(kind)


def models(kind="llama", lora=True):
    """(attacked, aligned) to do with as one likes."""
    return copy.deepcopy(_made(kind, lora))


@functools.cache
def _said(kind):
    """The aligned model's answers."""
    return answer_prompts(
        _made(kind, False)[1],
        refusing_models.tokenizer(),
        HARM,
        PRESERVE,
        answer_tokens=6,
        max_seq_length=NUM_TOKENS,
    )


def whole(kind):
    """(attacked whole model, options of learn_gates that a whole model needs)."""
    model, aligned = models(kind, lora=False)
    base = {name: p.detach().clone() for name, p in aligned.named_parameters()}
    return model, {"aligned": _said(kind), "base_weights": base}


def learn(model, selection=HALF, harmful=HARM, preserve=PRESERVE, **options):
    options = {"max_seq_length": NUM_TOKENS, "mixture": ALL, "batch_size": 64} | options
    return learn_gates(model, refusing_models.tokenizer(), harmful, preserve, selection, **options)


def plain_losses(model, answers):
    """{kind: mean loss} over all records, from whole logits."""
    words = refusing_models.tokenizer()
    sets = {
        "harmful": [
            refusing_models.said([r], a)[0] for r, a in zip(HARM, answers.harmful, strict=True)
        ],
        "task": TASK,
        "ordinary": [
            refusing_models.said([r], a)[0] for r, a in zip(ORDINARY, answers.ordinary, strict=True)
        ],
    }
    found = {}
    for kind, records in sets.items():
        batch = collate(encode(records, words, max_seq_length=NUM_TOKENS), words)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits[:, :-1].transpose(1, 2)
        found[kind] = F.cross_entropy(logits, batch["labels"][:, 1:])
    return found


def total(losses):
    return losses["harmful"] + losses["task"] + 1.5 * losses["ordinary"]


def state(model):
    """Bits, flags, modes and gradients."""
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    return weights, flags, [module.training for module in model.modules()]


def same_state(one, other):
    bits = [[w.view(torch.uint8) for w in each[0].values()] for each in (one, other)]
    return (
        all(map(torch.equal, *bits))
        and all(a[0] == b[0] and a[1] is b[1] for a, b in zip(one[1], other[1], strict=True))
        and one[2] == other[2]
    )


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "llama", "gpt2"])
def test_gradients_against_finite_differences(kind, monkeypatch):
    if kind == "adapter":
        model, options = models()[0], {}
    else:
        model, options = whole(kind)
    found = {}

    def step(gate, size, number):
        found[gate.key] = gate._gradient * gate._difference()
        if len(found) == len(find_targets(model)):
            raise Stop

    monkeypatch.setattr(gates._Gate, "step", step)
    with pytest.raises(Stop):
        learn(model, Selection(0.3), batch_size=4, steps=2, **options)
    exact = copy.deepcopy(model)
    targets = find_targets(exact)
    exact.double()
    bases, answers = options.get("base_weights"), _said("gpt2" if kind == "gpt2" else "llama")
    originals = [(t, t.weight.detach().clone()) for t in targets]
    shares = {}

    def put(target, original):
        turn = (lambda w: w.t()) if target.transposed else (lambda w: w)
        base = 0 if bases is None else turn(bases[target.key].double())
        value = base + shares[target.key] * (turn(original) - base)
        with torch.no_grad():
            target.weight.copy_(turn(value))

    for target, original in originals:
        shape = original.t().shape if target.transposed else original.shape
        shares[target.key] = torch.full(shape, 0.7, dtype=torch.float64)
        put(target, original)
    for target, original in originals:
        gradient = found[target.key]
        place = divmod(int(gradient.abs().argmax()), gradient.shape[1])
        losses = []
        for change in (0.005, -0.005):  # norms compute in fp32
            shares[target.key][place] = 0.7 + change
            put(target, original)
            with torch.no_grad():
                losses.append(float(total(plain_losses(exact, answers))))
        shares[target.key][place] = 0.7
        put(target, original)
        difference = (losses[0] - losses[1]) / 0.01
        assert float(gradient[place]) == pytest.approx(difference, rel=2e-3)


def test_a_step_is_that_of_adam():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 7, generator=generator))
    layers, _ = prepare({"w": weight.detach()}, Evidence(score="gate"), HALF.scope)
    gate = gates._Gate(layers[0], weight, HALF)
    m = torch.full((5, 7), 0.5, dtype=torch.float64)
    first = second = torch.zeros_like(m)
    for number in (1, 2, 3):
        gradient = torch.randn(5, 7, generator=generator)
        weight.grad = gradient.clone()
        gate.take_gradient()
        assert weight.grad is None
        gate.step(0.3, number)
        product = gradient.double() * weight.detach().double()
        first = 0.9 * first + 0.1 * product
        second = 0.95 * second + 0.05 * product**2
        change = (first / (1 - 0.9**number)) / ((second / (1 - 0.95**number)).sqrt() + 1e-9)
        m = (m - 0.3 * change).clamp(0, 1)
        torch.testing.assert_close(gate.m.double(), m, atol=1e-5, rtol=0)
    assert {0.0, 1.0} & set(m.flatten().tolist())


@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_against_a_plain_loop(scope):
    model, steps, rate = models()[0], 6, 0.08
    selection = Selection(0.4, scope=scope)
    scores, counts = learn(model, selection, steps=steps, learning_rate=rate, batch_size=4)
    answers = _said("llama")
    targets = find_targets(model)
    original = {t.key: t.weight.detach().clone() for t in targets}
    m = {key: torch.full_like(w, 0.6) for key, w in original.items()}
    first, second = ({key: torch.zeros_like(w) for key, w in m.items()} for _ in range(2))
    losses = []
    for k in range(steps):
        removed = plain_prune.selected({key: 1 - x for key, x in m.items()}, None, selection)
        for t in targets:
            share = m[t.key] if k < 3 else (~removed[t.key]).float()
            t.weight.detach().copy_(share * original[t.key])
            t.weight.requires_grad_(True)
        loss = plain_losses(model, answers)
        grads = torch.autograd.grad(total(loss), [t.weight for t in targets])
        losses.append({kind: float(value.detach()) for kind, value in loss.items()})
        size = rate * (1 if k < 3 else (steps - k) / 3)
        for t, grad in zip(targets, grads, strict=True):
            g = grad * original[t.key]
            first[t.key] = 0.9 * first[t.key] + 0.1 * g
            second[t.key] = 0.95 * second[t.key] + 0.05 * g**2
            scaled = (second[t.key] / (1 - 0.95 ** (k + 1))).sqrt() + 1e-9
            m[t.key] = (m[t.key] - size * first[t.key] / (1 - 0.9 ** (k + 1)) / scaled).clamp(0, 1)
    assert counts["loss_first"] == pytest.approx(losses[0], abs=1e-4)
    assert counts["loss_last"] == pytest.approx(losses[-1], rel=0.05, abs=1e-3)
    # Adam's first steps are as large for a gradient that is rounding alone, whatever its sign.
    close = torch.cat([((1 - m[key]) - scores[key]).abs().flatten() < 1e-2 for key in m])
    assert close.float().mean() > 0.98


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_the_weights_on_the_way(kind, scope, monkeypatch):
    model, options = whole(kind)
    selection = Selection(0.3, scope=scope)
    targets = find_targets(model)
    original = {t.key: t.weight.detach().clone() for t in targets}
    base = {t.key: options["base_weights"][t.key] for t in targets}
    seen, put = [], gates._put

    def watched(*args):
        put(*args)
        seen.append({t.key: t.weight.detach().clone() for t in targets})

    monkeypatch.setattr(gates, "_put", watched)
    learn(model, selection, steps=4, **options)
    assert len(seen) == 4
    turned = {t.key for t in targets if t.transposed}
    # Gates of 0.7 as fp32, of which 1 - 0.3 is the nearest.
    share = torch.tensor(1 - selection.ratio)
    for key, weight in seen[0].items():
        assert torch.equal(weight, base[key] + share * (original[key] - base[key]))
    differing = {key: original[key] != base[key] for key in original}
    count = 0
    for key, weight in seen[-1].items():
        fallen = weight == base[key]
        assert torch.equal(weight, torch.where(fallen, base[key], original[key]))
        fallen = (fallen & differing[key]).t() if key in turned else fallen & differing[key]
        count += int(fallen.sum())
        if scope == "row":
            assert int(fallen.sum(1).max()) <= -(-fallen.shape[1] * 3 // 10)
    assert count == pytest.approx(0.3 * sum(w.numel() for w in original.values()), rel=0.1)


@pytest.mark.parametrize("n_m", [None, (2, 4)])
@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_what_is_pruned_is_what_the_scores_select(scope, n_m):
    if n_m and scope != "row":
        pytest.skip("n_m is of a row")
    model = models()[0]
    selection = Selection(None if n_m else 0.5, scope=scope, n_m=n_m)
    scores, counts = learn(model, selection, steps=10)
    kept = {key: score.clone() for key, score in scores.items()}
    original = {t.key: t.weight.detach().clone() for t in find_targets(model)}
    report = prune_model_(model, None, selection, score="gate", scores=scores, return_masks=True)
    assert all(torch.equal(kept[key], score) for key, score in scores.items())
    if scope == "global":
        masks = plain_prune.selected(scores, None, selection)
    else:
        masks = {k: ops.select_mask(s, selection).to_bool() for k, s in scores.items()}
    for target in find_targets(model):
        mask = report.masks[target.key].to_bool()
        assert torch.equal(mask, masks[target.key])
        assert torch.equal(target.weight, original[target.key].masked_fill(mask, 0))
    assert report.num_pruned == sum(int(mask.sum()) for mask in masks.values())
    assert counts["harmful"]["num_used"] == len(HARM)


def test_the_gates_bring_refusals_back_and_keep_the_rest():
    model = models()[0]
    sets = {"harmful": HARM, "task": TASK, "ordinary": ORDINARY}
    options = {"max_new_tokens": 6}
    before = answer_sets(model, refusing_models.tokenizer(), sets, **options)
    assert not any(map(is_refusal, before["harmful"]))
    scores, counts = learn(model)
    assert total(counts["loss_last"]) < total(counts["loss_first"]) / 2
    prune_model_(model, None, HALF, score="gate", scores=scores)
    after = answer_sets(model, refusing_models.tokenizer(), sets, **options)
    assert all(map(is_refusal, after["harmful"]))
    assert after["task"] == [record.output for record in TASK]
    assert after["ordinary"] == _said("llama").ordinary


def test_a_seed_decides():
    few = {"mixture": GateMixture(harmful=2, task=1, ordinary=2), "steps": 4}
    model = models()[0]
    one, again, other = (learn(model, seed=seed, **few)[0] for seed in (0, 0, 1))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


# --- what is left as it was -----------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["adapter", "bfloat16", "gpt2"])
def test_the_model_ends_as_it_began(kind, fails, monkeypatch):
    if kind == "gpt2":
        model, options = whole("gpt2")
    else:
        model, options = models()[0], {}
    if kind == "bfloat16":
        model.to(torch.bfloat16)
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    model.train()
    next(model.modules()).training = False
    before = state(model)
    if fails:
        finite = gates._check_finite

        def check(loss, step):
            finite(loss, step)
            if step == 2:
                raise Stop

        monkeypatch.setattr(gates, "_check_finite", check)
        with pytest.raises(Stop):
            learn(model, steps=4, **options)
    else:
        learn(model, steps=4, **options)
    assert same_state(state(model), before)


def test_the_aligned_model_is_the_one_without_the_adapter(monkeypatch):
    model, aligned = models()
    asked = []
    answer = gates.answer_prompts

    def answer_prompts(live, *args, **options):
        asked.append(answer(live, *args, **options))
        return asked[-1]

    monkeypatch.setattr(gates, "answer_prompts", answer_prompts)
    learn(model, steps=1)
    assert asked == [_said("llama")]
    assert all(map(is_refusal, asked[0].harmful))

    def fails(*args, **options):
        raise Stop

    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        assert not torch.equal(before, aligned(input_ids=ids).logits)
    monkeypatch.setattr(gates, "answer_prompts", fails)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(Stop):
        learn(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert [p.requires_grad for p in model.parameters()] == flags


# --- data -----------------------------------------------------------------------------------------


def fill(harmful, preserve, said_harmful, said_ordinary, **options):
    answers = Answers(said_harmful, said_ordinary)
    options = {"answer_tokens": 3, "max_seq_length": NUM_TOKENS} | options
    return fill_pools(refusing_models.tokenizer(), harmful, preserve, answers, **options)


def test_what_is_left_out_is_counted():
    pools = fill(
        HARM,
        PRESERVE,
        ["i cannot make a cake", "sorry, but", "i cannot", "the good cake", None, "i cannot"],
        ["what two", "i cannot", "", None, "what two plus three"],
    )
    assert pools.counts == {
        "harmful": {"num_records": 6, "num_used": 5, "num_dropped": 1, "num_not_refused": 1},
        "task": {"num_records": 5, "num_used": 5, "num_dropped": 0, "num_truncated": 0},
        "ordinary": {
            "num_records": 5,
            "num_used": 2,
            "num_dropped": 1,
            "num_refused": 1,
            "num_empty": 1,
        },
    }
    words = refusing_models.tokenizer()
    told = {
        kind: [words.decode([i for i in e["labels"] if i != -100]) for e in examples]
        for kind, examples in pools.examples.items()
    }
    # An answer that was cut has no end; the prompt that was answered gets the commonest refusal.
    assert told == {
        "harmful": ["i cannot make", "sorry <unk> <unk>", *["i cannot </s>"] * 3],
        "task": ["positive </s>"] * 5,
        "ordinary": ["what two </s>", "what two plus"],
    }


@pytest.mark.parametrize(
    ("preserve", "kinds"), [(TASK, ["harmful", "task"]), (ORDINARY, ["harmful", "ordinary"])]
)
def test_one_kind_to_preserve_is_enough(preserve, kinds):
    _, counts = learn(models()[0], preserve=preserve, steps=2)
    assert list(counts["loss_first"]) == kinds
    assert [kind for kind in KINDS if kind in counts] == kinds


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: must be an integer of at least 1"),
        ({"learning_rate": 0}, "learning_rate=0: must be a finite number above 0"),
        ({"selection": 0.5}, "selection=0.5: must be a Selection"),
        ({"selection": Selection(0.5, largest=False)}, "selection.largest=False: must be True"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(UsageError, match=message.replace(".", r"\.")) as refusal:
        learn(models()[0], **options)
    assert "\n" not in str(refusal.value)


def test_models_that_no_gates_can_be_put_on():
    model = models()[1]
    with pytest.raises(UsageError, match="aligned=None: must be the aligned model's Answers"):
        learn(model)
    model.config.quantization_config = {"quant_method": "x"}
    with pytest.raises(UsageError, match="must not be quantised"):
        learn(model)
    model.lm_head.to("meta")
    with pytest.raises(UsageError, match="is on cpu, meta; must be on one device"):
        learn(model)


def test_too_little_to_learn_from():
    refused, said = ["i cannot"] * 6, ["what two"] * 5
    with pytest.raises(DataError, match="refuses 1 of 6 harmful prompts; at least 2 refusals"):
        fill(HARM, PRESERVE, ["i cannot", *["the cake"] * 5], said)
    with pytest.raises(DataError, match="preserve_dataset: none of its 5 records can be used"):
        fill(HARM, ORDINARY, refused, ["i cannot"] * 5)
    with pytest.raises(DataError, match="holds 6 and 4 answers for 6 harmful and 5 ordinary"):
        fill(HARM, PRESERVE, refused, said[:4])
    long = refusing_models.said(TASK, " ".join(["positive"] * 60))
    with pytest.raises(UsageError, match="max_seq_length=512: must be at most 64, the positions"):
        learn(models()[0], preserve=long, max_seq_length=512)


def test_a_loss_that_is_not_finite():
    model = models()[0]
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = float("nan")
    before = state(model)
    with pytest.raises(AntidoteError, match="gates: the harmful loss is nan in step 1"):
        learn(model, aligned=_said("llama"))
    assert same_state(state(model), before)


def test_scores_that_do_not_fit():
    weights = {"w": torch.ones(2, 3)}
    scores = {"w": torch.ones(2, 3)}

    def refused(error, message, given=None, score="gate", **options):
        with pytest.raises(error, match=message):
            prune_state_(weights, Evidence(score=score, scores=given), HALF, **options)
        assert torch.equal(weights["w"], torch.ones(2, 3))

    refused(UsageError, "scores=None: must be given where score='gate'")
    refused(UsageError, "scores: must be left out where score='random'", scores, score="random")
    refused(DataError, "scores: hold no weight 'w'", {})
    refused(DataError, r"w: is torch.float32 \(3, 2\) in scores", {"w": torch.ones(3, 2)})
    refused(DataError, "w: is torch.float64", {"w": torch.ones(2, 3).double()})
    for value in (-1.0, float("nan"), float("inf")):
        bad = torch.ones(2, 3)
        bad[1, 2] = value
        refused(DataError, "w: its scores must be finite and at least 0", {"w": bad})
    refused(UsageError, "cut: must be left out where score='gate'", scores, cut=object())
    delta = Selection(0.5, score_delta=True)
    with pytest.raises(UsageError, match="score_delta=True: must be left out where score='gate'"):
        prune_state_(weights, Evidence(score="gate", scores=scores, base_weights=weights), delta)
