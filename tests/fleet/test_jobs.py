"""Job lists of fleets: every line is checked before any work."""

import os

import fleets
import pytest
from fleets import config, manifest

from antidote_fast import DataError, UsageError
from antidote_fast.fleet import fleet
from antidote_fast.fleet import jobs as job_list
from antidote_fast.fleet.jobs import read_jobs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return fleets.make(tmp_path_factory)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "holds no jobs"),
        (["", "  "], "holds no jobs"),
        (["{"], "jobs.jsonl:1: is not valid JSON"),
        (["[1]"], "jobs.jsonl:1: must be a JSON object"),
        (['{"adapter": "a", "adapter": "b"}'], "a key is there twice"),
        (['{"adapter": "a"}', "", '{"name": "x"}'], "jobs.jsonl:3: missing: adapter must be"),
        (['{"adapter": 5}'], "adapter=5: adapter must be a text"),
        (['{"adapter": ""}'], "adapter='': adapter must be a text"),
        (['{"adapter": "a", "ratioo": 1}'], "'ratioo': no such key; known are adapter, name"),
        (['{"adapter": "a", "output_dir": "x"}'], "'output_dir': no such key"),
        (['{"adapter": "a", "ratio": 2}'], r"jobs.jsonl:1: ratio=2: must be in \(0, 1\]"),
        (['{"adapter": "a", "ratio": "x"}'], "ratio='x': must be a number"),
        (['{"adapter": "a", "ratio": true}'], "ratio=True: must be a number"),
        (['{"adapter": "a", "ratio": NaN}'], r"ratio=nan: must be in \(0, 1\]"),
        (['{"adapter": "a", "seed": 1.5}'], "seed=1.5: must be an integer"),
        (['{"adapter": "a", "scope": "x"}'], "scope='x': must be one of row, tensor, global"),
        (['{"adapter": "a", "targets": "q"}'], "targets='q': must be a list of texts or null"),
        (['{"adapter": "a", "response_only": 1}'], "response_only=1: must be true or false"),
        (['{"adapter": "a"}', '{"adapter": "b/a"}'], ":2: name='a': line 1 has it already"),
        (['{"adapter": "a"}', '{"adapter": "b", "name": "A"}'], "line 1 has it already"),
        (['{"adapter": "a", "name": "../x"}'], "must be a plain file name"),
        (['{"adapter": "a", "name": "x/y"}'], "must be a plain file name"),
        (['{"adapter": "a", "name": ".x"}'], "must be a plain file name"),
        (['{"adapter": ".."}'], "must be a plain file name"),
        (['{"adapter": "a", "name": "failed"}'], "must be a plain file name"),
        (['{"adapter": "a", "name": "summary.json"}'], "must be a plain file name"),
        (['{"adapter": "a", "name": "' + "x" * 201 + '"}'], "must be a plain file name"),
        (["[" * 100_000], "is not valid JSON"),
    ],
)
def test_a_manifest_is_refused_by_its_line(lines, says, folders, tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=says) as raised:
        fleet.run(config(folders, tmp_path / "out", path))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    assert not (tmp_path / "out").exists()


def test_manifests_that_are_no_text_too_large_or_not_there(folders, tmp_path, monkeypatch):
    path = tmp_path / "jobs.jsonl"
    for content, says in ((b"\xff\xfe", "is not UTF-8"), (b"x" * 64, "larger than")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=says):
            read_jobs(config(folders, tmp_path, path))
        monkeypatch.setattr(job_list, "_MAX_BYTES", 63)
    with pytest.raises(DataError, match="no such file"):
        read_jobs(config(folders, tmp_path, tmp_path / "none.jsonl"))
    monkeypatch.setattr(job_list, "_MAX_JOBS", 1)
    monkeypatch.setattr(job_list, "_MAX_BYTES", 1 << 20)
    manifest(tmp_path, {"adapter": "a"}, {"adapter": "b"})
    with pytest.raises(DataError, match="more than 1 jobs"):
        read_jobs(config(folders, tmp_path, path))


def test_paths_are_seen_from_the_manifest(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [first, *_] = read_jobs(config(folders, "out"))
    assert first.config.adapter == str(folders.root / "adapters/plain")
    assert first.config.output_dir == os.path.join("out", "plain")
    path = manifest(folders.root, {"adapter": "a", "dataset": "other.jsonl"}, name="rel.jsonl")
    [job] = read_jobs(config(folders, "out", path))
    assert job.config.dataset == str(folders.root / "other.jsonl")
    path = manifest(folders.root, {"adapter": "a", "dataset": "PKU/BeaverTails"}, name="hub.jsonl")
    [job] = read_jobs(config(folders, "out", path))
    assert job.config.dataset == "PKU/BeaverTails"


def test_jobs_need_data_unless_their_score_does_not(folders, tmp_path):
    path = manifest(tmp_path, {"adapter": "a"})
    with pytest.raises(DataError, match=r"jobs.jsonl:1: dataset=None: must be"):
        read_jobs(config(folders, tmp_path / "out", path, dataset=None))
    assert read_jobs(config(folders, "out", path, dataset=None, score="random"))


def test_workers_are_for_ray(folders, tmp_path):
    with pytest.raises(UsageError, match="num_workers=2: must be left out with engine local"):
        config(folders, tmp_path, num_workers=2)
