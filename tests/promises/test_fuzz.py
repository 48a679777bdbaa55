"""No file makes a reader fall over: it gives a value or one line, and soon.

Files are made from sound ones (fuzzing.py). `make fuzz` runs the same properties with 100,000
inputs from new seeds; here the seed stays, and the inputs are few.
"""

import itertools
import json
import shutil
from pathlib import Path

import fuzzing
import pytest
import sampling
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antidote_fast.cli.inspect import inspect
from antidote_fast.config import flags
from antidote_fast.config.experiment import RunConfig
from antidote_fast.config.fleet import FleetConfig
from antidote_fast.config.prune import PruneConfig
from antidote_fast.data.load import load_records
from antidote_fast.errors import AntidoteError
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.commit import check_output_folder, output_folder
from antidote_fast.files.manifest import verify_folder
from antidote_fast.files.provenance import hash_inputs
from antidote_fast.fleet.jobs import read_jobs
from antidote_fast.masks import PackedMask, load_masks, save_masks
from antidote_fast.models.adapters import check_adapter, load_adapter
from antidote_fast.models.loading import check_not_quantized
from antidote_fast.norms.activation_norms import ActivationNorms

CPU_SECONDS = 20
THOROUGH = settings.default.max_examples > 1000  # --hypothesis-profile=fuzz


def inputs(share):
    """Settings of one reader: its share of a thorough run, a few in an ordinary one."""
    return settings(
        max_examples=round(settings.default.max_examples * share)
        if THOROUGH
        else round(sampling.examples(6000, 1200) * share),
        derandomize=not THOROUGH,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


COUNT = itertools.count(1)


def read(reader, *arguments, **options):
    """The one property: a value, or an AntidoteError of one line; None for the latter."""
    next(COUNT)
    try:
        with fuzzing.within(CPU_SECONDS):
            return reader(*arguments, **options)
    except AntidoteError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 1500
    return None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to write in."""
    return tmp_path_factory.mktemp("fuzz")


ROWS = [
    {"instruction": "how to make a cake", "input": "", "output": "two plus three"},
    {"prompt": "what is a cake", "response": "good", "is_safe": False},
    {"sentence": "a good cake", "label": 1},
    {"question": "two plus three", "answer": "5 #### 5"},
    {"text": "the user", "label": 2},
]


@inputs(0.2)
@given(
    kind=st.integers(0, 4),
    name=st.sampled_from(["data.jsonl", "data.json"]),
    role=st.sampled_from(["", "", ":unsafe", ":realign"]),
    require_output=st.booleans(),
    data=st.data(),
)
def test_data_sets(place, kind, name, role, require_output, data):
    path = place / name
    rows = fuzzing.Sound(ROWS[kind], ROWS[kind], *ROWS)
    path.write_bytes(data.draw(fuzzing.json_lines(rows)))
    records = read(load_records, f"{path}{role}", limit=3, require_output=require_output)
    for record in records or ():
        for text in (record.instruction, record.input, record.output):
            assert isinstance(text, str)
            text.encode("utf-8")


JOBS = [
    {"adapter": "a"},
    {"adapter": "b/c", "name": "d", "dataset": "data.jsonl", "ratio": 0.2, "seed": 3},
    {"adapter": "e", "targets": ["q_proj"], "ignore": [], "scope": "row", "template": "alpaca"},
]


@inputs(0.1)
@given(data=st.data())
def test_manifests_of_fleets(place, data):
    path = place / "manifest.jsonl"
    path.write_bytes(data.draw(fuzzing.json_lines(fuzzing.Sound(*JOBS))))
    config = FleetConfig(
        model_name_or_path="m", manifest=str(path), output_dir="o", dataset="harmful.jsonl"
    )
    for job in read(read_jobs, config) or ():
        assert Path(job.config.output_dir).parent == Path("o")
        assert 0 < job.config.ratio <= 1


YAML = [
    b"model_name_or_path: m\noutput_dir: o\ndataset: d\nratio: 0.3\nseed: 5\ntargets: [q, v]\n",
    b"{model_name_or_path: m, output_dir: o, dataset: d, norms: null, overwrite: true}\n",
    b"model_name_or_path: m\noutput_dir: o\nalign: {dataset: a}\nfinetune:\n  dataset: f\n"
    b"  lora_targets: [q_proj]\nprune: {dataset: h, ratio: 0.1}\nevaluate: {harmful_dataset: h}\n",
]
DOUBLED = b"".join(b"l%d: &l%d [*l%d, *l%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 40))
PARTS = [
    *(b"&a ", b"*a", b"&a [*a, *a]", b"<<: *a\n", b"!!python/object/apply:os.system [id]", b"!!x "),
    *(b"!!binary x", b"!!set {a}", b"? ", b"- ", b": ", b"---\n", b"...\n", b"%YAML 9.9\n", b"\t"),
    *(b"[" * 3000, b"{a: " * 3000, b"|\n x", b">-\n", b"'", b'"', b"\x00", b"\xff", b"\r", b"#"),
    *(b"9" * 5000, b"0x" + b"f" * 50, b"1_0", b"1e999", b".nan", b"-.inf", b"yes", b"~", b"0o9"),
    *(b"2026-11-23", b"1:2:3", b"=", b"class_path: os.system\n", b"config: x\n", b"help: 1\n"),
    *(b"l0: &l0 [x]\n" + DOUBLED, b"a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n"),
]


@inputs(0.1)
@given(kind=st.sampled_from([PruneConfig, RunConfig]), data=st.data())
def test_yaml_flags(place, kind, data):
    text = data.draw(st.sampled_from(YAML))
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.integers(0, 6))
        text = text[:start] + data.draw(st.sampled_from(PARTS) | st.binary(max_size=6)) + text[end:]
    path = place / "flags.yaml"
    path.write_bytes(data.draw(fuzzing.scrambled(fuzzing.Sound(text))))
    found = read(flags.from_words, kind, ["--config", str(path)], "prune")
    assert found is None or isinstance(found[0], kind)


def made_from(sound, name):
    """A strategy for the bytes of one file of a sound folder, changed."""
    if name.endswith(".json"):
        return fuzzing.json_file(fuzzing.Sound(json.loads((sound / name).read_text())))
    return fuzzing.safetensors_file(fuzzing.split_safetensors(sound / name))


def broken_copy(sound, folder, changes):
    """A folder of links to the files of ``sound``, those in ``changes`` written."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in sound.iterdir():
        if file.name not in changes:
            shutil.copyfile(file, folder / file.name)
    for name, contents in changes.items():
        (folder / name).write_bytes(contents)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A model of one layer in two files, so that its headers are short."""
    folder = tmp_path_factory.mktemp("sharded") / "sound"
    tiny.build(layers=1).save_pretrained(folder, max_shard_size="30KB")
    return folder


@inputs(0.2)
@given(data=st.data())
def test_model_folders(place, sharded, data):
    shards = sorted(p.name for p in sharded.glob("*.safetensors"))
    names = ["config.json", "model.safetensors.index.json", *shards[:2]]
    name = data.draw(st.sampled_from(names))
    changes = {name: data.draw(made_from(sharded, name))}
    folder = broken_copy(sharded, place / "model", changes)
    checkpoint = read(open_checkpoint, folder)
    if checkpoint is not None:
        read(checkpoint.fingerprint)
        read(checkpoint.read, list(checkpoint.tensors)[:5])
        read(check_not_quantized, checkpoint)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(a base of one layer, an adapter on it with patterns)."""
    root = tmp_path_factory.mktemp("pair")
    tiny.build(layers=1).save_pretrained(root / "base")
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*v_proj": 3}}
    tiny.save_adapter(tiny.add_lora(tiny.build(layers=1), **patterns), root / "adapter")
    return root / "base", root / "adapter"


@inputs(0.2)
@given(data=st.data())
def test_adapters(place, pair, data):
    base, sound = pair
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    folder = broken_copy(sound, place / "adapter", {name: data.draw(made_from(sound, name))})
    adapter = read(open_checkpoint, folder)
    if adapter is not None:
        read(check_adapter, adapter, open_checkpoint(base))


@inputs(0.02)
@given(data=st.data())
def test_adapters_on_a_model(place, pair, data):
    """What passes our checks and reaches PEFT."""
    _, sound = pair
    name = "adapter_config.json"
    folder = broken_copy(sound, place / "loaded", {name: data.draw(made_from(sound, name))})
    read(load_adapter, tiny.build(layers=1), folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of this tool with norms, masks and a report."""
    folder = tmp_path_factory.mktemp("written") / "sound"
    sums = {f"layers.{i}.weight": torch.rand(5) for i in range(2)}
    norms = ActivationNorms(sums, num_sequences=2, num_tokens=9, transposed=["layers.0.weight"])
    masks = {key: PackedMask(torch.ones(2, 1, dtype=torch.uint8), (2, 5)) for key in sums}
    with output_folder(folder) as staged:
        norms.save(staged / "norms.safetensors")
        save_masks(staged / "masks.safetensors", masks)
        (staged / "report.json").write_text(
            '{"schema_version": 1, "stage": "prune", "layers": [1]}'
        )
    return folder


@inputs(0.18)
@given(data=st.data())
def test_what_this_tool_wrote(place, written, data):
    """COMPLETE.json, report.json, norms and masks; ``inspect`` and ``verify`` read them all."""
    name = data.draw(
        st.sampled_from(["COMPLETE.json", "report.json", "norms.safetensors", "masks.safetensors"])
    )
    changes = {name: data.draw(made_from(written, name))}
    folder = broken_copy(written, place / "written", changes)
    found = read(load_masks, folder / "masks.safetensors")
    if found is not None:
        read(save_masks, place / "again.safetensors", *found)
    norms = read(ActivationNorms.load, folder / "norms.safetensors")
    if norms is not None:
        read(norms.save, place / "again.safetensors")
        for key in norms.keys:
            read(norms.act_norm, key, "global")
    read(verify_folder, folder)
    read(check_output_folder, folder, True)
    read(hash_inputs, [folder])
    read(inspect, folder)
