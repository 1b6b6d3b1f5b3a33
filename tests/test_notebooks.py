"Every notebook runs from top to bottom, as `nbdev_test` runs it, each in a process of its own."
import resource, subprocess, sys

import pytest
from book import NBS, ROOT, notebooks, settings

RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb as run_notebook
path, flags, root = sys.argv[1:]
sys.exit(not run_notebook(Path(path), skip_flags=flags.split(), basepath=root)[0])
"""


SECONDS = 180   # of processor time, so that a busy machine changes nothing


def limited(): resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(NBS).as_posix())
def test_notebook(path, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as out:
        done = subprocess.run([sys.executable, "-c", RUN, path, settings()["tst_flags"], ROOT],
                              cwd=NBS, stdout=out, stderr=subprocess.STDOUT, timeout=1_200, preexec_fn=limited)
    why = f"needs more than {SECONDS} s of processor time" if done.returncode < 0 else "failed"
    if done.returncode: pytest.fail(f"{path.name} {why}:\n{log.read_text()[-6000:]}", pytrace=False)
