"""Home folders in paths, files that cannot be read, seeds and devices that are none: one line."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from antidote_fast import ActivationNorms, prune_model_
from antidote_fast.cli import entry, verify
from antidote_fast.cli.convert import convert_masks
from antidote_fast.config import experiment, sweep
from antidote_fast.config import train as configs
from antidote_fast.config.base import StageConfig
from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.experiment import DemoConfig
from antidote_fast.config.fleet import FleetConfig
from antidote_fast.config.prune import CalibrateConfig, PruneConfig
from antidote_fast.config.yaml_file import read_yaml
from antidote_fast.data.load import local_file, mix, split_by_prompt
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError, UsageError
from antidote_fast.files import checkpoint
from antidote_fast.files.manifest import read_manifest
from antidote_fast.fleet.jobs import read_jobs
from antidote_fast.models import loading
from antidote_fast.models.loading import load_model, load_tokenizer, resolve_folder
from antidote_fast.selection import Selection
from antidote_fast.stages.gates.learn import learn_gates

NEEDED = {"model_name_or_path": "m", "output_dir": "o"}
STAGES = {
    configs.AlignConfig: {"dataset": "d"},
    configs.FinetuneConfig: {"dataset": "d", "poison_ratio": 0},
    CalibrateConfig: {"dataset": "d"},
    PruneConfig: {"dataset": "d"},
    FleetConfig: {"manifest": "j"},
    EvaluateConfig: {"harmful_dataset": "d"},
    sweep.SweepConfig: {"dataset": "d", "harmful_dataset": "h", "task_dataset": "t"},
    experiment.RunConfig: {"finetune": {}, "prune": {}, "evaluate": {}},
    experiment.ExperimentConfig: {"grid": {}, "finetune": {}, "evaluate": {}},
}


# --- ~ --------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch, folders):
    """A home folder with a model and data, which is not the folder that one is in."""
    made, here = tmp_path / "home", tmp_path / "here"
    made.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(made))
    monkeypatch.chdir(here)
    for name in ("model", "adapter"):
        (made / name).symlink_to(folders / name)
    (made / "data.jsonl").write_text('{"instruction": "how to", "output": "two plus"}\n')
    return made


def words(command, **flags_):
    flags_ |= {"max_seq_length": "60", "device": "cpu", "quiet": None}
    given = [f"--{name}={value}" if value else f"--{name}" for name, value in flags_.items()]
    return [command, *given]


def test_every_path_of_a_command(home, tmp_path):
    common = {"model_name_or_path": "~/model", "dataset": "~/data.jsonl"}
    assert entry.main(words("calibrate", **common, output_dir="~/norms")) == 0
    made = words("prune", model_name_or_path="~/model", norms="~/norms", output_dir="~/out")
    assert entry.main([*made, "--preserve_norms=~/norms"]) == 0
    (home / "prune.yaml").write_text(
        "model_name_or_path: ~/model\nadapter: ~/adapter\ndataset: ~/data.jsonl\n"
        "output_dir: ~/pruned\n"
    )
    for more in ([], ["--config", "~/prune.yaml"]):
        config = more or ["--config=~/prune.yaml"]
        made = ["prune", *config, "--max_seq_length=60", "--device=cpu", "--overwrite", "--quiet"]
        assert entry.main(made) == 0
    (home / "jobs.jsonl").write_text(
        '{"adapter": "~/adapter", "dataset": "~/data.jsonl", "name": "one"}\n'
    )
    common = {"model_name_or_path": "~/model", "manifest": "~/jobs.jsonl"}
    assert entry.main(words("fleet", **common, output_dir="~/fleet")) == 0
    assert (home / "fleet" / "one" / "adapter_model.safetensors").exists()
    for folder in ("norms", "out", "pruned"):
        report = json.loads((home / folder / "report.json").read_text())
        assert report["config"]["output_dir"] == str(home / folder)
        assert all("~" not in name for name in report["inputs"])
        assert any(name.startswith(str(home)) for name in report["inputs"])
    assert not list((tmp_path / "here").iterdir())  # no folder of the name ~


@pytest.mark.parametrize("command", ["verify", "inspect", "convert"])
def test_the_home_folder_of_plain_commands(command, home, capsys):
    torch.save({"model.layers.0.q_proj.weight": torch.eye(8)}, home / "old.pt")
    more = ["--output", "~/new.safetensors"] if command == "convert" else []
    given = "~/old.pt" if command == "convert" else "~/model"
    assert entry.main([command, given, *more]) == 0
    nobodys = given.replace("~", "~nobody-has-this")
    assert entry.main([command, nobodys, *more, *(["--overwrite"] if more else [])]) == 3
    seen = capsys.readouterr()
    assert f"{nobodys}: no such" in seen.out + seen.err
    assert os.listdir() == []


def test_roles_and_files_that_extend_stay(home):
    config = configs.FinetuneConfig(
        **NEEDED | {"output_dir": "~/o", "model_name_or_path": "~"},
        dataset="~/data.jsonl:unsafe",
        poison_ratio=0,
    )
    assert config.dataset == f"{home}/data.jsonl:unsafe"
    assert (config.output_dir, config.model_name_or_path) == (f"{home}/o", str(home))
    assert local_file(config.dataset) == f"{home}/data.jsonl"
    (home / "under.yaml").write_text("grid: {seed: [1]}\nstages: ~/made\n")
    (home / "over.yaml").write_text("extends: ~/under.yaml\n")
    assert read_yaml(home / "over.yaml") == {"grid": {"seed": [1]}, "stages": "~/made"}
    config = experiment.ExperimentConfig(
        **NEEDED, grid={}, finetune={}, evaluate={}, stages="~/made", rows="~/rows.csv"
    )
    assert (config.stages, config.rows) == (f"{home}/made", f"{home}/rows.csv")
    assert DemoConfig(output_dir="~/demo").output_dir == f"{home}/demo"


def test_every_path_field_is_known():
    """Whatever a stage's docstring calls a folder, file or data set is expanded."""
    from antidote_fast.config.base import holds_path

    texts = {
        field
        for stage in (*STAGES, DemoConfig)
        for field, kind in stage.__annotations__.items()
        if kind in (str, str | None, list[str] | str | None)
    }
    texts |= {f for f, kind in StageConfig.__annotations__.items() if kind is str}
    others = {"device", "backend", "shard", "max_memory", "lr_scheduler_type", "extends", "score"}
    others |= {"judge_url", "judge_model", "system_prompt"}
    paths = {
        field.name
        for stage in (*STAGES, DemoConfig)
        for field in dataclasses.fields(stage)
        if holds_path(field)
    }
    assert texts - others == paths


def test_nobodys_home_is_no_folder_here():
    with pytest.raises(UsageError, match=r"output_dir='~nobody-has-this/out': must be a path"):
        CalibrateConfig(**NEEDED | {"output_dir": "~nobody-has-this/out"}, dataset="d")


def test_a_manifest_beside_which_nothing_lies(home, tmp_path):
    (tmp_path / "jobs.jsonl").write_text('{"adapter": "~/adapter", "dataset": "~/data.jsonl:safe"}')
    config = FleetConfig(**NEEDED, manifest=str(tmp_path / "jobs.jsonl"))
    [job] = read_jobs(config)
    assert job.config.adapter == f"{home}/adapter"
    assert job.config.dataset == f"{home}/data.jsonl:safe"


# --- files that cannot be read --------------------------------------------------------------------


@pytest.fixture
def unreadable(monkeypatch):
    """Opening a file of this name fails, as root too, with an error of the system."""

    def make(name, number):
        import builtins

        def refusing(plain):
            def call(path, *args, **kwargs):
                if isinstance(path, (str, os.PathLike)) and Path(path).name == name:
                    raise OSError(number, os.strerror(number), str(path))
                return plain(path, *args, **kwargs)

            return call

        monkeypatch.setattr(builtins, "open", refusing(builtins.open))
        monkeypatch.setattr("io.open", refusing(open))
        monkeypatch.setattr(os, "open", refusing(os.open))

    return make


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("model.safetensors", {"dataset": "~/data.jsonl"}),
        ("model.safetensors", {"dataset": "~/data.jsonl", "stream": None}),
        ("model.safetensors", {"score": "magnitude"}),
        ("adapter_model.safetensors", {"dataset": "~/data.jsonl", "adapter": "~/adapter"}),
        ("tokenizer_config.json", {"dataset": "~/data.jsonl"}),
        ("config.json", {"dataset": "~/data.jsonl"}),
        ("data.jsonl", {"dataset": "~/data.jsonl"}),
    ],
)
def test_a_file_that_cannot_be_read(home, unreadable, capsys, number, name, more):
    unreadable(name, number)
    assert entry.main(words("prune", model_name_or_path="~/model", output_dir="~/out", **more)) == 3
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert name in said
    assert os.strerror(number) in said
    assert "unexpected" not in said
    assert not (home / "out").exists()


def test_weights_that_fail_while_they_stream(home, monkeypatch, capsys):
    """The disk fails in the middle: the file is named, the state stays, and resume goes on."""
    real, reads = os.preadv, []

    def broken(fd, buffers, position):
        reads.append(position)
        if len(reads) == fails_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, position)

    monkeypatch.setattr(os, "preadv", broken)
    common = {"model_name_or_path": "~/model", "dataset": "~/data.jsonl", "stream": None}
    fails_at = None
    assert entry.main(words("prune", **common, output_dir="~/alone")) == 0
    fails_at = len(reads)
    reads.clear()
    assert entry.main(words("prune", **common, output_dir="~/out")) == 3
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model/model.safetensors: cannot be read: Input/output error; " in said
    assert (home / ".out.run").exists()
    assert entry.main([*words("prune", **common, output_dir="~/out"), "--resume"]) == 0
    alone, out = (home / name / "model.safetensors" for name in ("alone", "out"))
    assert alone.read_bytes() == out.read_bytes()


def test_a_folder_that_may_not_be_entered(monkeypatch, tmp_path):
    def refused(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", refused)
    for read in (resolve_folder, load_model, load_tokenizer, checkpoint.open_checkpoint):
        with pytest.raises(DataError, match=f"{tmp_path}: cannot be read: Permission denied"):
            read(tmp_path)
    monkeypatch.undo()

    def not_opened(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", not_opened)
    with pytest.raises(DataError, match="Permission denied"):
        ActivationNorms.load(tmp_path / "norms.safetensors")


def test_a_folder_that_may_not_be_entered_hides_no_other(folders, monkeypatch, capsys):
    def refused(folder):
        raise PermissionError(errno.EACCES, "Permission denied", f"{folder}/COMPLETE.json")

    real = read_manifest
    closed = str(folders / "adapter")
    monkeypatch.setattr(
        verify, "read_manifest", lambda f: (refused if str(f) == closed else real)(f)
    )
    assert entry.main(["verify", closed, str(folders / "model")]) == 3
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{closed}: COMPLETE.json: Permission denied"
    assert second.startswith(f"{folders / 'model'}: nothing missing")


# --- seeds and devices ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [*STAGES, DemoConfig])
def test_seeds(stage):
    needed = NEEDED | STAGES.get(stage, {})
    needed = {"output_dir": "o"} if stage is DemoConfig else needed
    for seed in (0, 2**63, 2**64 - 1):
        assert stage(**needed, seed=seed).seed == seed
    for seed in (-1, 2**64, 10**5000, 1.5, True, "1"):
        with pytest.raises(
            UsageError, match=r"^seed=.{1,90}: must be an integer in \[0, 2\*\*64\)"
        ):
            stage(**needed, seed=seed)


def test_seeds_of_calls():
    model, tokenizer = tiny.build(), tiny.tokenizer()
    records = [Record("how", "", "two"), Record("what", "", "two")]
    calls = {
        "prune": lambda s: prune_model_(model, None, Selection(0.5), score="random", seed=s),
        "split": lambda s: split_by_prompt(records, [0.5], s),
        "mix": lambda s: mix(records, [], 0, seed=s),
        "gates": lambda s: learn_gates(
            tiny.add_lora(model), tokenizer, records, records, Selection(0.5), seed=s
        ),
    }
    for call in calls.values():
        for seed in (2**64, -1):
            with pytest.raises(UsageError, match=rf"seed={seed}: must be an integer in"):
                call(seed)
    twins = [tiny.build(), tiny.build()]
    for twin in twins:
        prune_model_(twin, None, Selection(0.5), score="random", seed=2**64 - 1)
    pairs = zip(*(twin.parameters() for twin in twins), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("device", ["meta", "meta:0"])
def test_a_device_on_which_nothing_runs(stage, device):
    with pytest.raises(UsageError, match=f"device='{device}': must be one that computes"):
        stage(**NEEDED, **STAGES[stage], device=device)


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.uint8])
def test_seeds_of_numpy(kind):
    config = CalibrateConfig(**NEEDED, dataset="d", seed=kind(7))
    assert (config.seed, type(config.seed)) == (7, int)
    rows = [Record("how", "", str(i)) for i in range(9)]
    assert mix(rows, [], 0, seed=kind(7)) == mix(rows, [], 0, seed=7)


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'torch.hpu'"), TypeError("no")]
)
def test_a_device_whose_backend_is_not_here(error, monkeypatch):
    def absent(*sizes, device):
        raise error

    monkeypatch.setattr(torch, "empty", absent)
    with pytest.raises(UsageError, match=f"^device='hpu': cannot be used: {error}$"):
        loading.pick_device("hpu")


# --- old masks ------------------------------------------------------------------------------------


def nested():
    return torch.nested.nested_tensor([torch.eye(3), torch.ones(2, 3)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.empty(3, 3, device="meta"), "is on the meta device, and holds no values"),
        (lambda: torch.eye(3).to_sparse(), "is not a dense tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), "is not a dense tensor"),
        (nested, "is not a dense tensor"),
        (lambda: torch.quantize_per_tensor(torch.eye(3), 1.0, 0, torch.quint8), "not a matrix"),
        (lambda: torch.zeros(3, 3, dtype=torch.uint8).view(torch.bits8), "which no mask is of"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_no_masks(tmp_path, make, says):
    torch.save({"layers.0.w": make()}, tmp_path / "old.pt")
    with pytest.raises(DataError, match=f"'layers.0.w.weight' .*{says}"):
        convert_masks(tmp_path / "old.pt", tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


def test_a_mask_that_is_a_parameter(tmp_path):
    torch.save({"w": torch.nn.Parameter(torch.eye(4))}, tmp_path / "old.pt")
    found = convert_masks(tmp_path / "old.pt", tmp_path / "new.safetensors")
    assert found == {"masks": 1, "removed": 4, "weights": 16}
