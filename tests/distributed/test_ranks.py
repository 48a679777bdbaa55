"""Calibration shared by two gloo processes: sums, masks, commands, and how errors end."""

import json
import signal
import subprocess
import sys
import time

import pytest
import ranks
import tiny
import torch
from safetensors.torch import load_file

from antidote_fast import (
    ActivationNorms,
    AntidoteError,
    DataError,
    Selection,
    UsageError,
    __version__,
    oneshot,
    prune_model_,
)
from antidote_fast.cli import entry
from antidote_fast.config.prune import CalibrateConfig
from antidote_fast.distributed.ranks import (
    ALONE,
    TIMEOUT,
    World,
    _take_gpu,
    ranks_launched,
    session,
    world,
)
from antidote_fast.errors import PeerFailed
from antidote_fast.files.manifest import sha256_file, verify_folder


@pytest.fixture(scope="module")
def agreement(tmp_path_factory):
    return ranks.start_ranks("agreement", tmp_path_factory.mktemp("agreement"))


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    return folder, ranks.start_ranks("replicas", folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, an adapter on it and data, where the ranks ran their commands."""
    root = tmp_path_factory.mktemp("commands")
    tiny.save_model(tiny.build(), root / "base")
    tiny.save_adapter(tiny.add_lora(tiny.build()), root / "adapter")
    (root / "harmful.jsonl").write_text("\n".join(map(json.dumps, ranks.RECORDS)))
    others = [{**row, "output": f"positive {row['output']}"} for row in ranks.RECORDS[:5]]
    (root / "task.jsonl").write_text("\n".join(map(json.dumps, others)))
    return root


@pytest.fixture(scope="module")
def commands(folder):
    return ranks.start_ranks("commands", folder)


class Twins(World):
    """Two ranks in one process, of which the second does as the first."""

    def gather(self, text):
        return [text, text]

    def all_reduce(self, sums, op="sum"):
        return [part.double() * (2 if op == "sum" else 1) for part in sums]


def norms_of(folder, name):
    """The norms that both ranks saved, found equal in every bit."""
    both = [ActivationNorms.load(folder / f"{name}.{rank}.safetensors") for rank in (0, 1)]
    for sums in ("sq_sum", "norm_sum"):
        first, second = (getattr(norms, sums) or {} for norms in both)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert both[0].num_tokens == both[1].num_tokens
    return both[0]


def assert_close(norms, expected):
    """Within 1e-6 of another run's, channel by channel; counts are the same."""
    assert norms.keys == expected.keys
    assert (norms.num_sequences, norms.num_tokens) == (expected.num_sequences, expected.num_tokens)
    assert norms.fingerprint == expected.fingerprint != ""
    for key in expected.keys:
        torch.testing.assert_close(
            norms.act_norm(key), expected.act_norm(key), rtol=1e-6, atol=0, equal_nan=False
        )


# --- a world --------------------------------------------------------------------------------------


def test_texts_and_sums_of_all_ranks(agreement):
    for rank, seen in enumerate(agreement):
        assert seen["gather"] == ["äß", "äßäß"]
        assert seen["sum"] == [[2 / 3, 1.0, 0.0], [], [2 / 3]]
        assert seen["max"] == [[1 / 3, 1.0, 0.0]]
        assert seen["shard"] == [list(range(n))[rank::2] for n in (0, 1, 2, 5)]
        assert seen["same"] is None
        assert seen["long"][0] == "ValueError"


def test_sums_of_three_ranks_are_the_same_bits_on_each(tmp_path):
    seen = ranks.start_ranks("agreement", tmp_path, size=3)
    assert len({rank["many"] for rank in seen}) == 1


def test_all_ranks_leave_a_block_alike(agreement):
    first, second = agreement
    assert first["well"] is second["well"] is None
    assert first["first"] == ["ValueError", "broken on 0\nand more", None]
    assert second["first"] == ["PeerFailed", "rank 0: broken on 0 and more", 1]
    assert first["second"] == ["PeerFailed", "rank 1: broken on 1 and more", 3]
    assert second["second"] == ["DataError", "broken on 1\nand more", 3]
    assert [first["both"][0], second["both"][0]] == ["ValueError", "PeerFailed"]
    assert [first["inner"][0], second["inner"][0]] == ["PeerFailed", "ValueError"]
    line = "things: differ between rank 0 and rank 1"
    assert first["differ"] == ["DataError", line, 3]
    assert second["differ"] == ["PeerFailed", f"rank 0: {line}", 3]


@pytest.mark.parametrize("count", [0, 1, 3, 7])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_shards_are_disjoint_and_complete(count, size):
    items = list(range(count))
    parts = [World(rank, size).shard(items) for rank in range(size)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, (0, 1)),
        ({"WORLD_SIZE": "4"}, (0, 1)),  # of a scheduler, which started one process
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4: must be at least 0 and less than WORLD_SIZE=4"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK='one': must be an integer"),
    ],
)
def test_ranks_that_the_environment_names(values, found, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    if isinstance(found, tuple):
        assert ranks_launched() == found
    else:
        with pytest.raises(UsageError) as refusal:
            ranks_launched()
        assert str(refusal.value) == found


def test_one_process_needs_no_group():
    with session() as alone:
        assert alone == ALONE == world()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("device", "local_rank", "words"),
    [
        ("cuda:1", "0", "device='cuda:1': must be auto, cuda or cpu with torchrun"),
        ("cuda", "2", "LOCAL_RANK=2: this machine has 2 GPUs; start at most one rank a GPU"),
        ("cuda", "1", None),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own(device, local_rank, words, monkeypatch):
    taken = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    if words:
        with pytest.raises(UsageError, match=words):
            _take_gpu(device)
        assert taken == []
    else:
        _take_gpu(device)
        assert taken == [1]


@pytest.mark.parametrize(("gpu", "backend"), [(False, "gloo"), (True, "cpu:gloo,cuda:nccl")])
def test_ranks_that_do_not_meet_say_so(gpu, backend, monkeypatch):
    asked = []

    def refuse(backend, **options):
        asked.append((backend, options["timeout"]))
        raise ValueError("environment variable MASTER_ADDR expected, but not set")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    with (
        pytest.raises(AntidoteError, match=r"ranks of torchrun do not meet: .*MASTER_ADDR"),
        session(),
    ):
        pytest.fail("a session without a group")
    assert asked == [(backend, TIMEOUT)]


def test_twins_give_the_norms_of_all_samples_twice():
    world, model, batches = Twins(size=2), tiny.build(), tiny.batches()
    alone = ActivationNorms.collect(model, batches)
    twice = alone.merge(alone)
    assert_close(ActivationNorms.collect(model, batches, world=world), twice)
    mean = ActivationNorms.collect(model, batches, aggregation="mean")
    again = ActivationNorms.collect(model, batches, aggregation="mean", world=world)
    assert_close(again, mean.merge(mean))


@pytest.mark.parametrize("rank", [0, 1])
def test_twins_that_fail_hear_of_the_first(rank):
    world = Twins(rank=rank, size=2)
    with pytest.raises(PeerFailed if rank else DataError, match="hold 0 tokens") as failure:
        ActivationNorms.collect(tiny.build(), [], world=world)
    assert failure.value.exit_code == 3
    world.check_same("things", "alike")


# --- replicas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rms", "mean", "response", "one"])
def test_norms_are_those_of_one_process(name, replicas):
    options = {"mean": {"aggregation": "mean"}, "response": {"response_only": True}}.get(name, {})
    model = tiny.add_lora(tiny.build()) if name == "mean" else tiny.build()
    batches = tiny.batches(count=5)[: 1 if name == "one" else 5]
    assert_close(norms_of(replicas[0], name), ActivationNorms.collect(model, batches, **options))


def test_weights_are_the_same_on_every_rank_and_in_one_process(replicas):
    folder, (first, second) = replicas
    model = tiny.build()
    prune_model_(model, norms_of(folder, "rms"), Selection(0.3))
    assert first["weights"] == second["weights"] == ranks.digest(model)
    assert [seen["apart"] for seen in (first, second)] == [[6, 32], [4, 18]]  # disjoint samples


def test_one_call_prunes_every_replica_and_writes_once(replicas):
    folder, seen = replicas
    model = tiny.build()
    report = oneshot(model, None, ranks.RECORDS, tiny.tokenizer(), ratio=0.3)
    assert [rank["live"] for rank in seen] == [[ranks.digest(model), report.num_pruned]] * 2
    assert verify_folder(folder / "live") == []
    written = load_file(folder / "live" / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(written[key], state[key]) for key in written)
    report = json.loads((folder / "live" / "report.json").read_text())
    assert report["sequences_per_rank"] == [8, 1]  # batches of 8


@pytest.mark.parametrize(
    ("name", "failing", "words", "code"),
    [
        ("nan", 1, "model.layers.1.self_attn.k_proj.weight: its input holds NaN or infinity", 3),
        ("base", 0, "models or settings of the ranks: differ between rank 0 and rank 1", 3),
        ("targets", 0, "models or settings of the ranks: differ between rank 0 and rank 1", 3),
        ("response", 0, "models or settings of the ranks: differ between rank 0 and rank 1", 3),
        ("no tokens", 0, "calibration data: 0 batches with 0 sequences hold 0 tokens to count", 3),
        ("memory", 0, "out of memory at one sequence a batch: shorten max_seq_length", 1),
        ("missing", 0, "nothing to prune: targets=['no_such'] matches no module", 4),
    ],
)
def test_what_goes_wrong_on_one_rank_ends_both(name, failing, words, code, replicas):
    _, seen = replicas
    kind, line, own = seen[failing][name]
    assert kind != "PeerFailed"
    assert line.startswith(words)
    assert own == code
    assert seen[1 - failing][name] == ["PeerFailed", f"rank {failing}: {line}", code]


# --- commands -------------------------------------------------------------------------------------


def test_a_command_on_two_ranks_gives_what_one_process_does(folder, commands):
    assert commands[0]["prune"][:2] == [0, [commands[0]["prune"][1][0]]]
    assert commands[0]["prune"][1][0].startswith("removed 224 of 1,280 weights")
    assert commands[1]["prune"] == [0, [], 0]  # and no progress either
    common = ["--model_name_or_path", folder / "base", "--adapter", folder / "adapter"]
    common += ["--dataset", folder / "harmful.jsonl", "--batch_size", "2", "--save_norms", "true"]
    words = ["prune", *common, "--output_dir", folder / "alone", "--quiet"]
    assert entry.main([str(word) for word in words]) == 0
    name = "adapter_model.safetensors"
    norms, alone = (
        ActivationNorms.load(folder / out / "norms.safetensors") for out in ("pruned", "alone")
    )
    assert_close(norms, alone)
    again = ["prune", *common[:-4], "--norms", folder / "pruned", "--output_dir", folder / "again"]
    assert entry.main([str(word) for word in [*again, "--quiet"]]) == 0
    assert sha256_file(folder / "pruned" / name) == sha256_file(folder / "again" / name)
    assert verify_folder(folder / "pruned") == []
    report = json.loads((folder / "pruned" / "report.json").read_text())
    assert (report["world_size"], report["sequences_per_rank"]) == (2, [5, 4])
    assert (report["num_records"], report["num_sequences"]) == (9, 9)
    assert [seen["called"] for seen in commands] == [224, None]
    assert sha256_file(folder / "called" / name) == sha256_file(folder / "pruned" / name)
    assert "world_size" not in json.loads((folder / "alone" / "report.json").read_text())


def test_both_data_sets_are_shared_by_the_ranks(folder, commands):
    assert [seen["preserve"][0] for seen in commands] == [0, 0]
    common = ["--model_name_or_path", folder / "base", "--adapter", folder / "adapter"]
    common += ["--dataset", folder / "harmful.jsonl", "--batch_size", "2", "--ratio", "0.3"]
    words = ["prune", *common, "--preserve_dataset", folder / "task.jsonl", "--save_norms"]
    assert entry.main([str(w) for w in [*words, "--output_dir", folder / "kept", "--quiet"]]) == 0
    for name in ("norms", "preserve-norms"):
        both = [folder / out / f"{name}.safetensors" for out in ("preserved", "kept")]
        assert_close(*map(ActivationNorms.load, both))
    first, second = (
        json.loads((folder / out / "report.json").read_text()) for out in ("preserved", "kept")
    )
    assert first["preserve_data"]["sequences_per_rank"] == [3, 2]
    assert first["preserve_data"]["num_tokens"] == second["preserve_data"]["num_tokens"]
    assert first["num_pruned"] + first["num_preserved"] == 496
    assert first["num_preserved"] > 0


def test_calibrate_writes_norms_of_all_samples(folder, commands):
    assert [seen["calibrate"][0] for seen in commands] == [0, 0]
    norms = ActivationNorms.load(folder / "norms" / "norms.safetensors")
    assert norms.num_sequences == 9
    assert [seen["norms"][0] for seen in commands] == [0, 0]
    assert verify_folder(folder / "from-norms") == []


def test_fewer_samples_than_ranks(folder, commands):
    assert [seen["one sample"][0] for seen in commands] == [0, 0]
    report = json.loads((folder / "one" / "report.json").read_text())
    assert report["sequences_per_rank"] == [1, 0]
    assert report["num_sequences"] == 1


@pytest.mark.parametrize(
    ("name", "teller", "line", "code"),
    [
        ("taken", 0, "output_dir='pruned': exists and is not empty", 3),
        ("align", 0, "align: runs in one process; torchrun is for calibrate and prune", 2),
        ("stream", 0, "stream=True: must be left out with torchrun", 2),
        ("fleet", 0, "fleet: runs in one process; torchrun is for calibrate and prune; share", 2),
        ("map", 0, "device_map='auto': must be left out with torchrun", 2),
        ("nonsense", 0, "--nonsense: prune has no such flag", 2),
        ("rank 1", 1, "rank 1: the disk of this machine is broken", 3),
        ("nan", 1, "rank 1: base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight", 3),
        ("writing", 0, "unexpected failure: ZeroDivisionError: division by zero", 1),
    ],
)
def test_an_error_is_one_line_from_one_rank(name, teller, line, code, folder, commands):
    assert [seen[name][0] for seen in commands] == [code, code]
    assert commands[1 - teller][name][1] == []
    [said] = commands[teller][name][1]
    assert said.startswith(f"antidote-fast: {line}")
    assert not (folder / "x").exists()


def test_a_finished_output_is_left_as_it_is(folder, commands):
    """``--resume``: what rank 0 finds is what all ranks go by."""
    for name in ("finished", "finished norms"):
        assert [seen[name][0] for seen in commands] == [0, 0]
        assert commands[1][name] == [0, [], 0]
    assert commands[0]["finished"][1] == commands[0]["prune"][1]  # the report of then
    assert not any('"step"' in line for seen in commands for line in seen["finished"][1])


def test_rank_0_alone_answers_questions(commands):
    assert commands[0]["help"][1][0].startswith("usage: antidote-fast")
    assert commands[0]["version"][1] == [f"antidote-fast {__version__}"]
    assert commands[1]["help"] == commands[1]["version"] == [0, [], 0]


def test_torchrun_of_the_module(folder):
    """The line of the README, as a user types it; and its exit is a failure where ours is."""
    words = ["-m", "antidote_fast", "prune", "--model_name_or_path", "base", "--adapter", "adapter"]
    words += ["--dataset", "harmful.jsonl", "--batch_size", "2", "--output_dir", "typed"]
    done = ranks.torchrun(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("removed 224 of 1,280 weights") == 1
    assert json.loads((folder / "typed" / "report.json").read_text())["world_size"] == 2
    assert done.stderr.count('"step": "calibrate"') == 1


@pytest.mark.parametrize("how", ["terminated", "killed"])
def test_no_rank_waits_for_one_that_is_gone(how, tmp_path):
    marker, out = tmp_path / "stalled", tmp_path / "out"
    words = ["stall", "calibrate", "--model_name_or_path", "x", "--dataset", marker]
    words += ["--output_dir", out, "--template", "chat" if how == "killed" else "alpaca"]
    command = [sys.executable, *ranks.TORCHRUN, ranks.HERE / "ranks.py", *words]
    run = subprocess.Popen(
        [str(word) for word in command],
        env=ranks.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if how == "terminated":
        while not marker.exists() and run.poll() is None:
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    lines = [line for line in said.splitlines() if line.startswith("antidote-fast: ")]
    expected = [["antidote-fast: interrupted; nothing is left half-written"]]
    if how == "killed":  # on busy cores torchrun's own signal may come first
        expected.append(["antidote-fast: another rank is gone, or did not come in time"])
    assert lines in expected, said
    assert not out.exists()


# --- flags ----------------------------------------------------------------------------------------


def test_a_device_and_a_map_exclude_each_other():
    places = {"model_name_or_path": "x", "output_dir": "y", "dataset": "z"}
    assert CalibrateConfig(**places, device_map="auto").device_map == "auto"
    with pytest.raises(UsageError, match="device='cpu': must be left out with device_map"):
        CalibrateConfig(**places, device_map="auto", device="cpu")
