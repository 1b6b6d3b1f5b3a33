"The package as a user gets it: wheel from the sdist, installed into a fresh environment."
import os, shutil, subprocess, sys, sysconfig, tarfile, venv
from email.parser import Parser
from pathlib import Path

import pytest
from book import ROOT, settings
from packaging.requirements import Requirement

PACKAGE = ROOT / "sae_nb"
MODULES = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")
DATA = sorted(p.relative_to(PACKAGE).as_posix() for d in ("assets", "static") for p in (PACKAGE / d).rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def run(*args, cwd):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(args, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    if done.returncode: pytest.fail((done.stdout + done.stderr)[-6000:], pytrace=False)
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The bin folder of a fresh environment with the package installed, other packages seen from this one."
    tmp = tmp_path_factory.mktemp("packaging")
    skip = shutil.ignore_patterns(".git", ".venv", "_docs", "_proc", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp / "source", ignore=skip)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp, cwd=tmp / "source")
    (sdist,) = tmp.glob("*.tar.gz")
    with tarfile.open(sdist) as t: t.extractall(tmp / "sdist", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (tmp / "sdist").iterdir()
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp, cwd=unpacked)
    (wheel,) = tmp.glob("*.whl")
    venv.create(tmp / "env", with_pip=False)
    python = tmp / "env/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp).strip()
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    open(f"{site}/others.pth", "w").write("\n".join(sorted(paths)) + "\n")   # its .pth files, editable installs among them, are not followed
    return python.parent, site


def test_every_module_imports(installed, tmp_path):
    bin, site = installed
    code = f"import importlib\nfor m in {['sae_nb', *MODULES]!r}: print(importlib.import_module(m).__file__)"
    files = run(bin / "python", "-I", "-c", code, cwd=tmp_path).splitlines()
    assert len(files) == 1 + len(MODULES) and all(f.startswith(site) for f in files), files


def test_data_comes_along(installed, tmp_path):
    bin, _ = installed
    code = "from importlib.resources import files\nfor n in %r: print(files('sae_nb').joinpath(n).stat().st_size)" % DATA
    sizes = run(bin / "python", "-I", "-c", code, cwd=tmp_path).split()
    assert [int(s) for s in sizes] == [(PACKAGE / n).stat().st_size for n in DATA]


def test_metadata_is_that_of_settings(installed, tmp_path):
    bin, _ = installed
    cfg = settings()
    meta = Parser().parsestr(run(bin / "python", "-I", "-c", "from importlib.metadata import distribution as d; print(d('sae_nb').read_text('METADATA'))", cwd=tmp_path))
    extras = {k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")}
    required = [*cfg["requirements"].split(), *(f'{r}; extra == "{x}"' for x, rs in extras.items() for r in rs)]
    assert {str(Requirement(r)) for r in meta.get_all("Requires-Dist")} == {str(Requirement(r)) for r in required}
    assert (meta["Version"], meta["License-Expression"], meta["License-File"]) == (cfg["version"], "Apache-2.0", "LICENSE")
    assert meta["Requires-Python"] == f">={cfg['min_python']}" and set(meta.get_all("Provides-Extra")) == set(extras)


def test_an_editable_install_works_from_the_folder_of_the_clone(installed, tmp_path):
    skip = shutil.ignore_patterns(".git", ".venv", "_docs", "_proc", "runs", "build", "dist", "*.egg-info", "__pycache__")
    clone = tmp_path / "sae_nb"
    shutil.copytree(ROOT, clone, ignore=skip)
    env = tmp_path / "env"
    venv.create(env, with_pip=False)
    python = env / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    Path(site, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*install, "--no-build-isolation", "--editable", clone, cwd=tmp_path)
    code = "import sae_nb; from sae_nb.text import load_tokenizer; print(sae_nb.__file__, len(load_tokenizer()))"
    assert run(python, "-c", code, cwd=tmp_path).split() == [str(clone / "sae_nb/__init__.py"), "4096"]


@pytest.mark.skipif("sae_nb.cli" not in MODULES, reason="there is no command line yet")
def test_command_line_starts(installed, tmp_path):
    bin, _ = installed
    assert "train" in run(bin / "sae-nb", "--help", cwd=tmp_path)


def test_nothing_of_the_browser_is_missing_where_it_was_installed():
    "`.ci/run` installs a browser and says so; there no browser test may be left out. Elsewhere `make test` does without."
    from browsing import MISSING
    if os.environ.get("SAE_NB_BROWSER_TESTS"): assert not MISSING, f"the browser tests would be left out: {MISSING} is missing"
