"""Builds host.c against this interpreter's libpython and the installed header, and runs it."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import modprop_fast as mf

SKIPPED = 77
here, said = Path(__file__).resolve().parent, sysconfig.get_config_var
library = "python" + (said("LDVERSION") or said("VERSION"))
folders = [folder for folder in (said("LIBDIR"), said("LIBPL")) if folder and list(Path(folder).glob(f"lib{library}.*"))]
compiler = (said("CC") or "cc").split()
lacks = [
    *([] if shutil.which(compiler[0]) else [f"the compiler {compiler[0]}"]),
    *([] if Path(sysconfig.get_path("include"), "Python.h").exists() else ["Python.h"]),
    *([] if folders else [f"lib{library}, which is to be embedded"]),
]
if lacks:
    print("skipped: this machine lacks " + " and ".join(lacks))
    sys.exit(SKIPPED)

(here / "build").mkdir(exist_ok=True)
program = here / "build" / "host"
command = [
    *compiler, "-O2", "-Wall", "-Wextra", "-Werror", here / "host.c", "-o", program,
    "-I", mf.get_include(), "-I", sysconfig.get_path("include"),
    *(option for folder in folders for option in ("-L", folder, f"-Wl,-rpath,{folder}")),
    f"-l{library}", *(said("LIBS") or "").split(), *(said("SYSLIBS") or "").split(), *(said("LINKFORSHARED") or "").split(),
]  # fmt: skip
subprocess.run(list(map(str, command)), check=True)
sys.exit(subprocess.run([program, sys.executable]).returncode)
