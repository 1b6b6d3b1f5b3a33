"""Keep the notebooks and the README in their one stored form.

    python tools/book.py run [--flags slow gpu] [NOTEBOOK ...]   # execute in place and store clean outputs (default: all)
    python tools/book.py clean [NOTEBOOK ...]                    # store clean outputs without executing
    python tools/book.py readme                                  # nbs/index.ipynb -> README.md and its pictures
"""
import argparse, hashlib, os, posixpath, re, sys, time
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PICTURES = "nbs/images"


def settings():
    "The project's settings.ini."
    ini = ConfigParser()
    ini.read_file((ROOT / "settings.ini").open(encoding="utf-8"))
    return ini["DEFAULT"]


def notebooks():
    "Every notebook of the book, in reading order."
    paths = [p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts)]
    return sorted(paths, key=lambda p: (len(p.relative_to(NBS).parts), p))


def read(path): return nbformat.read(path, as_version=4)


def dumps(nb): return nbformat.writes(nb) + "\n"


def directives(cell):
    "The `#|` lines that open a code cell, as {name: rest of the line}."
    found = {}
    for line in cell.source.splitlines() if cell.cell_type == "code" else ():
        if not line.strip(): continue
        if not (m := re.match(r"\s*#\s*\|\s*([\w-]+):?\s*(.*)", line)): break
        found[m[1]] = m[2].strip()
    return found


def clean(nb):
    "Drop from `nb` what another run or another machine would change."
    from nbdev.clean import clean_nb
    nb.nbformat, nb.nbformat_minor = 4, 5
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    for i, cell in enumerate(nb.cells):
        cell.metadata = {}
        cell.setdefault("id", hashlib.sha256(f"{i}{cell.source}".encode()).hexdigest()[:8])
        if cell.cell_type == "code": cell.execution_count, cell.outputs = None, clean_outputs(cell.outputs)
    clean_nb(nb)
    return nbformat.from_dict(nb)


def clean_outputs(outputs):
    "Outputs without stderr, live views and metadata; neighbouring streams joined."
    kept = []
    for o in outputs:
        stream = o.output_type == "stream"
        if stream and o.name == "stderr": continue
        if stream and kept and kept[-1].output_type == "stream":
            kept[-1].text += o.text
            continue
        o.pop("transient", None)
        if "metadata" in o: o.metadata = {}
        if "data" in o: o.data.pop("application/vnd.jupyter.widget-view+json", None)
        kept.append(o)
    return kept


def execute(path, flags):
    "`path` executed from a fresh kernel; cells marked with a test flag not in `flags` keep what they show."
    from nbclient import NotebookClient
    nb = read(path)
    skipped = set(settings()["tst_flags"].split()) - set(flags)
    for cell in nb.cells:
        marks = directives(cell)
        if skipped & marks.keys() or marks.get("eval") == "false": cell.metadata["tags"] = ["skip-execution"]
    NotebookClient(nb, timeout=600, kernel_name="python3", store_widget_state=False,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    return nb


def store(paths, flags=None):
    "Write each notebook clean, executed first when `flags` is a list."
    for path in paths:
        start = time.time()
        try: nb = read(path) if flags is None else execute(path, flags)
        except Exception as e: sys.exit(f"{path}: {e}")
        path.write_text(dumps(clean(nb)), encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, {time.time() - start:.0f} s", flush=True)


def from_root(source):
    "Markdown written in nbs/ with its relative links seen from the repository's root."
    def move(m):
        target = m[2]
        if re.match(r"[a-z][a-z+.-]*:|[#/]", target): return m[0]
        return m[1] + posixpath.normpath(posixpath.join("nbs", target)) + m[3]
    source = re.sub(r"(\]\()([^)\s]+)([)\s])", move, source)
    return re.sub(r"""((?:src|href)=["'])([^"']+)(["'])""", move, source)


def title(output):
    "What an output's plotly figure is called, or an empty string."
    t = output.data.get("application/vnd.plotly.v1+json", {}).get("layout", {}).get("title", "")
    t = (t.get("text") or "") if isinstance(t, dict) else t
    return re.sub(r"<[^>]*>", "", re.sub(r"<br/?>", " ", t)).strip()


def readme():
    "README.md as text, and the pictures it shows as {path: bytes}."
    from nbconvert import MarkdownExporter
    nb = clean(read(NBS / "index.ipynb"))
    nb.metadata.language_info = {"name": "python"}
    nb.cells = [c for c in nb.cells if not {"hide", "default_exp", "export"} & directives(c).keys()]
    for cell in nb.cells:
        marks = directives(cell)
        if cell.cell_type == "markdown": cell.source = from_root(cell.source)
        if marks.get("echo") == "false": cell.metadata["transient"] = {"remove_source": True}
        if marks.get("output") == "false": cell.outputs = []
        if marks: cell.source = re.sub(r"\A(\s*#\s*\|.*\n?)+", "", cell.source)
    names = {(i, j): title(o) for i, c in enumerate(nb.cells) for j, o in enumerate(c.get("outputs", ())) if "data" in o}
    kinds = ["image/png", "image/svg+xml", "image/jpeg", "text/markdown", "text/latex", "text/html", "text/plain"]
    exporter = MarkdownExporter(config={"NbConvertBase": {"display_data_priority": kinds}})
    text, found = exporter.from_notebook_node(nb, {"unique_key": "readme", "output_files_dir": PICTURES})
    for (i, j), name in names.items():
        if name: text = re.sub(rf"!\[\w+\]\(({PICTURES}/readme_{i}_{j}\.\w+)\)", lambda m: f"![{name}]({m[1]})", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = "<!-- Made from nbs/index.ipynb by `make readme`. -->\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return text, {k: v for k, v in found["outputs"].items() if f"({k})" in text}


def write_readme():
    text, pictures = readme()
    for old in (ROOT / PICTURES).glob("readme_*"): old.unlink()
    for name, data in pictures.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(data)
    (ROOT / "README.md").write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "clean"): commands.add_parser(name).add_argument("notebook", nargs="*", type=Path)
    commands.choices["run"].add_argument("--flags", nargs="+", default=[], help="test flags whose cells are run too")
    commands.add_parser("readme")
    args = parser.parse_args()
    os.environ.setdefault("SAE_NB_PNG", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if args.command == "readme": write_readme()
    else: store([p.resolve() for p in args.notebook] or notebooks(), args.flags if args.command == "run" else None)


if __name__ == "__main__": main()
