"""The training loop of align and finetune, and their checks.

What a step's loss is says an objective (:mod:`antidote_fast.training.objective`).
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from antidote_fast.config.train import TrainConfig
from antidote_fast.data.batches import IGNORE_INDEX, Examples, encode_in
from antidote_fast.data.records import Record
from antidote_fast.errors import AntidoteError, DataError, UsageError, first_line
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.files.commit import check_output_folder
from antidote_fast.files.resume import Run
from antidote_fast.models.kinds import Model, Tokenizer
from antidote_fast.models.loading import check_not_quantized, load_model, open_model
from antidote_fast.models.tokens import check_examples
from antidote_fast.models.undo import undoing
from antidote_fast.system import interrupts
from antidote_fast.system.progress import Progress, track
from antidote_fast.training.checkpoints import Checkpoints
from antidote_fast.training.objective import Objective

MAX_GRAD_NORM = 1.0  # the default of transformers' Trainer, which the official code runs


def check_config(config: TrainConfig, *, merged: bool = False) -> Checkpoint:
    """Refuse, before any work, what training cannot do.

    Args:
        config: whose model it opens.
        merged: whether an adapter will be merged into the weights.

    Raises:
        UsageError: an unknown schedule, or dtype float16.
        DataError: no such model, an adapter in its place, a quantised one, or an output folder that
            is taken.
    """
    from transformers import SchedulerType

    if not config.resume:
        check_output_folder(config.output_dir, config.overwrite)
    names = [kind.value for kind in SchedulerType]
    if config.lr_scheduler_type not in names:
        raise UsageError(
            f"lr_scheduler_type={config.lr_scheduler_type!r}: must be one of {', '.join(names)}"
        )
    if config.dtype == "float16":
        # Gradients underflow in float16 without a loss scale; bfloat16 needs none.
        raise UsageError("dtype='float16': must be auto, bfloat16 or float32 in training")
    base = open_model(config)
    if merged or config.tuning == "full":
        check_not_quantized(base)
    return base


def load_trainable(config: TrainConfig, folder: str | Path) -> tuple[Model, torch.dtype]:
    """Load the model of ``folder`` and make it ready to train.

    A float16 checkpoint is trained in bfloat16. With ``tuning="lora"`` the base is frozen in its
    dtype and a new adapter in float32 put on it; with ``"full"`` every weight is held in float32.

    Returns:
        ``(model, dtype)``: the model (a ``peft.PeftModel`` for LoRA), and the dtype it computes in.
    """
    model = load_model(folder, **config.load_options)
    if model.dtype == torch.float16:
        model = model.to(torch.bfloat16)
    dtype = model.dtype
    model = add_lora(model, config) if config.tuning == "lora" else model.float()
    return model, dtype


def add_lora(model: Model, config: TrainConfig) -> Model:
    """Put a new LoRA adapter on a model: rank, scale, dropout and targets from ``config``.

    Raises:
        DataError: no module of that name, or one that cannot have an adapter.
    """
    import peft

    lora = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
        fan_in_fan_out=model.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
    )
    with _seeded(config.seed, model):
        try:
            return peft.get_peft_model(model, lora)
        except ValueError as error:
            raise DataError(
                f"lora_targets={list(config.lora_targets)!r}: cannot be put on this model: "
                f"{first_line(error)}"
            ) from error


def train(
    model: Model,
    tokenizer: Tokenizer,
    records: Sequence[Record] | Examples,
    config: TrainConfig,
    *,
    dtype: torch.dtype | None = None,
    objective: Callable[..., Objective] = Objective,
    run: Run | None = None,
    what: str = "train",
    progress: Progress = False,
) -> dict:
    """Train a model's trainable weights on records, in place.

    AdamW (no decay on biases and norms), a schedule of transformers with warm-up, gradients clipped
    at norm 1. Batches hold records of similar length and come in an order that the seed decides.

    Args:
        model: PEFT-wrapped or not; weights that do not require a gradient stay. Left in eval mode.
        tokenizer: its own; not changed.
        records: records with outputs, or what `encode` made of them.
        dtype: as :class:`Objective` takes it.
        objective: :class:`Objective`, a defense's class, or a partial of it with its data.
        run: keeps checkpoints, every ``config.save_steps`` steps and where a signal asks to stop;
            the training goes on from its last one.
        what: beside the progress bar.

    Returns:
        ``steps``, ``loss`` (one a step; a defense's whole objective), ``first_loss`` and
        ``last_loss`` (mean over the first and the last tenth of the steps), ``num_samples``,
        ``num_dropped``, ``num_truncated``, ``num_response_tokens`` (of one epoch),
        ``trainable_parameters``, ``resumed_at`` (steps that an earlier run had done), ``seconds``.

    Raises:
        DataError: no records, prompts that are all too long, a token id that the model has no
            embedding for, or a model that the defense does not fit.
        AntidoteError: a loss, a gradient or a weight that is not finite, naming the step; out of
            memory.
        Interrupted: a signal came, and ``run`` holds the state.
    """
    from transformers import get_scheduler

    start = time.perf_counter()
    examples = records
    if not isinstance(records, Examples):
        examples = encode_in(records, tokenizer, config.used_templates, config.max_seq_length)
    if not any(p.requires_grad for p in model.parameters()):
        raise DataError("the model has no weight that requires a gradient")
    check_examples(model, examples)
    goal = objective(model, tokenizer, examples, config, dtype=dtype)
    wanted = len(goal.steps)
    optimizer = torch.optim.AdamW(_decay_groups(model, config), lr=config.learning_rate)
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=math.ceil(config.warmup_ratio * wanted),
        num_training_steps=wanted,
    )

    def check(name, value, number, when="at"):
        if not math.isfinite(value):
            raise _exploded(
                f"{what}: {name} is {value} {when} step {number + 1} of {wanted}; "
                f"learning_rate={config.learning_rate} may be too high",
                run,
            )

    checkpoints = Checkpoints(run, goal, optimizer, scheduler, config.save_steps)
    stoppable = contextlib.nullcontext() if run is None else interrupts.remembered()
    model.train()
    try:
        with (
            stoppable as request,
            _seeded(config.seed, model),
            _eager_attention(model, goal.device),
            goal.attached(),
        ):
            losses = checkpoints.load()
            resumed_at = len(losses)
            for number in track(range(resumed_at, wanted), what, progress):
                loss = goal.backward(number)
                check("the loss", loss, number)
                norm = torch.nn.utils.clip_grad_norm_(goal.parameters, MAX_GRAD_NORM)
                check("the norm of the gradient", float(norm), number)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                goal.after(number)
                losses.append(loss)
                # A step that explodes shows in the next one's loss, but for one that is kept.
                if number + 1 == wanted or checkpoints.is_due(losses, request):
                    check("a weight", _largest(goal.parameters), number, "after")
                if number + 1 == wanted:
                    model.eval()
                    check("the loss", goal.loss_now(number), number, "after")
                checkpoints.after(losses, wanted, request)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise AntidoteError(
            f"{what}: out of memory with batch_size={config.batch_size}; lower it and raise "
            "gradient_accumulation_steps"
        ) from error
    finally:
        model.eval()
    tenth = max(1, len(losses) // 10)
    return {
        "steps": len(losses),
        "loss": [round(loss, 6) for loss in losses],
        "first_loss": sum(losses[:tenth]) / tenth,
        "last_loss": sum(losses[-tenth:]) / tenth,
        "num_samples": len(examples),
        "num_dropped": examples.num_dropped,
        "num_truncated": examples.num_truncated,
        "num_response_tokens": sum(
            label != IGNORE_INDEX for example in examples for label in example["labels"]
        ),
        "trainable_parameters": sum(p.numel() for p in goal.parameters),
        "resumed_at": resumed_at,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _largest(parameters) -> float:
    """The largest absolute value; NaN where there is one."""
    bounds = [torch.stack(p.detach().aminmax()).abs().amax() for p in parameters if p.numel()]
    return float(torch.stack([bound.float() for bound in bounds]).amax())


def merged(model: Model, what: str, run: Run | None = None) -> Model:
    """The base model with its adapter in its weights.

    Raises:
        AntidoteError: a weight that is not finite then; ``run`` is not kept: it would come again.
    """
    layers = model.get_base_model().named_modules()
    adapted = [name for name, module in layers if hasattr(module, "base_layer")]
    model = model.merge_and_unload()
    _check_weights([model.get_submodule(name).weight for name in adapted], what, run)
    return model


def in_dtype(model: Model, dtype: torch.dtype, what: str, run: Run | None = None) -> Model:
    """A fully tuned model in the dtype that it is saved in; raises as :func:`merged`."""
    model = model.to(dtype)
    _check_weights(list(model.parameters()), what, run)
    return model


def _check_weights(weights, what, run):
    if weights and not math.isfinite(_largest(weights)):
        dtype = str(weights[0].dtype).removeprefix("torch.")
        raise _exploded(
            f"{what}: a weight of the trained model is not finite in {dtype}; learning_rate or "
            "lora_alpha may be too high",
            run,
        )


def _exploded(text, run) -> AntidoteError:
    if run is not None:
        run.keep = False  # it would come again
    return AntidoteError(text)


def _decay_groups(model, config) -> list[dict]:
    """Matrices decay, vectors (biases, norms) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]


@contextlib.contextmanager
def _eager_attention(model, device):
    """Plain attention on a CPU: the backward pass of torch's fused one is slow there.

    16 sequences of 61 tokens (SmolLM2-135M, LoRA, bf16, one Xeon core): 2.0 s a step instead of
    2.8 s.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with undoing() as undo:
        if device.type == "cpu" and base.config._attn_implementation == "sdpa":
            undo.later(lambda: base.set_attn_implementation("sdpa"))
            base.set_attn_implementation("eager")
        yield


@contextlib.contextmanager
def _seeded(seed, model):
    """Seed torch's generators inside, and give them back as they were."""
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def save(model: Model, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a trained model (or adapter alone) and the tokenizer into a staged folder."""
    # Never look the base up on a hub to see whether its embeddings have changed.
    options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(str(folder), **options)
    tokenizer.save_pretrained(str(folder))
