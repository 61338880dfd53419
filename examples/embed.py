"""What the recipes that embed Python share: a program built against this interpreter's libpython and the installed header, and run."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import modprop_fast as mf

SKIPPED = 77


def build_and_run(source, compiler, *flags):
    """Exit as the program does, with this interpreter as its argument; with SKIPPED where something to build it is missing."""
    said = sysconfig.get_config_var
    library = "python" + (said("LDVERSION") or said("VERSION"))
    folders = [folder for folder in (said("LIBDIR"), said("LIBPL")) if folder and list(Path(folder).glob(f"lib{library}.*"))]
    lacks = [
        *([] if shutil.which(compiler[0]) else [f"the compiler {compiler[0]}"]),
        *([] if Path(sysconfig.get_path("include"), "Python.h").exists() else ["Python.h"]),
        *([] if folders else [f"lib{library}, which is to be embedded"]),
    ]
    if lacks:
        print("skipped: this machine lacks " + " and ".join(lacks))
        sys.exit(SKIPPED)
    program = source.parent / "build" / "host"
    program.parent.mkdir(exist_ok=True)
    command = [
        *compiler, *flags, "-O2", "-Wall", "-Wextra", "-Werror", source, "-o", program,
        "-I", mf.get_include(), "-I", sysconfig.get_path("include"),
        *(option for folder in folders for option in ("-L", folder, f"-Wl,-rpath,{folder}")),
        f"-l{library}", *(said("LIBS") or "").split(), *(said("SYSLIBS") or "").split(), *(said("LINKFORSHARED") or "").split(),
    ]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True)
    sys.exit(subprocess.run([program, sys.executable]).returncode)
