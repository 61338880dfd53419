#!/usr/bin/env python3
"""Run a recipe in a virtual environment of its own, with modprop_fast as this tree has it.

    python examples/run.py --list
    python examples/run.py nengo_node
    python examples/run.py --all

The package is built once as a wheel, the environments are kept (`--envs`) and refreshed when a recipe's
requirements, the package or the interpreter change.  Exit code 0: it ran and learned; 77: skipped, with the reason in the
last line; anything else: it failed.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TREE = HERE.parent
RECIPES = sorted(path.parent.name for path in HERE.glob("*/main.py"))
SKIPPED = 77
# What the interpreter outside says of itself must not reach the one inside.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"MPLBACKEND": "Agg"}


def key(*parts):
    return hashlib.sha256("\0".join([sys.version, *parts]).encode()).hexdigest()[:16]


def quiet(*command):
    return subprocess.run(list(map(str, command)), env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def checked(*command):
    done = quiet(*command)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def wheel(envs):
    """(path of the package's wheel, key of its sources), built from a copy so that the tree stays as it is."""
    sources = [
        TREE / "setup.py",
        TREE / "pyproject.toml",
        *(TREE / "src").glob("*.[ph]*"),
        *TREE.glob("modprop_fast/**/*.[ph]*"),
    ]
    sources = sorted(path for path in sources if path.is_file() and path.suffix != ".pyc")
    source_key = key(*(f"{path.relative_to(TREE)}\0{path.read_text()}" for path in sources))
    folder = envs / f"wheel-{source_key}"
    if not list(folder.glob("*.whl")):
        print(f"building the wheel of {TREE}", flush=True)
        for old in envs.glob("wheel-*"):
            shutil.rmtree(old)
        with tempfile.TemporaryDirectory() as place:
            out = shutil.ignore_patterns(
                ".*", "venv", "build", "dist", "runs", "*.egg-info", "*.so", "*.pyd", "core.c", "kernels_*.c"
            )
            shutil.copytree(TREE, Path(place) / "tree", ignore=out)
            checked(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, Path(place) / "tree")
    (path,) = folder.glob("*.whl")
    return path, source_key


def environment(name, envs):
    """The recipe's interpreter; a string, the reason, where pip cannot install what it requires."""
    package, package_key = wheel(envs)
    requirements = HERE / name / "requirements.txt"
    requirements_key = key(requirements.read_text())
    place, made = envs / name, envs / name / "made-of"
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    was = made.read_text().split() if made.exists() else ["", ""]
    if was == [requirements_key, package_key]:
        return python
    if was[0] != requirements_key:
        print(f"making the environment {place}", flush=True)
        checked(sys.executable, "-m", "venv", "--clear", place)
        done = quiet(python, "-m", "pip", "install", "-q", "-r", requirements)
        if done.returncode:
            shutil.rmtree(place)
            return (done.stderr.strip() or "pip gave no reason").splitlines()[-1]
    made.unlink(missing_ok=True)
    checked(python, "-m", "pip", "install", "-q", package)  # with NumPy, where the requirements brought none
    checked(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", package)
    made.write_text(f"{requirements_key} {package_key}")
    return python


def run(name, envs):
    python = environment(name, envs)
    if isinstance(python, str):
        print(f"{name}: skipped: {python}", flush=True)
        return SKIPPED
    return subprocess.run([python, "main.py"], cwd=HERE / name, env=ENVIRONMENT, stdin=subprocess.DEVNULL).returncode


def main():
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modprop_fast" / "examples"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=RECIPES, metavar="NAME", help="a recipe: " + ", ".join(RECIPES))
    parser.add_argument("--list", action="store_true", help="print the names of the recipes")
    parser.add_argument("--all", action="store_true", help="run every recipe; fails if one fails")
    parser.add_argument("--envs", type=Path, default=cache, metavar="DIR", help="where environments are kept (%(default)s)")
    args = parser.parse_args()
    if args.list + args.all + (args.name is not None) != 1:
        parser.error("expected one of NAME, --list and --all")
    if args.list:
        print("\n".join(RECIPES))
        return 0
    args.envs.mkdir(parents=True, exist_ok=True)
    codes = {}
    for name in RECIPES if args.all else [args.name]:
        print(f"== {name}", flush=True)
        codes[name] = run(name, args.envs.resolve())
    if args.all:
        for name, code in codes.items():
            print(f"{name:28s}", {0: "ran", SKIPPED: "skipped"}.get(code, f"failed with {code}"))
        return max((code for code in codes.values() if code != SKIPPED), default=SKIPPED)
    return codes[args.name]


if __name__ == "__main__":
    sys.exit(main())
