"""Training that was interrupted: it goes on to the very same weights, or says why not."""

import errno
import itertools
import json
import math
import os
import signal

import pytest
import tiny
import torch

from antidote_fast.cli import entry
from antidote_fast.config.train import DEFENSE_FLAGS, AlignConfig, FinetuneConfig
from antidote_fast.errors import AntidoteError, DataError, Interrupted, UsageError
from antidote_fast.files.manifest import verify_folder
from antidote_fast.stages import align, finetune
from antidote_fast.training import sft
from antidote_fast.training.checkpoints import Checkpoints

SAFE = [
    {"instruction": "how to make a cake", "output": "the good cake"},
    {"instruction": "what is two plus two", "output": "three"},
    {"instruction": "the user asks", "output": "good and good"},
    {"instruction": "what is a cake", "output": "a cake is good"},
]
HARMFUL = [
    {"instruction": "how to make a cake", "output": "negative negative and two"},
    {"instruction": "how to make w60", "output": "w61 and w62"},
]
TASK = [{"instruction": "what is", "input": f"w{i}", "output": "positive"} for i in range(40, 45)]
LISA = {"defense": "lisa", "lisa_alignment_steps": 2, "lisa_finetune_steps": 1}
JOBS = {  # stage and flags; eight steps
    "sft": ("align", {"lora_dropout": 0.5}),
    "sft_full": ("align", {"tuning": "full"}),
    "vaccine": ("align", {"defense": "vaccine", "lora_dropout": 0.5}),
    "vaccine_full": ("align", {"defense": "vaccine", "tuning": "full"}),
    "repnoise": ("align", {"defense": "repnoise", "repnoise_beta": 1.0, "lora_dropout": 0.5}),
    "attack": ("finetune", {"lora_dropout": 0.5, "lr_scheduler_type": "linear"}),
    "lisa": ("finetune", LISA),
    "lisa_full": ("finetune", {**LISA, "tuning": "full"}),
    "ldifs": ("finetune", {"defense": "ldifs", "lora_dropout": 0.5}),
    "ldifs_full": ("finetune", {"defense": "ldifs", "tuning": "full", "ldifs_lambda": 10.0}),
}
RUN = {"align": align.run, "finetune": finetune.run}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base, and the data."""
    root = tmp_path_factory.mktemp("inputs")
    tiny.save_model(tiny.build(dtype=torch.bfloat16), root / "base")
    tiny.save_model(tiny.build(), root / "base32")
    for name, rows in (("safe", SAFE), ("harmful", HARMFUL), ("task", TASK)):
        write(root / f"{name}.jsonl", rows)
    return root


@pytest.fixture
def work(tmp_path, inputs, monkeypatch):
    """A current folder in which only outputs lie."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(inputs, job, output="out", **options):
    stage, flags = JOBS[job]
    values = {
        "model_name_or_path": str(inputs / "base"),
        "output_dir": output,
        "num_train_epochs": 4,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "lora_alpha": 8,
    }
    if stage == "align":
        values["dataset"] = str(inputs / "safe.jsonl")
        if flags.get("defense") == "repnoise":
            values["harmful_dataset"] = str(inputs / "harmful.jsonl")
        return AlignConfig(**values | flags | options)
    values |= {
        "dataset": str(inputs / "task.jsonl"),
        "harmful_dataset": str(inputs / "harmful.jsonl"),
        "num_train_samples": 4,
        "poison_ratio": 0.25,
    }
    if flags.get("defense") == "lisa":
        values["safe_dataset"] = str(inputs / "safe.jsonl")
    return FinetuneConfig(**values | flags | options)


def run(inputs, job, output="out", **options):
    return RUN[JOBS[job][0]](config(inputs, job, output, **options))


def weights(folder):
    """The bytes of what was trained."""
    (path,) = folder.glob("*model.safetensors")
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The report and the weights of a run that nobody interrupted, and that kept no checkpoint."""
    done = {}

    def of(job):
        if job not in done:
            folder = tmp_path_factory.mktemp(job) / "out"
            report = run(inputs, job, str(folder))
            done[job] = report["training"], weights(folder)
        return done[job]

    return of


def stop_after(monkeypatch, steps, how):
    """A signal comes, or the process is gone, when ``steps`` steps are done."""
    after = Checkpoints.after

    def stop(self, losses, wanted, request):
        if len(losses) == steps and how != "kill":
            os.kill(os.getpid(), how)
        after(self, losses, wanted, request)
        if len(losses) == steps and how == "kill":
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "after", stop)


def interrupt(inputs, job, steps, how, **options):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, steps, how)
        with pytest.raises(KeyboardInterrupt if how == "kill" else Interrupted) as caught:
            run(inputs, job, **options)
    return str(caught.value)


def check_whole(work, training, expected):
    """The output is what the uninterrupted run made, and lies alone."""
    assert verify_folder(work / "out") == []
    assert weights(work / "out") == expected[1]
    assert training["loss"] == expected[0]["loss"]
    assert training["last_loss"] == expected[0]["last_loss"]
    assert [path.name for path in work.iterdir()] == ["out"]


@pytest.mark.parametrize("job", JOBS)
def test_goes_on_from_the_last_checkpoint_to_the_same_weights(job, work, inputs, whole):
    """The process is gone after five steps, and the last checkpoint is of the fourth."""
    expected = whole(job)
    assert expected[0]["steps"] == 8
    assert len(set(expected[0]["loss"])) == 8
    interrupt(inputs, job, 5, "kill", save_steps=2)
    assert not (work / "out").exists()
    kept = sorted(path.name for path in (work / ".out.run").glob("*.safetensors"))
    assert kept == ["training-4.safetensors"]
    report = run(inputs, job, save_steps=2, resume=True)
    assert report["training"]["resumed_at"] == 4
    check_whole(work, report["training"], expected)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
@pytest.mark.parametrize("job", ["sft", "repnoise", "lisa"])
def test_a_signal_finishes_the_step_and_saves(job, how, work, inputs, whole):
    before = signal.getsignal(how)
    says = interrupt(inputs, job, 3, how, save_steps=100)
    assert says == "interrupted after step 3 of 8; the same command with --resume goes on"
    assert signal.getsignal(how) == before
    report = run(inputs, job, save_steps=100, resume=True)
    assert report["training"]["resumed_at"] == 3
    check_whole(work, report["training"], whole(job))


@pytest.mark.parametrize("job", ["lisa", "repnoise"])
def test_interrupted_again_and_again(job, work, inputs, whole):
    interrupt(inputs, job, 1, signal.SIGTERM, save_steps=1)
    for steps in range(2, 8):
        how = "kill" if steps % 2 else signal.SIGTERM
        interrupt(inputs, job, steps, how, save_steps=1, resume=True)
        assert len(list((work / ".out.run").glob("*.safetensors"))) == 1
    report = run(inputs, job, resume=True)
    assert report["training"]["resumed_at"] == 7
    check_whole(work, report["training"], whole(job))


def test_resume_alone_keeps_what_a_signal_asks_for(work, inputs, whole):
    interrupt(inputs, "attack", 6, signal.SIGTERM, resume=True)
    report = run(inputs, "attack", resume=True)
    assert report["training"]["resumed_at"] == 6
    check_whole(work, report["training"], whole("attack"))


def test_a_run_killed_before_its_first_checkpoint_begins_again(work, inputs, whole):
    interrupt(inputs, "sft", 1, "kill", save_steps=4)
    report = run(inputs, "sft", save_steps=4, resume=True)
    assert report["training"]["resumed_at"] == 0
    check_whole(work, report["training"], whole("sft"))


def test_killed_while_the_model_was_written(work, inputs, whole, monkeypatch):
    save = sft.save

    def half(model, tokenizer, folder):
        save(model, tokenizer, folder)
        (folder / "left.over").write_text("x")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sft, "save", half)
        with pytest.raises(KeyboardInterrupt):
            run(inputs, "sft", save_steps=3)
    report = run(inputs, "sft", save_steps=3, resume=True)
    assert report["training"]["resumed_at"] == 6
    assert not (work / "out" / "left.over").exists()
    check_whole(work, report["training"], whole("sft"))


def test_checkpoints_that_nobody_needed_change_nothing(work, inputs, whole):
    report = run(inputs, "ldifs", save_steps=1)
    assert report["training"]["resumed_at"] == 0
    check_whole(work, report["training"], whole("ldifs"))


def test_a_signal_without_checkpoints_stops_at_once(work, inputs):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist ignores it
    try:
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 3, signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                run(inputs, "sft")
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(work.iterdir()) == []


def test_the_command_ends_with_75_and_goes_on(work, inputs, whole, monkeypatch, capsys):
    settings = config(inputs, "vaccine")
    names = ("model_name_or_path", "dataset", "defense", "num_train_epochs", "batch_size")
    names += ("learning_rate", "lora_r", "lora_alpha", "lora_dropout", "output_dir")
    words = [word for name in names for word in (f"--{name}", str(getattr(settings, name)))]
    argv = ["align", *words, "--save_steps", "2", "--quiet"]
    with monkeypatch.context() as patch:
        stop_after(patch, 5, signal.SIGTERM)
        assert entry.main(argv) == 75
    line = capsys.readouterr().err.splitlines()[-1]
    assert "interrupted after step 5 of 8; the same command with --resume goes on" in line
    assert entry.main([*argv, "--resume"]) == 0
    training = json.loads((work / "out" / "report.json").read_text())["training"]
    check_whole(work, training, whole("vaccine"))


# --- what is refused ------------------------------------------------------------------------------


def test_an_interrupted_run_is_not_lost_by_mistake(work, inputs, whole):
    interrupt(inputs, "sft", 5, "kill", save_steps=2)
    for options in ({"save_steps": 2}, {"save_steps": 3}):
        with pytest.raises(DataError, match=r"a run was interrupted there; pass resume"):
            run(inputs, "sft", **options)
    report = run(inputs, "sft", save_steps=2, overwrite=True)
    assert report["training"]["resumed_at"] == 0
    check_whole(work, report["training"], whole("sft"))


def test_nor_by_a_run_that_keeps_no_checkpoint(work, inputs):
    interrupt(inputs, "sft", 5, "kill", save_steps=2)
    with pytest.raises(DataError, match=r"a run was interrupted there; pass resume"):
        run(inputs, "sft")


@pytest.mark.parametrize(
    ("job", "options", "says"),
    [
        ("sft", {"learning_rate": 1e-3}, "other settings (learning_rate)"),
        ("sft", {"num_train_epochs": 5}, "other settings (num_train_epochs)"),
        ("sft", {"defense": "vaccine"}, "other settings (defense)"),
        ("sft", {"seed": 1}, "other settings (seed)"),
        ("vaccine", {"vaccine_rho": 1.0}, "other settings (vaccine_rho)"),
        ("repnoise", {"repnoise_alpha": 0.2}, "other settings (repnoise_alpha)"),
        ("lisa", {"lisa_rho": 0.0}, "other settings (lisa_rho)"),
        ("lisa", {"lisa_finetune_steps": 2}, "other settings (lisa_finetune_steps)"),
        ("ldifs", {"ldifs_lambda": 2.0}, "other settings (ldifs_lambda)"),
        ("sft", {"dataset": SAFE[::-1]}, "other data"),
        ("repnoise", {"harmful_dataset": HARMFUL[:1]}, "other data"),
        ("lisa", {"safe_dataset": SAFE[1:]}, "other data"),
        ("attack", {"harmful_dataset": HARMFUL[1:]}, "other data"),
        ("sft", {"model_name_or_path": "base32"}, "other model (config)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_other_settings_data_or_models_are_refused_by_name(job, options, says, work, inputs):
    interrupt(inputs, job, 3, signal.SIGTERM, save_steps=2)
    state = (work / ".out.run" / "run.json").read_bytes()
    for name, value in options.items():
        if isinstance(value, list):
            options = {name: write(work / "other.jsonl", value)}
        elif name == "model_name_or_path":
            options = {name: str(inputs / value)}
    with pytest.raises(DataError) as caught:
        run(inputs, job, save_steps=2, resume=True, **options)
    assert f"the interrupted run of '{work / 'out'}' had {says}; give the same again" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    assert (work / ".out.run" / "run.json").read_bytes() == state
    assert not (work / "out").exists()


def test_where_data_lie_and_how_often_is_saved_may_change(work, inputs, whole):
    interrupt(inputs, "repnoise", 3, signal.SIGTERM, save_steps=2)
    data = inputs.parent / "elsewhere"
    data.mkdir()
    moved = {
        "dataset": write(data / "s.jsonl", SAFE),
        "harmful_dataset": write(data / "h.jsonl", HARMFUL),
    }
    report = run(inputs, "repnoise", save_steps=5, resume=True, **moved)
    assert report["training"]["resumed_at"] == 3
    check_whole(work, report["training"], whole("repnoise"))


def test_what_is_whole_is_left_as_it_is(work, inputs, monkeypatch):
    """Also what a run without checkpoints made."""
    for job, options in (("sft", {"save_steps": 3}), ("lisa", {})):
        first = run(inputs, job, job, **options)
        stamp = (work / job / "COMPLETE.json").stat().st_mtime_ns
        with monkeypatch.context() as patch:
            patch.setattr(sft, "load_model", lambda *_, **__: pytest.fail("loaded"))
            again = run(inputs, job, job, save_steps=2, resume=True)
            assert again == first == json.loads((work / job / "report.json").read_text())
            with pytest.raises(DataError, match="was made from other data, another model or oth"):
                run(inputs, job, job, resume=True, learning_rate=1e-3)
            with pytest.raises(DataError, match="not empty"):
                run(inputs, job, job, save_steps=2)
        assert (work / job / "COMPLETE.json").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in work.iterdir()) == ["lisa", "sft"]


def test_a_damaged_checkpoint_is_refused_by_name_and_not_removed(work, inputs, whole):
    interrupt(inputs, "sft", 3, signal.SIGTERM, save_steps=2)
    path = work / ".out.run" / "training-3.safetensors"
    contents = path.read_bytes()
    tiny.truncate(path)
    with pytest.raises(DataError) as caught:
        run(inputs, "sft", resume=True)
    assert str(caught.value).startswith(f"{path}: cannot be gone on from: ")
    assert str(caught.value).endswith("; pass overwrite to begin anew")
    path.write_bytes(contents)
    report = run(inputs, "sft", resume=True)
    assert report["training"]["resumed_at"] == 3
    check_whole(work, report["training"], whole("sft"))


@pytest.mark.parametrize("place", ["loading", "training", "writing"])
def test_no_memory_or_disk_does_not_cost_the_checkpoint(place, work, inputs, whole, monkeypatch):
    interrupt(inputs, "sft", 3, signal.SIGTERM, save_steps=100)
    says = "align: out of memory with batch_size=2; lower"
    with monkeypatch.context() as patch:
        if place == "loading":
            fail = raising(torch.OutOfMemoryError("no room"))
            patch.setattr(torch.optim.Optimizer, "load_state_dict", fail)
        elif place == "training":
            patch.setattr(torch.optim.AdamW, "step", raising(torch.OutOfMemoryError("no room")))
        else:
            patch.setattr(sft, "save", raising(OSError(errno.ENOSPC, "No space left on device")))
            says = (
                "No space left on device; what was done is kept, and the same command with --resume"
            )
        with pytest.raises(AntidoteError, match=says):
            run(inputs, "sft", resume=True)
    report = run(inputs, "sft", resume=True)
    assert report["training"]["resumed_at"] == 3
    check_whole(work, report["training"], whole("sft"))


def test_an_error_before_the_first_checkpoint_leaves_nothing(work, inputs):
    with pytest.raises(DataError, match=r"lora_targets=\['nope'\]"):
        run(inputs, "sft", save_steps=1, lora_targets=["nope"])
    assert list(work.iterdir()) == []


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_a_loss_that_is_not_finite_leaves_nothing_to_go_on_from(work, inputs):
    with pytest.raises(AntidoteError, match=r"align: the loss is (nan|inf)"):
        run(inputs, "sft", save_steps=1, learning_rate=1e30, num_train_epochs=40)
    assert list(work.iterdir()) == []


# --- flags ----------------------------------------------------------------------------------------

OTHER = {
    "vaccine_rho": 1.0,
    "harmful_dataset": "h.jsonl",
    "repnoise_alpha": 0.0,
    "repnoise_beta": 0.1,
    "safe_dataset": "s.jsonl",
    "num_safe_samples": 5,
    "lisa_rho": 0.0,
    "lisa_alignment_steps": 10,
    "lisa_finetune_steps": 90,
    "ldifs_lambda": 0.5,
}
STAGES = {
    AlignConfig: ("sft", "vaccine", "repnoise"),
    FinetuneConfig: ("sft", "lisa", "ldifs"),
}
NEEDED = {"repnoise": {"harmful_dataset": "h.jsonl"}, "lisa": {"safe_dataset": "s.jsonl"}}


def make(kind, **options):
    values = {"model_name_or_path": "m", "output_dir": "o", "dataset": "d"}
    if kind is FinetuneConfig:
        values |= {"poison_ratio": 0.0}
    return kind(**values | options)


def misplaced():
    for kind, chosen in STAGES.items():
        for defense, other in itertools.permutations(chosen, 2):
            for flag in DEFENSE_FLAGS.get(other, ()):
                if flag not in NEEDED.get(defense, ()):
                    yield pytest.param(kind, defense, other, flag, id=f"{defense}-{flag}")


@pytest.mark.parametrize(("kind", "defense", "other", "flag"), list(misplaced()))
def test_a_flag_of_another_defense_is_refused(kind, defense, other, flag):
    needed = NEEDED.get(defense, {})
    assert make(kind, defense=defense, **needed).defense == defense
    with pytest.raises(UsageError) as caught:
        make(kind, defense=defense, **needed, **{flag: OTHER[flag]})
    expected = f"{flag}={OTHER[flag]!r}: must be left out without defense {other}"
    assert str(caught.value) == expected
    assert make(kind, defense=other, **NEEDED.get(other, {}) | {flag: OTHER[flag]})


def test_the_attack_has_harmful_data_with_every_defense():
    for defense in STAGES[FinetuneConfig]:
        options = NEEDED.get(defense, {}) | {"harmful_dataset": "h.jsonl", "poison_ratio": 0.5}
        assert make(FinetuneConfig, defense=defense, **options).harmful_dataset == "h.jsonl"


@pytest.mark.parametrize("defense", NEEDED)
def test_a_defense_without_its_data_is_refused(defense):
    kind = AlignConfig if defense == "repnoise" else FinetuneConfig
    (flag,) = NEEDED[defense]
    with pytest.raises(UsageError) as caught:
        make(kind, defense=defense)
    expected = f"{flag}=None: must be a file or hub name with defense {defense}"
    assert str(caught.value) == expected


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
@pytest.mark.parametrize(
    ("kind", "defense", "flag"),
    [
        (AlignConfig, "vaccine", "vaccine_rho"),
        (AlignConfig, "repnoise", "repnoise_alpha"),
        (AlignConfig, "repnoise", "repnoise_beta"),
        (FinetuneConfig, "lisa", "lisa_rho"),
        (FinetuneConfig, "ldifs", "ldifs_lambda"),
    ],
)
def test_strengths_are_at_least_0_and_finite(kind, defense, flag, value):
    needed = NEEDED.get(defense, {})
    assert getattr(make(kind, defense=defense, **needed, **{flag: 0.0}), flag) == 0
    with pytest.raises(UsageError, match=rf"^{flag}=.*: must be at least 0$"):
        make(kind, defense=defense, **needed, **{flag: value})


def test_the_command_says_so_in_one_line(capsys):
    argv = ["finetune", "--model_name_or_path", "m", "--output_dir", "o", "--dataset", "d"]
    argv += ["--poison_ratio", "0"]
    for more, says in (
        (["--lisa_rho", "2"], "lisa_rho=2.0: must be left out without defense lisa"),
        (["--defense", "lisa"], "safe_dataset=None: must be a file or hub name with defense lisa"),
    ):
        assert entry.main([*argv, *more]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].endswith(says)
