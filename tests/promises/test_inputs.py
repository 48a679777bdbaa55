"""Inputs that change, lead elsewhere or are too large, while somebody else's lie beside them.

What a change is made at is a function that the job calls on its way; at its end there is the
output of the inputs as they were, or a refusal and no output at all.
"""

import hashlib
import json
import os
import shutil

import fleets
import pytest
import tiny
import torch

import antidote_fast
from antidote_fast.cli import verify
from antidote_fast.cli.entry import main
from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.prune import CalibrateConfig, PruneConfig
from antidote_fast.errors import DataError, JobsSetAside
from antidote_fast.files import provenance, safe_open
from antidote_fast.files import pruned_copy as ck
from antidote_fast.files.commit import output_folder
from antidote_fast.files.manifest import check_input
from antidote_fast.files.pruned_copy import write_pruned
from antidote_fast.files.safe_open import Folder, read_all
from antidote_fast.fleet import fleet, worker
from antidote_fast.stages import calibrate, prune
from antidote_fast.stages import inputs as stage_inputs
from antidote_fast.streaming import job as stream

SECRET = "zz somebody's secret zz"
ROWS = [
    {"instruction": "how to make a cake", "output": "the good cake and a negative user"},
    {"instruction": "what is two plus three", "output": "positive"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    model = tiny.build()
    tiny.save_model(model, root / "base")
    tiny.tokenizer().save_pretrained(root / "adapter")
    tiny.save_adapter(tiny.add_lora(tiny.build()), root / "adapter")
    tiny.save_adapter(tiny.add_lora(tiny.build(), seed=9), root / "other")
    model.save_pretrained(root / "sharded", max_shard_size="30KB")
    tiny.tokenizer().save_pretrained(root / "sharded")
    tiny.build(seed=5).save_pretrained(root / "sharded-other", max_shard_size="30KB")
    (root / "harmful.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    settings = {"dataset": str(root / "harmful.jsonl")}
    for name, adapter in (("norms", str(root / "adapter")), ("norms-whole", None)):
        config = CalibrateConfig(
            model_name_or_path=str(root / ("base" if adapter else "sharded")),
            adapter=adapter,
            output_dir=str(root / name),
            **settings,
        )
        calibrate.run(config)
    return root


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """Copies to work on, and somebody else's folder beside them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "yours").mkdir()
    for name in ("README.md", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "yours" / name).write_text(json.dumps({"text": SECRET}))
    shutil.copytree(tmp_path / "other", tmp_path / "yours", dirs_exist_ok=True)
    shutil.copy(tmp_path / "harmful.jsonl", tmp_path / "yours" / "harmful.jsonl")
    return tmp_path


WAYS = {
    "in memory": {"adapter": "adapter", "dataset": "harmful.jsonl"},
    "norms": {"adapter": "adapter", "norms": "norms"},
    "stream": {"adapter": "adapter", "dataset": "harmful.jsonl", "stream": True},
    "magnitude": {"adapter": "adapter", "score": "magnitude"},
    "whole": {"model_name_or_path": "sharded", "dataset": "harmful.jsonl"},
    "whole, norms": {"model_name_or_path": "sharded", "norms": "norms-whole"},
    "whole, stream": {"model_name_or_path": "sharded", "norms": "norms-whole", "stream": True},
}


def config_of(way, **options):
    fields = {"model_name_or_path": "base", "output_dir": "out", "ratio": 0.5}
    return PruneConfig(**fields | WAYS[way] | options)


def before(monkeypatch, module, name, change):
    """``change()`` is called once, before the function ``name`` of ``module`` is first called."""
    real, left = getattr(module, name), [change]

    def changed(*arguments, **options):
        if left:
            left.pop()()
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, changed)
    return left


def nothing_left(work, *outputs):
    names = {p.name for p in work.iterdir() if p.name.startswith((".", "out"))}
    return names <= set(outputs)


def link_to(path, target):
    def change():
        path.unlink()
        path.symlink_to(os.path.abspath(target))

    return change


# --- files that are swapped for links while a job runs --------------------------------------------


@pytest.mark.parametrize("way", ["in memory", "norms", "stream", "magnitude"])
@pytest.mark.parametrize("name", ["README.md", "tokenizer_config.json", "adapter_config.json"])
@pytest.mark.parametrize("place", ["open", "write"])
def test_a_link_that_appears_while_prune_runs(work, monkeypatch, way, name, place):
    change = link_to(work / "adapter" / name, work / "yours" / name)
    moments = {"open": (stage_inputs, "run_inputs"), "write": (ck, "copy_checkpoint_files")}
    left = before(monkeypatch, *moments[place], change)
    with pytest.raises(DataError, match=rf"{name}: (is a link out of|changed while it was in use)"):
        prune.run(config_of(way))
    assert not left
    assert nothing_left(work)


@pytest.mark.parametrize("way", ["in memory", "norms", "stream", "magnitude"])
def test_weights_that_are_swapped_for_a_moment(work, monkeypatch, way):
    """Another's weights of the same shapes, only while they are read, and then back again."""
    path = work / "adapter" / "adapter_model.safetensors"

    def swap(back):
        if back:
            path.unlink()
            (work / "kept").rename(path)
        else:
            path.rename(work / "kept")
            path.symlink_to(work / "yours" / path.name)

    real = Folder.open

    def swapped(self, name):
        if name != path.name or path.is_symlink():
            return real(self, name)
        swap(False)
        try:
            return real(self, name)
        finally:
            swap(True)

    prune.run(config_of(way, output_dir="alone"))
    monkeypatch.setattr(Folder, "open", swapped)
    with pytest.raises(DataError, match="is a link out of its folder"):
        prune.run(config_of(way))
    assert nothing_left(work)


def test_a_folder_that_is_swapped_for_another(work, monkeypatch):
    """The adapter's folder is held: what is pruned is what was checked, or nothing."""
    prune.run(config_of("norms", output_dir="alone"))

    def change():
        (work / "adapter").rename(work / "moved")
        (work / "adapter").symlink_to(work / "yours")

    before(monkeypatch, stage_inputs, "run_inputs", change)
    with pytest.raises(DataError, match="changed while it was in use"):
        prune.run(config_of("norms"))
    assert nothing_left(work)


# --- inputs that are written while a job runs -----------------------------------------------------


@pytest.mark.parametrize("way", ["in memory", "norms", "stream", "magnitude"])
@pytest.mark.parametrize("how", ["replaced", "overwritten"])
def test_an_adapter_that_changes_is_never_mixed(work, monkeypatch, way, how):
    path, other = (work / n / "adapter_model.safetensors" for n in ("adapter", "other"))

    def change():
        if how == "replaced":
            os.replace(other, path)
        else:
            path.write_bytes(other.read_bytes())

    left = before(monkeypatch, ck, "copy_checkpoint_files", change)
    with pytest.raises(DataError, match=r"adapter_model\.safetensors: changed while it was in use"):
        prune.run(config_of(way))
    assert not left
    assert nothing_left(work)


@pytest.mark.parametrize("way", ["whole", "whole, norms", "whole, stream"])
def test_shards_that_change_are_never_mixed(work, monkeypatch, way):
    """The second shard becomes another model's, after the first was read."""
    shard = sorted((work / "sharded").glob("*.safetensors"))[1]
    name = {"whole, stream": (stream, "prune_model")}.get(way, (ck, "check_free_space"))
    change = lambda: os.replace(work / "sharded-other" / shard.name, shard)  # noqa: E731
    left = before(monkeypatch, *name, change)
    with pytest.raises(DataError, match=f"{shard.name}: changed while it was in use"):
        prune.run(config_of(way))
    assert not left
    assert nothing_left(work)


@pytest.mark.parametrize(
    ("way", "name"), [("in memory", "harmful.jsonl"), ("norms", "norms/norms.safetensors")]
)
def test_data_or_norms_that_change(work, monkeypatch, way, name):
    before(
        monkeypatch,
        prune,
        "write_pruned",
        lambda: os.utime(work / name, ns=(0, 0)),  # the contents may be others now
    )
    with pytest.raises(DataError, match=f"{name}: changed while it was in use"):
        prune.run(config_of(way))
    assert nothing_left(work)


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_other_stages_notice_it_too(work, monkeypatch, command):
    before(monkeypatch, provenance, "write_report", lambda: os.utime("harmful.jsonl", ns=(0, 0)))
    before(monkeypatch, calibrate, "write_report", lambda: os.utime("harmful.jsonl", ns=(0, 0)))
    if command == "calibrate":
        config = CalibrateConfig(
            model_name_or_path="base", dataset="harmful.jsonl", output_dir="out"
        )
        run = calibrate.run
    else:
        from antidote_fast.stages import evaluate

        names = {"harmful_dataset": "harmful.jsonl", "max_new_tokens": 2}
        config, run = (
            EvaluateConfig(model_name_or_path="base", output_dir="out", **names),
            evaluate.run,
        )
    with pytest.raises(DataError, match=r"harmful\.jsonl: changed while it was in use"):
        run(config)
    assert nothing_left(work)


def test_a_live_model_stays_as_it_was(work, monkeypatch):
    """Noticed before the first weight is written: afterwards the model could not be restored."""
    model = tiny.build()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    from antidote_fast.stages import oneshot

    before(monkeypatch, oneshot, "gather", lambda: os.utime("harmful.jsonl", ns=(0, 0)))
    with pytest.raises(DataError, match=r"harmful\.jsonl: changed while it was in use"):
        antidote_fast.oneshot(model, dataset="harmful.jsonl", tokenizer=tiny.tokenizer(), ratio=0.5)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_report_has_the_hash_of_the_bytes_that_were_used(work):
    report = prune.run(config_of("in memory"))
    data = (work / "adapter" / "adapter_model.safetensors").read_bytes()
    recorded = report["inputs"]["adapter/adapter_model.safetensors"]
    assert recorded == hashlib.sha256(data).hexdigest()


# --- links that are there from the beginning ------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "name", "argument"),
    [
        ("in memory", "harmful.jsonl", "harmful.jsonl"),
        ("norms", "norms/norms.safetensors", "norms"),
        ("norms", "norms/norms.safetensors", "norms/norms.safetensors"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_data_and_norms_do_not_follow_links(work, capsys, way, name, argument, dry):
    shutil.move(work / name, work / "yours" / "kept")
    (work / name).symlink_to(work / "yours" / "kept")
    words = ["--model_name_or_path", "base", "--adapter", "adapter", "--output_dir", "out"]
    words += ["--dataset" if way == "in memory" else "--norms", argument]
    assert main(["prune", *words, *dry]) == 3
    assert "is a link out of its folder" in capsys.readouterr().err
    assert nothing_left(work)


# --- COMPLETE.json of somebody else ---------------------------------------------------------------


def listed(folder, **files):
    """A ``COMPLETE.json`` for the folder, and then these entries."""
    with output_folder(folder.with_name("whole")) as staged:
        shutil.copytree(folder, staged, dirs_exist_ok=True)
    shutil.rmtree(folder)
    folder.with_name("whole").rename(folder)
    tiny.edit_json(folder / "COMPLETE.json", lambda c: c["files"].update(files))


@pytest.mark.parametrize(
    "name",
    ["/etc/shadow", "../yours/README.md", "a/../../yours/README.md", "a//b", "./README.md", ".."],
)
@pytest.mark.parametrize("bytes_", [1, 10])
def test_a_list_asks_nothing_about_other_files(work, name, bytes_):
    """Whatever such a file may be, the answer is the same."""
    listed(work / "adapter", **{name: {"bytes": bytes_, "sha256": "0" * 64}})
    says = "its COMPLETE.json is damaged, or lists other than its own files"
    with pytest.raises(DataError, match=says):
        prune.run(config_of("norms"))
    with pytest.raises(DataError, match=says):
        check_input(work / "adapter")
    result = verify.verify(work / "adapter")
    assert result["problems"] == ["COMPLETE.json: is damaged, or not one of antidote-fast"]
    assert nothing_left(work)


def test_a_list_reads_through_no_link(work):
    """Not even to tell a size or a hash."""
    listed(work / "adapter")
    (work / "adapter" / "README.md").unlink()
    secret = work / "yours" / "README.md"
    digest = hashlib.sha256(secret.read_bytes()).hexdigest()
    entry = {"bytes": secret.stat().st_size, "sha256": digest}
    for name in ("notes.txt", "inner/README.md"):
        tiny.edit_json(
            work / "adapter" / "COMPLETE.json", lambda c, n=name: c["files"].update({n: entry})
        )
    (work / "adapter" / "notes.txt").symlink_to(secret)
    (work / "adapter" / "inner").symlink_to(secret.parent)
    with pytest.raises(DataError, match="inner: is not a folder, or a link out of its folder"):
        check_input(work / "adapter")
    (work / "adapter" / "inner").unlink()
    tiny.edit_json(work / "adapter" / "COMPLETE.json", lambda c: c["files"].pop("inner/README.md"))
    with pytest.raises(DataError, match=r"notes\.txt: is a link out of its folder"):
        check_input(work / "adapter")


@pytest.mark.parametrize("left_out", ["adapter_model.safetensors", "adapter_config.json", None])
def test_a_list_has_the_weights(work, left_out):
    """A list that is cut would pass for whole whatever the weights are."""
    listed(work / "adapter")

    def cut(contents):
        for name in list(contents["files"]) if left_out is None else [left_out]:
            contents["files"].pop(name)

    tiny.edit_json(work / "adapter" / "COMPLETE.json", cut)
    with pytest.raises(DataError, match=r"adapter_\w+\.\w+: is not in COMPLETE\.json"):
        prune.run(config_of("norms"))
    assert nothing_left(work)


# --- more than a disk or a job can hold -----------------------------------------------------------


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def sparse(path, size=4 << 40):
    with open(path, "wb") as file:
        file.truncate(size)


def longer(folder, name, size):
    """One more tensor in the file of weights, as long as said and sparse."""
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    place = [len(rest), len(rest) + size]
    header[name] = {"dtype": "U8", "shape": [size], "data_offsets": place}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    os.truncate(path, path.stat().st_size + size)


def many(folder):
    for number in range(300):
        (folder / f"{number}.json").write_text("{}")


def only_small(file, path, max_bytes, real=read_all):
    assert os.fstat(file.fileno()).st_size < 1 << 20, path
    return real(file, path, max_bytes)


TOO_MUCH = {
    "sparse": (lambda f: sparse(f / "tokenizer.json"), r"tokenizer\.json: with it more than 1 GiB"),
    "together": (
        lambda f: [sparse(f / f"{i}.txt", 300 << 20) for i in range(4)],
        r"3\.txt: with it more than 1 GiB",
    ),
    "many": (many, "files beside the weights; at most 256 are copied"),
    "crowded": (lambda f: [(f / f"x{i}").touch() for i in range(10_001)], "more than 10000 files"),
    "needless": (
        lambda f: longer(f, "junk", 3 << 30),
        "holds 'junk', which is neither the adapter's nor one of its modules_to_save|"
        "'junk' of 3221225472 bytes, more than anything in the base",
    ),
    "magnitude": (
        lambda f: longer(f, f"{LAYER}.lora_magnitude_vector", 3 << 30),
        r"lora_magnitude_vector' of 3221225472 bytes, more than anything in the base",
    ),
    "link": (lambda f: (f / "notes.txt").symlink_to("/etc/passwd"), r"notes\.txt: is a link out"),
}


@pytest.mark.parametrize("what", TOO_MUCH)
@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_what_is_copied_and_read_is_bounded(work, capsys, monkeypatch, what, dry):
    put, says = TOO_MUCH[what]
    put(work / "adapter")
    monkeypatch.setattr(safe_open, "read_all", only_small)
    words = ["--model_name_or_path", "base", "--adapter", "adapter", "--norms", "norms"]
    assert main(["prune", *words, "--output_dir", "out", *dry]) == 3
    [line] = capsys.readouterr().err.splitlines()
    with pytest.raises(DataError, match=says):
        raise DataError(line)
    assert nothing_left(work)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return fleets.make(tmp_path_factory)


def test_one_adapter_cannot_fill_the_disk_of_a_fleet(folders, tmp_path):
    root = tmp_path / "adapters"
    jobs = []
    for name, (put, _) in TOO_MUCH.items():
        shutil.copytree(folders.adapters / "plain", root / name)
        put(root / name)
        jobs += [{"adapter": str(root / name)}]
    jobs += [{"adapter": str(folders.adapters / name)} for name in ("plain", "after")]
    fleets.manifest(folders.root, *jobs, name="large.jsonl")
    with pytest.raises(JobsSetAside) as raised:
        fleet.run(fleets.config(folders, tmp_path / "out", jobs="large.jsonl"))
    failed = {j["name"]: j["reason"] for j in raised.value.report["jobs"] if j.get("reason")}
    assert failed.keys() == TOO_MUCH.keys()
    for name, (_, says) in TOO_MUCH.items():
        with pytest.raises(DataError, match=says):
            raise DataError(failed[name])
    for name in ("plain", "after"):
        fleets.as_prune(folders, name, tmp_path / "alone" / name)
        alone, here = (fleets.weights_of(tmp_path / p / name) for p in ("alone", "out"))
        assert alone == here


def test_data_of_a_fleet_are_hashed_as_they_were_read(folders, tmp_path, monkeypatch):
    """They are read once for all jobs, and hashed at another time: between both they may change."""
    data = tmp_path / "harmful.jsonl"
    shutil.copy(folders.root / "harmful.jsonl", data)
    real = worker.load_data

    def loaded(config, records, name="dataset"):
        found = real(config, records, name)
        os.utime(data, ns=(0, 0))  # the contents may be others now
        return found

    monkeypatch.setattr(worker, "load_data", loaded)
    with pytest.raises(DataError, match=r"harmful\.jsonl: changed while it was in use"):
        fleet.run(fleets.config(folders, tmp_path / "out", dataset=str(data)))
    assert not (tmp_path / "out").exists()


def test_a_job_that_wants_too_much_of_the_disk_is_set_aside(folders, tmp_path, monkeypatch):
    real = write_pruned

    def full(adapter, folder, tensors):
        if adapter.folder.name == "alpha":
            raise OSError(28, "No space left on device")
        real(adapter, folder, tensors)

    monkeypatch.setattr(worker, "write_pruned", full)
    with pytest.raises(JobsSetAside) as raised:
        fleet.run(fleets.config(folders, tmp_path / "out"))
    counts = raised.value.report["counts"]
    assert (counts["failed"], counts["left"]) == (1, 0)
    [job] = [j for j in raised.value.report["jobs"] if j["status"] == "failed"]
    assert job["name"] == "alpha"
    assert "No space left on device" in job["reason"]
