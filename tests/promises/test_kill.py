"""Jobs that are killed at every point at which they change the disk (``kill_sweep.py``)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kill_sweep
import pytest

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
    script = Path(kill_sweep.__file__)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, job, tmp_path],
        capture_output=True,
        text=True,
        timeout=850,
        env=os.environ | kill_sweep.ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert found["kills"] == found["points"] >= AT_LEAST[job]
    if job.startswith("stream"):
        assert found["resumed"] > found["points"] // 2  # most kills leave something to go on from
