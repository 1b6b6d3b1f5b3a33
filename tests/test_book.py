"The book's hygiene: what is exported, stored, linked and imported is what the notebooks say."
import ast, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml
from book import NBS, ROOT, clean, directives, dumps, notebooks, read, readme, settings

try: import tomllib
except ImportError: import tomli as tomllib

PACKAGE = ROOT / "sae_nb"
LIBRARY = [p for p in notebooks() if p.parent == NBS and p.name[:2].isdigit()]
every_notebook = pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(NBS).as_posix())
every_library_notebook = pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.name)


def run(*args, cwd):
    "The output of `python args` in `cwd`, away from this checkout; its errors when it fails."
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTHONPATH")}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    if done.returncode: pytest.fail(done.stderr[-6000:], pytrace=False)
    return done.stdout


@pytest.fixture
def copy(tmp_path):
    "What nbdev reads, in a folder that it may write to; the assets are linked."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    skip = shutil.ignore_patterns(".*", "__pycache__", "assets")
    shutil.copytree(NBS, tmp_path / "nbs", ignore=skip)
    shutil.copytree(PACKAGE, tmp_path / "sae_nb", ignore=skip)
    if (PACKAGE / "assets").exists(): (tmp_path / "sae_nb/assets").symlink_to(PACKAGE / "assets")
    return tmp_path


def source_files(package): return {p.relative_to(package).as_posix(): p.read_text(encoding="utf-8") for p in package.rglob("*.py")}


def exported(nb):
    "The module that a notebook exports, or None."
    return next((directives(c)["default_exp"] for c in nb.cells if "default_exp" in directives(c)), None)


def exported_cells(nb): return [c for c in nb.cells if {"export", "exports", "exporti"} & directives(c).keys()]


# --- the package and the notebooks -----------------------------------------------------------------

def test_export_is_current(copy):
    for p in (copy / "sae_nb").rglob("*.py"):
        if p.name != "__init__.py": p.unlink()
    run("-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=copy)
    made, stored = source_files(copy / "sae_nb"), source_files(PACKAGE)
    assert made.keys() == stored.keys(), "sae_nb/ and the notebooks have different modules: run make export"
    stale = [name for name in made if made[name] != stored[name]]
    assert not stale, f"{stale} differ from the notebooks: run make export"


MODULES = {exported(read(p)): int(p.name[:2]) for p in LIBRARY if exported(read(p))}
LAYERS = {0: {0}, 1: {0, 1}, 2: {0, 2}, 3: {3}, 4: {0, 2, 4}, 5: {4, 5}, 8: set(range(9)), 9: set(range(10))}   # decade -> decades it may import
EVERYWHERE = {"core", "show", "page"}


def package_imports(module):
    "The modules of sae_nb that `module` imports anywhere in it, and its star imports."
    found, stars = set(), []
    for node in ast.walk(ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["sae_nb", *module.split(".")][: -node.level] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            names = [base, *(f"{base}.{a.name}" for a in node.names)]
            stars += [base for a in node.names if a.name == "*"]
        else: continue
        found |= {n.removeprefix("sae_nb.") for n in names if n.startswith("sae_nb.")}
    return found & MODULES.keys(), stars


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_layers(module):
    number, (imports, stars) = MODULES[module], package_imports(module)
    upward = [m for m in imports if MODULES[m] >= number]
    across = [m for m in imports if MODULES[m] // 10 not in LAYERS[number // 10] and m not in EVERYWHERE]
    assert not upward, f"{module} imports {upward}, which come later in the book"
    assert not across, f"{module} imports {across}, which its layer may not"
    assert not stars, f"{module} imports everything from {stars}"


@every_library_notebook
def test_library_notebook_opens_with_its_name(path):
    nb = read(path)
    first, name = nb.cells[0], exported(nb)
    assert first.cell_type == "markdown" and re.match(r"# \S.*\n+> \S", first.source), f"{path.name} must open with '# name' and a '>' line"
    own = path.stem.partition("_")[2]
    assert name and own == name.rsplit(".")[-1], f"{path.name} exports {name}, not a module of its own name"
    assert first.source.splitlines()[0] == f"# {own}", f"{path.name} must open with '# {own}'"


@every_library_notebook
def test_library_notebook_is_short(path):
    lines = [line for c in exported_cells(read(path)) for line in c.source.splitlines() if line.strip() and not line.startswith("#|")]
    assert len(lines) <= 350, f"{path.name} exports {len(lines)} lines, more than 350: make it two notebooks"


@pytest.mark.parametrize("path", sorted(set(notebooks()) - set(LIBRARY)), ids=lambda p: p.relative_to(NBS).as_posix())
def test_lessons_export_nothing(path):
    nb = read(path)
    assert exported(nb) is None and not exported_cells(nb), f"{path.name} is no library notebook, but exports"


# --- what is stored --------------------------------------------------------------------------------

@every_notebook
def test_notebook_is_in_its_stored_form(path):
    assert path.read_text(encoding="utf-8") == dumps(clean(read(path))), f"{path.name} is not clean: run python tools/book.py clean"


@every_notebook
def test_notebook_is_small(path):
    assert path.stat().st_size <= 300_000, f"{path.name} has {path.stat().st_size:,} bytes, more than 300,000"


@every_notebook
def test_no_stored_errors_or_counts(path):
    for c in read(path).cells:
        if c.cell_type != "code": continue
        assert c.execution_count is None and all(o.get("execution_count") is None for o in c.outputs), f"cell {c.id} has an execution count"
        assert not any(o.output_type == "error" for o in c.outputs), f"cell {c.id} stores an error"


HERE = [re.escape(str(p)) for p in (ROOT, Path.home()) if len(p.parts) > 2]
MACHINE_PATH = re.compile("|".join([*HERE, r"/(?:root|work|workspace)/", r"/tmp/tmp\w", r"/var/folders/", r"/(?:home|Users)/\w+/"]))


def texts(cell):
    "What a reader can read of a cell: its source and its textual outputs."
    yield cell.source
    for o in cell.get("outputs", ()):
        yield o.get("text", "")
        yield from (str(v) for k, v in o.get("data", {}).items() if not k.startswith("image/") or "svg" in k)


@every_notebook
def test_no_paths_of_one_machine(path):
    found = [m[0] for c in read(path).cells for t in texts(c) for m in MACHINE_PATH.finditer(t)]
    assert not found, f"{path.name} mentions {sorted(set(found))}"


def shows_a_value(cell):
    "Does a lesson cell end in an expression?"
    if cell.cell_type != "code" or {"export", "exports", "exporti", "default_exp", "hide", "slow", "gpu"} & directives(cell).keys(): return False
    body = ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M)).body
    return bool(body) and isinstance(body[-1], ast.Expr) and not cell.source.rstrip().endswith(";")


@every_notebook
def test_values_are_stored(path):
    cells = [c for c in read(path).cells if shows_a_value(c)]
    shown = sum(bool(c.outputs) for c in cells)
    assert 2 * shown >= len(cells), f"{path.name} stores outputs for {shown} of {len(cells)} cells: run make notebooks"


@every_notebook
def test_no_star_imports(path):
    stars = [c.id for c in read(path).cells if c.cell_type == "code" and re.search(r"^\s*from\s+\S+\s+import\s+\*", c.source, re.M)]
    assert not stars, f"{path.name} imports everything in the cells {stars}"


# --- the README and the documentation site -----------------------------------------------------------

def test_readme_is_current():
    text, pictures = readme()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "README.md differs from nbs/index.ipynb: run make readme"
    stored = {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in (NBS / "images").glob("readme_*")}
    assert stored == pictures, "the pictures of README.md differ from nbs/index.ipynb: run make readme"


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)[)\s]", text) + re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    local = [x.split("#")[0] for x in links if not re.match(r"[a-z][a-z+.-]*:|#", x)]
    broken = [x for x in local if not (ROOT / x).exists()]
    assert not broken, f"README.md links to {broken}"


def test_sidebar_lists_every_notebook():
    parts = yaml.safe_load((NBS / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    listed = [name for part in parts for name in part["contents"]]
    stored = [p.relative_to(NBS).as_posix() for p in notebooks()]
    assert sorted(listed) == sorted(stored), f"nbs/sidebar.yml and nbs/ differ by {sorted(set(listed) ^ set(stored))}"


def test_docs_can_be_made(copy):
    code = "from nbdev.quarto import refresh_quarto_yml; from nbdev.serve import proc_nbs; refresh_quarto_yml(); proc_nbs(n_workers=0, force=True)"
    run("-c", code, cwd=copy)
    for p in notebooks():
        made = (copy / "_proc" / p.relative_to(NBS)).read_text(encoding="utf-8")
        assert "#| export" not in made, f"{p.name} shows its directives in the documentation"
    for name in ("_quarto.yml", "sidebar.yml", "nbdev.yml", "styles.css"):
        assert (copy / "_proc" / name).read_text() == (NBS / name).read_text(), f"nbs/{name} is not what nbdev makes of settings.ini"


# --- the project ---------------------------------------------------------------------------------------

def test_pyproject_agrees_with_settings():
    cfg, toml = settings(), tomllib.loads((ROOT / "pyproject.toml").read_text())
    value = {"true": True, "false": False}
    assert toml["tool"]["nbdev"] == {k: value.get(cfg[k].lower(), cfg[k]) for k in toml["tool"]["nbdev"]}
    assert toml["tool"]["nbdev"].keys() == {"lib_path", "nbs_path", "doc_path", "tst_flags", "recursive", "custom_sidebar"}
    assert toml["project"]["name"] == cfg["lib_name"]
    assert toml["project"]["requires-python"] == f">={cfg['min_python']}"
    assert (toml["project"]["license"], cfg["license"]) == ("Apache-2.0", "apache2")


def loaded_after(modules, names):
    "Which of `names` are loaded once `modules` are imported in a fresh process."
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module('sae_nb.' + m)\nprint(*({set(names)!r} & sys.modules.keys()))"
    return run("-c", code, cwd=ROOT).split()


def test_importing_everything_loads_nothing_heavy():
    names = ["transformers", "datasets", "triton", "kaleido", "pandas", "matplotlib"]
    heavy = loaded_after([m for m in MODULES if not m.startswith("widgets.")], names + ["anywidget", "ipywidgets", "IPython"]) + loaded_after(list(MODULES), names)
    assert not heavy, f"importing sae_nb loads {heavy}: import them where they are used"


@pytest.mark.parametrize("module", [m for m in MODULES if m in ("core", "show", "page", "scaling", "plan", "features") or m.startswith("widgets.")])
def test_light_modules_do_without_torch(module):
    assert not loaded_after([module], ["torch"]), f"importing sae_nb.{module} loads torch"


def test_repository_is_small():
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    size = sum((ROOT / n).stat().st_size for n in names if (ROOT / n).is_file())
    assert 0 < size < 60e6, f"the repository has {size / 1e6:.0f} MB, more than 60"


def test_the_names_a_user_needs_stand_in_the_package_at_no_cost():
    code = """
import sys, sae_nb
assert not {"torch", "numpy", "sae_nb.core"} & sys.modules.keys()
import importlib
for name, module in sae_nb._MODULES.items():
    assert name in dir(sae_nb) and name in sae_nb.__all__
    value, meant = getattr(sae_nb, name), vars(importlib.import_module("sae_nb." + module))[name]
    assert value is meant or value.__name__ == "sae_nb." + name and callable(value), name
from sae_nb import SAE, train
assert sae_nb.train is train and not hasattr(sae_nb, "nothing")
try: next(sae_nb.sweep({}, "nowhere"))
except ValueError as e: print(e)
"""
    assert run("-c", code, cwd=ROOT).startswith("the sweep has no runs")
