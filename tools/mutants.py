"""Break the library on purpose, one change at a time, and see whether a test notices.

    python tools/mutants.py [--only WORD] [--workers 2] [--out FILE]

`tools/mutants.txt` lists the changes. Each runs in a copy of the project with the tests that its entry names; a change
that they let pass is tried once more with every test that imports the module. What still passes has survived.
"""
import argparse, os, re, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tools/mutants.txt"
PARTS = ("sae_nb", "tests", "tools", "nbs", "benchmarks", "recipes", "settings.ini", "pyproject.toml", "setup.py", "README.md")
SECONDS = 600   # a change that makes a test hang is noticed


@dataclass(frozen=True)
class Mutant:
    "One change of a module: `old` becomes `new`."
    module: str
    what: str
    old: str
    new: str
    tests: tuple   # where to look first: files of tests/, or file::name

    @property
    def path(self): return Path("sae_nb", *self.module.split(".")).with_suffix(".py")

    def applied(self):
        "The module's source with the change; the place must be there once."
        source = (ROOT / self.path).read_text(encoding="utf-8")
        found = source.count(self.old)
        if found != 1: raise ValueError(f"{self.module}: {self.what}: the place stands {found} times in {self.path}")
        return source.replace(self.old, self.new)


def mutants(path=LIST):
    "The entries of the list."
    for entry in re.split(r"(?m)^## ", path.read_text(encoding="utf-8"))[1:]:
        head, *lines = entry.rstrip().splitlines()
        module, what = head.split(": ", 1)
        part = lambda mark: "\n".join(line[2:] for line in lines if line.startswith(mark))
        tests = tuple(word for line in lines if line.startswith("? ") for word in line[2:].split())
        yield Mutant(module.strip(), what.strip(), part("- "), part("+ "), tests)


def all_tests(mutant):
    "Every file of tests/ that names the module, but not the lessons and the book's hygiene."
    left_out = ("test_book", "test_notebooks", "test_packaging")
    name = re.compile(rf"\bsae_nb\.{re.escape(mutant.module)}\b|\bsae_nb import [^\n]*\b{mutant.module.split('.')[0]}\b")
    return tuple(p.name for p in sorted((ROOT / "tests").glob("test_*.py")) if p.stem not in left_out and name.search(p.read_text(encoding="utf-8")))


def passes(copy, tests):
    "Do `tests` pass in `copy`? The name of the first that does not, else None."
    if not tests: return None
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--durations=0", *(f"tests/{t}" for t in tests)]
    env = {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try: done = subprocess.run(command, cwd=copy, env=os.environ | env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired: return "it hangs"
    if done.returncode == 0: return None
    failed = re.search(r"(?m)^(?:FAILED|ERROR) (\S+)", done.stdout)
    return failed[1].removeprefix("tests/") if failed else "it cannot be imported"


def tried(mutant, copy):
    "Who notices `mutant` in `copy`, or None; and the seconds that it took."
    start, target = time.time(), copy / mutant.path
    original = target.read_text(encoding="utf-8")
    target.write_text(mutant.applied(), encoding="utf-8")
    try: seen = passes(copy, mutant.tests) or passes(copy, all_tests(mutant))
    finally: target.write_text(original, encoding="utf-8")
    return seen, time.time() - start


def copied(folder):
    "A copy of the project below `folder`; the packaged models are linked."
    for name in PARTS:
        source = ROOT / name
        if source.is_dir(): shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "assets", ".*"))
        else: shutil.copy(source, folder / name)
    (folder / "sae_nb/assets").symlink_to(ROOT / "sae_nb/assets")
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the changes whose module or description has this word")
    parser.add_argument("--workers", type=int, default=2, help="changes tried at a time")
    parser.add_argument("--out", help="write the table there as well")
    args = parser.parse_args()
    chosen = [m for m in mutants() if args.only in f"{m.module}: {m.what}"]
    for m in chosen: m.applied()   # a stale entry stops here
    with tempfile.TemporaryDirectory() as tmp:
        copies = Queue()
        for i in range(args.workers): copies.put(copied(Path(tmp, str(i))))

        def work(m):
            copy = copies.get()
            try: seen, seconds = tried(m, copy)
            finally: copies.put(copy)
            line = f"| {m.module} | {m.what} | {seen or '**nothing**'} |"
            print(f"{line} {seconds:.0f} s", flush=True)
            return line, seen

        with ThreadPoolExecutor(args.workers) as pool: found = list(pool.map(work, chosen))
    noticed = sum(seen is not None for _, seen in found)
    total = f"{noticed} of {len(found)} changes are noticed by tests/ ({noticed / max(1, len(found)):.0%})."
    print(total)
    if args.out: Path(args.out).write_text("\n".join(["| module | change | noticed by |", "|---|---|---|", *(line for line, _ in found), "", total, ""]))


if __name__ == "__main__": main()
