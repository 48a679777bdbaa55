"""The soak of ``make test-all`` in small: one adapter of each kind, two hostile, killed twice."""

import json
from pathlib import Path

import forked
import kill_sweep
import soak_kinds

HOSTILE = ("pissa", "endless_targets")


def test_a_small_fleet_that_is_killed_ends_as_if_nothing_had_been(tmp_path):
    assert len(soak_kinds.KINDS) == 10
    done = forked.run(
        Path(soak_kinds.__file__).with_name("soak.py"),
        *("12", "2", "1", tmp_path, "--one_in", "6", "--only", ",".join(HOSTILE)),
        environment=kill_sweep.ENVIRONMENT,
        timeout=280,
    )
    assert done.stdout, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert found["exit_code"] == 5
    assert found["runs"] == 3
    assert found["hostile"] == 2
    assert found["set_aside"] == sorted(HOSTILE)
