"""ModProp, a causal low-complexity alternative to back-propagation through time, in hand-written Cython kernels."""

try:
    from . import core
except ImportError as error:
    raise ImportError(
        f"modprop_fast: the compiled engine is missing ({error}); in a clone, `pip install -e .` builds it"
    ) from error

from pathlib import Path

from .learner import Evaluation, Learner
from .network import Network
from .optimizers import SGD, Adam, StepDecay
from .rules import BPTT, MDGL, RFLO, RTRL, RULES, TBPTT, UORO, EProp, LowRank, ModProp, Rule, SnAp1, parse_rule

__version__ = "0.1.0"
__all__ = [
    "BPTT",
    "MDGL",
    "RFLO",
    "RTRL",
    "RULES",
    "SGD",
    "TBPTT",
    "UORO",
    "Adam",
    "EProp",
    "Evaluation",
    "Learner",
    "LowRank",
    "ModProp",
    "Network",
    "Rule",
    "SnAp1",
    "StepDecay",
    "__version__",
    "core",
    "get_include",
    "parse_rule",
]


def get_include() -> str:
    """The folder of ``modprop_fast.h`` and of the declarations of ``modprop_fast.core`` for Cython, for the include path of an extension.

    `core.pxd`, in the folder above it, needs no path: ``from modprop_fast.core cimport ...`` finds it by the package.
    """
    return str(Path(__file__).parent / "include")
