"""Jobs that are killed at points at which they change the disk (``kill_sweep.py``)."""

import json

import forked
import kill_sweep
import pytest
import sampling

AT_LEAST = {
    "stream": 150,
    "stream_global": 100,
    "stream_adapter": 50,
    "overwrite": 40,
    "adapter": 20,
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("job", kill_sweep.JOBS)
def test_killed_anywhere(job, tmp_path):
    """Never a folder that loads half-pruned; given again, the command gives the very same files."""
    done = forked.run(
        kill_sweep.__file__,
        job,
        1 if sampling.WHOLE else 16,
        cwd=tmp_path,
        environment=kill_sweep.ENVIRONMENT,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert found["calls"] >= AT_LEAST[job]
    assert found["kills"] == found["points"] >= AT_LEAST[job] / 16
    if sampling.WHOLE:
        assert found["points"] == found["calls"]
    if job.startswith("stream"):
        assert found["resumed"] > found["points"] // 2  # most kills leave something to go on from
